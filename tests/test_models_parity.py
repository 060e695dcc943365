"""Bridge and capture against plain HF: the same numbers, for every class.

Bit-equal wherever the same kernels run on the same shapes. Left-padded Qwen3 is compared with the
positions that HF's own `generate` derives from the mask, which the bridge uses too.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import CLASSES, N_LAYERS, make_model, make_tokenizer
from torch import Tensor

from qwen_scope_lens.models import capture, decoder_layers, load_model

TEXTS = ["hi there", "x", "ein längerer Satz"]
HOOKS = [f"blocks.{n}.hook_resid_post" for n in range(N_LAYERS)]
no_grad = torch.no_grad()


@pytest.fixture(params=CLASSES)
def kind(request: Any) -> str:
    return str(request.param)


def plain_forward(model: Any, **inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits and the output of every decoder layer, by plain torch hooks."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda m, a, out: seen.append(out))
        for layer in decoder_layers(model)
    ]
    logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return logits, seen


@no_grad
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_logits_and_residuals_equal_plain_hf(kind: str, dtype: torch.dtype, side: str) -> None:
    model = make_model(kind, dtype)
    bridge = load_model(copy.deepcopy(model), tokenizer=make_tokenizer())
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left" if side == "left" else "right"
    texts = TEXTS[:1] if side == "none" else TEXTS
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    mask = inputs["attention_mask"]
    theirs: dict[str, Any] = {}
    if side == "left" and "3_5" not in kind:
        theirs["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        # A row is given derived positions only where its mask moves a token.
        full = mask.all(dim=1, keepdim=True)
        theirs["position_ids"] = torch.where(
            full, torch.arange(mask.shape[1]), theirs["position_ids"]
        )
    logits, residuals = plain_forward(model, **inputs, **theirs)

    got, cache = bridge.run_with_cache(inputs["input_ids"], attention_mask=mask, names_filter=HOOKS)
    real = mask.bool()
    assert torch.equal(got[real], logits[real])
    for name, truth in zip(HOOKS, residuals, strict=True):
        assert torch.equal(cache[name][real], truth[real]), name


@no_grad
def test_a_list_of_texts_is_masked(kind: str) -> None:
    model = make_model(kind)
    inputs = make_tokenizer()(TEXTS, return_tensors="pt", padding=True)
    truth = model(**inputs).logits
    bridge = load_model(model, tokenizer=make_tokenizer())
    assert torch.equal(bridge(TEXTS), truth)


@no_grad
def test_capture_equals_the_layers_of_the_same_batch(kind: str) -> None:
    model = make_model(kind)
    ordered = sorted(TEXTS, key=len, reverse=True)
    inputs = make_tokenizer()(ordered, return_tensors="pt", padding=True)
    _, residuals = plain_forward(model, **inputs)
    real = inputs["attention_mask"].bool()
    for holder in (model, load_model(model, tokenizer=make_tokenizer())):
        found = capture(holder, ordered, range(N_LAYERS), tokenizer=make_tokenizer())
        for layer, truth in enumerate(residuals):
            assert torch.equal(found.residuals[layer], truth[real])


@no_grad
def test_capture_does_not_depend_on_the_batch(kind: str) -> None:
    """Padding and neighbours change rounding only (other shapes use other kernels)."""
    model, tokenizer = make_model(kind), make_tokenizer()
    together = capture(model, TEXTS, [2], tokenizer=tokenizer)
    for i, text in enumerate(TEXTS):
        alone = capture(model, [text], [2], tokenizer=tokenizer)
        scale = float(alone.residuals[2].abs().max())
        torch.testing.assert_close(
            together.doc(i).residuals[2], alone.residuals[2], rtol=0, atol=2e-6 * scale
        )


def until_end(row: Tensor, start: int) -> list[int]:
    """The new tokens up to the first end token. The tokens that fill up after it differ."""
    tokens = row[start:].tolist()
    ends = [i for i, token in enumerate(tokens) if token in (256, 258)]
    return tokens[: ends[0] + 1] if ends else tokens


@no_grad
@pytest.mark.parametrize("edited", [False, True], ids=["plain", "edited"])
def test_cached_generation_equals_hf_greedy(kind: str, edited: bool) -> None:
    model, tokenizer = make_model(kind), make_tokenizer()
    bridge = load_model(copy.deepcopy(model), tokenizer=tokenizer)
    left = make_tokenizer()
    left.padding_side = "left"
    torch.manual_seed(5)
    push = torch.randn(32)
    fired: list[tuple[int, ...]] = []

    def steer(residual: Tensor, hook: Any) -> Tensor:
        fired.append(tuple(residual.shape))
        return residual + push

    if edited:
        decoder_layers(model)[1].register_forward_hook(lambda m, a, out: out + push)
    hooks = [("blocks.1.hook_resid_post", steer)] if edited else []
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    for texts in (["hi there"], ["hi there", "x"]):
        inputs = left(texts, return_tensors="pt", padding=True)
        truth = model.generate(**inputs, **options)
        with bridge.hooks(fwd_hooks=hooks):
            got = bridge.generate(texts, **options, return_type="tokens", verbose=False)
        start = inputs["input_ids"].shape[1]
        for mine, theirs in zip(got, truth, strict=True):
            assert until_end(mine, start) == until_end(theirs, start)
    if edited:  # at prefill and at every new token
        assert fired[0] == (1, 8, 32)
        assert (1, 1, 32) in fired


def test_gradients_equal_plain_hf(kind: str) -> None:
    model = make_model(kind)
    bridge = load_model(copy.deepcopy(model))
    ids = torch.arange(10)[None]
    for runs in (lambda: model(ids).logits, lambda: bridge(ids)):
        runs().float().logsumexp(-1).sum().backward()
    plain = dict(model.named_parameters())
    assert any(parameter.grad is not None for parameter in plain.values())
    for name, parameter in bridge.release().named_parameters():
        assert (parameter.grad is None) == (plain[name].grad is None)
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, plain[name].grad), name
