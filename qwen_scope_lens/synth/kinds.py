"""Kinds: the risk category that each target feature expresses, which decides how a reply goes.

In the Qwen-Scope report (equation 22) a reply follows the category z of its feature: a harmful
prompt is declined, a benign one answered. Three ways to say it: a judge model, labels that match a
regular expression, or one kind for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.labels.packs import LabelPack
from qwen_scope_lens.synth.targets import TargetSet
from qwen_scope_lens.writers.generator import Generator, Request, Sampling, clean
from qwen_scope_lens.writers.ledger import Ledger
from qwen_scope_lens.writers.templates import Templates

__all__ = ["kinds_by_judge", "kinds_by_labels", "parse_kind", "with_kinds"]


def with_kinds(
    targets: TargetSet, kinds: Mapping[FeatureRef, str] | None = None, rest: str = ""
) -> TargetSet:
    """The targets with these kinds; those that still have none get the kind `rest`."""
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
    """Ask a model about each wanted feature without a kind. Answers that cannot be read, or that
    the spending limit forbade, are left out."""
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
    """`harmful` or `benign`; nothing for any other answer."""
    found = re.match(r"\W*(harmful|benign|harmless)\b", clean(text).casefold())
    return "" if found is None else "harmful" if found[1] == "harmful" else "benign"
