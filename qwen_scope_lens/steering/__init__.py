"""Sparse codes edited while the model runs."""
