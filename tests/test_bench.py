"""`qsl bench` from prompts to report, on the mini model."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwen_scope_lens as qsl
from qwen_scope_lens.bench import (
    PromptFormat,
    Suite,
    analyse,
    extract_suite,
    read_prompts,
    save_report,
)
from qwen_scope_lens.bench.analysis import performance
from qwen_scope_lens.bench.panel import Scores
from qwen_scope_lens.bench.prompts import rendered, sampled
from qwen_scope_lens.bench.screen import footprint_like
from qwen_scope_lens.bench.suite import open_benchmark, open_suite
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import BadCorpus, BadFile, ScopeError, StoreMismatch, UnknownName
from qwen_scope_lens.stores import Document
from tools.mini.tables import CAPITALS, WORDS

GROUP = "mini-qwen3/w1k-l0-16"
LAYERS = [3, 6]


def items(texts: list[str]) -> list[Document]:
    return [Document(str(i), text, None, {}) for i, text in enumerate(texts)]


def benchmarks() -> dict[str, list[Document]]:
    rng = random.Random(0)
    sums = [f"{rng.randint(0, 99)} + {rng.randint(0, 99)} =" for _ in range(60)]
    words = [f"{w['en']} - {w['de']}\n{w['fr']} - {w['zh']}" for w in WORDS[:40]]
    lands = [f"The capital of {land} is" for land in CAPITALS]
    return {
        "sums": items(sums),
        "some sums": items(sums[:20]),  # nested
        "capitals": items(lands),
        "words 言葉": items(words),
    }


@pytest.fixture(scope="module")
def model() -> Any:
    return qsl.load_model("mini-qwen3", up_to_layer=6)


@pytest.fixture(scope="module")
def suite(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    out = tmp_path_factory.mktemp("bench")
    facts = {"capitals": {"source": "table", "template": "The capital of {land} is"}}
    return extract_suite(benchmarks(), model, GROUP, LAYERS, out, facts, progress=False)


def test_footprints_are_those_of_the_encoder(suite: Suite, model: Any) -> None:
    """Last token, one before it, and any token, against `capture` and the SAE's own encoding."""
    texts = [document.text or "" for document in benchmarks()["capitals"]]
    assert all(texts)
    read = qsl.capture(model, texts, layers=[3])
    codes = qsl.load_sae(f"{GROUP}/3").encode_sparse(read.residuals[3]).to_scipy_csr() > 0
    ends = read.offsets[1:].numpy()
    found = suite["capitals"].footprint(3)
    assert found.sae == f"{GROUP}/3"
    assert (found.items.astype(bool) != codes[ends - 1]).nnz == 0
    back = suite["capitals"].footprint(3, "-2")
    assert (back.items.astype(bool) != codes[ends - 2]).nnz == 0
    keep = read.keep(3).numpy()
    anywhere = suite["capitals"].footprint(3, "any")
    for i in range(len(texts)):
        rows = np.arange(ends[i] - read.doc(i).n_tokens, ends[i])
        expected = codes[rows[keep[rows]]].sum(0).A1 > 0
        assert (anywhere.items[i].toarray()[0] > 0).tolist() == expected.tolist()


def test_what_a_suite_refuses(suite: Suite, model: Any, tmp_path: Path) -> None:
    one = suite["sums"]
    with pytest.raises(UnknownName, match="expected last"):
        one.footprint(3, "middle")
    with pytest.raises(UnknownName, match="expected last"):
        one.footprint(3, "-" + "9" * 5000)
    with pytest.raises(BadCorpus, match="has no token -40"):
        one.footprint(3, "-40")
    with pytest.raises(ScopeError, match="layer 5"):
        one.footprint(5)
    with pytest.raises(UnknownName, match="no benchmark 'x'"):
        suite["x"]
    with pytest.raises(BadFile, match="does not hold benchmarks"):
        open_suite(tmp_path)
    with pytest.raises(BadFile, match="is not a benchmark"):
        open_benchmark(tmp_path / "x")
    with pytest.raises(BadCorpus, match="cannot be the name"):
        extract_suite({"a/b": items(["x"])}, model, GROUP, [6], tmp_path)
    with pytest.raises(BadCorpus, match="cannot be the name"):
        extract_suite({"a\udc80": items(["x"])}, model, GROUP, [6], tmp_path)
    with pytest.raises(BadCorpus, match="no items"):
        extract_suite({"a": []}, model, GROUP, [6], tmp_path)
    with pytest.raises(ScopeError, match="limit is"):
        extract_suite(
            {"long": items(["word " * 9])},
            model,
            GROUP,
            [6],
            tmp_path,
            max_tokens=5,
            progress=False,
        )


