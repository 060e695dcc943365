"""From a concept to features: by their labels, by what its texts fire, by what features say.

    qsl find "French"                                      # the words alone, on the toy model
    qsl find "Chinese" --examples texts/chinese.txt --labels texts/labels.jsonl
    qsl find "Chinese" --examples texts/chinese.txt --layers 6 --top 3 --causal --measure class=han
    # needs the hub:
    qsl find "polite refusals" --examples yes.txt --against no.txt --sae qwen3-8b-base/w64k-l0-50
    # needs an endpoint that writes:
    qsl find "polite refusals" --generator openai:http://localhost:8000/v1#NAME --price 0.15,0.60

A few example sentences (one per line) help more than anything else. Each column of evidence orders
all features of the layers, and one order joins them: the sum over the columns of weight x 11 / (10
+ place), with weights of 3 for examples, 2 for labels, and 1 for words and for what a feature says.
The examples are compared with --against, else with the documents of --store, else with bundled
neutral texts; sentences with the words are compared with the same sentences about something else.
`says` is the decoder row through a Jacobian lens of the model, if there is one (`qsl lens --help`),
and the unembedding. --embed finds labels by their meaning, and --generator writes example sentences
and near counter-examples, after saying what that will cost.

By default all layers whose SAEs are on this machine are searched. --by labels,says does without
running the model. --causal tests the best features: see `qsl sweep --help` for the arms.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli import plan_options as plans
from qwen_scope_lens.cli.causal_options import add_causal, run_causal
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    add_json,
    add_labels,
    add_layers,
    add_model,
    add_sae_files,
    count,
    from_zero,
    output,
    print_json,
    read_labels,
    remark,
)
from qwen_scope_lens.cli.synth.generators import (
    add_generator_arguments,
    agreed,
    endpoint_settings,
    prices,
    roles,
)

if TYPE_CHECKING:
    from qwen_scope_lens.concepts.concept import Concept
    from qwen_scope_lens.concepts.written import Written
    from qwen_scope_lens.labels.embeddings import Embedder
    from qwen_scope_lens.labels.packs import LabelPack

LOGIT = "logit"
POOLINGS = ("mean", "last", "first")
BY = ("examples", "labels", "meaning", "words", "says")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", metavar="CONCEPT", help='such as "polite refusals"')
    for name, help in (
        ("--examples", "texts that have it: one per line, or a corpus"),
        ("--against", "texts that lack it, instead of neutral ones"),
    ):
        parser.add_argument(
            name, type=Path, metavar="FILE", action=Input, check=inputs.corpus, help=help
        )
    parser.add_argument(
        "--sae", default="mini-qwen3/w1k-l0-16", help="a group, or one SAE (%(default)s)"
    )
    add_model(parser)
    add_layers(
        parser,
        "such as 12,20 or 0-7; default: all whose SAEs are on this machine",
        check=inputs.unchecked,
    )
    add_labels(parser, "a label pack, which is searched by words")
    parser.add_argument(
        "--store",
        type=Path,
        action=Input,
        check=inputs.store,
        help="a feature store, instead of the neutral texts",
    )
    parser.add_argument(
        "--lens",
        metavar="FILE",
        action=Input,
        check=_lens,
        help="a Jacobian lens of the model, from `qsl lens fit` or transformer-lens; default: that"
        " in the model's folder, if any; `logit` reads without",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--exact", action="store_true", default=None, help="encode every token of the texts"
    )
    how.add_argument(
        "--quick",
        dest="exact",
        action="store_false",
        help="compare their mean residuals; default: so where encoding takes a CPU minutes",
    )
    parser.add_argument(
        "--by", type=_columns, metavar="COLUMNS", help=f"some of {','.join(BY)}; default: all"
    )
    parser.add_argument("--top", type=count, default=20, help="features (%(default)s)")
    parser.add_argument(
        "--promoted", type=from_zero, default=5, help="tokens per feature (%(default)s)"
    )
    meaning = parser.add_argument_group("labels by meaning")
    meaning.add_argument(
        "--embed",
        metavar="MODEL",
        help="the folder of a model, or openai:URL#MODEL: labels are found by meaning, too",
    )
    meaning.add_argument(
        "--embed-pooling",
        choices=POOLINGS,
        default="mean",
        help="of a folder's model, as its card says (%(default)s)",
    )
    meaning.add_argument(
        "--embed-query", default="", metavar="TEXT", help="before the concept, as its card says"
    )
    writing = parser.add_argument_group("written examples")
    writing.add_argument(
        "--generator", metavar="SPEC", help="openai:URL#MODEL or hf:MODEL, to write examples"
    )
    writing.add_argument(
        "--write", type=count, default=10, metavar="N", help="of each kind (%(default)s)"
    )
    writing.add_argument("--templates", type=Path, help="folder of `qsl synth templates`")
    add_generator_arguments(parser)
    add_sae_files(parser)
    plans.add_allowance(parser)
    add_causal(parser)
    add_json(parser)
    parser.add_argument("--out", type=output, metavar="FILE.json", help="write all of it")


def run(arguments: argparse.Namespace) -> int:
    # What is wrong is said before torch is imported, which takes seconds.
    from qwen_scope_lens.address import saes_named
    from qwen_scope_lens.concepts.concept import Concept, columns_of, read_examples

    [first, *_] = saes_named(arguments.sae, arguments.layers)
    concept = Concept(
        arguments.words,
        read_examples(arguments.examples) if arguments.examples else (),
        read_examples(arguments.against) if arguments.against else (),
    )
    labels = read_labels(arguments.labels)
    embedder = _embedder(arguments, labels)
    if arguments.generator:
        written = _written(arguments, concept)
        if written is None:
            return 1
        concept = replace(
            concept,
            examples=(*concept.examples, *written.examples),
            against=(*concept.against, *written.against),
        )
        if not arguments.json:
            print(f"{written}\n", flush=True)
    columns_of(arguments.by, concept, labels is not None, embedder is not None)
    remark(f"Note: {first.row.notice}\n")

    import transformers
    from tqdm import tqdm

    from qwen_scope_lens.concepts.find import FORMAT, VERSION, find
    from qwen_scope_lens.stores.store import FeatureStore

    transformers.utils.logging.disable_progress_bar()
    if arguments.model:
        plans.remarks(arguments.model, [first.row], arguments.allow_other_model)
    model: Any = arguments.model
    if arguments.causal is not None:
        arguments.dtype = None
        model = plans.load(arguments, [first])
    lens = _read_lens(arguments.lens, first.row.d_model)
    with tqdm(unit="layer", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        found = find(
            concept.words,
            arguments.sae,
            examples=concept.examples,
            against=concept.against,
            labels=labels,
            embedder=embedder,
            store=FeatureStore.open(arguments.store) if arguments.store else None,
            lens=lens,
            exact=arguments.exact,
            model=model,
            layers=arguments.layers,
            columns=arguments.by,
            top=arguments.top,
            promoted=arguments.promoted,
            sae_folder=arguments.sae_folder,
            device=arguments.device,
            allow_other_model=arguments.allow_other_model,
            progress=progress,
        )
    causes = None
    if arguments.causal is not None:
        if not arguments.json:
            print(found.table(), flush=True)
        causes = run_causal(
            arguments,
            model,
            found.refs,
            words=concept.words,
            examples=concept.examples,
            against=concept.against,
        )
    content = found.to_dict() | ({"causal": causes.to_dict()} if causes is not None else {})
    if arguments.json:  # the same as in the file
        print_json(FORMAT, content, VERSION)
    elif causes is not None:
        print(f"\n{causes}")
    else:
        print(found.table())
    if arguments.out:
        from qwen_scope_lens.files import write_json

        write_json(arguments.out, FORMAT, VERSION, content)
        remark(f"written: {arguments.out}")
    return 0


def _lens(path: str, arguments: argparse.Namespace) -> None:
    if path != LOGIT:
        inputs.file(path, arguments)


def _read_lens(path: str | None, width: int) -> Any:
    from qwen_scope_lens.models.jacobian import read_lens

    return path if path in (None, LOGIT) else read_lens(path, width)


def _embedder(arguments: argparse.Namespace, labels: LabelPack | None) -> Embedder | None:
    from qwen_scope_lens.errors import TooLittleData

    if not arguments.embed:
        return None
    if labels is None:
        raise TooLittleData("--embed finds labels by their meaning: give --labels")
    from qwen_scope_lens.labels.embeddings import embedded, open_embedder

    there = arguments.embed.startswith("openai:")
    more = endpoint_settings(arguments) if there else {}
    found = open_embedder(arguments.embed, arguments.embed_pooling, arguments.embed_query, **more)
    # One that does not answer is known before anything is written or read.
    if there and "meaning" in (arguments.by or BY):
        embedded([found.query + arguments.words], found)
    return found


def _written(arguments: argparse.Namespace, concept: Concept) -> Written | None:
    """Examples by the generator; None where a person did not agree to the price."""
    from qwen_scope_lens.concepts.written import examples_requests, write_examples
    from qwen_scope_lens.labels.embeddings import cache_folder
    from qwen_scope_lens.writers.ledger import Ledger
    from qwen_scope_lens.writers.price import price_of
    from qwen_scope_lens.writers.templates import Templates

    templates = Templates(arguments.templates)
    requests = examples_requests(concept.words, arguments.write, templates)
    writer = roles(arguments).open(arguments.generator)
    with Ledger.open(cache_folder("examples"), prices(arguments)) as ledger:
        new = ledger.unanswered(writer.name, requests)
        price = price_of(new, prices(arguments), writer, len(requests) - len(new))
        if not agreed(arguments, price):
            return None
        return write_examples(
            concept.words, writer, ledger, count=arguments.write, templates=templates
        )


def _columns(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not names or not set(names) <= set(BY):
        raise argparse.ArgumentTypeError(f"{text!r:.60}: expected some of {','.join(BY)}")
    return names
