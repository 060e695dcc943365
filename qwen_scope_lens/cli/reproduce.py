"""The paper's experiments as recipes: files that run, stage by stage, and end in one page.

    qsl reproduce list
    qsl reproduce show toxicity                      # stages, settings, figures, estimate
    qsl reproduce run toxicity --smoke --out try/    # every stage on a toy model, in seconds
    qsl reproduce show toxicity --yaml > mine.yaml   # copy, edit, and `run mine.yaml`
    # needs the hub:
    qsl reproduce run toxicity --out toxicity/       # in earnest; run again, it goes on

A run that was stopped goes on where it was. docs/reproduce.md says what each recipe needs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.cli.options import (
    Word,
    add_json,
    add_words,
    count,
    memory,
    print_json,
    remark,
    show,
)
from qwen_scope_lens.errors import UnknownName

if TYPE_CHECKING:
    from qwen_scope_lens.recipes.engine import State
    from qwen_scope_lens.recipes.recipe import Recipe

RECIPE = "a name from `qsl reproduce list`, or a YAML file of your own"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, WORDS)


def run(arguments: argparse.Namespace) -> int:
    return arguments.run_word(arguments) or 0


def _list(arguments: argparse.Namespace) -> None:
    """Which recipes there are."""
    from qwen_scope_lens.recipes.recipe import names, open_recipe
    from qwen_scope_lens.tables import Table

    recipes = [open_recipe(name) for name in names()]
    rows = [(r.name, r.paper.partition(",")[0], r.settings["model"], r.title) for r in recipes]
    show(Table.of(("recipe", "paper", "model", "question"), rows), arguments.json)


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=RECIPE)
    parser.add_argument(
        "--smoke", action="store_true", help="on the embedded toy model and its texts"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="local files, not the hub")
    parser.add_argument("--model", help="another model: a folder, or a name on the hub")
    parser.add_argument("--sae", metavar="GROUP", help="other SAEs, such as local/FOLDER")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="another setting, such as layers=[10,20] or data.mmlu.file=my.jsonl; again for more",
    )


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    add_json(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="say what is finished there")
    parser.add_argument("--yaml", action="store_true", help="print the file itself")


def _show(arguments: argparse.Namespace) -> None:
    """What a recipe does: stages, settings, data, the paper's figures, and an estimate."""
    from qwen_scope_lens.recipes.engine import stages_of, states
    from qwen_scope_lens.recipes.recipe import recipe_text

    if arguments.yaml and arguments.json:
        raise UnknownName("--yaml prints the file itself and --json a summary: give one of them")
    if arguments.yaml:
        print(recipe_text(arguments.recipe), end="")
        return
    recipe = _opened(arguments)
    from qwen_scope_lens.tables import Table

    stages: list[tuple[str, ...]] = [(stage.name, stage.what) for stage in stages_of(recipe)]
    head: tuple[str, ...] = ("stage", "what it does")
    if arguments.out is not None:
        known = states(recipe, arguments.out, arguments.data)
        _hint_at_smoke(arguments, known)
        stages = [(*row, found.state, found.why) for row, found in zip(stages, known, strict=True)]
        head = (*head, "state", "why")
    settings = [
        (key, _in_short(value), recipe.open.get(key, "")) for key, value in recipe.settings.items()
    ]
    sources = [
        (name, source.get("hub") or source.get("task") or "", source.get("file", ""))
        for name, source in recipe.data.items()
    ]
    figures = [
        (f.name, f"> {f.paper:g}" if f.above else f.paper, f.tolerance) for f in recipe.figures
    ]
    tables = {
        "stages": Table.of(head, stages),
        "settings": Table.of(("setting", "value", "not in the paper"), settings),
        "sources": Table.of(("source", "hub or lm-eval task", "file in --data"), sources),
        "figures": Table.of(("figure", "paper", "tolerance"), figures),
    }
    if arguments.json:
        facts = {"recipe": recipe.name, "title": recipe.title, "paper": recipe.paper}
        records = {name: table.records() for name, table in tables.items()}
        print_json(arguments.json, {**facts, **records, "estimate": _estimate(recipe)})
        return
    print(f"{recipe.name}: {recipe.title}\n{recipe.paper}\n")
    print("\n\n".join(table.text() for table in tables.values()))
    print(f"\n{_estimate(recipe)}")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    add_json(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    work = parser.add_argument_group("the work")
    work.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cpu")
    work.add_argument("--token-budget", type=count, help="tokens per batch; default: 4096")
    work.add_argument("--sae-memory", type=memory, metavar="SIZE", help="such as 8GB")


def _run(arguments: argparse.Namespace) -> int:
    """Do all stages of a recipe and write its page; run again, it goes on where it stopped.

        qsl reproduce run bench-mmlu-pro --smoke --out try/
        # needs the hub, or texts and a recipe of your own:
        qsl reproduce run toxicity --data texts/ --device cuda --out toxicity/
        qsl reproduce run mine.yaml --set seed=1 --set layers=[10,20] --out mine/

    A stage is done again if anything that it read has changed since: a setting, a file, an earlier
    stage. --data reads the files that the recipe names (`show` lists them) from a folder, and then
    nothing comes from the hub but weights. The page FOLDER/NAME.html has our figures beside the
    paper's.
    """
    from qwen_scope_lens.recipes.page import figure_rows, not_found
    from qwen_scope_lens.recipes.recipe import names
    from qwen_scope_lens.tables import Table

    recipe = _opened(arguments)
    if arguments.data is not None and not arguments.data.is_dir():
        raise UnknownName(f"{arguments.data} is not a folder: --data takes one with the sources")
    remark(_estimate(recipe, arguments.sae_memory))
    from qwen_scope_lens.recipes.engine import run as run_recipe

    options = {
        name: value
        for name in ("device", "token_budget", "sae_memory")
        if (value := getattr(arguments, name)) is not None
    }
    done = run_recipe(recipe, arguments.out, data=arguments.data, options=options, say=remark)
    missing = not_found(recipe.figures, done.results)
    rows = [row[:5] for row in figure_rows(recipe.figures, done.results, only_shown=True)]
    head: tuple[str, ...] = ("figure", "ours", "from", "to", "paper")
    if missing:
        head = (*head, "note")
        rows = [
            (*row, f"not found: {figure.ours}" if figure in missing else "")
            for row, figure in zip(rows, recipe.figures, strict=True)
        ]
    table = Table.of(head, rows)
    show(table, arguments.json, page=str(done.page))
    if arguments.smoke:
        remark(
            "This was a smoke run: the toy model, its features and a few texts, with the settings"
            " under `smoke` in the file. The figures mean nothing."
        )
    remark(f"written: {done.page}")
    if not missing or arguments.smoke:
        return 0
    places = ", ".join(figure.ours for figure in missing)
    remark(f"no stage has a result at {places}: correct `ours` under `figures` in the file")
    return int(arguments.recipe not in names())


def _hint_at_smoke(arguments: argparse.Namespace, known: Sequence[State]) -> None:
    """Say so where a folder is out of date only because one of run and show had --smoke."""
    from qwen_scope_lens.recipes.engine import states

    if not any(one.state == "out of date" for one in known):
        return
    other = states(_opened(arguments, not arguments.smoke), arguments.out, arguments.data)
    if any(one.state == "finished" for one in other):
        how, way = ("without", "leave it out") if arguments.smoke else ("with", "give it")
        remark(f"{arguments.out} was made {how} --smoke: {way} here, too")


def _opened(arguments: argparse.Namespace, smoke: bool | None = None) -> Recipe:
    from qwen_scope_lens.recipes.recipe import open_recipe

    recipe = open_recipe(arguments.recipe)
    if arguments.smoke if smoke is None else smoke:
        recipe = recipe.for_smoke()
    changes = {key: getattr(arguments, key) for key in ("model", "sae") if getattr(arguments, key)}
    return recipe.with_settings({**changes, **_pairs(arguments.changes)})


def _pairs(words: Sequence[str]) -> dict[str, Any]:
    import yaml

    from qwen_scope_lens.files import parse_yaml

    found = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UnknownName(f"--set {word!r:.60}: expected KEY=VALUE, such as layers=[10,20]")
        try:
            found[key] = parse_yaml(text)
        except (ValueError, yaml.YAMLError) as error:
            raise UnknownName(f"--set {word!r:.60}: the value is not YAML ({error})") from error
    return found


def _estimate(recipe: Recipe, sae_memory: int | None = None) -> str:
    from qwen_scope_lens.recipes.estimate import estimate

    return str(estimate(recipe, sae_memory))


def _in_short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


WORDS = (
    Word("list", add_json, _list),
    Word("show", _show_arguments, _show),
    Word("run", _run_arguments, _run),
)
