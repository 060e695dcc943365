"""Pages made of the code: the API by doors, every command's options, sizes of models and SAEs."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

from qwen_scope_lens.catalog import GROUPS, Backbone
from qwen_scope_lens.cli.verbs import SECTIONS
from tools.docs.pages import parser_of

__all__ = ["api_pages", "commands_page", "sizes_page"]

PACKAGE = Path(__file__).parent.parent.parent / "qwen_scope_lens"

CARDS = (8, 12, 16, 24, 32, 48, 80, 96, 141)
"""Memory of common cards, in GB."""
ROOM = 1.2
"""Weights times this: what a batch and its residuals need besides."""


def api_pages() -> dict[str, str]:
    """A page per door with what it hands on, and an index."""
    rooms = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.pyi"))
    pages = {room: _door(room) for room in rooms}
    top = [(name, target) for name, target in _names(PACKAGE / "__init__.pyi") if target]
    rows = "\n".join(
        f"| `{name}` | [{_room(target) or 'the package'}]({_room(target) or 'index'}.md#{target}) |"
        for name, target in top
    )
    whole = "\n\n".join(f"::: {target}" for _, target in top if _room(target) is None)
    doors = "\n".join(f"- [`qwen_scope_lens.{room}`]({room}.md): {_what(room)}" for room in rooms)
    pages["index"] = (
        "# API\n\nEverything public is imported from a door: the package itself, or one of its"
        " rooms."
        f"\n\n{doors}\n\n## The package\n\n`import qwen_scope_lens as qsl`\n\n"
        f"| `qsl.` | described under |\n|---|---|\n{rows}\n\n{whole}\n"
    )
    return pages


def _door(room: str) -> str:
    names = [target for _, target in _names(PACKAGE / room / "__init__.pyi") if target]
    entries = "\n\n".join(f"::: {target}" for target in dict.fromkeys(names))
    return f"# qwen_scope_lens.{room}\n\n{_what(room)}\n\n{entries}\n"


def _names(stub: Path) -> list[tuple[str, str]]:
    """(name, full path of what it is) of a door's stub; the path of a room is empty."""
    base = ["qwen_scope_lens", *stub.parent.relative_to(PACKAGE).parts]
    found = []
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                home = ".".join([*base[: len(base) - node.level + 1], *filter(None, [node.module])])
                found.append(
                    (alias.asname or alias.name, f"{home}.{alias.name}" if node.module else "")
                )
    return found


def _room(target: str) -> str | None:
    """The room of a full path; None for what stands in the package itself."""
    parts = target.split(".")
    return parts[1] if (PACKAGE / parts[1]).is_dir() else None


def _what(room: str) -> str:
    """The first sentence of a room's docstring."""
    source = (PACKAGE / room / "__init__.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0].replace("\n", " ")


def commands_page() -> str:
    """Every verb's help, as the parser prints it."""
    parts = ["# Commands", "", "Each text is what `qsl VERB --help` prints.", ""]
    for section, verbs in SECTIONS.items():
        parts += [f"## {section[0].upper()}{section[1:]}", ""]
        for verb, what in verbs.items():
            parser = parser_of(verb)
            parts += [f"### qsl {verb}", "", f"{what[0].upper()}{what[1:]}.", ""]
            parts += ["```text", parser.format_help().rstrip(), "```", ""]
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    for word, own in action.choices.items():
                        lines = own.format_help().rstrip().splitlines()
                        parts += [f'??? note "qsl {verb} {word}"', "", "    ```text"]
                        parts += [*(f"    {line}" for line in lines), "    ```", ""]
    return "\n".join(parts)


def sizes_page() -> str:
    """Which model with how many layers of SAEs fits on which card."""
    head = (
        "| SAEs | model, bfloat16 | one layer, float32 | all layers | smallest card: one layer"
        " | 4 layers | all layers |\n|---|---|---|---|---|---|---|"
    )
    rows = []
    for group in GROUPS:
        if group.origin == "mini":
            continue
        model, one = 2e9 * _billions(group.backbone), group.bytes_per_layer
        every = one * len(group.layers)
        needs = [_card(model + min(n * one, every)) for n in (1, 4, len(group.layers))]
        rows.append(
            f"| `{group.short}` | {model / 1e9:.0f} GB | {one / 1e9:.2f} GB"
            f" | {every / 1e9:.0f} GB | {' | '.join(needs)} |"
        )
    return "\n".join(
        [
            "# Which model on which card",
            "",
            "Computed from the catalog, not measured: no GPU was at hand. The model's size is the"
            " number of parameters in its name, two bytes each; an SAE's is that of its file. A"
            f" card is one of {', '.join(map(str, CARDS))} GB that holds both and a fifth more"
            " for batches. `--sae-memory` keeps fewer SAEs on the card than are asked for, and a"
            " model that is read up to layer n only needs the part below it. `qsl show GROUP`"
            " prints the same for one group.",
            "",
            head,
            *rows,
            "",
        ]
    )


def _billions(backbone: Backbone) -> float:
    """Parameters in billions, as the model's name has them."""
    found = re.search(r"-(\d+(?:\.\d+)?)B", backbone.model_id)
    assert found is not None, f"{backbone.model_id}: no number of parameters in the name"
    return float(found[1])


def _card(size: float) -> str:
    fits = [card for card in CARDS if size * ROOM <= card * 1e9]
    return f"{fits[0]} GB" if fits else f"{size * ROOM / 1e9:.0f} GB: several cards"
