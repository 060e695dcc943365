"""`qsl bench screen`, `duplicates` and `contamination`: items of one source against another's."""

from __future__ import annotations

import argparse

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.bench.extract import add_prompt_format, prompt_format
from qwen_scope_lens.cli.bench.suites import add_benchmark, add_position, write_keys
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import Word, add_json, output, remark, share, show

__all__ = ["WORDS"]

SHOWN = 20


def _add_similarity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--similarity", type=share, default=0.9, help="default: %(default)s")
    add_position(parser, "any")
    add_json(parser)


def _screen_arguments(parser: argparse.ArgumentParser) -> None:
    add_benchmark(parser, "benchmark")
    parser.add_argument(
        "items",
        action=Input,
        check=inputs.store_or_corpus,
        help="a file of items, or the folder of an extracted benchmark",
    )
    parser.add_argument("--out", type=output, help="write the keys of the items that add something")
    add_position(parser)
    add_json(parser)
    add_prompt_format(parser)


def _screen(arguments: argparse.Namespace) -> None:
    """Do new items add anything to a benchmark? Judged by the features that it does not have yet.

        qsl bench screen bench/sums texts/new-sums.jsonl
        qsl bench screen bench/sums bench/capitals              # extracted before
        qsl bench screen bench/sums texts/new-sums.jsonl --out useful.txt

    "new" counts the item's features that no item of the benchmark activates. "adds" counts those
    that no candidate in a row above activates, either. "usual" is the share of the benchmark's own
    items that add less. A file is read with the benchmark's own prompt format and model, unless
    --column or --template gives another.
    """
    from qwen_scope_lens.bench.prompts import PromptFormat
    from qwen_scope_lens.bench.screen import footprint_like, own_novelty, screen
    from qwen_scope_lens.bench.suite import open_benchmark
    from qwen_scope_lens.tables import Table

    benchmark = open_benchmark(arguments.benchmark)
    how = prompt_format(arguments)
    own = benchmark.footprint(arguments.layer, arguments.position)
    candidates = footprint_like(
        benchmark,
        arguments.items,
        arguments.layer,
        arguments.position,
        None if how == PromptFormat() else how,
        say=remark,
    )
    found = screen(own, candidates)
    rows = [(s.key, s.n_features, s.new, s.adds, s.percentile) for s in found]
    useful = [s.key for s in found if s.useful]
    columns = ("item", "features", "new", "adds", "usual")
    average = float(own_novelty(own).mean())
    show(Table.of(columns, rows), arguments.json, useful=useful, own_items_add=average)
    if not arguments.json:
        print(
            f"{len(useful)} of {len(found)} items add a feature. One more item of {own.name} itself"
            f" would add {average:.2f}"
        )
    if arguments.out is not None:
        write_keys(arguments.out, useful)


def _duplicates_arguments(parser: argparse.ArgumentParser) -> None:
    add_benchmark(parser, "first")
    add_benchmark(parser, "second", "another one; default: pairs within the first", nargs="?")
    _add_similarity(parser)


def _duplicates(arguments: argparse.Namespace) -> None:
    """Near-duplicates between two benchmarks, or within one, by the features of the whole prompt.

        qsl bench duplicates bench/sums bench/capitals
        qsl bench duplicates bench/sums                      # within one
        qsl bench duplicates bench/sums bench/capitals --similarity 0.8

    The similarity is Jaccard's, of the sets of active features. "usual" is the similarity to the
    nearest neighbour within the first benchmark that all but 1% of its items stay below: pairs
    below it are nothing remarkable.
    """
    from qwen_scope_lens.bench.contamination import MOST_PAIRS, near_duplicates, usual_nearness
    from qwen_scope_lens.bench.suite import open_benchmark
    from qwen_scope_lens.tables import Table

    first = open_benchmark(arguments.first).footprint(arguments.layer, arguments.position)
    second = first
    if arguments.second is not None:
        second = open_benchmark(arguments.second).footprint(arguments.layer, arguments.position)
    pairs = near_duplicates(first, second, arguments.similarity)
    rows = [(p.first, p.second, p.jaccard) for p in pairs]
    usual = usual_nearness(first)
    show(Table.of((first.name, second.name, "similarity"), rows), arguments.json, usual=usual)
    if not arguments.json:
        which = "the nearest " if len(pairs) == MOST_PAIRS else ""
        print(
            f"{which}{len(pairs):,} pairs with a similarity of at least {arguments.similarity}."
            f" Usual within {first.name}: {usual:.3f}"
        )


def _contamination_arguments(parser: argparse.ArgumentParser) -> None:
    add_benchmark(parser, "benchmark")
    parser.add_argument(
        "training",
        action=Input,
        check=inputs.store_or_corpus,
        help="a file of texts, or the folder of a feature store",
    )
    _add_similarity(parser)
    add_prompt_format(parser)


def _contamination(arguments: argparse.Namespace) -> None:
    """How much of a benchmark a training set contains.

        qsl bench contamination bench/sums texts/corpus.jsonl --column text
        qsl bench contamination bench/sums store/               # of `qsl extract`

    There are two answers. By items: which of them have a near-duplicate in the training set
    (Jaccard similarity of the features of the whole text, meant for training sets of items about
    as long as the benchmark's). As a whole: how much of the benchmark's footprint the training set
    covers, beside what half of the benchmark covers of its own other half. Neither proves that a
    model saw an item.
    """
    from qwen_scope_lens.bench.contamination import contamination
    from qwen_scope_lens.bench.screen import footprint_like
    from qwen_scope_lens.bench.suite import open_benchmark
    from qwen_scope_lens.tables import Table

    benchmark = open_benchmark(arguments.benchmark)
    training = footprint_like(
        benchmark,
        arguments.training,
        arguments.layer,
        arguments.position,
        prompt_format(arguments),
        say=remark,
    )
    own = benchmark.footprint(arguments.layer, arguments.position)
    found = contamination(own, training, arguments.similarity)
    rows = [(p.first, p.second, p.jaccard) for p in found.contained]
    show(
        Table.of((found.benchmark, found.training, "similarity"), rows),
        arguments.json,
        SHOWN,
        items=found.n_items,
        share=found.share,
        threshold=found.threshold,
        usual=found.usual,
        covered=found.overlap.overlap,
        covered_by_half_of_itself=found.ceiling.overlap,
    )
    if not arguments.json:
        if len(rows) > SHOWN:
            print("(--json prints all)")
        print(
            f"{len(rows)} of {found.n_items} items ({found.share:.1%}) have a near-duplicate in"
            f" {found.training} (similarity from {found.threshold}; usual within"
            f" {found.benchmark}: {found.usual:.3f})\n"
            f"footprint covered by {found.training}: {found.overlap.overlap}; by half of itself:"
            f" {found.ceiling.overlap}"
        )


WORDS = (
    Word("screen", _screen_arguments, _screen),
    Word("duplicates", _duplicates_arguments, _duplicates),
    Word("contamination", _contamination_arguments, _contamination),
)
