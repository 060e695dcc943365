"""Codes belong to the current weights, also when threads share an SAE or weights change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import NotFinite
from qwen_scope_lens.saes import Membership, ScopeSAE, ScopeSAEConfig
from qwen_scope_lens.saes.exact import certified, topk
from qwen_scope_lens.saes.exact.encoder import Encoder
from qwen_scope_lens.saes.exact.topk import encode_topk, exact_topk


def make(d_in: int = 24, d_sae: int = 96, k: int = 6) -> ScopeSAE:
    torch.manual_seed(0)
    return ScopeSAE(ScopeSAEConfig(d_in=d_in, d_sae=d_sae, k=k))


def check(sae: ScopeSAE, x: torch.Tensor) -> None:
    """Check that the codes are those of the current weights."""
    with torch.no_grad():
        want = exact_topk(x, sae.W_enc.T, sae.b_enc, sae.cfg.k)
        got = sae.encode_sparse(x)
    assert torch.equal(got.indices.sort(-1).values, want[1].sort(-1).values.int())
    torch.testing.assert_close(got.values, want[0], rtol=1e-4, atol=1e-4)


# Threads


def means(d: int, count: int) -> torch.Tensor:
    """Points far from zero, each in a direction that the weights of `blind` do not read."""
    return 3000 * torch.linalg.qr(torch.randn(d, count))[0].T


def blind(rows: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
    basis = far / 3000
    return rows - rows @ basis.T @ basis


@pytest.mark.parametrize("half_copy", [False, True])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_a_recentring_in_the_middle_of_an_encode(
    monkeypatch: pytest.MonkeyPatch, half_copy: bool, precision: torch.dtype
) -> None:
    """Another thread may recentre at any time; here it does so at the two worst moments."""
    torch.manual_seed(0)
    far = means(64, 3)
    encoder = Encoder(blind(torch.randn(2048, 64), far), torch.randn(2048), half_copy)
    x, others = 0.3 * torch.randn(40, 64) + far[0], iter(far[1:].repeat(20, 1))
    want = exact_topk(x, encoder.rows, encoder.bias, 8)[1].sort(1).values
    assert encoder.recentre(x)
    real, moved = certified.approximate, []

    def recentre() -> None:
        encoder.blocks_until_recentre = 0
        moved.append(encoder.recentre(0.3 * torch.randn(40, 64) + next(others)))

    def approximate(*arguments: object) -> torch.Tensor:
        recentre()
        found = real(*arguments)  # type: ignore[arg-type]
        recentre()
        return found

    monkeypatch.setattr(certified, "approximate", approximate)
    values, indices = encode_topk(x, encoder, 8, precision)
    assert moved[:2] == [True, True]
    assert torch.equal(indices.long().masked_fill(values <= 0, -1).sort(1).values, want)


def test_threads_share_an_sae() -> None:
    torch.manual_seed(0)
    sae, far = make(64, 4096, 16), means(64, 4)
    with torch.no_grad():
        sae.W_enc.copy_(blind(torch.randn(4096, 64), far).T)
        sae.b_enc.normal_()
    xs = [0.3 * torch.randn(100, 64) + mean for mean in far]
    want = [sae.prepare().encode_sparse(x) for x in xs]
    sae.prepare()
    barrier = threading.Barrier(len(xs))
    right: list[bool] = []

    def work(i: int) -> None:
        barrier.wait()
        right.extend(sae.encode_sparse(xs[i]) == want[i] for _ in range(3))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 12
    assert all(right)


def test_one_thread_recentres_and_the_others_go_on() -> None:
    torch.manual_seed(0)
    encoder = Encoder(torch.randn(256, 16), torch.zeros(256))
    x = torch.randn(40, 16) + 100
    with encoder.turn:
        assert not encoder.recentre(x)
    assert encoder.recentre(x)


# Weights that change


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("how", ["encode while it trains", "freeze again", "freeze by hand"])
def test_fused_optimizers(optimizer: Callable[..., torch.optim.Optimizer], how: str) -> None:
    """Fused optimizers change weights without changing torch's version counter."""
    sae, x = make(), torch.randn(20, 24)
    with torch.no_grad():
        sae.b_enc[:24] = -100  # they never fire or change, so comparing a few numbers shows nothing
        sae.W_enc.data = sae.W_enc.data.T.contiguous().T
        sae.W_dec.data = sae.W_dec.data.T.contiguous().T
    check(sae, x)
    sae.decode_sparse(sae.encode_sparse(x))
    parameters = [sae.W_enc, sae.W_dec, sae.b_enc]
    if how == "freeze by hand":
        for parameter in parameters:
            parameter.requires_grad_(True)
    else:
        sae.requires_grad_(True)
    step = optimizer(parameters, lr=0.1, fused=True)
    for _ in range(3):
        (sae(x) - x).square().sum().backward()
        step.step()
        step.zero_grad()
        if how == "encode while it trains":
            check(sae, x)
    if how == "freeze again":
        sae.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(False)
    check(sae, x)
    codes = sae.encode_sparse(x)
    torch.testing.assert_close(
        sae.decode_sparse(codes), codes.to_dense() @ sae.W_dec + sae.b_dec, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("where", ["loaded inside", "moved inside", "loaded outside"])
def test_edits_in_inference_mode(home: Path, where: str) -> None:
    x = 3 * torch.randn(20, 64)
    with torch.inference_mode(where != "loaded outside"):
        sae = qsl.load_sae("local/mine/1")
    assert not sae.W_enc.is_inference()
    with torch.inference_mode():
        if where == "moved inside":
            sae = sae.to(torch.bfloat16).to(torch.float32)
        check(sae, x)
        sae.W_enc[:, 7] *= 10
        check(sae, x)
        sae.b_enc[3] += 5
        check(sae, x)
        codes = sae.encode_sparse(x)
        sae.W_dec[codes.indices[0, 0].long()] *= 3
        torch.testing.assert_close(
            sae.decode_sparse(codes), codes.to_dense() @ sae.W_dec + sae.b_dec, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("layout", ["official", "saelens"])
def test_an_edit_of_one_feature_through_data(layout: str) -> None:
    sae, x = make(24, 100), torch.randn(20, 24)
    if layout == "official":
        sae.W_enc.data = sae.W_enc.data.T.contiguous().T
    for feature in (0, 50, 95, 96, 99):
        check(sae, x)
        sae.W_enc.data[:, feature] *= 7
        check(sae, x)
        sae.b_enc.data[feature] += 3
        check(sae, x)


def test_members_follow_their_sae(home: Path) -> None:
    sae, x = qsl.load_sae("local/mine/1"), torch.randn(600, 64)
    features = [1, 7, 30]
    members = Membership(sae, features)

    def right() -> bool:
        want = sae.encode_sparse(x).to_dense()[:, features]
        return torch.equal(members.values(x), want)

    assert right()
    assert right()  # by certificates now
    sae.W_enc.data[:, 7] *= -3
    assert right()
    sae.W_enc.data[:, 7] *= -1
    sae.prepare()
    assert right()


# Settings of the process that SAELens's SAE takes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_default_dtype(home: Path, dtype: torch.dtype) -> None:
    x = torch.randn(40, 64, dtype=torch.float32)
    want = qsl.load_sae("local/mine/1").encode_sparse(x)
    topk.half_from.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        sae = qsl.load_sae("local/mine/1")
        members = Membership(sae, [1, 7])
        for count in (1, 2, 40):
            assert sae.encode_sparse(x[:count]) == want[:count]
            assert members.values(x[:count]).dtype == torch.float32
        assert encode_topk(x, sae.exact_encoder(), 4, torch.bfloat16)[0].dtype == torch.float32
        assert sae(x).dtype == sae.pre_activations(x, [3]).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
        topk.half_from.cache_clear()


def test_another_default_device(home: Path) -> None:
    """Tensors on `meta` have no numbers, so any tensor made there would fail."""
    x = torch.randn(40, 64)
    sae = qsl.load_sae("local/mine/1")
    want, out = sae.encode_sparse(x), sae(x)
    topk.half_from.cache_clear()
    with torch.device("meta"):
        assert sae.prepare().encode_sparse(x) == want
        assert sae.encode_sparse(x[:1]) == want[:1]
        assert torch.equal(sae(x), out)
    topk.half_from.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_of_the_cpu(dtype: torch.dtype) -> None:
    sae, x = make(), torch.randn(20, 24)
    values = sae.encode_sparse(x).values
    leaf = x.clone().requires_grad_()
    sae(leaf).square().sum().backward()
    with torch.autocast("cpu", dtype):
        check(sae.prepare(), x)
        assert torch.equal(sae.encode_sparse(x).values, values)
        again = x.clone().requires_grad_()
        sae(again).square().sum().backward()
    torch.testing.assert_close(again.grad, leaf.grad)


def test_numbers_of_the_weights_are_blamed_on_the_weights() -> None:
    sae, x = make(), torch.randn(20, 24)
    with torch.no_grad():
        sae.W_enc[3, 17] = float("nan")
    with pytest.raises(NotFinite, match=r"W_enc .* 1 of 96 features: 17"):
        sae.encode_sparse(x)
    with torch.no_grad():
        sae.W_enc[3, 17] = 0
        sae.b_enc[[2, 5]] = float("inf")
    with pytest.raises(NotFinite, match=r"b_enc .* 2 of 96 features: 2, 5"):
        sae.encode_sparse(x)
