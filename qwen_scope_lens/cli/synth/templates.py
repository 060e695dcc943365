"""Copy the prompt templates and the recipes into a folder, to edit them.

    qsl synth templates --out prompts/
    qsl synth run targets.json --templates prompts/ --recipe prompts/scope.yaml ...

Files that are there already stay as they are. A template has parts [system], [user] or [text] and
names such as $description; a misspelt name is an error, not a hole in a prompt.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="a folder")


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.synth.recipe import RECIPES, write_recipe
    from qwen_scope_lens.writers.templates import Templates

    written = Templates.copy(arguments.out)
    for name, recipe in RECIPES.items():
        path = arguments.out / f"{name}.yaml"
        if not path.exists():
            written.append(write_recipe(recipe, path))
    print(f"{len(written)} files written into {arguments.out}")
    return 0
