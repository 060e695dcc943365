"""What the verbs say on a real language model: verify, statistics, rank, blame, compare, steer.

    QWEN_SCOPE_HOME=WORK/release python benchmarks/real_verbs.py --model MODEL --name "WHAT IT IS" \
        --sae local/SAE-... --layers 4,10,14,20 --data DATA --work WORK/verbs [--only rank,blame]

The release is what `tools/real` made, DATA the folder of public data sets that its README names
(the Universal Declaration of Human Rights in 17 languages, replies of the Language Confusion
Benchmark). The store of the Declaration is kept in the work folder and extended, not made again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import Printed, cpu_name

import qwen_scope_lens as qsl
from qwen_scope_lens.compare import align, match_activations
from qwen_scope_lens.saes.verify import measure
from qwen_scope_lens.steering.blame import Case
from qwen_scope_lens.tables import Table

CONFUSED, CLEAN = 24, 24
"""Replies of the Language Confusion Benchmark: with Chinese in them, and without."""
FEATURES, PROMPTS, NEW_TOKENS = 3, 12, 24
"""Of the sweeps: how many features are pushed together, on how many prompts, for how long."""
HAN = re.compile(r"[\u4e00-\u9fff]")


class Setting:
    """What every section needs: loaded once, used by all."""

    def __init__(self, options: argparse.Namespace, say: Printed) -> None:
        self.data, self.work, self.say = options.data, options.work, say
        self.group = options.sae
        row = qsl.find_group(self.group)
        self.layers = (
            [int(n) for n in options.layers.split(",")] if options.layers else list(row.layers)
        )
        self.model = qsl.load_model(options.model, dtype=torch.bfloat16)
        self.saes = {n: qsl.load_sae(f"{self.group}/{n}") for n in self.layers}

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        with gzip.open(self.data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)

    def declaration(self) -> qsl.FeatureStore:
        """The Declaration of Human Rights: an article per document, labelled by language."""
        return qsl.extract(
            list(self.rows("parallel/udhr")),
            model=self.model,
            group=self.group,
            layers=self.layers,
            out=self.work / "declaration",
            max_tokens=96,
            progress=False,
        )


def real_arguments(doc: str, *, layer: bool = False) -> argparse.ArgumentParser:
    """What every benchmark of the real model takes; with `layer` exactly one is read."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True, help="what the model is, for the first line")
    parser.add_argument("--sae", required=True, help="the group, such as local/SAE-Res-...")
    if layer:
        parser.add_argument("--layer", required=True, dest="layers")
    else:
        parser.add_argument("--layers", help="by default all that the group has")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="also write what is printed into this file")
    return parser


def begin(options: argparse.Namespace) -> Setting:
    """Say what is measured on what, and load it."""
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    say = Printed()
    say(f"{options.name}; SAEs {options.sae}; {cpu_name()}, one thread; {date.today()}")
    return Setting(options, say)


def verify(setting: Setting) -> None:
    """Each SAE on the residuals of its own layer and of its neighbours, by convention."""
    say = setting.say
    wanted = sorted({n + d for n in setting.layers for d in (-1, 0, 1)})
    texts = [row["text"] for row in setting.rows("parallel/udhr")][::10]
    read = qsl.capture(setting.model, texts, wanted, max_tokens=64, truncate=True)
    rows = []
    for layer, sae in setting.saes.items():
        for other in (layer - 1, layer, layer + 1):
            x, keep = read.residuals[other].float(), read.keep(other)
            found = measure(sae, x, mask=keep)
            conventions = dict(found.fvu)
            conventions.pop(
                "top-k without ReLU"
            )  # the same where no value of the top k is negative
            own = conventions.pop(found.convention)
            best = min(conventions, key=lambda name: conventions[name])
            rows.append((layer, other, f"{own:.3f}", f"{conventions[best]:.3f} ({best})", found.ok))
    header = ("SAE of layer", "residuals of layer", "FVU", "best wrong convention", "passes alone")
    say(Table.of(header, rows).text())


