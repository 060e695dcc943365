"""FeatureRuleClassifier: scikit-learn's contract, the paper's equations, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.feature_selection import VarianceThreshold
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import check_estimator

from qwen_scope_lens.bench import footprint
from qwen_scope_lens.classify import FeatureRuleClassifier
from qwen_scope_lens.classify.feature_choice import rate_differences
from qwen_scope_lens.classify.pooled import LayerFacts, Pooled, Source, stack_layers
from qwen_scope_lens.classify.rules import RULES, f1_of
from qwen_scope_lens.compare import match_activations
from qwen_scope_lens.errors import (
    BadFile,
    BadPlan,
    LayerOutOfRange,
    StoreMismatch,
    TooLittleData,
)
from qwen_scope_lens.features.contrast import contrast
from qwen_scope_lens.synth.targets import documents_firing

SAE = "mini-qwen3/w1k-l0-16"
D_SAE = 1024


def facts(layer: int, sha256: str = "a") -> LayerFacts:
    return LayerFacts(f"{SAE}/{layer}", D_SAE, 16, sha256)


def planted(n: int = 400, seed: int = 0, layers: tuple[int, ...] = (2, 5, 6)) -> tuple[Any, Any]:
    """Sparse maxima; on layer 5 feature 10 fires on 80% of the positive documents and feature 11
    on 60%, on layer 6 feature 20 on 70%; all three on 5% of the others."""
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.5
    blocks = []
    for layer in layers:
        fires = rng.random((n, D_SAE)) < 0.02
        for of, feature, rate in ((5, 10, 0.8), (5, 11, 0.6), (6, 20, 0.7)):
            if of == layer:
                fires[:, feature] = rng.random(n) < np.where(truth, rate, 0.05)
        blocks.append(csr_matrix((fires * rng.uniform(0.5, 3, fires.shape)).astype(np.float32)))
    source = Source("mini-qwen3", tuple(map(facts, layers)))
    return stack_layers(blocks, source), truth


@pytest.mark.parametrize("rule", RULES)
def test_scikit_learns_own_checks(rule: str) -> None:
    """All of check_estimator but one check: the array API, which scipy needs a variable for."""
    results = check_estimator(FeatureRuleClassifier(rule=rule), on_fail=None)
    unpassed = {r["check_name"]: str(r["exception"]) for r in results if r["status"] != "passed"}
    assert set(unpassed) <= {"check_array_api_input"}, unpassed
    assert Counter(r["status"] for r in results)["passed"] >= 50


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([0.0, 0.7]))
def test_the_papers_equations(seed: int, top_k: int, threshold: float) -> None:
    """Equations 13 to 15 written out document by document."""
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(4, 30)), int(rng.integers(1, 12))
    x = np.maximum(0, rng.normal(size=(n, d))).astype(np.float32)
    truth = np.arange(n) % 2 == 0
    clf = FeatureRuleClassifier(top_k=top_k, threshold=threshold).fit(csr_matrix(x), truth)
    delta = []
    for f in range(d):
        yes = sum(x[i, f] > threshold for i in range(n) if truth[i]) / truth.sum()
        no = sum(x[i, f] > threshold for i in range(n) if not truth[i]) / (~truth).sum()
        delta.append(yes - no)
    order = sorted(range(d), key=lambda f: (-round(delta[f], 12), f))
    chosen = [f for f in order[:top_k] if delta[f] > 1e-12] or order[:1]
    assert list(clf.features_) == chosen
    assert clf.differences_ == pytest.approx([delta[f] for f in chosen])
    expected = [any(x[i, f] > threshold for f in chosen) for i in range(n)]
    assert clf.predict(x).tolist() == expected


def test_layer_by_the_largest_difference_and_several_layers() -> None:
    X, y = planted()
    clf = FeatureRuleClassifier(top_k=2).fit(X, y)
    assert clf.features_ == (f"{SAE}/5/10", f"{SAE}/5/11")
    assert max(clf.layer_differences_, key=clf.layer_differences_.__getitem__) == 5
    many = FeatureRuleClassifier(top_k=1, n_layers=2).fit(X, y)  # equation 17
    assert many.features_ == (f"{SAE}/5/10", f"{SAE}/6/20")
    fires = X.matrix[:, [D_SAE + 10, 2 * D_SAE + 20]].toarray() > 0
    assert (many.predict(X) == fires.any(1)).all()
    assert FeatureRuleClassifier(layer=6, top_k=1).fit(X, y).features_ == (f"{SAE}/6/20",)
    among = FeatureRuleClassifier(layer=[2, 6], top_k=1).fit(X, y)
    assert among.features_ == (f"{SAE}/6/20",)


def test_works_where_scikit_learn_estimators_do() -> None:
    X, y = planted()
    clf = FeatureRuleClassifier()
    assert clone(clf.set_params(top_k=3)).get_params() == clf.get_params()
    # Named layers go through the splitters as arrays do.
    assert cross_val_score(clf, X, y, cv=3, scoring="f1").min() > 0.7
    assert cross_val_predict(clf, X, y, cv=3, method="decision_function").shape == (len(y),)
    grid = {"rule": ["or", "thresholds"], "top_k": [1, 2, 64]}
    search = GridSearchCV(clf, grid, cv=3, scoring="f1").fit(X, y)
    assert search.best_params_["top_k"] in (1, 2) or search.best_params_["rule"] == "thresholds"
    assert search.best_estimator_.source_ is not None
    pipe = make_pipeline(VarianceThreshold(), FeatureRuleClassifier())
    assert cross_val_score(pipe, X.matrix, y, cv=3).mean() > 0.7
    blobs, kind = make_blobs(120, centers=3, random_state=0)
    several = OneVsRestClassifier(FeatureRuleClassifier("tree", top_k=2)).fit(blobs, kind)
    assert (several.predict(blobs) == kind).mean() > 0.8


def test_text_labels_and_sparse_equals_dense() -> None:
    X, y = planted(120)
    names = np.where(y, "rude", "polite")
    clf = FeatureRuleClassifier().fit(X.matrix, names)
    assert list(clf.classes_) == ["polite", "rude"]
    dense = FeatureRuleClassifier().fit(X.matrix.toarray(), names)
    assert (clf.predict(X.matrix.toarray()) == dense.predict(X.matrix)).all()
    assert ((clf.decision_function(X.matrix) > 0) == (clf.predict(X.matrix) == "rude")).all()


def test_own_thresholds_never_lose_on_discovery() -> None:
    """The OR rule falls as features are added; with own thresholds it cannot."""
    X, y = planted()
    falling, kept = [], []
    for top_k in (1, 2, 8, 64):
        falling.append(f1_of(FeatureRuleClassifier(top_k=top_k).fit(X, y).predict(X), y))
        own = FeatureRuleClassifier("thresholds", top_k=top_k, layer=5).fit(X, y)
        kept.append(f1_of(own.predict(X), y))
    assert falling[-1] < max(falling) - 0.1
    assert kept == sorted(kept)


def test_k_of_n() -> None:
    X, y = planted()
    values = X.matrix[:, [D_SAE + 10, D_SAE + 11]].toarray()
    both = FeatureRuleClassifier("k-of-n", at_least=2).fit(X, y)
    assert (both.predict(X) == (values > 0).all(1)).all()
    chosen = FeatureRuleClassifier("k-of-n", top_k=2).fit(X, y)
    scores = [f1_of((values > 0).sum(1) >= k, y) for k in (1, 2)]
    assert chosen.rule_.at_least == 1 + int(np.argmax(scores))
    with pytest.raises(TooLittleData, match="at_least=3"):
        FeatureRuleClassifier("k-of-n", top_k=2, at_least=3).fit(X, y)


def test_the_tree_decides_as_scikit_learns() -> None:
    X, y = planted()
    clf = FeatureRuleClassifier("tree", top_k=20, layer=5).fit(X, y)
    delta = FeatureRuleClassifier("or", top_k=D_SAE, layer=5).fit(X, y)
    assert clf.features_[0] in delta.features_
    columns = [X.column(address) for address in clf.features_]
    values = X.matrix[:, columns].toarray()
    theirs = DecisionTreeClassifier(max_depth=3, min_samples_leaf=2, random_state=0).fit(values, y)
    assert (theirs.predict(values) == clf.predict(X)).mean() > 0.99


def test_the_logistic_rule_uses_features_of_both_classes() -> None:
    X, y = planted()
    flipped = FeatureRuleClassifier("logistic", top_k=4, layer=5).fit(X, ~y)
    assert f1_of(flipped.predict(X), ~y) > 0.8
    assert min(flipped.rule_.weights) < 0


@pytest.mark.parametrize("rule", RULES)
def test_saving_is_json_and_brings_back_the_same(rule: str, tmp_path: Path) -> None:
    X, y = planted()
    clf = FeatureRuleClassifier(rule, top_k=12, layer=(5, 6), n_layers=2).fit(X, y)
    path = clf.save(tmp_path / "clf.json")
    back = FeatureRuleClassifier.load(path)
    assert np.array_equal(back.decision_function(X), clf.decision_function(X))
    assert back.features_ == clf.features_
    assert clone(back).get_params()["top_k"] == 12
    array = FeatureRuleClassifier(rule).fit(X.matrix, np.where(y, 3, 1))
    again = FeatureRuleClassifier.load(array.save(tmp_path / "array.json"))
    assert np.array_equal(again.predict(X.matrix), array.predict(X.matrix))
    content = json.loads(path.read_text())
    assert content["format"] == "qwen-scope-classifier"
    assert all(address.startswith(SAE) for address in content["features"])
    damages: tuple[dict[str, Any], ...] = (
        {"features": []},
        {"rule": {"kind": "or"}},
        {"source": 3},
        {"classes": [1]},
    )
    for broken in damages:
        path.write_text(json.dumps(content | broken))
        with pytest.raises(BadFile, match="damaged"):
            FeatureRuleClassifier.load(path)
    with pytest.raises(BadFile, match="does not exist"):
        FeatureRuleClassifier.load(tmp_path / "none.json")


def test_another_sae_layer_or_model_is_refused() -> None:
    X, y = planted()
    clf = FeatureRuleClassifier().fit(X, y)
    other = stack_layers([X.layer(5)], Source("mini-qwen3", (facts(5, "b"),)))
    with pytest.raises(StoreMismatch, match="another SAE"):
        clf.predict(other)
    with pytest.raises(StoreMismatch, match=r"only layers \[6\]"):
        clf.predict(X.layers([6]))
    elsewhere = stack_layers([X.layer(5)], Source("Qwen/Qwen3-8B-Base", (facts(5),)))
    with pytest.raises(StoreMismatch, match="activations of mini-qwen3"):
        clf.predict(elsewhere)
    whole = stack_layers([X.layer(5)], Source("mini-qwen3", (facts(5),), keep=False))
    with pytest.raises(StoreMismatch, match="keep=True"):
        clf.predict(whole)
    with pytest.raises(StoreMismatch, match="does not say whose"):
        clf.predict(X.matrix)
    with pytest.raises(StoreMismatch, match="plain array"):
        FeatureRuleClassifier().fit(X.matrix, y).predict(X)
    assert (clf.predict(X.layers([6, 5])) == clf.predict(X)).all()  # order does not matter


def test_bad_input() -> None:
    X, y = planted(60)
    with pytest.raises(TooLittleData, match="one class"):
        FeatureRuleClassifier().fit(X, np.ones(60, dtype=bool))
    with pytest.raises(ValueError, match="Only binary"):
        FeatureRuleClassifier().fit(X, np.arange(60) % 3)
    with pytest.raises(LayerOutOfRange, match="layer 3 is not among"):
        FeatureRuleClassifier(layer=3).fit(X, y)
    with pytest.raises(BadPlan, match="plain array"):
        FeatureRuleClassifier(layer=3).fit(X.matrix, y)
    for wrong in (
        {"rule": "and"},
        {"top_k": 0},
        {"threshold": -1.0},
        {"threshold": float("inf")},
        {"threshold": 1e300},
        {"layer": "best"},
        {"at_least": 0},
    ):
        with pytest.raises(BadPlan):
            FeatureRuleClassifier(**wrong).fit(X, y)
    with pytest.raises(ValueError, match="inconsistent"):
        FeatureRuleClassifier().fit(X, y[:-1])


def test_pooled_indexes_like_an_array() -> None:
    X, _ = planted(20)
    assert X[np.array([3, 1]), ...].docs.tolist() == [3, 1]
    assert len(X[2:5]) == 3
    assert X[np.arange(20) < 4].shape == (4, 3 * D_SAE)
    assert X.address(D_SAE + 10) == f"{SAE}/5/10"
    assert X.column(f"{SAE}/6/20") == 2 * D_SAE + 20
    with pytest.raises(StoreMismatch):
        Pooled(X.matrix, Source("mini-qwen3", (facts(1),)), X.docs)


def test_every_layer_at_once_is_every_layer_alone() -> None:
    X, y = planted()
    for rule in ("or", "logistic"):
        every = FeatureRuleClassifier.of_every_layer(X, y, {"rule": rule, "top_k": 3})
        assert list(every) == [2, 5, 6]
        for layer, clf in every.items():
            alone = FeatureRuleClassifier(rule, top_k=3, layer=layer).fit(X, y)
            assert clf.features_ == alone.features_
            assert np.array_equal(clf.decision_function(X), alone.decision_function(X))
            assert clf.classes_.tolist() == alone.classes_.tolist()


def untidy(dense: np.ndarray, seed: int = 0) -> csr_matrix:
    """The same values with cells in two parts, rows out of order, stored zeros and 64-bit indices:
    all of it allowed by SciPy, where the value of a cell is the sum of its parts."""
    rng = np.random.default_rng(seed)
    rows, columns = np.nonzero(np.ones_like(dense))
    values = dense[rows, columns]
    rows, columns = np.tile(rows, 2), np.tile(columns, 2)
    values = np.concatenate([values + 1, -np.ones_like(values)])  # of a zero: 1 and -1
    order = rng.permutation(len(rows))
    order = order[np.argsort(rows[order], kind="stable")]
    starts = np.concatenate([[0], np.bincount(rows, minlength=len(dense)).cumsum()])
    found = csr_matrix(dense.shape, dtype=dense.dtype)
    found.data, found.indices, found.indptr = (
        values[order],
        columns[order].astype(np.int64),
        starts.astype(np.int64),
    )
    np.testing.assert_array_equal(found.toarray(), dense)
    return found


def same_arrays(X: csr_matrix, before: list[np.ndarray]) -> bool:
    now = (X.data, X.indices, X.indptr)
    return all(np.array_equal(a, b) for a, b in zip(before, now, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_a_matrix_with_cells_in_parts_is_its_sum(rule: str, threshold: float) -> None:
    """Firing rates, rules and decisions as on the dense array; the caller's matrix stays."""
    rng = np.random.default_rng(1)
    dense = (rng.integers(0, 4, (60, 7)) * (rng.random((60, 7)) < 0.4)).astype(np.float32)
    y = rng.random(60) < 0.3 + 0.5 * (dense[:, 3] > 0)
    X = untidy(dense)
    before = [part.copy() for part in (X.data, X.indices, X.indptr)]
    one, other = (
        FeatureRuleClassifier(rule, top_k=3, threshold=threshold).fit(x, y) for x in (dense, X)
    )
    assert other.features_ == one.features_
    assert np.array_equal(other.differences_, one.differences_)
    np.testing.assert_allclose(other.decision_function(X), one.decision_function(dense), 1e-12)
    assert same_arrays(X, before)
    source = Source("mini-qwen3", (LayerFacts(f"{SAE}/2", 7, 4, "a"),))
    named = [
        FeatureRuleClassifier(rule, top_k=3, threshold=threshold).fit(stack_layers([x], source), y)
        for x in (csr_matrix(dense), X)
    ]
    assert np.array_equal(named[0].differences_, named[1].differences_)
    assert same_arrays(X, before)


