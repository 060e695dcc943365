"""The report of a run: what was kept, what was rejected and why, and how coverage grew.

All numbers come from the rows of the output and the targets, so a report can be made at any time,
even while the run is still going on.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import StoreMismatch, TooLittleData
from qwen_scope_lens.pages import Page, chart
from qwen_scope_lens.synth.run import read_rows, read_settings, run_folder
from qwen_scope_lens.synth.targets import TargetSet, curve

__all__ = ["Report", "make_report"]

VERIFIED = {
    "prompt": "the feature has to fire in the prompt",
    "reply": "the feature has to fire in the reply",
    "either": "the feature has to fire in the prompt or in the reply",
    "none": "no feature has to fire (undirected synthesis)",
}


@dataclass(frozen=True)
class Report:
    """Coverage is a share of all targets; `curve[i]` is that after the first i candidates."""

    targets: TargetSet
    candidates: int
    kept: int
    outcomes: Counter[str]
    types: Counter[tuple[str, str]]  # (kind, style) of what is kept
    per_feature: np.ndarray[Any, Any]  # the number of kept examples of each wanted feature
    activations: np.ndarray[Any, Any]  # of each kept example, for its own feature
    curve: np.ndarray[Any, Any]  # seed data and kept examples together
    synthetic_only: float  # the coverage of the kept examples alone
    uncovered: tuple[FeatureRef, ...]
    verified: str  # which words had to activate the feature: prompt, reply, either
    budget: str  # the budget of the last run and what it counts; empty: not known

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        kept = zip((target.ref for target in self.targets.wanted), self.per_feature, strict=True)
        return {
            "targets": len(self.targets),
            "task": self.targets.task,
            "candidates": self.candidates,
            "kept": self.kept,
            "verified": self.verified,
            "budget": self.budget,
            "coverage": {
                "seed": self.targets.seed_coverage,
                "with_kept": float(self.curve[-1]),
                "kept_alone": self.synthetic_only,
            },
            "outcomes": dict(self.outcomes),
            "types": [
                {"kind": kind, "style": style, "kept": n} for (kind, style), n in self.types.items()
            ],
            "activations": self.activations,
            "curve": self.curve,
            "rows": [{"feature": str(ref), "kept": int(n)} for ref, n in kept],
            "uncovered": list(map(str, self.uncovered)),
        }

    def __str__(self) -> str:
        seed, end = self.targets.seed_coverage, float(self.curve[-1])
        lines = [
            f"{self.kept} kept of {self.candidates} candidates, for"
            f" {int((self.per_feature > 0).sum())} of {len(self.per_feature)} wanted features",
            f"coverage of {len(self.targets)} target features: {seed:.2%} by the seed data,"
            f" {end:.2%} with the kept examples ({self.synthetic_only:.2%} by those alone)",
            f"verified: {VERIFIED.get(self.verified, self.verified)}"
            + (f"; budget: {self.budget}" if self.budget else ""),
            "",
            *_table(("outcome", "candidates"), self.outcomes.most_common()),
        ]
        if self.kept:
            types = [(f"{kind}, {style}", n) for (kind, style), n in self.types.most_common()]
            low, middle, high = np.percentile(self.activations, (0, 50, 100))
            lines += ["", *_table(("type", "kept"), types), ""]
            lines.append(
                f"measured activation of the kept: lowest {low:.2f}, median {middle:.2f}, highest"
                f" {high:.2f}"
            )
            lines += ["", *_table(("candidates", "coverage"), self._points())]
        if self.uncovered:
            some = ", ".join(map(str, self.uncovered[:5]))
            more = f" and {len(self.uncovered) - 5} more" if len(self.uncovered) > 5 else ""
            lines += ["", f"still missing: {some}{more}"]
        return "\n".join(lines)

    def _points(self) -> list[tuple[str, str]]:
        """The curve at up to nine places."""
        last = len(self.curve) - 1
        places = sorted({round(last * i / 8) for i in range(9)})
        return [(f"{place:,}", f"{self.curve[place]:.2%}") for place in places]

    def page(self) -> Page:
        page = Page(
            "Feature-driven synthesis" + (f": {self.targets.task}" * bool(self.targets.task))
        )
        page.text(str(self.targets).replace("\n", ". ") + ".")
        page.text(". ".join(str(self).split("\n")[:3]) + ".")
        page.text(
            "Coverage: the share of the target features that fire in some document. FAC (feature"
            " activation coverage): the share of the features that the anchor data activates and"
            " the seed data does, too. A candidate is kept if its feature fires when the model"
            " itself reads it.",
            quiet=True,
        )

        def draw(axes: Any) -> None:
            axes.plot(np.arange(len(self.curve)), 100 * self.curve)
            axes.set_xlabel("candidates written")
            axes.set_ylabel("% of target features covered")

        page.figure(chart(draw), "Coverage by seed data and kept examples together.")
        page.heading("What became of the candidates")
        page.table(("outcome", "candidates"), self.outcomes.most_common())
        page.heading("What was kept")
        page.table(("kind", "style", "kept"), [(*key, n) for key, n in self.types.most_common()])
        page.heading("Features")
        counts = sorted(
            zip(self.targets.wanted, self.per_feature, strict=True), key=lambda row: -int(row[1])
        )
        rows = [(str(target.ref), target.description or None, int(n)) for target, n in counts]
        return page.table(("feature", "description", "examples kept"), rows)


def make_report(data: Path, targets: TargetSet) -> Report:
    """The report of an output; with all candidates, if the run's folder is still beside it."""
    kept_rows = read_rows(data)
    beside = run_folder(data) / "candidates.jsonl"
    rows = read_rows(beside) if beside.exists() else kept_rows
    if not rows:
        raise TooLittleData(
            f"{data} has no rows and no candidates beside it, so there is nothing to report"
        )
    known = set(targets.refs)
    if not any(FeatureRef.parse(row["target"]) in known for row in rows):
        raise StoreMismatch(
            f"{data} was written for other features, such as {rows[0]['target']}: give the targets"
            " file that the run was made with"
        )
    seed = [target.ref for target in targets.targets if target.seed_documents]
    fired = [_fires(row) if row["outcome"] == "kept" else set() for row in rows]
    whole = curve(targets.refs, [set(seed), *fired])[1:]
    count = Counter(FeatureRef.parse(row["target"]) for row in rows if row["outcome"] == "kept")
    covered = set(seed).union(*fired)
    return Report(
        targets=targets,
        candidates=len(rows),
        kept=count.total(),
        outcomes=Counter(row["outcome"].split(":")[0].split(" (")[0] for row in rows),
        types=Counter((row["kind"], row["style"]) for row in rows if row["outcome"] == "kept"),
        per_feature=np.array([count[target.ref] for target in targets.wanted]),
        activations=np.array([row["activation"] for row in kept_rows], dtype=np.float64),
        curve=whole,
        synthetic_only=float(curve(targets.refs, fired)[-1]),
        uncovered=tuple(ref for ref in targets.refs if ref not in covered),
        verified=", ".join(sorted({str(row["verified"]) for row in rows})),
        budget=_budget(data),
    )


def _budget(data: Path) -> str:
    amount = (read_settings(data) or {}).get("amount")
    if not isinstance(amount, dict):
        return ""
    what = {"written": "candidates written", "kept": "examples kept"}
    return f"{amount.get('budget')} {what.get(str(amount.get('budget_counts')), '')}"


def _fires(row: dict[str, Any]) -> set[FeatureRef]:
    return {FeatureRef.parse(one["feature"]) for one in row["fires"]}


def _table(head: tuple[str, str], rows: list[Any]) -> list[str]:
    cells = [head, *((str(name), str(value)) for name, value in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(2)]
    return [f"  {name:{widths[0]}}  {value:>{widths[1]}}" for name, value in cells]
