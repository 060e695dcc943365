"""Encode and decode are exact, agree with SAELens, and need bounded memory."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_scope_lens.errors import NotFinite
from qwen_scope_lens.saes import ScopeSAE, ScopeSAEConfig, SparseCodes
from qwen_scope_lens.saes.exact import certified, topk
from qwen_scope_lens.saes.exact import matmul as float32
from qwen_scope_lens.saes.exact.encoder import Encoder
from qwen_scope_lens.saes.exact.topk import encode_topk

Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]

PASSES = [torch.bfloat16, torch.float32]


def reference(
    x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in plain words: float64 dots, rounded to float32, stable sort."""
    scores = (x.double() @ rows.double().T + bias.double()).float()
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    values, indices = values[:, :k], indices[:, :k]
    return values.relu(), indices.masked_fill(values <= 0, -1)


def check(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor, k: int) -> None:
    """Same sets as the reference, values within float32 rounding, bit-equal for every pass."""
    values, indices = reference(x, rows, bias, k)
    found = [
        encode_topk(x, Encoder(rows, bias, half), k, precision)
        for precision in PASSES
        for half in (False, True)
    ]
    for got_values, got_indices in found:
        chosen = got_indices.long().masked_fill(got_values <= 0, -1)
        assert torch.equal(chosen.sort(1).values, indices.sort(1).values)
        assert (got_values[:, :-1] >= got_values[:, 1:]).all()
        scale = x.double().norm(dim=1, keepdim=True) * rows.double().norm(dim=1).max()
        slack = 1.1 * (x.shape[1] + 4) * 2**-24 * (scale + bias.double().abs().max())
        assert ((got_values.double() - values.double()).abs() <= slack + 1e-43).all()
        assert torch.equal(got_values, found[0][0])
        assert torch.equal(got_indices, found[0][1])


def problem(
    n: int = 40, d: int = 96, d_sae: int = 1024, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, d, generator=g) / d**0.5
    return torch.randn(n, d, generator=g), rows, 0.1 * torch.randn(d_sae, generator=g)


def shifted(x: torch.Tensor) -> torch.Tensor:
    x = x + 5 * torch.randn(x.shape[1], generator=torch.Generator().manual_seed(3))
    x[:, [3, 40]] += 200 * x[:, [5, 6]]
    x[5] *= 1000
    return x


@pytest.mark.parametrize(
    "change",
    {
        "plain": lambda x, w, b: (x, w, b),
        "mean, outliers, sinks": lambda x, w, b: (shifted(x), w, b),
        "zeros": lambda x, w, b: (x * 0, w, b * 0),
        "pads among tokens": lambda x, w, b: (x * (torch.arange(40) % 2)[:, None], w, b * 0),
        "all tied": lambda x, w, b: (x * 0, w, b * 0 + 0.5),
        "all negative": lambda x, w, b: (x, w, b - 100),
        "few positive": lambda x, w, b: (x, w, b - 2.5),
        "duplicate features": lambda x, w, b: (x, w[:256].repeat(4, 1), b[:256].repeat(4)),
        "near duplicates": lambda x, w, b: (
            x,
            w[:256].repeat(4, 1) * (1 + 1e-7 * torch.arange(4).repeat_interleave(256)[:, None]),
            b[:256].repeat(4),
        ),
        "one long row": lambda x, w, b: (
            x,
            w * torch.cat([torch.ones(1023), 1e4 * b[:1]])[:, None],
            b,
        ),
        "huge": lambda x, w, b: (x * 1e30, w, b),
        "sums that overflow on their way": lambda x, w, b: (
            torch.full_like(x, 2.0**66),
            torch.cat([2.0**62 * (1 - 2 * (w[:3].argsort(1) % 2)), 2.0**-70 * w[3:]]),
            b + 1,
        ),
        "tiny": lambda x, w, b: (x * 1e-30, w, b * 0),
        "denormal": lambda x, w, b: (x * 1e-42, w, b * 0),
        "bfloat16": lambda x, w, b: (x.bfloat16(), w.bfloat16(), b.bfloat16()),
        "float16": lambda x, w, b: (x.half(), w.half(), b.half()),
        "empty": lambda x, w, b: (x[:0], w, b),
    }.items(),
    ids=lambda item: item[0],
)
def test_exact(change: tuple[str, Change]) -> None:
    x, rows, bias = change[1](*problem())
    check(x, rows, bias, 20)


