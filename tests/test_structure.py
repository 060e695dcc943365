"""The house: a room imports only from rooms below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "qwen_scope_lens"
CONVERTERS = ROOT.parent / "converters"
TOOLS = ROOT.parent / "tools"  # not in the wheel, and on top of every room

# From the ground up. Rooms on one line may not import each other.
FLOORS = (
    ("errors", "families"),
    ("files", "extras"),
    ("catalog",),
    ("address", "pages", "stats"),
    ("tables",),
    ("saes",),
    ("models", "converters"),
    ("features",),
    ("steering",),
    ("evaluation", "classification", "synthesis", "training", "compare"),
    ("dashboards",),
    ("mini",),
    ("cli",),
)
LEVEL = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> list[Path]:
    return [*ROOT.rglob("*.py"), *CONVERTERS.glob("*.py")]


def room_of(path: Path) -> str:
    if CONVERTERS in path.parents:
        return "converters"
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT.parent)))
def test_imports_point_downwards(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_top = set(tree.body)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
            "qwen_scope_lens."
        ):
            continue
        other = node.module.split(".")[1]  # type: ignore[union-attr]
        if other == room:
            continue
        if room == "converters" and other == "cli" and node not in at_top:
            continue  # a converter run as a script borrows the command line's error handling
        assert LEVEL[other] < LEVEL[room], f"{path.name} ({room}) imports from {other}"


def test_modules_are_small_and_say_what_lives_there() -> None:
    for path in [*modules(), *TOOLS.rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, f"{path.name} is long: split it"
        if path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(text)), f"{path.name} has no docstring"
