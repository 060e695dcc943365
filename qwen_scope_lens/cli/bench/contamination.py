"""How much of a benchmark a training set contains.

    qsl bench contamination bench/gsm8k train.jsonl --column text
    qsl bench contamination bench/gsm8k train_store/        # of `qsl extract`

Two answers. Items: which have a near-duplicate in the training set (Jaccard similarity of the
features of the whole text; meant for training sets of items about as long as the benchmark's). As a
whole: how much of the benchmark's footprint the training set covers, beside what half of the
benchmark covers of its own other half. Neither proves that a model saw an item.
"""

from __future__ import annotations

import argparse

from qwen_scope_lens.cli.bench.options import (
    add_prompt_format,
    add_reading,
    prompt_format,
    say,
    show,
)
from qwen_scope_lens.cli.options import share

SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", help="a benchmark of a suite, such as bench/gsm8k")
    parser.add_argument("training", help="a file of texts, or the folder of a feature store")
    parser.add_argument("--similarity", type=share, default=0.9, help="default: %(default)s")
    add_reading(parser, position="any")
    add_prompt_format(parser)


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.bench.contamination import contamination
    from qwen_scope_lens.bench.screen import footprint_like
    from qwen_scope_lens.bench.suite import open_benchmark

    benchmark = open_benchmark(arguments.benchmark)
    training = footprint_like(
        benchmark, arguments.training, arguments.layer, arguments.position,
        prompt_format(arguments), say=say,
    )  # fmt: skip
    own = benchmark.footprint(arguments.layer, arguments.position)
    found = contamination(own, training, arguments.similarity)
    pairs = found.contained if arguments.json else found.contained[:SHOWN]
    show(
        (found.benchmark, found.training, "similarity"),
        [(p.first, p.second, p.jaccard) for p in pairs],
        arguments.json,
    )
    if not arguments.json:
        if len(found.contained) > SHOWN:
            print(f"... and {len(found.contained) - SHOWN} more (--json prints all)")
        print(
            f"{len(found.contained)} of {found.n_items} items ({found.share:.1%}) have a"
            f" near-duplicate in {found.training} (similarity from {found.threshold}; usual within"
            f" {found.benchmark}: {found.usual:.3f})\n"
            f"footprint covered by {found.training}: {found.overlap.overlap}; by half of itself:"
            f" {found.ceiling.overlap}"
        )
    return 0
