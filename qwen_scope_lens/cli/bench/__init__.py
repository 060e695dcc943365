"""What a benchmark measures, from the features its prompts activate; no evaluation is run.

    qsl bench extract texts/sums.jsonl texts/capitals.jsonl --sae mini-qwen3/w1k-l0-16 \\
        --layers 6 --out bench/
    qsl bench redundancy bench/
    qsl bench overlap bench/
    qsl bench subset bench/sums --coverage 0.95
    qsl bench report bench/ --out report.html

`extract` runs the prompts through a model once; everything else reads its stores. `qsl bench
WORD --help` explains one. The method is section 4 of the Qwen-Scope paper; where the paper says
nothing (layer, prompt format, token position) there is an option.
"""

from __future__ import annotations

import argparse

from qwen_scope_lens.cli.bench import extract, items, suites
from qwen_scope_lens.cli.options import add_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, (*extract.WORDS, *suites.WORDS, *items.WORDS))


def run(arguments: argparse.Namespace) -> int:
    return arguments.run_word(arguments) or 0
