"""Argument types that several verbs share."""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path

from qwen_scope_lens.files import refuse_target

__all__ = [
    "count",
    "finite",
    "from_zero",
    "layer_list",
    "memory",
    "output",
    "port",
    "positive",
    "rank",
    "share",
]

MOST_LAYERS = 10_000
LAST_PORT = 65_535
MOST = 2**63 - 1
"""The largest whole number that all libraries behind the verbs take, such as for a seed."""


def layer_list(text: str) -> list[int]:
    """`0-3,7` -> [0, 1, 2, 3, 7]"""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r:.60} is no list of layers such as 0-3,7")
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
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no size such as 8GB or 500MB")
    powers = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    return int(float(found[1]) * 1000 ** powers[found[2].upper()])


def rank(text: str) -> tuple[int, int]:
    """`0/4` -> (0, 4)"""
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if found is None or len(text) > 30 or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no part such as 0/4, 1/4, 2/4 or 3/4")
    return int(found[1]), int(found[2])


def count(text: str) -> int:
    """A whole number from 1: of tokens, documents, features, ..."""
    return _whole(text, 1)


def from_zero(text: str) -> int:
    """A whole number from 0: a layer, a seed, rows that may be none."""
    return _whole(text, 0)


def port(text: str) -> int:
    """A TCP port."""
    number = _whole(text, 0)
    if number > LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r}: a port is 0 to {LAST_PORT}")
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


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no share: expected a number from 0 to 1")
    return number


def output(text: str) -> Path:
    """A file to be written: what cannot be one is refused before the work, not after it."""
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
