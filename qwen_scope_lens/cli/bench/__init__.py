"""What a benchmark measures, from the features its prompts activate; no evaluation is run.

    qsl bench extract gsm8k.jsonl math.jsonl --model M --sae GROUP --layer 20 --out bench/
    qsl bench redundancy bench/
    qsl bench overlap bench/
    qsl bench subset bench/gsm8k --coverage 0.95
    qsl bench report bench/ --scores models_by_benchmark.csv --out report.html

`extract` runs the prompts through a model once; everything else reads its stores. `qsl bench
WORD --help` explains one. The method is section 4 of the Qwen-Scope paper; where it is silent
(layer, prompt format, token position) there is an option.
"""

from __future__ import annotations

import argparse
from importlib import import_module

WORDS = {
    "extract": "run the prompts of benchmarks through a model and its SAEs",
    "redundancy": "how much of each benchmark repeats itself",
    "overlap": "how much of each benchmark the others cover",
    "subset": "the smallest subset that keeps a share of the footprint",
    "screen": "do new items add anything to a benchmark?",
    "duplicates": "near-duplicates between two benchmarks, or within one",
    "contamination": "how much of a benchmark a training set contains",
    "report": "all of it as one page, with a panel's scores where there are any",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    words = parser.add_subparsers(dest="word", metavar="WORD", required=True)
    for word, what in WORDS.items():
        module = import_module(f"{__name__}.{word}")
        one = words.add_parser(
            word,
            help=what,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(one)


def run(arguments: argparse.Namespace) -> int:
    code: int = import_module(f"{__name__}.{arguments.word}").run(arguments)
    return code
