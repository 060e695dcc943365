"""Typical activations of features, the unit of strengths such as `--edit REF:add:+2typical`.

    qsl calibrate mini-qwen3/w1k-l0-16/6/423 --texts texts/corpus.jsonl --out typical.json
    qsl calibrate mini-qwen3/w1k-l0-16/6 --store store/ --out layer6.json

REF is a feature, or a whole SAE for all its features that fire. The typical activation is the mean
over the tokens where a feature fires, without first tokens and tokens of extreme norm.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli import plan_options as plans
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import add_json, count, output, remark, show

SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "refs",
        nargs="+",
        metavar="REF",
        action=Input,
        check=inputs.refs,
        help="features, or SAEs",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--texts",
        type=Path,
        action=Input,
        check=inputs.corpus,
        help="a corpus to run through the model",
    )
    source.add_argument(
        "--store",
        type=Path,
        action=Input,
        check=inputs.store,
        help="a feature store, from `qsl extract`",
    )
    parser.add_argument("--out", type=output, required=True, metavar="FILE")
    parser.add_argument("--max-tokens", type=count, help="per document; the rest of it is cut off")
    plans.add_model(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.steering.typical import split_refs

    saes = list(split_refs(arguments.refs))
    if arguments.store:
        manifest = inputs.store(arguments.store, arguments)
        for sae in saes:
            manifest.sae(sae.layer, arguments.store)
    else:
        plans.model_of(arguments, [sae.row for sae in saes])

    from qwen_scope_lens.steering.calibrate import calibrate, calibrate_from_store
    from qwen_scope_lens.tables import Table

    if arguments.store:
        from qwen_scope_lens.stores.store import FeatureStore

        found = calibrate_from_store(FeatureStore.open(arguments.store), arguments.refs)
    else:
        from tqdm import tqdm

        from qwen_scope_lens.stores.corpus import read_corpus

        texts = (document.content for document in read_corpus(arguments.texts))
        found = calibrate(
            plans.load(arguments, saes),
            arguments.refs,
            tqdm(texts, unit="doc", leave=False),
            max_tokens=arguments.max_tokens,
            truncate=True,
            enable_thinking=False,
            allow_other_model=True,  # `plans.load` has looked
        )
    found.save(arguments.out)
    missing = [ref for ref in arguments.refs if ref.count("/") == 3 and ref not in found]
    for ref in missing:
        remark(f"{ref} never fired in these texts: it has no typical activation")
    columns = ("feature", "typical", "rate per token", "largest")
    rows = [(str(ref), one.mean, one.rate, one.largest) for ref, one in found.facts.items()]
    show(Table.of(columns, rows), arguments.json, SHOWN)
    remark(f"{len(found):,} features over {found.provenance['tokens']:,} tokens: {arguments.out}")
    return 0
