"""`qsl bench redundancy`, `overlap`, `subset` and `report`: a suite of benchmarks as it is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    Word,
    add_json,
    add_layer,
    output,
    remark,
    share,
    show,
)
from qwen_scope_lens.errors import BadFile

if TYPE_CHECKING:
    from qwen_scope_lens.bench.footprint import Footprint

__all__ = ["WORDS", "add_benchmark", "add_position", "write_keys"]


def add_benchmark(
    parser: argparse.ArgumentParser,
    name: str,
    help: str = "a benchmark of a suite, such as bench/gsm8k",
    **options: Any,
) -> None:
    parser.add_argument(name, action=Input, check=inputs.store, help=help, **options)


def _add_suite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "suite", action=Input, check=_suite, help="the folder that `qsl bench extract` wrote"
    )


def _suite(folder: str, _: argparse.Namespace) -> None:
    if not any(Path(folder).expanduser().glob("*.benchmark.json")):
        raise BadFile(
            f"{folder} does not hold benchmarks: make them with `qsl bench extract FILE... --out"
            f" {folder}`"
        )


def add_position(parser: argparse.ArgumentParser, position: str = "last") -> None:
    """Where in the stores to read."""
    add_layer(parser, "one layer; default: the last one that was extracted", check=inputs.unchecked)
    parser.add_argument(
        "--position",
        default=position,
        help="which token of the prompt: last, -2, -3, ... or any (default: %(default)s)",
    )


def write_keys(path: Path, keys: Sequence[str]) -> None:
    from qwen_scope_lens.files import whole_file

    with whole_file(path) as partial:
        partial.write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")


def _footprints(arguments: argparse.Namespace) -> list[Footprint]:
    from qwen_scope_lens.bench.footprint import saturated
    from qwen_scope_lens.bench.suite import open_suite

    suite = open_suite(arguments.suite)
    if getattr(arguments, "first", None) is not None:
        _ = suite[arguments.first]  # an unknown name is refused before the stores are read
    footprints = suite.footprints(arguments.layer, arguments.position)
    for line in saturated(footprints):
        remark(line)
    return list(footprints)


def _redundancy_arguments(parser: argparse.ArgumentParser) -> None:
    _add_suite(parser)
    add_position(parser)
    add_json(parser)


def _redundancy(arguments: argparse.Namespace) -> None:
    """How much of each benchmark repeats itself: the proxy R-hat and the coverage curve's area.

        qsl bench redundancy bench/
        qsl bench redundancy bench/ --layers 6 --position any --json

    The most redundant benchmark comes first. R-hat (equation 9) grows with the number of items; the
    column "R-hat of N" cuts every benchmark to the N items of the smallest one. Brackets are 95%
    intervals, by bootstrap over the items.
    """
    from qwen_scope_lens.bench.coverage import redundancy, redundancy_at
    from qwen_scope_lens.tables import Table

    footprints = _footprints(arguments)
    size = min(len(f) for f in footprints)
    found = [(redundancy(f), redundancy_at(f, size)) for f in footprints]
    found.sort(key=lambda pair: -pair[0].r_hat.value)
    columns = (
        "benchmark",
        "items",
        "features",
        "AUC",
        "R-hat",
        f"R-hat of {size:,}",
        "half at",
        "new per further item",
    )
    rows = [
        (r.name, r.n_items, r.n_features, str(r.auc), str(r.r_hat), at, r.half, r.new_per_item)
        for r, at in found
    ]
    show(Table.of(columns, rows), arguments.json)


def _overlap_arguments(parser: argparse.ArgumentParser) -> None:
    _add_suite(parser)
    parser.add_argument("--first", help="only pairs of this benchmark with the others")
    add_position(parser)
    add_json(parser)


def _overlap(arguments: argparse.Namespace) -> None:
    """How much of each benchmark the others cover: equations 10 and 11, every ordered pair.

        qsl bench overlap bench/
        qsl bench overlap bench/ --first sums

    "ceiling" is what a random half of the first benchmark covers of its other half. "at equal size"
    is the expected overlap of equally many items of each (as many as the smallest benchmark has).
    "by chance" is the overlap if the second benchmark's features were drawn by lot from the SAE.
    """
    from qwen_scope_lens.bench.overlap import ceiling, overlaps
    from qwen_scope_lens.tables import Table

    footprints = _footprints(arguments)
    top = {f.name: ceiling(f).overlap.value for f in footprints}
    columns = (
        "of",
        "by",
        "shared",
        "overlap",
        "min-normalised",
        "ceiling",
        "at equal size",
        "by chance",
    )
    rows = [
        (
            r.first,
            r.second,
            r.shared,
            str(r.overlap),
            str(r.overlap_min),
            top[r.first],
            r.equal,
            r.chance,
        )
        for r in overlaps(footprints)
        if arguments.first in (None, r.first)
    ]
    show(Table.of(columns, rows), arguments.json)


def _subset_arguments(parser: argparse.ArgumentParser) -> None:
    add_benchmark(parser, "benchmark")
    parser.add_argument("--coverage", type=share, default=0.95, help="default: %(default)s")
    parser.add_argument("--out", type=output, help="write the keys of the chosen items here")
    add_position(parser)
    add_json(parser)


def _subset(arguments: argparse.Namespace) -> None:
    """The smallest subset of a benchmark that keeps a share of its footprint, by lazy greedy.

        qsl bench subset bench/sums --coverage 0.95
        qsl bench subset bench/sums --coverage 0.95 --out keys.txt

    Prints how many items the subset has, the fewest that any subset could have, and what random
    subsets of equal size cover. --out gets the keys of the chosen items, one per line, best first.
    """
    from qwen_scope_lens.bench.subset import choose
    from qwen_scope_lens.bench.suite import open_benchmark
    from qwen_scope_lens.tables import Table

    footprint = open_benchmark(arguments.benchmark).footprint(arguments.layer, arguments.position)
    found = choose(footprint, arguments.coverage)
    keys = [footprint.keys[i] for i in found.chosen]
    if arguments.json:
        rows = zip(keys, found.coverage.tolist(), strict=True)
        show(Table.of(("key", "coverage"), rows), arguments.json)
    else:
        print(found)
    if arguments.out is not None:
        write_keys(arguments.out, keys)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    _add_suite(parser)
    parser.add_argument("--out", type=output, required=True, help="an HTML file")
    parser.add_argument(
        "--scores",
        type=Path,
        action=Input,
        check=inputs.file_or_folder,
        help="CSV, JSONL, Parquet, JSON, or a folder of lm-eval's samples",
    )
    parser.add_argument("--control", help="the benchmark to take out (equation 12)")
    add_position(parser)


def _report(arguments: argparse.Namespace) -> None:
    """The findings on a suite as one self-contained page, with JSON and CSV beside it.

        qsl bench report bench/ --out report.html
        # needs results of models:
        qsl bench report bench/ --scores models_by_benchmark.csv --control mmlu --out report.html

    --scores is a table with the column `model` and one column of scores per benchmark, or with the
    columns model, benchmark, item, correct (one row per result, which gives the ground truth of
    redundancy, too), or a JSON file {model: {item: right or wrong}}, or the folder that lm-eval
    filled with --log_samples. --control names the broad benchmark that is taken out of the
    similarity of scores; it may be a column of the table only, or also a benchmark of the suite.
    """
    from qwen_scope_lens.bench.analysis import analyse
    from qwen_scope_lens.bench.panel_files import read_panel
    from qwen_scope_lens.bench.report import save_report
    from qwen_scope_lens.bench.suite import open_suite

    suite = open_suite(arguments.suite)
    scores = None
    if arguments.scores is not None:
        scores = read_panel(arguments.scores, suite.keys(), say=remark)
    found = analyse(
        suite,
        arguments.layer,
        arguments.position,
        scores,
        arguments.control,
        say=remark,
    )
    for path in save_report(found, arguments.out):
        print(path)


WORDS = (
    Word("redundancy", _redundancy_arguments, _redundancy),
    Word("overlap", _overlap_arguments, _overlap),
    Word("subset", _subset_arguments, _subset),
    Word("report", _report_arguments, _report),
)
