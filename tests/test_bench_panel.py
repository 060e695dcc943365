"""Footprints at the last token only, published panels, and benchmarks cut to one size."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwen_scope_lens as qsl
from qwen_scope_lens.bench import (
    PromptFormat,
    equal_overlap,
    equal_redundancy,
    extract_suite,
    footprint,
    read_panel,
    read_prompts,
)
from qwen_scope_lens.bench.equal_size import spread_enough
from qwen_scope_lens.bench.panel import Scores
from qwen_scope_lens.errors import BadCorpus, BadFile, StoreMismatch, TooLittleData
from qwen_scope_lens.features import pool
from qwen_scope_lens.stores import Document, StoreReader

SAE = "mini-qwen3/w1k-l0-16"


@pytest.fixture(scope="module")
def model() -> Any:
    return qsl.load_model("mini-qwen3", up_to_layer=3)


def test_the_last_token_alone_gives_the_same_footprints(model: Any, tmp_path: Path) -> None:
    texts = ["One two three four five six", "The package manager", "包", "Is 3 + 4 = 7 or not?"]
    prompts = {"a": [Document(str(i), text) for i, text in enumerate(texts)]}
    whole = extract_suite(prompts, model, SAE, [1, 3], tmp_path / "whole", progress=False)
    last = extract_suite(
        prompts, model, SAE, [1, 3], tmp_path / "last", progress=False, last_token=True
    )
    assert last["a"].store.n_tokens == len(texts) < whole["a"].store.n_tokens
    for layer in (1, 3):
        one, other = whole["a"].footprint(layer), last["a"].footprint(layer)
        assert (one.items != other.items).nnz == 0
        # The one stored token of a document is not taken for its first one.
        pooled = pool(last["a"].store, layer, how="max")
        assert (pooled > 0).nnz == other.items.nnz
        assert last["a"].store.by_token(1, layer).keep.all()
    for position in ("-2", "any"):
        with pytest.raises(StoreMismatch, match="--last-token"):
            last["a"].footprint(3, position)
    with pytest.raises(StoreMismatch, match="last token of each document only"):
        StoreReader.of(last["a"].store).document_residuals(model, texts)
    with pytest.raises(StoreMismatch, match="last_token"):
        extract_suite(prompts, model, SAE, [1, 3], tmp_path / "last", progress=False)


def test_answer_choices_get_letters(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"q": "Which?", "options": ["this", "that", 3]}))
    [found] = read_prompts(path, PromptFormat(template="{q}\n{options:letters}\nAnswer:"))
    assert found.text == "Which?\nA. this\nB. that\nC. 3\nAnswer:"
    with pytest.raises(BadCorpus, match="at most 26 answer choices"):
        list(read_prompts(path, PromptFormat(template="{q:letters}")))


KEYS = {"math": ["1", "2", "3"], "law": ["7", "9"]}


def write_answers(path: Path, without: tuple[str, str] = ("", "")) -> None:
    rows = {
        f"model {m}": {
            key: (int(key) + m) % 2 == 0
            for keys in KEYS.values()
            for key in keys
            if (f"model {m}", key) != without
        }
        for m in range(4)
    }
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))


def test_answers_by_item_become_scores(tmp_path: Path) -> None:
    path = tmp_path / "answers.json.gz"
    write_answers(path)
    scores = read_panel(path, KEYS)
    assert scores.benchmarks == ("math", "law")
    assert scores.results["math"].tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert scores.table[0].tolist() == pytest.approx([1 / 3, 0])
    write_answers(path, without=("model 2", "3"))
    said: list[str] = []
    assert len(read_panel(path, KEYS, most_missing=0.1, say=said.append).models) == 3
    assert said == ["model 2 lacks 1 of 5 items and is left out of the panel"]
    said.clear()
    scores = read_panel(path, KEYS, most_missing=0.5, say=said.append)
    assert (len(scores.models), scores.items["math"]) == (4, ("1", "2"))
    assert said == ["math: 1 items lack a result and are left out"]
    with pytest.raises(TooLittleData, match="are these the ids of the results"):
        read_panel(path, {"math": ["x", "y"]})
    path.write_bytes(b"no gzip")
    with pytest.raises(BadFile, match="cannot be read as JSON"):
        read_panel(path, KEYS)


def test_samples_of_lm_eval_become_scores(tmp_path: Path) -> None:
    """A task of its own, a group of two tasks, and a newer run that replaces an older one."""

    def write(model: str, task: str, date: str, right: list[Any], metric: str = "acc") -> None:
        path = tmp_path / model / f"samples_{task}_{date}.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = [json.dumps({"doc_id": i, "doc": {}, metric: x}) for i, x in enumerate(right)]
        path.write_text("\n".join(rows))

    for m in range(3):
        write(f"m{m}", "gsm8k", "2026-01-01T10-00-00.1", [0.0, 0.0, 0.0], "exact_match")
        write(f"m{m}", "gsm8k", "2026-02-01T10-00-00.1", [1.0, 0.0, float(m > 1)], "exact_match")
        write(f"m{m}", "mmlu_law", "2026-01-01T10-00-00.1", [1, float(m > 0)])
        write(f"m{m}", "mmlu_art", "2026-01-01T10-00-00.1", [0, float(m > 1)])
    keys = {"gsm8k": ["0", "1", "2"], "mmlu": ["mmlu_art/1", "mmlu_law/1/0", "mmlu_law/1/1"]}
    scores = read_panel(tmp_path, keys)
    assert scores.models == ("m0", "m1", "m2")
    assert scores.results["gsm8k"].tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert scores.items["mmlu"] == ("mmlu_art/1", "mmlu_law/1")  # choices of a question: one item
    assert scores.results["mmlu"].tolist() == [[0, 0], [0, 1], [1, 1]]
    assert scores.matched(keys).results["mmlu"].shape == (3, 2)
    write("m0", "gsm8k", "2026-03-01T10-00-00.1", ["yes"], "acc")
    with pytest.raises(BadFile, match="expected right or wrong"):
        read_panel(tmp_path, keys)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadFile, match="--log_samples"):
        read_panel(tmp_path / "empty", keys)


def test_at_equal_size_the_number_of_items_no_longer_makes_the_correlation() -> None:
    """Six benchmarks of one kind that differ in size only: R-hat follows the size, until cut."""
    rng = np.random.default_rng(0)
    skill = np.linspace(0.2, 0.8, 10)[:, None]
    sizes = [30, 60, 120, 240, 480, 960]
    footprints, results = [], {}
    for n in sizes:
        items = (rng.random((n, 200)) < 0.05).astype(float)
        footprints.append(footprint(f"b{n}", items))
        results[f"b{n}"] = (rng.random((10, n)) < skill).astype(float)
    table = np.stack([part.mean(1) for part in results.values()], axis=1)
    scores = Scores(tuple(map(str, range(10))), tuple(results), table, results)
    found = equal_redundancy(footprints, scores, subsets=3, resamples=50)
    assert found.items == 30
    assert max(found.r_hat) / min(found.r_hat) < 1.3  # whole, the largest is over five times it
    assert max(found.r) - min(found.r) < 0.2
    pairs = equal_overlap(footprints, scores, subsets=2, resamples=50)
    assert pairs.n_pairs == 15
    assert spread_enough(scores, 0.05) == (list(results), [])
    assert spread_enough(scores, 0.5) == ([], list(results))
