"""Documents chosen by a label, alike in every command; splits that keep copies together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_stores import LAYER, build_store

from qwen_scope_lens.classify.task import Task
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import TooLittleData, UnknownName
from qwen_scope_lens.features import DocumentLabel, rank
from qwen_scope_lens.features.document_sets import by_label, halves, split
from qwen_scope_lens.site.build import document_heads
from qwen_scope_lens.site.layer import break_down
from qwen_scope_lens.stores import FeatureStore
from qwen_scope_lens.synth.judgements import choose_relevance
from qwen_scope_lens.train import find_language_features

YES = ("True", "true", "TRUE", "1", "1.0", "yes")
N = 80


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Feature 50 fires in every document whose labels say yes."""
    rng = np.random.default_rng(2)
    good = [n % 2 == 0 for n in range(N)]
    documents = [
        [{}, {60: 1.0 + rng.random()} | ({50: 3.0} if good[n] else {}), {int(rng.integers(8)): 1.0}]
        for n in range(N)
    ]
    labels: dict[str, list[Any]] = {
        "bool": [None if n == 79 else value for n, value in enumerate(good)],
        "int": [int(value) for value in good],
        "float": [float(value) for value in good],
        "str": [("True" if n % 4 else "true") if v else "False" for n, v in enumerate(good)],
        "stars": [n % 3 + 0.5 * (n % 2) for n in range(N)],
    }
    path = tmp_path_factory.mktemp("labels") / "store"
    return build_store(path, documents, labels, texts=[f"text number {n}" for n in range(N)])


@pytest.mark.parametrize("label", ["bool", "int", "float", "str"])
@pytest.mark.parametrize("positive", YES)
def test_a_boolean_has_every_spelling_in_every_room(
    store: FeatureStore, label: str, positive: str, capsys: pytest.CaptureFixture[str]
) -> None:
    even = np.arange(0, N, 2)
    groups = by_label(store, label, positive)
    assert groups.docs[groups.positive].tolist() == even.tolist()
    assert len(groups.docs) == (79 if label == "bool" else 80)  # without a label: in no group
    truth, _ = Task(label, positive).truth(store.labels(label))
    assert np.flatnonzero(truth).tolist() == even.tolist()
    command = ["rank", str(store.path), "--label", label, "--positive", positive]
    assert main([*command, "--show", "1"]) == 0
    assert f"mini-qwen3/w1k-l0-16/{LAYER}/50 " in capsys.readouterr().out
    found = choose_relevance(store, None, layers=[LAYER], contrast=f"{label}={positive}")
    assert found is not None
    assert {ref.feature for ref in found} == {50}


def test_the_other_commands_take_every_spelling(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qwen_scope_lens.train.thresholds.mean_pre_activations",
        lambda store, refs, docs, model: {ref: dict.fromkeys(docs, 0.0) for ref in refs},
    )
    for value in YES:
        table = find_language_features(store, [value], label="bool", shuffles=2)
        assert table.features[0].ref.feature == 50
        assert table.features[0].language == "true"
        assert table.languages == ("false", "true")
    command = ["train", "repetition", "find", str(store.path), "--out", str(tmp_path / "out.json")]
    for value in YES:  # they do not repeat anything, so the search is reached and says so
        assert main([*command, "--label", "int", "--positive", value]) == 1


def test_pages_write_a_boolean_in_one_way(store: FeatureStore) -> None:
    [found] = [entry for entry in break_down(store, LAYER) if entry.name == "bool"]
    assert found.values == ("false", "true")
    (best, fired, _), (other, never, _) = found.of(50)
    assert (best, fired, other, never) == ("true", 40, "false", 0)
    [(_, first), *_] = document_heads(store)
    assert ("bool", "true") in first
    assert ("float", "1") in first


def test_an_unknown_value_names_those_that_are_there(
    store: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    there = r"there are true \(40\), false \(39\)"
    with pytest.raises(UnknownName, match=f"bool = maybe: {there}"):
        rank(store, "maybe", label="bool")
    with pytest.raises(UnknownName, match=f"bool = maybe: {there}"):
        Task("bool", "maybe").truth(store.labels("bool"))
    with pytest.raises(UnknownName, match=f"bool = maybe: {there}"):
        find_language_features(store, ["maybe"], label="bool")
    with pytest.raises(UnknownName, match=f"bool = maybe: {there}"):
        choose_relevance(store, None, layers=[LAYER], contrast="bool=maybe")
    command = ["train", "repetition", "find", str(store.path), "--out", "x.json"]
    assert main([*command, "--label", "bool", "--positive", "maybe"]) == 1
    assert "bool = maybe: there are true (40), false (39)" in capsys.readouterr().err


def test_numbers_are_numbers_however_they_are_written(store: FeatureStore) -> None:
    label = DocumentLabel.of(store, "stars")
    assert label.find("2.0") == label.find("2") == label.find(2.0) == {"2"}
    assert label.find("1.50") == {"1.5"}
    with pytest.raises(UnknownName, match="stars = true"):
        label.find("true")  # a label with other values is not a boolean
    with pytest.raises(UnknownName, match=r"no label 'moons'.*bool, int"):
        DocumentLabel.of(store, "moons")


def test_values_that_look_like_a_truth_stay_themselves_beside_others() -> None:
    """`no` is Norwegian in a column of languages."""
    lang = DocumentLabel("lang", ["no", "en", None, float("nan")])
    assert lang.known.tolist() == [True, True, False, False]
    assert lang.isin("no").tolist() == [True, False, False, False]
    with pytest.raises(UnknownName, match="false"):
        lang.isin("false")
    assert DocumentLabel("n", [np.bool_(True), False]).isin("1").tolist() == [True, False]


def test_copies_of_a_text_stand_on_one_side() -> None:
    texts = [f"text {n // 3}" for n in range(60)]
    discovery, held = split(np.arange(60) % 2 == 0, texts, 0.3, seed=1)
    assert held.any()
    assert discovery.any()
    assert not {texts[n] for n in np.flatnonzero(held)} & {
        texts[n] for n in np.flatnonzero(discovery)
    }
    first = halves(texts)
    assert 0 < first.sum() < 60
    for n in range(0, 60, 3):
        assert len(set(first[n : n + 3].tolist())) == 1
    assert halves(["a", "b", None, None]).tolist() == [True, False, True, False]


def test_language_features_are_scored_on_other_texts(tmp_path: Path) -> None:
    """Four copies of one text are one text: half cannot choose and half score."""
    documents = [[{}, {5: 1.0}] for _ in range(12)]
    labels = {"lang": ["en", "zh", "zh"] * 4}
    texts = [f"word {n}" if label == "en" else "the same" for n, label in enumerate(labels["lang"])]
    store = build_store(tmp_path / "store", documents, labels, texts=texts)
    with pytest.raises(TooLittleData, match=r"'zh' has 1 .*four are the least"):
        find_language_features(store, ["zh"])
