"""Steering in plain float64 arithmetic, token by token: the independent reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import planted
import torch
from tiny_models import D_MODEL, N_LAYERS, make_model, make_tokenizer
from torch import Tensor

import qwen_scope_lens as qsl
from qwen_scope_lens.models import decoder_layers
from qwen_scope_lens.steering import Edit

D_SAE, K = 96, 6

Weights = dict[str, Tensor]
Chosen = Callable[[Edit, int, int], bool]  # edit, row, position -> whether it acts


class World(dict[int, Weights]):
    """Layer -> the weights of its SAE; `home` is the folder for QWEN_SCOPE_HOME."""

    home: Path


def endless_bridge() -> Any:
    """A bridge, so that the tokenizer is known; it never stops by itself."""
    hf = make_model()
    hf.generation_config.eos_token_id = None
    hf.config.eos_token_id = None
    return qsl.load_model(hf, tokenizer=make_tokenizer())


def write_saes(home: Path) -> World:
    """`local/tiny`: an SAE for every layer of a tiny model."""
    folder = home / "tiny"
    folder.mkdir(parents=True)
    settings = planted.settings(d_model=D_MODEL, d_sae=D_SAE, k=K, num_layers=N_LAYERS)
    (folder / "config.json").write_text(json.dumps(settings))
    found = World()
    found.home = home
    for layer in range(N_LAYERS):
        weights = planted.tensors(seed=layer, d_model=D_MODEL, d_sae=D_SAE, b_dec=0.3)
        weights["W_dec"] = weights["W_dec"] * torch.linspace(0.5, 2, D_SAE)  # not of length one
        torch.save(weights, folder / f"layer{layer}.sae.pt")
        found[layer] = weights
    return found


def steered_token(x: Tensor, edits: Sequence[Edit], weights: Weights) -> Tensor:
    """The residual of one token after the edits of one layer. `[d] -> [d]`, float64"""
    x = x.double()
    codes = planted.model_card_encode(weights, x[None], K)[0]
    taken = [e for e in edits if e.op == "project_out"]
    change = torch.zeros_like(x)
    for edit in edits:
        d = weights["W_dec"][:, edit.ref.feature].double()
        a = float(codes[edit.ref.feature])
        v = edit.strength or 0.0
        if edit.unit == "typical":
            v *= edit.typical or float("nan")
        if edit.unit == "norm":
            v *= float(x.norm() / d.norm())
        if edit.op == "add":
            change += v * d
        elif edit.op in ("set", "clamp"):
            change += (v - a) * d
        elif edit.op == "scale":
            change += (v * a - a) * d
        elif edit.op == "ablate":
            change -= a * d
        elif edit.op == "floor":
            change += (max(a, v) - a) * d
        elif edit.op == "cap":
            change += (min(a, v) - a) * d
    if taken:
        span = torch.stack([weights["W_dec"][:, e.ref.feature].double() for e in taken], dim=1)
        change -= span @ torch.linalg.lstsq(span, x[:, None]).solution[:, 0]
    return x + change


def run(
    model: Any,
    rows: Sequence[Sequence[int]],
    edits: Sequence[Edit],
    by_layer: dict[int, Weights],
    chosen: Chosen,
) -> list[Tensor]:
    """Logits of every row, run alone, without cache or pads, on a float64 model."""
    results = []
    for row, ids in enumerate(rows):

        def hook(layer: int, row: int, module: Any, args: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            new = x.clone()
            for at in range(x.shape[1]):
                mine = [e for e in edits if e.ref.layer == layer and chosen(e, row, at)]
                if mine:
                    new[0, at] = steered_token(x[0, at], mine, by_layer[layer])
            return (new, *output[1:]) if isinstance(output, tuple) else new

        layers = sorted({edit.ref.layer for edit in edits})
        handles = [
            decoder_layers(model)[n].register_forward_hook(
                lambda m, a, o, n=n, row=row: hook(n, row, m, a, o)
            )
            for n in layers
        ]
        try:
            with torch.no_grad():
                results.append(model(torch.tensor([list(ids)]), use_cache=False).logits[0])
        finally:
            for handle in handles:
                handle.remove()
    return results


def generate(
    model: Any,
    rows: Sequence[Sequence[int]],
    edits: Sequence[Edit],
    by_layer: dict[int, Weights],
    chosen: Chosen,
    new: int,
) -> list[list[int]]:
    """Greedy continuations, every step from the start."""
    texts = [list(ids) for ids in rows]
    for _ in range(new):
        for ids, logits in zip(texts, run(model, texts, edits, by_layer, chosen), strict=True):
            ids.append(int(logits[-1].argmax()))
    return [ids[len(row) :] for ids, row in zip(texts, rows, strict=True)]
