"""Convert OpenInterpretability's Qwen3.6-27B safetensors to SAELens folders.

    # needs the hub:
    qsl convert openinterp-to-saelens --out converted/ --sae-folder downloads/
    qsl convert openinterp-to-saelens qwen3.6-27b/w40k-l0-128 --out converted/

The model cards do not say whether these SAEs subtract `b_dec` before encoding. Convert them, run
`qsl verify`, and if its report says that they do, convert them again with `--subtract-b-dec`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_scope_lens.catalog import THIRD_PARTY_GROUPS, Group, find_group
from qwen_scope_lens.converters import official_to_saelens
from qwen_scope_lens.errors import UnknownName
from qwen_scope_lens.saes.locate import HubOptions

if TYPE_CHECKING:
    from qwen_scope_lens.saes.load import Dtype

__all__ = ["convert"]

GROUP = THIRD_PARTY_GROUPS[0]
"""The group that is converted if none is named."""


def convert(
    out: str | os.PathLike[str],
    *,
    subtract_b_dec: bool = False,
    layers: Sequence[int] | None = None,
    folder: str | os.PathLike[str] | None = None,
    hub: HubOptions | None = None,
    dtype: Dtype = "float32",
    overwrite: bool = False,
    progress: bool = True,
    group: str | None = None,
) -> list[Path]:
    """Convert all layers of a group, or some of them, and return their folders.

    `group` is the name of one of the publisher's groups. Without a name it is `GROUP`.
    """
    return official_to_saelens.convert(
        _group(group),
        out,
        layers=layers,
        folder=folder,
        hub=hub,
        dtype=dtype,
        overwrite=overwrite,
        apply_b_dec_to_input=subtract_b_dec,
        progress=progress,
    )


def _group(name: str | None) -> Group:
    row = GROUP if name is None else find_group(name)
    if row is not GROUP and row not in THIRD_PARTY_GROUPS:
        raise UnknownName(
            f"{row.short} is not a group of this publisher: expected one of"
            f" {', '.join(group.short for group in THIRD_PARTY_GROUPS)}; `qsl convert"
            " official-to-saelens` takes the other groups"
        )
    return row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from qwen_scope_lens.cli import inputs
    from qwen_scope_lens.cli.inputs import Input

    parser.add_argument(
        "group",
        nargs="?",
        action=Input,
        check=inputs.group,
        help=f"the name of a group (default: {GROUP.short})",
    )
    official_to_saelens.add_common_arguments(parser, _layers)
    parser.add_argument(
        "--subtract-b-dec", action="store_true", help="the SAEs subtract b_dec before encoding"
    )


def _layers(layers: list[int], arguments: argparse.Namespace) -> None:
    for layer in layers:
        find_group(arguments.group or GROUP.short).check_layer(layer)


def run(arguments: argparse.Namespace) -> int:
    folders = convert(
        arguments.out,
        subtract_b_dec=arguments.subtract_b_dec,
        group=arguments.group,
        **official_to_saelens.common_options(arguments),
    )
    print("\n".join(map(str, folders)))
    return 0


if __name__ == "__main__":
    from qwen_scope_lens.cli.verbs import run_alone

    sys.exit(run_alone(__doc__, add_arguments, run))
