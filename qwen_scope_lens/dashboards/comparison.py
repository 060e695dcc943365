"""Which features tell two texts apart, by how often they fire: the official demo's score.

score = |rate in A - rate in B|, a rate being the share of a text's kept positions on which the
feature fires. For two texts that is a first look; `qsl rank` compares groups, with a control.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.dashboards.workbench import Reading, Workbench
from qwen_scope_lens.errors import TooLittleData

__all__ = ["Difference", "Kept", "compare"]


@dataclass(frozen=True)
class Kept:
    """Which positions are left out, all off as in the official demo but the first token."""

    drop_first: bool = True
    drop_shared_tokens: bool = False  # tokens that occur in both texts
    drop_shared_prefix: bool = False

    def positions(self, own: Reading, other: Reading) -> np.ndarray:
        """bool `[n_tokens]` of `own`."""
        ids = np.array(own.token_ids)
        keep = np.ones(len(ids), dtype=bool)
        if self.drop_first:
            keep[0] = False
        if self.drop_shared_tokens:
            keep &= ~np.isin(ids, other.token_ids)
        if self.drop_shared_prefix:
            n = min(len(ids), len(other.token_ids))
            same = ids[:n] == np.array(other.token_ids[:n])
            keep[: n if same.all() else int(same.argmin())] = False
        return keep


@dataclass(frozen=True)
class Difference:
    """One feature in both texts."""

    ref: FeatureRef
    score: float
    rate_a: float
    rate_b: float
    mean: float  # where it fires, over both texts
    label: str


def compare(
    bench: Workbench, a: Reading, b: Reading, top: int = 5, kept: Kept | None = None
) -> list[Difference]:
    """The `top` features of every layer, the largest score first."""
    kept = kept or Kept()
    keep_a, keep_b = kept.positions(a, b), kept.positions(b, a)
    for name, keep in (("A", keep_a), ("B", keep_b)):
        if not keep.any():
            raise TooLittleData(
                f"no token of text {name} is left to compare: leave out fewer of them, or use"
                " longer texts"
            )
    found: list[Difference] = []
    for layer in a.codes:
        d_sae = a.codes[layer].d_sae
        rates, sums, counts = [], np.zeros(d_sae), np.zeros(d_sae)
        for reading, keep in ((a, keep_a), (b, keep_b)):
            codes = reading.codes[layer][keep.nonzero()[0].tolist()]
            active = codes.active.numpy()
            index = codes.indices.numpy()[active]
            fired = np.bincount(index, minlength=d_sae)
            rates.append(fired / keep.sum())
            counts += fired
            sums += np.bincount(index, codes.values.numpy()[active], d_sae)
        score = np.abs(rates[0] - rates[1])
        for feature in np.lexsort((np.arange(len(score)), -score))[:top].tolist():
            if score[feature] == 0:
                break
            ref = bench.ref(layer, feature)
            found.append(
                Difference(
                    ref,
                    float(score[feature]),
                    float(rates[0][feature]),
                    float(rates[1][feature]),
                    float(sums[feature] / counts[feature]),
                    bench.labels.text(ref),
                )
            )
    return sorted(found, key=lambda row: (-row.score, row.ref))
