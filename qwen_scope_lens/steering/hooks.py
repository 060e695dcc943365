"""`steer`: a plan acts on a running model, HF or bridge, for the time of a `with` block.

Each edited layer gets one hook on its output (on a bridge, at `blocks.L.hook_resid_post`, before
all other hooks there). After the block the model is as it was, also after an exception. The hooks
belong to the model: while a plan is active, every thread that runs the model is steered. Compiled
models run eagerly inside the block; a pass that ends although the hooks were not called raises
`PlanBypassed`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen_scope_lens.errors import BadPlan, PlanNeverFired, WrongModel
from qwen_scope_lens.models.architecture import d_model, decoder_layers, describe, unwrap
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.models.eager import eagerly
from qwen_scope_lens.models.tokenize import find_tokenizer
from qwen_scope_lens.steering.calls import Call, OfOneModel, Pass
from qwen_scope_lens.steering.gates import GateHook, gates_by_layer
from qwen_scope_lens.steering.layer_edits import LayerEdits
from qwen_scope_lens.steering.passes import watching
from qwen_scope_lens.steering.plan import Edit, Plan, check_seed
from qwen_scope_lens.steering.readers import SAEs, layer_edits, with_readers
from qwen_scope_lens.steering.report import Report
from qwen_scope_lens.steering.token_masks import Selector

__all__ = [
    "EditHook",
    "EditedLayer",
    "check_model",
    "edited_layers",
    "is_steered",
    "place_of",
    "steer",
]

_ACTIVE = "_qsl_steered"
_marking = threading.Lock()


@contextmanager
def steer(
    model: Any,
    plan: Plan | Edit | str | Sequence[Plan | Edit | str | None],
    saes: SAEs = None,
    *,
    tokenizer: Any = None,
    must_fire: bool = True,
    control: int | Mapping[int, Tensor] | None = None,
    allow_other_model: bool = False,
) -> Iterator[Report]:
    """Edit the residual while the model runs: `with steer(model, plan): model.generate(...)`.

    `model` is an HF model of a supported class or a bridge. `plan` is a Plan, an Edit, or an edit
    as text: `"mini-qwen3/w1k-l0-16/6/498:add:2"`. A list has one for each row of the batch (None
    leaves the row as it is); where `generate` multiplies the rows, a plan
    acts on all rows made from its own. `tokenizer` is needed only where edits select by token class
    or chat role and the model's tokenizer is not found. If no edit acted, `PlanNeverFired` is
    raised at the end, unless `must_fire=False`. With `control` (a seed) every change keeps its size
    but goes along a random direction, which shows what any push of that size does. With directions
    by layer, `[d_model]` each, it goes along those.

    A model that is known not to be the one on which the SAEs were trained is refused. A model whose
    name says nothing gives a warning. `allow_other_model` accepts both.
    """
    plans = _per_row(plan)
    tagged = [(row, edit) for row, one in enumerate(plans) if one for edit in one.edits]
    if control is not None and not isinstance(control, Mapping):
        check_seed(control)
    check_model(model, [edit for _, edit in tagged], allow_other_model)
    selector = Selector(lambda: find_tokenizer(model, tokenizer))
    for _, edit in tagged:
        selector.check(edit.where)
    report = Report([edit for _, edit in tagged])
    known = with_readers([edit for _, edit in tagged], saes)
    layers = edited_layers(tagged, known, control)
    gates = gates_by_layer(edit for _, edit in tagged)
    with ExitStack() as stack:
        stack.enter_context(_alone(model))
        stack.enter_context(eagerly())
        watch = stack.enter_context(watching(model, [*(layer.number for layer in layers), *gates]))
        watch.looks_back = any(e.where.gate or e.where.think for _, e in tagged)
        hooks: list[tuple[int, Any]] = [
            (layer.number, EditHook(layer, watch, selector, report, len(plans))) for layer in layers
        ]
        # The last one is called first: gates read what no edit of their layer has changed.
        hooks += [(n, GateHook(n, own, known, watch)) for n, own in gates.items()]
        for number, hook in hooks:
            place = place_of(model, number)
            handle = place.register_forward_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield report
    if must_fire and not report.fired:
        raise PlanNeverFired(_silence(report))


@dataclass(frozen=True)
class EditedLayer:
    """The edits of one layer, whoever's they are."""

    number: int
    edits: LayerEdits
    rows: tuple[int, ...]  # the plan of each edit
    numbers: tuple[int, ...]  # its place in the report
    lengths: Tensor


class _Mark(OfOneModel):
    """Marks a model on which a plan is active."""

    def __init__(self, model: Any) -> None:
        self.name, self.model = describe(model), weakref.ref(unwrap(model))


def is_steered(model: Any) -> bool:
    """Whether a plan is active on the model now."""
    inner = unwrap(model)
    mark = vars(inner).get(_ACTIVE)
    return isinstance(mark, _Mark) and mark.model() is inner


@contextmanager
def _alone(model: Any) -> Iterator[None]:
    """Refuse a second plan on the same model."""
    inner = unwrap(model)
    with _marking:
        if is_steered(model):
            raise BadPlan(
                f"a plan is active on {describe(model)} already: put the edits into one Plan, so"
                " that they are computed from the same residual"
            )
        vars(inner)[_ACTIVE] = _Mark(model)
    try:
        yield
    finally:
        vars(inner).pop(_ACTIVE, None)