def test_a_suite_grows_and_is_not_made_again(suite: Suite, model: Any) -> None:
    stamp = {path: path.stat().st_mtime_ns for path in suite.folder.rglob("*.parquet")}
    grown = extract_suite(
        {**benchmarks(), "more": items(["a b c", "a b c"])},
        model,
        GROUP,
        LAYERS,
        suite.folder,
        progress=False,
    )
    assert "more" in grown.names
    assert grown["more"].footprint().keys == ("0", "1")
    assert all(path.stat().st_mtime_ns == before for path, before in stamp.items())
    with pytest.raises(StoreMismatch, match=r"other prompts or settings than benchmark more"):
        extract_suite({"more": items(["a"])}, model, GROUP, LAYERS, suite.folder, progress=False)
    for path in suite.folder.glob("more*"):
        if path.is_file():
            path.unlink()
    assert open_suite(suite.folder).names == suite.names


def test_candidates_are_read_as_the_benchmark_was(suite: Suite, model: Any, tmp_path: Path) -> None:
    own = suite["capitals"]
    path = tmp_path / "new.jsonl"
    rows = [{"land": "France"}, {"land": "Atlantis"}]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    found = footprint_like(own, path, 6, model=model)
    at = list(CAPITALS).index("France")
    assert (found.items[0] != own.footprint(6).items[at]).nnz == 0
    again = footprint_like(own, suite.folder / "sums", 6)
    assert (again.items != suite["sums"].footprint(6).items).nnz == 0
    with pytest.raises(BadFile, match="not a feature store"):
        footprint_like(own, tmp_path)


