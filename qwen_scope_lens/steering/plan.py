"""Edit and Plan: what to do to which feature, how strongly and where. Pure data, as JSON and text.

Every operation adds c d to the residual, where d is the feature's decoder row and c is a number per
token. Operations that read the code use c = a' - a, where a is the feature's activation (0 where it
is not among the top k, whatever its pre-activation). So only this feature changes in the SAE's
reconstruction of the residual, and the reconstruction error stays as it is. `layer_edits.py` does
the arithmetic, and `hooks.py` applies it to a running model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadFile, BadPlan, ScopeError
from qwen_scope_lens.files import read_json, write_json
from qwen_scope_lens.steering.units import OLD_UNITS, UNITS, finite, parse_strength, unit_now
from qwen_scope_lens.steering.where import Where, shown
from qwen_scope_lens.tables import Table, View

__all__ = [
    "OPERATIONS",
    "UNITS",
    "Edit",
    "Operation",
    "Plan",
    "check_seed",
    "find_operation",
]

Reads = Literal["nothing", "code", "residual"]


@dataclass(frozen=True)
class Operation:
    """`v` is the strength, `a` the activation, `x` the residual before any edit."""

    name: str
    change: str  # the formula, for documentation and messages
    silent: str  # what it means where the feature is not in the top k
    reads: Reads
    takes_strength: bool
    target: Callable[[Any, Any], Any] | None = None  # a' of (a, v), for tensors or numbers
    neutral: float | None = None  # the strength that changes nothing, bit for bit
    least: float | None = None  # strengths below this make no sense
    units: tuple[str, ...] = UNITS


def _largest(a: Any, v: Any) -> Any:
    return a + (v - a) * (v > a)


def _smallest(a: Any, v: Any) -> Any:
    return a + (v - a) * (v < a)


OPERATIONS: tuple[Operation, ...] = (
    Operation("add", "v d", "the same: it reads no activation", "nothing", True, neutral=0.0),
    Operation(
        "set",
        "(v - a) d",
        "a is 0: the feature is switched on",
        "code",
        True,
        lambda a, v: v + 0 * a,
    ),
    Operation(
        "clamp",
        "(v - a) d",
        "the same as set, under the name that papers use",
        "code",
        True,
        lambda a, v: v + 0 * a,
    ),
    Operation(
        "scale",
        "(v a - a) d",
        "nothing happens",
        "code",
        True,
        lambda a, v: v * a,
        neutral=1.0,
        units=("raw",),
    ),
    Operation(
        "ablate", "(0 - a) d", "nothing happens", "code", False, lambda a, v: 0 * a, units=("raw",)
    ),
    Operation(
        "floor",
        "(max(a, v) - a) d",
        "the feature is switched on at v",
        "code",
        True,
        _largest,
        neutral=0.0,
        least=0.0,
    ),
    Operation("cap", "(min(a, v) - a) d", "nothing happens", "code", True, _smallest, least=0.0),
    Operation(
        "project_out",
        "-(d x / d d) d",
        "the same: it reads no activation; whatever lies"
        " along d goes, other features' share of it too",
        "residual",
        False,
        units=("raw",),
    ),
)

_BY_NAME = {row.name: row for row in OPERATIONS}


def find_operation(name: object) -> Operation:
    if (row := _BY_NAME.get(name) if isinstance(name, str) else None) is None:
        raise BadPlan(f"no operation is named {name!r:.60}: there are {', '.join(_BY_NAME)}")
    return row


FORMAT, VERSION = "qsl-plan", 2
OLDER = (1,)  # the unit `typical` was called `sigma`
MADE_BY = "qsl plan` or `qsl steer --save-plan"
EVERYWHERE = Where()


@dataclass(frozen=True)
class Edit:
    """One operation on one feature, given by its address as text or as a `FeatureRef`.

    `strength` is v of the operation's formula, in `unit`: raw activations, `typical` (multiples of
    the typical activation, which `Plan.calibrated` fills in) or `norm` (fraction of the residual's
    length). `sigma` is the older name of `typical`.
    """

    ref: FeatureRef
    op: str
    strength: float | None
    unit: str
    where: Where
    typical: float | None

    def __init__(
        self,
        ref: FeatureRef | str,
        op: str = "add",
        strength: float | None = None,
        unit: str = "raw",
        where: Where | str = EVERYWHERE,
        typical: float | None = None,
    ) -> None:
        unit = unit_now(unit)
        given = {"ref": FeatureRef.parse(ref), "op": op, "strength": strength, "unit": unit}
        for name, value in (given | {"where": Where.of(where), "typical": typical}).items():
            object.__setattr__(self, name, value)
        row = find_operation(op)
        if row.takes_strength != (strength is not None):
            wants = "needs a strength" if row.takes_strength else "takes no strength"
            raise BadPlan(f"{self.ref}: {row.name} {wants}; found {shown(strength)}")
        if strength is not None:
            number = finite(strength, self.ref)
            object.__setattr__(self, "strength", number)
            if row.least is not None and number < row.least:
                raise BadPlan(
                    f"{self.ref}: {row.name} at {number:g} makes no sense, because activations are"
                    f" never negative: expected {row.least:g} or more"
                )
        if unit not in row.units:
            raise BadPlan(
                f"{self.ref}: unit {unit!r} for {row.name}: expected {' or '.join(row.units)}"
            )
        if (gate := self.where.gate) is not None and gate.ref.layer > self.ref.layer:
            raise BadPlan(
                f"{self.ref}: its gate {gate.ref} is read in a later layer, after the edit acts:"
                f" expected a feature of a layer from 0 to {self.ref.layer}"
            )
        if typical is not None and not finite(typical, self.ref) > 0:
            raise BadPlan(f"{self.ref}: typical activation {shown(typical)} is not above 0")

    @property
    def operation(self) -> Operation:
        return find_operation(self.op)

    @property
    def involved(self) -> tuple[FeatureRef, ...]:
        """Its own feature, and that of its gate."""
        gate = self.where.gate
        return (self.ref,) if gate is None else (self.ref, gate.ref)

    @property
    def value(self) -> float:
        """v in raw activations (for `norm`, still the fraction)."""
        strength = 0.0 if self.strength is None else self.strength
        if self.unit != "typical":
            return strength
        if self.typical is None:
            raise BadPlan(
                f"{self.ref}: strength {self.strength:g}typical needs the feature's typical"
                " activation: make a calibration with `qsl calibrate` and pass it (--calibration,"
                " in Python plan.calibrated(it))"
            )
        return strength * self.typical

    @property
    def changes_nothing(self) -> bool:
        """Whether the strength is the operation's neutral one: then no number is touched."""
        return self.strength is not None and self.strength == self.operation.neutral

    @classmethod
    def parse(cls, text: str) -> Edit:
        """From `REF:op[:strength][@where]`: `G/6/12:add:+2typical@generation`, `G/6/12:ablate`."""
        head, at, place = text.partition("@")
        ref, *rest = head.split(":")
        if not rest or len(rest) > 2 or (at and not place):
            raise BadPlan(
                f"{shown(text)} is not an edit: expected REF:operation[:strength][@where], for"
                " example qwen3-8b-base/w64k-l0-50/20/6159:add:+2typical@generation"
            )
        strength, unit = parse_strength(rest[1]) if len(rest) == 2 else (None, "raw")
        where = Where.of(place) if at else EVERYWHERE
        return cls(FeatureRef.parse(ref), rest[0], strength, unit, where)

    def __str__(self) -> str:
        parts = [str(self.ref), self.op]
        if self.strength is not None:
            parts.append(f"{self.strength:+g}{'' if self.unit == 'raw' else self.unit}")
        place = "" if self.where == EVERYWHERE else f"@{self.where}"
        return ":".join(parts) + place

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"ref": str(self.ref), "op": self.op}
        if self.strength is not None:
            found |= {"strength": self.strength, "unit": self.unit}
        if self.where != EVERYWHERE:
            found["where"] = str(self.where)
        if self.typical is not None:
            found["typical"] = self.typical
        return found

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Edit:
        known = {"ref", "op", "strength", "unit", "where", "typical"}
        if not isinstance(row, Mapping) or "ref" not in row or not set(row) <= known:
            raise BadPlan(
                f"{shown(row)} is not an edit: expected ref and some of {', '.join(sorted(known))}"
            )
        unit = row.get("unit", "raw")  # in files older names stay readable, without a warning
        return cls(**{**row, "unit": OLD_UNITS.get(unit, unit) if isinstance(unit, str) else unit})


