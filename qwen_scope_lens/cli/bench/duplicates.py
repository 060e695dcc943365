"""Near-duplicates between two benchmarks, or within one, by the features of the whole prompt.

    qsl bench duplicates bench/gsm8k bench/math
    qsl bench duplicates bench/gsm8k                     # within one
    qsl bench duplicates bench/gsm8k bench/math --similarity 0.8

Similarity is Jaccard's, of the sets of active features. "usual" is how near the nearest neighbour
within the first benchmark is for all but 1% of its items: below it, pairs are no news.
"""

from __future__ import annotations

import argparse

from qwen_scope_lens.cli.bench.options import add_reading, show
from qwen_scope_lens.cli.options import share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", help="a benchmark of a suite, such as bench/gsm8k")
    parser.add_argument("second", nargs="?", help="another; without it, within the first")
    parser.add_argument("--similarity", type=share, default=0.9, help="default: %(default)s")
    add_reading(parser, position="any")


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.bench.contamination import (
        MOST_PAIRS,
        near_duplicates,
        usual_nearness,
    )
    from qwen_scope_lens.bench.suite import open_benchmark

    first = open_benchmark(arguments.first).footprint(arguments.layer, arguments.position)
    second = first
    if arguments.second is not None:
        second = open_benchmark(arguments.second).footprint(arguments.layer, arguments.position)
    pairs = near_duplicates(first, second, arguments.similarity)
    rows = [(p.first, p.second, p.jaccard) for p in pairs]
    show((first.name, second.name, "similarity"), rows, arguments.json)
    if not arguments.json:
        which = "the nearest " if len(pairs) == MOST_PAIRS else ""
        print(
            f"{which}{len(pairs):,} pairs with a similarity of at least {arguments.similarity}."
            f" Usual within {first.name}: {usual_nearness(first):.3f}"
        )
    return 0
