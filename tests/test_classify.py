"""Classifiers on stores and texts of the minis: streaming, reasons, refusals, `qsl classify`."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwen_scope_lens as qsl
from qwen_scope_lens import classify
from qwen_scope_lens.classify import (
    FeatureRuleClassifier,
    Task,
    documents_of,
    open_reader,
    pool_layers,
    read_documents,
    source_of,
)
from qwen_scope_lens.classify import predict as predict_module
from qwen_scope_lens.classify.pooled import source_of_store
from qwen_scope_lens.classify.predict import Stream
from qwen_scope_lens.classify.rules import RULES
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import BadText, StoreMismatch
from qwen_scope_lens.labels import Label, LabelPack
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.stores import FeatureStore, extract

MODEL, GROUP = "mini-qwen3", "mini-qwen3/w1k-l0-16"
LAYERS = [2, 5]


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Chinese or not, in short texts; one label is missing."""
    found = [
        {"key": f"d{i}", "text": r["text"][:60], "chinese": r["lang"] == "zh", "lang": r["lang"]}
        for i, r in enumerate(r for r in heldout("prose") if r["lang"] in ("zh", "en", "ru"))
    ]
    odd = {"text": "א ב ג 🙂 " * 3, "lang": "he"}
    return [*found, {"key": "odd", **odd, "chinese": None}]


@pytest.fixture(scope="module")
def corpus(records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classify") / "texts.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), "utf-8")
    return path


@pytest.fixture(scope="module")
def store(records: list[dict[str, Any]], corpus: Path) -> FeatureStore:
    return extract(
        records,
        model=MODEL,
        group=GROUP,
        layers=LAYERS,
        out=corpus.parent / "store",
        max_tokens=64,
        progress=False,
    )


@pytest.fixture(scope="module")
def fitted(store: FeatureStore) -> FeatureRuleClassifier:
    return FeatureRuleClassifier(top_k=2, n_layers=2).fit(store, "chinese")


def test_fit_and_predict_on_stores(store: FeatureStore, fitted: FeatureRuleClassifier) -> None:
    truth = np.array([label is True for label in store.labels("chinese")])
    predicted = fitted.predict(store)
    assert (predicted == truth)[:-1].mean() > 0.85
    assert all(str(f).startswith(f"{GROUP}/") for f in fitted.features_)
    documents = documents_of(store, Task("lang", "zh"), layers=[5], language="lang")
    assert len(documents) == store.n_docs
    assert documents.pooled.shape[1] == 1024
    again = FeatureRuleClassifier(layer=5).fit(documents.pooled, documents.truth)
    assert again.source_ == source_of_store(store, [5])


def test_short_documents_are_said(fitted: FeatureRuleClassifier, tmp_path: Path) -> None:
    """What was fitted on long documents warns of short ones, with the figures."""
    lengths = [2] * 40 + [60] * 60
    rule = FeatureRuleClassifier.load(fitted.save(tmp_path / "c.json")).fitted_
    assert rule.tokens is not None
    assert rule.tokens == fitted.fitted_.tokens
    rule = replace(rule, tokens=(40.0, 130.0))
    assert "40 of 100 documents have fewer than 40 tokens" in rule.shorter(lengths)
    assert "median 130" in rule.shorter(lengths)
    for alike in (None, [], [50] * 9, [2] * 10 + [60] * 90, [2] * 40 + [99] * 60):
        assert rule.shorter(alike) == ""
    assert replace(rule, tokens=None).shorter(lengths) == ""  # a file of an older version


