"""Compare features across SAEs, layers and models.

    qsl compare match a_store/ b_store/ --out match.parquet     which feature of A is which of B
    qsl compare match qwen3-8b-base/w64k-l0-50/20 qwen3-8b-base/w64k-l0-100/20
    qsl compare drift base_store/ tuned_store/ --out drift.html what fine-tuning changed
    qsl compare transfer --sae qwen3-8b-base/w64k-l0-50 --layers 12,20 --models Qwen/Qwen3-8B-Base,Qwen/Qwen3-8B --texts sample.jsonl

`qsl compare match --help` and so on explain each.
"""  # noqa: E501

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.cli.arguments import count, from_zero, layer_list, output, share

if TYPE_CHECKING:
    from qwen_scope_lens.compare.match import Matching

MATCH = """Which feature of A is which of B.

A and B are stores made by `qsl extract`, or addresses of SAEs such as
qwen3-8b-base/w64k-l0-50/20. SAEs of one residual space (the same model and layer, or models made
from one another) are matched by the cosine of their decoder directions; others by the correlation
of activations on the texts that both stores have, piece of text by piece of text, whatever the
tokenizers. Every score is held against a shuffled B.
"""
DRIFT = """What changed between two models: the same texts, the same SAEs, two stores."""
TRANSFER = """How well one group of SAEs fits several models; the first is the reference.

A model is a hub name, a folder, or a folder with a LoRA adapter, which is merged into its base.
First tokens and tokens of extreme norm are neither reconstructed nor replaced.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="what", required=True, metavar="match|drift|transfer")

    def verb(name: str, doc: str) -> argparse.ArgumentParser:
        return verbs.add_parser(
            name,
            description=doc,
            help=doc.splitlines()[0],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    match = verb("match", MATCH)
    match.add_argument("a", metavar="A", help="a store, or the address of an SAE")
    match.add_argument("b", metavar="B")
    match.add_argument(
        "--layers", type=layer_list, help="of A and B: 6,7; default: the last stored"
    )
    match.add_argument("--by", choices=["decoder", "activation"], help="default: as fits")
    match.add_argument("--candidates", type=count, default=8, help="kept a feature")
    match.add_argument("--fdr", type=share, default=0.05)
    match.add_argument("--show", type=from_zero, default=10, help="pairs printed")
    match.add_argument("--seed", type=from_zero, default=0)
    match.add_argument("--out", type=output, help="a Parquet file, one row a feature of A")

    drift = verb("drift", DRIFT)
    drift.add_argument("base", type=Path, metavar="BASE_STORE")
    drift.add_argument("tuned", type=Path, metavar="TUNED_STORE")
    drift.add_argument("--layers", type=layer_list, help="default: all that both have")
    drift.add_argument("--fdr", type=share, default=0.05)
    drift.add_argument(
        "--fvu", type=from_zero, default=0, metavar="TEXTS",
        help="run both models again on so many of the texts for unexplained variance",
    )  # fmt: skip
    drift.add_argument("--labels", type=Path, help="a label pack, for names of features")
    drift.add_argument("--link", help="to a site of `qsl dash build`, or a pattern with {ref}")
    drift.add_argument("--out", type=output, help="an HTML report")

    transfer = verb("transfer", TRANSFER)
    transfer.add_argument("--sae", required=True, help="a group, such as qwen3-8b-base/w64k-l0-50")
    transfer.add_argument("--layers", type=layer_list, required=True)
    transfer.add_argument("--models", required=True, help="names or folders, a comma apart")
    transfer.add_argument("--texts", required=True, type=Path, help="JSONL, text, CSV or Parquet")
    transfer.add_argument("--text", help="the column that holds the text")
    transfer.add_argument("--documents", type=count, default=200, help="read; default: %(default)s")
    transfer.add_argument("--max-tokens", type=count, default=512, help="of a document")
    transfer.add_argument("--folder", type=Path, help="read the SAEs' files from here only")
    transfer.add_argument("--no-losses", action="store_true", help="FVU and L0 only, faster")
    transfer.add_argument("--out", type=output, help="a JSON file")


def run(arguments: argparse.Namespace) -> int:
    verbs = {"match": _match, "drift": _drift, "transfer": _transfer}
    return verbs[arguments.what](arguments)


def _match(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.compare.match_table import save_matching, summary
    from qwen_scope_lens.compare.sources import match_sources

    found: Matching = match_sources(
        arguments.a,
        arguments.b,
        layers=arguments.layers,
        by=arguments.by,
        candidates=arguments.candidates,
        fdr=arguments.fdr,
        seed=arguments.seed,
    )
    print(summary(found, arguments.show))
    if arguments.out:
        save_matching(found, arguments.out)
        print(f"written: {arguments.out}")
    return 0


def _drift(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.compare.drift import drift
    from qwen_scope_lens.compare.drift_page import drift_page, summary
    from qwen_scope_lens.compare.sources import both_fvu
    from qwen_scope_lens.features.store import FeatureStore

    labels = _labels(arguments.labels)  # what is wrong with them is said now
    base, tuned = FeatureStore.open(arguments.base), FeatureStore.open(arguments.tuned)
    fvu = both_fvu(base, tuned, arguments.layers, arguments.fvu) if arguments.fvu else None
    found = drift(base, tuned, arguments.layers, fdr=arguments.fdr, fvu=fvu)
    print(summary(found))
    if arguments.out:
        page = drift_page(found, labels, arguments.link)
        print(f"written: {page.save(arguments.out)}")
    return 0


def _labels(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    from qwen_scope_lens.features.labels import LabelPack

    return {str(ref): label.text for ref, label in LabelPack.read(path).items()}


def _transfer(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.compare.sources import read_texts
    from qwen_scope_lens.compare.transfer import load_related, transfer
    from qwen_scope_lens.saes.load import load_sae

    texts = read_texts(arguments.texts, arguments.text, arguments.documents)
    saes = {
        layer: load_sae(f"{arguments.sae}/{layer}", folder=arguments.folder)
        for layer in arguments.layers
    }
    names = [name.strip() for name in arguments.models.split(",") if name.strip()]
    models: dict[str, Any] = {name: partial(load_related, name) for name in names}
    found = transfer(
        saes,
        models,
        texts,
        name=arguments.sae,
        losses=not arguments.no_losses,
        max_tokens=arguments.max_tokens,
    )
    print(found.table())
    if arguments.out:
        found.save(arguments.out)
        print(f"written: {arguments.out}")
    return 0
