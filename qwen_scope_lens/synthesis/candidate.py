"""Candidate: one example on its way, from the prompt that asks for it to kept or rejected.

Its rows are what the output files hold. Who moves it along is `pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen_scope_lens.address import FeatureRef

__all__ = ["KEPT", "VANILLA", "Candidate", "Stage"]

Stage = Literal["one", "pair", "again"]
"""`one`: written once. With pairs: `pair` looks for x+ and x-, `again` writes with both shown."""

KEPT = "kept"
VANILLA = "vanilla"


@dataclass
class Candidate:
    number: int  # over all candidates of the run, from 0
    ref: FeatureRef
    kind: str
    style: str  # vanilla, or the style in which a vanilla prompt was rewritten
    stage: Stage
    attempt: int  # round of its feature, from 0
    sample: int  # within the round
    seed: int
    template: str
    prompt: str = ""
    reply: str = ""
    activation: float | None = None  # of its feature; None: not measured
    fires: Mapping[FeatureRef, float] = field(default_factory=dict)  # all target features
    base: Candidate | None = None  # of a rewrite: the vanilla prompt
    unusable: bool = False  # its prompt was not written or filtered out: nothing to rewrite
    outcome: str = ""  # why it was rejected, or kept; empty: still on its way

    @property
    def open(self) -> bool:
        return not self.outcome

    def messages(self, chat: bool) -> list[dict[str, str]]:
        if not chat:
            return [{"role": "assistant", "content": self.prompt}]
        rows = [{"role": "user", "content": self.prompt}]
        return [*rows, {"role": "assistant", "content": self.reply}] if self.reply else rows

    def to_row(self, generator: str, chat: bool, verified: str) -> dict[str, Any]:
        """A row of the output; every row has every field, as `datasets` wants it. `verified` says
        which words were read: the prompt, the reply, or either."""
        return {
            "messages": self.messages(chat),
            "target": str(self.ref),
            "activation": self.activation,
            "verified": verified,
            "kind": self.kind,
            "style": self.style,
            "stage": self.stage,
            "generator": generator,
            "template": self.template,
            "seed": self.seed,
            "candidate": self.number,
            "rewrite_of": None if self.base is None else self.base.number,
            "attempt": self.attempt,
            "outcome": self.outcome,
            "fires": [{"feature": str(ref), "activation": v} for ref, v in self.fires.items()],
        }
