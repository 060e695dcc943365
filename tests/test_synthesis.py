"""Synthesis: planted candidates are kept or rejected for the right reason, in both recipes.

Generators here are scripted test doubles; what is real is the model, the SAE, the reading, the
ledger. The real client is tested in test_synthesis_endpoint.py.
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_writer import Scripted

import qwen_scope_lens as qsl
from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import (
    BadCorpus,
    BadFile,
    BadPlan,
    StoreMismatch,
    TooLittleData,
    UnknownName,
    WrongModel,
    WrongTokenizer,
)
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.synth import TEXT, Reader, Synthesis, TargetSet, curve, make_report
from qwen_scope_lens.synth.filters import (
    Duplicates,
    check_reply,
    check_text,
    jaccard,
    ngrams,
)
from qwen_scope_lens.synth.language import wrong_language
from qwen_scope_lens.synth.reader import Candidate
from qwen_scope_lens.synth.recipe import FAC, RECIPES, SCOPE, read_recipe, write_recipe
from qwen_scope_lens.synth.run import check_settings, read_rows, save, settings_of
from qwen_scope_lens.synth.targets import Target, coverage, documents_firing, fac
from qwen_scope_lens.writers import Ledger, Local, Prices, Push, Request, Templates
from qwen_scope_lens.writers.generator import Sampling, clean

SAE = LayerRef.parse("mini-qwen3/w1k-l0-16/6")


@pytest.fixture(scope="module")
def model() -> Any:
    return qsl.load_model("mini-qwen3")


@pytest.fixture(scope="module")
def reader(model: Any) -> Reader:
    return Reader(model, {SAE: qsl.load_sae(SAE)}, max_tokens=96)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Twelve in English, twelve in Chinese, a few sentences each."""
    return [
        record["text"][:160]
        for lang in ("en", "zh")
        for record in list(heldout("prose", lang))[:12]
    ]


@pytest.fixture(scope="module")
def planted(reader: Reader, texts: list[str]) -> TargetSet:
    """Features of the Chinese texts that no English text has; the English ones are the seed."""
    maxima = reader.read(texts)[SAE].toarray()
    only = (maxima[:12] <= 0).all(axis=0) & ((maxima[12:] > 0).sum(axis=0) >= 4)
    features = np.flatnonzero(only)[:6].tolist()
    assert len(features) == 6
    targets = [
        Target(
            SAE.feature(f),
            1.0,
            0,
            int((maxima[12:, f] > 0).sum()),
            description=f"feature {f}",
            kind=("harmful", "benign")[i % 2],
        )
        for i, f in enumerate(features)
    ]
    common = np.flatnonzero((maxima[:12] > 0).all(axis=0))[:2].tolist()
    targets += [Target(SAE.feature(f), 0.5, 12, 12) for f in common]
    return TargetSet(tuple(targets), "a task", seed_size=12, openings=("The file", "内核"))


@pytest.fixture(scope="module")
def firing(reader: Reader, texts: list[str], planted: TargetSet) -> dict[FeatureRef, list[str]]:
    """For every missing feature the texts that activate it, strongest first."""
    found: dict[FeatureRef, list[str]] = {}
    maxima = reader.read(texts)[SAE].toarray()
    for target in planted.missing:
        column = maxima[:, target.ref.feature]
        found[target.ref] = [texts[i] for i in np.argsort(-column) if column[i] > 0]
    return found


def synthesis(
    folder: Path, targets: TargetSet, reader: Reader, writer: Any, recipe: Any, **more: Any
) -> Any:
    """A finished run and its ledger's sums."""
    budget, prices = more.pop("budget", 100), more.pop("prices", None)
    with Ledger.open(folder, prices) as ledger:
        templates = more.pop("templates", None) or Templates()
        run = Synthesis(targets, recipe, writer, reader, ledger, templates, **more)
        return run.run(budget)


# Arithmetic.


