"""Jacobian lenses: what a direction in the middle of a model makes it say in the end.

    qsl lens fit mini-qwen3 texts/corpus.jsonl --layers 5,6 --texts 4 --tokens 32 --out lens.pt
    qsl lens show lens.pt
    qsl find "Chinese" --examples texts/chinese.txt --layers 6 --lens lens.pt --top 3

The logit lens reads a direction as if it were the whole residual at the end of the model. A
Jacobian lens first takes it there, by the mean derivative of the last residual by the residual
after its layer. The minis come with a lens each; for other models fit one, or give a file that
transformer-lens or Neuronpedia published to `--lens` of `qsl find`.
"""

from __future__ import annotations

import argparse
import random
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.catalog import lens_beside
from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    Word,
    add_json,
    add_layers,
    add_words,
    count,
    output,
    positive,
    remark,
    seed,
    show,
)

if TYPE_CHECKING:
    from qwen_scope_lens.models.jacobian import Lens
    from qwen_scope_lens.tables import Table

MOST_READ = 20_000
"""Documents of a corpus from which the texts are drawn."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, WORDS)


def run(arguments: argparse.Namespace) -> int:
    return arguments.run_word(arguments) or 0


def _corpus(parser: argparse.ArgumentParser, name: str, help: str, **how: Any) -> None:
    parser.add_argument(
        name, type=Path, metavar="CORPUS", action=Input, check=inputs.corpus, help=help, **how
    )


def _fit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", action=Input, check=inputs.model, help="a folder, or a name"
    )
    _corpus(parser, "corpus", "texts to fit on: one per line, or a corpus")
    add_layers(
        parser, "such as 12,20; default: all but the last, which needs none", check=inputs.unchecked
    )
    parser.add_argument("--texts", type=count, default=100, help="how many (%(default)s)")
    parser.add_argument("--tokens", type=count, default=128, help="of each text (%(default)s)")
    _corpus(parser, "--held-out", "texts to compare the lens on; default: others of the corpus")
    parser.add_argument(
        "--held-out-texts", type=count, default=20, metavar="N", help="how many (%(default)s)"
    )
    parser.add_argument(
        "--batch", type=count, default=16, help="output dimensions at a time (%(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the draw of texts; 0")
    parser.add_argument("--minutes", type=positive, help="then write what there is; default: all")
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="float32", help="%(default)s")
    parser.add_argument("--device", action=Input, check=inputs.device, help="default: cpu")
    add_json(parser)
    parser.add_argument("--out", type=output, required=True, metavar="FILE.pt")


def _fit(arguments: argparse.Namespace) -> None:
    """Fit a lens on some texts, and compare it with the logit lens on others.

        qsl lens fit mini-qwen3 texts/corpus.jsonl --layers 6 --texts 2 --tokens 16 --out lens.pt

    The texts are drawn from the corpus, and all count alike. A text costs as many backward passes
    as the model has dimensions, through all layers after the first one of --layers. The estimator
    is transformer-lens's. After each text the sum is kept in FILE.pt.part: the same command goes on
    after an interruption, and after --minutes. A hundred texts of 128 tokens are usable, says the
    reference, and published lenses have a thousand; on our minis two dozen of 48 tokens help.
    """
    import torch
    import transformers

    from qwen_scope_lens.models.lens_fit import fit_lens
    from qwen_scope_lens.models.load import load_model

    transformers.utils.logging.disable_progress_bar()
    wanted = arguments.texts + (0 if arguments.held_out else arguments.held_out_texts)
    texts = _texts(arguments.corpus, wanted, arguments.seed)
    held_out = (
        _texts(arguments.held_out, arguments.held_out_texts)
        if arguments.held_out
        else texts[arguments.texts :]
    )
    if not held_out:
        remark(
            f"Note: {arguments.corpus} has no more than {arguments.texts} texts, so the lens is"
            " compared with nothing; --held-out names others"
        )
    lens = fit_lens(
        load_model(
            arguments.model,
            dtype=getattr(torch, arguments.dtype),
            device=arguments.device,
            full_hooks=True,
        ),
        texts[: arguments.texts],
        arguments.out,
        corpus=Path(arguments.corpus).name,
        layers=arguments.layers,
        batch=arguments.batch,
        tokens=arguments.tokens,
        held_out=held_out,
        minutes=arguments.minutes,
        progress=not arguments.quiet,
    )
    show(_table(lens), arguments.json)
    remark(f"written: {arguments.out}")
    if lens.card["texts"] < lens.card["texts_wanted"]:
        remark("the time was over: the same command goes on")


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "lens",
        metavar="LENS",
        action=Input,
        check=lambda lens, arguments: inputs.file(_place(lens), arguments),
        help="a file, or the name or folder of a model with a lens beside it",
    )
    add_json(parser)


def _place(lens: str) -> Path:
    return lens_beside(lens) or Path(lens)


def _show(arguments: argparse.Namespace) -> None:
    """Show the card of a lens: its model, on what it was fitted, and how well it predicts.

    qsl lens show mini-qwen3
    """
    from qwen_scope_lens.models.jacobian import read_lens

    show(_table(read_lens(_place(arguments.lens))), arguments.json)


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    _show_arguments(parser)
    parser.add_argument(
        "--model", required=True, action=Input, check=inputs.model, help="a folder, or a name"
    )
    _corpus(parser, "--held-out", "texts on which it was not fitted", required=True)
    parser.add_argument("--texts", type=count, default=20, help="how many (%(default)s)")
    parser.add_argument("--tokens", type=count, default=128, help="of each text (%(default)s)")
    parser.add_argument("--device", action=Input, check=inputs.device, help="default: cpu")


def _check(arguments: argparse.Namespace) -> None:
    """Compare any lens with the logit lens on held-out texts of its model.

    qsl lens check lens.pt --model mini-qwen3 --held-out texts/new.jsonl --texts 4
    """
    import transformers

    from qwen_scope_lens.catalog import name_of_model
    from qwen_scope_lens.models.architecture import d_model, describe
    from qwen_scope_lens.models.jacobian import read_lens
    from qwen_scope_lens.models.lens_fit import lens_quality, quality_table
    from qwen_scope_lens.models.open import open_model

    transformers.utils.logging.disable_progress_bar()
    model = open_model(arguments.model, device=arguments.device)
    lens = read_lens(_place(arguments.lens), d_model(model))
    if lens.model not in (None, name := name_of_model(describe(model))):
        remark(f"Note: this lens was fitted on {lens.model}, and is compared on {name}")
    texts = _texts(arguments.held_out, arguments.texts)
    show(quality_table(lens_quality(model, lens, texts, tokens=arguments.tokens)), arguments.json)


def _table(lens: Lens) -> Table:
    from dataclasses import replace

    from qwen_scope_lens.models.lens_fit import LensQuality, quality_table

    card = lens.card
    table = quality_table([LensQuality(**row) for row in card.get("held_out", ())])
    corpus = lens.facts.get("corpus", "texts that the file does not name")
    about = [
        f"lens of {lens.model or 'a model that the file does not name'}, d_model {lens.width},"
        f" layers {', '.join(map(str, sorted(lens.matrices)))}",
        f"fitted on {lens.prompts or 'some'} texts of {corpus}"
        + (f": {card['tokens']:,} tokens, {card['seconds']:,.0f} s" if card else ""),
    ]
    if not card.get("held_out"):
        about.append("it was not compared with the logit lens: `qsl lens check` does that")
        return replace(table, columns=(), above=tuple(about), below=())
    return replace(table, above=(*about, ""))


def _texts(path: Path, most: int, seed: int = 0) -> list[str]:
    """Texts drawn from all of a corpus, whose order may be by language or source."""
    from qwen_scope_lens.errors import BadText
    from qwen_scope_lens.stores.corpus import read_corpus

    found = [document.text for document in islice(read_corpus(path), MOST_READ)]
    if any(text is None for text in found):
        raise BadText(f"{path}: expected texts, found a chat")
    random.Random(seed).shuffle(found)
    return [text for text in found if text is not None][:most]


WORDS = (
    Word("fit", _fit_arguments, _fit),
    Word("show", _show_arguments, _show),
    Word("check", _check_arguments, _check),
)
