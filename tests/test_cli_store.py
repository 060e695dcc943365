"""`qsl extract` and `qsl store`, from a file to an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from feature_stores import GROUP, build_store

from qwen_scope_lens.cli import main
from qwen_scope_lens.cli.options import memory, worker
from qwen_scope_lens.stores import FeatureStore


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_from_a_file_to_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, out = tmp_path / "c.jsonl", str(tmp_path / "store")
    rows = [{"text": "A short text.", "lang": "en"}, {"text": "一段短文。", "lang": "zh"}]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["extract", str(corpus), "--sae", GROUP, "--layers", "6", "--out"]
    assert main([*command, out]) == 0
    first = capsys.readouterr()
    assert "2 documents" in first.out
    assert "labels     lang (str)" in first.out
    assert "tokens/s" in first.err
    assert main([*command, out, "--max-tokens", "3"]) == 1
    assert "max_tokens 3 against None" in capsys.readouterr().err
    assert main(["store", "info", out]) == 0
    assert capsys.readouterr().out == first.out
    assert main(["store", "sql", out, "select lang, n_tokens > 0 ok from documents"]) == 0
    assert lines(capsys) == ["lang\tok", "en\tTrue", "zh\tTrue"]
    assert main(["store", "sql", out, "select lang from documents", "--json"]) == 0
    assert json.loads(lines(capsys)[1]) == {"lang": "zh"}
    assert main(["store", "check", out]) == 0
    (tmp_path / "d.txt").write_text("Another one.\n")
    more = [*command, out, "--append", "--quiet"]
    assert main([*more[:1], str(tmp_path / "d.txt"), *more[2:]]) == 0
    assert FeatureStore.open(out).n_docs == 3
    last = str(tmp_path / "last")
    assert main([*command, last, "--positions", "last", "--quiet"]) == 0
    store = FeatureStore.open(last)
    assert (store.n_docs, store.n_tokens) == (2, 2)
    for wrong, said in ((tmp_path / "none", "does not exist"), (corpus, "it is a file")):
        assert main(["store", "info", str(wrong)]) == 1
        assert said in capsys.readouterr().err


def test_merge_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_store(tmp_path / "a", [[{5: 1.0}]] * 20)
    out = str(tmp_path / "out")
    assert main(["store", "merge", out, str(tmp_path / "a"), "--shard-docs", "50"]) == 0
    assert "20 documents, 20 tokens, 1 shards" in capsys.readouterr().out
    (tmp_path / "out" / "shards" / "00000" / "offsets.npy").write_bytes(b"x")
    assert main(["store", "check", out, "--sizes-only"]) == 1
    assert "PROBLEM" in capsys.readouterr().out
    assert main(["store", "merge", out, out]) == 1
    assert main(["store", "sql", str(tmp_path / "a"), "selec"]) == 1
    assert main(["store", "info", str(tmp_path)]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_sizes_and_workers() -> None:
    import argparse

    assert [memory(t) for t in ("8GB", "1.5 g", "500MB", "12")] == [
        8 * 10**9,
        15 * 10**8,
        5 * 10**8,
        12,
    ]
    assert worker("0/4") == (0, 4)
    for bad in ("4/4", "a/2", "1", "-1/2"):
        with pytest.raises(argparse.ArgumentTypeError):
            worker(bad)
    with pytest.raises(argparse.ArgumentTypeError):
        memory("eight")
