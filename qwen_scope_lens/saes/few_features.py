"""The values of a few chosen features, exactly as a full encode gives them, mostly without one.

A feature is active where its score is positive and among the k largest. Three certificates decide
that, each of them exact, the cheap ones first:

1. *Negative.* The feature's own score, computed in float64, is at most 0 even with its error added.
2. *Outnumbered.* Among a few hundred *witnesses* (features that fire often), at least k score
   higher, so the feature cannot be among the k largest. The witnesses' scores come from a float32
   product whose error has a known bound.
3. *Encoded.* Every position that is still open is encoded in full (`LayerSAE.encode_sparse`).

The maximum over a document needs step 3 at few positions only. Positions are encoded in order of
the highest value that they can have, and once an active one is found, all positions that cannot
exceed it are settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qwen_scope_lens.errors import NotFinite
from qwen_scope_lens.saes.codes import SparseCodes
from qwen_scope_lens.saes.exact.encoder import norm_above
from qwen_scope_lens.saes.exact.matmul import product
from qwen_scope_lens.saes.exact.topk import require_finite
from qwen_scope_lens.saes.exact.weight_cache import Derived, fingerprint
from qwen_scope_lens.saes.layer_sae import LayerSAE

__all__ = ["U32", "U64", "Maxima", "Membership", "activations_of", "kth_at_least"]

U32, U64 = 2.0**-24, 2.0**-53
_NO_ROW = 2**62
WARM_UP = 256
"""The number of positions that are encoded in full before the first witnesses are chosen."""

_BLOCK = 512
"""The number of positions whose witnesses are scored at a time."""


@dataclass(frozen=True)
class Maxima:
    """The largest value of each feature in each document, and the first row with that value."""

    values: torch.Tensor  # float32 [n_docs, m]; 0 where the feature never fires
    rows: torch.Tensor  # int64 [n_docs, m]; -1 where it never fires


class _Fired:
    """How often each feature of an SAE fired in what was encoded for certificates so far."""

    def __init__(self, sae: LayerSAE) -> None:
        self.often = torch.zeros(sae.cfg.d_sae, dtype=torch.long, device=sae.W_enc.device)
        self.encoded = 0


class Membership:
    """Reads chosen features of an SAE.

    Which features fire often is counted once per SAE, and kept beside it until its weights change:
    the next Membership of the same SAE chooses its witnesses before it encodes anything.

    `settled` counts the (position, feature) pairs that each certificate has decided.
    """

    def __init__(self, sae: LayerSAE, features: Sequence[int], n_witnesses: int | None = None):
        self.sae = sae
        self.features = torch.as_tensor(list(features), dtype=torch.long, device=sae.W_enc.device)
        self.n_witnesses = n_witnesses or max(4 * sae.cfg.k, sae.cfg.d_sae // 16)
        self._fired = sae.derived.get("fired", (sae.W_enc, sae.b_enc), lambda: _Fired(sae))
        self._next_choice = WARM_UP
        self._witnesses: torch.Tensor | None = None  # numbers of features
        self.derived = Derived()
        self.settled: Counter[str] = Counter()
        self._choose_witnesses()

    @torch.no_grad()
    def maxima(self, x: torch.Tensor, document: torch.Tensor, n_docs: int) -> Maxima:
        """The largest value of each feature per document.

        `x [n, d_in]` are residuals; `document`, int64 `[n]`, has the document of each row, from 0
        to n_docs - 1.
        """
        best = x.new_zeros((n_docs, len(self.features)), dtype=torch.float32)
        where = torch.full(best.shape, _NO_ROW, dtype=torch.long, device=x.device)
        document = document.to(x.device)
        if not len(x):
            return Maxima(best, where.fill_(-1))
        upper, open_ = self._candidates(x)
        take = 1
        while True:
            # A pair stays open while it can exceed its document's maximum, or equal it at an
            # earlier row.
            open_ &= upper >= best[document]
            if not bool(open_.any()):
                break
            chosen = self._first(upper, open_, document, take)
            values = self._encode(x[chosen])
            self.settled["encoded"] += int(open_[chosen].sum())
            open_[chosen] = False
            self._raise(best, where, values, chosen, document)
            take *= 4
        return Maxima(best, where.masked_fill(where == _NO_ROW, -1))

    @torch.no_grad()
    def values(self, x: torch.Tensor) -> torch.Tensor:
        """The features' values at every position, 0 outside the top k. `[n, d_in] -> [n, m]`"""
        out = x.new_zeros((len(x), len(self.features)), dtype=torch.float32)
        if len(x):
            open_ = self._candidates(x)[1]
            rows = open_.any(1).nonzero().squeeze(1)
            self.settled["encoded"] += int(open_.sum())
            if len(rows):
                out[rows] = self._encode(x[rows])
        return out

    def _candidates(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """An upper bound of each value, and which pairs may be active. Both `[n, m]`."""
        if not self.sae._plain_topk or self.sae._encode_watched:
            shape = (len(x), len(self.features))
            return x.new_full(shape, float("inf")).double(), x.new_ones(shape, dtype=torch.bool)
        inside = self.sae.process_sae_in(x)
        rows, bias, norms = (part.double() for part in self._weights("features", self.features))
        score = inside.double() @ rows.T + bias
        if not bool(score.isfinite().all()):
            require_finite(x, x.shape[:-1])
            self.sae.exact_encoder()  # raises with the names of weights that are not finite
            raise NotFinite("scores exceed float64: expected residuals of a trained model")
        length = norm_above(inside).double()
        d_in = self.sae.cfg.d_in
        size = length[:, None] * norms
        error = 4 * d_in * U64 * (size + bias.abs())
        open_ = score + error > 0
        self.settled["negative"] += int((~open_).sum())
        if self._witnesses is not None:
            kth = torch.cat([self._kth_at_least(block) for block in inside.split(_BLOCK)])
            outnumbered = open_ & (kth[:, None] > score + error + 4 * U32 * score)
            open_ &= ~outnumbered
            self.settled["outnumbered"] += int(outnumbered.sum())
        # A full encode stores a float32 dot, which may be a little above the score.
        upper = score + 1.1 * (d_in + 8) * U32 * (size + bias.abs())
        return upper, open_

    def _kth_at_least(self, inside: torch.Tensor) -> torch.Tensor:
        """A score that at least k witnesses reach with certainty. `[n, d_in] -> float64 [n]`"""
        assert self._witnesses is not None
        rows, bias, norms = self._weights("witnesses", self._witnesses)
        score = product(inside.float(), rows) + bias
        length, cfg = norm_above(inside), self.sae.cfg
        return kth_at_least(score, length, bias, norms, cfg.k, cfg.d_in)

    def _weights(
        self, name: str, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The present encoder rows, biases and upper bounds of the rows' lengths, in float32."""

        def read() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            rows = self.sae.encoder_row(index).detach().float()
            return rows, self.sae.b_enc.detach()[index].float(), norm_above(rows)

        weights, bias = self.sae.W_enc, self.sae.b_enc
        column = torch.arange(len(index), device=index.device) % len(weights)
        now = (self.sae.derived.generation, fingerprint(weights.detach()[column, index]))
        return self.derived.get(name, (weights, bias), read, also=now)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """The features' values from a full encode. `[n, d_in] -> [n, m]`"""
        codes = self.sae.encode_sparse(x)
        self._fired.often += torch.bincount(
            codes.indices[codes.active].long(), minlength=self.sae.cfg.d_sae
        )
        self._fired.encoded += len(x)
        self._choose_witnesses()
        return activations_of(codes, self.features)

    def _choose_witnesses(self) -> None:
        """Take the features that fired most often so far as witnesses, once enough were seen."""
        if self._fired.encoded < self._next_choice:
            return
        self._next_choice = 4 * self._fired.encoded
        self._witnesses = self._fired.often.topk(min(self.n_witnesses, self.sae.cfg.d_sae)).indices
        self.derived.clear()

    def _first(
        self, upper: torch.Tensor, open_: torch.Tensor, document: torch.Tensor, take: int
    ) -> torch.Tensor:
        """The rows to encode next: per document and feature, the `take` highest that are open."""
        if self._witnesses is None:  # any rows will do: they show which features fire often
            return open_.any(1).nonzero().squeeze(1)[: max(WARM_UP, 1)]
        chosen = torch.zeros(len(upper), dtype=torch.bool, device=upper.device)
        for column in range(upper.shape[1]):
            rows = open_[:, column].nonzero().squeeze(1)
            rows = rows[upper[rows, column].argsort(descending=True, stable=True)]
            rows = rows[document[rows].argsort(stable=True)]
            owner = document[rows]
            fresh = torch.ones_like(owner, dtype=torch.bool)
            fresh[1:] = owner[1:] != owner[:-1]
            at = torch.arange(len(rows), device=rows.device)
            start = torch.where(fresh, at, 0).cummax(0).values if len(rows) else at
            chosen[rows[at - start < take]] = True
        return chosen.nonzero().squeeze(1)

    def _raise(
        self,
        best: torch.Tensor,
        where: torch.Tensor,
        values: torch.Tensor,
        chosen: torch.Tensor,
        document: torch.Tensor,
    ) -> None:
        """Update the maxima with new values. Of equal values, the earliest row is kept."""
        for column in range(values.shape[1]):
            fired = values[:, column] > 0
            rows, found = chosen[fired], values[fired, column]
            owner = document[rows]
            old = best[:, column]
            new = old.scatter_reduce(0, owner, found, "amax")
            first = where[:, column].masked_fill(new > old, _NO_ROW)
            level = found == new[owner]
            first = first.scatter_reduce(0, owner[level], rows[level], "amin")
            best[:, column], where[:, column] = new, first


def kth_at_least(
    score: torch.Tensor,
    length: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor,
    k: int,
    d_in: int,
) -> torch.Tensor:
    """A score that at least k of some features reach with certainty. float64 `[n]`

    `score [n, w]` are their float32 scores, `length [n]` and `norms [w]` upper bounds of the
    lengths of the residuals and of the features' rows.
    """
    reach = 1.1 * (d_in + 8) * U32
    least = score - (reach * length)[:, None] * norms - reach * bias.abs()
    return least.topk(k, dim=1).values[:, -1].double()


def activations_of(codes: SparseCodes, features: torch.Tensor) -> torch.Tensor:
    """The activations of chosen features, 0 outside the top k. `codes [..], [m] -> [.., m]`"""
    out = codes.values.new_zeros((*codes.shape, len(features)))
    for column, feature in enumerate(features.tolist()):
        out[..., column] = (codes.values * (codes.indices == feature)).sum(-1)  # padding is 0
    return out
