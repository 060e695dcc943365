"""Read, compare and steer in a browser: `qsl serve`, with its page opened.

    qsl app                            # until Ctrl-C; on the toy model, no download
    qsl app --site site/ --labels texts/labels.jsonl    # until Ctrl-C; with every feature's page
    # needs the hub:
    qsl app --model Qwen/Qwen3-8B-Base --sae qwen3-8b-base/w64k-l0-50 --layers 16-20

It takes the options of `qsl serve` (docs/serve.md).
"""

from __future__ import annotations

from qwen_scope_lens.cli import serve
from qwen_scope_lens.cli.serve import run

__all__ = ["add_arguments", "run"]


def add_arguments(parser: serve.argparse.ArgumentParser) -> None:
    serve.add_arguments(parser)
    parser.set_defaults(open=True)
