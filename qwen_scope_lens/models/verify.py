"""Verify that an SAE belongs to a model.

This module checks that the hook reads the output of the right module, that the widths agree, and
what the names say about model and SAE. Then `saes/verify.py` measures how well the SAE reconstructs
the residuals of a small bundled sample (or of given texts).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwen_scope_lens.catalog import BACKBONES, name_of_model
from qwen_scope_lens.errors import BadText, UnknownHook, VerificationFailed, WrongModel
from qwen_scope_lens.models.architecture import (
    Model,
    check_layer,
    d_model,
    decoder_layers,
    describe,
    is_quantised,
)
from qwen_scope_lens.models.checkpoint import Tokenizer
from qwen_scope_lens.models.residuals import capture
from qwen_scope_lens.models.tokenize import Content, find_tokenizer
from qwen_scope_lens.saes.verify import Verification, unexplained, verify

if TYPE_CHECKING:
    from qwen_scope_lens.saes.verify import TopK

__all__ = ["ModelCheck", "check_width", "hook_difference", "sample_texts", "verify_model"]

BETTER = 0.01
"""How much better a neighbouring layer must fit to count, as FVU and as a share of the FVU."""


@dataclass(frozen=True)
class ModelCheck:
    """The result of `verify_model`. `str()` of it is the report."""

    model: str
    sae_model: str | None  # the model of the SAE, by its own metadata
    layer: int
    hook_name: str
    d_model: int
    hook_difference: float  # the largest |hook - layer output|; 0 if the right module is hooked
    tokens: int
    left_out: int  # how many of them are first or extreme-norm tokens
    notes: tuple[str, ...]
    verification: Verification
    neighbours: dict[int, float]  # FVU of the SAE on the residuals of the layers before and after

    def __str__(self) -> str:
        lines = [
            f"model {self.model}, SAE of {self.sae_model or 'an unnamed model'}",
            f"  {self.hook_name} is the output of decoder layer {self.layer}"
            f" (largest difference {self.hook_difference:g}), d_model {self.d_model} on both sides",
            f"  {self.tokens:,} tokens read, {self.left_out:,} first or extreme-norm ones left out",
            *(f"  NOTE: {note}" for note in self.notes),
            str(self.verification),
            "  the same SAE on the neighbouring layers: "
            + ", ".join(f"FVU {fvu:.4f} on layer {n}" for n, fvu in self.neighbours.items()),
        ]
        return "\n".join(lines)


def verify_model(
    model: Model,
    sae: TopK,
    texts: Sequence[Content] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    token_budget: int = 4096,
    **thresholds: Any,
) -> ModelCheck:
    """Run a sample through model and SAE, and raise when they do not belong together.

    `thresholds` (such as `max_fvu`) go to `saes.verify.verify`, which raises `VerificationFailed`
    with the whole report. If the SAE is of a base model and this is an instruct or quantised
    version, the report notes it; the threshold is the same. First and extreme-norm tokens are left
    out. The SAE must fit its own layer better than the layers before and after.
    """
    layer, hook_name = _layer_of(sae)
    check_layer(model, layer)
    check_width(model, sae)
    tokenizer = find_tokenizer(model, tokenizer)
    texts = sample_texts() if texts is None else texts
    if len(texts) == 0:
        raise BadText("no text was given: expected some, or None for the bundled sample")
    difference = hook_difference(model, layer, texts[0], tokenizer)
    if difference != 0.0:
        raise WrongModel(
            f"{hook_name} differs from the output of decoder layer {layer} by up to"
            f" {difference:g}: a hook or an SAE is active, or the bridge hooks another module"
        )
    notes = _notes(model, sae)
    around = [n for n in (layer - 1, layer, layer + 1) if 0 <= n < len(decoder_layers(model))]
    found = capture(
        model, texts, around, tokenizer=tokenizer, token_budget=token_budget, truncate=True
    )
    keep = found.keep(layer)
    try:
        result = verify(sae, found.residuals[layer], mask=keep, **thresholds)
        neighbours = {
            n: unexplained(sae, found.residuals[n], mask=keep & found.keep(n))
            for n in around
            if n != layer
        }
        _require_nearest(layer, result, neighbours)
    except VerificationFailed as error:
        said = "".join(f"\n  NOTE: {note}" for note in notes)
        raise VerificationFailed(f"{describe(model)}: {error}{said}") from error
    return ModelCheck(
        model=name_of_model(describe(model)),
        sae_model=sae.cfg.metadata.model_name,
        layer=layer,
        hook_name=hook_name,
        d_model=d_model(model),
        hook_difference=difference,
        tokens=found.n_tokens,
        left_out=int((~keep).sum()),
        notes=notes,
        verification=result,
        neighbours=neighbours,
    )


def _require_nearest(layer: int, own: Verification, neighbours: dict[int, float]) -> None:
    """Neighbouring layers resemble each other: only the comparison tells them apart."""
    fvu = own.fvu[own.convention]
    for other, theirs in neighbours.items():
        if theirs < fvu - max(BETTER, BETTER * fvu):
            problem = (
                f"the SAE fits the residuals of layer {other} better (FVU {theirs:.4f}) than those"
                f" of layer {layer} ({fvu:.4f}): is the layer counted from 0, and is it the output"
                " of the decoder layer?"
            )
            raise VerificationFailed(str(replace(own, problems=(*own.problems, problem))))


def sample_texts() -> list[str]:
    """The bundled sample: prose in ten languages, code, data and arithmetic."""
    text = files("qwen_scope_lens.models").joinpath("sample.txt").read_text(encoding="utf-8")
    return [part.strip("\n") for part in text.split("\n%%\n")]


def check_width(model: Model, sae: TopK) -> None:
    """Raise when the SAE reads vectors of another width than that of the residuals."""
    if sae.cfg.d_in != d_model(model):
        raise WrongModel(
            f"the SAE reads d_in={sae.cfg.d_in}, the residual of {describe(model)} has d_model="
            f"{d_model(model)}: it was trained on another model ({sae.cfg.metadata.model_name})"
        )


@torch.no_grad()
def hook_difference(
    model: Model, layer: int, text: Content, tokenizer: Tokenizer | None = None
) -> float:
    """The largest difference between the named hook and the output of HF's own layer.

    It is 0.0 when all is right. On a bridge the hook point is compared, and on both kinds of model
    the residuals that `capture` reads.
    """
    seen: list[Tensor] = []
    module: nn.Module = decoder_layers(model)[layer]
    while isinstance(inner := getattr(module, "original_component", None), nn.Module):
        module = inner  # HF's own layer inside that of a bridge

    def look(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooked: list[Tensor] = []
    with ExitStack() as handles:
        handles.callback(module.register_forward_hook(look).remove)
        if "original_model" in vars(model):  # a TransformerBridge
            point: nn.Module = model.blocks[layer].hook_out  # type: ignore[index, union-attr]
            handles.callback(
                point.register_forward_hook(lambda m, a, out: hooked.append(out)).remove
            )
        read = capture(model, [text], [layer], tokenizer=tokenizer, truncate=True)
    values = [read.residuals[layer], *(x.flatten(0, -2) for x in hooked)]
    truth = seen[0].flatten(0, -2)
    return max(float((x - truth.to(x.device)).abs().max()) for x in values)


def _layer_of(sae: TopK) -> tuple[int, str]:
    name = sae.cfg.metadata.hook_name or ""
    found = re.fullmatch(r"blocks\.(\d+)\.(?:hook_resid_post|hook_out)", name)
    if found is None:
        raise UnknownHook(
            f"the SAE reads {name or 'no named hook'}: expected blocks.LAYER.hook_resid_post, which"
            " Qwen-Scope SAEs read. Only that can be verified"
        )
    return int(found[1]), name


def _notes(model: Model, sae: TopK) -> tuple[str, ...]:
    """Notes on the names and the weights: another model, an instruct version, quantised weights."""
    notes = []
    mine, trained_on = describe(model), sae.cfg.metadata.model_name
    if trained_on is None:
        notes.append("the SAE does not say on which model it was trained")
    elif _short(mine) != _short(trained_on):
        row = next((b for b in BACKBONES if b.key == _short(trained_on)), None)
        tuned = row is not None and row.tuning == "base" and _short(mine) + "-base" == row.key
        notes.append(
            f"the SAE was trained on {trained_on}, this is {mine}"
            + (", its instruct version" if tuned else "")
            + ": features may fire on other things, see the FVU"
        )
    if is_quantised(model):
        notes.append("the model's weights are quantised, the SAE was trained on unquantised ones")
    return tuple(notes)


def _short(name: str) -> str:
    return name.rstrip("/").split("/")[-1].lower()
