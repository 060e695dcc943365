"""`qsl synth targets` and `describe`: which features are wanted, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    Word,
    add_labels,
    add_layer,
    add_layers,
    add_store,
    count,
    layer_list,
    output,
    read_labels,
    remark,
)
from qwen_scope_lens.cli.synth.generators import add_generator_arguments, agreed, prices, roles

__all__ = ["WORDS", "describe_word"]


def _targets_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "seed",
        metavar="SEED",
        type=Path,
        action=Input,
        check=inputs.store,
        help="store of the data to complete",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        action=Input,
        check=inputs.store,
        help="store of anchor data, texts of the task",
    )
    add_layers(parser, check=inputs.layers_in("seed"))
    parser.add_argument("--task", default="", help="in words, for judges and prompts")
    add_labels(parser, "a label pack: descriptions of features")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--match", metavar="REGEX", help="labels that match are relevant")
    how.add_argument("--judge", metavar="GENERATOR", help="openai:URL#MODEL or hf:MODEL")
    how.add_argument("--contrast", metavar="LABEL=VALUE", help="of the anchor documents")
    parser.add_argument(
        "--harmful",
        metavar="REGEX",
        help="labels that match express harm, other labels do not; else the judge says which",
    )
    parser.add_argument("--kind", default="", help="of features of which nothing says it: harmful")
    parser.add_argument("--least-score", type=float, help="of labels: their detection test")
    parser.add_argument("--least-relevance", type=float, default=0.5, help="tau (%(default)s)")
    parser.add_argument(
        "--threshold", type=float, default=0.0, help="an activation counts above it (%(default)s)"
    )
    parser.add_argument(
        "--weak-below",
        type=count,
        default=1,
        metavar="N",
        help="features on fewer seed documents than N are wanted too (%(default)s: missing ones)",
    )
    parser.add_argument(
        "--least-documents",
        type=count,
        default=1,
        metavar="N",
        help="of the anchor data, on which a target has to fire (%(default)s)",
    )
    parser.add_argument("--passages", type=count, default=5, help="kept a feature (%(default)s)")
    parser.add_argument("--templates", type=Path, help="folder of `qsl synth templates`")
    parser.add_argument("--out", type=output, required=True, help="targets.json")
    add_generator_arguments(parser)


def _targets(arguments: argparse.Namespace) -> None:
    """Find which features matter for a task, and which of them the seed data lacks.

        qsl synth targets seed_store/ --reference anchor_store/ --labels texts/labels.jsonl \\
            --match chinese --out labelled.json
        qsl synth targets seed_store/ --reference anchor_store/ --contrast lang=zh \\
            --out chinese.json
        qsl synth targets seed_store/ --reference anchor_store/ --out every.json
        # needs an endpoint that judges:
        qsl synth targets seed_store/ --reference anchor_store/ --labels texts/labels.jsonl \\
            --judge openai:http://localhost:8000/v1#NAME --task "safety fine-tuning" \\
            --out judged.json

    There are four ways to say what matters: a judge model (it is asked about every feature that has
    a label or fires in the anchor data), the labels alone, a contrast of labelled anchor documents,
    or none of these; then every feature of the anchor data is a target (FAC synthesis). A target
    that fires on no document of the seed data is missing.

    Where harmful and benign examples are to be written, each feature needs the kind that it
    expresses: from the judge, from --harmful REGEX over the labels, or from --kind for all.
    """
    from qwen_scope_lens.errors import BadPlan
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
    labels = read_labels(arguments.labels)
    judge = roles(arguments).open(arguments.judge) if arguments.judge else None
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


def _describe_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--targets",
        type=Path,
        action=Input,
        check=inputs.made_by("qsl synth targets", "qsl-targets"),
        help="features that targets.json wants",
    )
    add_layer(which, "one layer: its features are --features, or all that fire")
    parser.add_argument("--features", type=layer_list, help="such as 17,4031 or 0-99")
    parser.add_argument("--generator", required=True, help="openai:URL#MODEL or hf:MODEL")
    parser.add_argument("--scorer", help="who takes the test; else the generator")
    parser.add_argument("--templates", type=Path, help="folder of `qsl synth templates`")
    parser.add_argument("--out", type=output, required=True, help="labels.jsonl")
    add_generator_arguments(parser)


def _describe(arguments: argparse.Namespace) -> int:
    """Describe features from passages with a model, test the descriptions, write a label pack.

        # needs an endpoint that writes:
        %(prog)s store/ --layers 6 --features 423,431 --out labels.jsonl \\
            --generator openai:http://localhost:8000/v1#NAME
        %(prog)s store/ --targets targets.json --out labels.jsonl \\
            --generator openai:http://localhost:8000/v1#NAME --scorer hf:Qwen/Qwen3-8B

    The describer sees a feature's strongest passages and some weaker ones. The scorer sees only the
    description and has to tell passages in which the feature is active from others; the label's
    score is its balanced accuracy (0.5 is chance). What it may cost is said before the first call.
    After an interruption the same command continues, and pays for no answer twice.
    """
    from qwen_scope_lens.labels.describe import describe, expected_requests, plan
    from qwen_scope_lens.stores.store import FeatureStore
    from qwen_scope_lens.synth.find import features_to_describe
    from qwen_scope_lens.writers.ledger import Ledger
    from qwen_scope_lens.writers.price import price_of
    from qwen_scope_lens.writers.templates import Templates

    store = FeatureStore.open(arguments.store)
    refs = features_to_describe(store, arguments.targets, arguments.layer, arguments.features)
    who = roles(arguments)
    folder = arguments.out.with_name(f"{arguments.out.stem}.run")
    templates, writer = Templates(arguments.templates), who.open(arguments.generator)
    planned = plan(store, refs, templates=templates)
    with Ledger.open(folder, prices(arguments)) as ledger:
        requests = expected_requests(planned, templates)
        new = ledger.unanswered(writer.name, requests)
        price = price_of(new, prices(arguments), writer, len(requests) - len(new))
        if not agreed(arguments, price):
            return 1
        pack = describe(
            store,
            refs,
            writer,
            ledger,
            scorer=who.open(arguments.scorer) if arguments.scorer else None,
            templates=templates,
            planned=planned,
            progress=True,
        )
        print(ledger.limit_reached or "finished", ledger.spent, sep="\n")
    if not pack:
        remark("nothing is written: no feature was described")
        return 1
    pack.write(arguments.out)
    scores = [label.score for label in pack.values() if label.score is not None]
    print(f"{len(pack)} of {len(refs)} features described, {len(scores)} tested", end="")
    print(f", mean score {sum(scores) / len(scores):.3f}" if scores else "")
    print(f"labels: {arguments.out}")
    return 0


describe_word = Word("describe", _describe_arguments, _describe)
WORDS = (Word("targets", _targets_arguments, _targets), describe_word)
