"""Fitting Jacobian lenses in steps, their cards, and how they compare with the logit lens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen_scope_lens as qsl
from qwen_scope_lens.catalog import lens_beside
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import BadFile, LayerOutOfRange, TooLittleData
from qwen_scope_lens.mini import MODELS, heldout, model_path
from qwen_scope_lens.models import fit_lens, lens_quality, read_lens

TEXTS = [row["text"][:60] for row in heldout("prose", "en")][:4]


@pytest.fixture(scope="module")
def bridge() -> Any:
    return qsl.load_model("mini-qwen3", full_hooks=True)


def test_a_fit_goes_on_where_it_stopped(bridge: Any, tmp_path: Path) -> None:
    how: dict[str, Any] = {"corpus": "a test", "layers": [6], "batch": 128, "tokens": 8}
    whole, steps = tmp_path / "whole.pt", tmp_path / "steps.pt"
    fit_lens(bridge, ["a", *TEXTS[:2]], whole, held_out=TEXTS[2:], **how)  # "a" is too short
    first = fit_lens(bridge, TEXTS[:2], steps, minutes=0, **how)
    assert (first.prompts, first.card["texts_wanted"]) == (1, 2)
    with pytest.raises(BadFile, match="other tokens"):
        fit_lens(bridge, TEXTS[:2], steps, **how | {"tokens": 9})
    both = fit_lens(bridge, TEXTS[:2], steps, **how)
    assert torch.equal(both.matrices[6], read_lens(whole).matrices[6])
    assert not torch.equal(both.matrices[6], first.matrices[6])
    assert not list(tmp_path.glob("*.part"))
    card = read_lens(whole).card
    assert (card["model"], card["texts"], card["tokens"]) == ("mini-qwen3", 2, 16)
    assert card["held_out"][0]["positions"] == 2 * 6
    part = tmp_path / "cut.pt.part"
    part.write_bytes(b"cut")
    with pytest.raises(BadFile, match="is damaged"):
        fit_lens(bridge, TEXTS[:2], tmp_path / "cut.pt", **how)
    with pytest.raises(LayerOutOfRange, match="0 to 6"):
        fit_lens(bridge, TEXTS, tmp_path / "x.pt", corpus="", layers=[7])
    with pytest.raises(TooLittleData):
        fit_lens(bridge, ["a"], tmp_path / "x.pt", corpus="")


def test_quality_is_that_of_the_model_s_own_words(bridge: Any) -> None:
    """Against plain logits; with the identity the lens is the logit lens."""
    beside = lens_beside("mini-qwen3")
    assert beside is not None
    plain = replace(read_lens(beside), matrices={4: torch.eye(128)})
    [same] = lens_quality(bridge, plain, TEXTS[:2], tokens=10)
    assert (same.kl, same.same_top) == pytest.approx((same.plain_kl, same.plain_same_top))
    total, places = 0.0, 0
    with torch.no_grad():
        for text in TEXTS[:2]:
            logits, cache = bridge.run_with_cache(bridge.to_tokens(text)[:, :10])
            said = logits[0].float().log_softmax(-1)
            middle = cache["blocks.4.hook_out"]
            guess = bridge.unembed(bridge.ln_final(middle))[0].float().log_softmax(-1)
            kl = (said.exp() * (said - guess)).sum(-1)[1:-1]
            total, places = total + float(kl.sum()), places + len(kl)
    assert same.positions == places
    assert same.kl == pytest.approx(total / places, rel=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_the_minis_come_with_lenses(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = lens_beside(model)
    assert path == lens_beside(str(model_path(model)))
    assert path is not None
    lens = read_lens(path, 128)
    assert (lens.model, sorted(lens.matrices)) == (model, list(range(7)))
    late = [row for row in lens.card["held_out"] if row["layer"] >= 3]
    assert all(row["kl"] < row["plain_kl"] for row in late)
    assert main(["lens", "show", model]) == 0
    assert f"lens of {model}, d_model 128" in capsys.readouterr().out
