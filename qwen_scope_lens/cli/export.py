"""A plan for another runtime: a llama.cpp control vector (.gguf) or plain vectors (.safetensors).

    qsl export --edit mini-qwen3/w1k-l0-16/6/423:add:40@first --out chinese.gguf
    qsl export --edit mini-qwen3/w1k-l0-16/6/423:add:40 --out vectors.safetensors
    # needs llama.cpp, and a plan of your own:
    llama-cli -m model.gguf --control-vector chinese.gguf -p "The package manager"
    qsl export --plan plan.json --out vectors.safetensors

Both formats hold one vector per layer, which is added there, so only `add` edits in raw or typical
units can be exported. llama.cpp adds its vector at every token, including the first: edits have to
say so with `@first`.
"""

from __future__ import annotations

import argparse

from qwen_scope_lens.cli import plan_options as plans
from qwen_scope_lens.cli.options import output, remark
from qwen_scope_lens.extras import check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    plans.add_plan(parser)
    parser.add_argument("--out", type=output, required=True, help="ends with .gguf or .safetensors")


def run(arguments: argparse.Namespace) -> int:
    if arguments.out.suffix == ".gguf":
        check("gguf", "gguf")
    plan = plans.plan_of(arguments)
    plans.notices(ref.sae for ref in plan.refs)

    from qwen_scope_lens.steering.runtimes.control_vectors import export

    print(export(plan, arguments.out))
    remark(f"a vector for each of the layers {', '.join(map(str, plan.layers))}")
    return 0
