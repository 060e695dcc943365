"""The named plans of a server, in memory or in a folder."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_scope_lens.errors import BadPlan
from qwen_scope_lens.files import json_text
from qwen_scope_lens.serve.faults import Fault
from qwen_scope_lens.steering.plan import FORMAT, VERSION, Plan
from qwen_scope_lens.steering.where import shown

__all__ = ["MOST_EDITS", "Plans"]

MOST_EDITS, MOST_PLANS = 64, 200
NO_PLAN = "none"
"""What records say of a request without a plan. No plan can have this name."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Plans(Mapping[str, Plan]):
    """Plans by name. `default` is the one of requests that say nothing; None: they have none."""

    def __init__(
        self,
        plans: Mapping[str, Plan] | None = None,
        default: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._plans = dict(plans or {})
        if folder is not None:
            for path in sorted(folder.glob("*.json"))[:MOST_PLANS]:
                self._plans.setdefault(_name(path.stem), Plan.load(path))
        self.default = default

    @property
    def saved(self) -> bool:
        return self._folder is not None

    def __getitem__(self, name: str) -> Plan:
        return self._plans[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._plans))

    def __len__(self) -> int:
        return len(self._plans)

    def named(self, name: str) -> Plan:
        if name not in self:
            have = ", ".join(self) or "none"
            raise Fault(
                f"there is no plan {shown(name)}: there are {have}", "plan_not_found", None, 404
            )
        return self[name]

    def of(self, value: Any, lens: Any, own: bool = False) -> tuple[Plan, str | None]:
        """From a request: a plan as JSON, edits as text, or a name. Ready to run.

        `own`: on the model in memory, whichever engine writes the replies.
        """
        name = None
        if isinstance(value, str) and ":" not in value:
            plan, name = self.named(value), value
        elif isinstance(value, Mapping):
            if isinstance(value.get("edits"), list) and len(value["edits"]) > MOST_EDITS:
                raise BadPlan(f"{len(value['edits'])} edits: at most {MOST_EDITS} in a request")
            try:
                plan = Plan.from_dict(value)
            except TypeError as error:
                raise BadPlan(f"{shown(value)} is not a plan: {error}") from error
        else:
            edits = value if isinstance(value, list) else [value]
            if len(edits) > MOST_EDITS or not all(isinstance(edit, str) for edit in edits):
                raise BadPlan(
                    f'{shown(value)} is not a plan: expected {{"edits": [...]}}, at most'
                    f" {MOST_EDITS} edits as text, or a plan's name"
                )
            plan = Plan(edits)
        return self.ready(plan, lens, own), name

    def ready(self, plan: Plan, lens: Any, own: bool = False) -> Plan:
        """Checked against the served model, and with typical activations."""
        for edit in plan.edits:
            for ref in edit.involved:
                lens.ref(ref)
        plan = lens.calibrated(plan)
        (lens.reader if own else lens.engine).check(plan)
        return plan

    def put(self, name: str, plan: Plan) -> None:
        name = _name(name)
        with self._lock:
            if name not in self._plans and len(self._plans) >= MOST_PLANS:
                raise Fault(f"there are {MOST_PLANS} plans already: delete one", "too_many")
            if self._folder is not None:
                plan.save(self._folder / f"{name}.json")
            self._plans[name] = plan

    def put_ready(self, name: str, lens: Any) -> None:
        """Make a plan that is here already ready to run. Raises where it cannot."""
        self._plans[name] = self.ready(self._plans[name], lens)

    def delete(self, name: str) -> None:
        with self._lock:
            self.named(name)
            if self._folder is not None:
                (self._folder / f"{_name(name)}.json").unlink(missing_ok=True)
            del self._plans[name]
            self.default = None if self.default == name else self.default

    def file(self, name: str) -> str:
        """The plan as `qsl steer --plan` takes it."""
        return json_text(FORMAT, VERSION, self.named(name).to_dict())


def _name(name: str) -> str:
    if not NAME.fullmatch(name) or name.endswith(".") or name == NO_PLAN:
        raise Fault(f"{shown(name)} cannot name a plan: letters, digits, . _ and -, at most 64")
    return name
