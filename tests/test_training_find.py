"""Language features and repetition features: planted ones are found, chance is not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from feature_stores import GROUP, LAYER, build_store, random_documents

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import BadFile, TooLittleData, UnknownName
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.stores import FeatureStore
from qwen_scope_lens.train import LanguageFeatures, find_language_features, find_repetition_features
from qwen_scope_lens.train.language_features import mean_activations, monolinguality
from qwen_scope_lens.train.repetition_features import RepetitionFeatures, occurrences

LANGUAGES = ("en", "ru", "zh")
CUT = 20  # tokens of a document in the store


def test_monolinguality_is_the_formula() -> None:
    means = np.array([[3.0, 0.0], [1.0, 4.0], [2.0, 2.0]])
    assert monolinguality(means).tolist() == [[1.5, -3.0], [-1.5, 3.0], [0.0, 0.0]]
    with pytest.raises(TooLittleData, match="two or more"):
        monolinguality(means[:1])


def test_means_are_over_kept_tokens_of_each_group(tmp_path: Path) -> None:
    documents = [[{5: 9.0}, {5: 1.0}, {7: 2.0}], [{5: 9.0}, {5: 3.0}], [{9: 1.0}, {9: 4.0}]]
    store = build_store(tmp_path / "store", documents)
    found = mean_activations(store, LAYER, [[0, 1], [2]])
    assert found[0, 5] == pytest.approx(4 / 3)  # the first tokens (9.0) do not count
    assert found[0, 7] == pytest.approx(2 / 3)
    assert found[1, 9] == 4.0
    assert found.sum() == pytest.approx(4 / 3 + 2 / 3 + 4)


def test_a_planted_language_feature_is_found_and_chance_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qwen_scope_lens.train.thresholds.mean_pre_activations",
        lambda store, refs, docs, model: {ref: dict.fromkeys(docs, 0.0) for ref in refs},
    )
    langs = [LANGUAGES[doc % 3] for doc in range(60)]
    documents = random_documents(60, plant=lambda doc: {77: 2.0} if langs[doc] == "zh" else {})
    texts = [f"document number {doc}" for doc in range(60)]
    store = build_store(tmp_path / "store", documents, {"lang": langs}, texts=texts)
    table = find_language_features(store, ["zh"], shuffles=10)
    best, second = table.features
    assert best.ref == qsl.FeatureRef(GROUP, LAYER, 77)
    assert best.monolinguality == pytest.approx(2.0, abs=0.02)
    assert best.held_out == pytest.approx(2.0, abs=0.02)
    assert best.monolinguality > best.chance
    assert second.monolinguality < best.chance
    assert [feature.stands_out for feature in table.features] == [True, False]
    assert table.of(LAYER, ["zh"], 2) == [best]
    assert table.of(LAYER, ["zh"], 2, below_chance=True) == [best, second]
    nothing = LanguageFeatures(table.model, (second,), {})
    with pytest.raises(TooLittleData, match=r"'zh' in layer 6 stands out.*below_chance"):
        nothing.of(LAYER, ["zh"], 2)
    with pytest.raises(UnknownName, match=r"lang = ko: there are en \(20\), ru \(20\), zh \(20\)"):
        find_language_features(store, ["ko"])
    few = build_store(tmp_path / "few", documents[:7], {"lang": langs[:7]}, texts=texts[:7])
    with pytest.raises(TooLittleData, match="four are the least"):
        find_language_features(few, ["zh"])


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    from qwen_scope_lens.stores import extract

    documents = [
        {"text": record["text"][:150], "lang": language}
        for language in LANGUAGES
        for record in list(heldout("prose", language))[:8]
    ]
    out = tmp_path_factory.mktemp("languages") / "store"
    return extract(
        documents,
        model="mini-qwen3",
        group=GROUP,
        layers=[LAYER],
        out=out,
        progress=False,
        max_tokens=CUT,
    )


def test_the_means_before_topk_are_the_models_up_to_the_stores_limit(
    languages: FeatureStore,
) -> None:
    table = find_language_features(languages, ["zh"], shuffles=3)
    assert table.languages == LANGUAGES
    assert table.layers == (LAYER,)
    model = qsl.load_model("mini-qwen3")
    sae = qsl.load_sae(f"{GROUP}/{LAYER}")
    texts = [record["text"][:150] for record in list(heldout("prose", "ru"))[:8]]
    read = qsl.capture(model, texts, [LAYER], truncate=True, max_tokens=CUT)
    assert any(read.truncated)
    assert table.settings["max_tokens"] == CUT
    x = read.residuals[LAYER][read.keep(LAYER)]
    for feature in table.features:
        expected = float(sae.pre_activations(x, feature.ref.feature).double().mean())
        assert feature.pre_activation["ru"] == pytest.approx(expected, rel=1e-4)
    best = table.features[0]
    assert best.pre_activation["zh"] > max(best.pre_activation["en"], best.pre_activation["ru"])


def test_occurrences_need_the_same_context() -> None:
    #       0  1  2  3  4  5  6  7  8  9
    ids = [1, 2, 3, 1, 2, 3, 1, 2, 3, 9]
    assert occurrences(ids, context=2, min_times=3).tolist() == [[2, 8]]
    assert occurrences(ids, context=1, min_times=3).tolist() == [[1, 7], [2, 8]]
    assert occurrences(ids, context=0, min_times=3).tolist() == [[0, 6], [1, 7], [2, 8]]
    assert occurrences(ids, context=2, min_times=2).tolist() == [[2, 8], [3, 6], [4, 7]]
    assert occurrences([5, 6, 7]).shape == (0, 2)


class _Planted:
    """As much of a store as the search reads: looping documents with a feature that rises."""

    layers = (LAYER,)
    n_docs = 24

    def __init__(self, rise: float, rare: float = 0.0) -> None:
        self.rise, self.rare = rise, rare
        self.read: list[int] = []

    def sae(self, layer: int) -> Any:
        return SimpleNamespace(ref=f"{GROUP}/{layer}", d_sae=1024, k=16)

    def iter_blocks(self, layer: int, docs: Any = None) -> Any:
        """Blocks of two documents, so that they have to be told apart."""
        numbers = [int(doc) for doc in (range(self.n_docs) if docs is None else docs)]
        for pair in (numbers[i : i + 2] for i in range(0, len(numbers), 2)):
            self.read += pair
            ids = [*range(100, 104), *[1, 2, 3, 4] * 4] * len(pair)
            dense = torch.cat([self._document(doc) for doc in pair])
            codes = qsl.SparseCodes.from_dense(dense, 16)
            yield SimpleNamespace(
                doc=np.repeat(pair, 20), token_ids=np.array(ids), matrix=codes.to_scipy_csr
            )

    def _document(self, doc: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(doc)
        dense = (torch.rand(20, 1024, generator=rng) > 0.99) * torch.rand(20, 1024, generator=rng)
        dense[:, 300] = torch.arange(20) * self.rise
        dense[:, 500] = torch.arange(20) * self.rare * (doc % 4 == 0)
        return dense


def test_a_planted_rise_is_found_and_none_where_nothing_rises() -> None:
    found = find_repetition_features(_Planted(0.2), top=5)  # type: ignore[arg-type]
    best = found.features[0]
    assert best.ref.feature == 300
    assert best.rise == pytest.approx(0.2 * 10)  # from 6, 7, 8, 9 to 18, 19, 16, 17
    assert best.held_out == pytest.approx(best.rise)
    assert [feature.stands_out for feature in found.features] == [True, False, False, False, False]
    nothing = find_repetition_features(_Planted(0.0), top=5)  # type: ignore[arg-type]
    assert not any(feature.stands_out and feature.z > 5 for feature in nothing.features)


def test_the_largest_rise_comes_first_even_where_few_documents_show_it() -> None:
    """A planted loop feature: it rises far in a quarter of the documents, z below the line."""
    found = find_repetition_features(_Planted(0.1, rare=2.0), top=5)  # type: ignore[arg-type]
    first, second = found.features[:2]
    assert (first.ref.feature, second.ref.feature) == (500, 300)
    assert first.rise > 3 * second.rise
    assert first.z < first.chance < second.z
    assert [f.rise for f in found.features] == sorted(f.rise for f in found.features)[::-1]


def test_only_chosen_documents_are_read_and_four_are_needed() -> None:
    store = _Planted(0.2)
    find_repetition_features(store, docs=[3, 5, 8, 9], top=1)  # type: ignore[arg-type]
    assert store.read == [3, 5, 8, 9]
    with pytest.raises(TooLittleData, match=r"3 documents repeat.*at least four are needed"):
        find_repetition_features(store, docs=[3, 5, 8])  # type: ignore[arg-type]
    with pytest.raises(TooLittleData, match="0 documents repeat"):
        find_repetition_features(store, min_times=9)  # type: ignore[arg-type]


def test_the_artefact_keeps_its_numbers(tmp_path: Path) -> None:
    found = find_repetition_features(_Planted(0.2), top=3)  # type: ignore[arg-type]
    found.save(tmp_path / "a.json")
    assert RepetitionFeatures.load(tmp_path / "a.json") == found
    text = (tmp_path / "a.json").read_text("utf-8")
    (tmp_path / "a.json").write_text(text.replace('"rise"', '"fall"'), "utf-8")
    with pytest.raises(BadFile, match="damaged"):
        RepetitionFeatures.load(tmp_path / "a.json")
