"""Read, check, join and search label packs: what features mean, as JSON lines.

    qsl label list labels.jsonl --match chinese --least-score 0.8
    qsl label show labels.jsonl qwen3-8b-base/w64k-l0-50/20/6159
    qsl label merge mine.jsonl machine.jsonl --prefer score --out labels.jsonl
    qsl label check labels.jsonl --store store/

A line of a pack is {"address": "GROUP/LAYER/FEATURE", "text": "...", "score": 0.9, "provenance":
{...}}; score and provenance may be left out, so a pack can be written by hand. `qsl synth describe`
writes packs; dashboards, `qsl synth targets` and classification read them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from qwen_scope_lens.cli.options import finite, output
from qwen_scope_lens.cli.terminal import plain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD")
    listing = words.add_parser("list", help="a line a label")
    listing.add_argument("pack", type=Path)
    listing.add_argument("--match", default="", metavar="REGEX", help="of the text")
    listing.add_argument("--least-score", type=finite)
    listing.set_defaults(run_word=_list)
    show = words.add_parser("show", help="one label with its provenance")
    show.add_argument("pack", type=Path)
    show.add_argument("address", help="such as qwen3-8b-base/w64k-l0-50/20/6159")
    show.set_defaults(run_word=_show)
    merge = words.add_parser("merge", help="one pack of several")
    merge.add_argument("packs", type=Path, nargs="+", metavar="PACK")
    merge.add_argument(
        "--prefer", choices=("first", "last", "score"), default="first",
        help="where two label one feature (%(default)s)",
    )  # fmt: skip
    merge.add_argument("--out", type=output, required=True)
    merge.set_defaults(run_word=_merge)
    check = words.add_parser("check", help="read it all; with --store compare with its features")
    check.add_argument("pack", type=Path)
    check.add_argument("--store", type=Path)
    check.set_defaults(run_word=_check)


def run(arguments: argparse.Namespace) -> int:
    code: int = arguments.run_word(arguments)
    return code


def _list(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.labels.packs import LabelPack

    for ref, label in LabelPack.read(arguments.pack).search(
        arguments.match, arguments.least_score
    ).items():  # fmt: skip
        score = "     " if label.score is None else f"{label.score:.3f}"
        print(plain(f"{ref!s:36} {score}  {label.text}"))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.errors import UnknownName
    from qwen_scope_lens.labels.packs import LabelPack

    pack = LabelPack.read(arguments.pack)
    if arguments.address not in pack:
        raise UnknownName(f"{arguments.address:.80} has no label in {arguments.pack}: {pack!r}")
    print(json.dumps(pack[arguments.address].to_row(), ensure_ascii=False, indent=1))
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.labels.packs import LabelPack

    merged = LabelPack.merge(map(LabelPack.read, arguments.packs), arguments.prefer)
    merged.write(arguments.out)
    print(f"{len(merged)} labels: {arguments.out}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.labels.packs import LabelPack

    pack = LabelPack.read(arguments.pack)
    scored = sum(label.score is not None for label in pack.values())
    print(f"{len(pack)} labels, {scored} with a score")
    texts = Counter(label.text.casefold() for label in pack.values())
    print(f"{sum(n for n in texts.values() if n > 1)} share their text with another")
    silent: dict[str, int] = {}
    if arguments.store:
        from qwen_scope_lens.stores.store import FeatureStore

        silent = pack.silent_in(FeatureStore.open(arguments.store))
    for sae in pack.saes:
        never = f", {silent[str(sae)]} never fire in {arguments.store}" if silent else ""
        print(f"  {sae}: {len(pack.of_sae(sae))} of {sae.row.d_sae} features{never}")
    return 0
