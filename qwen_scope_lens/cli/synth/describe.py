"""Describe features from passages with a model, test the descriptions, write a label pack.

    qsl synth describe store/ --layer 20 --features 17,4031 --generator openai:URL#MODEL \\
        --out labels.jsonl
    qsl synth describe store/ --targets targets.json --generator ... --scorer ... --out labels.jsonl

The describer sees a feature's strongest passages and some weaker ones. The scorer sees only the
description and has to tell passages in which the feature is active from others; the label's score
is its balanced accuracy (0.5 is chance). Killed, the same command continues and pays no answer
twice.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_scope_lens.cli.options import from_zero, layer_list, output
from qwen_scope_lens.cli.synth.generators import add_generator_arguments, prices, roles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", type=Path, help="of `qsl extract`")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--targets", type=Path, help="features that targets.json wants")
    which.add_argument("--layer", type=from_zero, help="with --features, or all that fire in it")
    parser.add_argument("--features", type=layer_list, help="such as 17,4031 or 0-99")
    parser.add_argument("--generator", required=True, help="openai:URL#MODEL or hf:MODEL")
    parser.add_argument("--scorer", help="who takes the test; else the generator")
    parser.add_argument("--templates", type=Path, help="folder of `qsl synth templates`")
    parser.add_argument("--out", type=output, required=True, help="labels.jsonl")
    add_generator_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.labels.describe import describe
    from qwen_scope_lens.models.load import load_model
    from qwen_scope_lens.stores.store import FeatureStore
    from qwen_scope_lens.synth.find import features_to_describe
    from qwen_scope_lens.writers.ledger import Ledger
    from qwen_scope_lens.writers.templates import Templates

    store = FeatureStore.open(arguments.store)
    refs = features_to_describe(store, arguments.targets, arguments.layer, arguments.features)
    who = roles(arguments, load_model)
    folder = arguments.out.with_name(f"{arguments.out.stem}.run")
    with Ledger.open(folder, prices(arguments)) as ledger:
        pack = describe(
            store,
            refs,
            who.open(arguments.generator),
            ledger,
            scorer=who.open(arguments.scorer) if arguments.scorer else None,
            templates=Templates(arguments.templates),
            progress=True,
        )
        print(ledger.limit_reached or "finished", ledger.spent, sep="\n")
    pack.write(arguments.out)
    scores = [label.score for label in pack.values() if label.score is not None]
    print(f"{len(pack)} of {len(refs)} features described, {len(scores)} tested", end="")
    print(f", mean score {sum(scores) / len(scores):.3f}" if scores else "")
    print(f"labels: {arguments.out}")
    return 0
