"""A tour, offline, on the embedded toy model: verify, read, extract, rank, steer, measure, look.

    qsl demo
    qsl demo --language ru --out tour/

It finds the features that tell one language from seven others, generates with them suppressed and
amplified beside a random direction of the same length, measures a few small benchmarks by the
features they touch, and writes a site with a page for every feature.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--language", choices=("zh", "ko", "ru"), default="zh", help="default: %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("qsl-demo"), help="the site's folder (%(default)s/)"
    )


def run(arguments: argparse.Namespace) -> int:
    import torch

    from qwen_scope_lens.mini.demo import run as tour

    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    tour(arguments.language, arguments.out)
    return 0
