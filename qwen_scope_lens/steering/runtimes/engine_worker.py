"""Plans that read codes, inside the workers of a vLLM engine that interp-engine extends.

interp-engine's own writes cannot express a code: on an engine that replays graphs a write is a
vector times a number made from the residual's length and one projection of it, and on one with
hooks it is one of a fixed list of operations. So this extension wraps the decoder layers itself,
and takes from interp-engine what says which row of the batch belongs to which request. Pass its
name to the engine:

    AsyncEngineArgs(.., worker_extension_cls=WORKER, **interp_engine.capture_engine_kwargs())
    await engine.collective_rpc("qsl_install", args=(plan.to_dict(),))
    await engine.collective_rpc("qsl_register", args=(id, *request_flags(plan, ids, tokenizer)))

The edits are `graph_edits.py`'s, so what is wrapped could be recorded. It has to be wrapped before
the engine records its graphs, though, and interp-engine offers no place for that: `qsl_install`
refuses an engine that replays. No part of this has met a real engine: the tests drive it with
interp-engine's own bookkeeping and a stand-in for vLLM's runner and model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qwen_scope_lens.errors import BadPlan, PlanBypassed
from qwen_scope_lens.extras import require
from qwen_scope_lens.saes.load import open_sae
from qwen_scope_lens.steering.plan import Plan
from qwen_scope_lens.steering.report import Report
from qwen_scope_lens.steering.runtimes.graph_edits import GraphEdits, graph_edits
from qwen_scope_lens.steering.runtimes.interp_engine import chosen
from qwen_scope_lens.steering.token_masks import Selector

__all__ = ["WORKER", "ScopeWorker", "report_of", "request_flags"]

WORKER = f"{__name__}.ScopeWorker"
"""The name to pass as `worker_extension_cls`."""

_KEPT = "_qsl_wrapped"
_NO_EXTRA = "interp"


def request_flags(
    plan: Plan, prompt_ids: Sequence[int], tokenizer: Any = None
) -> tuple[list[list[bool]], list[bool]]:
    """Which edits act on each token of a prompt, and which on generated tokens. `[n][m], [m]`"""
    selector = Selector(lambda: tokenizer)
    found = [chosen(selector, edit.where, prompt_ids) for edit in plan.edits]
    return torch.stack([flags for flags, _ in found], 1).tolist(), [late for _, late in found]


def report_of(plan: Plan, said: Mapping[str, Any], *, accept_undecided: bool = False) -> Report:
    """The report of one worker's `qsl_report`.

    Raises `PlanBypassed` for tokens that the edits left as they were although they were selected.
    """
    lines = [f"  {edit}: {n}" for edit, n in zip(plan.edits, said["undecided"], strict=True) if n]
    if lines and not accept_undecided:
        raise PlanBypassed(
            "the edits left tokens as they were, because it was not decided whether the feature is"
            " among the k largest there:\n" + "\n".join(lines) + "\nInstall the plan with a"
            " larger capacity (None decides every position)"
        )
    if said["lost"]:
        raise PlanBypassed(
            f"{said['lost']} passes with registered requests ran without the plan, because"
            " interp-engine could not say whose rows they computed"
        )
    report = Report(plan.edits)
    report.give(torch.tensor(said["sums"], dtype=torch.float64))
    return report


@dataclass
class _Site:
    """One wrapped layer."""

    module: nn.Module
    edits: GraphEdits
    columns: list[int]  # the edits' numbers in the plan
    selected: Tensor  # bool [max_rows, m], at a fixed address: a recorded graph keeps reading it


@dataclass
class _Wrapped:
    """What is installed on one worker."""

    plan: Plan
    sites: list[_Site]
    undo: list[Callable[[], None]]
    requests: dict[str, Tensor] = field(default_factory=dict)  # bool [n_prompt + 1, m]
    lost: int = 0  # passes whose rows could not be told apart


class ScopeWorker(require("interp_engine.vllm_plugin", _NO_EXTRA).InterpWorkerExtension):  # type: ignore[misc]
    """interp-engine's worker extension, with one plan for the requests that register for it."""

    def qsl_install(
        self, plan: dict[str, Any], max_rows: int = 8192, capacity: int | None = None
    ) -> list[str]:
        """Wrap the plan's layers. The worker reads the SAEs itself; returns the edits as text."""
        return install(self, Plan.from_dict(plan), max_rows, capacity)

    def qsl_register(self, req_id: str, flags: list[list[bool]], generated: list[bool]) -> None:
        """Steer a request, whose id is the one given to the engine. Register before it runs."""
        kept, m = _kept(self), len(_kept(self).plan.edits)
        if {len(row) for row in (*flags, generated)} != {m}:
            raise BadPlan(f"{req_id}: expected a flag for each of {m} edits: see request_flags()")
        _demux_of(self).registered.add(req_id)
        device = kept.sites[0].selected.device
        kept.requests[req_id] = torch.tensor([*flags, generated], device=device)

    def qsl_unregister(self, req_id: str) -> None:
        """Stop steering a request."""
        _kept(self).requests.pop(req_id, None)
        demux = _demux_of(self)
        require("interp_engine.vllm_capture._demux", _NO_EXTRA)._maybe_unregister(demux, req_id)

    def qsl_report(self) -> dict[str, Any]:
        """What the edits did since `qsl_install`, for `report_of`."""
        kept = _kept(self)
        m = len(kept.plan.edits)
        sums, undecided = torch.zeros(m, 4, dtype=torch.float64), [0] * m
        for site in kept.sites:
            sums[site.columns] = site.edits.sums.T.cpu()
            for i, n in zip(site.columns, site.edits.undecided.tolist(), strict=True):
                undecided[i] = n
        return {"sums": sums.tolist(), "undecided": undecided, "lost": kept.lost}

    def qsl_remove(self) -> None:
        """Give the layers back as they were."""
        for step in reversed(_kept(self).undo):
            step()
        delattr(self, _KEPT)


