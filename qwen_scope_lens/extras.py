"""Optional packages: imported where they are needed; a missing one says how to get it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qwen_scope_lens.errors import MissingExtra

__all__ = ["require"]


def require(module: str, extra: str) -> Any:
    """`require("ray", "ray")` imports a module of an optional extra of this package."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"this needs {module}, which is not installed ({error}):"
            f" pip install --constraint constraints.txt 'qwen-scope-lens[{extra}]'"
        ) from error