@pytest.mark.parametrize(("d_sae", "k"), [(50, 50), (77, 7), (1, 1), (17, 16), (4100, 100)])
def test_exact_at_odd_widths(d_sae: int, k: int) -> None:
    x, rows, bias = problem(n=7, d_sae=d_sae)
    check(x, rows, bias, k)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_exact_on_small_integers(data: st.DataObject) -> None:
    """Integers tie all the time and every product is exact: nothing hides a wrong tie."""
    seed, span = data.draw(st.integers(0, 10**6)), data.draw(st.integers(1, 4))
    n, d, d_sae = (data.draw(st.integers(1, m)) for m in (6, 20, 300))
    k = data.draw(st.integers(1, d_sae))
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-span, span + 1, shape, generator=g).float()

    check(draw(n, d), draw(d_sae, d), draw(d_sae), k)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(-6, 6), st.floats(0, 3), st.integers(1, 60))
def test_exact_at_any_scale(seed: int, exponent: float, mean: float, k: int) -> None:
    x, rows, bias = problem(n=9, d=33, d_sae=500, seed=seed)
    check((x + 10**mean * x[0]) * 10**exponent, rows, bias, k)


def test_too_many_candidates_are_left_to_a_tighter_pass() -> None:
    x, rows, bias = problem()
    x[::2] = 0
    encoder = Encoder(rows, bias * 0 + 0.5).snapshot
    for precision in PASSES:
        settled = certified.select(encoder, x, 5, precision).settled
        assert settled.tolist() == [False, True] * 20


def test_sums_of_a_rounded_product_stay_in_float32() -> None:
    """Of a GPU's product, in any number of threads. The process has its own setting afterwards."""
    setting, real = torch.backends.cuda.matmul, torch.mm
    name = "allow_bf16_reduced_precision_reduction"
    assert getattr(setting, name)
    x, rows, bias = problem()
    seen: set[bool] = set()

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.add(getattr(setting, name))
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", watched)
        with float32.full_sums:
            encode_topk(x, Encoder(rows, bias), 5, torch.bfloat16)
            assert not getattr(setting, name)
    assert seen == {False}
    assert getattr(setting, name)


@pytest.mark.parametrize("parts", [1, 16])
def test_scores_are_within_their_bounds(parts: int) -> None:
    x, rows, bias = problem()
    x = shifted(x)
    encoder = Encoder(rows, bias)
    for centred in (False, True):
        block = certified._Block(encoder.snapshot, x, torch.bfloat16)
        token = torch.arange(40).repeat_interleave(1024)
        feature = torch.arange(1024).repeat(40)
        value, error, _ = block.scores(token, feature, parts)
        off = (value - (x.double() @ rows.double().T + bias.double()).flatten()).abs()
        assert (off <= error).all()
        # The bound falls with the number of parts: it is at most what the docstring says.
        size = block.length.double().repeat_interleave(1024) * encoder.snapshot.norms.repeat(40)
        rounding = 2.0**-24 * (1.1 * (96 / parts + 4) * size + 1.1 * value.abs())
        assert (error <= rounding + block.slack[token]).all()
        if not centred:
            assert encoder.recentre(x)


def test_result_does_not_depend_on_company_or_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows, bias = problem()
    x = shifted(x)
    whole = encode_topk(x, Encoder(rows, bias), 20, torch.bfloat16)
    alone = [encode_topk(row[None], Encoder(rows, bias), 20, torch.float32) for row in x]
    monkeypatch.setattr(topk, "tokens_per_block", lambda *_: 7)
    blocks = encode_topk(x, Encoder(rows, bias), 20, torch.bfloat16)
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([one[i] for one in alone]))
        assert torch.equal(whole[i], blocks[i])


