"""A cache of tensors that are derived from an SAE's parameters, valid while those do not change.

A row-major decoder, row norms and the like cost a pass over the weights, so they are made once.
They are not in any state_dict, and `deepcopy` and `pickle` do not copy them. They are made again
after `.to()`, a load, an in-place change or a replaced parameter. The caller says what is derived,
and how.

torch counts the changes of a tensor, but not all: fused optimizers are not counted, and an
inference tensor has no counter. So a parameter that requires a gradient, and an inference tensor,
is never trusted from one call to the next: everything derived from it is made anew on each call.
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
    """A cache of objects made from tensors. Each is valid for one state of its tensors."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Any, Any]] = {}
        self.generation = 0
        """A counter that grows whenever an entry is dropped on purpose."""

    def get(
        self,
        name: str,
        sources: tuple[torch.Tensor, ...],
        make: Callable[[], T],
        *,
        every_feature: bool = False,
        also: object = None,
    ) -> T:
        """The last result of `make`, or a new one if `sources` or `also` have changed since.

        With `every_feature`, changes that torch does not count are looked for in one number per
        feature, instead of in sixteen numbers of the tensor.
        """
        with outside():  # a kept tensor must not belong to a transform
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
            self.kept.pop(name, None)
            return make()
        state = (also, *(_state(source, every_feature) for source in sources))
        found = self.kept.get(name)
        if found is not None and found[0] == state:
            made: T = found[1]
            return made
        self.kept.pop(name, None)
        made = make()
        self.kept[name] = (state, made)
        return made

    def drop(self, name: str) -> None:
        """Forget one entry, because its sources may change without a trace."""
        if self.kept.pop(name, None) is not None:
            self.generation += 1

    def clear(self) -> None:
        """Forget all entries."""
        self.kept.clear()
        self.generation += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()


def _state(tensor: torch.Tensor, every_feature: bool) -> tuple[Any, ...]:
    """A description of a tensor that stays equal while the tensor is not changed.

    A write through `.data` leaves no trace in torch's version counter, so some elements are
    compared as well. Sixteen elements show that a matrix was rescaled or reloaded. One element per
    feature also shows that a feature was edited; of a bias, that is every element.
    """
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
    """The bits of numbers, so that NaN equals itself."""
    return numbers.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _one_for_each(matrix: torch.Tensor) -> torch.Tensor:
    """One element per row, or per column if there are more columns, diagonal after diagonal."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    m, d = tall.shape
    down, across = tall.stride()
    start, whole = tall.storage_offset(), m // d
    blocks = tall.as_strided((whole, d), (d * down, down + across), start)
    left = tall.as_strided((m - whole * d,), (down + across,), start + whole * d * down)
    return torch.cat([blocks.reshape(-1), left])