def test_coverage_is_that_of_the_formulas() -> None:
    rng = np.random.default_rng(0)
    dense = rng.random((7, 20)) * (rng.random((7, 20)) < 0.2)
    from scipy.sparse import csr_matrix

    for threshold in (0.0, 0.5):
        expected = [sum(dense[i, f] > threshold for i in range(7)) for f in range(20)]
        assert documents_firing(csr_matrix(dense), threshold).tolist() == expected
    sets = [set(np.flatnonzero(row).tolist()) for row in dense]
    targets = range(0, 20, 3)
    values = curve(targets, sets)
    for n in range(8):
        hit = sum(any(f in s for s in sets[:n]) for f in targets)
        assert values[n] == pytest.approx(hit / 7)
        assert values[n] == pytest.approx(coverage(targets, sets[:n]))
    generated, anchor = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert fac(generated, anchor) == 0.5
    with pytest.raises(TooLittleData):
        fac(generated, anchor & False)


def test_the_reader_measures_the_maximum_of_kept_tokens(
    model: Any, reader: Reader, texts: list[str]
) -> None:
    sae = qsl.load_sae(SAE)
    matrix = reader.read(texts[:5])[SAE].toarray()
    read = qsl.capture(model, texts[:5], [6], max_tokens=96, truncate=True)
    dense = sae.encode_sparse(read.residuals[6]).to_dense().numpy()
    for i in range(5):
        rows = (read.doc_rows() == i) & read.keep(6)
        assert np.array_equal(matrix[i], dense[rows.numpy()].max(axis=0))
    refs = [SAE.feature(int(f)) for f in np.flatnonzero(matrix[0])[:3]]
    [first] = reader.read_features(texts[:1], refs)
    assert first == {ref: pytest.approx(float(matrix[0, ref.feature])) for ref in refs}
    assert reader.read_features([], refs) == []
    with pytest.raises(StoreMismatch):
        reader.read_features(["a text"], [FeatureRef.parse("mini-qwen3/w1k-l0-16/5/1")])
    other = LayerRef.parse("qwen3-8b-base/w64k-l0-50/20")
    with pytest.raises(WrongModel, match="4096"):
        Reader(model, {other: sae})


# Filters.


@pytest.mark.parametrize(
    ("text", "code", "wrong"),
    [
        ("The kernel reads a file.", "en", False),
        ("内核读取一个文件。", "en", True),
        ("内核读取一个文件。", "zh", False),
        ("カーネルはファイルを読む。", "ja", False),
        ("カーネルはファイルを読む。", "zh", True),
        ("内核读取一个文件。", "ja", True),
        ("Ядро читает файл.", "ru", False),
        ("Ядро читает файл.", "de", True),
        ("النواة تقرأ الملف", "ar", False),
        ("커널은 파일을 읽는다", "ko", False),
        (
            "Der Kern liest die Datei und das Programm ist nicht von der Art, die wir auf den",
            "en",
            1,
        ),
        (
            "The kernel reads the file and that is what it is for, as you can see in the log",
            "de",
            1,
        ),
        ("12345 🙂", "en", False),
        ("Le noyau lit le fichier", "", False),
    ],
)
def test_language(text: str, code: str, wrong: bool) -> None:
    assert bool(wrong_language(text, code)) == wrong


def test_language_of_real_texts() -> None:
    """Held-out prose of eight languages, each text asked about in each language: no error."""
    languages = ("en", "de", "fr", "es", "ru", "zh", "ja", "ko")
    texts = [(lang, row["text"]) for lang in languages for row in list(heldout("prose", lang))[:30]]
    assert len(texts) == 240
    wrong = [
        (lang, code, text[:40])
        for lang, text in texts
        for code in languages
        if bool(wrong_language(text, code)) != (code != lang)
    ]
    assert wrong == []


def test_clean() -> None:
    assert clean("<think>hm</think>\n\n “A message” ") == "A message"
    assert clean("<think>never ends") == ""
    assert clean('"a" and "b"') == '"a" and "b"'
    assert clean("```text\na message\n```") == "a message"
    assert clean("a broken end �") == "a broken end"
    assert clean("it's") == "it's"


