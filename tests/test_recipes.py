"""Recipes: the files are whole, stages resume and go out of date, smoke runs end in a page."""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import qwen_scope_lens as qsl
from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import (
    BadCorpus,
    BadFile,
    CannotWrite,
    GeneratorFailed,
    LayerOutOfRange,
    UnknownName,
)
from qwen_scope_lens.recipes import Recipe, engine, names, open_recipe, run, states
from qwen_scope_lens.recipes import recipe as recipes
from qwen_scope_lens.recipes.engine import Work
from qwen_scope_lens.recipes.estimate import estimate
from qwen_scope_lens.recipes.page import figure_rows, not_found
from qwen_scope_lens.recipes.settings import SETTINGS
from qwen_scope_lens.synth import TargetSet
from qwen_scope_lens.writers.generator import Completion, Request
from qwen_scope_lens.writers.ledger import Ledger


@pytest.fixture(scope="module")
def mini() -> Any:
    return qsl.load_model("mini-qwen3")


# --- the files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_a_recipe_is_whole(name: str) -> None:
    recipe = open_recipe(name)
    assert recipe.name == name
    stages = recipes.KINDS[recipe.kind]
    for figure in recipe.figures:
        assert figure.ours.split(".")[0] in stages
        assert (figure.tolerance is None) or figure.paper is not None
    for one in (recipe, recipe.for_smoke()):
        assert estimate(one).hours > 0
    assert estimate(recipe).model > 1e9 > estimate(recipe.for_smoke()).model
    known = {"model", "model_revision", "sae", "sae_revision", "layers", "seed"}
    assert known <= set(recipe.settings)
    assert "mini" in recipe.for_smoke().settings["model"]


def test_settings_are_changed_by_name_and_unknown_ones_are_refused() -> None:
    recipe = open_recipe("bench-mmlu-pro")
    changed = recipe.with_settings({"layer": 3, "data.panel.file": "x.json", "estimate.tflops": 9})
    assert (changed.settings["layer"], changed.data["panel"]["file"]) == (3, "x.json")
    assert ("layer", 18, 3) in changed.changed
    assert recipe.settings["layer"] == 18
    assert recipe.with_settings({"layer": 18}).changed == ()
    assert recipe.with_settings({"data.new": {"file": "x.jsonl"}}).data["new"] == {
        "file": "x.jsonl"
    }
    for source in (3, {"fiel": "x.jsonl"}, {"split": "test"}):
        with pytest.raises(BadFile, match="source new has"):
            recipe.with_settings({"data.new": source})
    for key in ("lyer", "data.panel.fil", "data.nope.file", "name"):
        with pytest.raises(UnknownName, match="no setting"):
            recipe.with_settings({key: 1})


@pytest.mark.parametrize("layers", [5, [], [1.5], "some", [99], None])
def test_layers_are_a_list_or_all(layers: Any) -> None:
    recipe = open_recipe("toxicity")
    assert recipe.with_settings({"layers": "all"}).layers == list(range(28))
    with pytest.raises((BadFile, LayerOutOfRange)):
        estimate(recipe.with_settings({"layers": layers}))


