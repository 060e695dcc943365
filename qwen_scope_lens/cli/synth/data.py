"""`qsl synth run`, `report` and `templates`: the examples that are written."""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    Word,
    add_json,
    add_labels,
    add_model,
    add_old,
    count,
    from_zero,
    output,
    print_json,
    read_labels,
    remark,
)
from qwen_scope_lens.cli.synth.generators import add_generator_arguments, prices, roles

__all__ = ["WORDS"]


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "targets",
        metavar="TARGETS",
        type=Path,
        action=Input,
        check=inputs.made_by("qsl synth targets", "qsl-targets"),
        help="of `qsl synth targets`",
    )
    parser.add_argument(
        "--generator", required=True, help="openai:URL#MODEL, hf:MODEL or steer:MODEL"
    )
    parser.add_argument("--replier", help="who writes the replies; else the generator")
    parser.add_argument("--judge", help="who checks rewrites, where the recipe wants it")
    parser.add_argument("--out", type=output, required=True, help="data.jsonl")
    parser.add_argument("--budget", type=count, default=1000, help="texts (%(default)s)")
    parser.add_argument(
        "--budget-counts",
        choices=("written", "kept"),
        default="written",
        help="which texts the budget counts: all candidates, or kept examples (%(default)s)",
    )
    parser.add_argument("--recipe", default="scope", help="scope, fac, text, or a .yaml file")
    parser.add_argument("--templates", type=Path, help="folder of `qsl synth templates`")
    add_model(parser, "who reads; else the model of the targets' stores", device=False)
    parser.add_argument(
        "--device",
        default="cpu",
        action=Input,
        check=inputs.device,
        help="of the reading model (%(default)s)",
    )
    parser.add_argument(
        "--strength",
        type=float,
        default=8.0,
        help="of steer:MODEL, times the feature's typical activation (%(default)g)",
    )
    parser.add_argument(
        "--not-like",
        type=Path,
        action=Input,
        check=inputs.corpus,
        help="a corpus that nothing may repeat",
    )
    parser.add_argument("--wave", type=count, default=64, help="candidates at a time (%(default)s)")
    recipe = parser.add_argument_group("recipe", "instead of what the recipe says")
    recipe.add_argument("--template", help="such as prompt, steered, fac, text, opening")
    recipe.add_argument(
        "--threshold", type=float, help="else that of the recipe or the targets, the higher one"
    )
    recipe.add_argument(
        "--verify",
        choices=("prompt", "reply", "either", "none"),
        help="where the feature has to fire: the report verifies the prompt; none keeps undirected"
        " texts, to compare with",
    )
    recipe.add_argument(
        "--kind-from",
        choices=("feature", "turns"),
        help="harmful or benign: what the feature expresses, or each in turn",
    )
    recipe.add_argument("--variants", type=from_zero, help="rewrites of each vanilla prompt")
    recipe.add_argument("--per-feature", type=count, help="vanilla examples to keep for a feature")
    recipe.add_argument("--attempts", type=count, help="rounds for a feature")
    recipe.add_argument("--language", help="such as en; other languages are rejected")
    recipe.add_argument("--seed", type=from_zero)
    recipe.add_argument("--temperature", type=float)
    recipe.add_argument(
        "--caution-words",
        type=Path,
        action=Input,
        check=inputs.file,
        help="a file, one word per line",
    )
    add_labels(
        parser,
        "a label pack: features that no harmless text may activate above --caution-above",
        name="--caution-features",
    )
    parser.add_argument("--caution-above", type=float, default=0.0, help="(%(default)s)")
    add_generator_arguments(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> None:
    """Write examples that activate the missing features; keep those in which the model confirms it.

        qsl synth run targets.json --generator steer:mini-qwen3 --strength 8 --recipe text \\
            --budget 16 --out steered.jsonl
        # needs an endpoint that writes:
        qsl synth run targets.json --generator openai:http://localhost:8000/v1 --model-name NAME \\
            --budget 2000 --out data.jsonl
        qsl synth run targets.json --recipe fac --threshold 1.5 --budget 2000 --out fac.jsonl \\
            --generator openai:http://localhost:8000/v1#NAME
        # needs the hub:
        qsl synth run targets.json --generator hf:Qwen/Qwen3-8B --budget 200 --out data.jsonl

    Every candidate is read again, unsteered, by the model whose SAEs the targets name. After an
    interruption at any point the same command continues, and pays for no answer twice. `data.run/`
    beside the output holds the ledger and every candidate with the reason why it was kept or not.
    The output loads with `datasets`.
    """
    from qwen_scope_lens.errors import GeneratorFailed
    from qwen_scope_lens.models.open import open_model
    from qwen_scope_lens.synth.recipe import read_recipe, read_words
    from qwen_scope_lens.synth.report import make_report
    from qwen_scope_lens.synth.run import known_texts, made_with, open_reader, synthesise
    from qwen_scope_lens.synth.targets import TargetSet
    from qwen_scope_lens.writers.templates import Templates

    targets = TargetSet.load(arguments.targets)
    words = read_words(arguments.caution_words) if arguments.caution_words else None
    changes = (
        "template",
        "threshold",
        "kind_from",
        "variants",
        "per_feature",
        "attempts",
        "language",
        "seed",
        "temperature",
    )
    recipe = read_recipe(arguments.recipe)
    if arguments.generator.startswith("steer:"):
        recipe = recipe.for_steering()
    recipe = recipe.at_least(targets.threshold).change(
        caution=words, read=arguments.verify, **{name: getattr(arguments, name) for name in changes}
    )
    templates = Templates(arguments.templates)
    name = arguments.model or targets.provenance["model"]
    same = {} if arguments.model else made_with(targets).load_options

    @lru_cache
    def load(wanted: str) -> Any:
        return open_model(wanted, device=arguments.device, **(same if wanted == name else {}))

    pack = read_labels(arguments.caution_features) or ()
    caution = dict.fromkeys(pack, arguments.caution_above)
    reader, saes = open_reader(targets, load(name), arguments.device, caution)
    typical = {target.ref: target.typical for target in targets.wanted if target.typical > 0}
    who = roles(arguments, load, typical, saes)
    synthesis = synthesise(
        targets,
        arguments.out,
        writer=who.open(arguments.generator),
        reader=reader,
        budget=arguments.budget,
        counts=arguments.budget_counts,
        recipe=recipe,
        replier=who.open(arguments.replier) if arguments.replier else None,
        judge=who.open(arguments.judge) if arguments.judge else None,
        templates=templates,
        prices=prices(arguments),
        caution=caution,
        known=known_texts(arguments.not_like) if arguments.not_like else (),
        wave=arguments.wave,
        model=name,
        progress=True,
    )
    say = remark if arguments.json else print
    say(f"stopped: {synthesis.stopped}\n{synthesis.ledger.spent}\n")
    unanswered = [one for one in synthesis.candidates if one.outcome.startswith("no answer")]
    if unanswered and len(unanswered) == len(synthesis.candidates):
        raise GeneratorFailed(
            f"none of {len(unanswered)} candidates got all its answers ({unanswered[0].outcome}):"
            " see that generator, replier and judge run, then run the same command again"
        )
    if synthesis.candidates:
        report = make_report(arguments.out, targets)
        if arguments.json:
            print_json(arguments.json, report.to_dict())
        else:
            print(report)
    remark(f"rows: {arguments.out}")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="DATA",
        type=Path,
        action=Input,
        check=inputs.file,
        help="of `qsl synth run`",
    )
    parser.add_argument(
        "--targets",
        type=Path,
        required=True,
        action=Input,
        check=inputs.made_by("qsl synth targets", "qsl-targets"),
        help="that the run was made with",
    )
    parser.add_argument("--out", type=output, help="write a page with the curve, too")
    add_old(parser, "--html", "--out")
    add_json(parser)


