"""What others do with an SAE: functorch, second derivatives, forward mode, `torch.compile`.

SAELens's own SAE with the same weights says what is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from qwen_scope_lens.errors import NotFinite, WrongShape
from qwen_scope_lens.saes import ScopeSAE, ScopeSAEConfig, SparseCodes
from qwen_scope_lens.saes.exact.gather import _Dots, _Gather, _Scatter

Pair = tuple[ScopeSAE, TopKSAE]


@pytest.fixture
def pair() -> Pair:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_in": 24, "d_sae": 96, "k": 6}
    ours = ScopeSAE(ScopeSAEConfig(**sizes))
    with torch.no_grad():
        ours.b_enc.normal_(0, 0.1)
        ours.b_dec.normal_(0, 0.1)
    theirs = TopKSAE(TopKSAEConfig(apply_b_dec_to_input=False, **sizes))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.requires_grad_(False)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def decoders(pair: Pair, indices: torch.Tensor) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The cube of a reconstruction as a function of the values, by us and by SAELens."""
    ours, theirs = pair

    def dense(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(indices), 96).scatter_add(1, indices.long(), values)

    return [
        lambda v: ours.decode_sparse(SparseCodes(v, indices, 96)).pow(3).sum(),
        lambda v: theirs.decode(dense(v)).pow(3).sum(),
    ]


@pytest.mark.parametrize("transform", [grad, hessian, jacrev, jacfwd])
def test_functorch_through_a_decode(pair: Pair, transform: Callable[..., Any]) -> None:
    codes = pair[0].encode_sparse(torch.randn(4, 24))
    close(*(transform(f)(codes.values) for f in decoders(pair, codes.indices)))


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
@pytest.mark.parametrize("path", ["encode", "forward"])
def test_functorch_through_an_encode(pair: Pair, transform: Callable[..., Any], path: str) -> None:
    x = torch.randn(4, 24)
    close(*(vmap(transform(getattr(sae, path)))(x) for sae in pair))
    cubes = [lambda row, sae=sae: getattr(sae, path)(row).pow(3).sum() for sae in pair]
    close(*(hessian(cube)(x[0]) for cube in cubes))


def test_vmap_gives_and_takes_codes(pair: Pair) -> None:
    sae, x = pair[0], torch.randn(3, 4, 24)
    codes = sae.encode_sparse(x)
    for mapped in (vmap(sae.encode_sparse), vmap(vmap(sae.encode_sparse))):
        assert mapped(x) == codes
    assert vmap(sae.encode_sparse, in_dims=1, out_dims=1)(x) == codes
    close(vmap(sae.decode_sparse)(codes), sae.decode_sparse(codes))
    x[1, 2, 0] = float("nan")
    with pytest.raises(NotFinite, match="1 of 12 positions"):
        vmap(sae.encode_sparse)(x)


def test_functorch_through_pre_activations(pair: Pair) -> None:
    ours, x, features = pair[0], torch.randn(4, 24), torch.tensor([3, 90])
    rows = ours.W_enc.T[features]
    close(vmap(jacrev(lambda r: ours.pre_activations(r, features)))(x), rows.expand(4, 2, 24))
    close(jvp(lambda r: ours.pre_activations(r, features), (x,), (x,))[1], x @ rows.T)
    squares = hessian(lambda r: ours.pre_activations(r, features).square().sum())(x[0])
    close(squares, 2 * rows.T @ rows)
    each = vmap(lambda feature: ours.pre_activations(x, feature))
    close(each(features), ours.pre_activations(x, features).T)
    with pytest.raises(ValueError, match="out of range"):
        each(torch.tensor([3, 96]))


def test_functional_call_differentiates_the_weights(pair: Pair) -> None:
    x = torch.randn(4, 24)
    of_weights = [
        grad(lambda p, sae=sae: functional_call(sae, p, (x,)).square().sum())(
            dict(sae.named_parameters())
        )
        for sae in pair
    ]
    assert set(of_weights[1]) == {"W_enc", "W_dec", "b_enc", "b_dec"}
    for name, gradient in of_weights[1].items():
        close(of_weights[0][name], gradient)


