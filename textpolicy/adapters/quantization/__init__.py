"""Number formats of frozen weights: quantizing a model, NF4, and products with packed weights."""
