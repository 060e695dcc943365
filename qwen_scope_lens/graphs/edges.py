"""Edges between two SAE layers of one text, by gradients through the frozen model in between.

At every SAE layer the residual is its own decomposition, x = sum of (activation * decoder row)
+ b_dec + error, and a gradient ends there. So an edge is direct: the gradient of a node's
pre-activation with respect to the residual of the SAE layer below, times what the source writes
there. One backward pass serves a block of target nodes, as rows of a batch whose size follows from
a memory budget. Nothing has the width of the dictionary but an SAE's own first pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qwen_scope_lens.graphs.frozen import Frozen
from qwen_scope_lens.saes.layer_sae import LayerSAE

__all__ = ["MEMORY", "Edges", "Level", "Target", "decompose", "edges_from"]

MEMORY = 2**30
CHUNK = 64 * 2**20
"""How many bytes of decoder rows are gathered at a time."""


@dataclass(frozen=True)
class Target:
    """What is explained: a token's logit minus another's, or minus the mean of all."""

    token: int
    minus: int | None
    words: str

    def value(self, logits: Tensor) -> Tensor:
        """`[rows, vocabulary] -> [rows]`, in float32 or better."""
        other = logits.mean(-1) if self.minus is None else logits[:, self.minus]
        return logits[:, self.token] - other


@dataclass(frozen=True)
class Level:
    """The residual of one SAE layer, taken apart. Of the embeddings, the error is all there is."""

    layer: int
    x: Tensor  # [T, d_model]
    values: Tensor  # [T, k], 0 for padding
    indices: Tensor  # [T, k]
    error: Tensor  # [T, d_model]
    bias: Tensor  # [d_model]
    sae: LayerSAE | None = None

    def features(self) -> Tensor:
        """What all features together write. `[T, d_model]`"""
        return self.x - self.error - self.bias

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        """The decoder rows in use `[n, d_model]`, and which of them each feature has `[T, k]`."""
        assert self.sae is not None
        used, place = self.indices.unique(return_inverse=True)
        return self.sae.direction(used.to(self.sae.W_dec.device)).to(self.error), place

    def directions(self) -> Iterable[tuple[slice, Tensor]]:
        """The decoder rows of the features of some tokens at a time. `[t, k, d_model]`"""
        if self.sae is None:
            return
        rows, place = self._rows
        size = max(1, CHUNK // max(1, rows[0].nbytes * self.indices.shape[1]))
        for start in range(0, len(self.x), size):
            part = slice(start, start + size)
            yield part, rows[place[part]]


@torch.no_grad()
def decompose(one: Frozen, layer: int, sae: LayerSAE | None) -> Level:
    """Take the residual after a layer apart, with the SAE's own exact selection."""
    x = one.residuals[layer]
    precise = torch.promote_types(x.dtype, torch.float32)
    if sae is None:
        none = x.new_zeros(len(x), 0)
        zeros = torch.zeros(x.shape[-1], dtype=precise, device=x.device)
        return Level(layer, x, none, none.long(), x.to(precise), zeros)
    codes = sae.encode_sparse(x.to(sae.W_dec.device))
    values, indices = codes.values.to(x.device, precise), codes.indices.long().to(x.device)
    error = torch.empty_like(x, dtype=precise)
    bias = sae.b_dec.detach().to(x.device, precise)
    level = Level(layer, x, values, indices, error, bias, sae)
    for rows, directions in level.directions():
        written = torch.einsum("tk,tkd->td", values[rows], directions)
        error[rows] = x[rows].to(precise) - written - bias
    return level


@dataclass(frozen=True)
class Edges:
    """The edges from one level into n nodes above it."""

    features: Tensor  # [n, T, k]
    rest: Tensor  # [n, T], of errors or embeddings
    bias: Tensor  # [n]
    linear: Tensor  # [n]: gradient times residual, computed without the decomposition
    removed: Tensor  # [n]: what the node really loses when no feature is there, by two forward runs


def edges_from(
    one: Frozen,
    level: Level,
    above: int | None,
    seeds: Sequence[tuple[int, Tensor]],
    target: Target,
    *,
    steps: int = 1,
    memory: int = MEMORY,
    on_block: Callable[[int], object] = lambda count: None,
) -> Edges:
    """All edges from a level into nodes of the next SAE layer, `above`, or into the target (None).

    `seeds` are token and encoder row `[d_model]` of each node; of the target, they are not used.
    """
    x, n = level.x, len(seeds) if above is not None else 1
    tokens, k = level.values.shape
    per_row = 2 * one.bytes_per_row(level.layer, above) + 3 * x.numel() * level.error.element_size()
    size = max(1, min(n, memory // per_row))
    found = Edges(
        *(level.error.new_zeros(n, *shape) for shape in ((tokens, k), (tokens,), (), (), ()))
    )
    off = x.to(level.error) - level.features()
    for step in range(steps):
        # Midpoints of the way from no feature to all of them; the plain gradient is at the end.
        share = 1.0 if steps == 1 else (step + 0.5) / steps
        at = x if steps == 1 else (off + share * level.features()).to(x.dtype)
        leaf = at[None].expand(size, -1, -1).contiguous().requires_grad_()
        with torch.enable_grad():
            out = one.run(level.layer, above, leaf)
            scalars = target.value(out.to(level.error)) if above is None else None
        for start in range(0, n, size):
            block = seeds[start : start + size]
            if scalars is not None:
                [gradient] = torch.autograd.grad(scalars.sum(), leaf)
            else:
                seed = torch.zeros_like(out)
                for row, (position, direction) in enumerate(block):
                    seed[row, position] = direction.to(out)
                last = start + size >= n
                [gradient] = torch.autograd.grad(out, leaf, seed, retain_graph=not last)
            count = 1 if scalars is not None else len(block)
            _add(found, slice(start, start + count), gradient[:count].to(level.error), level, steps)
            on_block(count)
    both = torch.stack([x, off.to(x.dtype)])
    with torch.no_grad():
        out = one.run(level.layer, above, both).to(level.error)
    change = target.value(out)[None] if above is None else _read(out, seeds)
    found.removed.copy_(change[:, 0] - change[:, 1])
    return found


def _read(out: Tensor, seeds: Sequence[tuple[int, Tensor]]) -> Tensor:
    """What each node reads from residuals `[rows, T, d_model]`. `[n, rows]`"""
    return torch.stack([out[:, position] @ direction.to(out) for position, direction in seeds])


def _add(found: Edges, rows: slice, gradient: Tensor, level: Level, steps: int) -> None:
    """Add the edges of a block of nodes, from their gradients `[n, T, d_model]`."""
    gradient = gradient / steps
    for part, directions in level.directions():
        along = torch.einsum("ntd,tkd->ntk", gradient[:, part], directions)
        found.features[rows, part] += along * level.values[part]
    found.rest[rows] += torch.einsum("ntd,td->nt", gradient, level.error)
    found.bias[rows] += gradient.sum(1) @ level.bias
    found.linear[rows] += torch.einsum("ntd,td->n", gradient, level.x.to(gradient))
