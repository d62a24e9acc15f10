"""Tests on a real pretrained model."""
