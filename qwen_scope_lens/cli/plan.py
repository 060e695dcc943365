"""A plan from a ranking: the same edit on each of its best features, for `--plan` of other verbs.

    qsl plan zh.json --edit add:-1typical --top 9 --store store/ --out less-chinese.json
    qsl plan zh.json --edit ablate --top 3
    qsl steer "安装程序" --plan less-chinese.json --compare

FILE is what `qsl rank --out` wrote. What `qsl blame --json` and other verbs print with --json will
do, too, where its rows have the addresses of features. --edit is OP[:STRENGTH][@WHERE], as in
`qsl steer --help`. A strength in `typical` needs the typical activations, from the store that was
ranked (--store) or from `qsl calibrate` (--calibration).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli import plan_options as plans
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import add_json, count, output, print_json, remark


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "features",
        type=Path,
        metavar="FILE",
        action=Input,
        check=inputs.features,
        help="a file of `qsl rank`, or JSON of another verb",
    )
    parser.add_argument(
        "--edit",
        required=True,
        metavar="OP[:STRENGTH][@WHERE]",
        help="such as add:-1typical, ablate, or set:40@generation",
    )
    parser.add_argument("--top", type=count, help="the first so many features; default: all")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--store",
        type=Path,
        action=Input,
        check=inputs.store,
        help="a feature store, from `qsl extract`, for strengths in typical",
    )
    plans.add_calibration(source)
    parser.add_argument("--out", type=output, metavar="PLAN.json", help="write the plan")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.errors import BadPlan
    from qwen_scope_lens.steering.plan import FORMAT, VERSION, Edit
    from qwen_scope_lens.steering.plan_for import plan_for, read_features

    refs = read_features(arguments.features)
    like = Edit.parse(f"{refs[0]}:{arguments.edit}")
    if like.unit == "typical" and not (arguments.store or arguments.calibration):
        raise BadPlan(
            f"{arguments.edit} needs the features' typical activations: give --store with the"
            " store that was ranked, or --calibration with a file of `qsl calibrate`"
        )
    plan = plan_for(refs, like.op, like.strength, like.unit, like.where, top=arguments.top)
    if arguments.store:
        from qwen_scope_lens.steering.calibrate import calibrate_from_store
        from qwen_scope_lens.stores.store import FeatureStore

        store = FeatureStore.open(arguments.store)
        plan = plan.calibrated(calibrate_from_store(store, plan.refs))
    else:
        plan = plans.calibrated(plan, arguments)
    if arguments.json:  # the same as in the file
        print_json(FORMAT, plan.to_dict(), VERSION)
    else:
        print(plan.table())
    if arguments.out:
        plan.save(arguments.out)
        remark(f"written: {arguments.out}")
    return 0
