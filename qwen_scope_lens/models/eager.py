"""Run compiled models eagerly inside a `with` block, so that hooks act in every pass.

A graph of torch's compiler contains the hooks that were there when it was made; a hook that is
registered later is never called. So all code that places hooks runs the model eagerly meanwhile.
The graphs are kept, and are used again after the block.
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
"""The stances that open blocks have set. Blocks of several threads may end in any order; the first
stance in this list restores the state from before all of them."""


@contextmanager
def eagerly() -> Iterator[None]:
    """Run everything compiled eagerly inside this block: models, layers, `generate`'s decode step.

    The compiler's stance belongs to the process, so compiled functions of other threads run eagerly
    as well; they stay right, but are slower. Blocks may be nested, and may overlap between threads.
    """
    with _lock:
        try:
            _open.append(torch.compiler.set_stance("force_eager"))
        except RuntimeError as error:
            raise WrongModel(
                "hooks would be placed inside a compiled function, and its graph would keep or miss"
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
