"""From stores to targets to data: finding, judging, describing, and the command line.

Judges, describers and scorers are scripted (there is no capable model here); what they are shown
and what is made of their answers is real.
"""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from endpoint_server import Call, Server, answer
from forks import Fork, command
from scripted_writer import Scripted

import qwen_scope_lens as qsl
from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import (
    BadFile,
    BadPlan,
    GeneratorFailed,
    StoreMismatch,
    TooLittleData,
)
from qwen_scope_lens.features import pool
from qwen_scope_lens.labels import Label, LabelPack, describe
from qwen_scope_lens.labels.describe import (
    Sampled,
    balanced_accuracy,
    one_line,
    parse_numbers,
)
from qwen_scope_lens.labels.passages import Passages
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.steering.calibrate import calibrate_from_store
from qwen_scope_lens.stores import FeatureStore, extract
from qwen_scope_lens.synth import TargetSet, find_targets
from qwen_scope_lens.synth.find import features_to_describe
from qwen_scope_lens.synth.judgements import by_judge, by_labels, choose_relevance, parse_answer
from qwen_scope_lens.synth.run import read_rows
from qwen_scope_lens.synth.targets import Target
from qwen_scope_lens.writers import Ledger, Request, Templates

LAYER = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`seed`: English documents; `anchor`: English and Chinese ones, labelled with the language."""
    place = tmp_path_factory.mktemp("stores")
    model = qsl.load_model("mini-qwen3", up_to_layer=LAYER)
    rows = [
        {"text": record["text"][:200], "lang": lang}
        for lang in ("en", "zh")
        for record in list(heldout("prose", lang))[:30]
    ]
    for name, some in (("seed", rows[:15]), ("anchor", rows[15:])):
        extract(
            some,
            model=model,
            group="mini-qwen3/w1k-l0-16",
            layers=[LAYER],
            out=place / name,
            max_tokens=64,
            progress=False,
        )
    return place


@pytest.fixture(scope="module")
def seed(folder: Path) -> FeatureStore:
    return FeatureStore.open(folder / "seed")


@pytest.fixture(scope="module")
def anchor(folder: Path) -> FeatureStore:
    return FeatureStore.open(folder / "anchor")


def test_targets_are_what_the_formulas_say(seed: FeatureStore, anchor: FeatureStore) -> None:
    """Brute force over dense maxima, in both configurations."""
    in_seed, in_anchor = (pool(store, LAYER).toarray() for store in (seed, anchor))
    for threshold in (0.0, 20.0):
        found = find_targets(seed, anchor, threshold=threshold, passages=0, least_documents=2)
        s, a = ((x > threshold).sum(axis=0) for x in (in_seed, in_anchor))
        wanted = np.flatnonzero(a >= 2).tolist()
        assert [t.ref.feature for t in found.targets] == wanted
        assert [t.seed_documents for t in found.targets] == s[wanted].tolist()
        assert [t.reference_documents for t in found.targets] == a[wanted].tolist()
        assert {t.ref.feature for t in found.missing} == {f for f in wanted if s[f] == 0}
        assert found.seed_coverage == pytest.approx((s[wanted] > 0).mean())
        assert found.seed_fac == pytest.approx((s[wanted] > 0).mean())
    assert found.seed_size == 15
    assert len(found.openings) == len(set(found.openings)) > 20
    texts = anchor.documents(["text"])["text"].to_pylist()
    assert all(any(text.startswith(opening) for text in texts) for opening in found.openings)


def test_a_typical_activation_is_the_same_number_in_every_room(anchor: FeatureStore) -> None:
    """The mean over the tokens where the feature fires; here against a sum over dense codes."""
    found = find_targets(anchor, anchor, passages=0)
    assert len(found) > 20
    dense = torch.cat([b.codes.to_dense() for b in anchor.iter_blocks(LAYER, keep=True)]).double()
    by_hand = dense.sum(0) / (dense > 0).sum(0)
    calibration = calibrate_from_store(anchor, found.refs)
    for target in found.targets:
        assert target.typical == pytest.approx(float(by_hand[target.ref.feature]), rel=1e-9)
        assert target.typical == calibration[target.ref]


def test_targets_of_an_older_version_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """In version 1 `typical` was another quantity; a push by it would be too strong."""
    path = tmp_path / "targets.json"
    ref = qsl.FeatureRef.parse("mini-qwen3/w1k-l0-16/6/7")
    TargetSet((Target(ref, typical=50.0),)).save(path)
    assert TargetSet.load(path).targets[0].typical == 50.0
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(BadFile, match=r"version 1, .* again with `qsl synth targets`"):
        TargetSet.load(path)


def test_relevance_decides_and_weak_ones_follow(seed: FeatureStore, anchor: FeatureStore) -> None:
    count = (pool(seed, LAYER).toarray() > 0).sum(axis=0)
    sae = find_targets(seed, anchor, passages=0).saes[0]
    covered, missing = int(np.flatnonzero(count == 1)[0]), int(np.flatnonzero(count == 0)[0])
    relevance = {sae.feature(covered): 0.9, sae.feature(missing): 0.8, sae.feature(5): 0.1}
    pack = LabelPack([Label(sae.feature(missing), "a description")])
    found = find_targets(
        seed, relevance=relevance, labels=pack, weak_below=2, least_relevance=0.5, task="t"
    )
    assert [t.ref.feature for t in found.wanted] == [missing, covered]
    assert found.wanted[0].description == "a description"
    assert found.seed_fac is None
    for name in ("threshold", "least_relevance"):
        with pytest.raises(BadPlan, match="finite"):
            find_targets(seed, anchor, **{name: float("nan")})  # type: ignore[arg-type]
    with pytest.raises(TooLittleData, match="which features matter"):
        find_targets(seed)
    with pytest.raises(TooLittleData, match="none is relevant enough"):
        find_targets(seed, relevance=relevance, least_relevance=0.95)


def test_stores_of_two_saes_do_not_mix(seed: FeatureStore, tmp_path: Path) -> None:
    other = extract(
        ["The kernel reads a file."],
        model="mini-qwen3",
        group="mini-qwen3/w1k-l0-16",
        layers=[5],
        out=tmp_path / "other",
        progress=False,
    )
    with pytest.raises(qsl.ScopeError, match="layer 6"):
        find_targets(seed, other)
    changed = FeatureStore.open(tmp_path / "other")
    with pytest.raises(StoreMismatch):
        changed.feature("mini-qwen3/w1k-l0-16/6/1")


def test_passages_mark_what_fires(anchor: FeatureStore) -> None:
    """Taken apart again, a passage is words of the text, marked exactly where the codes fire."""
    from qwen_scope_lens.features import statistics

    facts = statistics(anchor, LAYER, examples=3, sample=4)
    source = Passages(anchor, before=5, after=3)
    texts = anchor.documents(["text"])["text"].to_pylist()
    features = np.flatnonzero(facts.doc_count > 2)[:8].tolist()
    assert len(features) == 8
    for feature in features:
        assert len(facts.top_examples(feature)) == 3
        for example in facts.top_examples(feature):
            marked = source.marked(LAYER, feature, example)
            plain = source.plain(example.doc, example.position)
            assert marked.replace("<<", "").replace(">>", "") == plain
            assert plain in " ".join(texts[example.doc].split())
            assert "<<" in marked
            scaled = source.marked(LAYER, feature, example, float(facts.maximum[feature]))
            assert f"({round(10 * example.value / facts.maximum[feature])})" in scaled


def test_labels_and_judges_and_contrasts(
    tmp_path: Path, anchor: FeatureStore, seed: FeatureStore
) -> None:
    sae = find_targets(seed, anchor, passages=0).saes[0]
    pack = LabelPack(
        [
            Label(sae.feature(1), "Chinese", 0.9),
            Label(sae.feature(2), "chinese names"),
            Label(sae.feature(3), "Numbers", 0.9),
        ]
    )
    assert set(by_labels(pack, "^chin")) == {sae.feature(1), sae.feature(2)}
    assert set(by_labels(pack, "chin", 0.5)) == {sae.feature(1)}
    with pytest.raises(TooLittleData):
        by_labels(pack, "french")
    with pytest.raises(qsl.ScopeError, match="regular expression"):
        by_labels(pack, "(")
    replies = {"Chinese": "Yes.", "chinese names": "<think>no</think>Probably", "Numbers": "No"}

    def say(request: Request) -> str:
        text = request.messages[-1][1]
        return next((said for name, said in replies.items() if f"\n{name}\n" in text), "??")

    with Ledger.open(tmp_path) as ledger:
        judged = by_judge(
            Scripted(say),
            ledger,
            Templates(),
            "speak Chinese",
            {ref: label.text for ref, label in pack.items()},
            {},
        )
        assert [judged[sae.feature(i)] for i in (1, 2, 3)] == [1.0, 0.67, 0.0]
        with pytest.raises(GeneratorFailed, match="no usable answer for 3 of 3"):
            by_judge(
                Scripted(lambda r: "As an AI"),
                ledger,
                Templates(),
                "t",
                {},
                dict.fromkeys(pack, ()),
            )
        with pytest.raises(BadPlan, match="--task"):
            by_judge(Scripted(say), ledger, Templates(), "", {}, {})
    for text, value in {
        "yes": 1,
        "Maybe, but": 0.33,
        "0.8": 0.8,
        ".5": 0.5,
        "1.5": None,
        "": None,
        "nothing": None,
        "I say yes": None,
        "**No**": 0.0,
    }.items():
        assert parse_answer(text) == value
    found = choose_relevance(anchor, None, layers=[LAYER], contrast="lang=zh")
    assert found
    rates = pool(anchor, LAYER).toarray() > 0
    chinese = anchor.labels("lang") == "zh"
    best = max(found, key=lambda ref: found[ref])
    column = rates[:, best.feature]
    assert column[chinese].mean() > column[~chinese].mean()
    for wrong in ({"contrast": "lang"}, {"match": "x"}):
        with pytest.raises(BadPlan):
            choose_relevance(anchor, None, layers=[LAYER], **wrong)  # type: ignore[arg-type]


def test_descriptions_are_tested(tmp_path: Path, anchor: FeatureStore) -> None:
    """An oracle scorer that looks the passages up scores 1, one that always says none 0.5."""
    fires: dict[str, set[str]] = {}
    source = Passages(anchor)
    maxima = pool(anchor, LAYER, keep=False).toarray() > 0
    some = [f for f in range(1024) if 14 <= maxima[:, f].sum() <= 25][:5]
    sae = FeatureRef.parse(f"{anchor.sae(LAYER).ref}/0").sae
    refs = [sae.feature(f) for f in some]
    for ref in refs:
        hits = anchor.by_feature(ref)
        pairs = zip(hits.doc.tolist(), hits.position.tolist(), strict=True)
        fires[f"feature {ref.feature}"] = {source.plain(d, p) for d, p in pairs}

    def describer(request: Request) -> str:
        assert "<<" in request.messages[-1][1]
        assert "(10)" in request.messages[-1][1]
        return f'"{next(names)}"\nand more'

    def oracle(request: Request) -> str:
        text = request.messages[-1][1]
        name = text.split("described as:\n")[1].split("\n")[0]
        lines = text.split("Passages:\n")[1].split("\n\n")[0].split("\n")
        yes = [line.split(". ", 1) for line in lines]
        numbers = [number for number, passage in yes if passage in fires[name]]
        shown.append(len(lines))
        return ", ".join(numbers) or "none"

    shown: list[int] = []
    small = Sampled(top=4, active=4, silent=4)
    packs = {}
    for kind, scorer in {
        "oracle": oracle,
        "none": lambda request: "None of them.",
        "odd": lambda request: "I think so",
    }.items():
        names = iter(fires)
        with Ledger.open(tmp_path / kind) as ledger:
            packs[kind] = describe(
                anchor, refs, Scripted(describer), ledger, scorer=Scripted(scorer), sampled=small
            )
    pack = packs["oracle"]
    assert [label.text for label in pack.values()] == [f"feature {f}" for f in some]
    assert shown == [8] * 5
    assert pack[refs[0]].provenance["tested"] == [4, 4]
    for kind, score in {"oracle": 1.0, "none": 0.5, "odd": None}.items():
        assert [label.score for label in packs[kind].values()] == [score] * 5
    assert LabelPack.read(pack.write(tmp_path / "labels.jsonl")) == pack
    assert features_to_describe(anchor, layer=LAYER, features=[3, 4]) == [
        sae.feature(3),
        sae.feature(4),
    ]
    assert (
        len(features_to_describe(anchor, layer=LAYER))
        == (pool(anchor, LAYER) > 0).max(axis=0).sum()
    )


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("Names of fruit.", "Names of fruit."),
        ("They have in common the following:\n\n1. Names of fruit\n2. Colours", "Names of fruit"),
        ('"Names of fruit"\nBecause the passages say so.', "Names of fruit"),
        ("Ends with a colon:", "Ends with a colon:"),
        ("", ""),
    ],
)
def test_a_description_is_the_line_that_says_something(said: str, label: str) -> None:
    """Small writers announce their answer, and the announcement is not a label."""
    assert one_line(said) == label


def test_scores() -> None:
    assert parse_numbers("1, 3 and 4.", 4) == {0, 2, 3}
    assert parse_numbers("None", 4) == set()
    assert parse_numbers("<think>2</think> 1", 4) == {0}
    assert parse_numbers("1, " + "9" * 5000, 4) is None
    assert parse_numbers("7", 4) is parse_numbers("maybe", 4) is parse_numbers("0", 4) is None
    active = (True, True, False, False, False, False)
    assert balanced_accuracy({0, 1}, active) == 1
    assert balanced_accuracy(set(), active) == 0.5
    assert balanced_accuracy({0, 2}, active) == pytest.approx((0.5 + 0.75) / 2)


# The command line.


def write_chinese(texts: list[str]) -> Callable[[Call], Any]:
    """An endpoint that answers prompts with real texts, and now and then misbehaves."""

    def behave(call: Call) -> Any:
        if call.number % 7 == 3:
            return 500, {}, b"busy"
        if call.number % 7 == 5:
            return 200, {}, b"<html>"
        content = call.prompt
        if "Write one" in content:
            return answer(texts[call.body["seed"] % len(texts)])
        if "Rewrite the message" in content:
            return answer("请问 " + content.rpartition("Message:\n")[2])
        return answer(
            "抱歉，我不能帮助你。"
            if "careful" in call.body["messages"][0]["content"]
            else "好的，这是一个回答。"
        )

    return behave


@pytest.fixture(scope="module")
def chinese(anchor: FeatureStore) -> list[str]:
    table = anchor.documents(["text", "lang"]).to_pylist()
    return [row["text"] for row in table if row["lang"] == "zh"]


def run_words(folder: Path, out: Path, server: Server, *more: str) -> list[str]:
    return [
        "synth",
        "run",
        str(folder / "targets.json"),
        "--out",
        str(out),
        "--generator",
        f"openai:{server.url}#writer",
        "--budget",
        "16",
        "--attempts",
        "2",
        "--timeout",
        "5",
        "--backoff",
        "0.01",
        "--wave",
        "6",
        "--price-prompt",
        "1",
        "--price-completion",
        "2",
        *more,
    ]


def words_for_targets(folder: Path) -> list[str]:
    return [
        "synth",
        "targets",
        str(folder / "seed"),
        "--reference",
        str(folder / "anchor"),
        "--contrast",
        "lang=zh",
        "--kind",
        "harmful",
        "--out",
        str(folder / "targets.json"),
    ]


def test_a_run_without_any_answer_fails(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words_for_targets(folder)) == 0
    with Server(lambda call: answer("")) as server:
        pass  # closed again: nobody listens there
    out = tmp_path / "data.jsonl"
    assert main(run_words(folder, out, server, "--budget", "2", "--language", "zh")) == 1
    assert "none of 2 candidates got all its answers" in capsys.readouterr().err
    with Server(lambda call: answer("很好")) as server:  # a failed call is asked again
        again = run_words(folder, out, server, "--budget", "2", "--language", "zh")
        assert main(again) == 0


@pytest.mark.slow
def test_the_whole_way_on_the_command_line(
    folder: Path, tmp_path: Path, chinese: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    targets = folder / "targets.json"
    assert main(words_for_targets(folder)) == 0
    assert "missing:" in capsys.readouterr().out
    found = TargetSet.load(targets)
    assert found.missing
    assert all(target.examples for target in found.missing)
    out = tmp_path / "data.jsonl"
    with Server(write_chinese(chinese)) as server:
        words = run_words(folder, out, server, "--language", "zh")
        assert main(words) == 0
        first = capsys.readouterr().out
        paid = len(server.calls)
        assert main(words) == 0
        assert len(server.calls) == paid  # the same again, for nothing
        again = capsys.readouterr().out
    assert "HTTP 500" in first
    assert "cost nothing again" in again
    rows = read_rows(out)
    assert rows
    assert {row["generator"] for row in rows} == {"openai:writer"}
    assert all(row["activation"] > 0 for row in rows)
    assert (
        main(
            [
                "synth",
                "report",
                str(out),
                "--targets",
                str(targets),
                "--html",
                str(tmp_path / "report.html"),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert f"{len(rows)} kept of" in printed
    assert (tmp_path / "report.html").stat().st_size > 3000
    # The limit, another language, another target file.
    with Server(write_chinese(chinese)) as server:
        assert main(run_words(folder, tmp_path / "b.jsonl", server, "--max-cost", "0.0001")) == 0
        assert "the cost limit of 0.0001 is reached" in capsys.readouterr().out
        assert main(run_words(folder, tmp_path / "c.jsonl", server, "--language", "en")) == 0
        assert "wrong language" in capsys.readouterr().out
        assert read_rows(tmp_path / "c.jsonl") == []
        assert main(run_words(folder, out, server, "--language", "en")) == 1
        assert "another recipe (language zh there, language en here)" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_it_continues_and_pays_for_nothing_twice(
    folder: Path, tmp_path: Path, chinese: list[str]
) -> None:
    """kill -9 in the middle; then the result is that of a run that was never killed."""
    if not (folder / "targets.json").exists():
        main(words_for_targets(folder))
    running: list[Fork] = []

    def behave(call: Call) -> Any:
        if call.number == 15:
            running[0].kill()
        return write_chinese(chinese)(Call(0, call.path, call.headers, call.body, None))

    with Server(behave) as server:
        out = tmp_path / "killed.jsonl"
        running.append(command(run_words(folder, out, server)))
        assert running[0].wait() == -signal.SIGKILL
        main(run_words(folder, out, server))
        asked = Counter(call.key for call in server.calls)
        main(run_words(folder, tmp_path / "whole.jsonl", server))
    assert read_rows(out)
    assert read_rows(out) == read_rows(tmp_path / "whole.jsonl")
    assert sum(asked.values()) - len(asked) <= 8  # in flight when it died
    events = [json.loads(line) for line in (tmp_path / "killed.run" / "ledger.jsonl").open()]
    answers = Counter(row["key"] for row in events if row["event"] == "answer")
    assert max(answers.values()) == 1


def test_describe_and_label_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(call: Call) -> Any:
        return answer("none" if "numbers only" in call.body["messages"][0]["content"] else "words")

    out = tmp_path / "labels.jsonl"
    with Server(behave) as server:
        words = ["synth", "describe", str(folder / "anchor"), "--layer", "6", "--features", "0-20"]
        assert main([*words, "--generator", f"openai:{server.url}#m", "--out", str(out)]) == 0
    kept = out.read_bytes()
    words[-1] = "0-3"
    gone = [*words, "--generator", f"openai:{server.url}#n", "--backoff", "0", "--out", str(out)]
    printed = capsys.readouterr().out
    assert main(gone) == 1  # its server has ended
    assert "nothing is written" in capsys.readouterr().err
    assert out.read_bytes() == kept
    assert "of 21 features described" in printed
    assert "mean score 0.500" in printed
    pack = LabelPack.read(out)
    address = str(next(ref for ref, label in pack.items() if label.score is not None))
    assert main(["label", "list", str(out), "--match", "WORDS", "--least-score", "0.4"]) == 0
    assert address in capsys.readouterr().out
    assert main(["label", "show", str(out), address]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"]["describer"] == "openai:m"
    mine = LabelPack(
        [
            Label(pack[address].ref, "mine"),
            Label(FeatureRef.parse("mini-qwen3/w1k-l0-16/6/1023"), "x"),
        ]
    )
    mine.write(tmp_path / "mine.jsonl")
    merged = tmp_path / "merged.jsonl"
    assert (
        main(["label", "merge", str(tmp_path / "mine.jsonl"), str(out), "--out", str(merged)]) == 0
    )
    assert LabelPack.read(merged).text(address) == "mine"
    assert main(["label", "check", str(merged), "--store", str(folder / "anchor")]) == 0
    assert f"{len(LabelPack.read(merged))} labels" in capsys.readouterr().out
    for wrong in (
        ["show", str(out), "mini-qwen3/w1k-l0-16/6/1000"],
        ["list", str(out), "--match", "("],
        ["check", str(tmp_path / "none.jsonl")],
    ):
        assert main(["label", *wrong]) == 1
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_templates_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["synth", "templates", "--out", str(tmp_path / "mine")]) == 0
    assert "26 files" in capsys.readouterr().out
    for wrong, words in {
        ("--generator", "gpt"): "is not a generator",
        ("--generator", "openai:http://localhost:1/v1"): "does not name a model",
        ("--generator", "openai:http://localhost:1/v1#m", "--recipe", "x.yaml"): "cannot be read",
        ("--generator", "openai:http://localhost:1/v1#m", "--language", "xx"): "detector knows",
        ("--generator", "openai:http://localhost:1/v1#m", "--temperature", "nan"): "finite",
        ("--generator", "openai:http://localhost:1/v1#m", "--timeout", "nan"): "timeout",
        ("--generator", "openai:http://localhost:1/v1#m", "--max-cost", "nan"): "finite",
        ("--generator", "openai:http://localhost:1/v1#m"): "no connection",
    }.items():
        out = tmp_path / "data.jsonl"
        command = ["synth", "run", str(folder / "targets.json"), *wrong, "--out", str(out)]
        assert main([*command, "--tries", "2", "--backoff", "0.01"]) == 1
        assert words in capsys.readouterr().err
