"""What several verbs take: types of arguments, and groups of options (a model, layers, a table).

Imports nothing heavy: `qsl VERB --help` answers at once. `inputs.py` checks what a verb reads.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.files import is_url, json_text, refuse_target

if TYPE_CHECKING:
    from qwen_scope_lens.labels.packs import LabelPack
    from qwen_scope_lens.tables import Table

__all__ = [
    "Word",
    "add_group",
    "add_json",
    "add_labels",
    "add_layer",
    "add_layers",
    "add_model",
    "add_old",
    "add_quiet",
    "add_reader_tokens",
    "add_sae_files",
    "add_store",
    "add_words",
    "count",
    "finite",
    "from_zero",
    "layer_list",
    "memory",
    "not_negative",
    "old_spellings",
    "output",
    "place",
    "port",
    "positive",
    "print_json",
    "read_labels",
    "remark",
    "seed",
    "share",
    "show",
    "worker",
]

MOST_LAYERS = 10_000
LAST_PORT = 65_535
MOST = 2**63 - 1
"""The largest whole number that all libraries behind the verbs take."""

OWN_MODEL = "a folder, or a name on the hub; default: the model that the SAEs were trained on"

Parser = argparse.ArgumentParser | argparse._ArgumentGroup


# --- words of a verb, such as `match` in `qsl compare match` -------------------------------------


@dataclass(frozen=True)
class Word:
    """One of the words of a verb. The docstring of `run` is the word's help; in it %(prog)s is the
    command that was asked, because a word may stand under two verbs."""

    name: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]


def add_words(parser: argparse.ArgumentParser, words: Sequence[Word], dest: str = "word") -> None:
    """The verb needs one of the words, and `arguments.run_word(arguments)` runs it.

    Words that have words of their own name theirs by another `dest`.
    """
    choices = parser.add_subparsers(dest=dest, required=True, metavar="WORD")
    for word in words:
        doc = cleandoc(word.run.__doc__ or "")
        one = choices.add_parser(
            word.name,
            help=doc.splitlines()[0].replace("%", "%%"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.description = doc.replace("%(prog)s", one.prog)
        word.add_arguments(one)
        add_quiet(one)
        one.set_defaults(**{f"run_{dest}": word.run})


# --- groups of options ---------------------------------------------------------------------------


def add_model(
    parser: Parser,
    help: str = OWN_MODEL,
    *,
    required: bool = False,
    device: bool = True,
    dtype: bool = False,
) -> None:
    """Which model runs, where, and in which number format."""
    parser.add_argument("--model", action=Input, check=inputs.model, required=required, help=help)
    if dtype:
        parser.add_argument("--dtype", choices=inputs.DTYPES, help="default: the checkpoint's")
    if device:
        parser.add_argument(
            "--device",
            action=Input,
            check=inputs.device,
            help="cpu, cuda, cuda:1, ...; default: cpu",
        )


def add_sae_files(parser: Parser, *, revision: bool = False) -> None:
    """Where the files of the SAEs come from."""
    parser.add_argument("--sae-folder", type=Path, help="read the SAEs' files from here only")
    add_old(parser, "--folder", "--sae-folder")
    if revision:
        parser.add_argument("--revision", help="commit, tag or branch of the SAEs on the hub")


def add_layers(
    parser: Parser,
    help: str = "such as 12,20 or 0-7; default: all that the store has",
    *,
    required: bool = False,
    check: inputs.Check = inputs.stored_layers,
) -> None:
    """`check` says where the layers have to be; by default in the store that is named."""
    parser.add_argument(
        "--layers", type=layer_list, action=Input, check=check, required=required, help=help
    )


def add_layer(
    parser: Parser,
    help: str = "one layer; default: the last one that is stored",
    *,
    check: inputs.Check = inputs.stored_layers,
) -> None:
    """For verbs that look at one layer only."""
    parser.add_argument(
        "--layers", dest="layer", type=from_zero, action=Input, check=check, help=help
    )
    add_old(parser, "--layer", "--layers")


def add_old(parser: Parser, old: str, new: str) -> None:
    """An older spelling of an option: it works, and is not in the help."""
    parser._option_string_actions[old] = parser._option_string_actions[new]


def old_spellings(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, words: Sequence[str]
) -> Iterator[str]:
    """What to say about the older spellings among the words of a command line."""
    given = {word.partition("=")[0] for word in words}
    for name, action in parser._option_string_actions.items():
        if name in given and name not in action.option_strings:
            yield f"{name} is now called {action.option_strings[0]}; the older spelling will go"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = action.choices[getattr(arguments, action.dest)]
            yield from old_spellings(below, arguments, words)


def add_labels(
    parser: Parser, help: str = "a label pack, to show what features mean", name: str = "--labels"
) -> None:
    parser.add_argument(name, type=Path, action=Input, check=inputs.labels, help=help)


def place(text: str) -> Path | str:
    """A path, or a URL as it is."""
    return text if is_url(text) else inputs.path(text)


def add_store(parser: Parser, help: str = "a feature store, from `qsl extract`") -> None:
    parser.add_argument(
        "store", type=place, metavar="STORE", action=Input, check=inputs.store, help=help
    )


def add_group(
    parser: Parser, help: str = "such as qwen3-8b-base/w64k-l0-50", required: bool = True
) -> None:
    """The group of SAEs whose features a verb computes."""
    parser.add_argument(
        "--sae", required=required, metavar="GROUP", action=Input, check=inputs.group, help=help
    )


def add_reader_tokens(parser: Parser) -> None:
    parser.add_argument(
        "--all-tokens",
        action="store_true",
        help="count the first token and tokens of extreme norm, too",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """`arguments.json` is the name of the format, such as `qsl-label-list`, or None."""
    parser.add_argument(
        "--json",
        action="store_const",
        const=parser.prog.replace(" ", "-"),
        help="print JSON, with its format and version, instead of a table",
    )


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Every verb and every word has it; `qsl label --quiet list` and `qsl label list --quiet`."""
    parser.add_argument(
        "--quiet",
        action="store_true",
        default=argparse.SUPPRESS,
        help="only results and errors: no progress, no remarks",
    )


