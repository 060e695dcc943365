"""The caches of a model as data: rows of keys and values that are joined, split and cropped.

transformers' `DynamicCache` holds one batch. Here its layers are taken apart, so that a row can
join a batch or leave it between two passes. Rows of different lengths are aligned on the right.
Layers of linear attention have states instead of keys and values; they have no length, and nothing
can be cropped from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["cropped", "is_croppable", "joined", "nbytes", "selected", "supported", "trimmed"]

Cache = Any  # a transformers.DynamicCache


def supported(cache: Cache) -> bool:
    """Whether all layers are of a kind that this module knows."""
    return all(_is_attention(one) or _has_states(one) for one in cache.layers)


def _is_attention(layer: Any) -> bool:
    return type(layer).__name__ == "DynamicLayer"


def _has_states(layer: Any) -> bool:
    return type(layer).__name__ == "LinearAttentionLayer"


def is_croppable(cache: Cache) -> bool:
    return all(_is_attention(layer) for layer in cache.layers)


def cropped(cache: Cache, length: int) -> Cache:
    """One row's first `length` tokens; of a cache with states, a copy of all of it.

    Keys and values are never changed in place, so they need no copy.
    """
    return _made(cache, [lambda t: t[..., :length, :]], torch.clone)


def joined(caches: Sequence[Cache], lengths: Sequence[int]) -> tuple[Cache, int]:
    """The rows of several batches in one, and its length in columns."""
    longest = max(lengths)
    places = [lambda t, n=n: pad(t, (0, 0, longest - n, 0)) for n in lengths]
    return _joined(caches, places), longest


def selected(cache: Cache, rows: Sequence[int]) -> Cache:
    """Some rows of a batch."""

    def take(t: Tensor) -> Tensor:
        return t[torch.tensor(rows, device=t.device)]

    return _made(cache, [take], take)


def trimmed(cache: Cache, columns: int) -> Cache:
    """Without the first columns, which are pads in every row."""
    return _made(cache, [lambda t: t[..., columns:, :].contiguous()], lambda t: t)


def nbytes(cache: Cache) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in _tensors(layer))


def _tensors(layer: Any) -> list[Tensor]:
    if _is_attention(layer):
        return [layer.keys, layer.values]
    states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return [t for t in states if t is not None]


def _made(cache: Cache, keys: Sequence[Any], states: Any) -> Cache:
    return _joined([cache], keys, states)


def _joined(caches: Sequence[Cache], places: Sequence[Any], states: Any = lambda t: t) -> Cache:
    """A new cache from the rows of others; `places[i]` is applied to the i-th one's keys."""
    found = transformers.DynamicCache()
    layers = []
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        new = type(parts[0])()
        if _is_attention(new):
            new.lazy_initialization(parts[0].keys, parts[0].values)
            for name in ("keys", "values"):
                placed = [f(getattr(p, name)) for f, p in zip(places, parts, strict=True)]
                setattr(new, name, torch.cat(placed) if len(placed) > 1 else placed[0])
        else:
            for kind in ("conv_states", "recurrent_states"):
                for i, first in getattr(parts[0], kind).items():
                    if first is not None:
                        rows = [states(getattr(p, kind)[i]) for p in parts]
                        getattr(new, kind)[i] = torch.cat(rows)
                        getattr(new, f"is_{kind}_initialized")[i] = True
            first = parts[0]
            new.has_previous_state = dict(first.has_previous_state)
            new.conv_kernel_size = dict(first.conv_kernel_size)
            new.device, new.dtype = first.device, first.dtype
        layers.append(new)
    found.layers = layers
    return found
