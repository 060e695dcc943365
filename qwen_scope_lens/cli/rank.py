"""Which features tell one group of documents from another, and should you believe it?

    qsl rank store/ --label lang --positive zh --out zh.json
    qsl rank store/ --label lang --positive zh,ja --negative en,fr --layers 6 --pool mean
    qsl rank store/ --label chinese --positive true --by rate_difference --residuals

Every feature is tested on a part of the documents (Mann-Whitney U, with an exact tail for features
that fire rarely, and a false-discovery rate over all features of all layers). The best features are
scored again on the held-out documents. The report compares them with the same search on shuffled
labels, with random features, with features of similar rate and strength, and with probes
(difference of means, logistic regression) on features or, with --residuals, on the residual, too.
Without --negative all other documents that have the label are the negatives. --fdr 1 shows the best
features whether they pass or not. --causal adds the best features while the store's model writes,
beside random directions, the prompt that asks, and the mean difference of documents.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.causal_options import SHOWN, add_causal, run_causal
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    add_json,
    add_layers,
    add_reader_tokens,
    add_store,
    count,
    from_zero,
    output,
    print_json,
    remark,
    share,
)

if TYPE_CHECKING:
    from qwen_scope_lens.features.ranking import Ranking
    from qwen_scope_lens.steering.causal import Causes
    from qwen_scope_lens.stores.store import FeatureStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument(
        "--label",
        required=True,
        action=Input,
        check=inputs.stored_label,
        help="a label of the documents",
    )
    parser.add_argument(
        "--positive", required=True, type=_values, help="its values, joined by commas"
    )
    parser.add_argument("--negative", type=_values, help="default: all other documents")
    add_layers(parser)
    parser.add_argument("--pool", default="max", choices=["max", "mean", "any", "last"])
    parser.add_argument(
        "--by",
        default="auroc",
        choices=["auroc", "effect", "mean_difference", "rate_difference"],
        help="what orders the features that pass (default: %(default)s); the paper's is"
        " mean_difference, in its classifiers rate_difference",
    )
    parser.add_argument(
        "--both-sides", action="store_true", help="also features that are higher in the negatives"
    )
    parser.add_argument("--fdr", type=share, default=0.05, help="default: %(default)s")
    parser.add_argument(
        "--correction", default="bh", choices=["bh", "by"], help="Benjamini-Hochberg or -Yekutieli"
    )
    parser.add_argument("--held-out", type=share, default=0.3, help="share; default: %(default)s")
    parser.add_argument(
        "--top", type=count, default=50, help="rows in the file; default: %(default)s"
    )
    parser.add_argument(
        "--show", type=from_zero, default=20, help="rows printed; default: %(default)s"
    )
    add_reader_tokens(parser)
    parser.add_argument(
        "--residuals",
        nargs="?",
        const="",
        metavar="MODEL",
        help="run the model again (the store's own, or this one) for probes on the residual",
    )
    add_causal(parser)
    parser.add_argument("--seed", type=from_zero, default=0)
    parser.add_argument("--out", type=output, help="a JSON file with rows, controls and provenance")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.features.rank import rank
    from qwen_scope_lens.features.ranking import FORMAT, VERSION
    from qwen_scope_lens.stores.store import FeatureStore

    store = FeatureStore.open(arguments.store)
    residuals = None
    if arguments.residuals is not None:
        from qwen_scope_lens.models.open import open_model
        from qwen_scope_lens.stores.reread import pooled_residuals

        residuals = pooled_residuals(
            store,
            arguments.layers,
            open_model(arguments.residuals) if arguments.residuals else None,
            last=arguments.pool == "last",
            keep=not arguments.all_tokens,
        )
    ranking = rank(
        store,
        arguments.positive,
        arguments.negative,
        label=arguments.label,
        layers=arguments.layers,
        pool=arguments.pool,
        keep=not arguments.all_tokens,
        by=arguments.by,
        top=arguments.top,
        both_sides=arguments.both_sides,
        fdr=arguments.fdr,
        correction=arguments.correction,
        held_out=arguments.held_out,
        residuals=residuals,
        seed=arguments.seed,
    )
    found = _causes(arguments, store, ranking) if arguments.causal and ranking.rows else None
    if arguments.json:  # the same as in the file
        more = {"causal": found.to_dict()} if found is not None else {}
        print_json(FORMAT, ranking.to_dict() | more, VERSION)
    else:
        print(ranking.table(arguments.show))
        if found is not None:
            print(f"\n{found}")
    if arguments.out:
        ranking.save(arguments.out)
        remark(f"written: {arguments.out}")
    return 0


def _causes(arguments: argparse.Namespace, store: FeatureStore, ranking: Ranking) -> Causes:
    """Add the winners, with the store's own model and some of its documents as examples."""
    import numpy as np

    from qwen_scope_lens.address import FeatureRef
    from qwen_scope_lens.features.document_sets import by_label
    from qwen_scope_lens.models.open import open_model

    groups = by_label(store, arguments.label, arguments.positive, arguments.negative)
    texts = store.documents(["text"])["text"]
    positive, negative = (
        [text for doc in docs[:SHOWN].tolist() if (text := texts[doc].as_py())]
        for docs in (groups.docs[groups.positive], groups.docs[np.logical_not(groups.positive)])
    )
    return run_causal(
        arguments,
        open_model(arguments.residuals or store.manifest.model.id),
        [FeatureRef.parse(row.ref) for row in ranking.rows],
        examples=positive,
        against=negative,
    )


def _values(text: str) -> list[str]:
    values = [value.strip() for value in text.split(",") if value.strip()]
    if not values:
        raise argparse.ArgumentTypeError(f"{text!r} does not name a value of the label")
    return values
