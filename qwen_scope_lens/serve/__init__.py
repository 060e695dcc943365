"""The lens as a server: one OpenAI-compatible API for programs and for the page."""

import lazy_loader

# The names are listed once, in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
