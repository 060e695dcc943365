"""Standard benchmarks of a steered model, with lm-eval.

    # needs the hub:
    qsl lm-eval --model Qwen/Qwen3-8B-Base --tasks hellaswag --limit 200 \\
        --edit qwen3-8b-base/w64k-l0-50/20/6159:ablate

Edits may have several features and layers at once, and every operation of `qsl steer`. --plain runs
the unsteered model on the same tasks first. --include-path is a folder with tasks of your own
(YAML).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwen_scope_lens.cli import plan_options as plans
from qwen_scope_lens.cli.options import (
    add_json,
    add_model,
    count,
    from_zero,
    output,
    remark,
    show,
)
from qwen_scope_lens.extras import check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", required=True, help="names, joined by commas")
    add_model(parser, "a folder, or a name on the hub", required=True)
    plans.add_plan(parser)
    plans.add_allowance(parser)
    parser.add_argument("--plain", action="store_true", help="the unsteered model as well")
    parser.add_argument("--limit", type=count, help="requests per task")
    parser.add_argument("--num-fewshot", type=from_zero)
    parser.add_argument("--batch-size", type=count, default=8, help="default: %(default)s")
    parser.add_argument("--include-path", type=Path, help="a folder with tasks of your own")
    parser.add_argument("--out", type=output, metavar="FILE", help="write the results as JSON")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    check("lm_eval", "lm-eval")

    plan = plans.plan_of(arguments)

    from qwen_scope_lens.files import whole_file
    from qwen_scope_lens.steering.runtimes.lm_eval_model import evaluate
    from qwen_scope_lens.tables import Table

    plans.notices(ref.sae for ref in plan.refs)
    groups = dict.fromkeys(ref.sae.row for ref in plan.refs)
    plans.remarks(arguments.model, groups, arguments.allow_other_model)
    results = {}
    for name, one in {"unsteered": None, "steered": plan}.items():
        if one is None and not arguments.plain:
            continue
        found = evaluate(
            arguments.model,
            one,
            arguments.tasks.split(","),
            limit=arguments.limit,
            num_fewshot=arguments.num_fewshot,
            batch_size=arguments.batch_size,
            include_path=arguments.include_path,
            device=arguments.device,
            allow_other_model=arguments.allow_other_model,
        )
        results[name] = found["results"]
    rows = [
        (name, task, metric, value)
        for name, tasks in results.items()
        for task, numbers in tasks.items()
        for metric, value in numbers.items()
        if isinstance(value, float)
    ]
    show(Table.of(("model", "task", "metric", "value"), rows), arguments.json)
    remark(f"\n{plan}")
    if arguments.out:
        with whole_file(arguments.out) as partial:
            text = json.dumps({"plan": plan.to_dict(), "results": results}, default=str, indent=1)
            partial.write_text(text, encoding="utf-8")
    return 0
