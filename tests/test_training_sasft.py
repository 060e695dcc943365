"""The SASFT loss and trainer: the formula, its gradient, and plain SFT when lambda is 0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model
from training_data import GROUP, LANGUAGES, examples, losses, mini, settings, table
from trl import SFTConfig, SFTTrainer

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import BadCorpus, BadFile, UnknownName, WrongModel
from qwen_scope_lens.train import (
    FeatureRows,
    LanguageFeatures,
    Penalty,
    SASFTConfig,
    SASFTTrainer,
    record_residuals,
)
from qwen_scope_lens.train.penalty import require_graph
from qwen_scope_lens.train.sasft import build_penalty, counted_tokens

FEATURES = {7: (3, 40), 5: (11,)}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def trainer(folder: Path, level: float = 0.0, data: Any = None, **changes: Any) -> SASFTTrainer:
    own = {"lam": 1.0, "layers": [-1, 5], "targets": ["zh"], **changes}
    model, tokenizer = mini()
    return SASFTTrainer(
        model,
        SASFTConfig(**settings(folder, **own)),
        language_features=table(FEATURES, level),
        train_dataset=data if data is not None else examples(),
        processing_class=tokenizer,
    )


def test_rows_are_the_saes_own_pre_activations() -> None:
    sae = qsl.load_sae(f"{GROUP}/7")
    x = torch.randn(4, 3, 128)
    found = FeatureRows.of(sae, [3, 40]).pre_activations(x)
    torch.testing.assert_close(found, sae.pre_activations(x, [3, 40]))
    shifted = qsl.load_sae(f"{GROUP}/7", apply_b_dec_to_input=True)
    found = FeatureRows.of(shifted, [3]).pre_activations(x)
    torch.testing.assert_close(found, shifted.pre_activations(x, [3]), atol=1e-4, rtol=1e-4)
    half = FeatureRows.of(sae, [3]).pre_activations(x.bfloat16())
    assert half.dtype == torch.float32


def test_the_loss_is_the_formula() -> None:
    """Word by word in float64: a loop over layers, tokens and features."""
    torch.manual_seed(0)
    rows = {layer: FeatureRows(torch.randn(2, 6), torch.randn(2)) for layer in (1, 4)}
    limits = {layer: torch.randn(3, 2) for layer in rows}
    limits[4][2, 1] = float("inf")  # the feature is language 2's own
    residuals = {layer: torch.randn(2, 5, 6) for layer in rows}
    languages = torch.randint(0, 3, (2, 5))
    languages[0, 0] = 2
    counted = torch.rand(2, 5) > 0.3
    counted[0, 0] = True
    expected = 0.0
    for layer, row in rows.items():
        total, terms = 0.0, 0
        for b in range(2):
            for t in range(5):
                for m in range(2):
                    limit = float(limits[layer][languages[b, t], m])
                    if not counted[b, t] or limit == float("inf"):
                        continue
                    pre = row.weight[m].double() @ residuals[layer][b, t].double() + row.bias[m]
                    total += max(0.0, float(pre) - limit)
                    terms += 1
        expected += total / (terms + 1)
    found = Penalty(rows, limits).loss(residuals, languages, counted)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    nothing = Penalty(rows, limits).loss(residuals, languages, torch.zeros_like(counted))
    assert float(nothing) == 0


def test_the_gradient_is_that_of_the_formula() -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    rows = FeatureRows(torch.randn(2, 6).double(), torch.randn(2).double())
    rows_32 = FeatureRows(rows.weight.float(), rows.bias.float())
    limit = torch.zeros(1, 2)

    def loss(values: torch.Tensor) -> torch.Tensor:
        found = Penalty({0: rows_32}, {0: limit}).loss(
            {0: values}, torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
        )
        return found.double()

    loss(x).backward()
    assert x.grad is not None
    step = 1e-2
    for place in [(0, 0, 0), (0, 2, 3), (0, 3, 5)]:
        up, down = x.detach().clone(), x.detach().clone()
        up[place] += step
        down[place] -= step
        slope = float(loss(up) - loss(down)) / (2 * step)
        assert float(x.grad[place]) == pytest.approx(slope, abs=2e-3)


@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "Qwen3_5ForCausalLM", "Qwen3MoeForCausalLM"])
def test_gradients_reach_the_model_and_stop_at_the_saes(kind: str) -> None:
    model = make_model(kind).train()
    rows = FeatureRows(torch.randn(2, 32, requires_grad=False), torch.zeros(2))
    ids = torch.randint(0, 250, (2, 7))
    with record_residuals(model, [1]) as residuals:
        model(ids)
    assert not any(layer._forward_hooks for layer in model.model.layers)
    counted = torch.ones(2, 7, dtype=torch.bool)
    Penalty({1: rows}, {1: torch.full((1, 2), -1e9)}).loss(
        residuals, torch.zeros(2, 7, dtype=torch.long), counted
    ).backward()
    moved = {
        number: any(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())
        for number, layer in enumerate(model.model.layers)
    }
    assert moved == {0: True, 1: True, 2: False, 3: False}
    assert rows.weight.grad is None


def test_the_label_shift() -> None:
    """The residual that predicts a response token counts, the last one predicts nothing."""
    labels = torch.tensor([[-100, -100, 5, 6, 7, -100]])
    languages = torch.zeros_like(labels)
    assert counted_tokens(labels, languages, "predicting").int().tolist() == [[0, 1, 1, 1, 0, 0]]
    assert counted_tokens(labels, languages, "response").int().tolist() == [[0, 0, 1, 1, 1, 0]]
    languages[0, 1] = -1  # a pad of the collator
    assert counted_tokens(labels, languages, "predicting").int().tolist() == [[0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"packing": True, "max_length": 64}, marks=pytest.mark.slow),
        pytest.param({"padding_free": True, "max_length": None}, marks=pytest.mark.slow),
        pytest.param(
            {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "bf16": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_lambda_zero_is_plain_sft_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, tokenizer = mini()
    plain = SFTTrainer(
        model,
        SFTConfig(**settings(tmp_path / "plain", **changes)),
        train_dataset=examples(),
        processing_class=tokenizer,
    )
    plain.train()
    ours = trainer(tmp_path / "ours", lam=0.0, **changes)
    ours.train()
    assert losses(ours) == losses(plain)
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = trainer(tmp_path / "other", lam=1.0, **changes)
    other.train()
    assert losses(other) != losses(plain)


@pytest.mark.slow
def test_checkpointed_activations_give_the_same_gradient(tmp_path: Path) -> None:
    runs = [trainer(tmp_path / str(on), gradient_checkpointing=on) for on in (False, True)]
    for run in runs:
        run.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_accumulated_batches_weigh_as_one(tmp_path: Path) -> None:
    """Two micro-batches give the mean of their penalties, not the sum."""
    one = trainer(tmp_path / "a", per_device_train_batch_size=1, gradient_accumulation_steps=1)
    two = trainer(
        tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1
    )
    plain = trainer(
        tmp_path / "c",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=1,
        lam=0.0,
    )
    for each in (one, two, plain):
        each.args.learning_rate = 0.0
        each.train()
    penalties = losses(one, "penalty")
    assert losses(two)[0] - losses(plain)[0] == pytest.approx(sum(penalties) / 2, rel=1e-3)


@pytest.mark.slow
def test_the_feature_falls_and_others_do_not(tmp_path: Path) -> None:
    """On English and Russian text the pre-activation falls; other features stay near."""
    data = examples(24).filter(lambda row: row["language"] != "zh", keep_in_memory=True)
    texts = [row["prompt"] + row["completion"] for row in data]
    sae = qsl.load_sae(f"{GROUP}/7")
    others = list(range(100, 160))

    def mean(model: Any) -> tuple[float, torch.Tensor]:
        read = qsl.capture(model.eval(), texts, [7], tokenizer=mini()[1])
        pre = sae.pre_activations(read.residuals[7], [*FEATURES[7], *others]).mean(dim=0)
        return float(pre[:2].mean()), pre[2:]

    run = trainer(tmp_path, data=data, max_steps=12, layers=[7], lam=2.0, learning_rate=3e-4)
    target, rest = mean(run.model)
    run.train()
    target_after, rest_after = mean(run.model)
    fell = target - target_after
    assert fell > 0
    assert fell > 3 * float((rest - rest_after).abs().median())


def test_text_in_the_language_itself_costs_nothing(tmp_path: Path) -> None:
    data = examples(24).filter(lambda row: row["language"] == "zh", keep_in_memory=True)
    run = trainer(tmp_path, data=data, level=-1e6)
    run.train()
    assert losses(run, "penalty") == [0.0, 0.0]


def test_thresholds(tmp_path: Path) -> None:
    model, _ = mini()
    config = SASFTConfig(**settings(tmp_path), layers=[-1], targets=["zh"], features_per_layer=1)
    found = build_penalty(model, config, table(FEATURES, 2.5))
    assert found.rows[7].weight.shape == (1, 128)
    assert found.thresholds[7].tolist() == [[2.5], [2.5], [float("inf")]]
    config.threshold = "zero"
    found = build_penalty(model, config, table(FEATURES, 2.5))
    assert found.thresholds[7].tolist() == [[0.0], [0.0], [float("inf")]]


def test_features_below_chance_stay_out_of_the_loss(tmp_path: Path) -> None:
    model, _ = mini()
    good, poor = table({7: (3,)}).features[0], table({7: (40,)}).features[0]
    mixed = LanguageFeatures("mini-qwen3", (good, replace(poor, chance=5.0)), {})
    config = SASFTConfig(**settings(tmp_path), layers=[7], targets=["zh"])
    with pytest.warns(UserWarning, match=r"7/40 is left out.*is 1, chance reaches 5"):
        found = build_penalty(model, config, mixed)
    assert torch.equal(found.rows[7].weight, FeatureRows.of(qsl.load_sae(f"{GROUP}/7"), [3]).weight)
    assert found.thresholds[7].shape == (3, 1)
    config.below_chance = True
    assert build_penalty(model, config, mixed).thresholds[7].shape == (3, 2)


@pytest.mark.slow
def test_lora_and_resuming(tmp_path: Path) -> None:
    from peft import LoraConfig

    def adapted() -> SASFTTrainer:
        model, tokenizer = mini()
        return SASFTTrainer(
            model,
            SASFTConfig(**settings(tmp_path, save_strategy="steps", save_steps=1), layers=[7]),
            language_features=table(FEATURES),
            train_dataset=examples(),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )

    run = adapted()
    run.train()
    trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    again = adapted()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, parameter in again.model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], msg=name)


def test_what_would_train_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongModel, match=r"layers \[5\] carry no gradient.*use_reentrant"):
        require_graph({5: torch.zeros(2)})
    with pytest.raises(WrongModel, match="expected a SASFTConfig"):
        SASFTTrainer(mini()[0], SFTConfig(**settings(tmp_path)), language_features=table(FEATURES))


def test_wrong_data_and_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadCorpus, match=r"no column 'language'.*prompt"):
        trainer(tmp_path, data=examples().remove_columns("language"))
    other = examples().map(lambda row: {**row, "language": "fr"})
    with pytest.raises(UnknownName, match=r"'fr'.*en, ru, zh"):
        trainer(tmp_path, data=other)
    with pytest.raises(UnknownName, match=r"no feature of 'zh' in layer 4.*zh in layer 5"):
        trainer(tmp_path, layers=[4])
    with pytest.raises(UnknownName, match="no feature of 'ko'"):
        trainer(tmp_path, targets=["ko"])
    with pytest.raises(UnknownName, match="layer 9 is not in"):
        trainer(tmp_path, layers=[9])
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="lam"):
            SASFTConfig(**settings(tmp_path), lam=wrong)
    with pytest.raises(ValueError, match="whole numbers"):
        SASFTConfig(**settings(tmp_path), layers=[1.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="positions 'all'"):
        SASFTConfig(**settings(tmp_path), positions="all")  # type: ignore[arg-type]
    with pytest.raises(WrongModel, match="width 128"):
        build_penalty(
            make_model(num_hidden_layers=8),
            SASFTConfig(**settings(tmp_path), layers=[7]),
            table(FEATURES),
        )


def test_the_table_keeps_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table(FEATURES, 0.25).save(path)
    assert LanguageFeatures.load(path) == table(FEATURES, 0.25)
    text = path.read_text("utf-8")
    path.write_text(text.replace('"monolinguality"', '"other"', 1), "utf-8")
    with pytest.raises(BadFile, match="incomplete or damaged"):
        LanguageFeatures.load(path)
    path.write_text(text.replace('"held_out": 1.0', '"held_out": NaN', 1), "utf-8")
    with pytest.raises(BadFile, match="not finite"):
        LanguageFeatures.load(path)
    assert table(FEATURES).languages == LANGUAGES
    assert table(FEATURES).layers == (5, 7)
