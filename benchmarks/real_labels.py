"""Labels of 50 features of a real model by a local writer, their scores, and what chance scores.

    QWEN_SCOPE_HOME=WORK/release python benchmarks/real_labels.py --model MODEL \
        --name "WHAT IT IS" --sae local/SAE-... --layer 14 --data DATA --texts WORK --work OUT

The same steps as `qsl synth describe --generator hf:MODEL`: the model writes a description from
passages and then, as the judge, tells passages in which the feature is active from others by the
description alone. The features are drawn at random from those that fire in enough documents. As a
control the judge takes the same tests with the description of another feature.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from real_verbs import Setting, begin, real_arguments

import qwen_scope_lens as qsl
from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.labels.describe import Sampled, describe
from qwen_scope_lens.writers.generator import Completion, Request
from qwen_scope_lens.writers.ledger import Ledger
from qwen_scope_lens.writers.local import Local

KINDS = {"prose": 0.4, "code": 0.2, "benchmarks": 0.2, "prompts": 0.2}
"""Shares of the tokens of the store; toxic texts and harmful prompts are left out."""
TOKENS = 20_000
FEATURES, LEAST = 50, 12
"""How many are labelled, and in how many documents each fires at least."""
SAMPLED = Sampled(top=4, quantiles=(0.5,), active=4, silent=4)


def mixed_store(setting: Setting, work: Path, texts: Path) -> qsl.FeatureStore:
    """Mixed texts of `tools/real`, labelled by kind, kept in the work folder."""
    left = {kind: share * TOKENS for kind, share in KINDS.items()}
    rows = []
    with (texts / "texts" / "train.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            if left.get(row["kind"], 0) > 0:
                left[row["kind"]] -= row["tokens"]
                rows.append({"text": row["text"], "kind": row["kind"]})
    return qsl.extract(
        rows,
        model=setting.model,
        group=setting.group,
        layers=setting.layers[:1],
        out=work / "mixed",
        max_tokens=128,
        progress=False,
    )


class Fixed:
    """A describer that hands out one text after the other, as if it had written them."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.name, self._texts = "descriptions of other features", list(texts)

    def generate(self, requests: Sequence[Request], book: Any) -> None:
        for number in range(len(requests)):
            if book.start(number):
                book.finish(number, Completion(self._texts.pop(0), "stop"))


def drawn(store: qsl.FeatureStore, group: str, layer: int) -> list[FeatureRef]:
    """Features that fire in enough documents, and not everywhere, at random."""
    facts = qsl.statistics(store, layer)
    documents = facts.doc_count
    fit = np.flatnonzero((documents >= LEAST) & (documents <= store.n_docs // 2))
    some = np.random.default_rng(0).choice(fit, min(FEATURES, len(fit)), replace=False)
    return [FeatureRef(qsl.find_group(group).short, layer, int(n)) for n in sorted(some)]


def summary(scores: Sequence[float]) -> str:
    values = np.array(scores)
    draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return (
        f"{len(values)} tested, mean {values.mean():.3f} [{low:.3f}, {high:.3f}], median"
        f" {np.median(values):.2f}, {np.mean(values >= 0.7):.0%} at 0.7 or more,"
        f" {np.mean(values == 0.5):.0%} at 0.5"
    )


def scores_of(pack: Mapping[FeatureRef, Any]) -> dict[FeatureRef, float]:
    return {ref: label.score for ref, label in pack.items() if label.score is not None}


def main() -> None:
    parser = real_arguments(__doc__, layer=True)
    parser.add_argument("--texts", type=Path, required=True, help="the work folder of tools/real")
    options = parser.parse_args()
    setting = begin(options)
    say = setting.say
    layer = setting.layers[0]
    store = mixed_store(setting, options.work, options.texts)
    refs = drawn(store, setting.group, layer)
    say(f"{store.n_docs} documents, {store.n_tokens:,} tokens")
    say(f"{len(refs)} features of layer {layer}, at random")
    say(f"writer and judge: {options.name}, greedy; passages: {SAMPLED}")
    local = Local(setting.model, Path(options.model).name, batch=32)
    with Ledger.open(options.work / "labels.run") as ledger:
        pack = describe(store, refs, local, ledger, sampled=SAMPLED, progress=True)
        pack.write(options.work / "labels.jsonl")
        say(f"{len(pack)} of {len(refs)} features have a label; cost: {ledger.spent}")
        found = scores_of(pack)
        say(f"own description:    {summary(list(found.values()))}")
        if options.out is not None:
            say.save(options.out)
        named = sorted(pack)
        texts = [pack[ref].text for ref in named]
        others = describe(
            store,
            named,
            Fixed(texts[1:] + texts[:1]),
            ledger,
            scorer=local,
            sampled=SAMPLED,
            progress=True,
        )
    wrong = scores_of(others)
    say(f"another's, control: {summary(list(wrong.values()))}")
    both = [ref for ref in found if ref in wrong]
    gain = np.array([found[ref] - wrong[ref] for ref in both])
    draws = np.random.default_rng(0).choice(gain, (2000, len(gain))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    change = f"{gain.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
    say(f"own less another's: {change} over {len(both)} features")
    say("\nthe ten best, and the three worst:")
    order = sorted(found, key=lambda ref: -found[ref])
    for ref in [*order[:10], *order[-3:]]:
        say(f"  {ref.layer}/{ref.feature} {found[ref]:.2f}: {pack[ref].text}")
    if options.out is not None:
        say.save(options.out)


if __name__ == "__main__":
    main()