def statistics(setting: Setting) -> None:
    """What first tokens and tokens of extreme norm do to the statistics of a layer."""
    store = setting.declaration()
    rows = []
    for layer in setting.layers:
        with_all = qsl.statistics(store, layer, keep=False)
        kept = qsl.statistics(store, layer)
        left_out = with_all.n_tokens - kept.n_tokens
        changed = with_all.maximum > 2 * np.maximum(kept.maximum, 1e-9)
        mean = [s.total / np.maximum(s.token_count, 1) for s in (with_all, kept)]
        often = kept.token_count >= 10
        shift = np.abs(mean[0] / np.maximum(mean[1], 1e-9) - 1)[often]
        strongest = int(with_all.maximum.argmax())
        rows.append(
            (
                layer,
                f"{kept.n_tokens:,}",
                left_out,
                f"{with_all.maximum.max():.0f} / {kept.maximum.max():.0f}",
                f"{with_all.total[strongest] / with_all.total.sum():.1%}",
                int(changed.sum()),
                f"{np.quantile(shift, 0.99):.2f}",
                f"{(kept.token_count == 0).mean():.1%}",
                f"{(kept.token_count > 0.1 * kept.n_tokens).sum()}",
            )
        )
    header = (
        "layer",
        "tokens kept",
        "left out",
        "largest activation, all / kept",
        "share of the strongest feature in all activation, all tokens",
        "features whose maximum at least halves",
        "99th percentile of the relative change of the mean",
        "never fired, kept",
        "on > 10% of tokens, kept",
    )
    setting.say(Table.of(header, rows).text())


def rank(setting: Setting) -> None:
    """The best feature for each language of the Declaration, scored on held-out articles."""
    store = setting.declaration()
    languages = sorted(set(store.labels("lang").tolist()))
    rows = []
    for language in languages:
        found = qsl.rank(store, language, label="lang", layers=setting.layers, pool="mean", top=3)
        if not found.rows:
            rows.append((language, "none passed", found.found, "", "", ""))
            continue
        best = found.rows[0]
        where = best.ref.rsplit("/", 2)
        rows.append(
            (
                language,
                f"{where[1]}/{where[2]}",
                found.found,
                f"{best.held_out_auroc:.3f}",
                f"{best.rate_positive:.0%} / {best.rate_negative:.0%}",
                f"{found.shuffled.ceiling:.3f}",
            )
        )
    header = (
        "language",
        "layer/feature",
        "passed",
        "held-out AUROC",
        "fires in, own / other",
        "best of shuffled labels",
    )
    setting.say(Table.of(header, rows).text())


def blame(setting: Setting) -> None:
    """Which features fire where Chinese breaks into replies in another language."""
    bad: list[Case] = []
    good: list[Case] = []
    for row in setting.rows("confusion/lcb-completions"):
        if row["lang"] in ("zh", "ja") or not row["completion"].strip():
            continue
        reply = row["completion"][:400]
        share = len(HAN.findall(reply)) / len(reply)
        if 0.02 < share < 0.5 and len(bad) < CONFUSED:
            bad.append(Case("Answer:", reply))
        elif share == 0 and len(good) < CLEAN and row["lang"] in ("ar", "ko", "ru", "vi", "id"):
            good.append(Case("Answer:", reply, bad=False))
        if len(bad) == CONFUSED and len(good) == CLEAN:
            break
    refs = [f"{setting.group}/{layer}" for layer in setting.layers]
    found = qsl.blame(
        setting.model, refs, bad + good, classes=("han",), top=8, loaded=setting.saes.values()
    )
    store = setting.declaration()
    lang = store.labels("lang")
    rows = []
    for suspect in found:
        per_language = fires_by_language(store, suspect.ref, lang)
        rows.append(
            (
                f"{suspect.ref.layer}/{suspect.ref.feature}",
                f"{suspect.on_bad:.2f} / {suspect.elsewhere:.2f}",
                f"{suspect.rate_on_bad:.0%} / {suspect.rate_elsewhere:.0%}",
                ", ".join(f"{name} {share:.0%}" for name, share in per_language[:3]),
            )
        )
    setting.say(
        f"{len(bad)} replies with Chinese inside another language, {len(good)} without; the bad"
        " tokens are the Han ones."
    )
    header = (
        "layer/feature",
        "mean on bad tokens / elsewhere",
        "fires on",
        "in the Declaration: share of tokens, three highest languages",
    )
    setting.say(Table.of(header, rows).text())


