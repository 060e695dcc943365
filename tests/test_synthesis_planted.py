"""Planted truth: coverage is what the closed form says, and what only a reply has is not kept.

The model's residual is the embedding of its token and the SAE has one feature for each of some
words, so that a feature fires exactly where its word stands. Writers are scripted; the pipeline,
the ledger, the model and the SAE are real.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import torch

import qwen_scope_lens as qsl
from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import BadPlan
from qwen_scope_lens.models import unwrap
from qwen_scope_lens.synth import Reader, Recipe, Synthesis, TargetSet, make_report
from qwen_scope_lens.synth.judgements import kinds_by_judge, parse_kind, with_kinds
from qwen_scope_lens.synth.pipeline import Counts
from qwen_scope_lens.synth.recipe import SCOPE
from qwen_scope_lens.synth.run import amount_of, check_settings, read_settings, save, settings_of
from qwen_scope_lens.synth.targets import Target
from qwen_scope_lens.writers import Ledger, Request, Templates
from qwen_scope_lens.writers.generator import Book, Completion

FREQUENCIES = (1e-1, 1e-2, 1e-3, 1e-4)  # of a feature in texts that nobody asked for
FEATURES, ROUNDS = 80, 5
PLAIN = replace(SCOPE, variants=0, near_duplicates=1.0, attempts=ROUNDS)


@dataclass
class World:
    """Words with a feature each, words without one, and who reads them."""

    words: list[str]
    fillers: list[str]
    model: Any
    targets: TargetSet
    reader: Reader

    def text(self, rng: random.Random, *features: int) -> str:
        """A text of its own whose features are these."""
        words = rng.choices(self.fillers, k=10) + [self.words[f] for f in features]
        return "".join(words).strip()

    def background(self, rng: random.Random) -> list[int]:
        return [f for f in range(FEATURES) if rng.random() < frequency(f)]


def frequency(feature: int) -> float:
    return FREQUENCIES[feature % len(FREQUENCIES)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[str], list[str]]:
    model = qsl.load_model("mini-qwen3", up_to_layer=0)
    tokenizer = model.tokenizer
    inner: Any = unwrap(model)
    rng = torch.Generator().manual_seed(0)
    table = inner.get_input_embeddings().weight
    with torch.no_grad():
        table.copy_(torch.nn.functional.normalize(torch.randn(table.shape, generator=rng), dim=-1))
        for name, weight in inner.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
    vocabulary = {tokenizer.decode([i]): i for i in range(300, len(tokenizer))}
    words = [
        w
        for w in vocabulary
        if w[0] == " " and w[1:].isascii() and w[1:].isalpha() and len(w) > 4 and w.islower()
    ]
    mine, fillers = words[:FEATURES], words[FEATURES : FEATURES + 60]
    directions = table[[vocabulary[word] for word in mine]].detach()
    folder = tmp_path_factory.mktemp("home")
    size = {"d_model": table.shape[1], "d_sae": FEATURES, "num_layers": 1}
    planted.write_group(folder / "words", layers=range(0), **size)
    sae = {
        "W_enc": directions.clone(),
        "W_dec": directions.T.contiguous(),
        "b_enc": torch.full((FEATURES,), -0.8),
        "b_dec": torch.zeros(table.shape[1]),
    }
    torch.save(sae, folder / "words" / "layer0.sae.pt")
    return folder, model, mine, fillers


@pytest.fixture
def world(made: tuple[Path, Any, list[str], list[str]], monkeypatch: pytest.MonkeyPatch) -> World:
    folder, model, words, fillers = made
    monkeypatch.setenv("QWEN_SCOPE_HOME", str(folder))
    monkeypatch.setattr("qwen_scope_lens.writers.ledger.os.fsync", lambda number: None)
    ref = LayerRef.parse("local/words/0")
    kinds = ("harmful", "benign")
    targets = [Target(ref.feature(f), kind=kinds[f // 4 % 2]) for f in range(FEATURES)]
    reader = Reader(model, {ref: qsl.load_sae(ref)})
    return World(words, fillers, model, TargetSet(tuple(targets), "a task"), reader)


class Writer:
    """A test double that asks `prompt` for a prompt; its rewrites and replies fit."""

    name = "scripted"

    def __init__(
        self,
        world: World,
        prompt: Callable[[int, random.Random], Sequence[int]],
        reply: Sequence[int] = (),
    ) -> None:
        self.world, self.prompt, self.reply = world, prompt, reply
        self.asked: Counter[str] = Counter()

    def generate(self, requests: Sequence[Request], book: Book) -> None:
        for number, request in enumerate(requests):
            if book.start(number):
                self.asked[request.purpose] += 1
                book.finish(number, Completion(self.say(request), "stop", 10, 5))

    def say(self, request: Request) -> str:
        rng, text = random.Random(f"{request.seed} {request.purpose}"), request.messages[-1][1]
        if request.purpose == "rewrite":
            return self.world.text(rng) + " " + text.rpartition("Message:\n")[2]
        if request.purpose == "reply":
            declined = "I cannot do that." if "careful" in request.messages[0][1] else "With joy."
            return declined + self.world.text(rng, *self.reply)
        assert request.target is not None
        return self.world.text(rng, *self.prompt(request.target.feature, rng))


def run(
    world: World,
    folder: Path,
    writer: Any,
    recipe: Recipe = PLAIN,
    budget: int = 10_000,
    counts: Counts = "written",
    targets: TargetSet | None = None,
) -> Synthesis:
    with Ledger.open(folder) as ledger:
        made = Synthesis(
            targets or world.targets, recipe, writer, world.reader, ledger, Templates()
        )
        return made.run(budget, counts=counts)


def long_tail(feature: int) -> float:
    """Few features that a writer understands well, many that it hardly does."""
    return 0.9 / (1 + feature // 4)


ARMS: dict[str, tuple[Callable[[int], float], float]] = {  # p of each feature, q
    "obeys": (lambda feature: 0.8, 0.9),
    "seldom": (lambda feature: 0.3, 0.5),
    "long tail": (long_tail, 1.0),
    "undirected": (lambda feature: 0.0, 1.0),
}


@pytest.mark.parametrize("arm", ARMS)
def test_coverage_is_that_of_the_closed_form(world: World, tmp_path: Path, arm: str) -> None:
    """1 - (1 - s)^n after n rounds, s = p q + (1 - p) frequency: within 4 standard errors of the
    binomial, for all features together and for those of each frequency."""
    obey, hit = ARMS[arm]

    def prompt(feature: int, rng: random.Random) -> Sequence[int]:
        if rng.random() < obey(feature):
            return [feature] if rng.random() < hit else []
        return world.background(rng)

    done = run(world, tmp_path, Writer(world, prompt))
    for one in done.candidates:  # the reader is right about each text
        has = world.words[one.ref.feature].strip() in one.prompt.split()
        assert (one.ref in one.fires) == has
        assert (one.outcome == "kept") == has
    first = {one.ref.feature: one.attempt for one in done.kept}
    assert len(first) == len(done.kept)
    chance = np.array([obey(f) * hit + (1 - obey(f)) * frequency(f) for f in range(FEATURES)])
    for n in range(1, ROUNDS + 1):
        expected = 1 - (1 - chance) ** n
        got = np.array([first.get(f, ROUNDS) < n for f in range(FEATURES)])
        for some in (slice(None), *(slice(i, None, len(FREQUENCIES)) for i in range(4))):
            share, count = expected[some], len(expected[some])
            error = np.sqrt((share * (1 - share)).sum()) / count
            assert abs(got[some].mean() - share.mean()) <= 4 * error + 1e-9, (n, some)
    if arm == "obeys":  # how rare a feature is makes no difference to a writer that obeys
        assert got[3::4].mean() > 0.9
    if arm == "undirected":
        assert got[3::4].mean() < 0.1 < got[::4].mean()


def test_what_only_the_reply_has_is_not_kept(world: World, tmp_path: Path) -> None:
    """Verified is the prompt; reply and either have to be asked for, and then find it."""

    class ReplyOnly(Writer):
        def say(self, request: Request) -> str:
            said = super().say(request)
            if request.purpose == "reply":  # of whom, only the seed of its prompt says
                said += self.world.words[features[request.seed]]
            elif request.target is not None:
                features[request.seed] = request.target.feature
            return said

    features: dict[int, int] = {}
    some = replace(world.targets, targets=world.targets.targets[:12])
    one_round = replace(PLAIN, attempts=1)
    found = {}
    for read in ("prompt", "reply", "either"):
        writer = ReplyOnly(world, lambda feature, rng: ())
        recipe = one_round.change(read=read)
        done = run(world, tmp_path / read, writer, recipe, targets=some)
        found[read] = len(done.kept)
        assert {one.to_row("g", True, recipe.read)["verified"] for one in done.candidates} == {read}
        if read == "prompt":
            assert not writer.asked["reply"]  # none is paid for
    assert found == {"prompt": 0, "reply": 12, "either": 12}


def test_each_feature_gets_a_vanilla_prompt_and_its_rewrites(world: World, tmp_path: Path) -> None:
    """Equation 21: each is verified alone, and replies follow what the feature expresses."""
    few = replace(world.targets, targets=world.targets.targets[:8])
    writer = Writer(world, lambda feature, rng: [feature] if rng.random() < 0.6 else [])
    recipe = replace(SCOPE, variants=2, near_duplicates=1.0, attempts=8)
    done = run(world, tmp_path, writer, recipe, targets=few)
    for target in few.targets:
        kept = [one for one in done.kept if one.ref == target.ref]
        assert sorted(one.style == "vanilla" for one in kept) == [False, False, True]
        assert {one.kind for one in kept} == {target.kind}
        for one in kept:
            assert one.reply.startswith("I cannot" if target.kind == "harmful" else "With joy")
            assert (one.base is None) == (one.style == "vanilla")
            if one.base is not None:
                assert one.prompt.endswith(one.base.prompt)
                row = one.to_row("g", True, "prompt")
                assert row["rewrite_of"] == one.base.number
                assert row["template"] == "adversarial"
    assert len({one.style for one in done.kept}) > 3
    failed = [one for one in done.candidates if one.outcome == "the feature does not fire"]
    assert {one.style == "vanilla" for one in failed} == {True, False}
    # The category has to be known, or the deviation asked for by its name.
    unknown = with_kinds(replace(few, targets=tuple(replace(t, kind="") for t in few.targets)))
    with pytest.raises(BadPlan, match=r"8 of 8 wanted features have no risk category.*--kind-from"):
        run(world, tmp_path / "b", writer, recipe, targets=unknown)
    odd = with_kinds(unknown, rest="odd")
    with pytest.raises(BadPlan, match="is of kind 'odd'"):
        run(world, tmp_path / "b", writer, recipe, targets=odd)
    turns = replace(recipe, kind_from="turns")
    done = run(world, tmp_path / "c", writer, turns, targets=unknown)
    assert {one.kind for one in done.kept} == {"harmful", "benign"}


def test_the_budget_counts_written_or_kept(world: World, tmp_path: Path) -> None:
    """Both, the same again for nothing, and one run continued with more is one run with more."""

    def writer() -> Writer:
        return Writer(world, lambda feature, rng: [feature] if rng.random() < 0.5 else [])

    recipe = replace(SCOPE, near_duplicates=1.0, attempts=6)
    done = run(world, tmp_path / "w", writer(), recipe, budget=31)
    assert len(done.candidates) == 31
    assert done.stopped == "the budget of 31 candidates is used"
    amounts = (15, 40)
    for budget in amounts:
        paid = writer()
        done = run(world, tmp_path / "k", paid, recipe, budget, "kept")
        assert len(done.kept) == budget < len(done.candidates)
        assert done.stopped == f"the budget of {budget} kept examples is used"
        again = writer()
        assert (
            run(world, tmp_path / "k", again, recipe, budget, "kept").candidates == done.candidates
        )
        assert not again.asked
    fresh = run(world, tmp_path / "f", writer(), recipe, 40, "kept")
    assert fresh.candidates == done.candidates
    # What was counted stands in the settings and in the report.
    out = tmp_path / "k.jsonl"
    folder = tmp_path / "k.run"
    facts = settings_of(done, "words")
    assert facts["recipe"]["read"] == "prompt"
    for budget, counts in ((40, "kept"), (50, "written")):
        check_settings(folder, facts, amount_of(recipe, budget, counts))  # type: ignore[arg-type]
        amount = (read_settings(out) or {})["amount"]
        assert (amount["budget"], amount["budget_counts"]) == (budget, counts)
    save(done, out)
    said = str(make_report(out, world.targets))
    assert "the feature has to fire in the prompt; budget: 50 candidates written" in said
    with pytest.raises(BadPlan, match="written or kept"):
        run(world, tmp_path / "x", writer(), recipe, 5, "paid")  # type: ignore[arg-type]


def test_feared_features_of_a_reply_are_seen_although_the_prompt_is_verified(
    world: World, tmp_path: Path
) -> None:
    feared = world.targets.refs[79]
    writer = Writer(world, lambda feature, rng: [feature], [79])
    few = replace(world.targets, targets=world.targets.targets[:8])
    with Ledger.open(tmp_path) as ledger:
        done = Synthesis(
            few, PLAIN, writer, world.reader, ledger, Templates(), caution={feared: 0.0}
        ).run(8)
    outcomes = {(one.kind, one.outcome) for one in done.candidates}
    assert outcomes == {("harmful", "kept"), ("benign", f"caution: {feared} fires")}


def test_the_judge_says_what_a_feature_expresses(world: World, tmp_path: Path) -> None:
    answers = {"harmful": "Harmful.", "benign": "<think>harmful?</think> benign", "": "Perhaps"}

    class Judge(Writer):
        def say(self, request: Request) -> str:
            text = request.messages[-1][1]
            return next(said for kind, said in answers.items() if f"about {kind}" in text)

    kinds = ["harmful", "benign", ""]
    refs: list[FeatureRef] = list(world.targets.refs[:3])
    targets = TargetSet(
        tuple(Target(r, description=f"about {k}.") for r, k in zip(refs, kinds, strict=True))
    )
    with Ledger.open(tmp_path) as ledger:
        found = kinds_by_judge(targets, Judge(world, lambda f, rng: ()), ledger, Templates())
    assert found == {refs[0]: "harmful", refs[1]: "benign"}
    assert [t.kind for t in with_kinds(targets, found, rest="benign").targets] == [
        "harmful",
        "benign",
        "benign",
    ]
    assert parse_kind("Harmless, I think") == "benign"
    assert parse_kind("It is harmful") == ""
