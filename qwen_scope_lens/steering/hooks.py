"""`steer`: a plan acts on a running model, HF or bridge, for the time of a `with` block.

One hook a layer, on the decoder layer's output (on a bridge, at `blocks.L.hook_resid_post`, before
whoever else listens there). The model is left as it was found, also after an exception. The hooks
belong to the model: while a plan is active, every thread that runs the model is steered.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.errors import BadPlan, PlanNeverFired, WrongModel
from qwen_scope_lens.models.layers import d_model, decoder_layers, describe, unwrap
from qwen_scope_lens.models.tokens import find_tokenizer
from qwen_scope_lens.saes.load import load_directions, load_sae
from qwen_scope_lens.saes.sae import ScopeSAE
from qwen_scope_lens.steering.apply import LayerEdits
from qwen_scope_lens.steering.calls import Call, Watch, watching
from qwen_scope_lens.steering.plan import Edit, Plan
from qwen_scope_lens.steering.report import Report
from qwen_scope_lens.steering.select import Selector

__all__ = [
    "SAEs",
    "by_address",
    "directions_of",
    "is_steered",
    "layer_edits",
    "steer",
    "with_readers",
]

SAEs = Iterable[ScopeSAE] | Mapping[Any, ScopeSAE] | ScopeSAE | None
"""SAEs that are loaded already, by their address or by what `cfg.metadata` says; others are read
from disk when a plan needs them."""

_ACTIVE = "_qsl_steered"


@contextmanager
def steer(
    model: Any,
    plan: Plan | Edit | Sequence[Plan | None],
    saes: SAEs = None,
    *,
    tokenizer: Any = None,
    must_fire: bool = True,
    control: int | None = None,
) -> Iterator[Report]:
    """Edit the residual while the model runs: `with steer(model, plan): model.generate(...)`.

    `model` is an HF model of a supported class or a bridge. A list of plans has one for each row
    of the batch (None: that row is left alone); inside `generate`, which may multiply the rows,
    each serves the rows made of its own. `tokenizer` is needed only where edits select by token
    class or chat role and the model's is not found. A plan of which no edit acted raises
    `PlanNeverFired` at the end unless `must_fire=False`. With `control` (a seed) every change has
    its size but goes along a random direction: what it does is what any push of that size does.
    """
    plans = _per_row(plan)
    tagged = [(row, edit) for row, one in enumerate(plans) if one for edit in one.edits]
    _check_model(model, [edit for _, edit in tagged])
    selector = Selector(lambda: find_tokenizer(model, tokenizer))
    for _, edit in tagged:
        selector.check(edit.where)
    report = Report([edit for _, edit in tagged])
    layers = _layers(tagged, saes, control)
    inner = unwrap(model)
    if is_steered(model):
        raise BadPlan(
            f"a plan is active on {describe(model)} already: put the edits into one Plan, so that"
            " what acts first is not left to chance"
        )
    with ExitStack() as stack:
        vars(inner)[_ACTIVE] = True
        stack.callback(vars(inner).pop, _ACTIVE)
        watch = stack.enter_context(watching(model))
        for layer in layers:
            hook = functools.partial(_hook, layer, watch, selector, report, len(plans))
            handle = _place(model, layer.number).register_forward_hook(hook, prepend=True)
            stack.callback(handle.remove)
        yield report
    if must_fire and not report.fired:
        raise PlanNeverFired(_silence(report))


def layer_edits(edits: Sequence[Edit], saes: SAEs = None) -> LayerEdits:
    """The arithmetic of the edits of one layer, with what it needs read from disk."""
    known = with_readers(edits, saes)
    return LayerEdits.build(edits, directions_of(edits, known), known)


def with_readers(edits: Iterable[Edit], saes: SAEs = None) -> dict[str, ScopeSAE]:
    """The SAEs given and those that edits read codes of, loaded; by address."""
    known = by_address(saes)
    for edit in edits:
        name = str(edit.ref.sae)
        if edit.operation.reads == "code" and name not in known:
            known[name] = load_sae(name)
    return known


def directions_of(edits: Sequence[Edit], saes: SAEs = None) -> Tensor:
    """The decoder row of every edit's feature, float32 `[m, d_model]`; only these are read."""
    known = by_address(saes)
    by_sae: dict[LayerRef, list[int]] = {}
    for i, edit in enumerate(edits):
        by_sae.setdefault(edit.ref.sae, []).append(i)
    rows: dict[int, Tensor] = {}
    for ref, at in by_sae.items():
        features = [edits[i].ref.feature for i in at]
        sae = known.get(str(ref))
        found = load_directions(ref, features) if sae is None else sae.direction(features)
        for i, row in zip(at, found.detach().float().cpu(), strict=True):
            rows[i] = row
    return torch.stack([rows[i] for i in range(len(edits))])


@dataclass(frozen=True)
class _Layer:
    number: int
    edits: LayerEdits
    rows: tuple[int, ...]  # the plan of each edit
    numbers: tuple[int, ...]  # its place in the report
    lengths: Tensor


