"""Rankings of planted stores: the plant is found, nothing is found where nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
from feature_stores import build_store, random_codes, store_of_dense

import qwen_scope_lens as qsl
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import BadFile, LayerOutOfRange, TooLittleData, UnknownName, WrongShape
from qwen_scope_lens.features import Ranking, rank
from qwen_scope_lens.features.contrast import Correction
from qwen_scope_lens.features.rank import How
from qwen_scope_lens.stores import FeatureStore, extract, pooled_residuals

D_SAE, N_DOCS, TOKENS = 300, 240, 12
PLANT, ANTI = 250, 17


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Layer 2 is noise. In layer 5 a feature fires on half the `zh` documents, one on others."""
    rng = np.random.default_rng(0)
    lang = np.array(["zh", "en", "fr", None], dtype=object)[rng.integers(0, 4, N_DOCS)]
    codes = {layer: random_codes(layer, N_DOCS * TOKENS, D_SAE, popular=3.0) for layer in (2, 5)}
    codes[5][:, [PLANT, ANTI]] = 0
    for doc in range(N_DOCS):
        at = doc * TOKENS + 1 + rng.integers(0, TOKENS - 1)
        if lang[doc] is not None and rng.random() < 0.6:
            codes[5][at, PLANT if lang[doc] == "zh" else ANTI] = 50.0
    folder = tmp_path_factory.mktemp("rank") / "planted"
    return store_of_dense(folder, codes, [TOKENS] * N_DOCS, {"lang": lang.tolist()})


def test_the_plant_is_found_and_holds_on_new_documents(store: FeatureStore) -> None:
    ranking = rank(store, "zh", label="lang")
    assert [row.ref for row in ranking.rows] == [f"mini-qwen3/w1k-l0-16/5/{PLANT}"]
    [row] = ranking.rows
    assert 0.4 < row.rate_difference < 0.85
    assert row.auroc is not None
    assert row.auroc > 0.7
    assert row.held_out_auroc is not None
    assert row.held_out_auroc > 0.65
    assert row.rate_negative < 0.1
    winners, chance, alike = ranking.baselines
    assert winners.mean_auroc == row.held_out_auroc
    assert chance.mean_auroc is not None
    assert abs(chance.mean_auroc - 0.5) < 0.06
    assert alike.features >= 1
    assert alike.mean_auroc is not None
    assert winners.mean_auroc is not None
    assert alike.mean_auroc < winners.mean_auroc
    assert ranking.documents["positive_held_out"] == round(
        0.3 * (store.labels("lang") == "zh").sum()
    )


def test_both_sides_and_an_order_by_rate(store: FeatureStore) -> None:
    ranking = rank(store, "zh", label="lang", both_sides=True, by="rate_difference", layers=5)
    assert {row.ref.split("/")[-1] for row in ranking.rows} == {str(PLANT), str(ANTI)}
    differences = [abs(row.rate_difference) for row in ranking.rows]
    assert differences == sorted(differences, reverse=True)


@pytest.mark.parametrize("correction", get_args(Correction))
def test_shuffled_labels_find_nothing(store: FeatureStore, correction: Correction) -> None:
    """The whole call on labels that mean nothing, and the shuffles that every call makes."""
    rng = np.random.default_rng(3)
    passed = []
    for seed in range(8):
        mask = rng.permutation(store.labels("lang") == "zh")
        ranking = rank(store, mask, seed=seed, correction=correction, shuffles=2)
        passed.append(ranking.found)
    assert sum(n > 0 for n in passed) <= 2  # at 5 % a run: 0.6 % of the time more
    controls = rank(store, "zh", label="lang", shuffles=20, correction=correction).shuffled
    assert np.mean([n > 0 for n in controls.found]) <= 0.2
    assert controls.ceiling < 0.8


@pytest.mark.parametrize("how", get_args(How))
def test_every_pooling_of_documents(store: FeatureStore, how: How) -> None:
    ranking = rank(store, "zh", label="lang", layers=5, pool=how)
    found = {row.ref.split("/")[-1] for row in ranking.rows}
    assert found == (set() if how == "last" else {str(PLANT)})


