"""Find the features that data never activates, write data that fires them, prove it.

    qsl synth targets seed_store/ --reference anchor_store/ --labels labels.jsonl \\
        --task "safety fine-tuning" --out targets.json
    qsl synth run targets.json --generator openai:http://localhost:8000/v1 --model-name NAME \\
        --budget 2000 --out data.jsonl
    qsl synth report data.jsonl --targets targets.json
    qsl synth describe anchor_store/ --layer 20 --generator ... --out labels.jsonl
    qsl synth templates --out prompts/

Stores are made by `qsl extract`. Each word has its own help: `qsl synth run --help`.
"""

from __future__ import annotations

import argparse
from importlib import import_module

MODULES = {"run": "write"}  # of words whose module is called otherwise: `run` is taken here
WORDS = {
    "targets": "which features matter, and which of them the seed data lacks",
    "run": "write examples that activate the missing ones",
    "report": "what was kept, why the rest was not, how coverage grew",
    "describe": "describe features from passages, and test the descriptions",
    "templates": "copy prompts and recipes into a folder, to edit them",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD")
    for name, what in WORDS.items():
        module = import_module(f"{__name__}.{MODULES.get(name, name)}")
        sub = words.add_parser(
            name,
            help=what,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run_word=module.run)


def run(arguments: argparse.Namespace) -> int:
    code: int = arguments.run_word(arguments)
    return code
