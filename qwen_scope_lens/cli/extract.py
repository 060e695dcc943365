"""A corpus through a model and its SAEs, into a feature store.

    qsl extract texts/corpus.jsonl --sae mini-qwen3/w1k-l0-16 --layers 6,7 --out store/
    qsl extract texts/chats.jsonl --sae mini-qwen3/w1k-l0-16 --layers 6 --no-thinking --out chats/
    # of four processes or machines that share the work, the first:
    qsl extract texts/new.jsonl --sae mini-qwen3/w1k-l0-16 --layers 6,7 --worker 0/4 --out new/
    # needs the hub:
    qsl extract chats.parquet --model Qwen/Qwen3-8B --sae qwen3-8b-base/w64k-l0-50 \\
        --layers 12,20 --no-thinking --label-columns lang,stars --out store/

The corpus is JSON Lines, JSON, text (one document per line), CSV, TSV, Parquet, a folder of
`datasets.save_to_disk`, or the name of a dataset on the hub. After an interruption at any point the
same command goes on where it stopped. `qsl store info` shows what is there.
"""

from __future__ import annotations

import argparse
import os

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    add_group,
    add_json,
    add_layers,
    add_model,
    add_old,
    add_sae_files,
    count,
    memory,
    place,
    print_json,
    worker,
)
from qwen_scope_lens.extras import check

__all__ = ["add_arguments", "run"]

_KEPT = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
"""How many compiled products oneDNN keeps on a CPU, at 0.6 MB each. Every batch has shapes of its
own, and by default there would be 1,024 of them after some thousand documents. To compile one again
takes less than a millisecond."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "corpus",
        action=Input,
        check=inputs.corpus,
        help="a file, a folder of datasets, or a name on the hub",
    )
    add_group(parser)
    add_layers(parser, "such as 12,20 or 0-7", required=True, check=inputs.group_layers)
    parser.add_argument(
        "--out",
        required=True,
        type=place,
        action=Input,
        check=inputs.lasting,
        help="the store's folder, or a URL (s3://bucket/store)",
    )
    add_model(parser)

    corpus = parser.add_argument_group("the corpus")
    corpus.add_argument("--text", metavar="COLUMN", help="default: text, else messages (chats)")
    corpus.add_argument("--key", metavar="COLUMN", help="default: key, else id, else the number")
    corpus.add_argument(
        "--label-columns", metavar="A,B", help="default: every column of plain values"
    )
    corpus.add_argument("--split", help="which part of a dataset on the hub")
    corpus.add_argument("--skip-empty", action="store_true", help="leave empty documents out")
    corpus.add_argument(
        "--append", action="store_true", help="add to a store that has other documents"
    )

    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--max-tokens", type=count, help="cut longer ones; default: the context")
    tokens.add_argument("--no-truncate", action="store_true", help="refuse longer ones instead")
    thinking = tokens.add_mutually_exclusive_group()
    thinking.add_argument("--thinking", action="store_true", default=None, help="for chats")
    thinking.add_argument("--no-thinking", dest="thinking", action="store_false", default=None)
    tokens.add_argument(
        "--generation-prompt", action="store_true", help="end chats with the prompt for a reply"
    )

    tokens.add_argument(
        "--positions",
        choices=("all", "last"),
        default="all",
        help="last: encode and store the last token of each document only",
    )

    work = parser.add_argument_group("the work")
    work.add_argument("--token-budget", type=count, help="tokens per batch; default: 4096")
    work.add_argument("--shard-docs", type=count, help="documents per shard; default: 512")
    work.add_argument("--sae-memory", type=memory, metavar="SIZE", help="such as 8GB; see docs")
    shared = work.add_mutually_exclusive_group()
    shared.add_argument(
        "--worker", type=worker, default=(0, 1), metavar="I/N", help="only part I of N"
    )
    add_old(parser, "--rank", "--worker")
    shared.add_argument(
        "--ray",
        type=count,
        metavar="WORKERS",
        help="on a Ray cluster, with so many workers (extra `ray`)",
    )
    add_sae_files(work, revision=True)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault(*_KEPT)  # oneDNN reads it at its first product
    group = find_group(arguments.sae)
    if arguments.ray is not None:
        check("ray", "ray")
    if arguments.revision is None:
        saes = [LayerRef(group.short, layer) for layer in arguments.layers]
        inputs.sae_files(saes, arguments.sae_folder)

    from qwen_scope_lens.cli.store import describe, facts
    from qwen_scope_lens.cli.terminal import plain
    from qwen_scope_lens.stores.corpus import read_corpus
    from qwen_scope_lens.stores.extract import Request, extract_request
    from qwen_scope_lens.stores.manifest import Settings

    labels = arguments.label_columns
    corpus = read_corpus(
        arguments.corpus,
        text=arguments.text,
        labels=None if labels is None else [name for name in labels.split(",") if name],
        key=arguments.key,
        split=arguments.split,
        skip_empty=arguments.skip_empty,
    )
    settings = Settings(
        max_tokens=arguments.max_tokens,
        truncate=not arguments.no_truncate,
        enable_thinking=arguments.thinking,
        add_generation_prompt=arguments.generation_prompt,
        last_token=arguments.positions == "last",
    )
    request = Request(
        model=arguments.model or group.backbone.model_id,
        group=arguments.sae,
        layers=arguments.layers,
        out=arguments.out,
        settings=settings,
        token_budget=arguments.token_budget,
        shard_docs=arguments.shard_docs,
        append=arguments.append,
        sae_memory=arguments.sae_memory,
        sae_folder=arguments.sae_folder,
        sae_revision=arguments.revision,
        device=arguments.device,
    )
    progress = not arguments.quiet
    if arguments.ray is not None:
        from qwen_scope_lens.stores.extract_ray import extract_on_ray

        store = extract_on_ray(corpus, request, workers=arguments.ray, progress=progress)
    else:
        store = extract_request(corpus, request, worker=arguments.worker, progress=progress)
    if arguments.json:
        print_json(arguments.json, facts(store))
    else:
        print(plain(describe(store)))
    return 0
