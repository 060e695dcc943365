"""Compiled models run eagerly inside a block, so that hooks act in every pass.

A graph that torch's compiler has made knows the hooks that stood there when it was made; one that
is registered later is never called. So whoever places hooks runs the model eagerly meanwhile. The
graphs are kept, and serve again after the block.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qwen_scope_lens.errors import WrongModel

__all__ = ["eagerly"]

_lock = threading.Lock()
_open: list[Any] = []
"""The stance of each open block. Blocks of several threads may end in any order; the first one
knows what to go back to."""


@contextmanager
def eagerly() -> Iterator[None]:
    """While inside, whatever was compiled runs eagerly: models, layers, `generate`'s decode step.

    The compiler's stance belongs to the process, so compiled functions of other threads run eagerly
    too: right, but slower. Blocks may be nested and may overlap between threads.
    """
    with _lock:
        try:
            _open.append(torch.compiler.set_stance("force_eager"))
        except RuntimeError as error:
            raise WrongModel(
                "hooks would be placed inside a compiled function, whose graph would keep or miss"
                " them: expected a call from eager code. Call steer, capture or the bridge outside"
                " of torch.compile"
            ) from error
    try:
        yield
    finally:
        with _lock:
            mine = _open.pop()
            if not _open:
                mine.__exit__(None, None, None)
