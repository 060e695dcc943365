"""Every feature of a stored layer: how often, how strongly, on what, and with which others.

    qsl stats store/ --layers 6
    qsl stats store/ --layers 6 --feature 423,431
    qsl stats store/ --layers 6 --out layer6.parquet

Takes one pass over the store, in bounded memory. The Parquet file has one row per feature: density,
document frequency, mean and maximum activation, histogram, top examples (document and token) and
co-firing features. First tokens and tokens of extreme norm are left out, unless --all-tokens is
given.
"""

from __future__ import annotations

import argparse

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    add_json,
    add_layer,
    add_reader_tokens,
    add_store,
    count,
    output,
    print_json,
    remark,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    add_layer(parser)
    parser.add_argument(
        "--feature",
        type=_features,
        default=[],
        action=Input,
        check=_stored,
        help="numbers, joined by commas",
    )
    parser.add_argument("--examples", type=count, default=10, help="shown per feature")
    add_reader_tokens(parser)
    parser.add_argument("--out", type=output, help="a Parquet file, one row per feature")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.features.statistics import statistics
    from qwen_scope_lens.features.statistics_table import (
        facts,
        feature_facts,
        feature_text,
        save_table,
        summary,
    )
    from qwen_scope_lens.stores.store import FeatureStore

    store = FeatureStore.open(arguments.store)
    layer = store.layers[-1] if arguments.layer is None else arguments.layer
    found = statistics(
        store, layer, keep=not arguments.all_tokens, examples=max(20, arguments.examples)
    )
    if arguments.json:
        shown = [feature_facts(found, n, store, arguments.examples) for n in arguments.feature]
        print_json(arguments.json, {**facts(found), "features": shown})
    else:
        print(summary(found))
        for feature in arguments.feature:
            print(f"\n{feature_text(found, feature, store, arguments.examples)}")
    if arguments.out:
        save_table(found, arguments.out)
        remark(f"written: {arguments.out}")
    return 0


def _stored(features: list[int], arguments: argparse.Namespace) -> None:
    """Features of the layer that is shown."""
    manifest = inputs.store(arguments.store, arguments)
    layer = manifest.layers[-1] if arguments.layer is None else arguments.layer
    sae = LayerRef.parse(manifest.sae(layer, arguments.store).ref)
    for feature in features:
        sae.feature(feature)


def _features(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a list of features such as 6159,42")
    return [int(part) for part in parts]