def test_reading_texts_is_reading_a_store(
    store: FeatureStore, records: list[dict[str, Any]]
) -> None:
    """Without a store on disk, the same maxima; and mean residuals as capture gives them."""
    reader = open_reader(source_of_store(store, LAYERS))
    texts = [record["text"] for record in records]
    pooled, means = read_documents(reader, texts, residuals=True)
    there = pool_layers(store)
    assert (pooled.matrix != there.matrix).nnz == 0
    assert pooled.source == there.source
    again = reader.source.reading.document_residuals(reader.model, texts)
    [batch] = reader.captures(texts[3:4])
    for layer in LAYERS:
        assert np.allclose(means[layer], again[layer], atol=1e-4)
        x = batch.residuals[layer][batch.keep(layer)]
        assert np.allclose(means[layer][3], x.double().mean(0).numpy(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("rule", RULES)
def test_streaming_equals_a_full_encode(
    rule: str, store: FeatureStore, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    clf = FeatureRuleClassifier(rule, top_k=6, n_layers=2).fit(store, "chinese")
    clf = FeatureRuleClassifier.load(clf.save(tmp_path / "clf.json"))
    assert clf.source_ is not None
    stream = Stream(clf, open_reader(clf.source_))
    found = list(stream.predict(record["text"] for record in records))
    assert np.array_equal([one.values for one in found], clf.values(store).astype(np.float32))
    assert np.array_equal([one.score for one in found], clf.decision_function(store))
    assert stream.settled["negative"] > stream.settled["encoded"]
    for one, record in zip(found, records, strict=True):
        for evidence in one.evidence:
            assert record["text"][evidence.start : evidence.end] == evidence.token
            assert evidence.position > 0  # the first token does not count
    assert any(one.evidence for one in found)


def test_reasons(
    store: FeatureStore, fitted: FeatureRuleClassifier, records: list[dict[str, Any]]
) -> None:
    doc = int(np.argmax(fitted.decision_function(store)))
    from qwen_scope_lens.address import FeatureRef

    labels = LabelPack([Label(FeatureRef.parse(fitted.features_[0]), "Chinese text")])
    found = fitted.explain(doc, store, labels)
    assert found.score == pytest.approx(fitted.decision_function(store)[doc])
    strongest = max(found.evidence, key=lambda one: one.value)
    assert strongest.value == pytest.approx(found.score)
    layer, feature = (int(part) for part in strongest.feature.split("/")[-2:])
    hits = store.by_feature((layer, feature))
    at = (hits.doc == doc) & (hits.position == strongest.position)
    assert hits.value[at].tolist() == [pytest.approx(strongest.value)]
    assert strongest.token in records[doc]["text"]
    assert any(one.label == "Chinese text" for one in fitted.explain(doc, store, labels).evidence)
    text = fitted.explain(records[doc]["text"])  # opens what it was fitted on
    # A batch of one differs from a batch of many in the last bits.
    assert text.score == pytest.approx(found.score, rel=1e-3)
    assert [one.position for one in text.evidence] == [one.position for one in found.evidence]
    assert str(found).startswith("True (score")
    assert fitted.source_ is not None
    quiet = fitted.explain("x", open_reader(fitted.source_))
    assert "no feature of the rule fires" in str(quiet)
    with pytest.raises(BadText, match="of which store"):
        fitted.explain(3)


def test_other_saes_and_layers_are_refused(
    store: FeatureStore,
    fitted: FeatureRuleClassifier,
    records: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"model": MODEL, "group": GROUP, "progress": False}
    other = extract(records[:4], layers=[5], out=tmp_path / "one", max_tokens=64, **options)
    with pytest.raises(StoreMismatch, match="layer 2 too"):
        fitted.predict(other)
    with pytest.raises(StoreMismatch, match="layer 2 too"):
        fitted.explain(0, other)
    none = extract(records[:4], layers=[7], out=tmp_path / "none", max_tokens=64, **options)
    with pytest.raises(StoreMismatch, match="layer"):
        fitted.predict(none)
    two = extract(records[:4], layers=[2], out=tmp_path / "two", max_tokens=64, **options)
    assert np.array_equal(fitted.predict([two, other]), fitted.predict(store)[:4])
    fewer = extract(records[:3], layers=[2], out=tmp_path / "three", max_tokens=64, **options)
    with pytest.raises(StoreMismatch, match="different documents"):
        fitted.predict([fewer, other])
    hybrid = source_of("mini-qwen3.5", ["mini-qwen3.5/w1k-l0-16/2", "mini-qwen3.5/w1k-l0-16/5"])
    with pytest.raises(StoreMismatch, match="activations of mini-qwen3;"):
        Stream(fitted, open_reader(hybrid))


def command(*words: object) -> int:
    return main(["classify", *map(str, words)])


def test_the_command_line(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fit, predict, report, transfer, efficiency on one file, extracted once."""
    data = tmp_path / "texts.jsonl"
    data.write_text(corpus.read_text("utf-8"), "utf-8")
    read = ["--model", MODEL, "--sae", GROUP, "--layers", "2,5", "--max-tokens", "64"]
    clf, out = tmp_path / "clf.json", tmp_path / "out.jsonl"
    assert command("fit", data, "--label", "chinese", *read, "--out", clf) == 0
    printed = capsys.readouterr().out
    assert "chinese: 40 of 120 documents" in printed
    assert json.loads(clf.read_text())["task"] == {"label": "chinese", "positive": None}
    many = ["--rule", "thresholds", "--top-k", 9]  # the store that was made knows model and SAEs
    assert command("fit", data, "--label", "chinese", *many, "--out", tmp_path / "many.json") == 0
    used = len(json.loads((tmp_path / "many.json").read_text())["features"])
    assert f"own thresholds, 9 features; {used} of the 9 are in it" in capsys.readouterr().out
    assert command("predict", clf, data, "--out", out) == 0
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["key"] for row in rows][-1] == "odd"
    stored = tmp_path / "texts.jsonl.store"
    again = tmp_path / "again.jsonl"
    assert command("predict", clf, stored, "--out", again) == 0
    others = [json.loads(line) for line in again.read_text("utf-8").splitlines()]
    assert [row["predicted"] for row in others] == [row["predicted"] for row in rows]
    assert [row["score"] for row in others] == [row["score"] for row in rows]
    assert sum(row["predicted"] for row in rows) > 20
    assert {e["feature"] for row in rows for e in row["evidence"]} <= set(
        json.loads(clf.read_text())["features"]
    )
    capsys.readouterr()
    assert command("predict", clf, stored) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(rows)

    page = tmp_path / "report.html"
    task = ["--label", "lang", "--positive", "zh"]
    assert command("report", stored, *task, "--page", page, "--at", "recall=0.9") == 0
    printed = capsys.readouterr().out
    for part in ("always yes", "linear probe on the residual", "bag of words", "own thresholds"):
        assert part in printed
        assert part in page.read_text("utf-8")
    assert command("efficiency", stored, *task, "--top-k", 1) == 0
    assert "of full" in capsys.readouterr().out
    rng = np.random.default_rng(0)
    made = [
        {
            "text": f"{lang} {number} " + ("bad 坏" if yes else "good 好") * 4,
            "toxic": int(yes),
            "lang": lang,
        }
        for lang in ("en", "zh")
        for number, yes in enumerate(rng.permutation([True, False] * 10))
    ]
    toxic = tmp_path / "toxic.jsonl"
    toxic.write_text("\n".join(map(json.dumps, made)), "utf-8")
    words = ["--label", "toxic", "--language", "lang", *read]
    assert command("transfer", toxic, *words) == 0
    assert "Overlap of the languages' ten best features" in capsys.readouterr().out


def test_predicting_goes_on_where_it_stopped(
    corpus: Path, fitted: FeatureRuleClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    for module in (predict_module, __import__("sys").modules[Stream.__module__]):
        monkeypatch.setattr(module, "WINDOW", 32)
    predict_module.predict_data(fitted, str(corpus), whole)
    real = Stream.read_batch
    calls = []

    def failing(self: Stream, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(Stream, "read_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        predict_module.predict_data(fitted, str(corpus), broken)
    assert not broken.exists()
    partial = tmp_path / ".broken.jsonl.partial"
    kept = partial.read_text("utf-8").splitlines()
    assert len(kept) > 32
    partial.write_text("\n".join(kept[:-1]) + '\n{"key": "cut', "utf-8")
    monkeypatch.setattr(Stream, "read_batch", real)
    made = predict_module.predict_data(fitted, str(corpus), broken)
    assert made < len(whole.read_text("utf-8").splitlines())
    assert broken.read_text("utf-8") == whole.read_text("utf-8")
    assert not partial.exists()
    partial.write_text("\n".join(kept) + "\n", "utf-8")
    os.utime(corpus, ns=(1, 1))  # the corpus was edited: nothing of before is used
    assert predict_module.predict_data(fitted, str(corpus), broken) == len(lines_of(broken))


def test_labels_that_are_objects_are_written(
    store: FeatureStore, corpus: Path, tmp_path: Path
) -> None:
    """Of a store and of texts alike: names in an array of objects, as pandas gives them."""
    known = np.array([value is not None for value in store.labels("chinese")])
    names = np.where(store.labels("chinese")[known].astype(bool), "zh", "other").astype(object)
    X = pool_layers(store, docs=np.flatnonzero(known))
    clf = FeatureRuleClassifier().fit(X, names)
    again = FeatureRuleClassifier.load(clf.save(tmp_path / "clf.json"))
    assert again.predict(X).dtype == clf.predict(X).dtype == object
    for data in (store.path, corpus):
        out = tmp_path / "out.jsonl"
        predict_module.predict_data(again, str(data), out)
        found = [json.loads(line)["predicted"] for line in lines_of(out)]
        assert set(found) <= {"zh", "other"}
        assert [found[i] for i in np.flatnonzero(known)] == clf.predict(X).tolist()
        out.unlink()


def lines_of(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def test_what_users_get_wrong(
    corpus: Path,
    store: FeatureStore,
    fitted: FeatureRuleClassifier,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "clf.json"
    with pytest.raises(SystemExit, match="2"):
        command("fit", store.path, "--label", "chinese", "--top-k", "0", "--out", out)
    assert "whole number of 1 or more" in capsys.readouterr().err
    read = ["--model", MODEL, "--sae", GROUP, "--layers", "5", "--store", tmp_path / "s"]
    for said, words in (
        ("has no column 'toxic': it has chinese, lang", [corpus, "--label", "toxic", *read]),
        ("is not a feature store", [corpus, "--label", "chinese"]),
        ("lang = fr: there are", [store.path, "--label", "lang", "--positive", "fr"]),
        ("not true or false", [store.path, "--label", "lang"]),
        ("no label 'toxic'", [store.path, "--label", "toxic"]),
        ("layer 3 is not", [store.path, "--label", "chinese", "--layer", "3"]),
        ("expected a layer number", [store.path, "--label", "chinese", "--layer", "best"]),
        ("does not exist", [tmp_path / "none.jsonl", "--label", "chinese", *read]),
    ):
        assert command("fit", *words, "--out", out) == 1
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
    assert command("predict", tmp_path / "none.json", corpus) == 1
    saved = fitted.save(out)
    content = json.loads(saved.read_text())
    content["source"]["layers"][0]["sha256"] = "0" * 64
    saved.write_text(json.dumps(content))
    for data in (corpus, store.path):
        assert command("predict", out, data) == 1
        assert "another SAE" in capsys.readouterr().err
    array = FeatureRuleClassifier().fit(np.eye(4), [0, 1, 0, 1]).save(out)
    assert command("predict", array, corpus) == 1
    assert "plain array" in capsys.readouterr().err


def test_the_papers_experiment_on_files_of_the_same_schema(tmp_path: Path) -> None:
    """One file a language, columns text and toxic, as the data set on the hub has splits: every
    method, transfer, overlap of features, and less data. (`qsl reproduce run toxicity` is all of
    it in one command.)"""
    words = {"en": ("good day", "bad fool"), "ru": ("добрый день", "глупый осёл")}
    discovery, test = {}, {}
    for language, (clean, toxic) in words.items():
        rows = [{"text": f"{(clean, toxic)[i % 2]} {i}", "toxic": i % 2} for i in range(40)]
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        path = tmp_path / f"{language}.jsonl"
        path.write_text("\n".join(lines), "utf-8")
        corpus = qsl.read_corpus(path, text="text", labels=["toxic"])
        out = tmp_path / f"{language}.store"
        store = qsl.extract(corpus, model=MODEL, group=GROUP, layers=[5, 6], out=out)
        discovery[language], test[language] = classify.split(
            classify.documents_of(store, classify.Task("toxic")), 0.2
        )
    rows_of = {name: classify.by_layer(known, test[name]) for name, known in discovery.items()}
    best = [classify.best_test_layer(rows).test.f1 for rows in rows_of.values()]
    assert sum(best) / len(best) > 0.9
    assert "<- largest d" in classify.layer_table(rows_of["en"])
    methods = [*classify.rule_methods(), *classify.baselines(residuals=False)]
    assert "always yes" in {method.name for method in methods}
    for method in methods:
        scores = method.fit(discovery["ru"]).score(test["ru"])
        assert scores.shape == test["ru"].truth.shape
        found = classify.macro([(scores > 0, test["ru"].truth)])
        assert found.low <= found.value <= found.high
    assert "ru (layer" in classify.transfer_table(classify.transfer(discovery, test))
    assert "Jaccard" in classify.overlap_table(classify.overlap(discovery))
    less = classify.efficiency(discovery["en"], test["en"], best_layer=True)
    assert "of full" in classify.efficiency_table(less)
