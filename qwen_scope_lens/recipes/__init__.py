"""The experiments of the Qwen-Scope paper as files that run: YAML here, stages beside it."""

import lazy_loader

# The names are listed once, in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
