"""Planted truth through both trainings: a direction that makes a model loop, and language features.

The SAEs are made up on the mini's own residuals, so that what has to come out is known beforehand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_stores import build_store
from planted import settings as planted_settings
from training_data import mini, settings

import qwen_scope_lens as qsl
from qwen_scope_lens.cli.verbs import main
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.steering import Plan, Sampling, generate
from qwen_scope_lens.train import (
    SASFTConfig,
    amplified,
    find_language_features,
    find_repeats,
    own_loops,
    screen_causes,
)
from qwen_scope_lens.train.repetition_features import RepetitionFeature, RepetitionFeatures
from qwen_scope_lens.train.sasft import build_penalty

LAYER, WIDTH, D_SAE = 7, 128, 32
LOOPING = 7  # its direction is the unembedding of one token
STRENGTH = 4.0
PROMPTS = ["The package", "Use the command", "A file", "Open the folder", "On the page", "Press"]
SAMPLING = Sampling(20, 1.0, 1.0, 0)


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`local/made`: layer 7 of the mini, random features but one."""
    rng = torch.Generator().manual_seed(0)
    encoder = torch.randn(D_SAE, WIDTH, generator=rng) / WIDTH**0.5
    decoder = torch.nn.functional.normalize(torch.randn(D_SAE, WIDTH, generator=rng), dim=-1)
    model, tokenizer = mini()
    token = tokenizer(" the", add_special_tokens=False)["input_ids"][0]
    towards = model.lm_head.weight[token].detach() * model.model.norm.weight.detach()
    decoder[LOOPING] = torch.nn.functional.normalize(towards, dim=-1)
    folder = tmp_path / "home" / "made"
    folder.mkdir(parents=True)
    content = planted_settings(
        base_model="qwen-scope-lens/mini-qwen3", d_model=WIDTH, d_sae=D_SAE, k=4, num_layers=8
    )
    (folder / "config.json").write_text(json.dumps(content))
    tensors = {
        "W_enc": encoder,
        "W_dec": decoder.T.contiguous(),
        "b_enc": torch.zeros(D_SAE),
        "b_dec": torch.zeros(WIDTH),
    }
    torch.save(tensors, folder / f"layer{LAYER}.sae.pt")
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(tmp_path / "home"))
    return "local/made"


@pytest.mark.slow
def test_the_planted_cause_of_loops_is_kept_and_nothing_else(group: str) -> None:
    model, tokenizer = mini()
    refs = [qsl.FeatureRef(group, LAYER, n) for n in (3, LOOPING, 11, 20)]
    found = screen_causes(
        model.eval(),
        refs,
        PROMPTS,
        strength=STRENGTH,
        controls=3,
        tokenizer=tokenizer,
        sampling=SAMPLING,
    )
    assert found.kept == (refs[1],)
    assert found.candidates[0].ref == refs[1]
    assert found.candidates[0].ratio.value == 1.0
    assert found.untouched.value < 0.2
    assert max(control.value for control in found.controls) < 0.5
    assert "7/7" in str(found).splitlines()[1]
    assert str(found).splitlines()[1].endswith("kept")
    with pytest.raises(TooLittleData, match="needs two prompts"):
        screen_causes(model, refs, PROMPTS[:1], tokenizer=tokenizer)


def test_own_loops_are_the_models_own() -> None:
    model, tokenizer = mini()
    sampling = Sampling(40, 0.0)
    found = own_loops(model.eval(), PROMPTS, tokenizer=tokenizer, sampling=sampling)
    every = generate(model, PROMPTS, tokenizer=tokenizer, sampling=sampling, batch=32)
    loops = [(text, one) for text, one in zip(PROMPTS, every, strict=True) if find_repeats(one.ids)]
    assert found == loops
    assert 0 < len(loops) < len(PROMPTS)


@pytest.fixture
def found_file(group: str, tmp_path: Path) -> Path:
    rows = tuple(
        RepetitionFeature(qsl.FeatureRef(group, LAYER, n), 1.0, 1.0, 1.0, 1.0, 2.0)
        for n in (LOOPING, 3)
    )
    RepetitionFeatures(rows, {}).save(tmp_path / "found.json")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS), "utf-8"
    )
    return tmp_path / "found.json"


