"""Descriptions of features, written by a model from passages and tested by detection.

This is the method of Delphi (Paulo et al. 2025). A describer sees the strongest passages and some
from lower quantiles. A scorer then sees only the description, and has to tell passages in which the
feature is active from others. The score is its balanced accuracy; 0.5 is chance.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.labels.packs import Label, LabelPack
from qwen_scope_lens.labels.passages import Passages
from qwen_scope_lens.stores.store import FeatureStore
from qwen_scope_lens.writers.generator import Generator, Request, Sampling, clean
from qwen_scope_lens.writers.ledger import Ledger
from qwen_scope_lens.writers.templates import Templates

if TYPE_CHECKING:
    from qwen_scope_lens.features.statistics import Example, FeatureStatistics

__all__ = [
    "Detection",
    "Planned",
    "Sampled",
    "balanced_accuracy",
    "describe",
    "expected_requests",
    "one_line",
    "parse_numbers",
    "plan",
]

FEATURES_AT_ONCE = 32
USUAL_CHARACTERS = 100
"""Of a description, for the price of its test."""


@dataclass(frozen=True)
class Sampled:
    """How many passages are shown and tested. The numbers are our own; no paper gives them."""

    top: int = 10  # the strongest passages, which are shown
    # one weaker passage near each of these quantiles is shown, too
    quantiles: tuple[float, ...] = (0.75, 0.5, 0.25)
    active: int = 6  # passages of the test in which the feature fires; none was shown
    silent: int = 6  # passages of the test from documents in which it never fires
    seed: int = 0


@dataclass(frozen=True)
class Detection:
    """The test of a description: passages in random order, and which of them are active."""

    passages: tuple[str, ...]
    active: tuple[bool, ...]


@dataclass(frozen=True)
class Planned:
    """What will be asked about one feature: for a description, and about its test."""

    ref: FeatureRef
    request: Request
    test: Detection

    @property
    def is_tested(self) -> bool:
        return any(self.test.active) and not all(self.test.active)

    def about(self, description: str, templates: Templates, seed: int) -> Request:
        """The test of a description, for the scorer."""
        passages = "\n".join(f"{i}. {text}" for i, text in enumerate(self.test.passages, 1))
        return Request(
            templates["detect"].fill(description=description, examples=passages),
            "detect",
            seed=seed,
            sampling=Sampling(temperature=0.0, max_tokens=80),
        )


def plan(
    store: FeatureStore,
    refs: Iterable[FeatureRef],
    *,
    templates: Templates | None = None,
    sampled: Sampled | None = None,
) -> list[Planned]:
    """The passages of every feature that has some, chosen before anything is asked."""
    from qwen_scope_lens.features.statistics import statistics

    templates, sampled, source = templates or Templates(), sampled or Sampled(), Passages(store)
    layers: dict[int, list[FeatureRef]] = {}
    for ref in sorted(set(refs)):
        layers.setdefault(store.feature(ref)[0], []).append(ref)
    planned = []
    for layer, some in layers.items():
        size = 4 * (sampled.active + sampled.top)
        facts = statistics(store, layer, examples=sampled.top, sample=size, partners=1)
        for ref in some:
            examples = _shown(ref, facts, sampled)
            if examples:
                request = Request(
                    templates["describe"].fill(examples=_numbered(source, ref, examples, facts)),
                    "describe",
                    seed=sampled.seed,
                    sampling=Sampling(temperature=0.0, max_tokens=120),
                )
                test = _detection(store, ref, facts, examples, source, sampled)
                planned.append(Planned(ref, request, test))
    return planned


def expected_requests(
    planned: Sequence[Planned], templates: Templates | None = None
) -> list[Request]:
    """All that may be asked, for the price: the tests with a description of usual length."""
    templates = templates or Templates()
    tests = [
        one.about("x" * USUAL_CHARACTERS, templates, one.request.seed)
        for one in planned
        if one.is_tested
    ]
    return [*(one.request for one in planned), *tests]


def describe(
    store: FeatureStore,
    refs: Iterable[FeatureRef],
    describer: Generator,
    ledger: Ledger,
    *,
    scorer: Generator | None = None,
    templates: Templates | None = None,
    sampled: Sampled | None = None,
    planned: Sequence[Planned] | None = None,
    progress: bool = False,
) -> LabelPack:
    """A label for every feature that has passages and for which the describer writes something.

    `scorer` (by default the describer) takes the test. A feature with too few passages for a test
    gets a label without a score. `planned` is what `plan` chose with the same arguments.
    """
    from tqdm import tqdm

    templates, sampled = templates or Templates(), sampled or Sampled()
    if planned is None:
        planned = plan(store, refs, templates=templates, sampled=sampled)
    labels: list[Label] = []
    with tqdm(total=len(planned), unit="feature", disable=not progress) as bar:
        for start in range(0, len(planned), FEATURES_AT_ONCE):
            group = planned[start : start + FEATURES_AT_ONCE]
            labels += _describe(
                store, group, describer, scorer or describer, ledger, templates, sampled.seed
            )
            bar.update(len(group))
            if ledger.limit_reached:
                break
    return LabelPack(labels)


def _describe(
    store: FeatureStore,
    planned: Sequence[Planned],
    describer: Generator,
    scorer: Generator,
    ledger: Ledger,
    templates: Templates,
    seed: int,
) -> Iterator[Label]:
    """Describe a group of features: first all descriptions, then all tests."""
    texts: dict[FeatureRef, str] = {}
    answered = ledger.ask(describer, [one.request for one in planned])
    for one, completion in zip(planned, answered, strict=True):
        first = one_line(completion.text) if completion else ""
        if first:
            texts[one.ref] = first
    tested = [one for one in planned if one.ref in texts and one.is_tested]
    requests = [one.about(texts[one.ref], templates, seed) for one in tested]
    answers = dict(zip((one.ref for one in tested), ledger.ask(scorer, requests), strict=True))
    for one in planned:
        if one.ref not in texts:
            continue
        score, answer, test = None, answers.get(one.ref), one.test
        if (
            answer is not None
            and (said := parse_numbers(answer.text, len(test.active))) is not None
        ):
            score = balanced_accuracy(said, test.active)
        provenance = _provenance(store, describer, scorer, templates, test)
        yield Label(one.ref, texts[one.ref], score, provenance)


def one_line(text: str) -> str:
    """The line that was asked for; behind an announcement ("... in common is:") the next one."""
    lines = [line for line in clean(text).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].rstrip().endswith(":"):
        lines = [re.sub(r"^\s*(?:\d+[.)]|[-*•])\s+", "", lines[1])]
    return clean(lines[0]) if lines else ""


def parse_numbers(text: str, most: int) -> set[int] | None:
    """The numbers 1..most of an answer, counted from 0; None where they cannot be read."""
    text = clean(text).casefold()
    found = re.findall(r"\d+", text)
    if any(len(number) > 9 for number in found):  # and Python refuses those of 5,000 digits
        return None
    numbers = {int(number) for number in found}
    if not numbers:
        return set() if re.search(r"\bnone\b", text) else None
    return None if max(numbers) > most or min(numbers) < 1 else {n - 1 for n in numbers}


def balanced_accuracy(said: set[int], active: Sequence[bool]) -> float:
    """The mean of two shares: active passages and silent passages that were told correctly."""
    rates = [
        np.mean([(i in said) == wanted for i, one in enumerate(active) if one == wanted])
        for wanted in (True, False)
    ]
    return float(np.mean(rates))


def _shown(ref: FeatureRef, facts: FeatureStatistics, sampled: Sampled) -> list[Example]:
    top = facts.top_examples(ref.feature)[: sampled.top]
    docs = {one.doc for one in top}
    rest = [one for one in facts.sample_examples(ref.feature) if one.doc not in docs]
    last = len(rest) - 1
    some = [rest[round((1 - q) * last)] for q in sampled.quantiles] if rest else []
    return [*top, *dict.fromkeys(some)]


def _numbered(
    source: Passages, ref: FeatureRef, examples: Sequence[Example], facts: FeatureStatistics
) -> str:
    scale = float(facts.maximum[ref.feature])
    passages = [source.marked(ref.layer, ref.feature, one, scale) for one in examples]
    return "\n".join(f"{i}. {text}" for i, text in enumerate(dict.fromkeys(passages), 1))


def _detection(
    store: FeatureStore,
    ref: FeatureRef,
    facts: FeatureStatistics,
    shown: Sequence[Example],
    source: Passages,
    sampled: Sampled,
) -> Detection:
    """A test: active passages of documents that the describer did not see, and silent ones."""
    rng = random.Random(f"{sampled.seed} {ref}")
    seen = {one.doc for one in shown}
    fresh = [one for one in facts.sample_examples(ref.feature) if one.doc not in seen]
    chosen = rng.sample(fresh, min(sampled.active, len(fresh)))
    passages = [(source.plain(one.doc, one.position), True) for one in chosen]
    fires = set(np.unique(store.by_feature(ref).doc).tolist())
    silent = [
        doc for doc in rng.sample(range(store.n_docs), min(store.n_docs, 4096)) if doc not in fires
    ][: sampled.silent]
    for doc in silent:
        length = len(store.spans(doc))
        passages.append((source.plain(doc, rng.randrange(length)), False))
    rng.shuffle(passages)
    return Detection(tuple(p for p, _ in passages), tuple(active for _, active in passages))


def _provenance(
    store: FeatureStore,
    describer: Generator,
    scorer: Generator,
    templates: Templates,
    test: Detection,
) -> dict[str, Any]:
    return {
        "source": "describer",
        "describer": describer.name,
        "scorer": scorer.name,
        "score": "balanced accuracy of detection",
        "tested": [sum(test.active), len(test.active) - sum(test.active)],
        "template": templates["describe"].sha256[:16],
        "model": store.manifest.model.id,
        "corpora": [corpus.sha256[:16] for corpus in store.manifest.corpora],
    }
