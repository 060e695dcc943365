"""The pieces that train the minis: rows, splits, texts, n-grams, rules, and one tiny SAE."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_scope_lens.mini import heldout, model_path
from tools.mini import sae as sae_module
from tools.mini.corpus import split_of
from tools.mini.data import batches, padded
from tools.mini.durations import measured, table
from tools.mini.generated import KINDS
from tools.mini.meaning import SEVERAL, best_rule, firing_shares, several
from tools.mini.prose import speaks
from tools.mini.quality import Ngrams, layer_figures, load_saes
from tools.mini.sources import LANGUAGES, SOURCES
from tools.mini.specs import SPECS, build_model

PROSE = {lang: [f"{lang} sentence number {n} of several." for n in range(9)] for lang in LANGUAGES}


def test_batches_hold_every_row_once_and_respect_the_size() -> None:
    rng = random.Random(0)
    rows = [[1] * rng.randint(1, 60) for _ in range(300)]
    made = batches(rows, 256, seed=1)
    assert sorted(number for batch in made for number in batch) == list(range(300))
    assert all(len(batch) * max(len(rows[n]) for n in batch) <= 256 for batch in made)
    assert made == batches(rows, 256, seed=1) != batches(rows, 256, seed=2)


def test_padded_rows_are_masked_behind_their_end() -> None:
    ids, mask = padded([[5, 6, 7], [8]], [1, 0])
    assert ids.tolist() == [[8, 0, 0], [5, 6, 7]]
    assert mask.tolist() == [[True, False, False], [True, True, True]]


def test_translations_of_a_page_fall_into_one_split() -> None:
    families = {source.family for source in SOURCES}
    assert {"libreoffice-help", "debian-reference", "debian-handbook"} <= families
    assert split_of("debian-handbook/sect.squid") == split_of("debian-handbook/sect.squid")
    shares = [split_of(f"page/{n}") for n in range(3000)]
    assert 0.12 < shares.count("test") / 3000 < 0.16


@pytest.mark.parametrize(
    ("text", "lang", "expected"),
    [
        ("The file is in the folder and you can open it.", "en", True),
        ("The file is in the folder and you can open it.", "de", False),
        ("Die Datei ist in dem Ordner und wird nicht geöffnet.", "de", True),
        ("Файл находится в папке и не открыт.", "ru", True),
        ("文件在文件夹中，没有打开。", "zh", True),
        ("ファイルはフォルダにあります。", "zh", False),
        ("ファイルはフォルダにあります。", "ja", True),
        ("파일은 폴더에 있습니다.", "ko", True),
    ],
)
def test_untranslated_paragraphs_are_told_apart(text: str, lang: str, expected: bool) -> None:
    assert speaks(text, lang) is expected


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_generated_documents_are_seeded_and_varied(kind: str) -> None:
    make = KINDS[kind][1]
    first = [make(random.Random(n), PROSE).record() for n in range(40)]
    assert first == [make(random.Random(n), PROSE).record() for n in range(40)]
    assert all(record["domain"] == kind and record["text"] for record in first)
    assert len({record["text"] for record in first}) > 25


def test_arithmetic_lines_are_right() -> None:
    seen = 0
    for n in range(200):
        document = KINDS["arithmetic"][1](random.Random(n), PROSE)
        if document.extra["form"] == "lines":
            for line in document.text.splitlines():
                task, answer = line.split(" = ")
                assert eval(task) == int(answer)
                seen += 1
    assert seen > 100


def test_ngrams_are_distributions() -> None:
    grams = Ngrams([[1, 2, 1, 3, 1, 2], [2, 2, 1]], vocabulary=5)
    assert math.isclose(sum(grams.unigram(t) for t in range(5)), 1.0)
    for first in range(4):
        assert math.isclose(sum(grams.bigram(first, t) for t in range(5)), 1.0)


def test_best_rule_finds_the_planted_feature() -> None:
    shares = torch.rand(2, 60, 8, generator=torch.Generator().manual_seed(0)) * 0.3
    truth = torch.arange(60) % 3 == 0
    shares[1, truth, 5] += 0.4
    rule = best_rule(shares, truth, shares, truth)
    assert (rule.layer, rule.feature, rule.f1) == (1, 5, 1.0)


def test_several_features_see_what_no_single_one_does() -> None:
    """Planted: each of eight features shows the class in a few documents only."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(400) % 2 == 0
    shares = torch.rand(2, 400, 40, generator=generator) * 0.1
    for feature in range(8):
        seen = truth & (torch.rand(400, generator=generator) < 0.4)
        shares[feature % 2, seen, feature] += 0.3
    known, held = (shares[:, :200], truth[:200]), (shares[:, 200:], truth[200:])
    single = best_rule(*known, *held).f1
    together = several(*known, *held)
    assert SEVERAL >= 8
    assert single < 0.75 < 0.9 < together
    shuffled = truth[:200][torch.randperm(200, generator=generator)]
    assert several(known[0], shuffled, *held) < 0.7