def _report(arguments: argparse.Namespace) -> None:
    """Report what was kept, why the rest was not, and how coverage grew; also while a run goes on.

    qsl synth report data.jsonl --targets targets.json
    qsl synth report data.jsonl --targets targets.json --out report.html
    """
    from qwen_scope_lens.synth.report import make_report
    from qwen_scope_lens.synth.targets import TargetSet

    report = make_report(arguments.data, TargetSet.load(arguments.targets))
    if arguments.json:
        print_json(arguments.json, report.to_dict())
    else:
        print(report)
    if arguments.out:
        report.page().save(arguments.out)
        remark(f"page: {arguments.out}")


def _templates_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="a folder")


def _templates(arguments: argparse.Namespace) -> None:
    """Copy the prompt templates and the recipes into a folder, to edit them.

        qsl synth templates --out prompts/
        # needs an endpoint that writes:
        qsl synth run targets.json --templates prompts/ --recipe prompts/scope.yaml \\
            --generator openai:http://localhost:8000/v1#NAME --out data.jsonl

    Files that are there already stay as they are. A template has parts [system], [user] or [text]
    and names such as $description; a misspelt name is an error, not a hole in a prompt.
    """
    from qwen_scope_lens.synth.recipe import RECIPES, write_recipe
    from qwen_scope_lens.writers.templates import Templates

    written = Templates.copy(arguments.out)
    for name, recipe in RECIPES.items():
        path = arguments.out / f"{name}.yaml"
        if not path.exists():
            written.append(write_recipe(recipe, path))
    print(f"{len(written)} files written into {arguments.out}")


WORDS = (
    Word("run", _run_arguments, _run),
    Word("report", _report_arguments, _report),
    Word("templates", _templates_arguments, _templates),
)
