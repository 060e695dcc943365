"""How well SAEs fit a model: unexplained variance, and the loss with reconstructions spliced in.

One pass of the model reads all layers. Then each layer gets one pass with the SAE's reconstruction
in place of the residual, and one with zeros. First tokens, extreme-norm tokens and pads keep their
residual in both, because SAEs are not trained on them. `transfer.py` compares models and SAEs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_scope_lens.errors import TooLittleData, WrongModel
from qwen_scope_lens.models.architecture import (
    Model,
    context_length,
    d_model,
    decoder_layers,
    describe,
    input_device,
    unwrap,
)
from qwen_scope_lens.models.eager import eagerly
from qwen_scope_lens.models.residuals import EXTREME_NORM_RATIO
from qwen_scope_lens.models.tokenize import Content, encode, find_tokenizer
from qwen_scope_lens.saes.layer_sae import LayerSAE

__all__ = ["Fidelity", "fidelity"]

TOKEN_BUDGET = 4096


@dataclass(frozen=True)
class Fidelity:
    """The figures of one SAE on one model."""

    layer: int
    tokens: int  # tokens that were reconstructed
    fvu: float  # fraction of variance unexplained; 0 is perfect, 1 is as bad as the mean
    l0: float  # active features per token
    loss: float | None = None  # nats per token of the unchanged model
    spliced: float | None = None  # the loss with reconstructions in place of residuals
    zeroed: float | None = None  # the loss with zeros in place of residuals

    @property
    def recovered(self) -> float | None:
        """1 if the SAE costs no loss, 0 if it is as bad as zeros; None if zeros cost nothing."""
        if self.loss is None or self.spliced is None or self.zeroed is None:
            return None
        cost = self.zeroed - self.loss
        return (self.zeroed - self.spliced) / cost if cost > 1e-6 else None


@torch.no_grad()
def fidelity(
    model: Model,
    saes: Mapping[int, LayerSAE],
    texts: Sequence[Content],
    *,
    losses: bool = True,
    tokenizer: Any = None,
    max_tokens: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    extreme_norm_ratio: float = EXTREME_NORM_RATIO,
    progress: Callable[[int], Any] | None = None,
    **encode_options: Any,
) -> dict[int, Fidelity]:
    """Measure `{layer: SAE}` on documents truncated to `max_tokens`: `{layer: Fidelity}`."""
    for layer, sae in saes.items():
        if sae.cfg.d_in != d_model(model):
            raise WrongModel(
                f"{describe(model)} has residuals of width {d_model(model)}, the SAE of layer"
                f" {layer} reads {sae.cfg.d_in}: it was made for another model"
            )
    limit = min(context_length(model), max_tokens or context_length(model))
    tokenizer = find_tokenizer(model, tokenizer)
    encoded = encode(texts, tokenizer, limit=limit, truncate=True, **encode_options)
    rows = sorted((document.ids for document in encoded if len(document) > 1), key=len)
    if not rows:
        raise TooLittleData("no text has two tokens: expected one that can be predicted")
    sums = {layer: _Sums() for layer in saes}
    clean, predicted, ratio = 0.0, 0, extreme_norm_ratio
    for ids, mask in _batches(rows, token_budget, input_device(model)):
        found: dict[int, Tensor] = {}
        with _hooks(model, {layer: _reader(found, layer) for layer in saes}):
            logits = _logits(model, ids, mask)
        clean += _loss(logits, ids, mask) if losses else 0.0
        predicted += int(mask[:, 1:].sum())
        for layer, sae in saes.items():
            sums[layer].add(sae, found[layer][_kept(found[layer], mask, ratio)])
        for layer, sae in saes.items() if losses else ():
            changes = {"spliced": _splice(sae, mask, ratio), "zeroed": _zero(mask, ratio)}
            for name, change in changes.items():
                with _hooks(model, {layer: change}):
                    loss = _loss(_logits(model, ids, mask), ids, mask)
                setattr(sums[layer], name, getattr(sums[layer], name) + loss)
        if progress is not None:
            progress(len(ids))
    return {layer: found_.result(layer, clean, predicted, losses) for layer, found_ in sums.items()}


class _Sums:
    def __init__(self) -> None:
        self.n, self.active, self.error, self.square = 0, 0, 0.0, 0.0
        self.total: Tensor | None = None
        self.spliced = self.zeroed = 0.0

    def add(self, sae: LayerSAE, x: Tensor) -> None:
        x = x.float()
        codes = sae.encode_sparse(x.to(sae.W_enc.device))
        out = sae.decode_sparse(codes).to(x.device, torch.float32)
        self.n += len(x)
        self.active += int(codes.l0.sum())
        self.error += float((out - x).double().pow(2).sum())
        self.square += float(x.double().pow(2).sum())
        total = x.double().sum(0)
        self.total = total if self.total is None else self.total + total

    def result(self, layer: int, clean: float, predicted: int, losses: bool) -> Fidelity:
        if not self.n or self.total is None:
            raise TooLittleData("every token is a first token or of extreme norm")
        variance = self.square - float(self.total.pow(2).sum()) / self.n
        fvu = self.error / variance if variance > 0 else math.nan
        per_token = (
            (clean / predicted, self.spliced / predicted, self.zeroed / predicted)
            if losses
            else (None, None, None)
        )
        return Fidelity(layer, self.n, fvu, self.active / self.n, *per_token)


def _kept(x: Tensor, mask: Tensor, ratio: float) -> Tensor:
    """`[b, t, d] -> bool [b, t]`: no pad, not first, not of extreme norm, as `capture` decides."""
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    later = mask.to(x.device).clone()
    later[:, 0] = False
    median = norms.masked_fill(~later, torch.nan).nanmedian(dim=1, keepdim=True).values
    return later & (norms <= ratio * median)


def _reader(found: dict[int, Tensor], layer: int) -> Callable[[Tensor], None]:
    def read(x: Tensor) -> None:
        found[layer] = x

    return read


def _splice(sae: LayerSAE, mask: Tensor, ratio: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        kept, out = _kept(x, mask, ratio), x.clone()
        rows = x[kept].float().to(sae.W_enc.device)
        out[kept] = sae.decode_sparse(sae.encode_sparse(rows)).to(x.device, x.dtype)
        return out

    return change


def _zero(mask: Tensor, ratio: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.masked_fill(_kept(x, mask, ratio).unsqueeze(-1), 0)


@contextlib.contextmanager
def _hooks(
    model: Model, changes: Mapping[int, Callable[[Tensor], Tensor | None]]
) -> Iterator[None]:
    """Inside the `with` block, the output of each layer goes through its function."""

    def hook(change: Callable[[Tensor], Tensor | None]) -> Any:
        def run(module: Any, args: Any, output: Any) -> Any:
            is_tuple = isinstance(output, tuple)
            new = change(output[0] if is_tuple else output)
            if new is None:
                return None
            return (new, *output[1:]) if is_tuple else new

        return run

    modules = decoder_layers(model)
    handles = [modules[n].register_forward_hook(hook(change)) for n, change in changes.items()]
    try:
        with eagerly():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _logits(model: Model, ids: Tensor, mask: Tensor) -> Tensor:
    out = unwrap(model)(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    return out.logits if hasattr(out, "logits") else out[0]


def _loss(logits: Tensor, ids: Tensor, mask: Tensor) -> float:
    """The loss in nats, summed over the predicted tokens."""
    real = mask[:, 1:]
    return float(
        torch.nn.functional.cross_entropy(
            logits[:, :-1][real].float(), ids[:, 1:][real], reduction="sum"
        )
    )


def _batches(
    rows: Sequence[Sequence[int]], budget: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and mask `[b, t]`, padded on the right, from rows that are sorted by length."""
    start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and (end + 1 - start) * len(rows[end]) <= budget:
            end += 1
        longest = len(rows[end - 1])
        ids = torch.zeros(end - start, longest, dtype=torch.long)
        mask = torch.zeros(end - start, longest, dtype=torch.bool)
        for at, row in enumerate(rows[start:end]):
            ids[at, : len(row)], mask[at, : len(row)] = torch.tensor(row), True
        yield ids.to(device), mask.to(device)
        start = end