def test_realistic_residuals_are_certified() -> None:
    """A mean and outlier columns: without centring the bfloat16 bound settles far fewer."""
    x, rows, bias = problem(n=200, d=512, d_sae=8192)
    mean = 10 * torch.randn(512)
    x = x + mean
    x[:, [3, 40]] += 30 * torch.randn(200, 2)
    # A trained bias takes the mean away again.
    encoder = Encoder(rows, bias - rows @ mean)
    encode_topk(x, encoder, 20, torch.bfloat16)
    assert encoder.settled["bfloat16"] >= 0.95 * 200
    assert not encoder.centre.plain


class _OnlyExactProducts(TorchDispatchMode):
    """Refuses float32 matrix products. Which of them a setting changes depends on the machine."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
            assert all(t.dtype != torch.float32 for t in args if isinstance(t, torch.Tensor))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", ["medium", "high", "variable"])
@pytest.mark.parametrize("n", [1, 40])
def test_exact_where_torch_may_multiply_in_fewer_bits(
    monkeypatch: pytest.MonkeyPatch, setting: str, n: int
) -> None:
    """Machines differ in what they make of these settings, so no such product is made at all."""
    x, rows, bias = problem(n=n, d=512, d_sae=4096)
    x = shifted(x) if n == 40 else x  # with outlier columns, once a centre is found
    if setting == "variable":
        monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    else:
        torch.set_float32_matmul_precision(setting)
    encoder = Encoder(rows, bias)
    encoder.recentre(x)
    assert encoder.centre.plain == (n == 1)
    try:
        assert not float32.full_float32("cpu")
        for name in ("all_dots", "_by_onednn", "_by_blas"):
            monkeypatch.setattr(float32, name, lambda *_: pytest.fail("not full float32"))
        with _OnlyExactProducts():
            for precision in PASSES:
                encode_topk(x, encoder, 20, precision)
        got = float32.product(x, rows)
        check(x, rows, bias, 20)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(got.double(), x.double() @ rows.double().T, rtol=1e-6, atol=1e-6)
    monkeypatch.undo()
    assert float32.full_float32("cpu")


def test_autocast_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32, "onednn_wins", lambda: False)  # its product ignores autocast
    x, rows, bias = problem(n=64, d=512, d_sae=4096)
    with torch.autocast("cpu", torch.bfloat16):
        check(x, rows, bias, 20)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 64])
def test_every_road_of_a_float32_product(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, n: int
) -> None:
    monkeypatch.setattr(float32, "onednn_wins", lambda: onednn)
    x, rows, bias = problem(n=n, d=300, d_sae=1003)
    for d in (300, 1, 0):
        got = float32.product(x[:, :d], rows[:, :d])
        want = x[:, :d].double() @ rows[:, :d].double().T
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    check(x, rows, bias, 20)


def test_first_pass_choice_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for keeps_half in (False, True):
        chosen = [topk.first_pass(2**n, "cpu", keeps_half) for n in range(13)]
        # Once bfloat16 wins it is not given up again for more positions.
        assert chosen == sorted(chosen, key=lambda dtype: dtype == torch.bfloat16)
        assert set(chosen) <= set(PASSES)
    monkeypatch.setattr(topk, "approximate", lambda *_: pytest.fail("measured again"))
    assert topk.first_pass(7, "cpu") in PASSES


@pytest.mark.parametrize(("half", "expected"), [(0.1, 1), (10.0, topk._NEVER)])
def test_first_pass_follows_the_clock(
    monkeypatch: pytest.MonkeyPatch, half: float, expected: int
) -> None:
    now = [0.0]

    def timed(
        encoder: Encoder, x: torch.Tensor, outliers: torch.Tensor, precision: torch.dtype
    ) -> None:
        now[0] += half if precision == torch.bfloat16 else 1.0

    monkeypatch.setattr(topk, "approximate", timed)
    monkeypatch.setattr(topk.time, "thread_time", lambda: now[0])
    assert topk.half_from.__wrapped__("cpu", True) == expected


# ScopeSAE against SAELens


def pair(dtype: str = "float32", k: int = 6, **changes: Any) -> tuple[ScopeSAE, TopKSAE]:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"d_in": 24, "d_sae": 96, "k": k, "dtype": dtype, **changes}
    ours = ScopeSAE(ScopeSAEConfig(**settings))
    with torch.no_grad():
        ours.b_enc.normal_(0, 0.1)
        ours.b_dec.normal_(0, 0.1)
    theirs = TopKSAE(TopKSAEConfig(**{"apply_b_dec_to_input": False, **settings}))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


CONFIGS: list[dict[str, Any]] = [
    {},
    {"apply_b_dec_to_input": True},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale"},
    {"rescale_acts_by_decoder_norm": True},
    {"dtype": "float64"},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,), (2, 0), ()], ids=str)
@pytest.mark.parametrize("error_term", [False, True])
def test_equals_saelens(changes: dict[str, Any], shape: tuple[int, ...], error_term: bool) -> None:
    ours, theirs = pair(**changes)
    ours._use_error_term = theirs._use_error_term = error_term
    x = torch.randn(*shape, 24).to(ours.dtype)
    assert torch.equal(ours.encode(x) > 0, theirs.encode(x) > 0)
    torch.testing.assert_close(ours.encode(x), theirs.encode(x).detach())
    torch.testing.assert_close(ours(x), theirs(x).detach())
    codes = ours.encode_sparse(x)
    assert codes.shape == shape
    torch.testing.assert_close(codes.to_dense(ours.dtype), theirs.encode(x).detach())
    torch.testing.assert_close(
        ours.decode_sparse(ours.encode_sparse(x)), ours.decode(ours.encode(x))
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_weights(dtype: str, input_dtype: torch.dtype) -> None:
    ours, theirs = pair(dtype)
    x = torch.randn(4, 24).to(input_dtype)
    assert ours.encode(x).dtype == theirs.encode(x).dtype == ours.dtype
    assert ours(x).dtype == theirs(x).dtype
    # Selection is by float32 scores, where SAELens lets values rounded to half precision tie.
    want = reference(x.to(ours.dtype), ours.W_enc.T, ours.b_enc, 6)
    got = ours.encode_sparse(x)
    assert torch.equal(got.indices.sort(-1).values, want[1].sort(-1).values.int())
    torch.testing.assert_close(got.values, want[0], rtol=1e-5, atol=1e-5)


def test_to_keeps_the_codes_right() -> None:
    ours, _ = pair()
    x = torch.randn(4, 24)
    before = ours.encode_sparse(x)
    ours.to(torch.bfloat16)
    assert ours.encode(x).dtype == torch.bfloat16
    want = reference(x.bfloat16(), ours.W_enc.T, ours.b_enc, 6)
    assert torch.equal(ours.encode_sparse(x).indices.sort(-1).values, want[1].sort(-1).values.int())
    ours.to(torch.float32)
    assert ours.encode_sparse(x).values.shape == before.values.shape


HOOKS = ["sae_input", "sae_acts_pre", "sae_acts_post", "sae_recons", "sae_error", "sae_output"]


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("error_term", [False, True])
def test_hooks_see_and_edit_what_saelens_shows(name: str, error_term: bool) -> None:
    ours, theirs = pair()
    ours._use_error_term = theirs._use_error_term = error_term
    x = torch.randn(2, 3, 24)
    seen: dict[str, list[torch.Tensor]] = {}
    results = []
    for who, sae in {"ours": ours, "theirs": theirs}.items():

        def edit(tensor: torch.Tensor, hook: object, who: str = who) -> torch.Tensor:
            seen.setdefault(who, []).append(tensor.detach().clone())
            return tensor * 1.5

        results.append(sae.run_with_hooks(x, fwd_hooks=[(f"hook_{name}", edit)]).detach())
    torch.testing.assert_close(*results)
    assert len(seen.get("ours", [])) == len(seen.get("theirs", []))
    for a, b in zip(seen.get("ours", []), seen.get("theirs", []), strict=True):
        torch.testing.assert_close(a, b)


def test_run_with_cache_and_backward_hooks() -> None:
    ours, theirs = pair()
    x = torch.randn(3, 24)
    a, b = ours.run_with_cache(x)[1], theirs.run_with_cache(x)[1]
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name].detach())
    grads = []
    for sae in (ours, theirs):
        kept: list[torch.Tensor] = []
        sae.add_hook("hook_sae_acts_post", lambda g, hook, kept=kept: kept.append(g), dir="bwd")
        sae(x.clone().requires_grad_()).square().sum().backward()
        sae.reset_hooks()
        grads.append(kept[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("path", ["encode", "forward"])
def test_gradients_of_the_input(changes: dict[str, Any], path: str) -> None:
    ours, theirs = pair(**changes)
    grads = []
    for sae in (ours, theirs):
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(2)).to(ours.dtype)
        x.requires_grad_()
        getattr(sae, path)(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_weights_when_asked() -> None:
    ours, theirs = pair()
    assert not any(p.requires_grad for p in ours.parameters())
    ours.requires_grad_(True)
    x = torch.randn(5, 24)
    for sae in (ours, theirs):
        sae(x).square().sum().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(getattr(ours, name).grad, parameter.grad)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 3), (40,), (0,)], ids=str)
def test_decode_sparse_gradients(trains: bool, dtype: str, shape: tuple[int, ...]) -> None:
    """Of a few entries and of more than there are features, with padding, frozen rows or not."""
    ours, _ = pair(dtype)
    codes = ours.encode_sparse(torch.randn(*shape, 24))
    keep = torch.rand(codes.values.shape) < 0.7
    codes = SparseCodes(codes.values * keep, codes.indices * keep, 96)
    ours.W_dec.requires_grad_(trains)
    weight = torch.randn(*shape, 24).to(ours.dtype)
    grads = []
    for sparse in (True, False):
        values = codes.values.clone().requires_grad_()
        ours.W_dec.grad = None
        edited = SparseCodes(values, codes.indices, 96)
        rows = ours.W_dec[codes.indices.long()]
        plain = (values[..., None].to(ours.dtype) * rows).sum(-2) + ours.b_dec
        out = ours.decode_sparse(edited) if sparse else plain
        (out * weight).sum().backward()
        # Without entries there is nothing to be differentiated; None and zeros both say so.
        of_rows = ours.W_dec.grad if trains and codes.values.numel() else torch.zeros(1)
        grads.append((values.grad, of_rows))
    slack = {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    torch.testing.assert_close(*grads, rtol=slack, atol=slack)


def test_encode_sparse_gradient_is_that_of_the_selected() -> None:
    ours, _ = pair()
    x = torch.randn(4, 24, requires_grad=True)
    codes = ours.encode_sparse(x)
    weight = torch.randn_like(codes.values)
    (codes.values * weight).sum().backward()
    expected = (weight[..., None] * ours.W_enc.T[codes.indices.long()]).sum(1)
    torch.testing.assert_close(x.grad, expected)


def test_pre_activations() -> None:
    ours, theirs = pair()
    x = torch.randn(2, 3, 24, requires_grad=True)
    dense = x @ theirs.W_enc + theirs.b_enc
    torch.testing.assert_close(ours.pre_activations(x, [5, 90]), dense[..., [5, 90]])
    torch.testing.assert_close(ours.pre_activations(x, 7), dense[..., 7])
    assert ours.pre_activations(x, []).shape == (2, 3, 0)
    ours.pre_activations(x, 7).sum().backward()
    torch.testing.assert_close(x.grad, theirs.W_enc[:, 7].expand(2, 3, -1))
    with pytest.raises(ValueError, match="out of range"):
        ours.pre_activations(x, 96)


def test_bad_numbers_are_refused_by_position() -> None:
    ours, _ = pair()
    x = torch.randn(2, 3, 24)
    x[0, 1, 5] = float("nan")
    x[1, 2, 0] = float("inf")
    for call in (ours.encode_sparse, ours.encode, ours):
        with pytest.raises(NotFinite, match=re.escape("2 of 6 positions: (0, 1), (1, 2)")):
            call(x)
    with pytest.raises(NotFinite, match="exceed float32"):
        ours.encode_sparse(torch.full((1, 24), 3e38) * ours.W_enc.T[:1].sign())


def test_dense_decode_of_many_features_is_saelenss() -> None:
    ours, theirs = pair()
    acts = torch.rand(4, 96)
    torch.testing.assert_close(ours.decode(acts), theirs.decode(acts).detach())
    with pytest.raises(ValueError, match="this SAE has 96"):
        ours.decode_sparse(SparseCodes(torch.zeros(1, 1), torch.zeros(1, 1).int(), 95))


# What is derived from the weights


def test_official_layout_is_transposed_once() -> None:
    ours, theirs = pair()
    ours.W_dec.data = ours.W_dec.data.T.contiguous().T
    ours.W_enc.data = ours.W_enc.data.T.contiguous().T
    x = torch.randn(3, 24)
    torch.testing.assert_close(ours(x), theirs(x).detach())
    first = ours.decoder_rows()
    assert first.is_contiguous()
    assert ours.decoder_rows() is first
    assert ours.exact_encoder().rows.data_ptr() == ours.W_enc.data_ptr()
    assert set(ours.state_dict()) == set(theirs.state_dict())


@pytest.mark.parametrize("how", ["in place", "data", "replace", "load", "half copy"])
def test_changed_weights_are_noticed(how: str) -> None:
    ours, _ = pair()
    x = torch.randn(3, 24)
    ours.encode_sparse(x)
    with torch.no_grad():
        if how in ("in place", "half copy"):
            ours.prepare(half_copy=how == "half copy")
            ours.W_enc[:, 3] += 1
        elif how == "data":
            ours.W_enc.data *= -2
        elif how == "replace":
            ours.W_enc = torch.nn.Parameter(torch.randn(24, 96))
        else:
            ours.load_state_dict({n: torch.randn_like(p) for n, p in ours.state_dict().items()})
    want = reference(x, ours.W_enc.T, ours.b_enc, 6)
    assert torch.equal(ours.encode_sparse(x).indices.sort(-1).values, want[1].sort(-1).values.int())


def test_copies_do_not_carry_the_derived() -> None:
    ours, _ = pair()
    ours.prepare(half_copy=True)
    x = torch.randn(3, 24)
    twin = copy.deepcopy(ours)
    assert not twin.derived.kept
    assert not pickle.loads(pickle.dumps(ours.derived)).kept
    assert twin.encode_sparse(x) == ours.encode_sparse(x)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "precision", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_memory_does_not_grow_with_tokens_or_width(precision: torch.dtype) -> None:
    """2k tokens at 81,920 features: dense would be 0.7 GB. The benchmark runs 16k tokens."""
    import subprocess
    import sys

    script = (
        "import torch; torch.set_num_threads(1)\n"
        "from qwen_scope_lens.saes.exact.topk import encode_topk\n"
        "from qwen_scope_lens.saes.exact.encoder import Encoder\n"
        "from pathlib import Path; import re\n"
        "def rss(key): return int(re.search(key + r':\\s*(\\d+)',"
        " Path('/proc/self/status').read_text()).group(1))\n"
        "e = Encoder(torch.randn(81920, 16), torch.zeros(81920)); x = torch.randn(2048, 16)\n"
        "Path('/proc/self/clear_refs').write_text('5'); before = rss('VmRSS')\n"
        f"encode_topk(x, e, 8, {precision})\n"
        "print(rss('VmHWM') - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 256 * 1024


def test_one_token_without_a_near_tie_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows, bias = problem(n=40)
    whole = encode_topk(x, Encoder(rows, bias), 20, torch.bfloat16)
    asked: list[int] = []
    select = topk.select

    def counted(*args: Any) -> Any:
        asked.append(1)
        return select(*args)

    monkeypatch.setattr(topk, "select", counted)
    for i in range(40):
        alone = encode_topk(x[i : i + 1], Encoder(rows, bias), 20, torch.float32)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, whole, strict=True))
    assert len(asked) < 10
    tied = rows[:512].repeat(2, 1), bias[:512].repeat(2)
    indices = encode_topk(x[:1], Encoder(*tied), 19, torch.float32)[1]
    assert len(asked) < 11
    assert torch.equal(indices[0].sort().values, reference(x[:1], *tied, 19)[1][0].sort().values)
