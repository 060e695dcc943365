"""How much of each benchmark repeats itself: the proxy R-hat and the coverage curve's area.

    qsl bench redundancy bench/
    qsl bench redundancy bench/ --layer 12 --position any --json

Most redundant first. R-hat (equation 9) grows with the number of items; the column "at equal size"
cuts every benchmark to the smallest one's. Brackets hold 95% by bootstrap over the items.
"""

from __future__ import annotations

import argparse

from qwen_scope_lens.cli.bench.options import add_reading, say, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", help="the folder that `qsl bench extract` filled")
    add_reading(parser)


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.bench.coverage import redundancy, redundancy_at
    from qwen_scope_lens.bench.footprint import saturated
    from qwen_scope_lens.bench.suite import open_suite

    footprints = open_suite(arguments.suite).footprints(arguments.layer, arguments.position)
    for line in saturated(footprints):
        say(line)
    size = min(len(f) for f in footprints)
    found = [(redundancy(f), redundancy_at(f, size)) for f in footprints]
    found.sort(key=lambda pair: -pair[0].r_hat.value)
    show(
        ("benchmark", "items", "features", "AUC", "R-hat", f"R-hat of {size:,}", "half at",
         "new a further item"),
        [(r.name, r.n_items, r.n_features, str(r.auc), str(r.r_hat), at, r.half, r.new_per_item)
         for r, at in found],
        arguments.json,
    )  # fmt: skip
    return 0