@dataclass(frozen=True, repr=False)
class Plan(View):
    """Edits that act together. Their order does not matter."""

    edits: tuple[Edit, ...]

    def __init__(self, edits: Iterable[Edit | str]) -> None:
        if isinstance(edits, (str, Edit)):
            edits = [edits]
        found = tuple(Edit.parse(one) if isinstance(one, str) else one for one in edits)
        if not found:
            raise BadPlan("a plan without edits does nothing: run the model without a plan")
        object.__setattr__(self, "edits", found)
        self._check_overlaps()

    @classmethod
    def of(cls, plan: Plan | Edit | str) -> Plan:
        """The plan itself, or one of a single edit, which may be text such as `G/6/12:add:2`."""
        if isinstance(plan, Plan):
            return plan
        if not isinstance(plan, (Edit, str)):
            raise BadPlan(f"expected a Plan, an Edit or its text; found {shown(plan)}")
        return cls([plan])

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({edit.ref.layer for edit in self.edits}))

    @property
    def refs(self) -> tuple[FeatureRef, ...]:
        return tuple(dict.fromkeys(edit.ref for edit in self.edits))

    def calibrated(self, typical: Mapping[Any, float]) -> Plan:
        """With the typical activations of the edits in this unit, from `{address: number}`."""
        known = {str(ref): value for ref, value in typical.items()}

        def fill(edit: Edit) -> Edit:
            if edit.unit != "typical":
                return edit
            if str(edit.ref) not in known and edit.typical is None:
                raise BadPlan(
                    f"{edit.ref} is not in the calibration, which has {len(known)} features: add"
                    " it with `qsl calibrate`"
                )
            return replace(edit, typical=known.get(str(edit.ref), edit.typical))

        return self._each(fill)

    def times(self, factor: float) -> Plan:
        """With every strength multiplied; a negative factor reverses the plan."""
        for edit in self.edits:
            if not edit.operation.takes_strength:
                raise BadPlan(f"{edit}: {edit.op} has no strength to multiply: leave this edit out")
        by = finite(factor, self.edits[0].ref)
        return self._each(lambda edit: replace(edit, strength=(edit.strength or 0.0) * by))

    def at(self, strength: float) -> Plan:
        """Every edit at this strength, in its own unit."""
        return self._each(lambda edit: replace(edit, strength=strength))

    def to_dict(self) -> dict[str, Any]:
        return {"edits": [edit.to_dict() for edit in self.edits]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Plan:
        rows = content.get("edits") if isinstance(content, Mapping) else None
        if not isinstance(rows, list):
            raise BadPlan('the plan has no list `edits`: expected {"edits": [...]}')
        return cls([Edit.from_dict(row) for row in rows])

    def save(self, path: str | Path) -> None:
        write_json(Path(path), FORMAT, VERSION, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        content = read_json(Path(path), FORMAT, VERSION, MADE_BY, OLDER)
        try:
            return cls.from_dict(content)
        except (ScopeError, TypeError) as error:
            raise BadFile(f"{path}: {error}") from error

    def table(self, most: int | None = None) -> Table:
        """One row per edit."""
        edits = self.edits[:most]
        return Table.of(
            ("feature", "operation", "strength", "unit", "where", "typical"),
            [(str(e.ref), e.op, e.strength, e.unit, str(e.where), e.typical) for e in edits],
            more=len(self) - len(edits),
            formats={"strength": "+g", "typical": ".3g"},
        )

    def __len__(self) -> int:
        return len(self.edits)

    def __str__(self) -> str:
        return "; ".join(map(str, self.edits))

    def _each(self, change: Callable[[Edit], Edit]) -> Plan:
        return Plan([change(edit) for edit in self.edits])

    def _check_overlaps(self) -> None:
        """Two edits that both decide a feature's activation at one token contradict each other."""
        for i, one in enumerate(self.edits):
            if one.operation.reads == "nothing":
                continue
            for other in self.edits[:i]:
                if (
                    other.ref == one.ref
                    and other.operation.reads != "nothing"
                    and not one.where.apart(other.where)
                ):
                    raise BadPlan(
                        f"{one.ref} is decided twice, by {other.op} and {one.op}: keep one, or give"
                        " one to the prompt and the other to the generation"
                    )


def check_seed(seed: object) -> int:
    """The seed, if torch's generators take it."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise BadPlan(f"seed {shown(seed)}: expected a whole number from 0 to 2^64 - 1")
    return seed
