"""The embedded toy models: sample files to try the verbs on.

    qsl mini texts
    qsl mini texts --out samples/

The examples of the docs and of the help texts use these files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_scope_lens.cli.options import Word, add_json, add_words, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, WORDS)


def run(arguments: argparse.Namespace) -> int:
    return arguments.run_word(arguments) or 0


def _texts_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("texts"), help="the folder for the files (%(default)s/)"
    )
    add_json(parser)


def _texts(arguments: argparse.Namespace) -> None:
    """Write small corpora, prompts, benchmarks and labels, as the verbs read them.

        qsl mini texts
        qsl mini texts --out samples/

    The texts are those that the toy models have not seen (qwen_scope_lens.mini.heldout). A file of
    yours is never replaced.
    """
    from qwen_scope_lens.mini.texts import FILES, write_texts
    from qwen_scope_lens.tables import Table

    paths = write_texts(arguments.out)
    rows = [(str(path), file.what) for path, file in zip(paths, FILES, strict=True)]
    show(Table.of(("file", "what it is"), rows), arguments.json)


WORDS = (Word("texts", _texts_arguments, _texts),)