def test_analysis_and_report(suite: Suite, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ("sums", "some sums", "capitals", "words 言葉", "mmlu")
    skill = np.linspace(0.2, 0.8, 9)[:, None]
    results = {
        name: (rng.random((9, len(docs))) < skill).astype(float)
        for name, docs in benchmarks().items()
    }
    table = np.stack([results[n].mean(1) if n in results else rng.random(9) for n in names], axis=1)
    scores = Scores(tuple(f"m{i}" for i in range(9)), names, table, results)
    found = analyse(suite, 6, scores=scores, control="mmlu", draws=20)
    by = {(row.first, row.second): row for row in found.overlaps}
    assert by["some sums", "sums"].overlap.value == 1.0  # nested
    assert by["sums", "some sums"].overlap.value < 1.0
    assert [view.layer for view in found.layers] == LAYERS
    assert found.layers[1].same_ranking == pytest.approx(1)
    assert found.performance is not None
    assert found.performance.partial is not None
    assert found.rank_check is not None
    assert len(repr(found)) < 2000
    assert found.to_pandas()["benchmark"].tolist() == [
        row.name for row in sorted(found.redundancy, key=lambda row: -row.r_hat.value)
    ]
    square = found.overlap_table().to_pandas().set_index("benchmark")
    assert square.loc["some sums", "sums"] == square.loc["sums", "sums"] == 1.0
    assert square.loc["sums", "some sums"] == by["sums", "some sums"].overlap.value
    assert found._repr_html_().count("<table>") == 2
    with pytest.raises(StoreMismatch, match="is one of the pairs"):
        performance(suite.footprints(6), scores, "sums")
    files = save_report(found, tmp_path / "r.html")
    page = files[0].read_text("utf-8")
    assert page.count("<svg") >= 5
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert "words 言葉" in page
    data = json.loads(files[1].read_text("utf-8"))
    assert data["provenance"]["sae"] == f"{GROUP}/6"
    rows = {path.name: list(csv.DictReader(path.open(encoding="utf-8"))) for path in files[2:]}
    assert len(rows["r.overlap.csv"]) == 12
    assert {row["name"] for row in rows["r.redundancy.csv"]} == set(suite.names)
    assert float(rows["r.agreement.csv"][0]["r"]) <= 1


def test_scores_belong_to_the_items_that_were_read(suite: Suite) -> None:
    """By id where there are ids: more results are left out, fewer refused; else by their number."""
    rng = np.random.default_rng(1)
    names = suite.names
    sizes = {name: suite[name].store.n_docs for name in names}
    models = ("a", "b", "c", "d")
    results = {n: (rng.random((4, m + 5)) < 0.5).astype(float) for n, m in sizes.items()}
    for matrix in results.values():  # items that nobody read: they would turn the ranking round
        matrix[:, -5:] = [[1.0], [0.0], [0.0], [0.0]]
        matrix[:, :2] = [[0, 0], [0, 1], [1, 0], [1, 1]]
    ids = {n: tuple(map(str, range(m + 5))) for n, m in sizes.items()}
    table = np.stack([results[n].mean(1) for n in names], axis=1)
    scores = Scores(models, names, table, results, ids)
    said: list[str] = []
    found = analyse(suite, 6, scores=scores, draws=5, say=said.append)
    assert [a.n_items for a in found.agreement] == [sizes[n] for n in names]
    assert any("5 of 25 scored items were not extracted" in line for line in said)
    assert found.provenance["scored items left out"] == dict.fromkeys(names, 5)
    matched = scores.matched({names[0]: suite[names[0]].footprint(6).keys})
    assert matched.table[:, 0].tolist() == results[names[0]][:, :-5].mean(1).tolist()
    assert matched.table[:, 1].tolist() == table[:, 1].tolist()
    first = names[0]
    for wrong, message in (
        # without ids only the number can be compared
        (Scores(models, names, table, results), r"has 50 items and the scores 55"),
        (
            Scores(
                models,
                names,
                table,
                results | {first: results[first][:, :30]},
                ids | {first: ids[first][:30]},
            ),
            r"50 items and the scores 30; 20 items",
        ),
        (
            Scores(models, names, table, results, ids | {first: tuple(f"q{i}" for i in range(55))}),
            r"50 items of the footprint have no result. The first of them is '0'.*'q0'",
        ),
    ):
        with pytest.raises(StoreMismatch, match=message):
            analyse(suite, 6, scores=wrong, draws=5)
    several = Scores(("m", "n"), ("x",), np.zeros((2, 1)), {"x": np.eye(2)}, {"x": ("3", "4")})
    assert several.matched({"x": ["4/0", "4/1"]}).results["x"].tolist() == [[0.0], [1.0]]


def test_a_limit_draws_by_lot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seeded, from the whole file, with the items' own ids; the draw is kept with the benchmark."""
    source = tmp_path / "many.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": f"{i} + 1 ="}) for i in range(80)), "utf-8")
    keys: list[list[int]] = []
    for seed in (0, 0, 1):
        out = tmp_path / f"s{len(keys)}"
        words = [
            "bench",
            "extract",
            str(source),
            "--model",
            "mini-qwen3",
            "--sae",
            GROUP,
            "--layer",
            "0",
            "--out",
            str(out),
            "--limit",
            "9",
        ]
        assert main([*words, "--seed", str(seed), "--quiet"]) == 0
        one = open_benchmark(out / "many")
        assert (one.facts["limit"], one.facts["seed"], one.facts["drawn_from"]) == (9, seed, 80)
        documents = one.store.documents(["key", "text"]).to_pylist()
        assert all(row["text"] == f"{row['key']} + 1 =" for row in documents)
        keys.append([int(row["key"]) for row in documents])
    assert keys[0] == keys[1] == sorted(keys[0])
    assert keys[2] != keys[0]
    assert max(keys[0] + keys[2]) > 40
    assert len(set(keys[0])) == 9
    assert sampled(5, 9, 0) == sampled(5, None, 3) == [0, 1, 2, 3, 4]


