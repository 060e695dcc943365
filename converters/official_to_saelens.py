"""Convert published layer files to SAELens folders, which load anywhere without this package.

    qsl convert official-to-saelens mini-qwen3/w1k-l0-16 --out converted/ --layers 6
    # needs the hub:
    qsl convert official-to-saelens qwen3-8b-base/w64k-l0-50 --out converted/ --layers 18-22

Each layer becomes a folder `OUT/<repository name>/layer{n}/`, so `QWEN_SCOPE_HOME=OUT` finds it.
W_dec is stored row-major, so that a few feature directions can be read from a few kilobytes.
Float32 is kept bit by bit. A folder is written whole or not at all, so a run that was killed can be
started again and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import Group, find_group
from qwen_scope_lens.errors import CannotWrite, CheckpointError
from qwen_scope_lens.files import exclusive, whole_file, whole_folder
from qwen_scope_lens.saes.locate import (
    CONFIG_NAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    HubOptions,
    LayerFile,
    locate,
    read_config,
)
from qwen_scope_lens.version import __version__

if TYPE_CHECKING:  # torch and SAELens take seconds, and `--help` shall not wait for them
    from qwen_scope_lens.saes.load import Dtype

__all__ = ["convert"]


def convert(
    group: str | Group,
    out: str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    folder: str | os.PathLike[str] | None = None,
    hub: HubOptions | None = None,
    dtype: Dtype = "float32",
    overwrite: bool = False,
    apply_b_dec_to_input: bool | None = None,
    progress: bool = True,
) -> list[Path]:
    """Convert layers of a group (all by default) to SAELens's layout, and return their folders.

    Layer n goes into `out/REPOSITORY/layer{n}`. `folder` is a local copy of the published files.
    `apply_b_dec_to_input=None` keeps what the group's row says.
    A layer that is already there, with the same dtype, convention and revision, is left as it is,
    and its source is not read again. With `overwrite` the whole folder of the layer is replaced.
    """
    from qwen_scope_lens.saes.load import build_config, check_dtype

    dtype = check_dtype(dtype)
    row = find_group(group) if isinstance(group, str) else group
    wanted = [row.check_layer(layer) for layer in (row.layers if layers is None else layers)]
    root = Path(out) / row.repo_name
    done = []
    with exclusive(root):
        for layer in wanted:
            target = root / f"layer{layer}"
            ref = LayerRef(row.short, layer)
            config = build_config(ref, dtype=dtype)
            config["architecture"] = "topk"
            config["metadata"]["converted_by"] = f"qwen-scope-lens {__version__}"
            if apply_b_dec_to_input is not None:
                config["apply_b_dec_to_input"] = apply_b_dec_to_input
            if overwrite or not _is_done(target, config, hub.revision if hub else None):
                file = locate(ref, folder, hub, published=True)
                config["metadata"]["revision"] = file.revision
                _convert_layer(file, target, config, progress)
                if file.config is not None and not (root / CONFIG_NAME).exists():
                    with whole_file(root / CONFIG_NAME) as partial:
                        shutil.copyfile(file.config, partial)
            done.append(target)
    return done


def _is_done(target: Path, config: dict[str, Any], revision: str | None) -> bool:
    if not target.exists():
        return False
    import torch

    try:
        found = read_config(target / SAE_CFG_FILENAME)
        size = (target / SAE_WEIGHTS_FILENAME).stat().st_size
    except (CheckpointError, OSError) as error:
        raise CannotWrite(
            f"{target} exists and is not a converted layer ({error}): choose another --out, or pass"
            " --overwrite"
        ) from error
    wanted = {
        name: config[name]
        for name in ("architecture", "d_in", "d_sae", "k", "dtype", "apply_b_dec_to_input")
    }
    if revision is not None:
        wanted["revision"] = revision
        metadata = found.get("metadata")
        found["revision"] = metadata.get("revision") if isinstance(metadata, dict) else None
    least = 2 * config["d_in"] * config["d_sae"] * getattr(torch, config["dtype"]).itemsize
    for name, value in wanted.items():
        if found.get(name) != value or size < least:
            raise CannotWrite(
                f"{target} exists and holds something else ({name}: expected {value!r}, found"
                f" {found.get(name)!r:.60}; {size:,} bytes of weights): choose another --out, or"
                " pass --overwrite"
            )
    return True


def _convert_layer(
    file: LayerFile, target: Path, config: dict[str, object], progress: bool
) -> None:
    import torch
    from tqdm import tqdm

    from qwen_scope_lens.converters.saelens_folder import write_saelens_folder

    dtype = getattr(torch, str(config["dtype"]))
    total = 2 * file.group.d_sae * file.group.d_model * dtype.itemsize
    with (
        tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc=str(file.ref),
            disable=not progress,
            file=sys.stderr,
        ) as bar,
        whole_folder(target) as partial,
    ):
        write_saelens_folder(partial, file, config, dtype, bar.update)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from qwen_scope_lens.cli import inputs
    from qwen_scope_lens.cli.inputs import Input

    parser.add_argument(
        "group",
        metavar="GROUP",
        action=Input,
        check=inputs.group,
        help="any name of a group; see `qsl list`",
    )
    add_common_arguments(parser, _layers)


def _layers(layers: list[int], arguments: argparse.Namespace) -> None:
    for layer in layers:
        find_group(arguments.group).check_layer(layer)


def add_common_arguments(
    parser: argparse.ArgumentParser, check: Callable[[Any, argparse.Namespace], object]
) -> None:
    """The arguments that both converters to SAELens folders take; `check` looks at the layers."""
    from qwen_scope_lens.cli.options import add_layers, add_sae_files

    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    add_layers(parser, "such as 0-3,7 (default: all)", check=check)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="the dtype of the result",
    )
    add_sae_files(parser, revision=True)
    parser.add_argument("--overwrite", action="store_true", help="replace layers that exist")


def common_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_common_arguments`, as keywords of `convert`."""
    return {
        "layers": arguments.layers,
        "folder": arguments.sae_folder,
        "hub": HubOptions(arguments.revision),
        "dtype": arguments.dtype,
        "overwrite": arguments.overwrite,
    }


def run(arguments: argparse.Namespace) -> int:
    folders = convert(arguments.group, arguments.out, **common_options(arguments))
    print("\n".join(map(str, folders)))
    return 0


if __name__ == "__main__":
    from qwen_scope_lens.cli.verbs import run_alone

    sys.exit(run_alone(__doc__, add_arguments, run))
