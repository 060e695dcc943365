"""A model frozen at one text: it runs from the residual after one layer to that after a later one.

Layers below the start are skipped, so a run of many rows through one layer costs that layer only.
What is *held* keeps the value that it has on the text: the scale of each norm on the residual
stream, and what decides where attention looks. In layers of linear attention these are queries,
keys, decay and write strength; in the others, queries and keys.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qwen_scope_lens.errors import BadText, WrongModel
from qwen_scope_lens.models.architecture import (
    Model,
    context_length,
    decoder_layers,
    describe,
    input_device,
    part,
    places_of,
    text_config,
    unwrap,
)
from qwen_scope_lens.models.eager import eagerly

__all__ = ["EMBEDDINGS", "HOLDS", "Frozen", "frozen"]

HOLDS = ("norms", "attention")
EMBEDDINGS = -1
"""The number that stands for the embeddings, as the layer before layer 0."""

Change = Callable[[Tensor], Tensor]


class _Enough(Exception):
    """Ends a forward pass after the last wanted layer."""


class Frozen:
    """A model at one text of T tokens. Made by `frozen`, and of use inside its block only.

    `residuals[layer]` is the residual `[T, d_model]` after a layer, at `EMBEDDINGS` the embeddings;
    `logits [vocabulary]` are those after the last token.
    """

    def __init__(self, model: Model, ids: Sequence[int], layers: Collection[int]) -> None:
        self.model, self.ids = model, list(ids)
        self.layers = decoder_layers(model)
        self.residuals: dict[int, Tensor] = {}
        self.held: dict[nn.Module, Tensor] = {}
        self.recording = True
        self._thread = threading.get_ident()
        self._wanted = sorted({EMBEDDINGS, *layers})

    @property
    def length(self) -> int:
        return len(self.ids)

    @torch.no_grad()
    def record(self) -> None:
        """One pass as the model runs by itself: residuals, logits, and what is to be held."""

        def keep(layer: int) -> Change:
            def read(x: Tensor) -> Tensor:
                self.residuals[layer] = x[0].detach()
                return x

            return read

        self.recording = True
        try:
            logits = self._pass(1, {layer: keep(layer) for layer in self._wanted})
        finally:
            self.recording = False
        assert logits is not None
        self.logits = logits[0].detach()

    def run(self, start: int, stop: int | None, x: Tensor) -> Tensor:
        """From the residual `x [rows, T, d_model]` after layer `start` to that after `stop`.

        Without `stop`, the result is the logits after the last token, `[rows, vocabulary]`.
        """
        found: list[Tensor] = []

        def end(after: Tensor) -> Tensor:
            found.append(after)
            raise _Enough

        changes: dict[int, Change] = {start: lambda _: x}
        if stop is not None:
            changes[stop] = end
        with self._without(range(start + 1)):
            logits = self._pass(len(x), changes)
        out = logits if stop is None else found[0]
        assert out is not None
        return out

    def edited(self, rows: int, changes: Mapping[int, Change]) -> Tensor:
        """The logits `[rows, vocabulary]` after the last token, with residuals changed on the way.

        `changes[layer]` takes the residuals `[rows, T, d_model]` and gives others.
        """
        logits = self._pass(rows, changes)
        assert logits is not None
        return logits

    def bytes_per_row(self, start: int, stop: int | None) -> int:
        """What autograd keeps of one row between two layers, measured on a run of one row."""
        seen: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in unwrap(self.model).parameters()}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # else an address could be used twice
            return tensor

        kept: list[Tensor] = []
        x = self.residuals[start][None].clone().requires_grad_()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            self.run(start, stop, x)
        return sum(seen.values()) + x.nbytes

    def _pass(self, rows: int, changes: Mapping[int, Change]) -> Tensor | None:
        """One pass of `rows` copies of the text; None where a change ended it."""
        inner, device = unwrap(self.model), input_device(self.model)
        ids = torch.tensor([self.ids], device=device).expand(rows, -1)
        with ExitStack() as stack:
            stack.enter_context(eagerly())
            for layer, change in changes.items():
                place = self._place(layer)
                handle = place.register_forward_hook(self._hook(change))
                stack.callback(handle.remove)
            try:
                out = inner(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    use_cache=False,
                    logits_to_keep=1,
                )
            except _Enough:
                return None
        logits: Tensor = out.logits[:, -1]
        return logits

    def _place(self, layer: int) -> nn.Module:
        if layer == EMBEDDINGS:
            return part(self.model, places_of(self.model).embed)
        return self.layers[layer]

    def _hook(self, change: Change) -> Callable[[nn.Module, Any, Any], Any]:
        def act(module: nn.Module, args: Any, output: Any) -> Any:
            if threading.get_ident() != self._thread:
                return None  # another thread's run of the same model
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        return act

    @contextmanager
    def _without(self, numbers: range) -> Iterator[None]:
        """These layers hand on their input; whatever they would write is replaced afterwards."""
        own = {number: vars(self.layers[number]).get("forward") for number in numbers}

        def skipping(forward: Callable[..., Any]) -> Callable[..., Any]:
            def skip(x: Tensor, *args: Any, **kwargs: Any) -> Any:
                return x if threading.get_ident() == self._thread else forward(x, *args, **kwargs)

            return skip

        try:
            for number in numbers:
                layer = self.layers[number]
                vars(layer)["forward"] = skipping(layer.forward)
            yield
        finally:
            for number, forward in own.items():
                vars(self.layers[number]).pop("forward", None)
                if forward is not None:
                    vars(self.layers[number])["forward"] = forward


@contextmanager
def frozen(
    model: Model, ids: Sequence[int], layers: Collection[int], hold: Collection[str] = ("norms",)
) -> Iterator[Frozen]:
    """A model at one text, recorded. Afterwards, the model is as it was.

    `layers` are those whose residuals are kept. Of `hold`, see `HOLDS`: without "norms" an RMSNorm
    cancels what its input says along itself, and edges into the logits sum to nearly nothing.
    """
    if unknown := set(hold) - set(HOLDS):
        raise BadText(f"hold {sorted(unknown)}: expected some of {', '.join(HOLDS)}")
    inner = unwrap(model)
    if inner.training:
        raise WrongModel(f"{describe(model)} is in training mode: call model.eval() first")
    if places_of(model).head is None:
        raise WrongModel(
            f"{describe(model)} has no unembedding: load the class for causal language models"
        )
    limit, vocabulary = context_length(model), int(text_config(model).vocab_size)
    if not 1 <= len(ids) <= limit or not all(0 <= one < vocabulary for one in ids):
        raise BadText(
            f"{len(ids)} token ids: expected 1 to {limit}, each from 0 to {vocabulary - 1}"
        )
    one = Frozen(model, ids, layers)
    trained = [p for p in inner.parameters() if p.requires_grad]
    with ExitStack() as stack:
        for parameter in trained:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        if "norms" in hold:
            _hold_norms(one, stack)
        if "attention" in hold:
            _hold_attention(one, stack)
        one.record()
        yield one


def _hold_norms(one: Frozen, stack: ExitStack) -> None:
    """Each norm of the residual stream multiplies by its scale on the text."""
    eps = float(text_config(one.model).rms_norm_eps)
    norms = [part(one.model, places_of(one.model).norm)]
    for layer in one.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm: nn.Module = getattr(layer, name)
            norms.append(norm)
    for norm in norms:
        weight = next(norm.parameters())
        with torch.no_grad():  # families store the weight in different ways, this asks for it
            probe = torch.ones(1, weight.shape[-1], dtype=weight.dtype, device=weight.device)
            gain = norm(probe)[0] * (1 + eps) ** 0.5

        def act(module: nn.Module, args: Any, output: Tensor, gain: Tensor = gain) -> Any:
            if threading.get_ident() != one._thread:
                return None
            x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
            if one.recording:
                one.held[module] = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
                return None
            return (x * one.held[module] * gain.to(x)).to(output.dtype)

        stack.callback(norm.register_forward_hook(act).remove)


def _hold_attention(one: Frozen, stack: ExitStack) -> None:
    """What decides where a token looks is that of the text; what it reads there stays free."""
    for number, layer in enumerate(one.layers):
        held: list[tuple[nn.Module, int | None]] = []
        if (attention := getattr(layer, "self_attn", None)) is not None:
            for name in "qk":
                norm = getattr(attention, f"{name}_norm", None)
                held.append((norm or getattr(attention, f"{name}_proj"), None))
        elif (linear := getattr(layer, "linear_attn", None)) is not None:
            held = [(linear.in_proj_qkv, 2 * linear.key_dim)]
            held += [(linear.in_proj_b, None), (linear.in_proj_a, None)]
        else:
            raise WrongModel(
                f"layer {number} of {describe(one.model)} has an attention of a kind that cannot be"
                " held here: leave attention out of hold"
            )
        for module, width in held:

            def act(module: nn.Module, args: Any, output: Tensor, width: int | None = width) -> Any:
                if threading.get_ident() != one._thread:
                    return None
                if one.recording:
                    one.held[module] = output.detach()[..., :width]
                    return None
                kept = one.held[module].expand(len(output), *output.shape[1:-1], -1)
                return kept if width is None else torch.cat([kept, output[..., width:]], -1)

            stack.callback(module.register_forward_hook(act).remove)
