"""The house: its floors, its doors, and that docs/architecture.md shows it as it is."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
ROOT = TOP / "qwen_scope_lens"
CONVERTERS = TOP / "converters"
TOOLS = TOP / "tools"  # not in the wheel, and on top of every room

# From the ground up. Rooms on one line may not import each other.
FLOORS = (
    ("errors", "families", "version"),
    ("files", "extras", "hub", "stats"),
    ("catalog",),
    ("address", "pages"),
    ("hosted", "tables"),
    ("saes",),
    ("models", "converters"),
    ("stores",),
    ("features", "steering"),
    ("writers",),
    ("labels",),
    ("bench", "classify", "compare", "concepts", "graphs", "synth", "train"),
    ("site",),
    ("serve", "mcp"),
    ("mini",),
    ("recipes",),
    ("cli",),
)
LEVEL = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> list[Path]:
    return [*ROOT.rglob("*.py"), *CONVERTERS.glob("*.py")]


def room_of(path: Path) -> str:
    if CONVERTERS in path.parents:
        return "converters"
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(TOP)))
def test_imports_point_downwards(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_top = set(tree.body)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        assert node.module != "qwen_scope_lens", f"{path.name} imports from the front door"
        if not node.module.startswith("qwen_scope_lens."):
            continue
        other = node.module.split(".")[1]
        if other == room:
            continue
        if room == "converters" and other == "cli" and node not in at_top:
            continue  # a converter run as a script borrows the command line's error handling
        assert LEVEL[other] < LEVEL[room], f"{path.name} ({room}) imports from {other}"


def test_no_file_imports_itself_by_a_detour() -> None:
    """Circles of imports, wherever in a file they stand."""
    below: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(TOP).with_suffix("").parts)
        if path.name == "__init__.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        below[name] = {
            node.module
            for node in _run_time_imports(tree)
            if node.module and node.module.startswith("qwen_scope_lens.")
        }
    assert len(below) > 100
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name in done:
            return
        for other in sorted(below.get(name, ())):
            visit(other, (*way, name))
        done.add(name)

    for name in sorted(below):
        visit(name, ())


def _run_time_imports(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    """All imports but those that only a type checker sees."""
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        for part in ast.walk(node):
            if isinstance(part, ast.ImportFrom):
                yield part


def test_modules_are_small_and_say_what_lives_there() -> None:
    for path in [*modules(), *TOOLS.rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, f"{path.name} is long: split it"
        assert ast.get_docstring(ast.parse(text)), f"{path.name} has no docstring"


def doors() -> list[Path]:
    return sorted(ROOT.rglob("__init__.pyi"))


@pytest.mark.parametrize("stub", doors(), ids=lambda p: str(p.parent.relative_to(TOP)))
def test_a_door_hands_on_what_its_list_says(stub: Path) -> None:
    """Every name of the list is there, is the object it is a name of, and says what it is."""
    room = ".".join(stub.parent.relative_to(TOP).parts)
    door = importlib.import_module(room)
    names: set[str] = set()
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name}: a type checker takes it as private"
            names.add(alias.name)
            if node.module:
                home = importlib.import_module(f"{room}.{node.module}")
                assert getattr(door, alias.name) is getattr(home, alias.name)
    assert set(dir(door)) == names
    assert set(door.__all__) == names


def test_file_names_in_docstrings_are_those_of_files() -> None:
    """A reader who follows a `name.py` finds it."""
    checked = 0
    known = {path.name for path in [*modules(), *TOOLS.rglob("*.py"), *TOP.glob("*/*.py")]}
    for path in [*modules(), *TOOLS.rglob("*.py"), *TOP.glob("docs/*.md")]:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"`(?:[\w./]*/)?(\w+\.py)`", text):
            assert name in known or name in ALLOWED, f"{path.relative_to(TOP)} names {name}"
            checked += 1
    assert checked > 20


ALLOWED = {"app.py"}  # of the official demo


def test_architecture_shows_the_tree() -> None:
    """docs/architecture.md names every file of the package, and none that is not there."""
    page = (TOP / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.split("```")[1]
    shown: set[str] = set()
    folder = ""
    for line in tree.strip().splitlines()[1:]:
        line = line.partition("#")[0].rstrip()
        found = re.match(r"^ {2}([\w/]+/)?", line)
        assert found is not None, line
        if found[1]:
            folder = found[1]
        elif not line.startswith("    "):
            folder = ""
        rest = line[found.end() :] if found[1] else line
        shown |= {folder + word for word in rest.replace("|", " ").split()}
    there = {
        str(path.relative_to(ROOT).with_suffix(""))
        for path in ROOT.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert shown == there
