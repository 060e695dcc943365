"""Chosen features read from a model of interp-engine: eager, and vLLM by the same calls.

There are two ways. With `decide`, the residuals of the features' layers leave the engine, and the
codes are computed here, exactly. Without it, interp-engine's `project` multiplies inside the engine
and only one number per token and feature leaves it: the pre-activation, which is the score before
ReLU and top k. Whether a feature is among the k largest depends on the scores of all others, so
a positive pre-activation alone does not tell its activation, and none is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadPlan, BadText, UnknownName, UnsupportedSAE, WrongModel
from qwen_scope_lens.extras import require
from qwen_scope_lens.saes.few_features import Membership
from qwen_scope_lens.saes.fixed_shapes import why_not_plain
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.saes.load import open_sae
from qwen_scope_lens.steering.readers import SAEs, by_address
from qwen_scope_lens.steering.runtimes.interp_engine import check_engine
from qwen_scope_lens.tables import Table, View

__all__ = ["EngineReading", "read_engine"]


@dataclass(frozen=True, eq=False, repr=False)
class EngineReading(View):
    """Chosen features on the tokens that the engine ran. Tensors are on the CPU."""

    refs: tuple[FeatureRef, ...]
    token_ids: tuple[int, ...]  # prompt and generated tokens, the last one included
    prompt: int  # tokens from here on are generated
    tokens: tuple[str, ...]  # each as the tokenizer writes it alone
    pre: Tensor  # pre-activations, float32 [n, m]; the last generated token is never run
    activations: Tensor  # float32 [n, m]; NaN where it is not known whether it is in the top k

    @property
    def decided(self) -> bool:
        """Whether every activation is known."""
        return not bool(self.activations.isnan().any())

    def track(self, ref: FeatureRef | str) -> list[float]:
        """The activations of one feature, token by token."""
        ref = FeatureRef.parse(ref)
        if ref not in self.refs:
            raise UnknownName(f"{ref} was not read: there are {', '.join(map(str, self.refs))}")
        values: list[float] = self.activations[:, self.refs.index(ref)].tolist()
        return values

    def table(self, most: int | None = None) -> Table:
        """One row per token and feature; with `most` so many. An unknown activation is empty."""
        rows = [
            (
                i,
                self.tokens[i],
                "prompt" if i < self.prompt else "generated",
                str(ref),
                float(self.pre[i, j]),
                None if self.activations[i, j].isnan() else float(self.activations[i, j]),
            )
            for i in range(len(self.pre))
            for j, ref in enumerate(self.refs)
        ]
        return Table.of(
            ("position", "token", "phase", "feature", "pre-activation", "activation"),
            rows[:most],
            more=len(rows) - len(rows[:most]),
            formats={"pre-activation": ".4g", "activation": ".4g"},
        )


async def read_engine(
    model: Any,
    features: Iterable[FeatureRef | str],
    prompt_ids: Sequence[int],
    saes: SAEs = None,
    *,
    max_tokens: int = 0,
    temperature: float = 0.0,
    seed: int | None = None,
    decide: bool = True,
    allow_other_model: bool = False,
) -> EngineReading:
    """Read features on a prompt and on `max_tokens` generated tokens. interp-engine is awaited.

    Inside `steer_engine` the steered run is read. With `decide=False` only projections leave the
    engine. interp-engine projects prompts, so generated tokens are run once more as part of one.
    Their activations are 0 where the pre-activation is not positive, and NaN elsewhere.
    """
    engine = require("interp_engine", "interp")
    refs = tuple(dict.fromkeys(map(FeatureRef.parse, features)))
    ids = [int(token) for token in prompt_ids]
    if not refs:
        raise UnknownName("no feature was named: expected addresses such as GROUP/LAYER/FEATURE")
    if not ids:
        raise BadText("the prompt has no tokens: there is nothing to read")
    if not inspect.iscoroutinefunction(model.capture):
        raise WrongModel(
            f"a {type(model).__name__} is not awaited: read inside its own loop, with"
            " model.runner.run(read_engine(model.model, ...), what='read')"
        )
    check_engine(model, refs, allow_other_model)
    known = by_address(saes)
    readers = {
        str(ref.sae): known.get(str(ref.sae)) or open_sae(ref.sae)
        for ref in {ref.sae: ref for ref in refs}.values()
    }
    columns = {name: [i for i, ref in enumerate(refs) if str(ref.sae) == name] for name in readers}
    points = {name: engine.Address("resid_post", refs[at[0]].layer) for name, at in columns.items()}
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    generated: list[int] = []
    found: Mapping[str, tuple[Tensor, Tensor]]
    if decide:
        wanted = list(dict.fromkeys(points.values()))
        if max_tokens:
            completion, rows = await model.capture_generation(ids, wanted, **sampling)
            generated = [int(token) for token in completion.token_ids]
        else:
            rows = await model.capture(ids, wanted)
        found = {
            name: _codes(sae, [refs[i].feature for i in columns[name]], rows[points[name]])
            for name, sae in readers.items()
        }
    else:
        sets = [
            _directions(engine, sae, [refs[i].feature for i in columns[name]], points[name])
            for name, sae in readers.items()
        ]
        if max_tokens:
            _refuse_prompt_only(model)
            async for step in model.generate_steps(ids, **sampling):
                generated.append(int(step.token_id))
        values = await model.project(ids + generated[:-1], sets)
        found = {name: _silent(pre) for name, pre in zip(readers, values, strict=True)}
    n = len(ids) + max(0, len(generated) - 1)
    pre, activations = (torch.empty(n, len(refs)) for _ in range(2))
    for name, parts in found.items():
        if len(parts[0]) != n:
            raise WrongModel(
                f"interp-engine gave {len(parts[0])} rows for {n} tokens: a prefix cache or a"
                " steered run of another length is at work. Turn the prefix cache off"
            )
        pre[:, columns[name]], activations[:, columns[name]] = parts
    every = (*ids, *generated)
    return EngineReading(
        refs, every, len(ids), tuple(map(model.tokenizer.decode, every)), pre, activations
    )


def _codes(sae: LayerSAE, features: list[int], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations and exact activations of residuals `[n, d_model]`. Both `[n, m]`"""
    x = rows.to(sae.W_enc.device)
    with torch.no_grad():
        pre = sae.pre_activations(x, features)
    return pre.float().cpu(), Membership(sae, features).values(x).float().cpu()


