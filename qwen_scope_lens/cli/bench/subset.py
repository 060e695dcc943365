"""The smallest subset of a benchmark that keeps a share of its footprint, by lazy greedy.

    qsl bench subset bench/gsm8k --coverage 0.95
    qsl bench subset bench/gsm8k --coverage 0.95 --out keys.txt

Prints how many items it takes, how few any subset could do it with, and what random subsets of
equal size cover. With --out the chosen items' keys are written, one a line, best first.
"""

from __future__ import annotations

import argparse

from qwen_scope_lens.cli.bench.options import add_reading, show
from qwen_scope_lens.cli.options import output, share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", help="a benchmark of a suite, such as bench/gsm8k")
    parser.add_argument("--coverage", type=share, default=0.95, help="default: %(default)s")
    parser.add_argument("--out", type=output, help="write the keys of the chosen items here")
    add_reading(parser)


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.bench.subset import choose
    from qwen_scope_lens.bench.suite import open_benchmark
    from qwen_scope_lens.files import whole_file

    footprint = open_benchmark(arguments.benchmark).footprint(arguments.layer, arguments.position)
    found = choose(footprint, arguments.coverage)
    if arguments.json:
        rows = [
            (footprint.keys[i], c)
            for i, c in zip(found.chosen, found.coverage.tolist(), strict=True)
        ]
        show(("key", "coverage"), rows, as_json=True)
    else:
        print(found)
    if arguments.out is not None:
        keys = [footprint.keys[i] for i in found.chosen]
        with whole_file(arguments.out) as partial:
            partial.write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")
    return 0
