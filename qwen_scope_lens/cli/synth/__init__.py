"""Find the features that data never activates, write data that fires them, and prove it.

    qsl synth targets seed_store/ --reference anchor_store/ --labels labels.jsonl \\
        --task "safety fine-tuning" --out targets.json
    qsl synth run targets.json --generator openai:http://localhost:8000/v1 --model-name NAME \\
        --budget 2000 --out data.jsonl
    qsl synth report data.jsonl --targets targets.json
    qsl synth describe anchor_store/ --layers 20 --generator ... --out labels.jsonl
    qsl synth templates --out prompts/

Stores are made by `qsl extract`. Each word has its own help: `qsl synth run --help`.
"""

from __future__ import annotations

import argparse

from qwen_scope_lens.cli.options import add_words
from qwen_scope_lens.cli.synth import data, features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, (*features.WORDS, *data.WORDS))


def run(arguments: argparse.Namespace) -> int:
    return arguments.run_word(arguments) or 0