def edited_layers(
    tagged: Sequence[tuple[int, Edit]],
    saes: SAEs,
    control: int | Mapping[int, Tensor] | None = None,
) -> list[EditedLayer]:
    """The edits by layer, in an order that does not depend on how the plan was written."""
    by_layer: dict[int, list[int]] = {}
    for i, (_, edit) in enumerate(tagged):
        by_layer.setdefault(edit.ref.layer, []).append(i)
    layers = []
    for number, members in sorted(by_layer.items()):
        members.sort(key=lambda i: (tagged[i][0], str(tagged[i][1])))
        made = layer_edits([tagged[i][1] for i in members], saes)
        if isinstance(control, Mapping):
            made = made.along(control[number])
        elif control is not None:
            made = made.astray(control)
        rows = tuple(tagged[i][0] for i in members)
        lengths = made.directions.norm(dim=-1)
        layers.append(EditedLayer(number, made, rows, tuple(members), lengths))
    return layers


class EditHook(OfOneModel):
    """The forward hook of a layer: `[rows, columns, d_model]` in, the same out."""

    def __init__(
        self, layer: EditedLayer, watch: Any, selector: Selector, report: Report, n_plans: int
    ) -> None:
        self.name = watch.name
        self._layer, self._watch, self._selector = layer, watch, selector
        self._report, self._n_plans = report, n_plans

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        layer, report = self._layer, self._report
        x = output[0] if isinstance(output, tuple) else output
        now = self._watch.at_layer(layer.number, module, kwargs)
        if now is None or x.shape[:2] != (now.call.rows, now.call.columns):
            raise WrongModel(
                "a layer ran outside a pass of the model that the plan was given for: call the"
                " model itself, not its layers"
            )
        active = [self._selector.active(edit.where, now.call) for edit in layer.edits.edits]
        report.count_pass()
        if not any(active):
            return None
        selected = self._selected(now, active, x.device)
        neutral = all(edit.changes_nothing for edit in layer.edits.edits)
        new, c = (
            (x, selected.new_zeros(selected.shape, dtype=torch.float32))
            if neutral
            else layer.edits.change(x, selected)
        )
        precise = torch.promote_types(x.dtype, torch.float32)
        norms = torch.linalg.vector_norm(x.detach(), dim=-1, dtype=precise)
        report.add(layer.numbers, c, selected, layer.lengths.to(x.device), norms)
        if neutral:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def _selected(self, now: Pass, active: Sequence[bool], device: torch.device) -> Tensor:
        """Where each edit acts, bool `[rows, columns, m]`. Equal masks are made once per pass."""
        call, layer = now.call, self._layer
        columns = []
        for edit, row, on in zip(layer.edits.edits, layer.rows, active, strict=True):
            key = (edit.where, row if self._n_plans > 1 else None, on, device)
            if key not in now.derived:
                mask = self._selector.mask(edit.where, call, device) if on else None
                found = torch.full((call.rows, call.columns), on, device=device)
                if mask is not None:
                    found = found & mask
                if edit.where.gate is not None and on:
                    found = found & now.is_open(edit.where.gate).to(device)
                if self._n_plans > 1:
                    found = found & _own_rows(row, self._n_plans, call, device)
                now.derived[key] = found
            columns.append(now.derived[key])
        return torch.stack(columns, dim=-1)


def _own_rows(plan: int, n_plans: int, call: Call, device: torch.device) -> Tensor:
    each, rest = divmod(call.rows, n_plans)
    if rest or (each != 1 and not call.generating):
        raise BadPlan(
            f"{n_plans} plans were given for the {call.rows} rows of the batch: give as"
            " many plans as rows (None for a row to leave alone), or one Plan for all"
        )
    rows: Tensor = torch.arange(call.rows, device=device) // each == plan
    return rows[:, None]


def place_of(model: Any, layer: int) -> nn.Module:
    """Where the residual after a layer can be changed."""
    if "original_model" in vars(model):  # a bridge
        hooks: dict[str, nn.Module] = model.hook_dict
        return hooks[f"blocks.{layer}.hook_resid_post"]
    return decoder_layers(model)[layer]


def _per_row(plan: Any) -> list[Plan | None]:
    rows = [plan] if plan is None or isinstance(plan, (Plan, Edit, str)) else list(plan)
    plans = [None if one is None else Plan.of(one) for one in rows]
    if not any(plans):
        raise BadPlan("no row has a plan: run the model without steering")
    return plans


def check_model(model: Any, edits: Sequence[Edit], allow_other_model: bool) -> None:
    width, depth = d_model(model), len(decoder_layers(model))
    refs = [ref for edit in edits for ref in edit.involved]
    for ref in refs:
        row = ref.sae.row
        if row.d_model != width or ref.layer >= depth:
            raise WrongModel(
                f"{ref} is a feature of {row.backbone.model_id} (d_model {row.d_model}, layer"
                f" {ref.layer}); {describe(model)} has d_model {width} and layers"
                f" 0..{depth - 1}"
            )
    for row in dict.fromkeys(ref.sae.row for ref in refs):
        check_backbone(model, row, allow_other_model=allow_other_model)


def _silence(report: Report) -> str:
    if not report.passes:
        return (
            "the plan never fired: the model did not run inside the block, or ended before the"
            " edited layers. Pass must_fire=False where that is meant"
        )
    lines = "\n".join(f"  {row}" for row in report.edits)
    return (
        f"the plan never fired in {report.passes} passes: no token was selected, or the features"
        f" were never among the top k. Check layer, feature and where, or pass must_fire=False\n"
        f"{lines}"
    )