@pytest.mark.parametrize("where", ["first", "extreme"])
def test_a_plant_on_left_out_tokens_is_left_out(where: str, tmp_path: Path) -> None:
    codes = random_codes(1, 60 * 4, 50)
    planted = np.arange(240) % 4 == (0 if where == "first" else 2)
    codes[planted, 3] = np.where(np.arange(60) < 30, 40.0, 0.0)  # and nowhere else
    codes[~planted, 3] = 0
    extreme = planted if where == "extreme" else None
    store = store_of_dense(tmp_path / "store", {1: codes}, [4] * 60, extreme=extreme)
    assert rank(store, np.arange(30)).found == 0
    assert rank(store, np.arange(30), keep=False).rows[0].ref.endswith("/1/3")


def test_probes_stand_beside_the_features(store: FeatureStore) -> None:
    rng = np.random.default_rng(1)
    told = (store.labels("lang") == "zh")[:, None]
    residual = rng.normal(size=(N_DOCS, 16)) + told * rng.normal(size=16)
    ranking = rank(store, "zh", label="lang", layers=5, residuals={5: residual})
    scores = {(probe.name, probe.on): probe.auroc for probe in ranking.probes}
    assert set(scores) == {
        (name, on)
        for name in ("difference of means", "linear probe")
        for on in ("features", "residual")
    }
    assert scores["linear probe", "residual"] > 0.9
    assert scores["difference of means", "features"] > 0.6
    noise = {5: rng.normal(size=(N_DOCS, 16))}
    chance = rank(store, "zh", label="lang", layers=5, residuals=noise).probes
    assert all(0.2 < probe.auroc < 0.8 for probe in chance if probe.on == "residual")
    with pytest.raises(WrongShape, match="residuals"):
        rank(store, "zh", label="lang", layers=5, residuals={5: residual[:3]})


def test_the_file_says_what_was_asked_and_comes_back(store: FeatureStore, tmp_path: Path) -> None:
    ranking = rank(store, "zh", ["en"], label="lang", layers=5, both_sides=True)
    path = tmp_path / "zh.json"
    ranking.save(path)
    assert Ranking.load(path) == ranking
    content = json.loads(path.read_text())
    assert content["settings"]["negative"] == ["en"]
    assert "Mann-Whitney" in content["settings"]["test"]
    assert content["provenance"]["saes"]["5"]["ref"] == "mini-qwen3/w1k-l0-16/5"
    path.write_text(path.read_text().replace('"rows"', '"lines"'))
    with pytest.raises(BadFile, match="make it again"):
        Ranking.load(path)


def test_a_perfect_feature_survives_the_file(tmp_path: Path) -> None:
    documents = [[{}, {1: 1.0, 2: 1.0} if n < 20 else {1: 1.0}] for n in range(40)]
    texts = [f"text {n}" for n in range(40)]
    ranking = rank(build_store(tmp_path / "store", documents, texts=texts), np.arange(20))
    assert ranking.rows[0].effect == np.inf
    ranking.save(tmp_path / "r.json")
    assert Ranking.load(tmp_path / "r.json") == ranking


