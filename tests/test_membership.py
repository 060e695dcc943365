"""Membership finds the values of chosen features exactly as a full encode does."""

from __future__ import annotations

from pathlib import Path

import planted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_scope_lens.errors import NotFinite
from qwen_scope_lens.saes import Membership, ScopeSAE, ScopeSAEConfig, load_sae
from qwen_scope_lens.saes.exact import matmul as float32
from qwen_scope_lens.saes.few_features import WARM_UP

D_IN, D_SAE, K = 12, 96, 5


def random_sae(seed: int = 0, subtract: bool = False, whole: bool = False) -> ScopeSAE:
    """A random SAE. With `whole` its weights are small whole numbers, so scores are often equal."""
    rng = torch.Generator().manual_seed(seed)
    sae = ScopeSAE(
        ScopeSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, apply_b_dec_to_input=subtract, device="cpu")
    )
    with torch.no_grad():
        for weight in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
            drawn = torch.randn(weight.shape, generator=rng)
            weight.copy_(drawn.round() if whole else drawn)
    return sae


def slow_maxima(
    sae: ScopeSAE, features: list[int], x: torch.Tensor, document: torch.Tensor, n_docs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The maxima from a full encode, one document and feature at a time."""
    dense = sae.encode_sparse(x).to_dense()[:, features]
    values = torch.zeros(n_docs, len(features))
    rows = torch.full((n_docs, len(features)), -1)
    for i, doc in enumerate(document.tolist()):
        for j in range(len(features)):
            if dense[i, j] > values[doc, j]:
                values[doc, j], rows[doc, j] = dense[i, j], i
    return values, rows


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_equals_a_full_encode(
    subtract: bool, whole: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float32, "onednn_wins", lambda: False)  # its product ignores autocast
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _equals_a_full_encode(subtract, whole)


def _equals_a_full_encode(subtract: bool, whole: bool) -> None:
    sae = random_sae(1, subtract, whole)
    features = [0, 3, 17, 95, 40]
    member = Membership(sae, features, n_witnesses=48)
    rng = torch.Generator().manual_seed(2)
    for _ in range(4):  # the witnesses are chosen on the way
        x = torch.randn(300, D_IN, generator=rng)
        x = x.round() if whole else x
        document = torch.randint(0, 40, (300,), generator=rng).sort().values
        found = member.maxima(x, document, 41)
        values, rows = slow_maxima(sae, features, x, document, 41)
        assert torch.equal(found.values, values)
        assert torch.equal(found.rows, rows)
        assert torch.equal(member.values(x), sae.encode_sparse(x).to_dense()[:, features])
    assert {"negative", "outnumbered", "encoded"} <= set(member.settled)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 5), st.booleans())
def test_any_input(seed: int, n: int, n_docs: int, whole: bool) -> None:
    sae = random_sae(seed % 7, whole=whole)
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D_IN, generator=rng) * 10 ** float(torch.randn(1, generator=rng))
    x = x.round() if whole else x
    document = torch.randint(0, n_docs, (n,), generator=rng)
    member = Membership(sae, [seed % D_SAE, 5])
    member.values(torch.randn(4 * WARM_UP, D_IN, generator=rng))
    assert member.settled["encoded"] >= WARM_UP  # so there are witnesses from the start
    found = member.maxima(x, document, n_docs)
    values, rows = slow_maxima(sae, [seed % D_SAE, 5], x, document, n_docs)
    assert torch.equal(found.values, values)
    assert torch.equal(found.rows, rows)


def test_planted_features_and_few_full_encodes(home: Path) -> None:
    """Four of 160 features fire per token, so most positions need no full encode."""
    sae = load_sae("local/mine/1")
    x = planted.activations(planted.tensors(seed=1), tokens=4000)
    member = Membership(sae, [7])
    member.values(x[:1000])
    before = member.settled["encoded"]
    assert torch.equal(member.values(x), sae.encode_sparse(x).to_dense()[:, [7]])
    assert 0 < member.settled["encoded"] - before < len(x) / 4


def test_nothing_and_nonsense() -> None:
    member = Membership(random_sae(), [1])
    empty = member.maxima(torch.zeros(0, D_IN), torch.zeros(0, dtype=torch.long), 2)
    assert empty.rows.tolist() == [[-1], [-1]]
    with pytest.raises(NotFinite):
        member.maxima(torch.full((1, D_IN), float("nan")), torch.zeros(1, dtype=torch.long), 1)


def test_certificates_are_kept_beside_the_sae_until_its_weights_change() -> None:
    sae, x = random_sae(3), torch.randn(WARM_UP, D_IN, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        sae.b_enc.add_(1)  # so that no feature is always negative

    def outnumbered() -> int:
        members = Membership(sae, range(9))
        assert torch.equal(members.values(x), sae.encode_sparse(x).to_dense()[:, :9])
        return members.settled["outnumbered"]

    assert outnumbered() == 0  # nothing was encoded yet
    assert outnumbered() > 0  # by what the first one has seen
    with torch.no_grad():
        sae.W_enc.mul_(-1)
    assert outnumbered() == 0
