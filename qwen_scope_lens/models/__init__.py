"""A Qwen checkpoint becomes hook points, and texts become residual streams."""
