"""Options that several words of `qsl bench` share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.cli.options import from_zero

if TYPE_CHECKING:
    from qwen_scope_lens.bench.prompts import PromptFormat

__all__ = ["add_prompt_format", "add_reading", "prompt_format", "say", "say_nothing", "show"]


def add_reading(parser: argparse.ArgumentParser, position: str = "last") -> None:
    """Where in the stores to read."""
    parser.add_argument("--layer", type=from_zero, help="default: the last one extracted")
    parser.add_argument(
        "--position",
        default=position,
        help="token of the prompt: last, -2, -3, ... or any (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_prompt_format(parser: argparse.ArgumentParser) -> None:
    """How a row of a file becomes a prompt."""
    parser.add_argument(
        "--column", help="that holds the prompt (default: prompt, question or text)"
    )
    parser.add_argument("--template", help="such as 'Q: {question}\\nA. {choices[0]}\\nAnswer:'")
    parser.add_argument("--split", help="of a Hugging Face data set")
    parser.add_argument("--chat", action="store_true", help="as a user's message, chat template on")


def prompt_format(arguments: argparse.Namespace) -> PromptFormat:
    from qwen_scope_lens.bench.prompts import PromptFormat

    template = arguments.template
    if template is not None:  # a shell hands over \n as two characters
        template = template.replace("\\n", "\n")
    return PromptFormat(arguments.column, template, arguments.chat, arguments.split)


def say(line: str) -> None:
    print(line, file=sys.stderr)


def say_nothing(line: str) -> None:
    pass


def show(columns: Sequence[str], rows: Sequence[Sequence[Any]], as_json: bool = False) -> None:
    """A table for people, or its rows as JSON objects."""
    if as_json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows],
                         ensure_ascii=False, indent=1))  # fmt: skip
        return
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    right = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows)
             for i in range(len(columns))]  # fmt: skip
    for line in (list(columns), *cells):
        parts = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)
        ]
        print("  ".join(parts).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
