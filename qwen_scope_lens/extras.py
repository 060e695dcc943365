"""Optional packages are imported where they are needed; the error says how to install one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qwen_scope_lens.errors import MissingExtra

__all__ = ["require"]


def require(module: str, extra: str) -> Any:
    """Import a module that belongs to one of this package's extras: `require("ray", "ray")`."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"this needs {module}, which is not installed ({error}):"
            f" pip install --constraint constraints.txt 'qwen-scope-lens[{extra}]'"
        ) from error