def test_a_recipe_of_ones_own_has_all_settings_of_its_kind(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(recipes.recipe_text("toxicity").replace("  overlap_top: 10\n", ""))
    with pytest.raises(BadFile, match="settings lacks overlap_top"):
        open_recipe(mine)


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("kind: fake", "kind: nope", "expected one of"),
        ("title: t", "titel: t", "title is missing"),
        ("settings: {", "settings: 3 #{", "settings is not a mapping"),
        ("open: {n: why}", "open: {k: why}", "open names k"),
        ("ours: one.value", "our: one.value", "a figure has other parts"),
        ("file: rows.jsonl", "fiel: rows.jsonl", "fiel"),
        ("name: fake", "name: [", "cannot be read as YAML"),
    ],
)
def test_a_damaged_file_is_refused(fake: Path, was: str, now: str, said: str) -> None:
    assert was in FAKE
    fake.write_text(FAKE.replace(was, now))
    with pytest.raises(BadFile, match=said):
        open_recipe(fake)


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("kind: fake", "kind: [a]", "expected one of"),
        ("title: t", "title: [1]", "title is"),
        ("smoke: {}", "smoke: {settings: 3}", "smoke.settings"),
        ("estimate: {}", "estimate: {tflops: 0}", "estimate.tflops is 0: expected a number"),
        ("estimate: {}", "estimate: {tokens: .inf}", "estimate.tokens is inf"),
        ("ours: one.value", "ours: [a]", "figures.0.ours"),
        ("paper: 3,", "above: true,", "paper gives no number"),
        ("paper: 3,", "paper: true,", "figures.0.paper is True"),
        ("tolerance: 0.1", "tolerance: -1", "figures.0.tolerance is -1"),
        ("title: t", "title: t\ntitle: u", "'title' is there twice"),
        ("{n: 3,", "{n: 3, n: 4,", "'n' is there twice"),
        ("title: t", "title: " + "[" * 200 + "]" * 200, "nested deeper than 100"),
        ("title: t", "title: " + "[" * 20_000, "nested deeper than 100"),
        ("{n: 3,", "{n: 2026-01-01,", "n is datetime"),
        ("{n: 3,", "{n: [[.nan]],", "n is"),
        ("file: rows.jsonl", "file: rows.jsonl, where: 3", "data.rows.where is 3"),
        ("file: rows.jsonl", "file: rows.jsonl, columns: {text: 3}", "a column of data.rows is 3"),
        ("file: rows.jsonl", "file: rows.jsonl, template: 3", "data.rows.template is 3"),
        ("file: rows.jsonl", "rows: 3", "data.rows.rows is 3"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(
    fake: Path, was: str, now: str, said: str
) -> None:
    assert was in FAKE
    fake.write_text(FAKE.replace(was, now))
    with pytest.raises(BadFile, match=re.escape(said)):
        open_recipe(fake)


WRONG = {
    "seed": (-1, 1.5, "x", True, None, float("nan"), 10**400),
    "per_class": (0, -4, "1e400"),
    "test_share": (0, 1, 2, float("nan")),
    "draws": (0, True),
    "languages": ([], ["en", "en"], "en", [1]),
    "layers": ([6, 6], [True]),
    "top_k": ([], [0], [1001], 3, [1, 1]),
    "shares": ([0, 0.5], [2], [float("inf")], []),
    "overlap_top": (0, -1),
    "transfer_k": (0, 5000),
    "dtype": ("int8", 3),
    "label": (None, ["a"], {"a": 1}, datetime.date(2026, 1, 1), {"a"}, b"a"),
    "split_by": ([1], 3),
    "baselines": ("maybe", 1),
    "data": (3,),
    "estimate": (3,),
    "estimate.tflops": (-1, 0, True),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_setting_out_of_its_range_is_refused_by_name(key: str) -> None:
    recipe = open_recipe("toxicity")
    for value in WRONG[key]:
        with pytest.raises(BadFile, match=rf"{key} is .*: expected "):
            recipe.with_settings({key: value})


def test_every_setting_of_a_recipe_has_its_row() -> None:
    assert {key for name in names() for key in open_recipe(name).settings} == set(SETTINGS)


# --- stages ---------------------------------------------------------------------------------------

FAKE = """
name: fake
kind: fake
title: t
paper: section 0
settings: {n: 3, m: 1, layers: [1], model: mini-qwen3, sae: mini-qwen3/w1k-l0-16}
open: {n: why}
data: {rows: {file: rows.jsonl}}
figures: [{name: f, ours: one.value, paper: 3, tolerance: 0.1}]
estimate: {}
smoke: {}
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of two stages; `done` of its module says which of them ran."""
    done: list[str] = []
    module = SimpleNamespace(done=done, fails=False, draw=lambda page, results: page.text("drawn"))

    def one(work: Work) -> Mapping[str, Any]:
        from qwen_scope_lens.recipes.data import text_rows

        done.append("one")
        n = work["n"] + len(text_rows(work, "rows"))
        with (work.folder / "parts").open("a") as file:
            file.write("x")
        if module.fails:
            raise KeyboardInterrupt
        return {"value": n - 1}

    def two(work: Work) -> Mapping[str, Any]:
        done.append("two")
        return {"value": work.result("one")["value"] + work["m"]}

    module.one, module.two = one, two
    monkeypatch.setitem(sys.modules, "qwen_scope_lens.recipes.fake", module)
    kinds = {**recipes.KINDS, "fake": {"one": "first", "two": "second"}}
    monkeypatch.setattr(recipes, "KINDS", kinds)
    monkeypatch.setattr("qwen_scope_lens.recipes.engine.KINDS", kinds)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "fake.yaml"
    path.write_text(FAKE)
    return path


def done_now(recipe: Recipe, folder: Path) -> list[str]:
    """Which stages a run does."""
    done: list[str] = sys.modules["qwen_scope_lens.recipes.fake"].done
    done.clear()
    run(recipe, folder / "out", data=folder)
    return list(done)


def test_a_stage_is_done_again_if_and_only_if_something_that_it_read_changed(fake: Path) -> None:
    folder, recipe = fake.parent, open_recipe(fake)
    assert done_now(recipe, folder) == ["one", "two"]
    assert done_now(recipe, folder) == []
    assert done_now(recipe.with_settings({"m": 2}), folder) == ["two"]
    assert done_now(recipe.with_settings({"m": 2, "sae": "mini-qwen3.5/w1k-l0-16"}), folder) == []
    assert done_now(recipe, folder) == ["two"]
    (folder / "rows.jsonl").write_text('{"text": "b"}\n')
    [one, two] = states(recipe, folder / "out", folder)
    assert (one.state, two.state) == ("out of date", "out of date")
    assert "rows.jsonl" in one.why
    assert "one" in two.why  # it reads what an earlier stage will make again
    assert done_now(recipe, folder) == ["one", "two"]
    (folder / "out" / "one" / "parts").unlink()
    assert done_now(recipe, folder) == ["one", "two"]
    other = folder / "other"
    other.mkdir()
    (other / "rows.jsonl").write_text('{"text": "b"}\n')
    assert states(recipe, folder / "out", other)[0].state == "out of date"


def test_a_changed_sae_and_a_changed_output_make_a_stage_out_of_date(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, module = fake.parent, sys.modules["qwen_scope_lens.recipes.fake"]
    group = find_group("qwen3-1.7b-base/w32k-l0-50")
    sae = folder / "home" / group.repo_name / group.file_name(1)
    sae.parent.mkdir(parents=True)
    sae.write_bytes(b"a")
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(folder / "home"))
    two = module.two
    monkeypatch.setattr(module, "two", lambda work: work["sae"] and two(work))
    recipe = open_recipe(fake).with_settings({"sae": group.short})
    assert done_now(recipe, folder) == ["one", "two"]
    assert done_now(recipe, folder) == []
    sae.write_bytes(b"b")
    found = states(recipe, folder / "out", folder)[1]
    assert (found.state, "/1" in found.why) == ("out of date", True)
    assert done_now(recipe, folder) == ["two"]
    (folder / "out" / "one" / "parts").write_text("y")  # of the same size
    assert done_now(recipe, folder) == ["one", "two"]


def test_facts_of_folders_and_of_large_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "data" / "inner"
    inner.mkdir(parents=True)
    file = inner / "rows.jsonl"
    file.write_text("0123456789")
    before = engine.file_facts(tmp_path / "data")
    file.write_text("9876543210")
    assert engine.file_facts(tmp_path / "data") != before
    monkeypatch.setattr(engine, "HASHED", 4)
    monkeypatch.setattr(engine, "END", 2)
    times = file.stat().st_mtime_ns
    large, ends = engine.file_facts(file), engine.file_facts(file, times=False)
    file.write_text("98xxxxxx10")
    os.utime(file, ns=(times, times))
    assert engine.file_facts(file) != large  # the entry's own time cannot be set back
    assert engine.file_facts(file, times=False) == ends
    file.write_text("98xxxxxx11")
    assert engine.file_facts(file, times=False) != ends


@pytest.mark.parametrize(
    "name",
    ["../evil", "/tmp/evil", "a/b", '""', "..", ".lock", "stages/texts", "<b>", "[a]", "x" * 65],
)
def test_a_name_that_would_lead_elsewhere(fake: Path, name: str) -> None:
    fake.write_text(FAKE.replace("name: fake", f"name: {name}"))
    with pytest.raises(BadFile, match=r"fake\.yaml: name "):
        open_recipe(fake)


def test_a_killed_stage_goes_on_and_the_page_waits_for_it(fake: Path) -> None:
    folder, recipe = fake.parent, open_recipe(fake)
    module: Any = sys.modules["qwen_scope_lens.recipes.fake"]
    assert done_now(recipe, folder) == ["one", "two"]
    page = folder / "out" / "fake.html"
    assert "drawn" in page.read_text()
    module.fails = True
    with pytest.raises(KeyboardInterrupt):
        done_now(recipe.with_settings({"n": 4}), folder)
    assert not page.exists()  # a page of other settings is not left behind
    assert (folder / "out" / "one" / "parts").read_text() == "x"  # begun anew: n has changed
    with pytest.raises(KeyboardInterrupt):
        done_now(recipe.with_settings({"n": 4}), folder)
    assert (folder / "out" / "one" / "parts").read_text() == "xx"  # went on
    module.fails = False
    assert done_now(recipe.with_settings({"n": 4}), folder) == ["one", "two"]
    assert (folder / "out" / "one" / "parts").read_text() == "xxx"
    assert page.exists()


def test_a_figure_that_no_stage_has_ends_the_command_with_one(
    fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce", "run", str(fake), "--data", str(fake.parent), "--out"]
    assert main([*words, str(fake.parent / "good")]) == 0
    fake.write_text(FAKE.replace("ours: one.value", "ours: one.valeu"))
    assert main([*words, str(fake.parent / "typo")]) == 1
    said = capsys.readouterr()
    assert "not found: one.valeu" in said.out
    assert "no stage has a result at one.valeu" in said.err
    assert "not found: one.valeu" in (fake.parent / "typo" / "fake.html").read_text()


def test_lines_that_are_no_objects(fake: Path) -> None:
    (fake.parent / "rows.jsonl").write_text("1\n2\n")
    with pytest.raises(BadCorpus, match="line 1 of source rows is a int"):
        done_now(open_recipe(fake), fake.parent)


def test_what_is_not_ours_or_damaged_is_refused(fake: Path) -> None:
    folder, recipe = fake.parent, open_recipe(fake)
    (folder / "out" / "one").mkdir(parents=True)
    with pytest.raises(CannotWrite, match="no recipe made it"):
        done_now(recipe, folder)
    (folder / "out" / "one").rmdir()
    done_now(recipe, folder)
    record = folder / "out" / "stages" / "one.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "reads": 3}))
    with pytest.raises(BadFile, match="damaged"):
        states(recipe, folder / "out", folder)
    with pytest.raises(BadCorpus, match="not on the hub"):
        run(recipe, folder / "new")
    other = recipe.with_settings({"data.rows.file": "none.jsonl"})
    with pytest.raises(BadCorpus, match=r"none\.jsonl does not exist"):
        run(other, folder / "newer", data=folder)


def test_a_figure_is_read_against_the_papers() -> None:
    def reading(value: Any, **more: Any) -> Any:
        figure = recipes.Figure("f", "s.v", **{"paper": 0.5, "tolerance": 0.1, **more})
        return figure_rows([figure], {"s": {"v": value}}, only_shown=False)[0][6]

    assert reading(0.55) == "within the tolerance"
    assert reading(0.7) == "differs from the paper"
    wide = {"value": 0.7, "low": 0.4, "high": 0.9}
    assert "interval holds" in reading(wide)
    assert reading({**wide, "low": 0.6}) == "differs from the paper"
    assert reading(0.7, above=True) == "as in the paper"
    assert reading(None) == "not measured"
    assert reading({"k": 1.0}) == "not found: s.v"  # a mapping is not a figure
    typo = recipes.Figure("f", "s.w", 1.0)
    assert figure_rows([typo], {"s": {"v": 1}}, only_shown=True)[0][6] == "not found: s.w"
    assert not_found([typo], {"s": {"w": {"value": None}}}) == []
    assert reading(float("nan")) == "not measured"


# --- smoke runs -----------------------------------------------------------------------------------

SHOWN = {
    "bench-redundancy": ("Spearman of R and R-hat",),
    "bench-overlap": ("overlap_min and scores, Spearman",),
    "bench-mmlu-pro": ("Spearman of R and R-hat",),
    "steering-cases": ("the same with the feature suppressed, best coherent dose",),
    "safety-synthesis": (
        "coverage, feature-driven, at equal numbers of kept texts, %",
        "coverage, random, the same, %",
        "Acc, 4k and 4k feature-driven, %",
    ),
    "sasft": ("code-switching ratio after SASFT, %",),
    "repetition-rl": ("repeat ratio before", "repeat ratio after vanilla GRPO"),
    "toxicity-hatecheck": ("best English F1 on test",),
    "toxicity": ("best English F1 on test", "best English F1, first tokens counted"),
}


SLOW = (
    "bench-overlap",
    "bench-redundancy",
    "toxicity-hatecheck",
    "repetition-rl",
    "safety-synthesis",
    "sasft",
)
"""They train models, render many benchmarks, or repeat what another shows: `make test-all`."""


def test_every_recipe_has_its_smoke_run() -> None:
    assert set(SHOWN) == set(names())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smoke")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SHOWN],
)
def test_smoke(name: str, mini: Any, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes of one kind share a folder: their smoke runs read the same and are done once."""
    recipe = open_recipe(name).for_smoke()
    tmp_path = folders / recipe.kind
    said: list[str] = []
    done = run(recipe, tmp_path, model=mini, say=said.append)
    text = done.page.read_text(encoding="utf-8")
    assert "This is a smoke run" in text
    assert "<svg" in text
    assert not any(word in text for word in ("<script", "<link", "src=", "url(http"))
    values = {row[0]: row[1] for row in figure_rows(recipe.figures, done.results, only_shown=True)}
    for figure in SHOWN[name]:
        assert values[figure] is not None
    monkeypatch.setattr("qwen_scope_lens.models.open.open_model", None)  # no model is needed
    said.clear()
    run(recipe, tmp_path, say=said.append)
    assert all(line.endswith("finished before") for line in said)


# --- what only one recipe has ---------------------------------------------------------------------


def test_toxicity_has_a_probe_on_the_residual(mini: Any, folders: Path) -> None:
    """Beside the rules, on all languages, with less data and carried over from the first one."""
    recipe = open_recipe("toxicity").for_smoke()
    run(recipe, folders / recipe.kind, model=mini)
    found = {state.name: state.result or {} for state in states(recipe, folders / recipe.kind)}
    probe = "linear probe on the residual"
    assert found["residuals"]["layers"] == [4, 6]
    alone, moved = found["rules"]["baselines"][probe], found["across"]["chosen"][probe]
    assert 0.6 < alone["value"] <= 1  # tone is easy for the toy; chance is about 0.5
    assert alone["low"] <= alone["value"] <= alone["high"]
    assert set(moved) == {"en", "de"}
    less = found["efficiency"]["baselines"][probe]
    assert less["of full"]["value"] == pytest.approx(less["f1"] / less["all"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cases.mixing.measure": None}, "cases.mixing lacks measure"),
        ({"cases.mixing.reply": {"text": "x"}}, "cases.mixing.reply lacks prompt, classes"),
        ({"cases.mixing": 3}, "cases.mixing is 3"),
        ({"cases": {}}, "expected a mapping of names"),
    ],
)
def test_cases_with_something_missing(changes: Any, said: str, tmp_path: Path) -> None:
    recipe = open_recipe("steering-cases").for_smoke().with_settings(changes)
    with pytest.raises(BadFile, match=said):
        run(recipe, tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"generator": None}, BadFile, "has no generator"),
        ({"kind_from": "feature"}, BadFile, "has no judge"),
        ({"random_generator": None}, BadFile, "has no random_generator"),
        ({"reply_judge": "gpt"}, UnknownName, "'gpt' is not a generator"),
        ({"relevance": "some"}, BadFile, "expected judge, all, or LABEL=VALUE"),
        ({"arms": {"a": {"real": 3}}}, BadFile, "arm a is"),
        ({"budget_counts": "read"}, BadFile, "written or kept"),
        ({"synthesis": {"variant": 2}}, BadFile, "synthesis cannot be used"),
        ({"prices": {"max_cost": -1}}, BadFile, "prices cannot be used"),
    ],
)
def test_writers_and_judges_are_named_before_anything_is_read(
    changes: Any, error: Any, said: str, tmp_path: Path
) -> None:
    recipe = open_recipe("safety-synthesis").for_smoke().with_settings(changes)
    with pytest.raises(error, match=said):
        run(recipe, tmp_path)


class Judge:
    """A test double that says what it is given, in turn."""

    name = "scripted"

    def __init__(self, *says: str) -> None:
        self.says, self.asked = says, list[str]()

    def generate(self, requests: Sequence[Request], book: Any) -> None:
        for number, request in enumerate(requests):
            assert book.start(number)
            self.asked.append(request.text)
            book.finish(number, Completion(self.says[number], "stop", 1, 1))


def test_a_judge_of_replies(tmp_path: Path) -> None:
    from qwen_scope_lens.recipes.safety_arms import judged, rates_of

    rows = [
        {"kind": kind, "prompt": f"{{reply}} {number}", "reply": f"r{number}"}
        for number, kind in enumerate(["harmful"] * 4 + ["benign"] * 2)
    ]
    judge = Judge("Refused.", "**Answered**", "answered", "Hm", "Refused", "Answered")
    with Ledger.open(tmp_path) as book:
        found = judged(rows, judge, book, "P {prompt} R {reply}")
        assert found == [True, False, False, None, True, False]
        assert judge.asked[0] == "P {reply} 0 R r0"  # a prompt is not filled in itself
        silent = Judge(*["?"] * 6)
        silent.name = "silent"
        with pytest.raises(GeneratorFailed, match="6 of 6 replies"):
            judged(rows, silent, book, "P {prompt} R {reply}")
    rates = rates_of(rows, found)
    assert rates["ASR"]["value"] == pytest.approx(200 / 3)
    assert (rates["RR"]["value"], rates["unread"]) == (50, 1)
    assert rates["Acc"] == pytest.approx(100 - (200 / 3 + 50) / 2)


class Helpful:
    """A test double for every role: it describes, judges, writes and replies."""

    name = "scripted"

    def __init__(self) -> None:
        self.calls = Counter[str]()

    def say(self, request: Request) -> str:
        text = request.messages[-1][1]
        if request.purpose == "judge" and "Harmful or Benign" in text:
            return "Harmful" if "even" in text else "Benign"
        said = {"describe": f"words of kind {'even' if request.seed % 2 == 0 else 'odd'}"}
        return {"judge": "Yes", "detect": "1", **said}.get(request.purpose, "Sure, here it is.")

    def generate(self, requests: Sequence[Request], book: Any) -> None:
        for number, request in enumerate(requests):
            assert book.start(number)
            self.calls[request.purpose] += 1
            book.finish(number, Completion(self.say(request), "stop", 1, 1))


@pytest.mark.slow  # descriptions of 205 features, and seconds of waiting for the disk
def test_targets_by_descriptions_and_a_judge_are_paid_for_once(
    mini: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"relevance": "judge", "kind_from": "feature", "least_documents": 6}
    changes["kind_rest"] = "benign"  # so that harmful comes from the judge
    roles = dict.fromkeys(("judge", "describer"), "openai:http://localhost:1/v1#none")
    recipe = open_recipe("safety-synthesis").for_smoke().with_settings({**changes, **roles})
    helpful = Helpful()
    monkeypatch.setattr("qwen_scope_lens.writers.roles.Roles.open", lambda self, spec: helpful)

    def done(recipe: Recipe) -> Mapping[str, Any]:
        job = engine.Run(recipe, tmp_path, model=mini)
        for stage in engine.stages_of(recipe)[:3]:
            engine.do_stage(job, stage, engine.state_of(job, stage))
        found = engine.state_of(job, stage).result
        assert found is not None
        return found

    found = done(recipe)
    assert found["described"] == found["targets"] > 0
    assert helpful.calls["describe"] >= found["targets"]
    wanted = TargetSet.load(tmp_path / "targets" / "targets.json").wanted
    assert {target.kind for target in wanted} == {"harmful"}
    before = dict(helpful.calls)
    assert done(recipe.with_settings({"weak_below": 4}))["wanted"] > found["wanted"]
    assert {**helpful.calls, "judge": 0} == {**before, "judge": 0}  # only kinds of new features
    with pytest.raises(GeneratorFailed, match=r"prices\.max_cost"):
        done(recipe.with_settings({"prices": {"max_cost": 0.0}}))


def test_show_hints_at_a_smoke_run(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.write_text(FAKE.replace("smoke: {}", "smoke: {settings: {n: 7}}"))
    recipe, out = open_recipe(fake).for_smoke(), fake.parent / "out"
    run(recipe, out, data=fake.parent)
    show = ["reproduce", "show", str(fake), "--out", str(out), "--data", str(fake.parent)]
    assert main(show) == 0
    assert "was made with --smoke: give it here, too" in capsys.readouterr().err
    assert main([*show, "--smoke"]) == 0
    assert "--smoke" not in capsys.readouterr().err


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "list", "--json"]) == 0
    assert [row["recipe"] for row in json.loads(capsys.readouterr().out)["rows"]] == list(names())
    show = ["reproduce", "show", "toxicity", "--set", "seed=5", "--out", str(tmp_path)]
    assert main(show) == 0
    out = capsys.readouterr().out
    assert "not begun" in out
    assert "estimate: " in out
    assert main(["reproduce", "show", "toxicity", "--yaml"]) == 0
    mine = tmp_path / "mine.yaml"
    mine.write_text(capsys.readouterr().out)
    assert open_recipe(mine) == open_recipe("toxicity")
    assert main(["reproduce", "run", "toxicty", "--out", str(tmp_path)]) == 1
    assert "nearest: toxicity" in capsys.readouterr().err
    wrong = ["reproduce", "run", str(mine), "--set", "seed", "--out", str(tmp_path)]
    assert main(wrong) == 1
    assert "expected KEY=VALUE" in capsys.readouterr().err
