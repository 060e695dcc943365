"""The values of a few chosen features as one graph, for engines that record a pass and replay it.

`few_features.Membership` encodes only the positions that no certificate settles, so its shapes
depend on the data and it asks the host. Here every shape is known before, nothing branches on data
and the host is not asked, so `torch.compile(fullgraph=True)`, `torch.export` and a recorded CUDA
graph can hold it. The answer is the same, by the same definition: a feature is active where its
score (the exact dot of the stored numbers, rounded once to float32) is positive and among the k
largest, and of equal scores the lower feature wins. It is decided in four steps:

1. *Own score*, in float64: a score that is certainly not positive settles the pair.
2. *Witnesses*, only if `capacity` is below the number of positions: k features that fire often
   score certainly more. It is the certificate of `few_features.py`.
3. *Full product*, in float32, of every position, or of `capacity` positions that are still open:
   how many features certainly score more, and how many may.
4. *Contested* scores within the product's error, in float64, of `CONTESTED` positions.

What is left after that is said and not guessed: `undecided` flags open pairs whose position found
no place in step 3 or 4, near ties that float64 cannot order, and residuals that are not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_scope_lens.errors import UnsupportedSAE
from qwen_scope_lens.saes.exact.encoder import norm_above
from qwen_scope_lens.saes.exact.matmul import product
from qwen_scope_lens.saes.few_features import U32, U64, kth_at_least
from qwen_scope_lens.saes.layer_sae import LayerSAE

__all__ = ["CONTESTED", "FixedMembership", "why_not_plain"]

CONTESTED = 32
"""The number of positions whose contested scores are computed again in float64, per pass."""

_NEAR = 16
"""How many contested scores of one feature at one position are computed again."""

_SPARE = 32
"""How many features beyond the k best of the full product are looked at."""

_TILE = 4096
"""How many rows of an encoder that is not in float32 are converted at a time."""

_TINY = 2.0**-120


@torch.library.custom_op("qwen_scope_lens::scores", mutates_args=())
def scores(x: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    """`x @ rows.T + bias` in true float32, as one node of a graph. `[n, d], [m, d], [m] -> [n, m]`

    It is opaque to compilers, which could otherwise fuse it into a product of fewer bits.
    """
    if rows.dtype == torch.float32:
        found = product(x, rows)
    else:
        found = torch.cat([product(x, tile.float()) for tile in rows.split(_TILE)], 1)
    return (found + bias.float()).contiguous()


@scores.register_fake
def _(x: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], rows.shape[0]))


class FixedMembership(nn.Module):
    """Reads chosen features of an SAE at positions that the caller wants.

    It holds the SAE's weights as they are now and shares their memory; `stale()` says whether they
    have changed since. `capacity` is the number of positions per pass that get the full product:
    all of them by default, which is exact and reads the whole encoder in every pass. `sample`,
    residuals `[s, d_in]`, shows which features fire often and makes them witnesses.

    Raises `UnsupportedSAE` for an SAE that is trained, hooked, or has another arithmetic than a
    plain top k of a linear encoder.
    """

    own_rows: Tensor
    own_bias: Tensor
    own_norms: Tensor
    features: Tensor
    rows: Tensor
    bias: Tensor
    shift: Tensor | None
    few_rows: Tensor
    few_bias: Tensor
    few_norms: Tensor

    def __init__(
        self,
        sae: LayerSAE,
        features: list[int],
        capacity: int | None = None,
        sample: Tensor | None = None,
    ) -> None:
        super().__init__()
        if reason := why_not_plain(sae):
            raise UnsupportedSAE(
                f"a graph that is recorded once cannot hold this SAE: {reason}. Steer with"
                " `qwen_scope_lens.steering.steer`, which runs in eager mode"
            )
        made = sae.exact_encoder()
        self._made_from = (sae, made)
        now = made.snapshot
        index = torch.as_tensor(list(features), dtype=torch.long, device=now.rows.device)
        self.capacity, self.k, self.d_sae = capacity, sae._k, now.d_sae
        self.dtype, self.norms_max = sae.dtype, now.norms_max
        shift = sae.b_dec.detach().clone() if sae.cfg.apply_b_dec_to_input else None
        own = now.rows[index].double()
        parts: dict[str, Tensor | None] = {
            "features": index,
            "own_rows": own,
            "own_bias": now.bias[index].double(),
            "own_norms": now.norms[index].double(),
            "rows": now.rows.detach(),
            "bias": now.bias.detach(),
            "shift": shift,
        }
        often = index[:0] if capacity is None or sample is None else self._often(sae, sample)
        parts |= {
            "few_rows": now.rows[often].float(),
            "few_bias": now.bias[often].float(),
            "few_norms": now.norms[often].float(),
        }
        for name, tensor in parts.items():
            self.register_buffer(name, tensor, persistent=False)

    def _often(self, sae: LayerSAE, sample: Tensor) -> Tensor:
        codes = sae.encode_sparse(sample)
        counts = torch.bincount(codes.indices[codes.active].long(), minlength=self.d_sae)
        return counts.topk(min(4 * self.k, self.d_sae)).indices

    def stale(self) -> bool:
        """Whether the SAE's weights have changed since this module was made. Asks the host."""
        sae, made = self._made_from
        return sae.exact_encoder() is not made

    def forward(self, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The values of the features, 0 outside the top k, and which pairs are undecided.

        `x [n, d_in]`, bool `wanted [n, m]` -> float32 `[n, m]`, bool `[n, m]`. The value of a pair
        that is not wanted, or undecided, is 0.
        """
        inside = x.to(self.dtype)
        inside = (inside if self.shift is None else inside - self.shift).float()
        length = norm_above(inside)
        score = inside.double() @ self.own_rows.T + self.own_bias
        size = length.double()[:, None] * self.own_norms + self.own_bias.abs()
        error = 4 * inside.shape[1] * U64 * size
        sound = score.isfinite() & length.isfinite()[:, None]
        open_ = wanted & (score + error > 0) & sound
        n, capacity = len(x), self.capacity
        if capacity is None or capacity >= n:
            values, undecided = self._decide(inside, length, score, error, open_)
            return values, undecided | (wanted & ~sound)
        if len(self.few_rows):
            few = scores(inside, self.few_rows, self.few_bias)
            kth = kth_at_least(few, length, self.few_bias, self.few_norms, self.k, inside.shape[1])
            open_ = open_ & ~(kth[:, None] > score + error + 4 * U32 * score)
        at = _first(open_.any(1), capacity)
        some, doubt = self._decide(inside[at], length[at], score[at], error[at], open_[at])
        values = some.new_zeros(score.shape).index_copy(0, at, some)
        return values, open_.index_copy(0, at, doubt) | (wanted & ~sound)

    def _decide(
        self, inside: Tensor, length: Tensor, score: Tensor, error: Tensor, open_: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Steps 3 and 4. `[c, d_in], [c], [c, m] three times -> [c, m], [c, m]`"""
        d_in, k = inside.shape[1], self.k
        best, feature = scores(inside, self.rows, self.bias).topk(min(k + _SPARE, self.d_sae))
        value = best.double()
        # The error of the dot, and two roundings of the sum: here, and of the score itself.
        reach = 1.02 * (d_in + 4) * U32 * length.double() * self.norms_max
        reach = reach + _TINY * d_in * (1 + self.norms_max)
        reach = reach[:, None] + 2.02 * U32 * value.abs()
        low, high = _rounded(score, error)
        others = feature[:, None, :] != self.features[:, None]  # [c, m, K], as all below
        more = others & ((value - reach)[:, None] > high[..., None])
        less = (value + reach)[:, None] < low[..., None]
        near = others & ~more & ~less
        # No feature beyond the best ones can score more than this.
        seen = ((value + reach)[:, -1:] < low) | (best.shape[1] == self.d_sae)
        above, may = more.sum(-1), (more | near).sum(-1)
        inside_topk, outside = seen & (may < k), above >= k
        doubt = (open_ & ~inside_topk & ~outside & seen).any(1)
        at = _first(doubt, min(CONTESTED, len(inside)))
        finer = self._finer(
            inside[at],
            length[at],
            (low[at], high[at]),
            near[at],
            (value[at][:, None] - score[at][..., None]).abs(),
            feature[at],
            (above[at], may[at]),
        )
        picked = doubt[at][:, None] & seen[at]
        inside_topk = inside_topk.index_copy(0, at, inside_topk[at] | (picked & (finer[1] < k)))
        outside = outside.index_copy(0, at, outside[at] | (picked & (finer[0] >= k)))
        values = torch.where(open_ & inside_topk, score.clamp(min=0), 0.0).float()
        return values, open_ & ~inside_topk & ~outside

    def _finer(
        self,
        inside: Tensor,
        length: Tensor,
        bounds: tuple[Tensor, Tensor],
        near: Tensor,
        apart: Tensor,
        feature: Tensor,
        counts: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Step 4: how many features score more, at least and at most. `[c, m]` twice"""
        take = min(_NEAR, near.shape[-1])
        at_least, at_most = [], []
        for j in range(near.shape[1]):
            low, high = bounds[0][:, j, None], bounds[1][:, j, None]
            key = apart[:, j].masked_fill(~near[:, j], float("inf"))
            slot = key.topk(take, dim=1, largest=False).indices
            valid = near[:, j].gather(1, slot)
            index = feature.gather(1, slot)
            rows, bias = self.rows[index].double(), self.bias[index].double()
            score = (rows * inside.double()[:, None]).sum(-1) + bias
            size = length.double()[:, None] * norm_above(rows).double() + bias.abs()
            least, most = _rounded(score, 4 * inside.shape[1] * U64 * size)
            equal = (least == most) & (low == high) & (least == low)
            more = (least > high) | (equal & (index < self.features[j]))
            less = (most < low) | (equal & (index > self.features[j]))
            at_least.append(counts[0][:, j] + (valid & more).sum(1))
            at_most.append(counts[1][:, j] - (valid & less).sum(1))
        return torch.stack(at_least, 1), torch.stack(at_most, 1)


def _rounded(score: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest float32 number that an exact score can round to, as float64."""
    return (score - error).float().double(), (score + error).float().double()


def _first(flags: Tensor, count: int) -> Tensor:
    """The numbers of `count` different rows, flagged ones before all others. `[n] -> [count]`"""
    return flags.to(torch.int8).argsort(descending=True, stable=True)[:count]


def why_not_plain(sae: LayerSAE) -> str:
    """Why an SAE is not a plain, frozen top k of a linear encoder; empty where it is one."""
    if not sae._plain_topk:
        return "its arithmetic is not a plain top k"
    if sae._encode_watched:
        return "a hook watches its encode"
    if not sae._rowwise_input:
        return "it normalises or reshapes its input"
    trained = any(weight.requires_grad for weight in (sae.W_enc, sae.b_enc, sae.b_dec))
    return "its weights are being trained" if trained else ""
