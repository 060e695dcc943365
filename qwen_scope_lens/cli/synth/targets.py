"""Which features matter for a task, and which of them the seed data lacks.

    qsl synth targets seed_store/ --reference anchor_store/ --labels labels.jsonl --match toxic \\
        --out targets.json
    qsl synth targets seed_store/ --reference anchor_store/ --labels labels.jsonl \\
        --judge openai:http://localhost:8000/v1#NAME --task "safety fine-tuning" --out targets.json
    qsl synth targets seed_store/ --reference anchor_store/ --contrast lang=zh --out targets.json
    qsl synth targets seed_store/ --reference anchor_store/ --out targets.json

What matters is said by a judge model (asked about each feature with a label or that fires in the
anchor data), by the labels alone, by a contrast of labelled anchor documents, or by nothing: then
every feature of the anchor data is a target (FAC synthesis). A target that fires on no document of
the seed data is missing.

Where harmful and benign examples are to be written, each feature needs the kind that it expresses:
the judge says it, or --harmful REGEX of the labels, or --kind for all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_scope_lens.cli.options import count, layer_list, output
from qwen_scope_lens.cli.synth.generators import add_generator_arguments, prices, roles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("seed", metavar="SEED", type=Path, help="store of the data to complete")
    parser.add_argument("--reference", type=Path, help="store of anchor data, texts of the task")
    parser.add_argument("--layers", type=layer_list, help="such as 12,20; else all in the store")
    parser.add_argument("--task", default="", help="in words, for judges and prompts")
    parser.add_argument("--labels", type=Path, help="a label pack: descriptions of features")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--match", metavar="REGEX", help="labels that match are relevant")
    how.add_argument("--judge", metavar="GENERATOR", help="openai:URL#MODEL or hf:MODEL")
    how.add_argument("--contrast", metavar="LABEL=VALUE", help="of the anchor documents")
    parser.add_argument(
        "--harmful", metavar="REGEX",
        help="labels that match express harm, other labels do not; else the judge says which",
    )  # fmt: skip
    parser.add_argument("--kind", default="", help="of features of which nothing says it: harmful")
    parser.add_argument("--least-score", type=float, help="of labels: their detection test")
    parser.add_argument("--least-relevance", type=float, default=0.5, help="tau (%(default)s)")
    parser.add_argument(
        "--threshold", type=float, default=0.0, help="an activation counts above it (%(default)s)"
    )
    parser.add_argument(
        "--weak-below", type=count, default=1, metavar="N",
        help="features on fewer seed documents than N are wanted too (%(default)s: missing ones)",
    )  # fmt: skip
    parser.add_argument(
        "--least-documents", type=count, default=1, metavar="N",
        help="of the anchor data, on which a target has to fire (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--passages", type=count, default=5, help="kept a feature (%(default)s)")
    parser.add_argument("--templates", type=Path, help="folder of `qsl synth templates`")
    parser.add_argument("--out", type=output, required=True, help="targets.json")
    add_generator_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.errors import BadPlan
    from qwen_scope_lens.labels.packs import LabelPack
    from qwen_scope_lens.models.load import load_model
    from qwen_scope_lens.stores.store import FeatureStore
    from qwen_scope_lens.synth.find import find_targets
    from qwen_scope_lens.synth.judgements import (
        choose_relevance,
        kinds_by_judge,
        kinds_by_labels,
        with_kinds,
    )
    from qwen_scope_lens.writers.ledger import Ledger
    from qwen_scope_lens.writers.templates import Templates

    ledger = arguments.out.with_name(f"{arguments.out.stem}.run")
    seed = FeatureStore.open(arguments.seed)
    reference = FeatureStore.open(arguments.reference) if arguments.reference else None
    labels = LabelPack.read(arguments.labels) if arguments.labels else None
    judge = roles(arguments, load_model).open(arguments.judge) if arguments.judge else None
    relevance = choose_relevance(
        reference,
        labels,
        match=arguments.match,
        contrast=arguments.contrast,
        judge=judge,
        task=arguments.task,
        least_score=arguments.least_score,
        templates=arguments.templates,
        ledger=ledger,
        prices=prices(arguments),
        layers=arguments.layers or seed.layers,
        passages=arguments.passages,
    )
    targets = find_targets(
        seed,
        reference,
        relevance=relevance,
        least_relevance=arguments.least_relevance,
        threshold=arguments.threshold,
        weak_below=arguments.weak_below,
        least_documents=arguments.least_documents,
        layers=arguments.layers,
        labels=labels,
        task=arguments.task,
        passages=arguments.passages,
    )
    kinds = {}
    if arguments.harmful is not None:
        if labels is None:
            raise BadPlan("--harmful looks into labels: give --labels")
        kinds = kinds_by_labels(labels, arguments.harmful)
    targets = with_kinds(targets, kinds)
    if judge is not None:
        with Ledger.open(ledger, prices(arguments)) as book:
            templates = Templates(arguments.templates)
            targets = with_kinds(targets, kinds_by_judge(targets, judge, book, templates))
    targets = with_kinds(targets, rest=arguments.kind)
    targets.save(arguments.out)
    print(targets)
    return 0
