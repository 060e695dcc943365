"""Plans for the rows of a batch whose passes the caller runs, one pass at a time.

`steer` follows a model that `generate` drives, where the rows of a batch begin together. A server
lets rows join and leave between two passes, so it says itself which tokens a pass works on. The
hooks and the arithmetic are those of `steer`. They are on the model during a pass and at no other
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

from torch import Tensor

from qwen_scope_lens.models.architecture import describe
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.steering.calls import Call, OfOneModel, Pass
from qwen_scope_lens.steering.gates import GateHook, gates_by_layer
from qwen_scope_lens.steering.hooks import EditHook, check_model, edited_layers, place_of
from qwen_scope_lens.steering.plan import Edit, Plan
from qwen_scope_lens.steering.report import Report
from qwen_scope_lens.steering.token_masks import Selector
from qwen_scope_lens.steering.where import Gate

__all__ = ["RowSteering"]


class RowSteering(OfOneModel):
    """The plans of the rows that are decoded together. It belongs to one thread."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sae_of: Callable[[str], LayerSAE],
        allow_other_model: bool = False,
    ) -> None:
        self.name, self._model, self._sae_of = describe(model), model, sae_of
        self._allow = allow_other_model
        self._selector = Selector(lambda: tokenizer)
        self._hooks: list[tuple[int, Any]] = []
        self._slices: list[slice] = []
        self._report: Report | None = None
        self._now: Pass | None = None

    def check(self, plan: Plan) -> None:
        """Raise now what would otherwise be raised while the plan acts."""
        check_model(self._model, plan.edits, self._allow)
        for edit in plan.edits:
            self._selector.check(edit.where)
        edited_layers([(0, edit) for edit in plan.edits], self._saes(plan.edits))

    def arrange(self, plans: Sequence[Plan | None]) -> None:
        """Give the plan of each row of the passes that follow, None for a row to leave alone."""
        tagged = [(row, edit) for row, one in enumerate(plans) if one for edit in one.edits]
        ends = [0]
        for one in plans:
            ends.append(ends[-1] + (len(one) if one else 0))
        self._slices = [slice(a, b) for a, b in pairwise(ends)]
        self._hooks, self._report = [], None
        if not tagged:
            return
        self._report = Report([edit for _, edit in tagged])
        known = self._saes(edit for _, edit in tagged)
        self._hooks = [
            (layer.number, EditHook(layer, self, self._selector, self._report, len(plans)))
            for layer in edited_layers(tagged, known)
        ]
        gates = gates_by_layer(edit for _, edit in tagged)
        self._hooks += [(n, GateHook(n, own, known, self)) for n, own in gates.items()]

    def _saes(self, edits: Iterable[Edit]) -> dict[str, LayerSAE]:
        refs = {ref for edit in edits for ref in edit.involved}
        return {name: self._sae_of(name) for name in {str(ref.sae) for ref in refs}}

    def taken(self) -> list[Tensor | None]:
        """What the edits of each row did since `arrange`, as `Report.taken` gives it."""
        if self._report is None:
            return [None] * len(self._slices)
        sums = self._report.taken()
        return [sums[at] if at.stop > at.start else None for at in self._slices]

    @contextmanager
    def running(self, call: Call, opened: Mapping[Gate, Tensor]) -> Iterator[Pass]:
        """One pass. `opened` says where the gates of its rows opened before, int64 `[rows]`."""
        self._now = Pass(call, opened=dict(opened))
        with ExitStack() as stack:
            for number, hook in self._hooks:
                place = place_of(self._model, number)
                handle = place.register_forward_hook(hook, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            try:
                yield self._now
            finally:
                self._now = None

    def at_layer(self, layer: int, module: Any, kwargs: dict[str, Any]) -> Pass | None:
        return self._now
