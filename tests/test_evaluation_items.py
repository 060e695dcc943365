"""Subsets, screening, duplicates, tables of scores and the report, on planted footprints."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation import draw, matrices

from qwen_scope_lens.bench import choose, contamination, footprint, near_duplicates, screen
from qwen_scope_lens.bench.contamination import usual_nearness
from qwen_scope_lens.bench.coverage import expected_features
from qwen_scope_lens.bench.panel import read_scores
from qwen_scope_lens.bench.screen import own_novelty
from qwen_scope_lens.errors import BadFile, TooLittleData, UnknownName


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(matrices(), st.floats(0.1, 1.0))
def test_the_subset_keeps_the_share_and_its_bounds_hold(matrix: np.ndarray, share: float) -> None:
    """Against every subset of every size: the share is reached, the bound holds, and greedy
    covers at least 1 - 1/e of the best subset of its size."""
    one = footprint("b", matrix)
    found = choose(one, share)
    total = matrix.any(0).sum()
    covered = [matrix[found.chosen[: i + 1]].any(0).sum() / total for i in range(found.size)]
    np.testing.assert_allclose(found.coverage, covered)
    assert found.coverage[-1] >= share - 1e-9
    assert len(set(found.chosen.tolist())) == found.size
    best = {
        n: max(matrix[list(s)].any(0).sum() for s in combinations(range(len(matrix)), n))
        for n in range(1, len(matrix) + 1)
    }
    smallest = min(n for n, most in best.items() if most >= share * total - 1e-9)
    assert found.at_least <= smallest <= found.size
    assert found.coverage[-1] * total >= (1 - 1 / np.e) * best[found.size] - 1e-9


def test_lazy_greedy_takes_what_plain_greedy_takes() -> None:
    one = draw(150, d_sae=300)
    dense = one.items.toarray() > 0
    missing, expected = dense.any(0), []
    while missing.any():
        expected.append(int((dense & missing).sum(1).argmax()))
        missing &= ~dense[expected[-1]]
    found = choose(one, 1.0)
    assert found.chosen.tolist() == expected
    exact = expected_features(one.counts, 150, [found.size])[0] / one.size
    assert found.random_mean == pytest.approx(exact)
    assert found.random_low <= found.random_mean <= found.random_high < found.coverage[-1]
    assert found.random_size > found.size
    assert re.search(rf"{found.size} of 150 items cover 100.0%", str(found))
    with pytest.raises(TooLittleData, match="above 0"):
        choose(one, 0)


def test_screening_counts_what_is_new() -> None:
    own = footprint("own", [[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]])
    new = footprint("new", [[1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0], [1, 0, 0, 1, 1]])
    found = screen(own, new)
    assert [(s.new, s.adds, s.useful) for s in found] == [
        (0, 0, False),
        (1, 1, True),
        (1, 0, False),
        (2, 1, True),
    ]
    assert own_novelty(own).tolist() == [1, 1]
    assert [s.percentile for s in found] == [0.0, 0.5, 0.5, 1.0]
    # Good-Turing: what one more item adds, over many sources
    kinds = [draw(61, d_sae=200, seed=seed) for seed in range(300)]
    expected = np.mean([own_novelty(k.subset(range(60))).mean() for k in kinds])
    actual = np.mean([screen(k.subset(range(60)), k.subset([60]))[0].new for k in kinds])
    assert actual == pytest.approx(expected, rel=0.15)


def test_planted_duplicates_are_found_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.random((80, 400)) < 0.05 for _ in range(2))
    second[7] = first[3]
    second[9] = first[5]
    second[9, np.flatnonzero(first[5])[0]] = False  # one feature lost
    a, b = footprint("a", first), footprint("b", second)
    pairs = near_duplicates(a, b, 0.85)
    assert [(p.first, p.second) for p in pairs] == [("3", "7"), ("5", "9")]
    assert pairs[0].jaccard == 1.0
    n = int(first[5].sum())
    assert pairs[1].jaccard == pytest.approx((n - 1) / n)
    brute = max((u & v).sum() / (u | v).sum() for u, v in combinations(first, 2))
    assert usual_nearness(a, 1.0) == pytest.approx(brute)
    again = footprint("c", np.concatenate([first[:4], first[:2]]))
    assert [(p.first, p.second) for p in near_duplicates(again, again)] == [("0", "4"), ("1", "5")]
    equal = footprint("d", np.ones((50, 3)))
    assert len(near_duplicates(equal, equal)) == 50 * 49 // 2
    assert len(near_duplicates(equal, equal, most=7)) == 7
    found = contamination(a, b, 0.85)
    assert [p.first for p in found.contained] == ["3", "5"]
    assert found.share == 2 / 80
    assert found.usual < found.threshold


def test_tables_of_scores(tmp_path: Path) -> None:
    wide = tmp_path / "wide.csv"
    wide.write_text("model,数学,b\nm1,0.5,0.25\nm2,0.75,1\n", "utf-8")
    found = read_scores(wide)
    assert found.benchmarks == ("数学", "b")
    assert found.only(["b"]).table.tolist() == [[0.25], [1.0]]
    with pytest.raises(UnknownName, match="no scores of c"):
        found.only(["b", "c"])
    long = tmp_path / "long.jsonl"
    rows = [
        {"model": m, "benchmark": "x", "item": i, "correct": int(m == "m2" or i > 1)}
        for m in ("m1", "m2")
        for i in range(4)
    ]
    long.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    found = read_scores(long)
    assert found.results["x"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert found.table.tolist() == [[0.5], [1.0]]


@pytest.mark.parametrize("line", ["null", "[]", "3", '"model"', '{"model": "\\ud800", "b": 1}'])
def test_lines_that_are_no_rows_are_refused(tmp_path: Path, line: str) -> None:
    """pyarrow's reader ends the whole process on some of them."""
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"model": "m", "b": 1}}\n{line}\n')
    with pytest.raises(BadFile, match=r"line 2: expected a JSON object|cannot be read"):
        read_scores(path)


