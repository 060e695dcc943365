"""Qwen-Scope for SAELens and TransformerLens.

Importing this package changes nothing elsewhere; `install()` does, and `uninstall()` undoes it. The
names are listed once, in `__init__.pyi`, and imported on first use, so that `qsl --help` and
`import qwen_scope_lens` do not wait seconds for torch, SAELens and TransformerLens.
"""

import lazy_loader

from qwen_scope_lens.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
