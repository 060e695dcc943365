"""Generate with features amplified, set, capped or removed; --compare shows both texts.

    qsl steer "安装程序" --edit mini-qwen3/w1k-l0-16/6/423:ablate --compare
    # needs the hub, and typical.json of `qsl calibrate`:
    qsl steer "Tell me about tea." --model Qwen/Qwen3-8B --chat --compare \\
        --edit qwen3-8b-base/w64k-l0-50/20/6159:add:-2typical@generation \\
        --calibration typical.json

An edit is REF:OP[:STRENGTH][@WHERE]. OP: add, set (or clamp), scale, ablate, floor, cap,
project_out. STRENGTH: 4 (in activations), +2typical (twice the feature's typical activation),
-0.1norm (fraction of the residual's length). WHERE, joined by commas: prompt, generation,
pos=3-8+-1, class=han, role=user, token=42, first, think=inside (or after), gate=G/12/345>3.5 (once
that feature has fired so strongly); default: everything but the first token.
The text comes from standard input when it is `-`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import Any

from qwen_scope_lens.cli import plan_options as plans
from qwen_scope_lens.cli.options import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", help="the prompt; - for standard input")
    plans.add_model(parser)
    plans.add_plan(parser)
    plans.add_sampling(parser, new_tokens=100)
    parser.add_argument("--compare", action="store_true", help="with the unsteered text beside it")
    parser.add_argument("--save-plan", type=output, metavar="FILE", help="write the edits as JSON")


def run(arguments: argparse.Namespace) -> int:
    plan = plans.plan_of(arguments)
    saes = [ref.sae for ref in plan.refs]
    plans.notices(saes)
    if arguments.save_plan:
        plan.save(arguments.save_plan)
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    prompt = plans.as_prompt(arguments, text)
    enable_thinking = plans.thinking(arguments, [prompt])
    plans.model_of(arguments, [sae.row for sae in saes])
    sampling = plans.sampling_of(arguments)
    model = plans.load(arguments, saes)

    from qwen_scope_lens.steering.side_by_side import stream

    report = stream(
        model,
        prompt,
        plan,
        sampling,
        _write,
        compare=arguments.compare,
        width=shutil.get_terminal_size((100, 24)).columns,
        enable_thinking=enable_thinking,
        allow_other_model=True,  # `plans.load` has looked
    )
    print(f"\n{report}", file=sys.stderr)
    return 0


def _write(text: str) -> Any:
    print(text, end="", flush=True)