def test_ids_are_names_not_numbers(tmp_path: Path) -> None:
    """007 of a file of prompts is 007 of its scores; a number of Parquet is not a fraction."""
    path = tmp_path / "long.csv"
    rows = [f"{m},b,{i},{int(i == '007')}" for m in ("01", "1") for i in ("007", "7", "1e3")]
    path.write_text("model,benchmark,item,correct\n" + "\n".join(rows), "utf-8")
    found = read_scores(path)
    assert found.models == ("01", "1")
    assert found.items == {"b": ("007", "1e3", "7")}
    assert found.only(["b"]).items == found.items
    table = pa.table(
        {
            "model": ["m", "n"] * 2,
            "benchmark": ["b"] * 4,
            "item": [3.0, 3.0, 4.0, 4.0],
            "correct": [1, 0, 1, 1],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    assert read_scores(tmp_path / "t.parquet").items == {"b": ("3", "4")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ("a,b\n1,2\n", "expected model and one column"),
        ("model,b\n", "no rows"),
        ("model,b\nm,\nn,1\n", "has no number in 1 of 2"),
        ("model,b\nm,good\n", "not a number"),
        ("model,b\nm,1\nm,2\n", "more than one row for m"),
        ("model,benchmark,item,correct\nm,b,1,1\nn,b,2,0\n", "2 results; 2 models on 2 items"),
        ("model,benchmark,item,correct\nm,b,1,1\nm,b,1,0\n", "each item may occur once only"),
        ("model,benchmark,item,correct\nm,b,,1\n", "column item has no name in 1 of 1"),
        ("model,b\n,1\n", "column model has no name in 1 of 1"),
        ("model,b,b\nm,1,2\n", "more than one column b"),
        ("model,b\nm,nan\nn,1\n", "has no number in 1 of 2"),
        ("model,b\nm,-inf\nn,1\n", "has no number in 1 of 2"),
        (f"model,b\nm,{'9' * 5000}\nn,1\n", "has no number in 1 of 2"),
        ("model,b\nm,1e308\nn,1\n", "1e.308: expected scores up to 1e.100"),
        (b"model,b\xff\nm,1\n", "cannot be read"),
        (f"model,b\nm,{'x' * 5000}\nn,1\n", r"not a number.*\.\.\.$"),
    ],
)
def test_bad_tables_say_what_is_wrong(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises((BadFile, TooLittleData), match=message):
        read_scores(path)
    with pytest.raises(BadFile, match="ends in"):
        read_scores(tmp_path / "t.xlsx")
    with pytest.raises(BadFile, match="does not exist"):
        read_scores(tmp_path / "none.csv")
