"""Every table is JSON, too; --quiet shows results only; a closed pipe ends every verb quietly."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from feature_stores import GROUP, build_store

from qwen_scope_lens.cli import main
from qwen_scope_lens.cli.verbs import VERBS
from qwen_scope_lens.features import Ranking
from qwen_scope_lens.steering import Edit, Plan

N = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which feature 5 fires on documents with `toxic`, and small files beside it."""
    here = tmp_path_factory.mktemp("json")
    flags = [n % 2 == 0 for n in range(N)]
    documents = [[{9: 1.0}, {7: 1.0 + n % 3, **({5: 2.0} if flags[n] else {})}] for n in range(N)]
    labels: dict[str, list[Any]] = {"toxic": flags, "lang": ["en", "en", "zh", "zh"] * (N // 4)}
    build_store(here / "store", documents, labels, texts=[f"text {n:02}" for n in range(N)])
    row = {"address": f"{GROUP}/6/5", "text": "toxic", "score": 0.9}
    (here / "labels.jsonl").write_text(json.dumps(row) + "\n")
    kept = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": said}]}
        for said in ("fine", "好的", "well")
    ]
    only_prompt = {"messages": [{"role": "user", "content": "q"}]}
    rows = "".join(json.dumps(row) + "\n" for row in [*kept, only_prompt])
    (here / "data.jsonl").write_text(rows)  # as `qsl synth run` writes them
    return here


TABLES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "list": lambda found: len(found["rows"]) > 10,
    f"show {GROUP}": lambda found: found["d_sae"] == 1024,
    "label list labels.jsonl": lambda found: found["rows"][0]["label"] == "toxic",
    f"label show labels.jsonl {GROUP}/6/5": lambda found: found["score"] == 0.9,
    "label check labels.jsonl --store store": lambda found: found["rows"][0]["labels"] == 1,
    "store info store": lambda found: found["documents"] == N and found["complete"],
    "store check store": lambda found: found["problems"] == [],
    "stats store --feature 5": lambda found: (
        found["features_that_fire"] == 2  # feature 9 fires on first tokens, which do not count
        and [row["feature"] for row in found["rows"]] == [5, 7]
        and found["features"][0]["strongest"][0]["value"] == 2
    ),
    "rank store --label toxic --positive true": lambda found: (
        found["rows"][0]["ref"] == f"{GROUP}/6/5"
    ),
    "compare match store store --by activation": lambda found: found["features"] == 1024,
    "compare drift store store": lambda found: found["rows"][0]["overlap"] == 1,
    "classify fit store --label toxic --out clf.json --top-k 1": lambda found: (
        found["features"] == [{"feature": f"{GROUP}/6/5", "difference": 1.0}]
    ),
    "classify transfer store --label toxic --language lang": lambda found: (
        found["f1"] == [[1.0, 1.0], [1.0, 1.0]]
    ),
    "classify efficiency store --label toxic": lambda found: found["rows"][-1]["share"] == 1,
    f"calibrate {GROUP}/6 --store store --out typical.json": lambda found: (
        {row["feature"]: row["typical"] for row in found["rows"]}[f"{GROUP}/6/5"] == 2
    ),
    "train measure data.jsonl --script zh": lambda found: (
        (found["count"], found["total"]) == (1, 3)
    ),
}
FORMATS = {"rank": "qwen-scope-ranking"}  # the same as in the verb's file


@pytest.mark.parametrize("line", TABLES)
def test_tables_are_json_and_quiet_is_quiet(
    line: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words = line.split()
    assert main([*words, "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    found = json.loads(shown.out)
    name = "-".join(["qsl", *words[: 2 if words[0] in WITH_WORDS else 1]])
    assert found["format"] == FORMATS.get(words[0], name)
    assert found["version"] == 1
    assert TABLES[line](found), found

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(words) == 1
    said = capsys.readouterr().err
    assert not any(sign in said for sign in ("Traceback", "system refused", "rror"))


WITH_WORDS = ("label", "store", "compare", "classify", "train")


def test_what_rank_prints_is_its_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rank", str(folder / "store"), "--label", "toxic", "--positive", "true", "--json"]
    assert main([*words, "--out", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr()
    assert shown.out == (tmp_path / "out.json").read_text()
    assert f"written: {tmp_path / 'out.json'}" in shown.err
    assert Ranking.load(tmp_path / "out.json").rows[0].ref == f"{GROUP}/6/5"


def test_from_a_ranking_to_a_plan(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    store = str(folder / "store")
    words = ["rank", store, "--label", "toxic", "--positive", "true", "--out", "ranking.json"]
    assert main(words) == 0
    words = ["plan", "ranking.json", "--edit", "add:-2typical@generation", "--out", "plan.json"]
    assert main(words) == 1
    assert "give --store" in capsys.readouterr().err
    assert main([*words, "--store", store]) == 0
    assert (
        f"{GROUP}/6/5  add              -2  typical  generation        2" in capsys.readouterr().out
    )
    edit = Edit(f"{GROUP}/6/5", "add", -2, "typical", "generation", typical=2.0)
    assert Plan.load("plan.json") == Plan([edit])
    assert main([*words, "--store", store, "--json"]) == 0
    assert capsys.readouterr().out == Path("plan.json").read_text()
    assert main(["steer", "x", "--plan", "ranking.json"]) == 1
    assert "qsl plan" in capsys.readouterr().err


WITHOUT = """
app, bench report, classify predict, completion, convert official-to-saelens,
convert openinterp-to-saelens, convert saelens-to-official, dash build, dash export, dash serve,
demo, export, label describe, label merge, mcp, serve, steer, store copy, store merge,
synth describe, synth targets, synth templates, train grpo, train repetition loops, train sasft,
train sft
"""
"""What prints no table. `classify predict` writes JSON Lines always."""


def leaves(words: str, parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    """Every word that does something -> its options."""
    found: dict[str, set[str]] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                found |= leaves(f"{words} {name}", below)
            return found
    return {words: set(parser._option_string_actions)}


def test_every_verb_that_prints_a_table_has_json() -> None:
    found: dict[str, set[str]] = {}
    for verb in VERBS:
        parser = argparse.ArgumentParser()
        module = importlib.import_module(f"qwen_scope_lens.cli.{verb.replace('-', '_')}")
        module.add_arguments(parser)
        found |= leaves(verb, parser)
    without = {name for name, options in found.items() if "--json" not in options}
    assert without == {name.strip() for name in WITHOUT.replace("\n", " ").split(",")}
    assert all("--layer" not in options or "--layers" in options for options in found.values())
