"""From a labelled corpus, or from pairs, to hypotheses that are tested on texts they did not see.

    qsl discover texts/corpus.jsonl --label lang --layers 6 --out discovery/
    qsl discover store/ --label lang --positive zh --labels texts/labels.jsonl --out chinese/
    # needs the hub:
    qsl discover pairs.jsonl --preferred chosen --rejected rejected --layers 20 --out pairs/ \\
        --sae qwen3-8b-base/w64k-l0-50

A corpus is extracted into DIR/store first; the folder of a store is used as it is. One half of the
documents proposes the features in which a value of the label differs from all others (or the
preferred side of the pairs from the rejected one), and the other half tests each proposal once,
with a false-discovery rate over all tests. Each hypothesis comes with its feature's label, from
--labels or written by --generator, and with passages. DIR gets discovery.json and discovery.html.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    add_json,
    add_labels,
    add_layers,
    add_model,
    add_sae_files,
    count,
    from_zero,
    print_json,
    read_labels,
    remark,
    share,
)
from qwen_scope_lens.cli.synth.generators import add_generator_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "corpus", metavar="CORPUS", action=Input, check=_data, help="a corpus, or a feature store"
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--label", metavar="COLUMN", help="documents differ in it")
    which.add_argument("--preferred", metavar="COLUMN", help="the preferred text of a pair")
    parser.add_argument("--rejected", metavar="COLUMN", help="the other text of a pair")
    parser.add_argument("--positive", metavar="VALUES", help="of the label; default: all of them")
    parser.add_argument(
        "--sae",
        default="mini-qwen3/w1k-l0-16",
        action=Input,
        check=inputs.group,
        help="a group (%(default)s)",
    )
    add_layers(
        parser,
        "such as 12,20; default: all of the store, or the middle one",
        check=inputs.unchecked,
    )
    add_model(parser)
    add_labels(parser, "a label pack, for what features mean")
    parser.add_argument("--most", type=count, default=10, help="hypotheses per value (%(default)s)")
    parser.add_argument("--fdr", type=share, default=0.05, help="default: %(default)s")
    parser.add_argument(
        "--pool",
        default="mean",
        choices=["max", "mean", "any", "last"],
        help="default: %(default)s",
    )
    parser.add_argument(
        "--document-tokens", type=count, help="of a document that are read; default: the context"
    )
    parser.add_argument("--seed", type=from_zero, default=0, help="of the two halves")
    parser.add_argument(
        "--generator", metavar="SPEC", help="openai:URL#MODEL or hf:MODEL, to write missing labels"
    )
    add_generator_arguments(parser)
    add_sae_files(parser)
    add_json(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")


def _data(path: str, arguments: argparse.Namespace) -> None:
    from qwen_scope_lens.concepts.pairs import pairs_of
    from qwen_scope_lens.errors import BadText
    from qwen_scope_lens.stores.corpus import read_corpus
    from qwen_scope_lens.stores.manifest import Manifest

    if bool(arguments.preferred) != bool(arguments.rejected):
        raise BadText("--preferred and --rejected name the two columns of a pair: give both")
    if Manifest.exists(Path(path)):
        manifest = Manifest.open(Path(path))
        manifest.check_label(arguments.label or "pair")
        for layer in arguments.layers or ():
            manifest.sae(layer, Path(path))
        return
    inputs.corpus(path, arguments)
    if arguments.label and Path(path).is_file():
        read_corpus(path).check_label(arguments.label)
    if arguments.preferred:
        next(pairs_of(path, arguments.preferred, arguments.rejected))
    for layer in arguments.layers or ():
        find_group(arguments.sae).check_layer(layer)


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.concepts.discover import discover, discover_pairs
    from qwen_scope_lens.concepts.discovery import FORMAT, VERSION

    labels = read_labels(arguments.labels)
    store = _store(arguments)
    options: dict[str, Any] = {
        "layers": arguments.layers,
        "labels": labels,
        "most": arguments.most,
        "fdr": arguments.fdr,
        "how": arguments.pool,
        "seed": arguments.seed,
    }
    if arguments.label:
        values = arguments.positive.split(",") if arguments.positive else None
        found = discover(store, arguments.label, values=values, **options)
    else:
        found = discover_pairs(store, **options)
    if arguments.generator:
        found = found.labelled([_written(arguments, store, found)])
    if arguments.json:
        print_json(FORMAT, found.to_dict(), VERSION)
    else:
        print(found.table())
    found.save(arguments.out / "discovery.json")
    remark(f"written: {found.page().save(arguments.out / 'discovery.html')}")
    return 0


def _store(arguments: argparse.Namespace) -> Any:
    from qwen_scope_lens.concepts.pairs import pairs_of
    from qwen_scope_lens.stores.corpus import read_corpus
    from qwen_scope_lens.stores.manifest import Manifest
    from qwen_scope_lens.stores.store import FeatureStore

    if Manifest.exists(Path(arguments.corpus)):
        return FeatureStore.open(arguments.corpus)
    from qwen_scope_lens.stores.extract import extract

    group = find_group(arguments.sae)
    remark(f"Note: {group.notice}\n")
    documents: Any = (
        read_corpus(arguments.corpus, labels=[arguments.label])
        if arguments.label
        else list(pairs_of(arguments.corpus, arguments.preferred, arguments.rejected))
    )
    return extract(
        documents,
        model=arguments.model or group.backbone.model_id,
        group=group.short,
        layers=arguments.layers or [group.layers[len(group.layers) // 2]],
        out=arguments.out / "store",
        max_tokens=arguments.document_tokens,
        sae_folder=arguments.sae_folder,
        device=arguments.device,
        progress=not arguments.quiet,
    )


def _written(arguments: argparse.Namespace, store: Any, found: Any) -> Any:
    """Labels by the generator, for the hypotheses that hold and whose feature has none."""
    from qwen_scope_lens.address import FeatureRef
    from qwen_scope_lens.cli.synth.generators import agreed, prices, roles
    from qwen_scope_lens.labels.describe import describe, expected_requests, plan
    from qwen_scope_lens.labels.packs import LabelPack
    from qwen_scope_lens.writers.ledger import Ledger
    from qwen_scope_lens.writers.price import price_of

    refs = [FeatureRef.parse(row.ref) for row in found.held if not row.label]
    writer, planned = roles(arguments).open(arguments.generator), plan(store, refs)
    with Ledger.open(arguments.out / "labels.run", prices(arguments)) as ledger:
        requests = expected_requests(planned)
        new = ledger.unanswered(writer.name, requests)
        price = price_of(new, prices(arguments), writer, len(requests) - len(new))
        if not agreed(arguments, price):
            return LabelPack([])
        pack = describe(store, refs, writer, ledger, planned=planned, progress=True)
        remark(str(ledger.spent))
    if pack:
        remark(f"written: {pack.write(arguments.out / 'labels.jsonl')}")
    return pack
