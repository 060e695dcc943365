"""What was kept, why the rest was not, and how coverage grew; also of a run that is going on.

qsl synth report data.jsonl --targets targets.json
qsl synth report data.jsonl --targets targets.json --html report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_scope_lens.cli.options import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", type=Path, help="of `qsl synth run`")
    parser.add_argument("--targets", type=Path, required=True, help="that the run was made with")
    parser.add_argument("--html", type=output, help="write a page with the curve, too")


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.synth.report import make_report
    from qwen_scope_lens.synth.targets import TargetSet

    report = make_report(arguments.data, TargetSet.load(arguments.targets))
    print(report)
    if arguments.html:
        report.page().save(arguments.html)
        print(f"\npage: {arguments.html}")
    return 0