def test_prompts_from_rows(tmp_path: Path) -> None:
    row = {"question": "2 {+} 2?", "choices": ["3", "4"], "n": 5, "half": "\ud83d"}
    template = PromptFormat(template="{{Q}} {question}\nA. {choices[0]} ({n:03d}) {half}")
    assert rendered(row, template, "row") == "{Q} 2 {+} 2?\nA. 3 (005) \ufffd"
    for bad, message in (
        (PromptFormat(template="{answer}"), "KeyError"),
        (PromptFormat(template="{choices[7]}"), "IndexError"),
        (PromptFormat(template="{n.__class__}"), "is not a column"),
        (PromptFormat(template="{"), "does not fit"),
        (PromptFormat(template="{n:>999999999999}"), "at most 9999"),
        (PromptFormat(column="answer"), "no column 'answer'"),
        (PromptFormat(column="choices"), "expected a string"),
    ):
        with pytest.raises(BadCorpus, match=message):
            rendered(row, bad, "row")
    with pytest.raises(BadCorpus, match="is empty"):
        rendered({"text": " "}, PromptFormat(), "row")
    path = tmp_path / "b.jsonl"
    path.write_text("", "utf-8")
    with pytest.raises(BadCorpus, match="no items"):
        list(read_prompts(path, PromptFormat()))
    path.write_text(json.dumps(row) + "\n", "ascii")
    with pytest.raises(BadCorpus, match="half of a surrogate pair"):
        list(read_prompts(path, PromptFormat(template="\udc80{n}")))
    halves = tmp_path / "halves.jsonl"
    halves.write_text('{"prompt": "a", "id": "\\ud800"}\n{"prompt": "b", "id": 7}\n', "ascii")
    assert [d.key for d in read_prompts(halves, PromptFormat())] == ["\ufffd", "7"]
    [chat] = read_prompts(path, PromptFormat(chat=True))
    assert chat.messages == ({"role": "user", "content": "2 {+} 2?"},)


TASK = """
task: lands
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: {kind}
doc_to_text: "The capital of {{{{land}}}} is"
doc_to_target: {target}
{more}
"""


@pytest.mark.parametrize("kind", ["multiple_choice", "generate_until"])
def test_lm_eval_renders_its_own_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pytest.importorskip("lm_eval")
    from qwen_scope_lens.bench.prompts import task_prompts

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "lands.jsonl"
    rows = [{"land": land, "city": city} for land, city in list(CAPITALS.items())[:5]]
    data.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    choices = kind == "multiple_choice"
    (tmp_path / "lands.yaml").write_text(
        TASK.format(
            data=data,
            kind=kind,
            target="0" if choices else '"{{city}}"',
            more='doc_to_choice: ["{{city}}", "Rome", "Oslo"]' if choices else "",
        )
    )
    found = task_prompts(["lands"], tmp_path)["lands"]
    assert [d.text for d in found] == [f"The capital of {row['land']} is" for row in rows]
    shots = task_prompts(["lands"], tmp_path, fewshot=2, limit=3)["lands"]
    assert len(shots) == 3
    assert all(d.text is not None and d.text.count("The capital of") == 3 for d in shots)
    chat = task_prompts(
        ["lands"], tmp_path, chat_template=lambda m, **_: f"<{m[0]['role']}>{m[0]['content']}"
    )["lands"]
    assert chat[0].text == f"<user>The capital of {rows[0]['land']} is"
    with pytest.raises(BadCorpus, match="is not a folder"):
        task_prompts(["lands"], tmp_path / "none")


GROUP_OF_TASKS = """
group: places
task: [north, south]
aggregate_metric_list: [{metric: acc}]
"""


