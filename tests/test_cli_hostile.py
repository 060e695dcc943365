"""Command lines that nobody means well end in one line and a code; terminals get no commands."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from feature_stores import GROUP, build_store

from qwen_scope_lens.cli import main
from qwen_scope_lens.cli.terminal import plain, shown_safely
from qwen_scope_lens.errors import BadFile

ESCAPE = "\x1b[31mred\x07\x9b2J\u202e"
DIGITS = "9" * 5000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    labels: dict[str, list[Any]] = {"toxic": [True, False] * 8, "name": [ESCAPE] * 16}
    build_store(folder / "store", [[{5: 1.0, 7 + n % 2: 2.0}] for n in range(16)], labels)
    row = {"address": f"{GROUP}/6/1", "text": ESCAPE}
    (folder / "labels.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "corpus.jsonl").write_text('{"text": "A text."}\n')
    return folder


def run(words: Sequence[str]) -> int | str | None:
    try:
        return main(list(words))
    except SystemExit as error:  # argparse
        return error.code


def refused(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> str:
    assert run(words) in (1, 2), words
    said = capsys.readouterr().err
    assert said.strip()
    assert len(said) < 3000
    assert not any(sign in said for sign in ("Traceback", "\x1b", ": None"))
    return said


NUMBERS = {
    "5,000 digits": DIGITS,
    "2^70": str(2**70),
    "not a number": "nan",
    "infinite": "1e999",
    "nothing": "",
    "below": "-1",
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers(case: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number, store, corpus = NUMBERS[case], str(files / "store"), str(files / "corpus.jsonl")
    out = str(files / "out.json")
    edit, fit = f"{GROUP}/6/1:add:1", ["classify", "fit", store, "--label", "toxic", "--out", out]
    extract = ["extract", corpus, "--sae", GROUP, "--layers", "6", "--out", str(files / "new")]
    for words in (
        ["stats", store, f"--layer={number}"],
        ["stats", store, f"--feature={number}"],
        ["rank", store, "--label", "toxic", "--positive", "true", f"--seed={number}"],
        ["rank", store, "--label", "toxic", "--positive", "true", f"--top={number}"],
        [*fit, f"--layer={number}"],
        [*fit, f"--top-k={number}"],
        ["label", "show", str(files / "labels.jsonl"), f"{GROUP}/6/{number}"],
        ["compare", "match", f"{GROUP}/{number}", f"{GROUP}/6"],
        ["steer", "x", "--model", "mini-qwen3", "--edit", edit, f"--seed={number}"],
        ["steer", "x", "--model", "mini-qwen3", "--edit", edit, f"--new-tokens={number}"],
        [*extract[:4], f"--layers={number}", *extract[6:]],
        [*extract, f"--max-tokens={number}"],
        [*extract, f"--shard-docs={number}"],
        [*extract, f"--worker={number}/4"],
        ["store", "merge", str(files / "merged"), store, f"--shard-docs={number}"],
        ["app", f"--port={number}"],
    ):
        refused(capsys, words)
    if case not in ("below", "2^70"):
        refused(capsys, [*fit, f"--threshold={number}"])
        refused(capsys, ["label", "list", str(files / "labels.jsonl"), f"--least-score={number}"])
    assert not (files / "new").exists()
    assert not (files / "merged").exists()


CORPORA = {
    "null": "null\n",
    "a number of 5,000 digits": f'{{"text": "a", "n": {DIGITS}}}\n',
    "a deep list": '{"text": ' + "[" * 50_000 + "]" * 50_000 + "}\n",
    "a role that is a number": '{"messages": [{"role": 5, "content": "x"}]}\n',
    "a role of no template": '{"messages": [{"content": "x"}]}\n',
    "labels in two cases": '{"text": "a", "l": 1, "L": 2}\n',
}


@pytest.mark.parametrize("case", CORPORA)
def test_corpora(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(CORPORA[case])
    words = ["extract", str(path), "--sae", GROUP, "--layers", "6", "--out", str(tmp_path / "out")]
    refused(capsys, [*words, "--quiet", "--no-thinking"])


def test_a_file_without_texts_to_verify_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    words = [
        "verify",
        f"{GROUP}/6",
        "--model",
        "mini-qwen3",
        "--texts",
        str(tmp_path / "empty.txt"),
    ]
    assert "no text" in refused(capsys, words)


def test_half_characters_in_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a\\ud800b", "\\udfff": 1, "name": "\\ud800"}\n')
    out = str(tmp_path / "out")
    words = ["extract", str(path), "--sae", GROUP, "--layers", "6", "--out", out, "--quiet"]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["store", "sql", out, "select text, name from documents"]) == 0
    assert capsys.readouterr().out == "text\tname\na\ufffdb\t\ufffd\n"


PLACES = ["/dev/null", "/dev/full", "/proc/x", "\0", "x" * 300, "."]


@pytest.mark.parametrize("place", PLACES)
def test_places_that_cannot_be_written(
    place: str, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    store, labels = "store", "labels.jsonl"
    extract = ["extract", "corpus.jsonl", "--sae", GROUP, "--layers", "6", "--quiet", "--out"]
    for words in (
        ["label", "merge", labels, labels, "--out", place],
        ["stats", store, "--out", place],
        ["export", "--edit", f"{GROUP}/6/1:add:1@first", "--out", place],
        ["classify", "fit", store, "--label", "toxic", "--out", place],
        ["steer", "x", "--edit", f"{GROUP}/6/1:add:1", "--save-plan", place],
        *([] if place == "." else [[*extract, place], ["store", "merge", place, store, store]]),
    ):
        refused(capsys, words)
    for words in (
        ["label", "list", place],
        ["store", "info", place],
        ["verify", f"{GROUP}/6", "--model", place],
        ["export", "--plan", place, "--out", "x.gguf"],
        ["classify", "predict", place, store],
        [*extract[:1], place, *extract[2:], "new"],
        ["dash", "serve", place, "--port", "0"],
        ["train", "sasft", place],  # before, /dev/full filled the memory with its zeros
    ):
        refused(capsys, words)
    assert os.path.exists("/dev/null")


@pytest.mark.parametrize("words", ["mini texts --out=", "reproduce run toxicity --out=x --data="])
def test_an_empty_path_is_not_this_folder(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    assert "'' is not a path" in capsys.readouterr().err


def test_a_message_does_not_repeat_a_whole_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(arguments: object) -> int:
        raise BadFile("the beginning" + "x" * 100_000 + "the end")

    monkeypatch.setattr("qwen_scope_lens.cli.list.run", read)
    assert run(["list"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("qsl list: the beginning")
    assert said.endswith("the end\n")
    assert len(said) < 7000


def test_links_that_go_round_and_labels_that_are_not_there(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop, store = files / "loop", str(files / "store")
    loop.symlink_to(loop)
    refused(capsys, ["store", "merge", str(files / "merged"), str(loop), store])
    # Without --out no name is shown; before, whatever --labels said was then not read.
    refused(capsys, ["compare", "drift", store, store, "--labels", str(files / "absent.jsonl")])


def test_what_a_terminal_is_shown(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = r"\x1b[31mred\x07\x9b2J\u202e"
    assert plain(ESCAPE) == written
    assert plain("a\tb\nc é 中 \U0001f600") == "a\tb\nc é 中 \U0001f600"
    assert main(["label", "list", str(files / "labels.jsonl")]) == 0
    assert written in capsys.readouterr().out
    query = ["store", "sql", str(files / "store"), "select distinct name from documents"]
    assert main(query) == 0
    assert capsys.readouterr().out == f"name\n{written}\n"
    assert main([*query, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": ESCAPE}  # exact
    far = "select '290000-01-01'::timestamp far"
    assert "::varchar" in refused(capsys, ["store", "sql", str(files / "store"), far])
    refused(capsys, ["store", "sql", str(files / "store"), "select '\ud800'"])
    refused(capsys, ["show", ESCAPE])
    refused(capsys, ["store", "sql", str(files / "store"), f"select '{ESCAPE}' from nosuch"])


def test_show_and_list_of_a_group_from_elsewhere(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home / "mine" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model": ESCAPE}))
    assert main(["show", "local/mine"]) == 1  # its name is refused where the file is read
    shown = capsys.readouterr()
    assert "base_model" in shown.err
    main(["list"])
    listed = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err + listed.out + listed.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_everything_else_on_a_terminal_is_filtered(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    with shown_safely():
        print(ESCAPE, end="")
    assert out.getvalue() == plain(ESCAPE)
    assert sys.stdout is out


class Full(io.StringIO):
    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fileno(self) -> int:
        raise ValueError("no file")


def test_a_full_disk_behind_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["list"]) == 1
    assert "No space left" in capsys.readouterr().err