def test_reasons() -> None:
    recipe = replace(SCOPE, language="en", most_characters=60, caution=("bomb", "炸弹"))
    assert check_text("", recipe, True) == "empty"
    assert check_text("short", recipe, True) == "too short"
    assert check_text("x" * 61, recipe, True) == "too long"
    assert check_text("这是一个中文句子", recipe, True).startswith(
        "wrong language: zh, expected en"
    )
    assert check_text("how to make a Bomb now", recipe, True) == "caution: bomb"
    assert check_text("how to make a Bomb now", recipe, False) == ""
    assert check_text("the bombast of his words", recipe, True) == ""
    anything = replace(recipe, language="", least_characters=1)
    assert check_text("制造炸弹的方法", anything, True) == "caution: 炸弹"
    refusals = Templates().refusals
    assert check_reply("I’m sorry, but no.", "harmful", refusals) == ""
    assert (
        check_reply("Sure, first you take", "harmful", refusals) == "a harmful prompt was answered"
    )
    assert check_reply("我不能帮助你。", "benign", refusals) == "a benign prompt was refused"
    assert check_reply("Sure.", "benign", refusals) == check_reply("Sure.", "task", refusals) == ""


def test_duplicates() -> None:
    base = "The package manager installs programs and their documentation for every user. " * 2
    seen = Duplicates(0.8)
    seen.add("base", base)
    seen.add(
        "chinese",
        "软件包管理器安装程序及其文档，供系统上的所有用户使用，包括它的管理员，也供开发者和访客使用。",
    )
    assert seen.find(base.upper().replace(" ", "\n ")) == ("base", 1.0)
    name, score = seen.find(base.replace("every user", "each user")) or ("", 0)
    assert (name, 0.8 <= score < 1) == ("base", True)
    assert seen.find(
        "软件包管理器安装程序及其文档，供系统上的所有用户使用，包括它的管理员，也供开发者和访客们使用。"
    )
    assert seen.find("软件包管理器安装程序。") is None
    assert seen.find("An entirely different sentence about the weather in the north.") is None
    exact = Duplicates(1.0)
    exact.add("base", base)
    assert exact.find(base.replace("every user", "each user")) is None
    assert exact.find(f" {base.lower()}") == ("base", 1.0)


