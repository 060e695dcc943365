"""Measure the effect of an edit against its strength, with a guard for coherence and a control.

    qsl sweep texts/prompts.txt --edit mini-qwen3/w1k-l0-16/6/423:add --strengths 0:600:200 \\
        --measure class=han --new-tokens 24 --out dose

PROMPTS is a corpus (JSON Lines with `text` or `messages`, plain text with one prompt per line, CSV,
Parquet). Edits are given without a strength, or as a plan, whose strengths are replaced.
--strengths is FROM:TO:STEP or a list, in --unit (raw, typical, norm) or in the plan's own unit. The
effect is --measure: change (share of tokens that differ from the unsteered text), class=NAME (share
of characters of a class, such as han) or regex=PATTERN (share of texts in which it is found). Each
strength is run beside a control: changes of the same size along random directions. Three options
make the verdict honest: --ask (the prompt that simply asks for the effect), --examples (the same
push along the mean difference of activations) and --capability. DIR gets sweep.json, which is
rewritten after every strength (a stopped sweep goes on from it), and a page to look at.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli import plan_options as plans
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import add_json, count, print_json, remark
from qwen_scope_lens.steering.plan import OLD_UNITS, UNITS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    plans.allow_negative_values(parser)
    parser.add_argument(
        "prompts",
        type=Path,
        metavar="PROMPTS",
        action=Input,
        check=inputs.corpus,
        help="a file of prompts",
    )
    parser.add_argument(
        "--edit", action="append", default=[], metavar="REF:OP[@WHERE]", help="again for more"
    )
    parser.add_argument(
        "--plan",
        type=Path,
        action=Input,
        check=inputs.plan,
        help="from `qsl plan`: all of its edits at each of the strengths, in the plan's own unit",
    )
    parser.add_argument("--strengths", required=True, metavar="FROM:TO:STEP")
    parser.add_argument(
        "--unit", type=_unit, choices=UNITS, default="raw", help="of --edit; default: raw"
    )
    plans.add_calibration(parser)
    parser.add_argument("--measure", default="change", help="default: %(default)s")
    arms = parser.add_argument_group("more to compare with")
    arms.add_argument("--ask", help='the prompt alone: an instruction such as "Write in Chinese."')
    for name, help in (
        ("--examples", "texts with the effect: a push along the mean difference of activations"),
        ("--against", "texts without it (bundled neutral ones)"),
    ):
        arms.add_argument(
            name, type=Path, metavar="FILE", action=Input, check=inputs.corpus, help=help
        )
    arms.add_argument(
        "--capability",
        action="store_true",
        help="how well the steered model reads neutral texts; a dose that harms it is incoherent",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: only print")
    parser.add_argument("--batch", type=count, default=16, help="prompts at a time; default: 16")
    plans.add_model(parser)
    plans.add_sampling(parser, new_tokens=48)
    add_json(parser)


def _unit(name: str) -> str:
    return OLD_UNITS.get(name, name)


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.errors import BadPlan
    from qwen_scope_lens.steering.doses import Measure, parse_open_edit, parse_strengths
    from qwen_scope_lens.steering.plan import Plan

    if arguments.against and not arguments.examples:
        raise BadPlan("--against needs --examples: the push is along their mean difference")
    strengths = parse_strengths(arguments.strengths)
    edits = [parse_open_edit(text, arguments.unit) for text in arguments.edit]
    if arguments.plan is not None:
        edits += Plan.load(arguments.plan).edits
    if not edits:
        raise BadPlan("there is nothing to sweep: give --edit REF:OP, or --plan FILE")
    plan = plans.calibrated(Plan(edits), arguments)
    measure = Measure.parse(arguments.measure)
    prompts = plans.read_prompts(arguments, arguments.prompts)
    enable_thinking = plans.thinking(arguments, prompts)
    plans.model_of(arguments, [ref.sae.row for ref in plan.refs])
    plans.notices(ref.sae for ref in plan.refs)
    sampling = plans.sampling_of(arguments)
    model = plans.load(arguments, [ref.sae for ref in plan.refs])

    from tqdm import tqdm

    from qwen_scope_lens.concepts.concept import neutral_texts, read_examples
    from qwen_scope_lens.steering.arms import Examples
    from qwen_scope_lens.steering.sweep import FORMAT, VERSION, sweep

    examples = None
    if arguments.examples:
        others = read_examples(arguments.against) if arguments.against else neutral_texts()
        examples = Examples(read_examples(arguments.examples), others)

    out: Path | None = arguments.out
    with tqdm(unit="dose", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        found = sweep(
            model,
            plan,
            strengths,
            prompts,
            measure,
            sampling=sampling,
            batch=arguments.batch,
            seed=arguments.seed,
            enable_thinking=enable_thinking,
            ask=arguments.ask,
            examples=examples,
            neutral=neutral_texts() if arguments.capability else (),
            keep=out / "sweep.json" if out else None,
            progress=progress,
            allow_other_model=True,  # `plans.load` has looked
        )
    if arguments.json:  # the same as in the file
        print_json(FORMAT, found.to_dict(), VERSION)
    else:
        print(found)
    if out:
        remark(f"written: {found.page().save(out / 'sweep.html')}")
    return 0