@pytest.mark.slow
def test_screening_writes_a_plan_or_refuses(
    group: str, found_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, plan = found_file.with_name("prompts.jsonl"), found_file.with_name("plan.json")
    common = [
        "train",
        "repetition",
        "screen",
        str(found_file),
        str(prompts),
        "--new-tokens",
        "20",
        "--controls",
        "2",
        "--save-plan",
        str(plan),
        "--model",
        "mini-qwen3",
    ]
    assert main([*common, "--strength", "4", "--temperature", "1"]) == 0
    assert Plan.load(plan) == amplified([qsl.FeatureRef(group, LAYER, LOOPING)], 4.0)
    plan.unlink()
    assert main([*common, "--strength", "0", "--temperature", "1"]) == 1
    assert "so no plan is written" in capsys.readouterr().err
    assert not plan.exists()
    for wrong in (["--temperature", "nan"], ["--strength", "inf"], ["--seed", str(2**70)]):
        with pytest.raises(SystemExit):
            main([*common, *wrong])
    prompts.write_text('{"text": "a"}\n', "utf-8")
    assert main(common) == 1
    assert "expected an object with a prompt" in capsys.readouterr().err


def test_planted_language_features_through_sasft_in_closed_form(group: str, tmp_path: Path) -> None:
    """Feature 5 fires on all Chinese; feature 9 in documents of both languages, as by chance.

    Thresholds are `w x + b` at a language's mean residual; loss and gradient are worked out by
    hand for residuals at a known height above them.
    """
    langs = [("en", "zh")[doc % 2] for doc in range(32)]
    chance = {1: 2.0, 4: 2.0, 7: 2.0, 10: 2.0}  # feature 9 fires in two documents of each

    def document(doc: int) -> list[dict[int, float]]:
        own = {5: 3.0} if langs[doc] == "zh" else {}
        return [own | ({9: chance[doc]} if doc in chance else {})] * 8

    facts = {LAYER: _facts(group)}
    store = build_store(
        tmp_path / "store",
        [document(doc) for doc in range(32)],
        {"lang": langs},
        texts=[f"the text of document {doc}" for doc in range(32)],
        group=group,
        layers=(LAYER,),
        saes=facts,
    )
    model, _ = mini()
    table = find_language_features(store, ["zh"], model=model.eval(), shuffles=40)
    assert table.features[0].ref.feature == 5
    assert [f.ref.feature for f in table.of(LAYER, ["zh"], 2)] == [5]

    ids = torch.arange(8)[None]  # every planted document has these tokens, the first one left out
    with torch.no_grad():
        kept: dict[str, torch.Tensor] = {}
        handle = model.model.layers[LAYER].register_forward_hook(
            lambda module, args, out: kept.update(x=out[0] if isinstance(out, tuple) else out)
        )
        model(ids)
        handle.remove()
    row = qsl.load_sae(f"{group}/{LAYER}").encoder_row(5).detach().double()
    norms = kept["x"][0].norm(dim=-1)
    counted = (norms <= 10 * norms[1:].median()) & (torch.arange(8) > 0)
    level = float(kept["x"][0][counted].double().mean(0) @ row)
    assert table.features[0].pre_activation == pytest.approx({"en": level, "zh": level}, rel=1e-4)

    config = SASFTConfig(**settings(tmp_path), layers=[LAYER], targets=["zh"])
    with pytest.warns(UserWarning, match="left out of the loss"):
        penalty = build_penalty(model, config, table)
    heights = torch.tensor([2.0, 0.5, -1.0, 4.0], dtype=torch.float64)  # above the threshold
    x = ((level + heights)[:, None] * row / row.square().sum()).float()[None].requires_grad_()
    languages = torch.tensor([[0, 0, 0, 1]])  # the last token is Chinese: it costs nothing
    loss = penalty.loss({LAYER: x}, languages, torch.ones(1, 4, dtype=torch.bool))
    assert loss.item() == pytest.approx((2.0 + 0.5) / (3 + 1), rel=1e-3)
    loss.backward()
    expected: Any = torch.zeros(4, WIDTH)
    expected[:2] = row.float() / (3 + 1)
    torch.testing.assert_close(x.grad[0], expected)  # type: ignore[index]


def _facts(group: str) -> Any:
    from qwen_scope_lens.stores import SAEFacts

    return SAEFacts(f"{group}/{LAYER}", D_SAE, 4, "0" * 64)
