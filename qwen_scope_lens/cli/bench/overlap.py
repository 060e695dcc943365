"""How much of each benchmark the others cover: equations 10 and 11, every ordered pair.

    qsl bench overlap bench/
    qsl bench overlap bench/ --first gsm8k

"ceiling" is what a random half of the first benchmark covers of its other half. "at equal size" is
the expected overlap of equally many items of each (as many as the smallest benchmark has), "by
chance" the overlap if the second one's features were drawn by lot from the dictionary.
"""

from __future__ import annotations

import argparse

from qwen_scope_lens.cli.bench.options import add_reading, say, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", help="the folder that `qsl bench extract` filled")
    parser.add_argument("--first", help="only pairs of this benchmark with the others")
    add_reading(parser)


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.bench.footprint import saturated
    from qwen_scope_lens.bench.overlap import ceiling, overlaps
    from qwen_scope_lens.bench.suite import open_suite

    suite = open_suite(arguments.suite)
    if arguments.first is not None:
        suite[arguments.first]
    footprints = suite.footprints(arguments.layer, arguments.position)
    for line in saturated(footprints):
        say(line)
    top = {f.name: ceiling(f).overlap.value for f in footprints}
    rows = [r for r in overlaps(footprints) if arguments.first in (None, r.first)]
    show(
        ("of", "by", "shared", "overlap", "min-normalised", "ceiling", "at equal size",
         "by chance"),
        [(r.first, r.second, r.shared, str(r.overlap), str(r.overlap_min), top[r.first], r.equal,
          r.chance) for r in rows],
        arguments.json,
    )  # fmt: skip
    return 0
