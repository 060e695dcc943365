"""List the groups of SAEs that have a name: the official fourteen, third-party ones, your own.

Any of the names works everywhere; the short form is the first part of every address, such as
qwen3-8b-base/w64k-l0-50/20 (a layer) or qwen3-8b-base/w64k-l0-50/20/6159 (a feature).
"""

from __future__ import annotations

import argparse
import dataclasses

from qwen_scope_lens.catalog import GROUPS, Group, local_groups
from qwen_scope_lens.cli.options import add_json, print_json, remark, show
from qwen_scope_lens.cli.show import layers_in_words, size
from qwen_scope_lens.cli.terminal import plain
from qwen_scope_lens.errors import WrongSettings
from qwen_scope_lens.tables import Table

HEADINGS: tuple[str, ...] = (
    "GROUP",
    "BACKBONE",
    "LAYERS",
    "D_MODEL",
    "WIDTH",
    "K",
    "PER LAYER",
    "RELEASE",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    try:
        groups = (*GROUPS, *local_groups())
    except WrongSettings as error:
        remark(plain(f"qsl list: your own SAEs are left out: {error}"))
        groups = GROUPS
    if arguments.json:
        rows = [{"short": one.short, **dataclasses.asdict(one)} for one in groups]
        print_json(arguments.json, {"rows": rows})
        return 0
    show(Table.of(HEADINGS, map(_row, groups)))
    files = sum(len(group.layers) for group in groups if group.origin == "official")
    remark(f"\n{files} official files. `qsl show GROUP` shows sizes, memory and the notice.")
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
