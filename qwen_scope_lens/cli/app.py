"""`qsl app`: read, compare and steer in a browser, on this machine.

    qsl app                            # until Ctrl-C; on the toy model, no download
    qsl app --site site/ --labels texts/labels.jsonl    # until Ctrl-C; with every feature's page
    # needs the hub:
    qsl app --model Qwen/Qwen3-8B-Base --sae qwen3-8b-base/w64k-l0-50 --layers 16-20

Read shows the features on every token, in every layer that is chosen. Compare shows those that tell
two texts apart. Steer writes with and without a plan, side by side, and warns when a plan breaks
the language. Plans are saved as JSON for `qsl steer --plan`. Visitors share the model and nothing
else. The app sends nothing to other machines. --host makes it visible to them, and it has no
password.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import islice
from pathlib import Path

from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    add_labels,
    add_layers,
    add_model,
    add_sae_files,
    count,
    port,
    read_labels,
    remark,
)
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
        "the layers that are chosen at first; default: the middle one",
        check=inputs.group_layers,
    )
    add_labels(parser, "JSON lines: address, text, score, provenance")
    parser.add_argument(
        "--site",
        type=Path,
        action=Input,
        check=inputs.site,
        help="what `qsl dash build` wrote, to link to",
    )
    add_sae_files(parser)
    parser.add_argument(
        "--sae-cache-max", type=count, default=8, help="SAEs in memory (%(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    parser.add_argument("--port", type=port, default=7860, help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    group = find_group(arguments.sae)
    layers = arguments.layers or [group.layers[len(group.layers) // 2]]
    check("gradio", "app")
    inputs.free_port(arguments.host, arguments.port)

    from qwen_scope_lens.app.server import make_web_app, serve
    from qwen_scope_lens.app.workbench import Workbench
    from qwen_scope_lens.labels.packs import LabelPack
    from qwen_scope_lens.models.load import load_model

    labels = read_labels(arguments.labels) or LabelPack()
    remark(group.notice)
    model = load_model(arguments.model or group.backbone.model_id, device=arguments.device)
    bench = Workbench(model, group, labels, arguments.sae_folder, arguments.sae_cache_max)
    bench.sae(layers[-1])  # a missing file is reported now
    with tempfile.TemporaryDirectory(prefix="qsl-app-") as folder:
        site = arguments.site
        if site is None and group.origin == "mini":
            from qwen_scope_lens.mini import heldout
            from qwen_scope_lens.site.build import site_of_documents

            remark("Making every feature's page from a few texts ...")
            texts = islice(heldout(), 0, None, 20)
            site = site_of_documents(list(texts), model, group.short, layers, Path(folder, "site"))
        web = make_web_app(bench, layers, site, arguments.host)
        print(f"http://{arguments.host}:{arguments.port}/  (Ctrl-C ends it)", flush=True)
        serve(web, arguments.host, arguments.port)
    return 0