def fires_by_language(
    store: qsl.FeatureStore, ref: qsl.FeatureRef, lang: Any
) -> list[tuple[str, float]]:
    """Languages by the share of tokens on which the feature fires, highest first."""
    fired: dict[str, int] = {}
    seen: dict[str, int] = {}
    for block in store.iter_blocks(ref.layer):
        hit = ((block.codes.indices == ref.feature) & block.codes.active).any(-1).numpy()
        for name, one in zip(lang[block.doc], hit, strict=True):
            seen[name] = seen.get(name, 0) + 1
            fired[name] = fired.get(name, 0) + int(one)
    shares = [(name, fired[name] / seen[name]) for name in seen]
    return sorted(shares, key=lambda item: -item[1])


def steer(setting: Setting) -> None:
    """Dose curves of Chinese features: added in English, taken away where Chinese had broken in."""
    store, layer = setting.declaration(), setting.layers[len(setting.layers) // 2]
    how = {"label": "lang", "layer": layer, "pool": "mean", "by": "effect", "top": FEATURES}
    chosen = qsl.rank(store, "zh", **how)
    refs = [row.ref for row in chosen.rows]
    chinese = [row["text"] for row in setting.rows("parallel/udhr") if row["lang"] == "zh"]
    typical = qsl.calibrate(setting.model, refs, chinese, setting.saes.values())
    plan = qsl.Plan([qsl.Edit(ref, "add", 1.0, unit="typical") for ref in refs])
    english = [
        row["prompt"] for row in setting.rows("confusion/lcb-prompts") if row["lang"] == "en"
    ]
    cut = leaked(setting, PROMPTS)
    for name, prompts, doses in (
        ("English questions", english[:PROMPTS], (0.5, 1, 2, 4)),
        ("Replies cut after their first Chinese word", cut, (-0.5, -1, -2, -4)),
    ):
        found = qsl.sweep(
            setting.model,
            plan.calibrated(typical),
            doses,
            prompts,
            "class=han",
            setting.saes.values(),
            sampling=qsl.Sampling(NEW_TOKENS),
            keep=setting.work / f"{name.split()[0].lower()}.json",
        )
        setting.say(f"{name}, {len(prompts)} of them, {NEW_TOKENS} new tokens:\n\n{found}\n")


def leaked(setting: Setting, count: int) -> list[str]:
    """Replies in another language, up to and with the first run of Chinese characters."""
    found = []
    for row in setting.rows("confusion/lcb-completions"):
        first = re.search(r"[\u4e00-\u9fff]+", row["completion"])
        if row["lang"] not in ("zh", "ja") and first and 40 < first.end() < 300:
            found.append(row["completion"][: first.end()])
        if len(found) == count:
            break
    return found


def compare(setting: Setting) -> None:
    """How many features of a layer have a partner in another layer, beyond a shuffled null."""
    store = setting.declaration()
    rows = []
    for a, b in zip(setting.layers, setting.layers[1:], strict=False):
        both = align(store, a, store, b)
        found = match_activations(both.a, both.b, doc=both.doc)
        tested = int((found.nearest >= 0).sum())
        strong = found.matched & (found.score > 0.7)
        rows.append(
            (
                f"{a} to {b}",
                f"{tested:,}",
                f"{found.matched.sum() / max(1, tested):.1%}",
                f"{strong.sum() / max(1, tested):.1%}",
                f"{np.median(found.score[found.matched]):.2f}",
                f"{found.level:.2f}",
            )
        )
    header = (
        "layers",
        "features with a score",
        "with a partner beyond chance",
        "with a correlation above 0.7",
        "median correlation of the matched",
        "level of the null",
    )
    setting.say(Table.of(header, rows).text())


SECTIONS: dict[str, Callable[[Setting], None]] = {
    "verify": verify,
    "statistics": statistics,
    "rank": rank,
    "blame": blame,
    "compare": compare,
    "steer": steer,
}


def main() -> None:
    parser = real_arguments(__doc__)
    parser.add_argument("--only", default=",".join(SECTIONS))
    options = parser.parse_args()
    setting = begin(options)
    say = setting.say
    for name in options.only.split(","):
        started = time.process_time()
        say(f"\n## {name}\n\n{SECTIONS[name].__doc__}\n")
        SECTIONS[name](setting)
        say(f"\n{time.process_time() - started:.0f} CPU seconds")
        if options.out is not None:
            say.save(options.out)


if __name__ == "__main__":
    main()
