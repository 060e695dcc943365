"""Flag the sentences that the style of this project does not want: `python -m tools.docs.prose`.

It reads the README, the pages in docs/, and every docstring and comment of the Python files. A
pattern is a habit that made readers stop, with what to write instead.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Finding", "findings"]

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("qwen_scope_lens", "converters", "tools", "tests", "benchmarks", "examples")

UNITS = "features|tokens|bytes|examples|seconds|documents|texts|layers|rows|words"
PER = "token|feature|document|step|layer|text|language|class|row|group|prompt|seed"

PATTERNS = {
    r"(?<![Tt]here )\bis no (?!longer\b|more than\b|better than\b|such\b)": 'say "is not a"',
    r"(?<![Tt]here )\bare no (?!longer\b|more than\b|such\b)": 'say "are not"',
    rf"\b(?:{UNITS}) an? (?:{PER})\b": 'say "per"',
}


class Finding(NamedTuple):
    place: str
    words: str
    instead: str

    def __str__(self) -> str:
        return f"{self.place}: {self.words!r}: {self.instead}"


def findings(root: Path = ROOT) -> Iterator[Finding]:
    """Every place where a person reads one of the patterns."""
    for page in (
        root / "README.md",
        root / "CONTRIBUTING.md",
        *sorted((root / "docs").glob("*.md")),
    ):
        text = re.sub(
            r"```.*?```|`[^`\n]*`",
            lambda m: "\n" * m[0].count("\n"),
            page.read_text("utf-8"),
            flags=re.S,
        )
        yield from _found(page.relative_to(root).as_posix(), 1, text)
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("*.py")):
            name = file.relative_to(root).as_posix()
            for line, text in _prose(file.read_text(encoding="utf-8")):
                yield from _found(name, line, text)


def _found(name: str, first: int, text: str) -> Iterator[Finding]:
    for pattern, instead in PATTERNS.items():
        for match in re.finditer(pattern, text):
            line = first + text.count("\n", 0, match.start())
            yield Finding(f"{name}:{line}", text[match.start() : match.end() + 12], instead)


def _prose(source: str) -> Iterator[tuple[int, str]]:
    """Comments, and strings that stand alone, with their line."""
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        alone = token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT)
        if token.type == tokenize.COMMENT or alone:
            text = re.sub(r"`[^`\n]*`|^(?: {4})+\w.*  #|\[[^\]\n]*\]", "", token.string)
            yield token.start[0], text
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.DEDENT):
            before = token.type


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    found = list(findings())
    print(*found, sep="\n")
    sys.exit(bool(found))
