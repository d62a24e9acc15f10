"""Quantization: number formats of frozen weights, NF4, and products with packed weights."""
