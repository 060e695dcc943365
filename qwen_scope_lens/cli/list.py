"""List the groups of SAEs that have a name: the official fourteen, third-party ones, your own.

Any of the names works everywhere; the short form is the first part of every address, such as
qwen3-8b-base/w64k-l0-50/20 (a layer) or qwen3-8b-base/w64k-l0-50/20/6159 (a feature).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from qwen_scope_lens.catalog import GROUPS, Group, local_groups
from qwen_scope_lens.cli.show import layers_in_words, size
from qwen_scope_lens.cli.terminal import plain
from qwen_scope_lens.errors import WrongSettings

HEADINGS: tuple[str, ...] = (
    "GROUP",
    "BACKBONE",
    "LAYERS",
    "D_MODEL",
    "WIDTH",
    "K",
    "A LAYER",
    "RELEASE",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="every field of every row")


def run(arguments: argparse.Namespace) -> int:
    try:
        groups = (*GROUPS, *local_groups())
    except WrongSettings as error:
        print(plain(f"qsl list: your own SAEs are left out: {error}"), file=sys.stderr)
        groups = GROUPS
    if arguments.json:
        print(json.dumps([{"short": g.short, **dataclasses.asdict(g)} for g in groups], indent=2))
        return 0
    rows = [HEADINGS, *(tuple(map(plain, _row(group))) for group in groups)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    files = sum(len(group.layers) for group in groups if group.origin == "official")
    print(f"\n{files} official files. `qsl show GROUP` tells sizes, memory and the notice.")
    return 0


def _row(group: Group) -> tuple[str, ...]:
    kind = ("MoE" if group.backbone.is_moe else "dense") + f", {group.backbone.tuning}"
    if group.origin != "official":
        kind += f", {group.origin}"
    return (
        group.short,
        kind,
        layers_in_words(group),
        str(group.d_model),
        str(group.d_sae),
        str(group.k),
        size(group.bytes_per_layer),
        group.release,
    )
