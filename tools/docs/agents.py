"""Write `llms.txt` and `AGENTS.md`, what a language model reads first: `make agents`.

Both are made from what people read: the README, the first lines of each page, the verbs' help, the
doors' lists of public names, the Makefile and the notebooks' titles. Nothing is written twice by
hand, so a test compares the two files with what is made here.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from qwen_scope_lens.cli.verbs import SECTIONS
from qwen_scope_lens.files import whole_file

__all__ = ["FILES", "agents_md", "llms_txt"]

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qwen_scope_lens"


def llms_txt(root: Path = ROOT) -> str:
    """The index of everything, in the form of llmstxt.org: a title, a summary, lists of links."""
    readme = (root / "README.md").read_text("utf-8")
    parts = [f"# {_title(readme)}", f"> {_first_paragraph(readme)}", *_facts(readme)]
    parts += ["## Use", "\n".join(_uses(readme)), "## Notebooks", "\n".join(_notebooks(root))]
    parts += ["## Verbs of the command line", "\n".join(_verbs())]
    more = [
        ("CONTRIBUTING.md", "how changes are made and tested"),
        ("CHANGELOG.md", "what changed"),
        ("AGENTS.md", "for agents that work in this repository: commands, rules, public names"),
    ]
    more += [(name, title) for name, title in _pages(root) if f"]({name})" not in readme]
    parts += ["## Optional", "\n".join(f"- [{name}]({name}): {what}" for name, what in more)]
    return "\n\n".join(parts) + "\n"


def agents_md(root: Path = ROOT) -> str:
    """What an agent needs that uses the package or works on it."""
    readme = (root / "README.md").read_text("utf-8")
    contributing = (root / "CONTRIBUTING.md").read_text("utf-8")
    architecture = (root / "docs" / "architecture.md").read_text("utf-8")
    parts = [
        "# For agents",
        "This file is made by `make agents`; do not edit it.",
        _first_paragraph(readme),
        *_facts(readme),
        "## The first steps",
        _first_code(readme),
        "## Commands",
        "```bash\n" + "\n".join(_targets(root)) + "\n```",
        "## Rules",
        _section(architecture, "Three rules").split("\n\n")[0],
        "[docs/architecture.md](docs/architecture.md) has the tree of all files, floor by floor.",
        _section(contributing, "What a change must keep"),
        _section(contributing, "Style"),
        "## Where something new goes",
        _section(architecture, "Where something new goes"),
        "## The command line",
        "\n".join(_verbs()),
        "`qsl VERB --help` explains a verb and has examples that run. `qsl mcp` gives an agent the"
        " tools about, read, feature, search, steer and query ([docs/mcp.md](docs/mcp.md)).",
        "## Public names",
        "Import from these doors only; files behind them may be renamed.",
        "\n".join(_doors()),
    ]
    return "\n\n".join(parts) + "\n"


FILES = {"llms.txt": llms_txt, "AGENTS.md": agents_md}


# --- from the README -----------------------------------------------------------------------------


def _title(readme: str) -> str:
    return readme.splitlines()[0].removeprefix("# ")


def _first_paragraph(page: str) -> str:
    """The first paragraph below a page's title, without its links and line breaks."""
    for part in page.split("\n\n")[1:]:
        if part[:1] not in "![`|#":
            return _plain(part)
    raise ValueError("the page has no paragraph")


def _first_code(page: str) -> str:
    """The first block of Python of a page."""
    found = re.search(r"^```python\n.*?^```$", page, re.M | re.S)
    if found is None:
        raise ValueError("the page has no Python")
    return found[0]


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text).split())


def _facts(readme: str) -> Iterator[str]:
    """What has to be known before anything: where to start, addresses, what was tested, notice."""
    yield (
        "Everything runs without a download on two toy models in the package (`mini-qwen3`,"
        " `mini-qwen3.5`); with a real model only the names change."
    )
    address = next(line for line in readme.split("\n\n") if line.startswith("A feature has one"))
    yield _plain(address)
    yield "What has been tested on what:"
    yield _section(readme, "What has been tested on what")
    yield _plain(_section(readme, "The notice").split("\n\n")[0])


def _section(page: str, heading: str) -> str:
    """The text below a heading of the second level, up to the next."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    if found is None:
        raise ValueError(f"there is no heading {heading!r}")
    return found[1].strip()


def _uses(readme: str) -> Iterator[str]:
    """The rows of the README's table: what one wants, what to use, what to read."""
    for line in _section(readme, "What is here").splitlines():
        cells = re.split(r"\s*\|\s*", line.strip("| "))
        if len(cells) != 3 or (page := re.search(r"\]\((.+?)\)", cells[2])) is None:
            continue
        use = f" ({cells[1]})" if cells[1] else ""
        yield f"- [{page[1]}]({page[1]}): {cells[0]}{use}"


def _pages(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "docs").glob("*.md")):
        yield path.relative_to(root).as_posix(), _title(path.read_text("utf-8"))


# --- from the code -------------------------------------------------------------------------------


def _notebooks(root: Path) -> Iterator[str]:
    for path in sorted((root / "examples").glob("*.ipynb")):
        first = "".join(json.loads(path.read_text("utf-8"))["cells"][0]["source"])
        place = path.relative_to(root).as_posix()
        yield f"- [{place}]({place}): {first.splitlines()[0].removeprefix('# ')}"


def _verbs() -> Iterator[str]:
    for section, verbs in SECTIONS.items():
        yield from (f"- `qsl {verb}`: {what} ({section})" for verb, what in verbs.items())


def _doors() -> Iterator[str]:
    """Each door with its public names, in the order of the stub."""
    for stub in sorted(PACKAGE.rglob("__init__.pyi")):
        tree = ast.parse(stub.read_text("utf-8"))
        names = [
            alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ]
        room = ".".join(stub.parent.relative_to(ROOT).parts)
        doc = ast.get_docstring(ast.parse((stub.parent / "__init__.py").read_text("utf-8"))) or ""
        listed = f": {', '.join(f'`{name}`' for name in names)}" if names else ""
        yield f"- `{room}` - {doc.splitlines()[0].rstrip('.')}{listed}"


def _targets(root: Path) -> Iterator[str]:
    """The commands of CONTRIBUTING and the other targets that the Makefile names as such."""
    makefile = (root / "Makefile").read_text("utf-8")
    named = re.search(r"^\.PHONY: (.+)$", makefile, re.M)
    told = dict(
        re.findall(r"^make ([\w-]+)\s+# (.+)$", (root / "CONTRIBUTING.md").read_text("utf-8"), re.M)
    )
    for target in named[1].split() if named else ():
        yield f"make {target:10} # {told[target]}" if target in told else f"make {target}"


def main() -> int:
    for name, make in FILES.items():
        with whole_file(ROOT / name) as partial:
            partial.write_text(make(), "utf-8")
        print(f"written: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
