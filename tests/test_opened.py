"""`open_sae` and `open_model` give what `load_sae` and `load_model` give, without SAELens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from tiny_models import make_tokenizer

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import (
    BadPlan,
    LayerOutOfRange,
    NotFinite,
    UnknownName,
    WrongModel,
    WrongShape,
    WrongTokenizer,
)
from qwen_scope_lens.models import open_model
from qwen_scope_lens.models.tokenize import find_tokenizer
from qwen_scope_lens.saes import LayerSAE, Membership, SparseCodes, open_sae, verify
from qwen_scope_lens.steering.plan import Edit
from qwen_scope_lens.steering.readers import layer_edits

GROUP, TEXT = "mini-qwen3/w1k-l0-16", "The kernel reads a file. 内核读取文件。"


@pytest.fixture(params=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest, home: Path) -> tuple[LayerSAE, qsl.ScopeSAE]:
    name = "local/mine/1"
    return open_sae(name, dtype=request.param), qsl.load_sae(name, dtype=request.param)


@pytest.fixture
def x() -> torch.Tensor:
    return planted.activations(planted.tensors(seed=1))[:300]


ANSWERS: tuple[Callable[[LayerSAE, torch.Tensor], Any], ...] = (
    lambda sae, x: sae.encode_sparse(x),
    lambda sae, x: sae.encode_sparse(x.reshape(2, -1, x.shape[1])),
    lambda sae, x: sae.decode_sparse(sae.encode_sparse(x)),
    lambda sae, x: sae(x),
    lambda sae, x: sae.pre_activations(x, [3, 5]),
    lambda sae, x: sae.direction([3, 5]),
    lambda sae, x: sae.encoder_row(7),
    lambda sae, x: sae.decoder_norms(),
    lambda sae, x: sae.prepare(half_copy=True).encode_sparse(x),
    lambda sae, x: copy.deepcopy(sae).to(torch.float16).encode_sparse(x),
    lambda sae, x: copy.deepcopy(sae).half().encode_sparse(x),
    lambda sae, x: copy.deepcopy(sae).bfloat16().dtype,
    lambda sae, x: torch.func.vmap(lambda row: sae.encode_sparse(row).values)(x),
    lambda sae, x: torch.func.grad(lambda row: sae(row).float().sum())(x[0]),
    lambda sae, x: Membership(sae, [1, 2, 3]).values(x),
    lambda sae, x: (sae.cfg.dtype, sae.cfg.device, sae.cfg.k, sae.dtype, sae.device),
    lambda sae, x: str(verify(sae, x, max_fvu=9)),
)


@pytest.mark.parametrize("answer", ANSWERS)
def test_both_kinds_give_the_same_bits(
    answer: Callable[..., Any], pair: tuple[LayerSAE, qsl.ScopeSAE], x: torch.Tensor
) -> None:
    opened, loaded = (answer(sae, x) for sae in pair)
    if isinstance(opened, SparseCodes):
        assert torch.equal(opened.indices, loaded.indices)
        opened, loaded = opened.values, loaded.values
    if isinstance(opened, torch.Tensor):
        assert torch.equal(opened, loaded)
    else:
        assert str(opened) == str(loaded)


def test_both_kinds_can_be_trained(
    pair: tuple[LayerSAE, qsl.ScopeSAE], x: torch.Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    found: list[list[torch.Tensor]] = []
    for sae in pair:
        one = copy.deepcopy(sae).requires_grad_(True)
        wants = x[:4].clone().requires_grad_()
        one(wants).float().square().sum().backward()
        weights = (wants, one.W_enc, one.b_enc, one.W_dec, one.b_dec)
        found.append([weight.grad for weight in weights if weight.grad is not None])
        sae.encode_sparse(wants).values.sum().backward()
    assert [len(grads) for grads in found] == [5, 5]
    for grad, wanted in zip(*found, strict=True):
        tolerance = 1e-5 if grad.dtype == pair[0].dtype == torch.float32 else 0.1
        assert bool(wanted.any())
        assert torch.allclose(grad, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max())
    assert not recwarn.list


WRONG: tuple[tuple[type[Exception], Callable[[LayerSAE, torch.Tensor], Any]], ...] = (
    (WrongShape, lambda sae, x: sae.encode_sparse(x[:, 1:])),
    (NotFinite, lambda sae, x: sae.encode_sparse(x / 0)),
    (LayerOutOfRange, lambda sae, x: sae.direction(planted.D_SAE)),
    (LayerOutOfRange, lambda sae, x: sae.pre_activations(x, [True])),
    (ValueError, lambda sae, x: sae.decode_sparse(SparseCodes.from_dense(x, 2))),
)


@pytest.mark.parametrize(("error", "ask"), WRONG)
def test_both_kinds_refuse_the_same(
    error: type[Exception],
    ask: Callable[..., Any],
    pair: tuple[LayerSAE, qsl.ScopeSAE],
    x: torch.Tensor,
) -> None:
    said = []
    for sae in pair:
        with pytest.raises(error) as raised:
            ask(sae, x)
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_a_change_of_the_weights_is_seen(
    pair: tuple[LayerSAE, qsl.ScopeSAE], x: torch.Tensor
) -> None:
    for sae in pair:
        sae.encode_sparse(x)
        with torch.no_grad():
            sae.W_enc.mul_(2)
    one, two = (sae.encode_sparse(x) for sae in pair)
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.indices, two.indices)
    with torch.no_grad():
        pair[0].W_enc[0, 3] = float("nan")
    with pytest.raises(NotFinite, match=r"1 of .* features: 3"):
        pair[0].encode_sparse(x)


def test_weights_of_inference_mode_are_ordinary_ones(home: Path) -> None:
    with torch.inference_mode():
        sae = open_sae("local/mine/1")
        moved = open_sae("local/mine/1").to(torch.bfloat16)
    assert not sae.W_enc.is_inference()
    assert not moved.W_enc.is_inference()
    assert moved.cfg.dtype == "bfloat16"
    assert not sae.W_enc.requires_grad


def test_a_plan_takes_either_kind(home: Path, x: torch.Tensor) -> None:
    edits = [Edit("local/mine/1/3", "set", 2.0), Edit("local/mine/1/5", "ablate")]
    everywhere = torch.ones(len(x), 2, dtype=torch.bool)
    both = open_sae("local/mine/1"), qsl.load_sae("local/mine/1")
    changed = [layer_edits(edits, given).change(x, everywhere)[0] for given in (None, *both)]
    assert torch.equal(changed[0], changed[1])
    assert torch.equal(changed[0], changed[2])
    said = []
    for sae in (open_sae("local/mine/2"), qsl.load_sae("local/mine/2")):
        with pytest.raises(BadPlan, match="is another one") as raised:
            layer_edits(edits, {"local/mine/1": sae})
        said.append(str(raised.value))
    assert said[0] == said[1]
    with pytest.raises(BadPlan, match="found Linear"):
        layer_edits(edits, [torch.nn.Linear(2, 2)])  # type: ignore[list-item]


@pytest.fixture(scope="module")
def models() -> tuple[Any, qsl.models.ScopeBridge]:
    return open_model("mini-qwen3"), qsl.load_model("mini-qwen3")


def test_read_takes_either_kind(models: tuple[Any, Any]) -> None:
    shown = []
    for model in models:
        for load in (open_sae, qsl.load_sae):
            reading = qsl.read(TEXT, [load(f"{GROUP}/6")], model=model)
            shown.append(str(reading.table()))
            sae = load(f"{GROUP}/6")
            sae.cfg.metadata.qwen_scope_ref = None
            with pytest.raises(UnknownName, match="does not say which SAE it is"):
                qsl.read(TEXT, [sae], model=model)
    assert len(set(shown)) == 1
    assert "kernel" in shown[0]


def test_an_opened_model_is_the_one_inside_a_bridge(models: tuple[Any, Any]) -> None:
    model, bridge = models
    ids = bridge.to_tokens(TEXT)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, bridge(ids))
    assert type(model) is type(bridge.original_model)
    assert not model.training
    assert find_tokenizer(model)(TEXT).input_ids == ids[0].tolist()
    short = open_model("mini-qwen3", up_to_layer=2)
    assert len(qsl.models.decoder_layers(short)) == 3
    assert short.up_to_layer == 2
    assert torch.equal(
        qsl.capture(short, [TEXT], [2]).residuals[2], qsl.capture(bridge, [TEXT], [2]).residuals[2]
    )
    with pytest.raises(WrongTokenizer, match="belongs to another model"):
        open_model("mini-qwen3", tokenizer=make_tokenizer())


def test_a_bridge_wants_an_sae_with_hook_points(models: tuple[Any, Any]) -> None:
    with pytest.raises(WrongModel, match=r"found LayerSAE: load it with load_sae\(\)"):
        models[1].add_sae(open_sae(f"{GROUP}/6"))
