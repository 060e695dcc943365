"""Make a page for every feature of a layer: a static site, or Neuronpedia's export format.

    qsl dash build store/ --layers 6 --labels texts/labels.jsonl --out site/
    qsl dash serve site/                            # until Ctrl-C; or just open site/index.html
    qsl dash export store/ --format neuronpedia --out export/

The store comes from `qsl extract`; the labels come from `qsl synth describe` or from a person. A
site needs no server and no network: it works from disk and from any file host. Each feature has its
page at its address: site/index.html#mini-qwen3/w1k-l0-16/6/123

A site grows: a build keeps the layers that are there, and the labels of those that it builds again.
--replace begins from nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    Word,
    add_labels,
    add_layers,
    add_model,
    add_sae_files,
    add_store,
    add_words,
    count,
    port,
    read_labels,
    remark,
)

if TYPE_CHECKING:
    from qwen_scope_lens.site.build import Sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, WORDS)


def run(arguments: argparse.Namespace) -> int:
    return arguments.run_word(arguments) or 0


def _add_sources(parser: argparse.ArgumentParser) -> None:
    add_store(parser, "what `qsl extract` wrote")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    add_layers(parser)
    add_labels(parser, "JSON lines: address, text, score, provenance")
    add_model(parser, "where the model is now; default: where the store says", device=False)
    add_sae_files(parser)
    parser.add_argument("--no-tokens", action="store_true", help="leave out promoted tokens")
    parser.add_argument("--examples", type=count, default=12, help="per feature (%(default)s)")


def _sources(arguments: argparse.Namespace) -> Sources:
    from qwen_scope_lens.site.build import Sources
    from qwen_scope_lens.site.layer import Settings
    from qwen_scope_lens.stores.store import FeatureStore

    store = FeatureStore.open(arguments.store)
    return Sources(
        store,
        tuple(arguments.layers or store.layers),
        model=arguments.model,
        sae_folder=arguments.sae_folder,
        labels=read_labels(arguments.labels),
        tokens=not arguments.no_tokens,
        settings=Settings(examples=arguments.examples),
    )


def _build_arguments(parser: argparse.ArgumentParser) -> None:
    _add_sources(parser)
    parser.add_argument("--title", help="the heading of the site")
    parser.add_argument(
        "--replace", action="store_true", help="drop the layers and labels that the site has"
    )
    parser.add_argument("--no-texts", action="store_true", help="leave out whole documents")


def _build(arguments: argparse.Namespace) -> None:
    """Write a static site with a page for every feature.

    A site that is there already keeps its other layers, and the labels of those that are built
    again. --replace drops them.
    """
    from qwen_scope_lens.site.build import build_site
    from qwen_scope_lens.site.earlier import EarlierSite

    out: Path = arguments.out
    sources = replace(_sources(arguments), texts=not arguments.no_texts)
    build_site(sources, out, title=arguments.title, replace_all=arguments.replace, progress=True)
    site = EarlierSite.read(out)
    assert site is not None
    if kept := [facts["ref"] for facts in site.besides(sources.refs)]:
        remark(f"kept from an earlier build: {', '.join(kept)} (--replace drops them)")
    print(f"{out}/index.html")
    remark(f"open it, or run `qsl dash serve {out}`")


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "site", type=Path, action=Input, check=inputs.site, help="what `qsl dash build` wrote"
    )
    parser.add_argument("--port", type=port, default=8000, help="default: %(default)s; 0: any free")
    parser.add_argument(
        "--host", default="127.0.0.1", help="default: %(default)s, this machine only"
    )


def _serve(arguments: argparse.Namespace) -> None:
    """Show a site on this machine."""
    inputs.free_port(arguments.host, arguments.port)

    from qwen_scope_lens.site.server import make_server

    with make_server(arguments.site, arguments.port, arguments.host) as server:
        host, port = server.server_address[:2]
        print(f"http://{host!s}:{port}/  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _add_sources(parser)
    parser.add_argument("--format", choices=["neuronpedia"], default="neuronpedia")
    parser.add_argument("--release", default="qwen-scope", help="its name there (%(default)s)")
    parser.add_argument("--creator", default="qwen-scope-lens", help="who made it (%(default)s)")
    parser.add_argument("--creator-id", help="a user of the database it is imported into")
    parser.add_argument("--url", help="of the release's paper or page")
    parser.add_argument("--dataset", help="the corpus, as a name on the hub")
    parser.add_argument("--neuronpedia-model", help="the model's id there")
    parser.add_argument("--vectors", action="store_true", help="with every direction (large)")


def _export(arguments: argparse.Namespace) -> None:
    """Write another tool's format: Neuronpedia's."""
    from qwen_scope_lens.site.build import build_neuronpedia
    from qwen_scope_lens.site.neuronpedia import IMPORTER, Release

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
    build_neuronpedia(_sources(arguments), arguments.out, release, progress=True)
    print(f"{arguments.out}/v1: in Neuronpedia's layout")


WORDS = (
    Word("build", _build_arguments, _build),
    Word("serve", _serve_arguments, _serve),
    Word("export", _export_arguments, _export),
)
