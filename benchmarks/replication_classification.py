"""The paper's classification experiment at mini scale: languages, and rude against polite.

    python benchmarks/replication_classification.py --work build/mini

Languages: each of eight against the other seven; 2,000 discovery documents of each class from the
training split of the minis' corpus, 500 test documents of each class from held-out pages, 16 tokens
each. (Model and SAEs have seen the discovery texts in training, not the test texts.) Rude or
polite: generated texts in six languages from half of the phrases of `tools/mini/tones.py`; tested
on new texts of the same phrases, and on texts whose phrases of tone the discovery set never has.
Needs the corpus of `make mini` (built when it is not there). Writes what it prints to --out.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _measure import cpu_name

from qwen_scope_lens.classify import (
    At,
    Documents,
    Method,
    Reader,
    RuleMethod,
    baselines,
    best_test_layer,
    by_language,
    by_layer,
    compare,
    efficiency,
    efficiency_table,
    layer_table,
    macro,
    name_of,
    open_reader,
    overlap,
    overlap_table,
    read_documents,
    report_text,
    rule_methods,
    scored,
    source_of,
    transfer,
    transfer_table,
)
from qwen_scope_lens.mini import SAES
from qwen_scope_lens.tables import Table
from tools.mini import corpus
from tools.mini.sources import LANGUAGES
from tools.mini.tones import TONES, tone_text

DISCOVERY, TEST = 2000, 500
TONE_DISCOVERY, TONE_TEST = 500, 125
TOKENS = 16
OUT = Path(__file__).parent / "results" / "replication_classification.txt"
LINES: list[str] = []


def say(text: str = "") -> None:
    print(text, flush=True)
    LINES.append(text)


def rows_of_languages(work: Path, split: str, most: int) -> list[dict[str, Any]]:
    """At most `most` prose documents of every language."""
    found = []
    for lang in LANGUAGES:
        rows = [r for r in corpus.read(work, split) if r["domain"] == "prose" and r["lang"] == lang]
        random.Random(f"{split}/{lang}").shuffle(rows)
        found += rows[:most]
    return found


def read(reader: Reader, rows: Sequence[dict[str, Any]], truth: Sequence[bool]) -> Documents:
    texts = tuple(row["text"] for row in rows)
    pooled, residuals = read_documents(reader, texts, residuals=True)
    languages = np.array([row["lang"] for row in rows], dtype=object)
    return Documents(texts, np.array(truth), pooled, residuals, languages)


def against_the_rest(documents: Documents, language: str, each: int) -> Documents:
    """`each` documents of a language, and as many of the others, drawn evenly."""
    assert documents.languages is not None
    rng = np.random.default_rng(LANGUAGES.index(language))
    own = np.nonzero(documents.languages == language)[0][:each]
    share = -(-len(own) // (len(LANGUAGES) - 1))
    rest = [
        rng.choice(np.nonzero(documents.languages == other)[0], share, replace=False)
        for other in LANGUAGES
        if other != language
    ]
    others = rng.permutation(np.concatenate(rest))[: len(own)]
    rows = np.concatenate([own, others])
    return replace(documents.take(rows), truth=np.arange(len(rows)) < len(own))


def languages_part(reader: Reader, work: Path) -> None:
    sets = {}
    for split, most in (("train", DISCOVERY), ("test", TEST)):
        rows = rows_of_languages(work, split, most)
        sets[split] = read(reader, rows, [False] * len(rows))
    known = {lang: against_the_rest(sets["train"], lang, DISCOVERY) for lang in LANGUAGES}
    held = {lang: against_the_rest(sets["test"], lang, TEST) for lang in LANGUAGES}
    sizes = {len(part) // 2 for part in known.values()}, {len(part) // 2 for part in held.values()}
    say("\n## Languages: each of eight against the rest\n")
    say(f"Documents of each class: discovery {sorted(sizes[0])}, test {sorted(sizes[1])}.\n")

    methods: list[Method] = [
        *(RuleMethod(name_of({"top_k": k}), {"top_k": k}) for k in (1, 2, 5, 10, 32)),
        *rule_methods()[1:],
        *baselines(),
    ]
    cells = []
    for method in methods:
        pairs = []
        for lang in LANGUAGES:
            says = method.fit(known[lang]).score(held[lang]) > 0
            pairs.append((says, held[lang].truth))
        found = macro(pairs)
        each = [scored(*pair).f1 for pair in pairs]
        cells.append((method.name, *each, found.value, f"{found.low:.3f}-{found.high:.3f}"))
    layers = {lang: by_layer(known[lang], held[lang]) for lang in LANGUAGES}
    best = {lang: best_test_layer(rows) for lang, rows in layers.items()}
    mean_best = float(np.mean([row.test.f1 for row in best.values()]))
    of_best = (row.test.f1 for row in best.values())
    cells.insert(5, ("OR, 2 features, layer best on test", *of_best, mean_best, ""))
    say(Table.of(("F1 on test", *LANGUAGES, "mean", "95%"), cells).text())
    chosen = {lang: max(rows, key=lambda r: (r.d, -r.layer)).layer for lang, rows in layers.items()}
    say(f"\nLayer by largest d: {chosen}")
    say(f"Layer best on test: { ({lang: row.layer for lang, row in best.items()}) }")

    say("\nF1 with a part of the discovery data over F1 with all, mean over languages, 5 draws:")
    shares = (0.01, 0.05, 0.1, 0.5)
    for name, best_layer in (("layer best on test (as the paper)", True), ("largest d", False)):
        curves = [
            efficiency(known[lang], held[lang], shares=shares, best_layer=best_layer)
            for lang in LANGUAGES
        ]
        of_full = [float(np.mean([c[i].of_full for c in curves])) for i in range(len(shares))]
        said = ", ".join(f"{s:.0%}: {v:.1%}" for s, v in zip(shares, of_full, strict=True))
        say(f"  {name}: {said}")


def tone_rows(half: int, each: int, seed: str, seen: set[str]) -> list[dict[str, Any]]:
    """`each` new texts of every language and tone, from every second phrase starting at `half`."""
    found = []
    for lang, tone in TONES.items():
        phrases = {
            name: getattr(tone, name)[half::2]
            for name in ("polite", "rude", "polite_open", "rude_open", "polite_close", "rude_close")
        }
        rng = random.Random(f"{seed}/{lang}/{half}")
        with patch.dict(TONES, {lang: replace(tone, **phrases)}):
            for label in ("rude", "polite"):
                made = 0
                while made < each:
                    text = tone_text(rng, lang, label)
                    if text not in seen:
                        seen.add(text)
                        found.append({"text": text, "lang": lang, "label": label})
                        made += 1
    random.Random(seed).shuffle(found)
    return found


def tones_part(reader: Reader) -> None:
    seen: set[str] = set()
    rows = {
        "discovery": tone_rows(0, TONE_DISCOVERY, "discovery", seen),
        "test": tone_rows(0, TONE_TEST, "test", seen),
        "unseen": tone_rows(1, TONE_TEST, "unseen", seen),
    }
    sets = {
        name: read(reader, part, [row["label"] == "rude" for row in part])
        for name, part in rows.items()
    }
    at = At("precision", 0.9)
    for name, said in (
        ("test", "new texts of the phrases of the discovery set"),
        ("unseen", "texts whose phrases of tone the discovery set does not have"),
    ):
        say(f"\n## Rude or polite, six languages together: {said}\n")
        report = compare(sets["discovery"], sets[name], at=at, most_errors=6)
        say(report_text(report))
        say("\nThe OR rule over 2 features of every layer:")
        say(layer_table(by_layer(sets["discovery"], sets[name])))
    known = by_language(sets["discovery"])
    for name in ("test", "unseen"):
        held = by_language(sets[name])
        say(f"\nFitted on one language, used on another ({name}); always yes gives 0.667:")
        say(transfer_table(transfer(known, held)))
    say("\nOverlap of the languages' ten best features:")
    say(overlap_table(overlap(known)))
    say("\nLess discovery data, six languages together, layer best on test as in the paper:")
    say(efficiency_table(efficiency(sets["discovery"], sets["test"], best_layer=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default=None, help="folder of the corpus (build/mini)")
    parser.add_argument("--model", default="mini-qwen3", choices=list(SAES))
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = corpus.work_folder(arguments.work)
    if not (work / "corpus" / "test.jsonl").is_file():
        corpus.build(work)
    start = time.process_time()
    group = f"{arguments.model}/w1k-l0-16"
    say("Classification with features on a mini model.")
    say(f"{cpu_name()}; {group}, layers 0-7, first and extreme-norm tokens left out.")
    saes = [f"{group}/{layer}" for layer in range(8)]
    short = open_reader(source_of(arguments.model, saes, max_tokens=TOKENS))
    languages_part(short, work)
    tones_part(replace(short, source=source_of(arguments.model, saes)))
    say(f"\n(CPU time {time.process_time() - start:.0f} s)")
    arguments.out.write_text("\n".join(LINES) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
