"""Every feature of a layer on a page: a static site, or Neuronpedia's export format.

    qsl dash build store/ --layers 6 --labels labels.jsonl --out site/
    qsl dash serve site/                            # or just open site/index.html
    qsl dash export store/ --format neuronpedia --out export/

The store is what `qsl extract` wrote; labels are what `qsl label` or a person wrote. A site needs
no server and no network: it works from disk and from any file host. A feature's page has its
address: site/index.html#mini-qwen3/w1k-l0-16/6/123
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_scope_lens.cli.options import count, layer_list, port

if TYPE_CHECKING:
    from qwen_scope_lens.site.build import Sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", required=True, metavar="build | serve | export")
    build = verbs.add_parser("build", help="write a static site")
    _add_sources(build)
    build.add_argument("--title", help="the heading of the site")
    serve = verbs.add_parser("serve", help="show a site on this machine")
    serve.add_argument("site", type=Path, help="what `qsl dash build` wrote")
    serve.add_argument("--port", type=port, default=8000, help="default: %(default)s; 0: any free")
    serve.add_argument(
        "--host", default="127.0.0.1", help="default: %(default)s, this machine only"
    )
    export = verbs.add_parser("export", help="write another tool's format")
    _add_sources(export)
    export.add_argument("--format", choices=["neuronpedia"], default="neuronpedia")
    export.add_argument("--release", default="qwen-scope", help="its name there (%(default)s)")
    export.add_argument("--creator", default="qwen-scope-lens", help="who made it (%(default)s)")
    export.add_argument("--creator-id", help="a user of the database it is imported into")
    export.add_argument("--url", help="of the release's paper or page")
    export.add_argument("--dataset", help="the corpus, as a name on the hub")
    export.add_argument("--neuronpedia-model", help="the model's id there")
    export.add_argument("--vectors", action="store_true", help="with every direction (large)")


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="what `qsl extract` wrote")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--layers", type=layer_list, help="such as 12,20 (default: all stored)")
    parser.add_argument("--labels", type=Path, help="JSON lines: address, text, score, provenance")
    parser.add_argument("--model", help="where the model is now (default: as the store says)")
    parser.add_argument("--sae-folder", type=Path, help="read the SAE's files from here only")
    parser.add_argument("--no-tokens", action="store_true", help="without promoted tokens")
    parser.add_argument("--examples", type=count, default=12, help="a feature (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "serve":
        return _serve(arguments)
    from qwen_scope_lens.site.build import build_neuronpedia, build_site
    from qwen_scope_lens.site.neuronpedia import IMPORTER, Release

    sources = _sources(arguments)
    if arguments.action == "build":
        build_site(sources, arguments.out, title=arguments.title, progress=True)
        print(f"{arguments.out}/index.html: open it, or `qsl dash serve {arguments.out}`")
        return 0
    release = Release(
        name=arguments.release,
        title=arguments.release,
        creator=arguments.creator,
        creator_id=arguments.creator_id or IMPORTER,
        url=arguments.url,
        dataset=arguments.dataset,
        model=arguments.neuronpedia_model,
        vectors=arguments.vectors,
    )
    build_neuronpedia(sources, arguments.out, release, progress=True)
    print(f"{arguments.out}/v1: in Neuronpedia's layout")
    return 0


def _sources(arguments: argparse.Namespace) -> Sources:
    from qwen_scope_lens.labels.packs import LabelPack
    from qwen_scope_lens.site.build import Sources
    from qwen_scope_lens.site.layer import Settings
    from qwen_scope_lens.stores.store import FeatureStore

    store = FeatureStore.open(arguments.store)
    return Sources(
        store,
        tuple(arguments.layers or store.layers),
        model=arguments.model,
        sae_folder=arguments.sae_folder,
        labels=LabelPack.read(arguments.labels) if arguments.labels else None,
        tokens=not arguments.no_tokens,
        settings=Settings(examples=arguments.examples),
    )


def _serve(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.site.server import make_server

    with make_server(arguments.site, arguments.port, arguments.host) as server:
        host, port = server.server_address[:2]
        print(f"http://{host!s}:{port}/  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
