"""The findings on a suite as one self-contained page, with JSON and CSV beside it.

    qsl bench report bench/ --out report.html
    qsl bench report bench/ --scores models_by_benchmark.csv --control mmlu --out report.html

--scores is a table with the column `model` and one column of scores per benchmark, or with the
columns model, benchmark, item, correct (one row per result; gives the ground truth of redundancy
too). --control names the broad benchmark that is taken out of the similarity of scores; it may
stand in the table only, or also in the suite.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_scope_lens.cli.bench.options import say
from qwen_scope_lens.cli.options import from_zero, output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", help="the folder that `qsl bench extract` filled")
    parser.add_argument("--out", type=output, required=True, help="an HTML file")
    parser.add_argument("--scores", type=Path, help="CSV, JSONL or Parquet")
    parser.add_argument("--control", help="the benchmark to take out (equation 12)")
    parser.add_argument("--layer", type=from_zero, help="default: the last one extracted")
    parser.add_argument("--position", default="last", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.bench.analysis import analyse
    from qwen_scope_lens.bench.panel import read_scores
    from qwen_scope_lens.bench.report import save_report
    from qwen_scope_lens.bench.suite import open_suite

    found = analyse(
        open_suite(arguments.suite),
        arguments.layer,
        arguments.position,
        None if arguments.scores is None else read_scores(arguments.scores),
        arguments.control,
        say=say,
    )
    for path in save_report(found, arguments.out):
        print(path)
    return 0
