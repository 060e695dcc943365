"""A tour, offline, on the embedded toy model: verify, read, find a language's features, steer.

It finds by contrast the features that fire on one language, then generates with them suppressed and
amplified, beside a random direction of the same length.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--language", choices=("zh", "ko", "ru"), default="zh", help="default: %(default)s"
    )


def run(arguments: argparse.Namespace) -> int:
    import torch

    from qwen_scope_lens.mini.demo import run as tour

    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    tour(arguments.language)
    return 0