def install(worker: Any, plan: Plan, max_rows: int, capacity: int | None) -> list[str]:
    """Wrap the layers that a plan edits, on one worker."""
    graphs = require("interp_engine.vllm_capture.graphs", _NO_EXTRA)
    tree = require("interp_engine.vllm_capture._tree", _NO_EXTRA)
    if hasattr(worker, _KEPT):
        raise BadPlan("a plan is installed on this worker already: call qsl_remove first")
    if graphs.graphs_replaying():
        raise BadPlan(
            "this engine replays recorded graphs, which know no layer that is wrapped now: build"
            " it with enforce_eager=True (interp_engine.capture_engine_kwargs())"
        )
    cache = getattr(getattr(worker, "vllm_config", None), "cache_config", None)
    if getattr(cache, "enable_prefix_caching", False):
        raise BadPlan(
            "this engine keeps prefixes for all requests, so a request would go on from tokens that"
            " ran without its plan: build it with enable_prefix_caching=False"
            " (interp_engine.capture_engine_kwargs())"
        )
    model = tree._worker_model(worker)
    layers, device = tree._get_layers(model), next(model.parameters()).device
    if plan.layers[-1] >= len(layers):
        raise BadPlan(f"the plan edits layer {plan.layers[-1]}; this model has {len(layers)}")
    read = {str(e.ref.sae): e.ref.sae for e in plan.edits if e.operation.reads == "code"}
    saes = {name: open_sae(ref, device=str(device)) for name, ref in read.items()}
    numbers = {
        layer: [i for i, e in enumerate(plan.edits) if e.ref.layer == layer]
        for layer in plan.layers
    }
    sites = [
        _Site(
            layers[layer],
            edits.to(device),
            numbers[layer],
            torch.zeros((max_rows, len(numbers[layer])), dtype=torch.bool, device=device),
        )
        for layer, edits in graph_edits(plan, saes, capacity=capacity).items()
    ]
    kept = _Wrapped(plan, sites, [_wrap(site) for site in sites])
    setattr(worker, _KEPT, kept)
    demux = _demux_of(worker)
    require("interp_engine.vllm_capture._demux", _NO_EXTRA)._ensure_patched(worker, demux)

    def fill() -> None:
        try:
            _fill(kept, demux)
        except Exception:  # interp-engine notes it and lets the pass go on
            kept.lost += 1
            for site in kept.sites:
                site.selected.zero_()
            raise

    demux.on_meta.append(fill)
    kept.undo.append(lambda: demux.on_meta.remove(fill))
    return [str(edit) for edit in plan.edits]


def _wrap(site: _Site) -> Callable[[], None]:
    """Put the edits behind a layer. Returns the function that undoes it."""
    hooks = require("interp_engine.vllm_capture._hooks", _NO_EXTRA)
    original = site.module.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        full = hooks._sum_residual(output, site.module)
        flat = full.reshape(-1, full.shape[-1])
        # Rows after the buffer's end belong to no request: an engine pads its batches.
        n = min(len(flat), len(site.selected))
        new = site.edits(flat[:n], site.selected[:n])
        # vLLM keeps the residual in two tensors; the change goes to the one that moves on.
        change = torch.zeros_like(flat)
        change[:n] = new - flat[:n]
        change = change.view(full.shape)
        if isinstance(output, tuple):
            return (output[0] + change, *output[1:])
        return output + change

    vars(site.module)["forward"] = wrapped
    return lambda: vars(site.module).pop("forward", None)


def _fill(kept: _Wrapped, demux: Any) -> None:
    """Before a pass: which rows of its batch each edit acts on."""
    resolve = require("interp_engine.vllm_capture._demux", _NO_EXTRA)._resolve_rid
    for site in kept.sites:
        site.selected.zero_()
    if not kept.requests:
        return
    meta, starts = demux.current_meta, demux.current_starts
    if meta is None or starts is None or sum(meta[1]) > len(kept.sites[0].selected):
        kept.lost += 1  # no row is steered, and the report says so
        return
    begin = 0
    for full_id, count, start in zip(*meta, starts, strict=True):
        flags = kept.requests.get(resolve(demux, str(full_id)))
        if flags is not None:
            at = torch.arange(start, start + count, device=flags.device).clamp(max=len(flags) - 1)
            for site in kept.sites:
                site.selected[begin : begin + count] = flags[at][:, site.columns]
        begin += count


def _kept(worker: Any) -> _Wrapped:
    kept = getattr(worker, _KEPT, None)
    if not isinstance(kept, _Wrapped):
        raise BadPlan("no plan is installed on this worker: call qsl_install first")
    return kept


def _demux_of(worker: Any) -> Any:
    return require("interp_engine.vllm_capture._demux", _NO_EXTRA)._get_demux(worker)
