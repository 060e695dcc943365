"""What a plan did: how often each edit fired and how far it moved the residual."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_scope_lens.steering.plan import Edit
from qwen_scope_lens.tables import Table, View

__all__ = ["EditReport", "Report", "sums_of"]


@dataclass(frozen=True)
class EditReport:
    """One edit, summed over all passes; a token that is computed twice counts twice."""

    edit: Edit
    selected: int  # tokens that the edit selected
    fired: int  # of these, where it changed the residual
    moved: float  # mean length of its change where it fired
    share: float  # mean of that length over the residual's

    def __str__(self) -> str:
        return (
            f"{self.edit}: fired on {self.fired:,} of {self.selected:,} tokens"
            f", moved the residual by {self.moved:.3g} ({self.share:.1%} of its length)"
        )


class Report(View):
    """Counts while a plan is active, and can be read at any time; `str(report)` shows all of it."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self._edits = tuple(edits)
        self._sums: dict[int, Tensor] = {}
        self.passes = 0  # forward passes through edited layers, counted once per layer
        self._lock = threading.Lock()

    def count_pass(self) -> None:
        with self._lock:
            self.passes += 1

    def add(
        self, numbers: Sequence[int], c: Tensor, selected: Tensor, lengths: Tensor, norms: Tensor
    ) -> None:
        """Count one pass: `c`, `selected [.., m]`, `lengths [m]`, `norms [..]` of the residual."""
        with torch.no_grad():
            sums = sums_of(c.detach(), selected, lengths, norms.detach())
            with self._lock:
                for j, number in enumerate(numbers):
                    before = self._sums.get(number)
                    self._sums[number] = sums[:, j] if before is None else before + sums[:, j]

    def taken(self) -> Tensor:
        """The sums of every edit: tokens selected, fired on, lengths, shares. float64 `[m, 4]`"""
        with self._lock:
            sums = [self._sums.get(i) for i in range(len(self._edits))]
        rows = [torch.zeros(4).double() if x is None else x.double().cpu() for x in sums]
        return torch.stack(rows)

    def give(self, sums: Tensor) -> None:
        """Add what another report of the same edits has `taken`."""
        with self._lock:
            for number, row in enumerate(sums):
                before = self._sums.get(number)
                self._sums[number] = row if before is None else before + row

    @property
    def edits(self) -> tuple[EditReport, ...]:
        """One row per edit, in the order of the plan; several plans follow one another."""
        rows = []
        for number, edit in enumerate(self._edits):
            found = self._sums.get(number)
            selected, fired, moved, share = [0.0] * 4 if found is None else found.tolist()
            each = max(1.0, fired)
            rows.append(EditReport(edit, int(selected), int(fired), moved / each, share / each))
        return tuple(rows)

    @property
    def fired(self) -> bool:
        """Whether any edit acted; one of neutral strength acts where it is selected."""
        return any(row.selected if row.edit.changes_nothing else row.fired for row in self.edits)

    def table(self, most: int | None = None) -> Table:
        """One row per edit."""
        rows = [(str(e.edit), e.selected, e.fired, e.moved, e.share) for e in self.edits]
        return Table.of(
            ("edit", "tokens", "fired on", "moved by", "of the residual"),
            rows[:most],
            more=len(rows) - len(rows[:most]),
            formats={"moved by": ".3g", "of the residual": ".1%"},
        )

    def __str__(self) -> str:
        return "\n".join(map(str, self.edits))


def sums_of(c: Tensor, selected: Tensor, lengths: Tensor, norms: Tensor) -> Tensor:
    """What one pass adds to the sums of its edits, as `Report.taken` has them. float64 `[4, m]`"""
    steps = (c.abs() * lengths).flatten(0, -2)
    shares = steps / norms.flatten().unsqueeze(-1).clamp(min=1e-30)
    counts = torch.stack([selected.flatten(0, -2).sum(0), (c != 0).flatten(0, -2).sum(0)]).double()
    return torch.cat([counts, steps.sum(0)[None].double(), shares.sum(0)[None].double()])
