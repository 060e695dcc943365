"""What a reader copies: the blocks of the README, of the pages in `docs/` and of the help texts.

A block of `python` or `bash` runs as it stands, in the order of its page. What cannot run here is
below a line that says why, which readers see, too:

    # needs the hub: 16 GB of weights
    qsl steer "Tell me about tea." --model Qwen/Qwen3-8B ...

A block of `output` is what the block before it prints. A command whose line ends in a comment
`# until Ctrl-C` is a server: it is stopped as soon as it answers.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from qwen_scope_lens.cli.verbs import VERBS

__all__ = ["Block", "Page", "commands", "help_pages", "parser_of", "read_page", "read_pages"]

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"^# needs (?P<what>\S.*?):?$", re.MULTILINE)
SERVER = "# until Ctrl-C"
COMMENT = re.compile(r"(?:^|(?<=\s))#.*", re.MULTILINE)
REDIRECTION = re.compile(r"(?<=\s)[12]?>(?:&1)?")
OPERATORS = ";|&()<>\n"


@dataclass(frozen=True)
class Block:
    """A block of code. `start` and `end` are the places of `text` in the page's text."""

    page: str
    line: int
    language: str
    text: str
    start: int = 0
    end: int = 0

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> str:
        """What runs here: all of it, or what is above the line that says what the rest needs."""
        found = NEEDS.search(self.text)
        return (self.text if found is None else self.text[: found.start()]).strip("\n")

    @property
    def marked(self) -> str:
        """What does not run here."""
        found = NEEDS.search(self.text)
        return "" if found is None else self.text[found.end() :].strip("\n")

    @property
    def needs(self) -> str:
        """What `marked` needs; empty where everything runs."""
        return ", ".join(found["what"] for found in NEEDS.finditer(self.text))


@dataclass(frozen=True)
class Page:
    """A page, or the help text of a verb."""

    name: str
    blocks: tuple[Block, ...]
    path: Path | None = None

    @property
    def code(self) -> list[Block]:
        return [block for block in self.blocks if block.language in ("python", "bash")]


def read_page(path: Path) -> Page:
    """The blocks of a page in Markdown."""
    text = path.read_text("utf-8")
    blocks = [
        Block(
            path.name,
            text.count("\n", 0, found.start()) + 1,
            found["language"],
            found["text"],
            found.start("text"),
            found.end("text"),
        )
        for found in FENCE.finditer(text)
    ]
    return Page(path.name, tuple(blocks), path)


def read_pages(root: Path) -> list[Page]:
    """The README and every page in `docs/`."""
    return [read_page(path) for path in (root / "README.md", *sorted((root / "docs").glob("*.md")))]


def help_pages() -> list[Page]:
    """The examples of every help text, a page per verb, in the order of `qsl --help`."""
    return [
        Page(f"qsl {verb}", tuple(_examples([verb], parser_of(verb), f"qsl {verb}")))
        for verb in VERBS
    ]


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser of a verb, whose description is its help text."""
    module = import_module(f"qwen_scope_lens.cli.{verb.replace('-', '_')}")
    parser = argparse.ArgumentParser(f"qsl {verb}", description=module.__doc__)
    module.add_arguments(parser)
    return parser


def _examples(words: list[str], parser: argparse.ArgumentParser, page: str) -> Iterator[Block]:
    for part in (parser.description or "").split("\n\n"):
        lines = part.strip("\n").splitlines()
        if lines and all(line.startswith("    ") for line in lines):
            language = "bash" if lines[0].lstrip().startswith(("qsl ", "# needs ")) else ""
            text = "\n".join(line[4:] for line in lines)
            yield Block(f"qsl {' '.join(words)}", 1, language, text)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from _examples([*words, name], below, page)


def commands(script: str) -> list[list[str]]:
    """The words of each `qsl` command in a piece of shell, without comments and redirections."""
    script = REDIRECTION.sub(" > ", COMMENT.sub("", script.replace("\\\n", " ")))
    lexer = shlex.shlex(script, posix=True, punctuation_chars=OPERATORS)
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t", "", True
    found: list[list[str]] = []
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if not set(word) <= set(OPERATORS):
            words.append(word)
            continue
        if "qsl" in words:
            found.append(words[words.index("qsl") + 1 :])
        words = []
    return found