def test_the_table_names_features_and_controls(store: FeatureStore) -> None:
    text = str(rank(store, "zh", label="lang").table())
    assert f"mini-qwen3/w1k-l0-16/5/{PLANT}" in text
    assert "shuffled labels" in text
    assert "random features" in text
    ranking = rank(store, "zh", label="lang", fdr=1, residuals=None)
    assert len(ranking.rows) == 50
    assert repr(ranking).startswith("Ranking: lang = zh against all others")
    assert repr(ranking).endswith("... and 45 more")
    assert "... and 47 more" in str(ranking.table(3))
    frame = ranking.to_pandas()
    assert frame["held_out_auroc"].tolist() == [row.held_out_auroc for row in ranking.rows]
    assert ranking._repr_html_().count("<tr>") == 21
    with pytest.warns(DeprecationWarning, match="layers="):
        empty = str(rank(store, np.arange(30), layer=2).table())
    assert "no feature tells the groups apart" in empty


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real store: feature 50 fires in every `zh` document, 60 everywhere, 7 at random."""
    rng = np.random.default_rng(2)
    documents = [
        [{}, {60: 1.0 + rng.random()} | ({50: 3.0} if n < 25 else {}), {int(rng.integers(8)): 1.0}]
        for n in range(80)
    ]
    labels: dict[str, list[Any]] = {
        "lang": ["zh"] * 25 + ["en"] * 55,
        "good": [n % 2 == 0 for n in range(80)],
    }
    path = tmp_path_factory.mktemp("rank") / "store"
    build_store(path, documents, labels, texts=[f"字{n}個word" for n in range(80)])
    return path


def test_the_command_ranks_a_store(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    words = ["rank", str(folder), "--label", "lang", "--positive", "zh", "--out", str(out)]
    assert main(words) == 0
    assert "mini-qwen3/w1k-l0-16/6/50" in capsys.readouterr().out
    [row] = Ranking.load(out).rows
    assert row.held_out_auroc == 1.0
    # Labels that are not text are compared as text.
    assert main(["rank", str(folder), "--label", "good", "--positive", "True"]) == 0
    assert "no feature tells" in capsys.readouterr().out
    assert main(["rank", str(folder), "--label", "lang", "--positive", "de"]) == 1
    assert "there are en (55), zh (25)" in capsys.readouterr().err


def test_the_command_counts_a_store(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stats.parquet"
    assert main(["stats", str(folder), "--feature", "60,1000", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "160 tokens of 80 documents" in shown
    assert "mini-qwen3/w1k-l0-16/6/60: fires on 50.000% of tokens, 100.0% of documents" in shown
    assert "字" in shown
    table = pq.read_table(out)
    assert table["doc_count"].to_pylist()[50] == 25
    assert table["ref"].to_pylist()[60] == "mini-qwen3/w1k-l0-16/6/60"
    assert main(["stats", str(folder), "--feature", "1024"]) == 1
    assert "0..1023" in capsys.readouterr().err


def test_residuals_of_the_store_s_own_model_are_pooled(tmp_path: Path) -> None:
    texts = ["今天天气很好。" * 3, "The weather is fine today, said the man.", "x"]
    store = extract(
        texts,
        model="mini-qwen3",
        group="mini-qwen3/w1k-l0-16",
        layers=[1],
        out=tmp_path / "s",
        max_tokens=12,
        progress=False,
    )
    found = pooled_residuals(store, [1])[1]
    last = pooled_residuals(store, [1], last=True)[1]
    model = qsl.load_model("mini-qwen3", up_to_layer=1)
    for doc, text in enumerate(texts):
        one = qsl.capture(model, [text], [1], max_tokens=12, truncate=True)
        x = one.residuals[1].float().numpy()
        kept = x[one.keep(1).numpy()]
        expected = kept.mean(0) if len(kept) else np.zeros(x.shape[1])
        np.testing.assert_allclose(found[doc], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(last[doc], x[-1], rtol=1e-4, atol=1e-4)


def test_fdr_one_shows_the_best_anyway(store: FeatureStore) -> None:
    ranking = rank(store, np.arange(40), layers=2, fdr=1.0, top=5)
    assert len(ranking.rows) == 5
    assert ranking.found > 5


def test_what_cannot_be_ranked_says_why(store: FeatureStore) -> None:
    with pytest.raises(UnknownName, match="no label 'language'"):
        rank(store, "zh", label="language")
    with pytest.raises(UnknownName, match=r"lang = 中文: there are (en|fr|zh) \(\d+\)"):
        rank(store, "中文", label="lang")
    with pytest.raises(UnknownName, match="both"):
        rank(store, "zh", ["zh", "en"], label="lang")
    with pytest.raises(TooLittleData, match="nothing to compare"):
        rank(store, ["zh", "en", "fr"], label="lang")
    with pytest.raises(TooLittleData, match="positive"):
        rank(store, [0, 1])
    with pytest.raises(LayerOutOfRange):
        rank(store, "zh", label="lang", layers=3)
    with pytest.raises(TooLittleData, match="auroc"):
        rank(store, "zh", label="lang", by="magic")  # type: ignore[arg-type]
