"""Scores, rules and experiments against slow formulas and planted truths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.metrics import f1_score, precision_score, recall_score

from qwen_scope_lens.classify import (
    At,
    Documents,
    FeatureRuleClassifier,
    RuleMethod,
    Task,
    best_test_layer,
    by_language,
    by_layer,
    compare,
    efficiency,
    efficiency_table,
    layer_table,
    macro,
    name_of,
    overlap,
    overlap_table,
    report_text,
    scored,
    split,
    transfer,
    transfer_table,
)
from qwen_scope_lens.classify.experiments import subset
from qwen_scope_lens.classify.explain import Evidence, Explanation
from qwen_scope_lens.classify.pooled import LayerFacts, Source, stack_layers
from qwen_scope_lens.classify.report import report_page
from qwen_scope_lens.classify.rules import f1_of
from qwen_scope_lens.classify.scores import cut_for, difference
from qwen_scope_lens.errors import BadPlan, TooLittleData, UnknownName

LAYERS = (3, 6)
LANGUAGES = ("en", "ru", "zh")


def planted(n: int = 360, seed: int = 0) -> Documents:
    """Of layer 6: feature 1 fires on 90% of the positive documents of every language, feature 2
    on those of Russian alone, and features 20 to 83 on a tenth of all documents. Layer 3 is noise.
    The residual of layer 6 has the truth in its first coordinate, the words have it in the text."""
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % 2 == 0
    languages = np.array(LANGUAGES, dtype=object)[np.arange(n) % 3]
    fires = rng.random((n, 1024)) < 0.002
    fires[:, 20:84] = rng.random((n, 64)) < np.where(truth, 0.12, 0.08)[:, None]
    fires[:, 1] = rng.random(n) < np.where(truth, 0.9, 0.05)
    fires[:, 2] = rng.random(n) < np.where(truth & (languages == "ru"), 0.95, 0.0)
    values = (fires * rng.uniform(1, 2, fires.shape)).astype(np.float32)
    noise = ((rng.random((n, 1024)) < 0.02) * 1.5).astype(np.float32)
    facts = tuple(LayerFacts(f"mini-qwen3/w1k-l0-16/{layer}", 1024, 16) for layer in LAYERS)
    pooled = stack_layers([csr_matrix(noise), csr_matrix(values)], Source("mini-qwen3", facts))
    residual = rng.normal(size=(n, 8)).astype(np.float32)
    marked = residual.copy()
    marked[:, 0] += np.where(truth, 2.0, -2.0)
    texts = tuple(f"{'bad' if t else 'good'} word {i % 7} 好 🙂" for i, t in enumerate(truth))
    return Documents(texts, truth, pooled, {3: residual, 6: marked}, languages)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 60))
def test_scores_are_scikit_learns(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    says, truth = rng.random(n) < 0.4, rng.random(n) < 0.5
    found = scored(says, truth)
    assert found.f1 == pytest.approx(f1_score(truth, says, zero_division=0))
    assert found.precision == pytest.approx(precision_score(truth, says, zero_division=0))
    assert found.recall == pytest.approx(recall_score(truth, says, zero_division=0))
    other = rng.random(n) < 0.5
    assert difference(says, other, truth).value == pytest.approx(
        found.f1 - f1_score(truth, other, zero_division=0)
    )
    assert macro([(says, truth), (other, truth)]).value == pytest.approx(
        (found.f1 + f1_score(truth, other, zero_division=0)) / 2
    )


def test_intervals_are_those_of_resampling_documents() -> None:
    """The multinomial shortcut against drawing document numbers, and the paired difference."""
    rng = np.random.default_rng(1)
    truth = rng.random(300) < 0.5
    says, other = truth ^ (rng.random(300) < 0.2), truth ^ (rng.random(300) < 0.3)
    one, two = [], []
    for _ in range(2000):
        rows = rng.integers(0, 300, 300)
        one.append(f1_of(says[rows], truth[rows]))
        two.append(one[-1] - f1_of(other[rows], truth[rows]))
    found = scored(says, truth)
    assert (found.low, found.high) == pytest.approx(np.quantile(one, [0.025, 0.975]), abs=0.006)
    less = difference(says, other, truth)
    assert (less.low, less.high) == pytest.approx(np.quantile(two, [0.025, 0.975]), abs=0.008)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.sampled_from(["precision", "recall"]))
def test_the_operating_point_is_the_best_that_keeps_it(seed: int, n: int, what: str) -> None:
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, 6, n).astype(float), rng.random(n) < 0.5
    truth[0] = True
    best = -1.0
    for cut in np.append(np.unique(scores), -1.0):
        says = scores > cut
        found = scored(says, truth)
        wanted, other = (found.precision, found.recall)[:: 1 if what == "precision" else -1]
        if says.any() and wanted >= 0.75:
            best = max(best, other)
    cut = cut_for(scores, truth, At(what, 0.75))
    if best < 0:
        assert cut is None
    else:
        assert cut is not None
        found = scored(scores > cut, truth)
        wanted, other = (found.precision, found.recall)[:: 1 if what == "precision" else -1]
        assert wanted >= 0.75
        assert other == pytest.approx(best)


def test_the_report_shows_the_fall_of_the_or_rule_and_who_wins() -> None:
    documents = planted()
    discovery, test = split(documents, 0.3)

    def why(classifier: FeatureRuleClassifier, doc: int) -> Explanation:
        seen = Evidence(classifier.features_[0], 1.0, doc, "tok", 0, 3, "planted")
        return Explanation(True, 1.0, (seen,))

    report = compare(discovery, test, at=At.parse("recall=0.8"), why=why)
    f1 = {row.method: row.all.f1 for row in report.rows}
    assert next(iter(f1)) == "OR, 2 features"
    assert f1["always yes"] == pytest.approx(2 / 3, abs=0.01)
    assert f1["bag of words"] == f1["character n-grams"] == 1.0
    assert f1["linear probe on the residual"] > 0.9
    assert f1["difference of means on the residual"] > 0.9
    growth = {g.rule: [s.f1 for s in g.scores] for g in report.growth}
    assert growth["or"][-1] < growth["or"][0] - 0.1
    assert growth["thresholds"][-1] > growth["or"][-1] + 0.05
    assert set(report.languages) == set(LANGUAGES)
    assert max(report.layers, key=report.layers.__getitem__) == 6
    for error in report.errors:
        assert bool(error.features) is not error.truth  # alarms have features, misses have none
    assert any(
        f"'tok', token {e.doc} (planted)" in why for e in report.errors for why in e.features
    )
    text = report_text(report)
    for part in ("always yes", "recall >= 0.8", "mini-qwen3/w1k-l0-16/6/1", "or: precision", "ru"):
        assert part in text
    page = report_page(report).render()
    assert "<svg" in page
    assert "🙂" in page
    assert text.count("always yes") >= 4  # in every table of methods


def test_layers_transfer_overlap_and_efficiency() -> None:
    discovery, test = split(planted(900), 0.3)
    rows = by_layer(discovery, test, {"top_k": 1})
    assert [row.layer for row in rows] == list(LAYERS)
    assert best_test_layer(rows).layer == 6
    assert "<- largest d, best on test" in layer_table(rows)
    known, held = by_language(discovery), by_language(test)
    found = transfer(known, held, {"top_k": 1, "layer": 6})
    at = found.languages.index
    assert found.f1[at("en"), at("zh")] > 0.8
    assert found.f1[at("ru"), at("zh")] < 0.1  # feature 2 is of Russian alone
    assert "fitted on" in transfer_table(found)
    shared = {row.layer: row.mean for row in overlap(known)}
    assert shared[6] > shared[3]
    assert "Jaccard" in overlap_table(overlap(known))
    curve = efficiency(discovery, test, {"top_k": 1}, shares=(0.1, 1.0), draws=2)
    assert curve[-1].of_full == 1.0
    assert curve[0].n == pytest.approx(0.1 * len(discovery), abs=3)
    assert curve[0].of_full > 0.9
    assert "10%" in efficiency_table(curve)


def test_subsets_and_splits_keep_the_classes() -> None:
    documents = planted()
    part = subset(documents, 0.1, 3)
    assert part.truth.mean() == 0.5
    discovery, test = split(documents, 0.2, seed=1)
    assert not set(discovery.pooled.docs) & set(test.pooled.docs)
    assert len(discovery) + len(test) == len(documents)
    for language in LANGUAGES:
        assert test.truth[test.languages == language].mean() == pytest.approx(0.5, abs=0.05)
    with pytest.raises(TooLittleData):
        split(documents.take(np.array([0, 1])), 0.2)
    copies = documents.take(np.repeat(np.arange(100), 3))
    known, held = split(copies, 0.2)
    assert not set(known.texts) & set(held.texts)
    assert len(held) % 3 == 0


def test_labels_become_a_truth_or_a_clear_error() -> None:
    for values in ([True, False, None], [1, 0, None], ["1", "0", None], [1.0, 0.0, None]):
        truth, known = Task("toxic").truth(values)
        assert truth.tolist() == [True, False, False]
        assert known.tolist() == [True, True, False]
    truth, _ = Task("lang", "de").truth(["de", "en", "de"])
    assert truth.tolist() == [True, False, True]
    assert Task("n", "3").truth([3, 4])[0].tolist() == [True, False]
    with pytest.raises(UnknownName, match=r"lang = fr: there are de \(1\), en \(1\)"):
        Task("lang", "fr").truth(["de", "en"])
    with pytest.raises(BadPlan, match="not true or false"):
        Task("lang").truth(["de", "en"])
    with pytest.raises(TooLittleData, match="same answer"):
        Task("toxic").truth([True, True])
    with pytest.raises(TooLittleData, match="no document"):
        Task("toxic").truth([None])
    for wrong in ("precision", "f1=0.5", "recall=2", "precision=x"):
        with pytest.raises(BadPlan):
            At.parse(wrong)


def test_bad_documents() -> None:
    documents = planted(60)
    with pytest.raises(TooLittleData, match="all positive"):
        compare(documents.take(documents.truth), documents)
    with pytest.raises(TooLittleData):
        Documents(documents.texts[:-1], documents.truth, documents.pooled)
    with pytest.raises(BadPlan, match="--language"):
        by_language(Documents(documents.texts, documents.truth, documents.pooled))
    with pytest.raises(TooLittleData, match="two languages"):
        overlap({"en": documents})
    assert name_of({"top_k": 1, "n_layers": 3}) == "OR, 1 feature of each of 3 layers"
    assert RuleMethod("x", {}).fit(documents).score(documents).shape == (60,)
