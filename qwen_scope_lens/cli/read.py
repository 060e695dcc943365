"""Which features fire on a text, per token and as a whole, with labels and promoted tokens.

    qsl read "The kernel reads a file. 内核读取文件。"            # the toy model, no download
    qsl read "one text" "another" --layers 2,6 --labels texts/labels.jsonl --out page.html
    qsl read - --json < texts/prompts.txt
    # needs the hub:
    qsl read "The kernel reads a file." --sae qwen3-8b-base/w64k-l0-50 --layers 12,20

Each text is read as it is, without a store. The table has the strongest features of each layer: the
largest activation, on how many tokens the feature fires, the token where it is strongest, and the
tokens that its direction promotes (the logit lens, a hint only in early layers). On a terminal the
text follows, coloured by each of these features (NO_COLOR=1 turns this off). The last table goes
token by token. The first token and tokens of extreme norm are named, and do not count for the first
table unless --all-tokens is given. --out writes all of it, with heat maps, as one HTML file.
"""

from __future__ import annotations

import argparse
import shutil
import warnings
from typing import TYPE_CHECKING

from qwen_scope_lens.address import saes_named
from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli import plan_options as plans
from qwen_scope_lens.cli.options import (
    add_json,
    add_labels,
    add_layers,
    add_model,
    add_reader_tokens,
    add_sae_files,
    count,
    output,
    read_labels,
    remark,
)
from qwen_scope_lens.cli.terminal import given_text
from qwen_scope_lens.errors import BadText

if TYPE_CHECKING:
    from qwen_scope_lens.features.reading import Reading

MOST_TOKENS = 60
"""How many tokens the table token by token has on a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="- is the standard input")
    parser.add_argument(
        "--sae", default="mini-qwen3/w1k-l0-16", help="a group, or one SAE (%(default)s)"
    )
    add_model(parser)
    add_layers(
        parser,
        "such as 12,20 or 0-7; default: the middle one of the group",
        check=inputs.unchecked,
    )
    add_labels(parser, "JSON lines: address, text, score, provenance")
    parser.add_argument("--top", type=count, default=5, help="features per layer (%(default)s)")
    parser.add_argument(
        "--max-tokens", type=count, help="per text; default: the model's context. The rest is cut"
    )
    add_reader_tokens(parser)
    add_sae_files(parser)
    plans.add_allowance(parser)
    add_json(parser)
    parser.add_argument("--out", type=output, metavar="PAGE.html", help="write a page")


def run(arguments: argparse.Namespace) -> int:
    # What is wrong is said before torch is imported, which takes seconds.
    refs = saes_named(arguments.sae, arguments.layers)
    labels = read_labels(arguments.labels)
    texts = [given_text(text) for text in arguments.texts]
    if not all(text.strip() for text in texts):
        raise BadText(
            "there is no text to read: give some words, or - and a text by standard input"
        )
    group = refs[0].row
    inputs.sae_files(refs, arguments.sae_folder)
    remark(f"Note: {group.notice}\n")

    import transformers
    from tqdm import tqdm

    from qwen_scope_lens.features.read import read_all
    from qwen_scope_lens.features.reading import page_of, readings_json

    transformers.utils.logging.disable_progress_bar()
    if arguments.model:
        plans.remarks(arguments.model, [group], arguments.allow_other_model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the SAEs .* were trained on")  # the remark says it
        readings = read_all(
            texts,
            arguments.sae,
            model=arguments.model,
            layers=[ref.layer for ref in refs],
            labels=labels,
            top=arguments.top,
            all_tokens=arguments.all_tokens,
            sae_folder=arguments.sae_folder,
            device=arguments.device,
            allow_other_model=arguments.allow_other_model,
            max_tokens=arguments.max_tokens,
            truncate=True,
        )
    found = []
    hidden = len(texts) == 1 or not (arguments.json or arguments.out)  # else the tables show it
    for reading in tqdm(readings, total=len(texts), unit="text", leave=False, disable=hidden):
        found.append(reading)
        if not arguments.json:
            _print(reading, arguments.top, len(texts) > 1)
    if arguments.json:
        print(readings_json(found, arguments.top), end="")
    if arguments.out:
        page = page_of(found, arguments.top).save(arguments.out)
        remark(f"written: {page}")
    return 0


def _print(reading: Reading, top: int, name: bool) -> None:
    from qwen_scope_lens.cli.terminal import has_colour, print_shaded

    if name:
        print(f"== {' '.join(reading.text.split())}")
    print(reading.table(top))
    if has_colour():
        width = shutil.get_terminal_size((100, 24)).columns
        print()
        for layer in reading.layers:
            for one, pieces in reading.heat(layer, top):
                print_shaded(f"{layer}/{one.ref.feature:<6}", pieces, width)
    print(f"\n{reading.by_token().text(MOST_TOKENS)}\n")
