"""Harder tests of labels: near negatives, moved marks, intruders, and the tokens that come out.

`describe` tests a label on passages from documents in which the feature never fires, which is easy:
any description of a topic passes. The tests here are of four kinds, each a question with numbered
answers for a judge:

- detection: active passages against near ones, where features that fire together with this one are
  strongest, or where its own strongest token stands, but this feature is silent;
- fuzzing: passages with the right words marked, against the same kind with the marks moved;
- intruder: no label at all, one silent passage among active ones; it says whether the feature has
  one meaning that a label could name;
- output: the tokens that the feature promotes, among those of other features.

The first two are balanced accuracies (0.5 is chance), the others are right or wrong (chance is 1 in
5) and are asked several times.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import TooLittleData, UnknownName
from qwen_scope_lens.labels.describe import balanced_accuracy, parse_numbers
from qwen_scope_lens.labels.packs import LabelPack
from qwen_scope_lens.labels.passages import Passages
from qwen_scope_lens.stores.store import FeatureStore
from qwen_scope_lens.tables import Table
from qwen_scope_lens.writers.generator import Generator, Request, Sampling
from qwen_scope_lens.writers.ledger import Ledger
from qwen_scope_lens.writers.templates import Templates

if TYPE_CHECKING:
    from qwen_scope_lens.features.statistics import FeatureStatistics

__all__ = ["KINDS", "Kind", "Question", "questions", "requests_of", "score", "table_of"]

Kind = Literal["detection", "fuzzing", "intruder", "output"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TEMPLATES: Mapping[Kind, str] = {
    "detection": "detect",
    "fuzzing": "fuzz",
    "intruder": "intruder",
    "output": "output",
}
CHOICES = 5
"""Passages of an intruder question, and lists of an output question."""
ROUNDS = 4
SIDE = 5
"""Passages of each side of a detection or fuzzing question."""
ANSWER_TOKENS = 40

Promoted = Callable[[Sequence[FeatureRef]], Mapping[FeatureRef, Sequence[str]]]
"""The tokens that features promote, such as by `token_effects`."""


@dataclass(frozen=True)
class Question:
    """One question about one feature: numbered options, and which of them are right."""

    ref: FeatureRef
    kind: Kind
    options: tuple[str, ...]
    right: tuple[bool, ...]

    def request(self, label: str, templates: Templates, seed: int) -> Request:
        """For the judge. An intruder question does not name the label."""
        shown = {"examples": "\n".join(f"{i}. {text}" for i, text in enumerate(self.options, 1))}
        if self.kind != "intruder":
            shown["description"] = label
        return Request(
            templates[TEMPLATES[self.kind]].fill(**shown),
            self.kind,
            seed=seed,
            sampling=Sampling(temperature=0.0, max_tokens=ANSWER_TOKENS),
        )

    def mark(self, answer: str) -> float | None:
        """From 0 to 1; None where the answer cannot be read."""
        said = parse_numbers(answer, len(self.options))
        if said is None:
            return None
        if self.kind in ("intruder", "output"):
            return float(said == {self.right.index(True)})
        return balanced_accuracy(said, self.right)


def questions(
    store: FeatureStore,
    labels: LabelPack,
    kinds: Iterable[Kind] = KINDS,
    *,
    promoted: Promoted | None = None,
    seed: int = 0,
) -> list[Question]:
    """The questions about the labels whose features are in the store.

    Features with too few passages get fewer questions. The kind `output` needs `promoted`.
    """
    from qwen_scope_lens.features.statistics import statistics

    wanted = tuple(dict.fromkeys(kinds))
    if unknown := [kind for kind in wanted if kind not in KINDS]:
        raise UnknownName(f"{unknown[0]!r} is not a test: expected some of {', '.join(KINDS)}")
    if "output" in wanted and promoted is None:
        raise TooLittleData("the test `output` needs the tokens that features promote")
    found: list[Question] = []
    source = Passages(store)
    for sae in labels.saes:
        if sae.layer not in store.layers or store.sae(sae.layer).ref != str(sae):
            continue
        facts = statistics(store, sae.layer, examples=4 * SIDE, sample=8 * SIDE)
        refs = [sae.feature(number) for number in sorted(labels.of_sae(sae))]
        texts = set(wanted) - {"output"}
        if texts:
            finder = _Near(store, sae.layer, facts, refs)
            for ref in refs:
                found += _about(ref, texts, finder, source, facts, random.Random(f"{seed} {ref}"))
        if "output" in wanted and promoted is not None:
            found += _outputs(refs, facts, promoted, seed)
    if not found:
        raise TooLittleData(
            f"no label can be tested: the store {store.path} has none of their features, or too few"
            " passages of them"
        )
    return found


def score(
    labels: LabelPack,
    asked: Sequence[Question],
    judge: Generator,
    ledger: Ledger,
    *,
    templates: Templates | None = None,
    seed: int = 0,
) -> LabelPack:
    """The labels with their scores; `score` is that of detection, or the mean of the others.

    The provenance says which judge answered, and keeps who wrote the label.
    """
    requests = requests_of(asked, labels, templates, seed)
    marks: dict[FeatureRef, dict[str, list[float]]] = {}
    for one, answer in zip(asked, ledger.ask(judge, requests), strict=True):
        mark = one.mark(answer.text) if answer is not None else None
        if mark is not None:
            marks.setdefault(one.ref, {}).setdefault(one.kind, []).append(mark)
    scored = []
    for ref, kinds in marks.items():
        means = {kind: round(float(np.mean(values)), 4) for kind, values in kinds.items()}
        label = labels[ref]
        tests = {
            "judge": judge.name,
            "scores": means,
            "questions": {kind: len(values) for kind, values in kinds.items()},
        }
        main = means.get("detection", float(np.mean(list(means.values()))))
        scored.append(replace(label, score=main, provenance={**label.provenance, "tests": tests}))
    return LabelPack(scored)


def requests_of(
    asked: Sequence[Question], labels: LabelPack, templates: Templates | None = None, seed: int = 0
) -> list[Request]:
    """What the judge will be asked, in the order of the questions."""
    templates = templates or Templates()
    return [one.request(labels.text(one.ref), templates, seed) for one in asked]


def table_of(scored: LabelPack) -> Table:
    """A row per label: its scores, who wrote it and who judged."""
    tests = {ref: label.provenance.get("tests", {}) for ref, label in scored.items()}
    rows = [
        (
            str(ref),
            *(tests[ref].get("scores", {}).get(kind) for kind in KINDS),
            label.provenance.get("describer") or label.provenance.get("source"),
            tests[ref].get("judge"),
            label.text,
        )
        for ref, label in scored.items()
    ]
    return Table.of(("feature", *KINDS, "writer", "judge", "label"), rows)


# --- questions -----------------------------------------------------------------------------------


Place = tuple[int, int]


class _Near:
    """Places where a feature is silent although something near it happens."""

    def __init__(
        self, store: FeatureStore, layer: int, facts: FeatureStatistics, refs: Sequence[FeatureRef]
    ) -> None:
        self._store, self._layer, self._facts = store, layer, facts
        self._tokens: dict[FeatureRef, int] = {}
        wanted: dict[int, list[Place]] = {}
        for ref in refs:
            if top := facts.top_examples(ref.feature):
                token = int(store.by_token(top[0].doc).token_ids[top[0].position])
                self._tokens[ref] = token
                wanted.setdefault(token, [])
        listed = np.array(sorted(wanted), dtype=np.int64)
        for block in store.iter_blocks(layer, keep=True):
            for at in np.flatnonzero(np.isin(block.token_ids, listed)).tolist():
                places = wanted[int(block.token_ids[at])]
                if len(places) < 40 * SIDE:
                    places.append((int(block.doc[at]), int(block.position[at])))
        self._places = wanted

    def places(self, ref: FeatureRef, fires: set[int], rng: random.Random) -> Iterator[Place]:
        """Near places in documents where the feature never fires, the two kinds in turn."""
        partners = [int(p) for p in self._facts.partner[ref.feature] if p >= 0]
        friends = [(one.doc, one.position) for p in partners for one in self._facts.top_examples(p)]
        same = list(self._places.get(self._tokens.get(ref, -1), ()))
        sides = [[p for p in some if p[0] not in fires] for some in (friends, same)]
        for some in sides:
            rng.shuffle(some)
        seen: set[int] = set()
        while any(sides):
            for some in sides:
                while some:
                    place = some.pop()
                    if place[0] not in seen:
                        seen.add(place[0])
                        yield place
                        break


def _about(
    ref: FeatureRef,
    kinds: set[Kind],
    near: _Near,
    source: Passages,
    facts: FeatureStatistics,
    rng: random.Random,
) -> Iterator[Question]:
    hits = near._store.by_feature(ref)
    fires = set(np.unique(hits.doc).tolist())
    examples = facts.sample_examples(ref.feature)
    rng.shuffle(examples)
    one_per_doc = list({example.doc: example for example in examples}.values())
    silent = list(near.places(ref, fires, rng))
    active = [source.plain(one.doc, one.position) for one in one_per_doc]
    others = [source.plain(*place) for place in silent]
    if "detection" in kinds and min(len(active), len(others)) >= 2:
        yield _mixed(ref, "detection", active[:SIDE], others[:SIDE], rng)
    if "fuzzing" in kinds and len(one_per_doc) >= 4:
        half = min(SIDE, len(one_per_doc) // 2)
        right = [source.marked(ref.layer, ref.feature, one) for one in one_per_doc[:half]]
        moved = [
            text
            for one in one_per_doc[half : 2 * half]
            if (text := source.moved(ref.layer, ref.feature, one, rng))
        ]
        if moved:
            yield _mixed(ref, "fuzzing", right, moved, rng)
    if "intruder" in kinds and len(active) >= CHOICES - 1:
        for intruder in others[:ROUNDS]:
            some = rng.sample(active, CHOICES - 1)
            yield _mixed(ref, "intruder", [intruder], some, rng)


def _mixed(
    ref: FeatureRef, kind: Kind, right: Sequence[str], wrong: Sequence[str], rng: random.Random
) -> Question:
    pairs = [(text, True) for text in right] + [(text, False) for text in wrong]
    rng.shuffle(pairs)
    return Question(ref, kind, tuple(t for t, _ in pairs), tuple(flag for _, flag in pairs))


def _outputs(
    refs: Sequence[FeatureRef], facts: FeatureStatistics, promoted: Promoted, seed: int
) -> Iterator[Question]:
    """The tokens of each feature among those of features that fire as often."""
    sae = refs[0].sae
    firing = np.flatnonzero(facts.token_count > 0)
    firing = firing[np.argsort(facts.token_count[firing], kind="stable")]
    place = {int(feature): at for at, feature in enumerate(firing)}
    asked: list[tuple[FeatureRef, list[FeatureRef]]] = []
    for ref in refs:
        rng = random.Random(f"{seed} output {ref}")
        if ref.feature not in place or len(firing) < 4 * CHOICES:
            continue
        start = min(max(0, place[ref.feature] - 20), max(0, len(firing) - 41))
        near = [int(f) for f in firing[start : start + 41] if f != ref.feature]
        rounds = (rng.sample(near, CHOICES - 1) for _ in range(ROUNDS))
        asked += [(ref, [sae.feature(one) for one in some]) for some in rounds]
    every = list(dict.fromkeys(one for ref, others in asked for one in (ref, *others)))
    tokens = promoted(every)
    for number, (ref, others) in enumerate(asked):
        lists = [", ".join(repr(t.strip()) for t in tokens[one]) for one in (ref, *others)]
        rng = random.Random(f"{seed} {number} {ref}")
        yield _mixed(ref, "output", lists[:1], lists[1:], rng)