def is_steered(model: Any) -> bool:
    """Whether a plan is active on the model now."""
    return bool(vars(unwrap(model)).get(_ACTIVE))


def _layers(tagged: Sequence[tuple[int, Edit]], saes: SAEs, control: int | None) -> list[_Layer]:
    """The edits by layer, in an order that does not depend on how the plan was written."""
    by_layer: dict[int, list[int]] = {}
    for i, (_, edit) in enumerate(tagged):
        by_layer.setdefault(edit.ref.layer, []).append(i)
    layers = []
    for number, members in sorted(by_layer.items()):
        members.sort(key=lambda i: (tagged[i][0], str(tagged[i][1])))
        made = layer_edits([tagged[i][1] for i in members], saes)
        if control is not None:
            made = made.astray(control)
        rows = tuple(tagged[i][0] for i in members)
        lengths = made.directions.norm(dim=-1)
        layers.append(_Layer(number, made, rows, tuple(members), lengths))
    return layers


def _hook(
    layer: _Layer,
    watch: Watch,
    selector: Selector,
    report: Report,
    n_plans: int,
    module: Any,
    args: Any,
    output: Any,
) -> Any:
    """The forward hook of a layer: `[rows, columns, d_model]` in, the same out."""
    x = output[0] if isinstance(output, tuple) else output
    call = watch.call
    if call is None or x.shape[:2] != (call.rows, call.columns):
        raise WrongModel(
            "a layer ran outside a pass of the model that the plan was given for: call the model"
            " itself, not its layers"
        )
    active = [selector.active(edit.where, call) for edit in layer.edits.edits]
    report.passes += 1
    if not any(active):
        return None
    selected = _selected(layer, call, watch, selector, active, n_plans, x.device)
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


def _selected(
    layer: _Layer,
    call: Call,
    watch: Watch,
    selector: Selector,
    active: Sequence[bool],
    n_plans: int,
    device: torch.device,
) -> Tensor:
    """bool `[rows, columns, m]`: where each edit acts. Equal selections are made once a pass."""
    shape = (call.rows, call.columns)
    columns = []
    for edit, row, on in zip(layer.edits.edits, layer.rows, active, strict=True):
        key = (edit.where, row if n_plans > 1 else None, on, device)
        if key not in watch.cache:
            mask = selector.mask(edit.where, call, device) if on else None
            found = torch.full(shape, on, device=device)
            if mask is not None:
                found = found & mask
            if n_plans > 1:
                found = found & _own_rows(row, n_plans, call, device)
            watch.cache[key] = found
        columns.append(watch.cache[key])
    return torch.stack(columns, dim=-1)


def _own_rows(plan: int, n_plans: int, call: Call, device: torch.device) -> Tensor:
    each, rest = divmod(call.rows, n_plans)
    if rest or (each != 1 and not call.generating):
        raise BadPlan(
            f"{n_plans} plans were given, one a row, and the batch has {call.rows} rows: give as"
            " many plans as rows (None for a row to leave alone), or one Plan for all"
        )
    rows: Tensor = torch.arange(call.rows, device=device) // each == plan
    return rows[:, None]


def _place(model: Any, layer: int) -> nn.Module:
    """Where the residual after a layer can be changed."""
    if "original_model" in vars(model):  # a bridge
        hooks: dict[str, nn.Module] = model.hook_dict
        return hooks[f"blocks.{layer}.hook_resid_post"]
    return decoder_layers(model)[layer]


def _per_row(plan: Any) -> list[Plan | None]:
    if isinstance(plan, Edit):
        return [Plan([plan])]
    plans = [plan] if isinstance(plan, Plan) else list(plan)
    for one in plans:
        if one is not None and not isinstance(one, Plan):
            raise BadPlan(f"expected a Plan, or one Plan or None a row; found {one!r}")
    if not any(plans):
        raise BadPlan("no row has a plan: run the model without steering")
    return plans


def _check_model(model: Any, edits: Iterable[Edit]) -> None:
    width, depth = d_model(model), len(decoder_layers(model))
    for edit in edits:
        row = edit.ref.sae.row
        if row.d_model != width or edit.ref.layer >= depth:
            raise WrongModel(
                f"{edit.ref} is a feature of {row.backbone.model_id} (d_model {row.d_model}, layer"
                f" {edit.ref.layer}); {describe(model)} has d_model {width} and layers"
                f" 0..{depth - 1}"
            )


def by_address(saes: SAEs) -> dict[str, ScopeSAE]:
    if saes is None:
        return {}
    if isinstance(saes, Mapping):
        return {str(LayerRef.parse(name)): sae for name, sae in saes.items()}
    listed = [saes] if isinstance(saes, ScopeSAE) else list(saes)
    return {str(LayerRef.parse(sae.cfg.metadata.qwen_scope_ref)): sae for sae in listed}


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
