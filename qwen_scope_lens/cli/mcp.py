"""Tools for a language-model agent, over MCP (the Model Context Protocol) on standard input/output.

    qsl mcp                                              # the toy model, no download
    qsl mcp --folder store/ --labels texts/labels.jsonl
    # needs the hub:
    qsl mcp --sae qwen3-8b-base/w64k-l0-50 --layers 12,20 --device cuda --folder stores/

An agent's program starts this itself: it takes requests as lines of JSON and ends when its input
ends. The tools are about, read, feature, search, steer and query; docs/mcp.md shows how programs
are told of them. `query` opens feature stores in the folders that --folder names (it may be given
again), and nothing outside of them; without --folder there is no store. Nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli import plan_options as plans
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    add_labels,
    add_layers,
    add_model,
    read_labels,
    remark,
)
from qwen_scope_lens.errors import BadFile
from qwen_scope_lens.extras import check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--sae",
        default="mini-qwen3/w1k-l0-16",
        action=Input,
        check=inputs.group,
        help="group (%(default)s)",
    )
    add_layers(
        parser,
        "the layers that are read when an agent names none; default: the middle one",
        check=inputs.group_layers,
    )
    add_labels(parser, "JSON lines: address, text, score, provenance")
    parser.add_argument(
        "--folder",
        type=Path,
        action=Input,
        repeated=True,
        check=_folder,
        default=[],
        metavar="FOLDER",
        help="where feature stores may be read; again for more",
    )
    parser.add_argument("--sae-folder", type=Path, help="read the SAEs' files from here only")
    plans.add_allowance(parser)


def run(arguments: argparse.Namespace) -> int:
    group = find_group(arguments.sae)
    check("mcp", "mcp")

    from qwen_scope_lens.labels.packs import LabelPack
    from qwen_scope_lens.mcp.folders import Folders
    from qwen_scope_lens.mcp.server import make_server
    from qwen_scope_lens.mcp.toolbox import Toolbox

    remark(group.notice)
    if sys.stdin.isatty():
        remark("Waiting for an agent's program on standard input (Ctrl-C ends it).")
    toolbox = Toolbox(
        group,
        tuple(arguments.layers or [group.layers[len(group.layers) // 2]]),
        arguments.model or group.backbone.model_id,
        read_labels(arguments.labels) or LabelPack(),
        Folders.of(arguments.folder),
        arguments.sae_folder,
        arguments.device,
        arguments.allow_other_model,
    )
    make_server(toolbox).run()
    return 0


def _folder(path: Path, _: argparse.Namespace) -> None:
    if not path.expanduser().is_dir():
        raise BadFile(f"there is no folder {path}")