def test_a_group_of_lm_eval_is_one_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items keep their subtask and their number, and a limit draws from all subtasks."""
    pytest.importorskip("lm_eval")
    from qwen_scope_lens.bench.prompts import task_prompts

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lands = list(CAPITALS.items())
    parts = {"north": lands[:20], "south": lands[20:32]}
    for name, rows in parts.items():
        data = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"land": land, "city": city}) for land, city in rows]
        data.write_text("\n".join(lines), "utf-8")
        task = TASK.format(data=data, kind="generate_until", target='"{{city}}"', more="")
        (tmp_path / f"{name}.yaml").write_text(task.replace("task: lands", f"task: {name}"))
    (tmp_path / "places.yaml").write_text(GROUP_OF_TASKS)
    [(name, documents)] = task_prompts(["places"], tmp_path).items()
    assert name == "places"
    expected = {
        f"{part}/{i}": f"The capital of {land} is"
        for part, rows in parts.items()
        for i, (land, _) in enumerate(rows)
    }
    assert {d.key: d.text for d in documents} == expected
    drawn = task_prompts(["places"], tmp_path, limit=12, seed=3)["places"]
    assert len(drawn) == 12
    assert all(d.text == expected[d.key] for d in drawn)  # numbers of the task, not of the draw
    assert {d.key.split("/")[0] for d in drawn} == set(parts)
    again = task_prompts(["places"], tmp_path, limit=12, seed=3)["places"]
    assert [d.key for d in again] == [d.key for d in drawn]
    apart = task_prompts(["places"], tmp_path, apart=True)
    assert {n: [d.key for d in docs] for n, docs in apart.items()} == {
        part: [str(i) for i in range(len(rows))] for part, rows in parts.items()
    }
    assert list(task_prompts(["north"], tmp_path, limit=5)) == ["north"]


def test_the_command_line(suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(suite.folder)
    assert main(["bench", "redundancy", folder, "--layers", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["benchmark"] in suite.names
    assert main(["bench", "overlap", folder, "--first", "sums"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    keys = tmp_path / "keys.txt"
    assert main(["bench", "subset", f"{folder}/sums", "--coverage", "0.5", "--out", str(keys)]) == 0
    assert "random items would be needed" in capsys.readouterr().out
    assert set(keys.read_text().split()) <= {str(i) for i in range(60)}
    assert main(["bench", "screen", f"{folder}/some sums", f"{folder}/sums"]) == 0
    assert "of 60 items add a feature" in capsys.readouterr().out
    assert main(["bench", "duplicates", f"{folder}/some sums", f"{folder}/sums"]) == 0
    pairs = capsys.readouterr().out
    assert "19" in pairs
    assert main(["bench", "contamination", f"{folder}/some sums", f"{folder}/sums"]) == 0
    assert "20 of 20 items (100.0%)" in capsys.readouterr().out
    out = tmp_path / "r.html"
    assert main(["bench", "report", folder, "--out", str(out)]) == 0
    assert out.is_file()
    source = tmp_path / "tiny.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n', "utf-8")
    with_mini = ["--model", "mini-qwen3", "--sae", GROUP]
    extract = ["bench", "extract", f"nimi={source}", *with_mini]
    assert main([*extract, "--layers", "0-1", "--out", str(tmp_path / "s")]) == 0
    assert open_suite(tmp_path / "s").layers == (0, 1)
    capsys.readouterr()
    for words, message in (
        (
            [*extract[:3], f"nimi={source}", *with_mini, "--layer", "0", "--out", "x"],
            "two benchmarks",
        ),
        (
            ["bench", "extract", "none.jsonl", *with_mini, "--layer", "0", "--out", "x"],
            "not exist",
        ),
        (["bench", "redundancy", str(tmp_path)], "does not hold benchmarks"),
        (["bench", "report", folder, "--control", "x", "--out", str(out)], "without scores"),
    ):
        assert main(words) == 1
        assert message in capsys.readouterr().err
    for layers, message in (
        ("x", "is not a list of layers"),
        ("9" * 5000, "no model has so many layers"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*extract, "--layers", layers, "--out", "x"])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
