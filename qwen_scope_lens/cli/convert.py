"""Convert between file formats; `qsl convert WORD --help` explains each.

official-to-saelens    published layer files -> SAELens folders, streamed, resumable
openinterp-to-saelens  OpenInterpretability's Qwen3.6-27B safetensors -> SAELens folders
saelens-to-official    a TopK SAE of your own -> the published layout
"""

from __future__ import annotations

import argparse
from importlib import import_module
from types import ModuleType

from qwen_scope_lens.cli.options import add_quiet

CONVERTERS = ("official-to-saelens", "openinterp-to-saelens", "saelens-to-official")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(dest="what", metavar="WORD", required=True)
    for name in CONVERTERS:
        module = _module(name)
        sub = choices.add_parser(
            name,
            help=(module.__doc__ or "").splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        add_quiet(sub)


def run(arguments: argparse.Namespace) -> int:
    code: int = _module(arguments.what).run(arguments)
    return code


def _module(name: str) -> ModuleType:
    return import_module(f"qwen_scope_lens.converters.{name.replace('-', '_')}")
