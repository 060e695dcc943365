"""Argument types that several verbs share."""

from __future__ import annotations

import argparse

__all__ = ["layer_list"]

MOST_LAYERS = 10_000


def layer_list(text: str) -> list[int]:
    """`0-3,7` -> [0, 1, 2, 3, 7]"""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of layers such as 0-3,7")
        low, high = int(first), int(last) if dash else int(first)
        if high > MOST_LAYERS:
            raise argparse.ArgumentTypeError(f"{part!r}: no model has so many layers")
        if high < low:
            raise argparse.ArgumentTypeError(f"{part!r} runs backwards")
        layers += range(low, high + 1)
    return list(dict.fromkeys(layers))
