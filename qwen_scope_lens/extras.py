"""Optional packages are imported where they are needed; the error says how to install one."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from qwen_scope_lens.errors import MissingExtra

__all__ = ["check", "require"]


def require(module: str, extra: str) -> Any:
    """Import a module that belongs to one of this package's extras: `require("ray", "ray")`."""
    try:
        return import_module(module)
    except ImportError as error:
        raise _missing(module, extra, str(error)) from error


def check(module: str, extra: str) -> None:
    """Refuse a missing package before the work begins, without waiting for its import."""
    there = sys.modules[module] if module in sys.modules else find_spec(module)
    if there is None:
        raise _missing(module, extra, "no module of this name was found")


def _missing(module: str, extra: str, why: str) -> MissingExtra:
    return MissingExtra(
        f"this needs {module}, which is not installed ({why}):"
        f" pip install --constraint constraints.txt 'qwen-scope-lens[{extra}]'"
    )
