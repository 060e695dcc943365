"""How the mini models are made: corpus, tokenizer, models, SAEs, panel; one module a step.

Run as `python -m tools.mini.<step>`, in the order of `make mini`. Nothing here is
imported by the rest of the package; what the steps leave behind is described in `..__init__`.
"""
