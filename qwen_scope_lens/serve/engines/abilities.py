"""What each engine can do, as one table. Requests for anything else are refused from it, by name.

The documentation, `/api/info` and the OpenAPI description show the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from qwen_scope_lens.errors import BadPlan
from qwen_scope_lens.steering.plan import OPERATIONS, Edit
from qwen_scope_lens.steering.units import UNITS

__all__ = ["ENGINES", "INTERP", "LLAMA", "OWN", "WAY_OUT", "Abilities", "refuse_edits", "rows"]

WAY_OUT = "start `qsl serve` without --engine for the server's own engine, which does"


@dataclass(frozen=True)
class Abilities:
    """A row of the table. What is a text here is shown, and checked where the engine stands."""

    engine: str
    operations: tuple[str, ...]
    units: tuple[str, ...]
    places: str  # on which tokens edits can act
    plans: str  # which requests can have which plan
    watching: str  # where the activations of `monitor`, `explain` and --record come from
    logprobs: bool  # also `echo` with logprobs
    counts_edits: bool  # whether it says on how many tokens each edit acted
    seed: str  # what a seed repeats


OWN = Abilities(
    engine="own",
    operations=tuple(row.name for row in OPERATIONS),
    units=UNITS,
    places="all of `qsl steer`",
    plans="one per request",
    watching="the residuals that the reply was made with",
    logprobs=True,
    counts_edits=True,
    seed="the reply of `qsl steer --seed`",
)
LLAMA = Abilities(
    engine="llama.cpp",
    operations=("add",),
    units=("raw", "typical"),
    places="every token (`@first`), in layers from 1",
    plans="one per request where `qsl serve` starts the program, each plan in a process of its own;"
    " none where the program runs already",
    watching="prompt and reply, read again by the model of --model under the plan",
    logprobs=False,
    counts_edits=False,
    seed="the reply of the same program, as far as its prompt cache lets it",
)
INTERP = Abilities(
    engine="interp-engine",
    operations=("add", "project_out"),
    units=UNITS,
    places="prompt and generation, or one of them; tokens by position, class or role in the prompt;"
    " the same for all edits of a plan",
    plans="one per request",
    watching="prompt and reply, read again by the model of --model under the plan",
    logprobs=False,
    counts_edits=False,
    seed="the reply of the same back end",
)
ENGINES = {row.engine: row for row in (OWN, LLAMA, INTERP)}


def refuse_edits(abilities: Abilities, edits: Sequence[Edit]) -> None:
    """Raise `BadPlan` for an edit with an operation or unit that the engine does not have."""
    for edit in edits:
        found = (("operation", edit.op, abilities.operations), ("unit", edit.unit, abilities.units))
        for what, name, known in found:
            if name not in known:
                raise BadPlan(
                    f"{edit}: the engine {abilities.engine} does not have the {what} {name}:"
                    f" expected {' or '.join(known)}; or {WAY_OUT}"
                )


def rows() -> list[list[str]]:
    """The table as text, a column per engine: `[name, own, llama.cpp, interp-engine]`."""
    names = [field.name for field in fields(Abilities)]
    found = [[asdict(row)[name] for row in ENGINES.values()] for name in names]
    return [[name, *map(_said, row)] for name, row in zip(names, found, strict=True)]


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, tuple) else str(value)
