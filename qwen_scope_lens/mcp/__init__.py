"""Tools for language-model agents, over the Model Context Protocol: `qsl mcp`."""

import lazy_loader

# The names are listed once, in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
