"""Shuffled copies of B, which show what scores chance gives.

Shuffled directions keep the mean, the covariance and the distribution along every principal axis of
B's decoder, so that the few dimensions that all features of a language model use do not count as
agreement. Shuffled activations keep their documents but change their positions in them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qwen_scope_lens.saes.exact.matmul import product

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["shuffled_directions", "shuffled_rows"]

CHUNK = 8192


def shuffled_directions(directions: torch.Tensor, seed: int) -> torch.Tensor:
    """Permute the values along each principal axis among the features. `[n, d] -> [n, d]`

    Directions are normalised to unit length first, as for the cosine.
    """
    unit = torch.nn.functional.normalize
    n, d = directions.shape
    total = torch.zeros(d, dtype=torch.float64)
    square = torch.zeros(d, d, dtype=torch.float64)
    for rows in directions.detach().split(CHUNK):
        x = unit(rows.float(), dim=-1).double()
        total += x.sum(0)
        square += x.T @ x
    mean = total / n
    _, axes = torch.linalg.eigh(square / n - torch.outer(mean, mean))
    axes, mean = axes.float(), mean.float()
    rotated = torch.empty(n, d)
    for start in range(0, n, CHUNK):
        rows = directions[start : start + CHUNK].detach().float()
        rotated[start : start + CHUNK] = product(unit(rows, dim=-1) - mean, axes.T)
    rng = np.random.default_rng(seed)
    for axis in range(d):
        rotated[:, axis] = rotated[torch.from_numpy(rng.permutation(n)), axis]
    for start in range(0, n, CHUNK):
        rows = rotated[start : start + CHUNK]
        rotated[start : start + CHUNK] = product(rows, axes) + mean
    return rotated


def shuffled_rows(activations: csr_matrix, seed: int, doc: Any = None) -> csr_matrix:
    """Permute the rows: features of B still fire together, but at other places in the text.

    With `doc [n]` every row stays in its document. Two features that merely fire on the same kind
    of document, such as those of one language, then agree with the shuffled copy as well.
    """
    rng = np.random.default_rng(seed)
    n = activations.shape[0]
    if doc is None:
        return activations[rng.permutation(n)]
    return activations[_within(np.asarray(doc), rng)]


def _within(doc: Any, rng: np.random.Generator) -> Any:
    """A random permutation that keeps every row in its document."""
    order = np.empty(len(doc), dtype=np.int64)
    order[np.argsort(doc, kind="stable")] = np.lexsort((rng.random(len(doc)), doc))
    return order
