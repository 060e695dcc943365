"""How the mini models are made: corpus, tokenizer, models, SAEs, panel; one module per step.

Run as `python -m tools.mini.<step>`, in the order of `make mini`. The package
imports nothing from here; `qwen_scope_lens/mini/__init__.py` tells what the steps leave behind.
"""
