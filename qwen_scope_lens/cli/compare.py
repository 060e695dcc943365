"""Compare features across SAEs, layers and models.

    qsl compare match mini-qwen3/w1k-l0-16/6 mini-qwen3/w1k-l0-16/5 --out match.parquet
    qsl compare transfer --sae mini-qwen3/w1k-l0-16 --layers 6 --texts texts/new.jsonl \\
        --models mini-qwen3,mini-qwen3.5
    # needs stores of a model and of its fine-tune:
    qsl compare drift base_store/ tuned_store/ --out drift.html
    # needs the hub:
    qsl compare match qwen3-8b-base/w64k-l0-50/20 qwen3-8b-base/w64k-l0-100/20
    qsl compare transfer --sae qwen3-8b-base/w64k-l0-50 --layers 12,20 --texts sample.jsonl \\
        --models Qwen/Qwen3-8B-Base,Qwen/Qwen3-8B

`match` says which feature of A is which of B, `drift` what fine-tuning changed, and `transfer`
whether an SAE fits a model. `qsl compare match --help` and so on explain each.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    Word,
    add_group,
    add_json,
    add_labels,
    add_layers,
    add_sae_files,
    add_words,
    count,
    from_zero,
    output,
    print_json,
    read_labels,
    remark,
    share,
)

if TYPE_CHECKING:
    from qwen_scope_lens.compare.match import Matching


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, WORDS)


def run(arguments: argparse.Namespace) -> int:
    return arguments.run_word(arguments) or 0


def _match_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "a",
        metavar="A",
        action=Input,
        check=inputs.store_sae_or_feature,
        help="a store, or the address of an SAE or of one feature",
    )
    parser.add_argument(
        "b", metavar="B", action=Input, check=inputs.store_or_sae, help="a store, or an SAE"
    )
    parser.add_argument(
        "--feature", type=from_zero, help="only the counterparts of this feature of A"
    )
    add_layers(
        parser,
        "one of A and one of B: 6,7; default: the last that is stored",
        check=inputs.unchecked,
    )
    parser.add_argument(
        "--by", choices=["decoder", "activation"], help="default: what fits A and B"
    )
    parser.add_argument("--candidates", type=count, default=8, help="kept per feature")
    parser.add_argument("--fdr", type=share, default=0.05)
    parser.add_argument("--show", type=from_zero, default=10, help="pairs printed")
    parser.add_argument("--seed", type=from_zero, default=0)
    parser.add_argument("--out", type=output, help="a Parquet file, one row per feature of A")
    add_json(parser)


def _match(arguments: argparse.Namespace) -> None:
    """Which feature of A is which of B.

    A and B are stores made by `qsl extract`, or addresses of SAEs such as
    qwen3-8b-base/w64k-l0-50/20. SAEs of one residual space (the same model and layer, or models
    made from one another) are matched by the cosine of their decoder directions; others by the
    correlation of activations on the texts that both stores have, piece of text by piece of text,
    whatever the tokenizers. Every score is compared with scores against a shuffled B.

        qsl compare match mini-qwen3/w1k-l0-16/6/423 mini-qwen3/w1k-l0-16/5 --candidates 3

    With the address of one feature, or --feature, only its counterparts are looked for.
    """
    from qwen_scope_lens.compare.sides import sides_of

    a, feature = _one_of(arguments)
    refs, by = sides_of(a, arguments.b, arguments.layers, arguments.by)  # before torch is imported
    if refs[0] == refs[1] and by == "decoder":
        remark(f"A and B are both {refs[0]}: by decoder every feature matches itself")
    if feature is not None:
        _match_one(arguments, a, feature)
        return

    from qwen_scope_lens.compare.match import facts, save_matching
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
    if arguments.json:
        print_json(arguments.json, facts(found))
    else:
        print(found.table(arguments.show))
    if arguments.out:
        save_matching(found, arguments.out)
        remark(f"written: {arguments.out}")


def _one_of(arguments: argparse.Namespace) -> tuple[str, int | None]:
    """A without its feature, and the feature, which is in the address or in --feature."""
    from qwen_scope_lens.errors import UnknownName

    ref = inputs.feature_of(arguments.a)
    if ref is None:
        return arguments.a, arguments.feature
    if arguments.feature not in (None, ref.feature):
        raise UnknownName(f"{ref} is one feature, and --feature names another: give one of them")
    return str(ref.sae), ref.feature


def _match_one(arguments: argparse.Namespace, a: str, feature: int) -> None:
    from qwen_scope_lens.compare.sources import match_one
    from qwen_scope_lens.errors import WrongSettings

    if arguments.out:
        raise WrongSettings("--out is for all features of A: leave it out, or use --json")
    found = match_one(
        a,
        feature,
        arguments.b,
        layers=arguments.layers,
        by=arguments.by,
        candidates=arguments.candidates,
        seed=arguments.seed,
    )
    if arguments.json:
        print_json(arguments.json, found.to_dict())
    else:
        print(found.table())


def _drift_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("base", "tuned"):
        parser.add_argument(
            name, type=Path, metavar=f"{name.upper()}_STORE", action=Input, check=inputs.store
        )
    add_layers(
        parser,
        "such as 12,20; default: all that both stores have",
        check=inputs.layers_in("base", "tuned"),
    )
    parser.add_argument("--fdr", type=share, default=0.05)
    parser.add_argument(
        "--fvu",
        type=from_zero,
        default=0,
        metavar="TEXTS",
        help="run both models again on so many of the texts for unexplained variance",
    )
    add_labels(parser)
    parser.add_argument("--link", help="to a site of `qsl dash build`, or a pattern with {ref}")
    parser.add_argument("--out", type=output, help="an HTML report")
    add_json(parser)


def _drift(arguments: argparse.Namespace) -> None:
    """What changed between two models, from two stores of the same texts and SAEs."""
    from qwen_scope_lens.compare.drift import drift, drift_page, facts
    from qwen_scope_lens.compare.sources import both_fvu
    from qwen_scope_lens.stores.store import FeatureStore

    # Labels are read first, so that a damaged file is refused before the work.
    labels = read_labels(arguments.labels)
    texts = {str(ref): label.text for ref, label in labels.items()} if labels else {}
    base, tuned = FeatureStore.open(arguments.base), FeatureStore.open(arguments.tuned)
    fvu = both_fvu(base, tuned, arguments.layers, arguments.fvu) if arguments.fvu else None
    found = drift(base, tuned, arguments.layers, fdr=arguments.fdr, fvu=fvu)
    if arguments.json:
        print_json(arguments.json, facts(found))
    else:
        print(found.table())
    if arguments.out:
        page = drift_page(found, texts, arguments.link)
        remark(f"written: {page.save(arguments.out)}")


def _transfer_arguments(parser: argparse.ArgumentParser) -> None:
    add_group(parser)
    add_layers(parser, "such as 12,20", required=True, check=inputs.group_layers)
    parser.add_argument(
        "--models",
        required=True,
        action=Input,
        check=inputs.models,
        help="names or folders, joined by commas",
    )
    parser.add_argument(
        "--texts",
        required=True,
        type=Path,
        action=Input,
        check=inputs.corpus,
        help="JSONL, text, CSV or Parquet",
    )
    parser.add_argument("--text", help="the column that holds the text")
    parser.add_argument(
        "--documents", type=count, default=200, help="how many are read; default: %(default)s"
    )
    parser.add_argument(
        "--max-tokens", type=count, default=512, help="per document; default: %(default)s"
    )
    add_sae_files(parser)
    parser.add_argument("--no-losses", action="store_true", help="FVU and L0 only, faster")
    parser.add_argument("--out", type=output, help="a JSON file")
    add_json(parser)


def _transfer(arguments: argparse.Namespace) -> None:
    """How well one group of SAEs fits several models; the first is the reference.

    A model is a hub name, a folder, or a folder with a LoRA adapter, which is merged into its base.
    First tokens and tokens of extreme norm are neither reconstructed nor replaced.
    """
    from qwen_scope_lens.compare.sources import read_texts
    from qwen_scope_lens.compare.transfer import FORMAT, VERSION, load_related, transfer
    from qwen_scope_lens.saes.load import open_sae

    texts = read_texts(arguments.texts, arguments.text, arguments.documents)
    saes = {
        layer: open_sae(f"{arguments.sae}/{layer}", folder=arguments.sae_folder)
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
    if arguments.json:
        print_json(FORMAT, found.to_dict(), VERSION)
    else:
        print(found.table())
    if arguments.out:
        found.save(arguments.out)
        remark(f"written: {arguments.out}")


WORDS = (
    Word("match", _match_arguments, _match),
    Word("drift", _drift_arguments, _drift),
    Word("transfer", _transfer_arguments, _transfer),
)