def test_cells_in_parts_everywhere_else() -> None:
    """Rankings, footprints, coverage and matches count cells, not what is stored of them."""
    rng = np.random.default_rng(2)
    dense = rng.integers(0, 3, (80, 12)).astype(np.float32)
    X, plain, positive = untidy(dense), csr_matrix(dense), rng.random(80) < 0.4
    before = X.data.copy()
    for name, values in vars(contrast(plain, positive)).items():
        np.testing.assert_array_equal(getattr(contrast(X, positive), name), values, err_msg=name)
    assert (footprint("b", X).items != footprint("b", plain).items).nnz == 0
    assert footprint("b", X).counts.tolist() == (dense > 0).sum(0).tolist()
    assert documents_firing(X, 1.0).tolist() == (dense > 1).sum(0).tolist()
    assert rate_differences(X, positive, 1.0).tolist() == (
        rate_differences(plain, positive, 1.0).tolist()
    )
    one, other = match_activations(X, plain), match_activations(plain, plain)
    np.testing.assert_array_equal(one.score, other.score)
    assert np.array_equal(X.data, before)


@pytest.mark.parametrize(
    "names",
    [
        np.array(["a", "bcd"], dtype=object),
        np.array(["a", "bcd"]),
        np.array([3, 7], dtype=np.int8),
        np.array([False, True]),
        np.array([0.0, 1.0], dtype=np.float32),
    ],
    ids=lambda names: str(names.dtype),
)
def test_labels_of_every_type_survive_the_file(names: np.ndarray, tmp_path: Path) -> None:
    X, y = planted(80)
    clf = FeatureRuleClassifier().fit(X.matrix, names[y.astype(int)])
    path = clf.save(tmp_path / "clf.json")
    back = FeatureRuleClassifier.load(path)
    assert back.classes_.dtype == clf.classes_.dtype == names.dtype
    assert back.predict(X.matrix).tolist() == clf.predict(X.matrix).tolist()
    content = json.loads(path.read_text())
    del content["classes_dtype"]  # a file of before
    path.write_text(json.dumps(content))
    assert FeatureRuleClassifier.load(path).classes_.tolist() == names.tolist()
    for wrong in ("M8[s]", "V9", "nonsense"):
        path.write_text(json.dumps(content | {"classes_dtype": wrong}))
        with pytest.raises(BadFile, match="damaged"):
            FeatureRuleClassifier.load(path)


def test_at_least_says_what_to_change() -> None:
    """One feature tells the classes apart, the others fire alike: a larger top_k does not help."""
    y = np.arange(20) < 10
    X = np.ones((20, 4))
    X[:, 1] = y
    with pytest.raises(TooLittleData, match=r"only 1 is usable.*Set at_least to 1, take another"):
        FeatureRuleClassifier("k-of-n", top_k=2, at_least=2).fit(X, y)
    X[:, 2] = y
    with pytest.raises(TooLittleData, match=r"at_least=3 of 2 features: take more.*top_k, now 2"):
        FeatureRuleClassifier("k-of-n", top_k=2, at_least=3).fit(X, y)
    assert FeatureRuleClassifier("k-of-n", top_k=2, at_least=2).fit(X, y).predict(X).sum() == 10
