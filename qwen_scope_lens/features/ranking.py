"""The result of a ranking: rows, controls and provenance, as an object, a JSON file and a table.

`rank.py` finds it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_scope_lens.errors import BadFile
from qwen_scope_lens.features.controls import Baseline, Probe, Shuffles
from qwen_scope_lens.files import read_json, write_json

__all__ = ["RankedFeature", "Ranking"]

FORMAT, VERSION = "qwen-scope-ranking", 1
MAY_BE_INFINITE = ("effect", "held_out_effect")


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


@dataclass(frozen=True)
class Ranking:
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

    def table(self, most: int = 20) -> str:
        """The best features and the controls, as text for a terminal."""
        return "\n".join([*_head(self), *_rows(self, most), *_controls(self)])


def _head(ranking: Ranking) -> list[str]:
    said, n = ranking.settings, ranking.documents
    question = (
        f"{said['label']} = {', '.join(said['positive'])} against"
        f" {said['negative'] if isinstance(said['negative'], str) else ', '.join(said['negative'])}"
        if "label" in said
        else "positive against negative documents"
    )
    return [
        f"{question}; pooled by {said['pool']}, layers {', '.join(map(str, said['layers']))}",
        f"documents: {n['positive_discovery']} + {n['negative_discovery']} for discovery,"
        f" {n['positive_held_out']} + {n['negative_held_out']} held out (positive + negative)",
        f"{ranking.found:,} of {ranking.tested:,} tested features pass (q <= {said['fdr']:g},"
        f" {said['correction'].upper()})",
        "",
    ]


def _rows(ranking: Ranking, most: int) -> list[str]:
    if not ranking.rows:
        return ["no feature tells the groups apart", ""]
    width = max(len(row.ref) for row in ranking.rows[:most])
    lines = [
        f"{'feature':{width}}  AUROC  held out  effect  mean diff  rate +  rate -        q",
        *(
            f"{row.ref:{width}}  {row.auroc:5.3f}  {row.held_out_auroc:8.3f}  {row.effect:6.2f}"
            f"  {row.mean_difference:9.4g}  {row.rate_positive:6.3f}  {row.rate_negative:6.3f}"
            f"  {row.q_value:7.1e}"
            for row in ranking.rows[:most]
        ),
    ]
    if len(ranking.rows) > most:
        lines.append(f"... and {len(ranking.rows) - most} more rows in the file")
    return [*lines, ""]


def _controls(ranking: Ranking) -> list[str]:
    shuffled = ranking.shuffled
    runs, some = len(shuffled.found), sum(n > 0 for n in shuffled.found)
    beyond = sum(max(row.auroc, 1 - row.auroc) > shuffled.ceiling for row in ranking.rows)
    lines = [
        f"shuffled labels: something passes in {some} of {runs} runs (at most"
        f" {max(shuffled.found, default=0)} features); highest AUROC {shuffled.ceiling:.3f},"
        f" exceeded by {beyond} of {len(ranking.rows)} rows",
        "held-out AUROC            features   mean  highest",
    ]
    lines.extend(
        f"{_short(line.name):25} {line.features:8}  {line.mean_auroc:5.3f}"
        f"    {line.highest_auroc:5.3f}"
        for line in ranking.baselines
        if line.mean_auroc is not None
    )
    for probe in ranking.probes:
        name = f"{probe.name}, {probe.on}"
        lines.append(f"{name:35} {probe.auroc:5.3f}   (layer {probe.layer})")
    return lines


def _short(name: str) -> str:
    return {"features alike in rate and strength": "alike in rate, strength"}.get(name, name)
