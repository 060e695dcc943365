"""Features across SAEs, layers and models."""