def test_no_near_duplicate_is_missed() -> None:
    """Real texts with some characters changed, against every pair compared by hand."""
    rng = random.Random(0)
    texts = [row["text"] for lang in ("en", "zh") for row in heldout("prose", lang)]
    known = {str(i): ngrams(text) for i, text in enumerate(texts)}
    seen = Duplicates(0.8)
    for i, text in enumerate(texts):
        seen.add(str(i), text)
    near = 0
    for text in texts:
        letters = list(text)
        for _ in range(max(1, len(text) // rng.choice((30, 60, 120)))):
            letters[rng.randrange(len(letters))] = rng.choice("abcdexyz")
        changed = "".join(letters)
        best = max(jaccard(ngrams(changed), grams) for grams in known.values())
        found = seen.find(changed)
        assert (found is not None) == (best >= 0.8)
        if found is not None:
            assert found[1] == best
            near += 1
    assert near > 20


def test_halves_of_characters_are_texts_like_others() -> None:
    seen = Duplicates(0.8)
    seen.add("broken", "a text that ends in half of a character \ud83d")
    assert seen.find("A text that ends in half of a character \ud83d") == ("broken", 1.0)


@st.composite
def nearly_equal(draw: st.DrawFn) -> tuple[str, str]:
    """A text, and the same with one stretch of it written anew."""
    text = draw(st.text(st.characters(codec="utf-8"), min_size=30, max_size=60))
    at = draw(st.integers(0, len(text)))
    return text, text[:at] + draw(st.text(max_size=4)) + text[at + draw(st.integers(0, 4)) :]


@settings(max_examples=60, deadline=None)
@given(nearly_equal() | st.tuples(st.text(max_size=40), st.text(max_size=40)))
def test_near_duplicates_have_the_true_similarity(texts: tuple[str, str]) -> None:
    one, other = texts
    seen = Duplicates(0.5)
    seen.add("one", one)
    found = seen.find(other)
    true = jaccard(ngrams(one), ngrams(other))
    if found is not None:
        assert found[1] == pytest.approx(true)
        assert true >= 0.5
    elif true >= 0.9:
        raise AssertionError("a near-duplicate was missed")


# Templates and recipes.


def test_templates_can_be_edited(tmp_path: Path) -> None:
    assert len(Templates.copy(tmp_path)) == len(list(tmp_path.iterdir())) == 23
    own = Templates(tmp_path)
    assert own.sha256 == Templates().sha256
    (tmp_path / "fac.txt").write_text("[user]\nWrite $description for $$5.\n")
    (tmp_path / "prompt_legal.txt").write_text("[system]\nA\n[user]\n$task\n")
    assert Templates.copy(tmp_path) == []  # what was edited stays
    edited = Templates(tmp_path)
    values = dict.fromkeys(("description", "examples", "language", "task"), "a $price")
    assert edited["fac"].fill(**values) == (("user", "Write a $price for $5."),)
    assert edited["prompt_legal"].fill(**values) == (("system", "A"), ("user", "a $price"))
    assert edited["text"].raw
    assert edited.sha256 != own.sha256


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("fac.txt", "no part", "expected a first line"),
        ("fac.txt", "[user]\n$descripton", r"\$descripton is unknown here"),
        ("fac.txt", "[user]\n5 $ each", r"write \$\$"),
        ("text.txt", "[text]\n$examples\n[user]\nmore", "has to be the only part"),
        ("other.txt", "[user]\nx", "not a template of this package"),
        ("styles.txt", "a style without a colon", "not of the form `name: description`"),
        ("refusals.txt", "# nothing", "is empty"),
        ("fac.txt", b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_broken_template_is_named(
    tmp_path: Path, name: str, content: str | bytes, words: str
) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadFile, match=words):
        Templates(tmp_path)


def test_recipes(tmp_path: Path) -> None:
    for recipe in RECIPES.values():
        assert read_recipe(str(write_recipe(recipe, tmp_path / "recipe.yaml"))) == recipe
    assert SCOPE.at_least(2.5).threshold == 2.5
    assert FAC.at_least(0.5) == FAC
    path = tmp_path / "mine.yaml"
    path.write_text("name: fac\nthreshold: 2.0\nkinds: [legal]\n")
    assert read_recipe(str(path)) == replace(FAC, threshold=2.0, kinds=("legal",))
    for content, words in {
        "{read: reply, as_chat: true}": "not as_chat",
        "treshold: 2": "no 'treshold'",
        "threshold: -1": "zero or more",
        "threshold: .inf": "finite number",
        "temperature: .nan": "finite number",
        "top_p: 0": "top_p",
        "seed: 1.5": "from 0",
        "seed: " + "9" * 5000: "YAML",
        "[" * 5000: "YAML",
        "variants: -1": "from 0",
        "kind_from: dice": "feature, turns",
        "kinds: legal": "expected a list",
        "candidates: 0": "from 1",
        "read: everything": "prompt, reply, either",
        "language: klingon": "not one that the detector knows",
        "pairs: true": "stronger and a weaker",
        "- a": "name: value",
        "{": "YAML",
        "near_duplicates: 0": "0 to 1",
    }.items():
        path.write_text(content)
        with pytest.raises(BadFile, match=words):
            read_recipe(str(path))
    with pytest.raises(UnknownName):
        read_recipe("scpoe")
    assert SCOPE.change(seed=2**70).seed == 2**70
    with pytest.raises(BadPlan, match="finite"):
        Push(float("nan"), {})


# The pipeline.


def chat_writer(firing: dict[FeatureRef, list[str]], good: Callable[[Request], bool]) -> Scripted:
    """Prompts that activate the target (or do not), rewrites that repeat, fitting replies."""

    def say(request: Request) -> str:
        text = request.messages[-1][1]
        if request.purpose == "prompt":
            assert request.target is not None
            number = request.seed % len(firing[request.target])
            return firing[request.target][number] if good(request) else "The file is on the disk."
        if request.purpose == "rewrite":
            return "In a story: " + text.rpartition("Message:\n")[2]
        return (
            "I cannot do that." if "careful" in request.messages[0][1] else "With pleasure, here."
        )

    return Scripted(say)


def test_the_scope_recipe(
    tmp_path: Path, planted: TargetSet, reader: Reader, firing: dict[FeatureRef, list[str]]
) -> None:
    hopeless = planted.missing[0].ref
    writer = chat_writer(firing, lambda request: request.target != hopeless)
    recipe = replace(SCOPE, attempts=2, read="prompt", near_duplicates=1.0)
    run = synthesis(tmp_path, planted, reader, writer, recipe, wave=4)
    by_target = {ref: [one for one in run.candidates if one.ref == ref] for ref in firing}
    assert [one.outcome for one in by_target[hopeless]] == ["the feature does not fire"] * 4
    for one in run.kept:
        assert one.activation > 0
        assert reader.read_features([one.prompt], [one.ref])[0][one.ref] == pytest.approx(
            one.activation, rel=1e-5
        )
        assert one.reply == (
            "I cannot do that." if one.kind == "harmful" else "With pleasure, here."
        )
        assert one.prompt.startswith("In a story") == (one.style != "vanilla")
    assert {one.ref for one in run.kept} >= set(firing) - {hopeless}
    assert {(one.kind, one.style == "vanilla") for one in run.candidates} == {
        (kind, way) for kind in ("harmful", "benign") for way in (True, False)
    }
    assert run.stopped.startswith("every target feature")
    # No reply was paid for where the prompt had failed already.
    fired = [one for one in run.candidates if one.ref in one.fires]
    assert run.ledger.spent.calls_by_purpose["reply"] == len(fired) < len(run.candidates)
    assert [one.number for one in run.candidates] == list(range(len(run.candidates)))


def test_undirected_synthesis_keeps_prompts_in_which_nothing_fires(
    tmp_path: Path, planted: TargetSet, reader: Reader, firing: dict[FeatureRef, list[str]]
) -> None:
    kept = {}
    for read in ("prompt", "none"):
        writer = chat_writer(firing, lambda request: False)
        recipe = replace(SCOPE, attempts=1, variants=0, read=read)
        run = synthesis(tmp_path / read, planted, reader, writer, recipe)
        kept[read] = [one for one in run.kept if one.ref not in one.fires]
        assert all(one.activation is not None for one in run.candidates)  # read all the same
    assert not kept["prompt"]
    assert kept["none"]
    assert kept["none"][0].reply


def test_replies_that_do_not_fit_are_refused(
    tmp_path: Path, planted: TargetSet, reader: Reader, firing: dict[FeatureRef, list[str]]
) -> None:
    replier = Scripted(lambda request: "Of course, here is how.", "replier")
    writer = chat_writer(firing, lambda request: True)
    recipe = replace(SCOPE, attempts=1, variants=0, read="either")
    run = synthesis(tmp_path, planted, reader, writer, recipe, replier=replier)
    outcomes = {one.kind: one.outcome for one in run.candidates}
    assert outcomes == {"harmful": "a harmful prompt was answered", "benign": "kept"}
    assert {request.purpose for request in replier.requests} == {"reply"}


def test_the_judge_of_rewrites(
    tmp_path: Path, planted: TargetSet, reader: Reader, firing: dict[FeatureRef, list[str]]
) -> None:
    judge = Scripted(lambda request: "No, it does not.", "judge")
    writer = chat_writer(firing, lambda request: True)
    recipe = replace(SCOPE, attempts=1, check_rewrites=True)
    run = synthesis(tmp_path, planted, reader, writer, recipe, judge=judge)
    for one in run.candidates:
        assert one.outcome.startswith("the rewrite means") == (one.style != "vanilla")
    assert "In a story" in judge.requests[0].messages[-1][1]
    with pytest.raises(BadPlan, match="judge"):
        synthesis(tmp_path / "2", planted, reader, writer, recipe)


def test_the_fac_recipe(
    tmp_path: Path, planted: TargetSet, reader: Reader, firing: dict[FeatureRef, list[str]]
) -> None:
    """x+ is the stronger of the two found; both stand in the prompt of the second step."""
    target = replace(planted, targets=planted.missing[:1])
    ref = target.targets[0].ref
    strong, weak, new = firing[ref][0], firing[ref][-1], firing[ref][1]
    first = iter([weak, strong])

    def say(request: Request) -> str:
        if "strongly:" in request.messages[-1][1]:
            return new + f" {request.seed}"
        return next(first) if request.purpose == "prompt" else "A reply to that."

    writer = Scripted(say)
    recipe = replace(FAC, threshold=0.0, near_duplicates=1.0)
    run = synthesis(tmp_path, target, reader, writer, recipe)
    assert [one.stage for one in run.candidates] == ["pair", "pair", "again", "again"]
    assert [one.outcome for one in run.candidates[:2]] == ["a demonstration"] * 2
    shown = writer.requests[2].messages[-1][1]
    assert shown.index(strong) < shown.index(weak)
    assert sorted(one.outcome for one in run.candidates[2:]) == [
        "kept",
        "more than needed for its feature",
    ]
    assert run.kept[0].activation == max(one.activation for one in run.candidates[2:])
    assert run.ledger.spent.calls_by_purpose["reply"] == 2  # none for the demonstrations
    # delta: what fires, but not above it, is not a demonstration.
    high = replace(recipe, threshold=1e6, attempts=1)
    first = iter([weak, strong])
    run = synthesis(tmp_path / "high", target, reader, Scripted(say), high)
    assert [one.outcome for one in run.candidates] == ["the feature does not fire"] * 2
    assert run.candidates[1].activation > 0


def test_repeats_budget_balance_and_language(
    tmp_path: Path, planted: TargetSet, reader: Reader, firing: dict[FeatureRef, list[str]]
) -> None:
    everywhere = {ref: [texts[0]] for ref, texts in firing.items()}
    writer = chat_writer(everywhere, lambda request: True)
    recipe = replace(SCOPE, per_feature=2, attempts=3, replies=False, variants=0)
    known = [texts[0] for texts in list(firing.values())[:1]]
    run = synthesis(tmp_path, planted, reader, writer, recipe, known=known)
    assert any(one.outcome.startswith("repeats known text 0") for one in run.candidates)
    assert any(one.outcome.startswith("repeats candidate") for one in run.candidates)
    count = Counter(one.ref for one in run.kept)
    assert max(count.values()) == 1
    run = synthesis(tmp_path / "b", planted, reader, writer, recipe, budget=4, wave=3)
    assert len(run.candidates) == 4
    assert "budget of 4" in run.stopped
    english = replace(recipe, language="en", attempts=1)
    run = synthesis(tmp_path / "c", planted, reader, writer, english)
    assert {one.outcome.split(":")[0] for one in run.candidates} == {"wrong language"}
    others = replace(recipe, count_others=True, per_feature=1, attempts=2)
    run = synthesis(tmp_path / "d", planted, reader, writer, others, wave=1)
    assert len(run.candidates) < len(planted.missing)
    assert coverage(planted.refs, [one.fires for one in run.kept]) > len(run.kept) / len(planted)


def test_features_that_ask_for_caution(
    tmp_path: Path, planted: TargetSet, reader: Reader, firing: dict[FeatureRef, list[str]]
) -> None:
    """Harmless texts that activate a feared feature are refused, harmful prompts are not."""
    recipe = replace(SCOPE, attempts=1, variants=0, near_duplicates=1.0)
    writer = chat_writer(firing, lambda request: True)
    run = synthesis(tmp_path, planted, reader, writer, recipe)
    assert {one.kind for one in run.kept} == {"harmful", "benign"}
    feared = run.kept[0].ref  # a feature of Chinese; most of the texts have it
    hits = {one.number for one in run.kept if one.fires.get(feared, 0.0) > 5.0}
    run = synthesis(tmp_path, planted, reader, writer, recipe, caution={feared: 5.0})
    refused = [one for one in run.candidates if one.outcome == f"caution: {feared} fires"]
    assert {one.number for one in refused} == {
        number for number in hits if run.candidates[number].kind == "benign"
    }
    assert hits
    assert run.kept


def test_a_chat_is_read_with_its_template(
    tmp_path: Path, planted: TargetSet, reader: Reader, firing: dict[FeatureRef, list[str]]
) -> None:
    recipe = replace(SCOPE, attempts=1, variants=0, as_chat=True, near_duplicates=1.0)
    writer = chat_writer(firing, lambda request: True)
    run = synthesis(tmp_path, planted, reader, writer, recipe)
    for one in run.kept:
        [values] = reader.read_features([one.messages(chat=True)[:1]], [one.ref])
        assert one.activation == pytest.approx(values[one.ref], rel=1e-4)
    assert any(
        one.activation != pytest.approx(reader.read_features([one.prompt], [one.ref])[0][one.ref])
        for one in run.kept
    )


def test_limits_end_a_run_and_it_goes_on(
    tmp_path: Path, planted: TargetSet, reader: Reader, firing: dict[FeatureRef, list[str]]
) -> None:
    writer = chat_writer(firing, lambda request: True)
    recipe = replace(SCOPE, attempts=2, near_duplicates=1.0)
    short = synthesis(
        tmp_path, planted, reader, writer, recipe, prices=Prices(max_tokens=120), wave=3
    )
    assert "limit of 120 tokens" in short.stopped
    assert len(writer.requests) == 8
    assert short.candidates
    same = synthesis(
        tmp_path, planted, reader, writer, recipe, prices=Prices(max_tokens=120), wave=3
    )
    assert same.candidates == short.candidates
    assert len(writer.requests) == 8
    whole = synthesis(tmp_path, planted, reader, writer, recipe, wave=3)
    again = synthesis(tmp_path, planted, reader, writer, recipe, wave=3)
    fresh = synthesis(
        tmp_path / "fresh", planted, reader, chat_writer(firing, lambda r: True), recipe, wave=3
    )
    assert whole.candidates == again.candidates == fresh.candidates
    assert len(writer.requests) == fresh.ledger.spent.calls


def test_weak_features_follow_the_missing_ones(planted: TargetSet) -> None:
    weak = replace(planted.targets[-1], seed_documents=3)
    targets = replace(planted, targets=(weak, *planted.targets[:-1]), weak_below=5)
    assert targets.wanted == (*targets.missing, weak)
    assert len(targets.missing) == 6
    assert targets.seed_coverage == pytest.approx(2 / 8)
    assert targets.seed_fac == pytest.approx(2 / 8)
    assert "missing: 6, weak (on fewer than 5 documents): 1" in str(targets)
    full = replace(planted, targets=planted.targets[-2:])
    with pytest.raises(TooLittleData, match="nothing is missing"):
        Synthesis(full, SCOPE, Scripted(str), None, None, Templates())  # type: ignore[arg-type]


def test_targets_are_written_and_read(tmp_path: Path, planted: TargetSet) -> None:
    path = tmp_path / "targets.json"
    planted.save(path)
    assert TargetSet.load(path) == planted
    assert TargetSet.load(path).digest == planted.digest
    content = json.loads(path.read_text())
    del content["targets"][0]["ref"]
    path.write_text(json.dumps(content))
    with pytest.raises(BadFile, match="qsl synth targets"):
        TargetSet.load(path)


def test_output_and_report(
    tmp_path: Path, planted: TargetSet, reader: Reader, firing: dict[FeatureRef, list[str]]
) -> None:
    hopeless = planted.missing[0].ref
    writer = chat_writer(firing, lambda request: request.target != hopeless)
    recipe = replace(SCOPE, attempts=2, near_duplicates=1.0)
    run = synthesis(tmp_path / "data.run", planted, reader, writer, recipe)
    out = tmp_path / "data.jsonl"
    save(run, out)
    from datasets import load_dataset

    data = load_dataset("json", data_files=str(out), cache_dir=str(tmp_path / "c"), split="train")
    assert len(data) == len(run.kept)
    assert data[0]["messages"][0]["content"] == run.kept[0].prompt
    assert set(data.column_names) >= {
        *("messages", "target", "activation", "generator", "template", "seed", "kind", "style")
    }
    assert all(row["generator"] == "scripted" for row in read_rows(out))
    report = make_report(out, planted)
    assert report.candidates == len(run.candidates)
    seed = {t.ref for t in planted.targets if t.seed_documents}
    expected = coverage(planted.refs, [seed, *[one.fires for one in run.kept]])
    assert report.curve[-1] == pytest.approx(expected)
    assert report.curve[0] >= planted.seed_coverage
    assert sum(report.outcomes.values()) == report.candidates
    assert ("still missing" in str(report)) == bool(report.uncovered)
    page = report.page().render()
    assert "Coverage by seed data" in page
    assert str(planted.missing[1].ref) in page
    other = replace(planted, targets=(Target(SAE.feature(1023)),))
    with pytest.raises(StoreMismatch, match="other features"):
        make_report(out, other)
    for content, words in (("{", "is not JSON"), ('{"a": 1}', "lacks"), ("", "nothing to report")):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises((BadCorpus, BadFile, TooLittleData), match=words):
            make_report(tmp_path / "bad.jsonl", planted)
    facts = settings_of(run, "mini-qwen3")
    check_settings(tmp_path / "data.run", facts)
    run.recipe = replace(recipe, attempts=9)
    check_settings(tmp_path / "data.run", settings_of(run, "mini-qwen3"))
    run.recipe = replace(recipe, threshold=2.0)
    with pytest.raises(StoreMismatch, match=r"another recipe \(threshold 0.0 there, threshold 2.0"):
        check_settings(tmp_path / "data.run", settings_of(run, "mini-qwen3"))


# A model that writes by itself.


def test_the_model_writes_the_same_with_and_without_pads(tmp_path: Path, model: Any) -> None:
    """A batch of prompts of different lengths, and each alone: the same greedy texts."""
    sampling = Sampling(temperature=0, max_tokens=12)
    prompts = ["The file", "The package manager is a tool that", "内核读取", "Das"]
    requests = [Request((("text", p),), "prompt", 0, sampling, raw=True) for p in prompts]
    with Ledger.open(tmp_path) as ledger:
        together = ledger.ask(Local(model, "a", batch=4), requests)
        alone = ledger.ask(Local(model, "b", batch=1), requests)
    assert [one.text for one in together if one] == [one.text for one in alone if one]
    assert all(one and one.text and one.completion_tokens > 0 for one in alone)


@pytest.mark.slow
def test_steering_raises_the_feature_that_is_missing(
    tmp_path: Path, model: Any, reader: Reader, planted: TargetSet, firing: Any
) -> None:
    refs = [target.ref for target in planted.missing]
    sampling = Sampling(temperature=1.0, max_tokens=24)

    def fired(push: Push | None) -> int:
        local = Local(model, "mini-qwen3", push=push)
        requests = [
            Request((("text", "The file"),), "prompt", seed, sampling, raw=True, target=ref)
            for ref in refs
            for seed in range(3)
        ]
        found = [one.text for one in ledger.ask(local, requests) if one]
        values = reader.read_features(found, refs)
        return sum(request.target in v for request, v in zip(requests, values, strict=True))

    values = reader.read([text for ref in refs for text in firing[ref]])[SAE]
    typical = {ref: float(values[:, ref.feature].max()) for ref in refs}
    with Ledger.open(tmp_path) as ledger:
        assert fired(Push(8.0, typical)) > 2 * fired(None)


def test_chats_need_a_chat_template(tmp_path: Path, model: Any) -> None:
    request = Request((("user", "hello"),), "prompt", sampling=Sampling(0.0, 1.0, 4))
    with Ledger.open(tmp_path) as ledger:
        [found] = ledger.ask(Local(model, "mini"), [request])
        assert found is not None
        tokenizer = copy.deepcopy(model.tokenizer)
        tokenizer.chat_template = None
        bare = Local(model, "bare", tokenizer=tokenizer)
        with pytest.raises(WrongTokenizer, match="no chat template"):
            ledger.ask(bare, [request])


def test_text_recipe_on_the_model_itself(
    tmp_path: Path, model: Any, reader: Reader, planted: TargetSet, firing: Any
) -> None:
    """Base model, few-shot: texts that continue passages with the feature."""
    shown = [
        replace(t, examples=tuple(text[:60] for text in firing[t.ref][:2])) for t in planted.missing
    ]
    targets = replace(planted, targets=tuple(shown))
    recipe = replace(TEXT, prompt_tokens=32, attempts=2, temperature=1.0)
    run = synthesis(tmp_path, targets, reader, Local(model, "mini-qwen3"), recipe)
    assert not run.chat
    assert run.kept
    assert run.kept[0].messages(run.chat)[0]["role"] == "assistant"
    assert all(isinstance(one, Candidate) and one.activation for one in run.kept)