@pytest.mark.parametrize("trains", [False, True])
def test_second_derivatives(pair: Pair, trains: bool) -> None:
    codes = pair[0].encode_sparse(torch.randn(4, 24))
    found = []
    for sae, decode in zip(pair, decoders(pair, codes.indices), strict=True):
        sae.requires_grad_(trains)
        values = codes.values.clone().requires_grad_()
        first = torch.autograd.grad(decode(values), values, create_graph=True)[0]
        wanted = [values, sae.W_dec] if trains else [values]
        found.append(torch.autograd.grad(first.square().sum(), wanted))
        x = torch.ones(24).requires_grad_()
        first = torch.autograd.grad(sae(x).pow(3).sum(), x, create_graph=True)[0]
        found[-1] += torch.autograd.grad(first.square().sum(), x)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-2)


def test_forward_mode_without_functorch(pair: Pair) -> None:
    x, tangents = torch.randn(4, 24), []
    for sae in pair:
        with forward_ad.dual_level():
            out = sae(forward_ad.make_dual(x, x.flip(0)))
            tangents.append(forward_ad.unpack_dual(out).tangent)
    close(*tangents)


@pytest.mark.parametrize("product", [_Gather, _Dots, _Scatter])
def test_each_product_is_the_others_derivative(product: type[torch.autograd.Function]) -> None:
    values, grads, rows = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (3, 4), (5, 4))
    )
    indices = torch.tensor([[0, 4], [1, 1], [0, 0]])
    calls: dict[Any, tuple[Callable[..., Any], tuple[torch.Tensor, torch.Tensor]]] = {
        _Gather: (lambda v, r: _Gather.apply(v, indices, r), (values, rows)),
        _Dots: (lambda g, r: _Dots.apply(g, indices, r), (grads, rows)),
        _Scatter: (lambda v, g: _Scatter.apply(v, g, indices, 5), (values, grads)),
    }
    call, inputs = calls[product]
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, inputs)
    stacked = tuple(torch.stack([part, 2 * part]).detach() for part in inputs)
    one_by_one = torch.stack([call(*(part[i] for part in stacked)) for i in range(2)])
    torch.testing.assert_close(vmap(call)(*stacked), one_by_one)


# torch.compile


@pytest.mark.parametrize("trains", [False, True])
def test_a_compiled_sae_gives_the_same(pair: Pair, trains: bool) -> None:
    """The back end `eager` traces as the others do and compiles nothing, which takes seconds."""
    ours, theirs = pair
    ours.requires_grad_(trains)
    x = torch.randn(4, 24)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager")
    assert torch.equal(compiled(x), ours(x))
    close(compiled(x), theirs(x))
    if trains:
        return
    assert torch.equal(torch.compile(ours.encode, backend="eager")(x), ours.encode(x))
    assert torch.compile(ours.encode_sparse, backend="eager")(x) == ours.encode_sparse(x)
    acts = theirs.encode(x)
    close(torch.compile(ours.decode, backend="eager")(acts), ours.decode(acts))
    grads: list[torch.Tensor] = []
    for sae in (compiled, theirs):
        leaf = x.clone().requires_grad_()
        sae(leaf).square().sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    close(*grads)


# Contracts of SAELens, and shapes


def test_a_dense_decode_of_another_dtype_is_saelenss(pair: Pair) -> None:
    ours, theirs = pair
    acts = theirs.encode(torch.randn(4, 24)).bfloat16()
    messages = []
    for sae in (ours, theirs):
        with pytest.raises(RuntimeError, match="dtype") as caught:
            sae.decode(acts)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.decode(acts), theirs.decode(acts))
    with pytest.raises(RuntimeError):  # as SAELens has it; twice the width is not twice the batch
        ours.decode(torch.zeros(4, 192))


@pytest.mark.parametrize("shape", [(4, 23), (4, 48), (), (24, 1)], ids=str)
def test_another_width_says_what_was_expected(pair: Pair, shape: tuple[int, ...]) -> None:
    for call in (pair[0].encode_sparse, pair[0], lambda x: pair[0].pre_activations(x, 3)):
        with pytest.raises(WrongShape, match=r"expected residuals|reads residuals \[\.\., 24\]"):
            call(torch.zeros(shape))