def test_durations_add_up_over_interruptions(tmp_path: Path) -> None:
    def interrupted() -> None:
        with measured(tmp_path, "model x"):
            time.sleep(0.02)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    first = json.loads((tmp_path / "durations" / "model x.json").read_text())
    with measured(tmp_path, "model x"):
        time.sleep(0.02)
    second = json.loads((tmp_path / "durations" / "model x.json").read_text())
    assert second["wall"] >= first["wall"] + 0.02 >= 0.04
    assert [line for line in table(tmp_path) if line.startswith("| model x |")]
    assert not list(table(tmp_path / "elsewhere"))


@pytest.fixture(scope="module")
def mini_rows() -> tuple[Any, list[list[int]]]:
    model = AutoModelForCausalLM.from_pretrained(model_path("mini-qwen3")).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path("mini-qwen3"))
    texts = [record["text"] for record in heldout("prose")][:10]
    return model, [row[:48] for row in tokenizer(texts)["input_ids"]]


@pytest.mark.slow
def test_layer_figures_follow_the_formulas(mini_rows: tuple[Any, list[list[int]]]) -> None:
    model, rows = mini_rows
    saes = load_saes("mini-qwen3")
    one = layer_figures(model, saes, rows, rows)[4]
    found, fired = [], set()
    for row in rows:
        with torch.no_grad():
            hidden = model(torch.tensor([row]), output_hidden_states=True).hidden_states[5]
        found.append(hidden[0, 1:].double())
    x = torch.cat(found)
    sae = saes[4]
    pre = torch.relu(x @ sae.W_enc.double() + sae.b_enc.double())
    values, indices = pre.topk(sae.cfg.k)
    fired = set(indices[values > 0].tolist())
    codes = torch.zeros_like(pre).scatter_(1, indices, values)
    error = codes @ sae.W_dec.double() + sae.b_dec.double() - x
    fvu = float(error.square().sum() / (x - x.mean(0)).square().sum())
    assert one.fvu == pytest.approx(fvu, rel=1e-4)
    assert one.l0 == pytest.approx(float((values > 0).sum()) / len(x), rel=1e-6)
    assert one.dead == pytest.approx(1 - len(fired) / sae.cfg.d_sae, abs=1e-6)
    assert one.clean < one.spliced < one.random < one.zeroed
    assert 0.2 < one.floor < one.recovered < 1


def test_firing_shares_count_tokens_but_the_first(mini_rows: tuple[Any, list[list[int]]]) -> None:
    model, rows = mini_rows
    saes = load_saes("mini-qwen3")
    shares = firing_shares(model, saes, rows[:5])
    assert len(rows) >= 5
    assert (shares > 0).any(-1).all()
    for number, row in enumerate(rows[:5]):
        with torch.no_grad():
            hidden = model(torch.tensor([row]), output_hidden_states=True).hidden_states[1]
        expected = (saes[0].encode(hidden[0, 1:]) > 0).float().mean(0)
        assert torch.allclose(shares[0, number], expected, atol=1 / 24 / len(row))


@pytest.mark.parametrize("name", sorted(SPECS))
def test_specs_build_models_of_their_family(name: str) -> None:
    model = build_model(SPECS[name])
    kinds = model.config.layer_types
    assert len(kinds) == SPECS[name].layers >= 6
    assert ("linear_attention" in kinds) == (SPECS[name].family == "qwen3_5")
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 5e6


def test_a_tiny_sae_is_trained_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sae_module, "D_SAE", 64)
    monkeypatch.setattr(sae_module, "K", 8)
    rng = np.random.default_rng(0)
    codes = np.maximum(rng.normal(size=(6000, 40)) - 1.2, 0)
    data = (codes @ rng.normal(size=(40, 16)) * 30 + 100).astype(np.float16)
    tensors = sae_module.train_layer(data, samples=400_000)
    x = torch.from_numpy(data.astype(np.float32))
    acts = planted.model_card_encode(tensors, x, 8).float()
    errors = acts @ tensors["W_dec"].T + tensors["b_dec"] - x
    assert errors.pow(2).sum() < 0.3 * (x - x.mean(0)).pow(2).sum()
    assert (acts == 0).all(0).float().mean() < 0.2
    spec = SPECS["mini-qwen3"]
    sae_module.export(spec, [tensors], tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "topk_sae"
    assert set(torch.load(tmp_path / "layer0.sae.pt")) == {"W_enc", "W_dec", "b_enc", "b_dec"}
