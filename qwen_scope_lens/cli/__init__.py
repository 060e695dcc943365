"""The command line: one thin file per verb, without logic."""

from qwen_scope_lens.cli.verbs import main

__all__ = ["main"]
