"""Qwen-Scope for SAELens and TransformerLens.

Importing this package changes nothing in other packages. `install()` adds our releases to SAELens,
and `uninstall()` undoes that. The public names are listed once, in `__init__.pyi`, and each is
imported on first use, so that `qsl --help` and `import qwen_scope_lens` do not wait seconds for
torch, SAELens and TransformerLens.
"""

import lazy_loader

from qwen_scope_lens.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
