"""Qwen-Scope for SAELens and TransformerLens."""
