"""`verify` accepts the right convention, and names and refuses each wrong one."""

from __future__ import annotations

from pathlib import Path

import planted
import pytest
import torch

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import NotFinite, VerificationFailed, WrongShape
from qwen_scope_lens.saes.verify import measure


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return planted.tensors(seed=1)


@pytest.fixture
def sae(home: Path) -> qsl.ScopeSAE:
    return qsl.load_sae("local/mine/1")


@pytest.fixture
def x(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return planted.activations(weights)


def test_the_right_activations_pass(sae: qsl.ScopeSAE, x: torch.Tensor) -> None:
    report = qsl.verify(sae, x)
    assert report.ok
    assert report.tokens == len(x)
    assert report.l0 <= planted.K
    own = report.fvu[report.convention]
    assert own < 0.3
    for name, value in report.fvu.items():
        if name.startswith("b_dec"):
            assert value > 2 * own
    assert "in use" in str(report)
    assert "threshold: FVU at most 0.8" in str(report)


def test_fvu_against_a_direct_float64_computation(
    sae: qsl.ScopeSAE, x: torch.Tensor, weights: dict[str, torch.Tensor]
) -> None:
    z = planted.model_card_encode(weights, x, planted.K)
    recons = z @ weights["W_dec"].double().T + weights["b_dec"].double()
    x64 = x.double()
    expected = ((recons - x64) ** 2).sum() / ((x64 - x64.mean(0)) ** 2).sum()
    assert measure(sae, x).fvu["as documented"] == pytest.approx(float(expected), rel=1e-4)


def test_pre_subtracted_sae_used_as_if_it_were_not(weights: dict[str, torch.Tensor]) -> None:
    """An SAE trained with x - b_dec and loaded without: the report says which fits better."""
    theirs = dict(weights, b_enc=torch.zeros(planted.D_SAE))
    x = planted.activations(weights)
    with pytest.raises(VerificationFailed, match=r"'b_dec subtracted before encoding' fits better"):
        qsl.verify(planted.saelens_sae(theirs), x)
    right = planted.saelens_sae(theirs, apply_b_dec_to_input=True)
    assert qsl.verify(right, x).convention == "b_dec subtracted, as this SAE's cfg says"


def test_decode_bias_that_should_not_be_there(weights: dict[str, torch.Tensor]) -> None:
    x = planted.activations(dict(weights, b_dec=torch.zeros(planted.D_MODEL)))
    theirs = dict(weights, b_enc=torch.zeros(planted.D_SAE))
    with pytest.raises(VerificationFailed, match="left out of the decode"):
        qsl.verify(planted.saelens_sae(theirs), x)


def test_wrong_k_shows_as_relu_fitting_better(weights: dict[str, torch.Tensor]) -> None:
    x = planted.activations(weights, k=planted.K)
    theirs = dict(
        weights, b_enc=weights["b_enc"] - 2.5
    )  # works as a threshold: ReLU alone is nearly right
    with pytest.raises(VerificationFailed, match="ReLU without top-k"):
        qsl.verify(planted.saelens_sae(theirs, k=1), x)


def test_another_layers_activations_are_refused(sae: qsl.ScopeSAE) -> None:
    x = planted.activations(planted.tensors(seed=2))
    with pytest.raises(VerificationFailed, match="right layer"):
        qsl.verify(sae, x)
    assert not measure(sae, x).ok


def test_threshold_is_a_parameter_and_printed(sae: qsl.ScopeSAE, x: torch.Tensor) -> None:
    with pytest.raises(VerificationFailed, match=r"at most 0\.001"):
        qsl.verify(sae, x, max_fvu=0.001)


def test_negative_share_dead_and_dense(weights: dict[str, torch.Tensor]) -> None:
    theirs = dict(weights)
    theirs["b_enc"] = weights["b_enc"].clone()
    theirs["b_enc"][:5] = -1e6  # dead
    theirs["b_enc"][5] = 1e3  # dense
    report = measure(planted.saelens_sae(theirs), planted.activations(weights))
    assert report.dead >= 5
    assert report.dense >= 1
    shifted = dict(weights, b_enc=weights["b_enc"] - 1e3)
    report = measure(planted.saelens_sae(shifted), planted.activations(weights))
    assert report.negative_share == 1.0
    assert report.l0 == 0.0
    assert report.fvu["top-k without ReLU"] != report.fvu["as documented"]


def test_sinks_and_first_tokens_are_left_out(sae: qsl.ScopeSAE, x: torch.Tensor) -> None:
    batch = x.view(8, 64, planted.D_MODEL).clone()
    sink = torch.randn(planted.D_MODEL, generator=torch.Generator().manual_seed(9))
    batch[:, 0] = 300 * sink
    batch[3, 7] = -500 * sink
    report = qsl.verify(sae, batch)
    assert report.excluded == 9
    mask = torch.ones(8, 64, dtype=torch.bool)
    mask[:, 32:] = False
    assert qsl.verify(sae, batch, mask=mask).tokens == 8 * 31 - 1
    everything = measure(sae, batch, include_first=True, max_norm_ratio=1e9)
    assert everything.excluded == 0
    assert everything.fvu["as documented"] > 2 * report.fvu["as documented"]


def test_bad_activations(sae: qsl.ScopeSAE, x: torch.Tensor) -> None:
    with pytest.raises(WrongShape, match=r"\[tokens, 64\]"):
        qsl.verify(sae, x[:, :32])
    with pytest.raises(WrongShape, match="needs 16"):
        qsl.verify(sae, x[:1])
    with pytest.raises(WrongShape, match="mask"):
        qsl.verify(sae, x, mask=torch.ones(3))
    with pytest.raises(NotFinite, match="1 of 512"):
        qsl.verify(sae, torch.where(torch.arange(512)[:, None] == 5, torch.nan, x))
    with pytest.raises(NotFinite, match="equal"):
        qsl.verify(sae, torch.ones(40, planted.D_MODEL))


def test_bfloat16_sae_and_activations(sae: qsl.ScopeSAE, x: torch.Tensor) -> None:
    full = measure(sae, x).fvu["as documented"]
    half = measure(sae.to(torch.bfloat16), x.bfloat16()).fvu["as documented"]
    assert half == pytest.approx(full, abs=0.05)


def test_saes_that_would_be_misjudged_are_refused(
    weights: dict[str, torch.Tensor], x: torch.Tensor
) -> None:
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    from qwen_scope_lens.errors import UnsupportedSAE

    for changes in (
        {"normalize_activations": "layer_norm"},
        {"rescale_acts_by_decoder_norm": True},
    ):
        with pytest.raises(UnsupportedSAE, match=next(iter(changes))):
            qsl.verify(planted.saelens_sae(weights, **changes), x)
    with pytest.raises(UnsupportedSAE, match="StandardSAE"):
        qsl.verify(StandardSAE(StandardSAEConfig(d_in=8, d_sae=16)), x)


def test_meaningless_settings_are_refused(sae: qsl.ScopeSAE, x: torch.Tensor) -> None:
    for bad in (float("nan"), 0.0, -1.0):
        with pytest.raises(ValueError, match="must be positive"):
            qsl.verify(sae, x, max_fvu=bad)
    with pytest.raises(WrongShape, match="real tensor"):
        qsl.verify(sae, x.to(torch.complex64))
    with pytest.raises(WrongShape, match="real tensor"):
        qsl.verify(sae, x.numpy())  # type: ignore[arg-type]
