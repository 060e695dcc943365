r"""Do new items add anything to a benchmark? Judged by the features it does not have yet.

    qsl bench screen bench/gsm8k new_items.jsonl
    qsl bench screen bench/gsm8k bench/new_items            # extracted before
    qsl bench screen bench/gsm8k new_items.jsonl --out useful.txt

"new" counts features that no item of the benchmark activates, "adds" the same after the candidates
above it; "usual" is the share of the benchmark's own items that add less. A file is read with the
benchmark's own prompt format and model, unless --column or --template says otherwise.
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
from qwen_scope_lens.cli.options import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", help="a benchmark of a suite, such as bench/gsm8k")
    parser.add_argument("items", help="a file of items, or the folder of an extracted benchmark")
    parser.add_argument("--out", type=output, help="write the keys of the items that add something")
    add_reading(parser)
    add_prompt_format(parser)


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.bench.prompts import PromptFormat
    from qwen_scope_lens.bench.screen import footprint_like, own_novelty, screen
    from qwen_scope_lens.bench.suite import open_benchmark
    from qwen_scope_lens.files import whole_file

    benchmark = open_benchmark(arguments.benchmark)
    how = prompt_format(arguments)
    own = benchmark.footprint(arguments.layer, arguments.position)
    candidates = footprint_like(
        benchmark, arguments.items, arguments.layer, arguments.position,
        None if how == PromptFormat() else how, say=say,
    )  # fmt: skip
    found = screen(own, candidates)
    show(
        ("item", "features", "new", "adds", "usual"),
        [(s.key, s.n_features, s.new, s.adds, s.percentile) for s in found],
        arguments.json,
    )
    useful = [s.key for s in found if s.useful]
    if not arguments.json:
        print(
            f"{len(useful)} of {len(found)} items add a feature. One more item of {own.name} itself"
            f" would add {own_novelty(own).mean():.2f}"
        )
    if arguments.out is not None:
        with whole_file(arguments.out) as partial:
            partial.write_text("".join(f"{key}\n" for key in useful), encoding="utf-8")
    return 0