# --- what verbs print and read -------------------------------------------------------------------


def show(table: Table, json: str | None = None, most: int | None = None, **facts: Any) -> None:
    """A table for people, or JSON of the format `json`: all rows as objects, and other facts."""
    if json:
        print_json(json, {**facts, "rows": table.records()})
    else:
        print(table.text(most))


def print_json(format: str, content: Mapping[str, Any], version: int = 1) -> None:
    """JSON as our files have it, with its format and version."""
    from qwen_scope_lens.tables import plain

    print(json_text(format, version, plain(content)), end="")


def remark(line: str) -> None:
    """On the error stream: what a person should know, and what is not the answer."""
    print(line, file=sys.stderr)


def read_labels(path: Path | None) -> LabelPack | None:
    from qwen_scope_lens.labels.packs import LabelPack

    return None if path is None else LabelPack.read(path)


# --- types of arguments --------------------------------------------------------------------------


def layer_list(text: str) -> list[int]:
    """`0-3,7` -> [0, 1, 2, 3, 7]"""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r:.60} is not a list of layers such as 0-3,7")
        if max(len(first), len(last)) > len(str(MOST_LAYERS)):
            raise argparse.ArgumentTypeError(f"{part!r:.60}: no model has so many layers")
        low, high = int(first), int(last) if dash else int(first)
        if high > MOST_LAYERS:
            raise argparse.ArgumentTypeError(f"{part!r}: no model has so many layers")
        if high < low:
            raise argparse.ArgumentTypeError(f"{part!r} runs backwards")
        layers += range(low, high + 1)
    return list(dict.fromkeys(layers))


def memory(text: str) -> int:
    """`8GB` -> 8_000_000_000; also MB, and a plain number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text.strip(), re.IGNORECASE)
    if found is None or len(found[1]) > 30:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a size such as 8GB or 500MB")
    powers = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    return int(float(found[1]) * 1000 ** powers[found[2].upper()])


def worker(text: str) -> tuple[int, int]:
    """`0/4` -> (0, 4): the first of four workers"""
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if found is None or len(text) > 30 or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a part such as 0/4, 1/4, 2/4 or 3/4")
    return int(found[1]), int(found[2])


def count(text: str) -> int:
    """A whole number from 1: of tokens, documents, features, ..."""
    return _whole(text, 1)


def from_zero(text: str) -> int:
    """A whole number from 0: a layer, a seed, or a count that may be 0."""
    return _whole(text, 0)


def port(text: str) -> int:
    """A TCP port."""
    number = _whole(text, 0)
    if number > LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r}: a port is 0 to {LAST_PORT}")
    return number


def seed(text: str) -> int:
    """A whole number of 32 bits, which every random generator takes."""
    number = from_zero(text)
    if number >= 2**32:
        raise argparse.ArgumentTypeError(
            f"a seed of {number.bit_length()} bits: expected 32 bits or fewer"
        )
    return number


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r:.60}: expected a finite number")
    return number


def positive(text: str) -> float:
    """A finite number above 0."""
    number = finite(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: expected a number above 0")
    return number


def not_negative(text: str) -> float:
    """A finite number of 0 or more."""
    number = finite(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: expected a number of 0 or more")
    return number


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r:.60} is not a share: expected a number from 0 to 1"
        )
    return number


def output(text: str) -> Path:
    """A file to be written. A path that cannot be one is refused before the work, not after it."""
    try:
        path = Path(text).expanduser()
        if path.is_dir() or text.endswith(os.sep):
            raise argparse.ArgumentTypeError(f"{text!r} is a folder: expected the name of a file")
        there = next(parent for parent in path.absolute().parents if parent.exists())
        if not there.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r}: {str(there)!r} is a file")
        refuse_target(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error}") from error
    return path


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= MOST:
        raise argparse.ArgumentTypeError(
            f"{text!r:.60}: expected a whole number of {least} or more, and below 2^63"
        )
    return number
