"""Judgements about features: how much each matters for a task, and its risk category.

Relevance, `s_f` in [0, 1], comes from a judge model that reads descriptions and passages, from a
label file that a person filtered, or from a contrast between documents of the task and others; the
last two need no model. The kind of a feature decides how a reply goes (equation 22 of the
Qwen-Scope report): a harmful prompt is declined, a benign one answered. Kinds come from a judge,
from labels that match a regular expression, or are one for all features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadPlan, GeneratorFailed, TooLittleData
from qwen_scope_lens.features.pool import firing
from qwen_scope_lens.labels.packs import LabelPack
from qwen_scope_lens.synth.targets import TargetSet
from qwen_scope_lens.writers.generator import Generator, Request, Sampling, clean
from qwen_scope_lens.writers.ledger import Ledger, Prices
from qwen_scope_lens.writers.templates import Templates

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = [
    "ANSWERS",
    "by_contrast",
    "by_judge",
    "by_labels",
    "choose_relevance",
    "kinds_by_judge",
    "kinds_by_labels",
    "parse_answer",
    "parse_kind",
    "with_kinds",
]

ANSWERS = {"yes": 1.0, "probably": 0.67, "maybe": 0.33, "no": 0.0}
"""The words of FAC Synthesis, which drops only No: the same as a least relevance of 0.3."""

MOST_UNREADABLE = 0.5
"""A judge is refused if more than this share of its answers cannot be read."""


def choose_relevance(
    reference: FeatureStore | None,
    labels: LabelPack | None,
    *,
    layers: Iterable[int],
    match: str | None = None,
    contrast: str | None = None,
    judge: Generator | None = None,
    task: str = "",
    least_score: float | None = None,
    templates: Path | None = None,
    ledger: Path | None = None,
    prices: Prices | None = None,
    passages: int = 5,
) -> dict[FeatureRef, float] | None:
    """Relevance by the way that was asked for; None where no way was, so that every feature of the
    anchor data matters.

    A judge is asked about the labelled features, or without labels about all that fire in the
    anchor data; its answers are kept in the folder `ledger`.
    """
    if contrast is not None:
        label, equals, value = contrast.partition("=")
        if reference is None or not equals or not label:
            raise BadPlan(
                f"a contrast is LABEL=VALUE, such as toxic=1, of a --reference store; found"
                f" {contrast!r}" + ("" if reference else " and no store")
            )
        return by_contrast(reference, label, value)
    if judge is None:
        if labels is None and match is not None:
            raise BadPlan("--match looks into labels: give --labels")
        return None if labels is None else by_labels(labels, match or "", least_score)
    known = None if labels is None else labels.search("", least_score)
    descriptions = {} if known is None else {ref: label.text for ref, label in known.items()}
    shown: dict[FeatureRef, tuple[str, ...]] = {}
    if reference is not None:
        from qwen_scope_lens.synth.find import passages_of

        everything = [ref for layer in layers for ref in firing(reference, layer)]
        shown = passages_of(reference, everything if known is None else known, passages)
    if ledger is None:
        raise BadPlan("a judge needs a folder for the ledger of its answers")
    with Ledger.open(ledger, prices) as book:
        return by_judge(judge, book, Templates(templates), task, descriptions, shown)


def by_labels(
    pack: LabelPack, match: str = "", least_score: float | None = None
) -> dict[FeatureRef, float]:
    """All features of a pack whose text matches a regular expression, each with relevance 1.

    With `least_score` only those whose description was tested and reached it.
    """
    found = dict.fromkeys(pack.search(match, least_score), 1.0)
    if not found:
        raise TooLittleData(
            f"none of {len(pack)} labels matches {match!r}"
            + ("" if least_score is None else f" with a score of {least_score} or more")
        )
    return found


def by_judge(
    judge: Generator,
    ledger: Ledger,
    templates: Templates,
    task: str,
    descriptions: Mapping[FeatureRef, str],
    passages: Mapping[FeatureRef, Sequence[str]],
    tries: int = 2,
) -> dict[FeatureRef, float]:
    """Ask a model about each feature. One whose answers cannot be read is left out.

    Raises `GeneratorFailed` when that happens for more than half of the features.
    """
    if not task:
        raise BadPlan("a judge needs to know the task: give --task")
    refs = sorted({*descriptions, *passages})
    waiting, found = refs, dict[FeatureRef, float]()
    for trial in range(tries):
        requests = [
            Request(
                templates["judge_relevance"].fill(
                    task=task,
                    description=descriptions.get(ref, "(no description; see the passages)"),
                    examples="\n".join(f"- {text}" for text in passages.get(ref, ())) or "(none)",
                ),
                "judge",
                seed=trial,
                sampling=Sampling(temperature=0.0 if trial == 0 else 0.8, max_tokens=64),
            )
            for ref in waiting
        ]
        for ref, completion in zip(waiting, ledger.ask(judge, requests), strict=True):
            score = parse_answer(completion.text) if completion else None
            if score is not None:
                found[ref] = score
        waiting = [ref for ref in waiting if ref not in found]
        if not waiting or ledger.limit_reached:
            break
    if refs and len(refs) - len(found) > MOST_UNREADABLE * len(refs):
        raise GeneratorFailed(
            f"{judge.name} gave no usable answer for {len(refs) - len(found)} of {len(refs)}"
            f" features ({ledger.limit_reached or 'expected Yes, Probably, Maybe or No'}): use a"
            " model that follows instructions, or edit judge_relevance.txt"
        )
    return found


def by_contrast(
    store: FeatureStore, label: str, positive: str, negative: str | None = None, top: int = 200
) -> dict[FeatureRef, float]:
    """Features that tell documents of one label from others; relevance is their AUROC above chance,
    doubled, on the documents that the ranking did not see."""
    from qwen_scope_lens.features.rank import rank

    ranking = rank(
        store, [positive], None if negative is None else [negative], label=label, top=top
    )
    found = {}
    for row in ranking.rows:
        found[FeatureRef.parse(row.ref)] = max(0.0, min(1.0, 2 * row.held_out_auroc - 1))
    if not found:
        raise TooLittleData(
            f"no feature tells {label} {positive!r} from the rest: use other documents, more of"
            " them, or a judge"
        )
    return found


def parse_answer(text: str) -> float | None:
    """Yes, Probably, Maybe or No, or a number from 0 to 1; None for anything else."""
    text = clean(text).casefold()
    if found := re.match(r"\W*(yes|probably|maybe|no)\b", text):
        return ANSWERS[found[1]]
    if found := re.fullmatch(r"\W*([01](?:\.\d+)?|\.\d+)\W*", text):
        number = float(found[1])
        return number if number <= 1 else None
    return None


def with_kinds(
    targets: TargetSet, kinds: Mapping[FeatureRef, str] | None = None, rest: str = ""
) -> TargetSet:
    """The targets with these kinds; targets that still have none get the kind `rest`."""
    known = kinds or {}
    rows = (replace(t, kind=known.get(t.ref) or t.kind or rest) for t in targets.targets)
    return replace(targets, targets=tuple(rows))


def kinds_by_labels(labels: LabelPack, harmful: str) -> dict[FeatureRef, str]:
    """Labelled features: harmful where the text matches a regular expression, else benign."""
    found = set(labels.search(harmful))
    return {ref: "harmful" if ref in found else "benign" for ref, _ in labels.items()}


def kinds_by_judge(
    targets: TargetSet, judge: Generator, ledger: Ledger, templates: Templates
) -> dict[FeatureRef, str]:
    """Ask a model about each wanted feature that has no kind yet.

    Features are left out whose answer cannot be read, or was not paid for because of the spending
    limit.
    """
    asked = [target for target in targets.wanted if not target.kind]
    requests = [
        Request(
            templates["judge_kind"].fill(
                task=targets.task,
                description=target.description or "(no description; see the passages)",
                examples="\n".join(f"- {text}" for text in target.examples) or "(none)",
            ),
            "judge",
            sampling=Sampling(temperature=0.0, max_tokens=64),
        )
        for target in asked
    ]
    found = {}
    for target, completion in zip(asked, ledger.ask(judge, requests), strict=True):
        if completion is not None and (kind := parse_kind(completion.text)):
            found[target.ref] = kind
    return found


def parse_kind(text: str) -> str:
    """`harmful` or `benign`; empty for any other answer."""
    found = re.match(r"\W*(harmful|benign|harmless)\b", clean(text).casefold())
    return "" if found is None else "harmful" if found[1] == "harmful" else "benign"
