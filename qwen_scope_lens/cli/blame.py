"""From a bad reply to the features behind it: strong on the reply and not elsewhere.

    qsl blame mini-qwen3/w1k-l0-16/6 --prompt "How do I install it?" --class han \\
        --reply "Use the package manager 安装程序 and restart."
    qsl blame mini-qwen3/w1k-l0-16/5 mini-qwen3/w1k-l0-16/6 --cases texts/replies.jsonl

A file of cases has one per line: {"prompt": ..., "reply": ..., "bad": true}, or `messages` instead
of `prompt`. The bad replies are compared with those that have "bad": false, and with all prompts.
With --class only the tokens of that class in the bad replies count as bad. The last lines are what
to try: a push of one typical activation against the feature. `qsl steer` shows its effect, `qsl
sweep` measures it. Where a feature is only ablated, others carry on, and less changes. --causal
adds the first suspects to the model on the prompts of the bad replies, and measures how much more
the model writes like these. --graph goes upstream from the first bad token, through all layers of
the SAEs' group (see `qsl graph --help`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli import plan_options as plans
from qwen_scope_lens.cli.causal_options import SHOWN, add_causal, run_causal
from qwen_scope_lens.cli.graph import GRAPH
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import add_json, add_labels, count, read_labels, remark, show
from qwen_scope_lens.files import refuse_other_folder

if TYPE_CHECKING:
    from qwen_scope_lens.labels.packs import LabelPack
    from qwen_scope_lens.steering.blame import Case
    from qwen_scope_lens.steering.causal import Causes

TRIED = 3
"""For how many suspects there is a line to try."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "saes",
        nargs="+",
        metavar="SAE",
        action=Input,
        check=inputs.layer_address,
        help="such as qwen3-8b-base/w64k-l0-50/20",
    )
    parser.add_argument("--prompt", help="what was asked")
    parser.add_argument("--reply", help="what was answered")
    parser.add_argument(
        "--cases",
        type=Path,
        action=Input,
        check=inputs.corpus,
        help="a file of them instead (JSONL or Parquet)",
    )
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="CLASS",
        help="only tokens of this class are bad: han, digit, ... (see `qsl steer --help`)",
    )
    parser.add_argument("--chat", action="store_true", help="prompts as a user's messages")
    parser.add_argument("--thinking", action="store_true", help="with --chat: thinking mode")
    add_labels(parser)
    parser.add_argument("--top", type=count, default=10, help="default: %(default)s")
    parser.add_argument(
        "--graph", type=Path, metavar="FOLDER", help="a graph of the first bad token"
    )
    add_causal(parser)
    plans.add_model(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.address import LayerRef
    from qwen_scope_lens.errors import BadText
    from qwen_scope_lens.steering.where import Where
    from qwen_scope_lens.tables import Table

    Where(classes=tuple(arguments.classes))  # refuses unknown ones before anything is loaded
    if not arguments.cases and not (arguments.prompt and arguments.reply):
        raise BadText("give --prompt and --reply, or --cases FILE")
    saes = [LayerRef.parse(text) for text in arguments.saes]
    plans.model_of(arguments, [sae.row for sae in saes])

    from qwen_scope_lens.steering.blame import blame

    cases = _cases(arguments)
    enable_thinking = plans.thinking(arguments, [case.prompt for case in cases])
    labels = read_labels(arguments.labels)
    if arguments.graph:
        refuse_other_folder(arguments.graph, "a graph", GRAPH)
    model = plans.load(arguments, saes)
    found = blame(
        model,
        saes,
        cases,
        classes=arguments.classes,
        top=arguments.top,
        enable_thinking=enable_thinking,
        allow_other_model=True,  # `plans.load` has looked
    )
    columns = ("feature", "on bad", "elsewhere", "rate on bad", "rate elsewhere", "token", "label")
    rows = [
        (
            str(one.ref),
            one.on_bad,
            one.elsewhere,
            one.rate_on_bad,
            one.rate_elsewhere,
            one.strongest,
            labels.text(one.ref) if labels else "",
        )
        for one in found
    ]
    tested: Causes | None = None
    if arguments.causal and found:
        bad = [case for case in cases if case.bad][:SHOWN]
        tested = run_causal(
            arguments,
            model,
            [suspect.ref for suspect in found],
            examples=[case.reply for case in bad],
            against=[case.reply for case in cases if not case.bad][:SHOWN],
            prompts=[case.prompt for case in bad],
            enable_thinking=enable_thinking,
        )
    more: dict[str, Any] = {"causal": tested.to_dict()} if tested is not None else {}
    show(Table.of(columns, rows), arguments.json, **more)
    if tested is not None and not arguments.json:
        print(f"\n{tested}\n")
    if found and not arguments.json:
        refs = [str(suspect.ref) for suspect in found[:TRIED]]
        print(f"try: qsl calibrate {' '.join(refs)} --texts CORPUS --out typical.json")
        for ref in refs:
            print(f"try: --edit {ref}:add:-1typical --calibration typical.json")
    if arguments.graph:
        _graph(arguments, model, saes[0].group, cases, enable_thinking, labels)
    return 0


def _graph(
    arguments: argparse.Namespace,
    model: Any,
    group: str,
    cases: list[Case],
    enable_thinking: bool,
    labels: LabelPack | None,
) -> None:
    from qwen_scope_lens.graphs import attribute, faithfulness, prune
    from qwen_scope_lens.graphs.folder import save_folder
    from qwen_scope_lens.models.tokenize import find_tokenizer
    from qwen_scope_lens.steering.blame import first_bad_token

    tokenizer = find_tokenizer(model)
    before, bad = first_bad_token(cases, tokenizer, arguments.classes, enable_thinking)
    whole = attribute(
        model, before, group, target=bad, labels=labels, allow_other_model=True, progress=True
    )
    graph = prune(whole)
    test = faithfulness(model, graph, progress=True)
    page = save_folder(arguments.graph, whole, graph, [test])
    remark(f"written: {page}, the graph of {tokenizer.decode([bad])!r}")


def _cases(arguments: argparse.Namespace) -> list[Case]:
    from qwen_scope_lens.steering.blame import Case, read_cases

    cases = [Case(arguments.prompt, arguments.reply)]
    if arguments.cases:
        cases = read_cases(arguments.cases)
    return [Case(plans.as_prompt(arguments, case.prompt), case.reply, case.bad) for case in cases]
