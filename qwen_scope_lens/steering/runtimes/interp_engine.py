"""The same plans on interp-engine's models: its eager backend, and vLLM through the same call.

interp-engine has `add` in every unit and `project_out`. A plan is refused where interp-engine would
not compute what it says: where it reads codes of an SAE, selects several places at once, or has
edits that would see each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadPlan, WrongModel
from qwen_scope_lens.extras import require
from qwen_scope_lens.models.backbone import check_name
from qwen_scope_lens.steering.calls import Call
from qwen_scope_lens.steering.plan import Edit, Plan
from qwen_scope_lens.steering.readers import SAEs, directions_of
from qwen_scope_lens.steering.token_masks import Selector
from qwen_scope_lens.steering.where import Where

__all__ = ["check_engine", "check_plan", "chosen", "engine_spec", "steer_engine"]


@contextmanager
def steer_engine(
    model: Any,
    plan: Plan,
    prompt_ids: Sequence[int],
    saes: SAEs = None,
    *,
    allow_other_model: bool = False,
) -> Iterator[None]:
    """`with steer_engine(model, plan, ids): ...` for a model of interp-engine and one prompt."""
    engine = require("interp_engine", "interp")
    spec = engine_spec(plan, saes)
    check_engine(model, [edit.ref for edit in plan.edits], allow_other_model)
    left_out, generated = _places(model, plan.edits[0].where, list(prompt_ids))
    with engine.steer(
        model,
        spec,
        prompt_token_ids=list(prompt_ids),
        position_mask=left_out or None,
        generated=generated,
    ):
        yield


def check_engine(model: Any, refs: Sequence[FeatureRef], allow_other_model: bool) -> None:
    """Raise `WrongModel` where the features are not of the engine's model."""
    width, depth = int(model.d_model), int(model.n_layers)
    for ref in refs:
        if ref.sae.row.d_model != width or ref.layer >= depth:
            raise WrongModel(
                f"{ref} is a feature of {ref.sae.row.backbone.model_id};"
                f" {model.hf_model_id} has d_model {width} and layers 0..{depth - 1}"
            )
    if not allow_other_model:
        for row in dict.fromkeys(ref.sae.row for ref in refs):
            check_name(str(model.hf_model_id), row)


def check_plan(plan: Plan) -> None:
    """Raise `BadPlan` for a plan that interp-engine would not carry out, whatever the prompt."""
    _check_edits(plan)
    _check_place(plan.edits[0].where)


def _check_edits(plan: Plan) -> None:
    if len({edit.where for edit in plan.edits}) > 1:
        raise BadPlan(
            "interp-engine has one place for all edits of a request; found"
            f" {', '.join(sorted({str(edit.where) for edit in plan.edits}))}"
        )
    for edit in plan.edits:
        if edit.operation.reads == "code":
            raise BadPlan(
                f"{edit}: {edit.op} reads the SAE's code, which interp-engine does not have: only"
                " add and project_out can run there"
            )
    for layer, members in _by_layer(plan).items():
        edits = [plan.edits[i] for i in members]
        if len(edits) > 1 and not _constant(edits):
            raise BadPlan(
                f"layer {layer} has several edits that read the residual"
                f" ({'; '.join(map(str, edits))}): in interp-engine the second would see what the"
                " first did. Keep one of them per layer"
            )


def engine_spec(plan: Plan, saes: SAEs = None) -> Any:
    """interp-engine's `SteeringSpec` for the edits of a plan, whatever their places."""
    engine = require("interp_engine", "interp")
    _check_edits(plan)
    rows = directions_of(plan.edits, saes)
    layers = {}
    for layer, members in _by_layer(plan).items():
        edits = [plan.edits[i] for i in members]
        layers[layer] = engine.LayerSteeringSpec(
            operations=[_operation(engine, edits, rows[members])]
        )
    return engine.SteeringSpec(layers=layers)


def _by_layer(plan: Plan) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for i, edit in enumerate(plan.edits):
        found.setdefault(edit.ref.layer, []).append(i)
    return found


def _constant(edits: Sequence[Edit]) -> bool:
    """Whether they add one vector together, whatever the residual is."""
    return all(edit.op == "add" and edit.unit != "norm" for edit in edits)


def _operation(engine: Any, edits: Sequence[Edit], rows: torch.Tensor) -> Any:
    """The one operation of a layer; several `add` become one vector."""
    if _constant(edits):
        values = torch.tensor([edit.value for edit in edits], dtype=torch.float64)
        return engine.AddSpec(vector=(values @ rows.double()).float(), scale=1.0)
    if edits[0].op == "project_out":
        return engine.AblateSpec(vector=rows[0])
    return engine.NormScaledAddSpec(
        vector=rows[0], strength=edits[0].value, max_fraction=1e9, normalize=True
    )


def _check_place(where: Where) -> None:
    if where.gate is not None:
        raise BadPlan(f"{where}: interp-engine has no gates: only this package's own runtime has")
    picky = where.positions is not None or where.classes or where.token_ids or where.looks_back
    if picky and where.phase != "prompt":
        raise BadPlan(f"{where}: interp-engine cannot select among generated tokens: add `prompt`")


def _places(model: Any, where: Where, ids: list[int]) -> tuple[list[int], bool]:
    """Prompt positions to leave out, and whether generated tokens are steered."""
    flags, generated = chosen(Selector(lambda: model.tokenizer), where, ids)
    return [i for i, on in enumerate(flags.tolist()) if not on], generated


def chosen(selector: Selector, where: Where, ids: Sequence[int]) -> tuple[torch.Tensor, bool]:
    """Which tokens of a prompt are selected, bool `[n]`, and whether generated ones are."""
    _check_place(where)
    call = Call(1, len(ids), 0, len(ids), torch.tensor([list(ids)]), None, False)
    selector.check(where)
    flags = torch.full((1, len(ids)), where.phase != "generation")
    mask = selector.mask(where, call, flags.device)
    if mask is not None:
        flags = flags & mask
    return flags[0], where.phase != "prompt"
