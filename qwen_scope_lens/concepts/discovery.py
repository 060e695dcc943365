"""Hypotheses about a corpus, as an object, a file, a table and a page. `discover.py` makes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadFile
from qwen_scope_lens.files import read_json, write_json
from qwen_scope_lens.labels.packs import LabelPack
from qwen_scope_lens.pages import Page
from qwen_scope_lens.tables import Table, View

__all__ = ["Discovery", "Hypothesis"]

FORMAT, VERSION = "qwen-scope-discovery", 1


@dataclass(frozen=True)
class Hypothesis:
    """One value or side has more of one feature; all but `proposed_size` is from the test half."""

    ref: str
    value: str
    label: str
    proposed_size: float
    size: float  # 0.5 is chance
    rate_positive: float  # share of documents on which the feature fires
    rate_negative: float
    p_value: float
    q_value: float
    holds: bool
    passages: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Discovery(View):
    """The hypotheses, those that hold first."""

    question: str
    measure: str
    rows: tuple[Hypothesis, ...]
    counts: dict[str, int]
    settings: dict[str, Any]

    @property
    def refs(self) -> tuple[FeatureRef, ...]:
        return tuple(dict.fromkeys(FeatureRef.parse(row.ref) for row in self.rows))

    @property
    def held(self) -> tuple[Hypothesis, ...]:
        """The hypotheses that passed their test."""
        return tuple(row for row in self.rows if row.holds)

    def labelled(self, labels: Iterable[LabelPack]) -> Discovery:
        """With the labels of further packs where a feature has none."""
        merged = LabelPack.merge(labels)
        rows = (replace(row, label=row.label or merged.text(row.ref)) for row in self.rows)
        return replace(self, rows=tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        write_json(Path(path), FORMAT, VERSION, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Discovery:
        content = read_json(Path(path), FORMAT, VERSION, "qsl discover")
        try:
            rows = tuple(
                Hypothesis(**{**row, "passages": tuple(row["passages"])}) for row in content["rows"]
            )
            return cls(**{**content, "rows": rows})
        except (KeyError, TypeError) as error:
            raise BadFile(f"{path} is a damaged discovery ({error}): make it again") from error

    def table(self, most: int | None = None) -> Table:
        """A row per hypothesis."""
        rows = self.rows if most is None else self.rows[:most]
        columns = ("more in", "feature", self.measure, "rate there", "elsewhere", "q", "holds")
        cells = [
            (
                row.value,
                row.ref,
                row.size,
                row.rate_positive,
                row.rate_negative,
                row.q_value,
                row.holds,
                row.label or (row.passages[0] if row.passages else ""),
            )
            for row in rows
        ]
        return Table.of(
            (*columns, "label, or a passage"),
            cells,
            above=(
                self.question,
                ", ".join(f"{name}: {n:,}" for name, n in self.counts.items()),
                f"{len(self.held)} of {len(self.rows)} proposals hold on the other half"
                f" (q <= {self.settings['fdr']:g})",
                "",
            ),
            more=len(self.rows) - len(rows),
            formats={"rate there": ".0%", "elsewhere": ".0%", "q": ".1e"},
        )

    def page(self) -> Page:
        """The report. `page().save(path)` writes it."""
        page = Page("Hypotheses")
        page.text(f"{self.question} {self.settings['model']}, {self.settings['sae']}.")
        page.text(
            f"{len(self.held)} of {len(self.rows)} hypotheses hold. One half of the corpus proposed"
            " them, and the other half tested each of them once; the false-discovery rate of the"
            f" tests is {self.settings['fdr']:g}. A hypothesis says that a feature differs, and not"
            " why."
        )
        page.table(
            ("more in", "feature", "label", self.measure, "rate there", "elsewhere", "q", "holds"),
            [
                (
                    row.value,
                    row.ref,
                    row.label,
                    row.size,
                    row.rate_positive,
                    row.rate_negative,
                    row.q_value,
                    row.holds,
                )
                for row in self.rows
            ],
            formats={"rate there": ".0%", "elsewhere": ".0%", "q": ".1e"},
        )
        page.heading("Where these features are strongest")
        page.table(
            ("feature", "passage"), [(row.ref, one) for row in self.rows for one in row.passages]
        )
        page.heading("How these figures were made")
        return page.table(
            ("setting", "value"),
            [(name, str(value)) for name, value in {**self.counts, **self.settings}.items()],
        )