def _directions(engine: Any, sae: LayerSAE, features: list[int], point: Any) -> Any:
    """Encoder rows and biases as interp-engine's `DirectionSet`."""
    if reason := why_not_plain(sae):
        raise UnsupportedSAE(
            f"interp-engine's project cannot read this SAE: {reason}. Read it with decide=True"
        )
    rows, bias = sae.encoder_row(features).detach(), sae.b_enc.detach()[features]
    if sae.cfg.apply_b_dec_to_input:
        bias = bias.double() - rows.double() @ sae.b_dec.detach().double()
    api = require("interp_engine.api", "interp")
    return api.DirectionSet(point=point, vectors=rows.float(), bias=bias.float())


def _silent(pre: Tensor) -> tuple[Tensor, Tensor]:
    """Without a positive pre-activation there is no activation; with one it is not known."""
    pre = pre.float().cpu()
    return pre, torch.where(pre <= 0, 0.0, float("nan"))


def _refuse_prompt_only(model: Any) -> None:
    """Refuse generated tokens that would be run again as a prompt, and be steered as one."""
    scope = require("interp_engine.steer", "interp").active_steering(model)
    if scope is not None and not scope.generated:
        raise BadPlan(
            "the plan acts on the prompt alone, and generated tokens are projected as a prompt, so"
            " they would be steered, too: read with decide=True, which captures the one run"
        )
