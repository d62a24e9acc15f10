"""What the algorithms share: averages, ratio levels, KL, token weights, and finding by name."""
