"""Tensors derived from an SAE's parameters, kept while the parameters stay what they were.

A row-major decoder, row norms and the like cost a pass over the weights, so they are made once.
They belong to no state_dict, are not copied by `deepcopy` or `pickle`, and are made again after
`.to()`, a load, an in-place change or a replaced parameter. What is derived, and how, is the
caller's business.

torch counts the changes of a tensor, but not all of them: fused optimizers count none, and an
inference tensor has no counter. So what requires a gradient, and an inference tensor, is never
trusted from one call to the next: what is derived from it is made anew every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from qwen_scope_lens.saes.exact.transforms import outside

__all__ = ["Derived", "fingerprint"]

T = TypeVar("T")

_PROBES = 16


class Derived:
    """A cache of things made from tensors, each valid for one state of those tensors."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any]] = {}
        self.generation = 0
        """Grows whenever something is dropped on purpose."""

    def get(
        self,
        name: str,
        sources: tuple[torch.Tensor, ...],
        make: Callable[[], T],
        *,
        every_feature: bool = False,
        also: object = None,
    ) -> T:
        """What `make` returned last time, or its new result if `sources` or `also` changed since.

        `every_feature`: look for untraced changes in one number per feature instead of sixteen.
        """
        with outside():  # a transform must not reach what is kept
            return self._get(name, sources, make, every_feature, also)

    def _get(
        self,
        name: str,
        sources: tuple[torch.Tensor, ...],
        make: Callable[[], T],
        every_feature: bool,
        also: object,
    ) -> T:
        if any(source.requires_grad or source.is_inference() for source in sources):
            self._kept.pop(name, None)
            return make()
        state = (also, *(_state(source, every_feature) for source in sources))
        found = self._kept.get(name)
        if found is not None and found[0] == state:
            made: T = found[1]
            return made
        self._kept.pop(name, None)
        made = make()
        self._kept[name] = (state, made)
        return made

    def drop(self, name: str) -> None:
        """Forget one of them: its sources may change without a trace."""
        if self._kept.pop(name, None) is not None:
            self.generation += 1

    def clear(self) -> None:
        self._kept.clear()
        self.generation += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()


def _state(tensor: torch.Tensor, every_feature: bool) -> tuple[Any, ...]:
    """Equal for an untouched tensor. A write through `.data` leaves no trace in the version
    counter, so some elements are compared too: sixteen see a rescaled or reloaded matrix, one for
    each feature sees an edited feature as well; of a bias that is all of it."""
    address = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    if not tensor.numel() or tensor.is_meta:
        return (*address, tensor._version)
    probes = tensor.detach()
    if every_feature and tensor.ndim == 2:
        probes = _one_for_each(probes)
    elif not every_feature:
        for _ in range(tensor.ndim - 1):
            probes = probes.diagonal()
        probes = probes[:: max(1, len(probes) // _PROBES)]
    return (*address, tensor._version, fingerprint(probes))


def fingerprint(numbers: torch.Tensor) -> bytes:
    """Their bits, so that NaN equals itself."""
    return numbers.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _one_for_each(matrix: torch.Tensor) -> torch.Tensor:
    """One element of each row, or column where there are more of those: diagonal after diagonal."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    m, d = tall.shape
    down, across = tall.stride()
    start, whole = tall.storage_offset(), m // d
    blocks = tall.as_strided((whole, d), (d * down, down + across), start)
    left = tall.as_strided((m - whole * d,), (down + across,), start + whole * d * down)
    return torch.cat([blocks.reshape(-1), left])
