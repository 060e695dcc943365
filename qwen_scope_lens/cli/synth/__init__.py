"""Find the features that data never activates, write data that fires them, and prove it.

    qsl extract texts/seed.jsonl --sae mini-qwen3/w1k-l0-16 --layers 6 --out seed_store/
    qsl extract texts/anchor.jsonl --sae mini-qwen3/w1k-l0-16 --layers 6 --out anchor_store/
    qsl synth targets seed_store/ --reference anchor_store/ --threshold 100 --out targets.json
    qsl synth run targets.json --recipe text --generator hf:mini-qwen3 --budget 16 --out data.jsonl
    qsl synth report data.jsonl --targets targets.json

The generator is a model in memory or any OpenAI-compatible endpoint. Each word has its own help:
`qsl synth run --help`.
"""

from __future__ import annotations

import argparse

from qwen_scope_lens.cli.options import add_words
from qwen_scope_lens.cli.synth import data, features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, (*features.WORDS, *data.WORDS))


def run(arguments: argparse.Namespace) -> int:
    return arguments.run_word(arguments) or 0
