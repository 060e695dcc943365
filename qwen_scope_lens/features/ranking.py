"""The result of a ranking: rows, controls and provenance, as an object, a JSON file and a table.

`rank.py` finds it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.errors import BadFile
from qwen_scope_lens.features.controls import Baseline, Probe, Shuffles
from qwen_scope_lens.files import read_json, write_json
from qwen_scope_lens.tables import Table, View

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RankedFeature", "Ranking"]

FORMAT, VERSION = "qwen-scope-ranking", 1
MAY_BE_INFINITE = ("effect", "held_out_effect")
COLUMNS = {
    "AUROC": ("auroc", ".3f"),
    "held out": ("held_out_auroc", ".3f"),
    "effect": ("effect", ".2f"),
    "mean diff": ("mean_difference", ".4g"),
    "rate +": ("rate_positive", ".3f"),
    "rate -": ("rate_negative", ".3f"),
    "q": ("q_value", ".1e"),
}
"""The columns of the table after the address: the row's field, and the format."""


@dataclass(frozen=True)
class RankedFeature:
    """One feature that passed the test; `held_out_*` are measured on documents it did not see."""

    ref: str
    auroc: float
    effect: float  # Cohen's d; infinite where both groups are constant and differ
    mean_difference: float  # what the paper ranks by (its section 3)
    rate_difference: float  # of the shares of documents on which it fires (equation 14, toxicity)
    mean_positive: float
    mean_negative: float
    rate_positive: float
    rate_negative: float
    p_value: float
    q_value: float
    held_out_auroc: float
    held_out_effect: float
    held_out_mean_difference: float
    held_out_rate_difference: float


@dataclass(frozen=True, repr=False)
class Ranking(View):
    """The features that passed, best first, with all that is needed to judge and repeat it."""

    rows: tuple[RankedFeature, ...]
    found: int  # how many passed; `rows` holds the best of them
    tested: int
    documents: dict[str, int]  # positive, negative, each in discovery and held out
    settings: dict[str, Any]
    shuffled: Shuffles
    baselines: tuple[Baseline, ...]  # the winners first
    probes: tuple[Probe, ...]
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        content = asdict(self)
        for row in content["rows"]:
            for name in MAY_BE_INFINITE:
                if not math.isfinite(row[name]):  # JSON has no infinity
                    row[name] = "inf" if row[name] > 0 else "-inf"
        return content

    def save(self, path: str | Path) -> None:
        write_json(Path(path), FORMAT, VERSION, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Ranking:
        content = read_json(Path(path), FORMAT, VERSION, "qsl rank")
        try:
            rows = [
                {**row, **{name: float(row[name]) for name in MAY_BE_INFINITE}}
                for row in content["rows"]
            ]
            shuffled = {name: tuple(values) for name, values in content["shuffled"].items()}
            return cls(
                **{
                    **content,
                    "rows": tuple(RankedFeature(**row) for row in rows),
                    "shuffled": Shuffles(**shuffled),
                    "baselines": tuple(Baseline(**row) for row in content["baselines"]),
                    "probes": tuple(Probe(**row) for row in content["probes"]),
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadFile(f"{path} is a damaged ranking ({error}): make it again") from error

    def table(self, most: int | None = None) -> Table:
        """The best features, and below them the controls."""
        rows = self.rows if most is None else self.rows[:most]
        nothing = () if self.rows else ("no feature tells the groups apart",)
        return Table.of(
            ["feature", *COLUMNS],
            ([row.ref, *(getattr(row, name) for name, _ in COLUMNS.values())] for row in rows),
            above=_head(self),
            below=(*nothing, "", _shuffles(self), *self.controls().text().splitlines()),
            more=len(self.rows) - len(rows),
            formats={column: how for column, (_, how) in COLUMNS.items()},
            heat=("rate +", "rate -"),
        )

    def to_pandas(self) -> pd.DataFrame:
        """All that is known of each feature, not only what the table shows."""
        return Table.of_records([asdict(row) for row in self.rows]).to_pandas()

    def controls(self) -> Table:
        """The held-out AUROCs of the features, of other features and of probes."""
        features = [
            (one.name, one.features, one.mean_auroc, one.highest_auroc, None)
            for one in self.baselines
            if one.mean_auroc is not None
        ]
        probes = [
            (f"{one.name}, {one.on}", None, one.auroc, None, one.layer) for one in self.probes
        ]
        columns = ["held-out AUROC", "features", "mean", "highest", "layer"]
        return Table.of(columns, [*features, *probes])


def _head(ranking: Ranking) -> tuple[str, ...]:
    said, n = ranking.settings, ranking.documents
    question = (
        f"{said['label']} = {', '.join(said['positive'])} against"
        f" {said['negative'] if isinstance(said['negative'], str) else ', '.join(said['negative'])}"
        if "label" in said
        else "positive against negative documents"
    )
    return (
        f"{question}; pooled by {said['pool']}, layers {', '.join(map(str, said['layers']))}",
        f"documents: {n['positive_discovery']} + {n['negative_discovery']} for discovery,"
        f" {n['positive_held_out']} + {n['negative_held_out']} held out (positive + negative)",
        f"{ranking.found:,} of {ranking.tested:,} tested features pass (q <= {said['fdr']:g},"
        f" {said['correction'].upper()})",
        "",
    )


def _shuffles(ranking: Ranking) -> str:
    shuffled = ranking.shuffled
    runs, some = len(shuffled.found), sum(n > 0 for n in shuffled.found)
    beyond = sum(max(row.auroc, 1 - row.auroc) > shuffled.ceiling for row in ranking.rows)
    return (
        f"shuffled labels: something passes in {some} of {runs} runs (at most"
        f" {max(shuffled.found, default=0)} features); highest AUROC {shuffled.ceiling:.3f},"
        f" exceeded by {beyond} of {len(ranking.rows)} rows"
    )
