"""Tensors derived from an SAE's parameters, kept while the parameters stay what they were.

A row-major decoder, row norms and the like cost a pass over the weights, so they are made once.
They belong to no state_dict, are not copied by `deepcopy` or `pickle`, and are made again after
`.to()`, a load, an in-place change or a replaced parameter. What is derived, and how, is the
caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["Derived"]

T = TypeVar("T")

_PROBES = 16


class Derived:
    """A cache of things made from tensors, each valid for one state of those tensors."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any]] = {}

    def get(self, name: str, sources: tuple[torch.Tensor, ...], make: Callable[[], T]) -> T:
        """What `make` returned last time, or its new result if `sources` changed since."""
        state = tuple(_state(source) for source in sources)
        found = self._kept.get(name)
        if found is not None and found[0] == state:
            return found[1]
        self._kept.pop(name, None)
        made = make()
        self._kept[name] = (state, made)
        return made

    def clear(self) -> None:
        self._kept.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()


def _state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for an untouched tensor. A write through `.data` leaves no trace in the version
    counter, so a few elements are compared too: that sees a rescaled or reloaded matrix, not one
    edited row."""
    version = -1 if tensor.is_inference() else tensor._version
    address = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    if not tensor.numel() or tensor.is_meta:
        return (*address, version)
    with torch.no_grad():
        diagonal = tensor
        for _ in range(tensor.ndim - 1):
            diagonal = diagonal.diagonal()
        step = max(1, len(diagonal) // _PROBES)
        probes = tuple(diagonal[::step].double().tolist())
    return (*address, version, probes)
