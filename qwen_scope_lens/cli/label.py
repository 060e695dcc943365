"""Read, check, join, search and import label packs: what features mean, as JSON lines.

    qsl label list texts/labels.jsonl --match chinese
    qsl label show texts/labels.jsonl mini-qwen3/w1k-l0-16/6/423
    qsl label check texts/labels.jsonl --store store/
    # needs a second pack, of `qsl label describe`:
    qsl label merge texts/labels.jsonl machine.jsonl --prefer score --out labels.jsonl
    # needs a download from Neuronpedia:
    qsl label import v1/qwen3.5-2b-pt/ --out labels.jsonl

A line of a pack is {"address": "GROUP/LAYER/FEATURE", "text": "...", "score": 0.9, "provenance":
{...}}; score and provenance may be left out, so a pack can be written by hand. `qsl label describe`
writes packs; dashboards, `qsl synth targets` and classification read them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    Word,
    add_json,
    add_model,
    add_sae_files,
    add_words,
    count,
    finite,
    from_zero,
    output,
    print_json,
    remark,
    show,
)
from qwen_scope_lens.cli.synth.features import describe_word
from qwen_scope_lens.cli.synth.generators import add_generator_arguments, agreed, prices, roles

KINDS = ("detection", "fuzzing", "intruder", "output")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, WORDS)


def run(arguments: argparse.Namespace) -> int:
    return arguments.run_word(arguments) or 0


def _pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pack", type=Path, metavar="PACK", action=Input, check=inputs.file, help="JSON lines"
    )


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    _pack(parser)
    parser.add_argument("--match", default="", metavar="REGEX", help="of the text")
    parser.add_argument("--least-score", type=finite)
    add_json(parser)


def _list(arguments: argparse.Namespace) -> None:
    """List the labels of a pack, one per line."""
    from qwen_scope_lens.labels.packs import LabelPack
    from qwen_scope_lens.tables import Table

    found = LabelPack.read(arguments.pack).search(arguments.match, arguments.least_score)
    rows = [(str(ref), label.score, label.text) for ref, label in found.items()]
    show(Table.of(("feature", "score", "label"), rows), arguments.json)


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    _pack(parser)
    parser.add_argument("address", help="such as qwen3-8b-base/w64k-l0-50/20/6159")
    add_json(parser)


def _show(arguments: argparse.Namespace) -> None:
    """Show one label with its provenance."""
    from qwen_scope_lens.errors import UnknownName
    from qwen_scope_lens.labels.packs import LabelPack

    pack = LabelPack.read(arguments.pack)
    if arguments.address not in pack:
        raise UnknownName(f"{arguments.address:.80} has no label in {arguments.pack}: {pack!r}")
    row = pack[arguments.address].to_row()
    if arguments.json:
        print_json(arguments.json, row)
    else:
        print(json.dumps(row, ensure_ascii=False, indent=1))


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "packs", type=Path, nargs="+", metavar="PACK", action=Input, check=inputs.file
    )
    parser.add_argument(
        "--prefer",
        choices=("first", "last", "score"),
        default="first",
        help="which label stays where two packs label one feature (%(default)s)",
    )
    parser.add_argument("--out", type=output, required=True)


def _merge(arguments: argparse.Namespace) -> None:
    """Make one pack of several."""
    from qwen_scope_lens.labels.packs import LabelPack

    merged = LabelPack.merge(map(LabelPack.read, arguments.packs), arguments.prefer)
    merged.write(arguments.out)
    print(f"{len(merged)} labels: {arguments.out}")


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    _pack(parser)
    parser.add_argument(
        "--store",
        type=Path,
        action=Input,
        check=inputs.store,
        help="whose features are compared with those that have a label",
    )
    add_json(parser)


def _check(arguments: argparse.Namespace) -> None:
    """Read all of a pack and count; with --store compare it with the store's features."""
    from qwen_scope_lens.labels.packs import LabelPack

    pack = LabelPack.read(arguments.pack)
    scored = sum(label.score is not None for label in pack.values())
    texts = Counter(label.text.casefold() for label in pack.values())
    shared = sum(n for n in texts.values() if n > 1)
    silent: dict[str, int] | None = None
    if arguments.store:
        from qwen_scope_lens.stores.store import FeatureStore

        silent = pack.silent_in(FeatureStore.open(arguments.store))
    if arguments.json:
        rows = [
            {
                "sae": str(sae),
                "features": sae.row.d_sae,
                "labels": len(pack.of_sae(sae)),
                "never_fire": silent.get(str(sae)) if silent is not None else None,
            }
            for sae in pack.saes
        ]
        counts = {"labels": len(pack), "with_score": scored, "same_text": shared}
        print_json(arguments.json, {**counts, "rows": rows})
        return
    print(f"{len(pack)} labels, {scored} with a score")
    print(f"{shared} share their text with another")
    for sae in pack.saes:
        never = ""
        if silent is not None:
            count = silent.get(str(sae))
            what = f"{count} of them never fire" if count is not None else "the SAE is not"
            never = f", {what} in {arguments.store}"
        print(f"  {sae}: {len(pack.of_sae(sae))} of {sae.row.d_sae} features have a label{never}")


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        action=Input,
        check=_export,
        help="a source, a model, or all that was downloaded",
    )
    add_model(parser)
    parser.add_argument(
        "--sample", type=count, default=32, help="features of each layer that are checked; 32"
    )
    parser.add_argument("--passages", type=count, default=2, help="of each of them; 2")
    parser.add_argument("--seed", type=from_zero, default=0)
    add_sae_files(parser)
    parser.add_argument("--allow-other-model", action="store_true")
    parser.add_argument(
        "--record",
        action="store_true",
        help="keep the ids of accepted layers in QWEN_SCOPE_HOME, for loaded SAEs and exports",
    )
    add_json(parser)
    parser.add_argument("--out", type=output, required=True, metavar="PACK")


def _export(path: Path, _: argparse.Namespace) -> None:
    from qwen_scope_lens.labels.exports import exports_in, require_candidates

    for export in exports_in(path):
        require_candidates(export)


def _import(arguments: argparse.Namespace) -> int:
    """Make a pack of a label export of Neuronpedia, after checking to which SAE it belongs.

    Neuronpedia does not say which k an SAE has that it hosts. Some features are drawn, the texts on
    which they are said to fire are encoded again with every SAE that the export can be, and a layer
    is accepted if one SAE fires on the same tokens (in 70% of the passages) as strongly
    (correlation of 0.8). The labels of refused layers are left out.
    """
    from qwen_scope_lens.address import LayerRef
    from qwen_scope_lens.hosted import record
    from qwen_scope_lens.labels.verified import import_labels

    found = import_labels(
        arguments.folder,
        model=arguments.model,
        features=arguments.sample,
        per_feature=arguments.passages,
        seed=arguments.seed,
        sae_folder=arguments.sae_folder,
        device=arguments.device,
        allow_other_model=arguments.allow_other_model,
        progress=remark,
    )
    show(found.table(), arguments.json, labels=len(found.pack))
    if not found.pack:
        remark("nothing is written: no layer was accepted")
        return 1
    found.pack.write(arguments.out)
    remark(f"written: {arguments.out}")
    for layer in found.layers if arguments.record else ():
        if layer.sae is not None:
            best = next(one for one in layer.tried if one.ref == layer.sae)
            remark(f"recorded: {record(LayerRef.parse(layer.sae), layer.id, best.to_dict())}")
    return 0


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    _pack(parser)
    parser.add_argument(
        "--store", type=Path, required=True, action=Input, check=inputs.store, help="with passages"
    )
    parser.add_argument(
        "--judge", required=True, metavar="SPEC", type=_judge, help="openai:URL#MODEL or hf:MODEL"
    )
    parser.add_argument(
        "--kinds",
        type=_kinds,
        default=list(KINDS),
        help=f"some of {','.join(KINDS)}; default: all of them",
    )
    parser.add_argument("--price-only", action="store_true", help="only say what it would cost")
    parser.add_argument("--templates", type=Path, help="folder of `qsl synth templates`")
    parser.add_argument("--seed", type=from_zero, default=0)
    add_sae_files(parser)
    add_json(parser)
    parser.add_argument("--out", type=output, required=True, metavar="PACK")
    add_generator_arguments(parser)


def _judge(text: str) -> str:
    kind, _, rest = text.partition(":")
    if kind not in ("openai", "hf") or not rest:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: expected openai:URL#MODEL or hf:MODEL")
    return text


def _kinds(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= set(KINDS):
        raise argparse.ArgumentTypeError(f"{text!r:.60}: expected some of {','.join(KINDS)}")
    return names


def _score(arguments: argparse.Namespace) -> int:
    """Test labels by harder questions to a judge, after saying what this will cost.

        # needs an endpoint that judges:
        qsl label score texts/labels.jsonl --store store/ --out scored.jsonl \\
            --judge openai:http://localhost:8000/v1#NAME --price 0.15,0.60

    detection: active passages against near ones (related features fire, or the same token stands,
    but this feature is silent). fuzzing: right marks against moved marks. intruder: without the
    label, the silent passage among active ones. output: the tokens that the feature promotes, among
    others'. The first two are balanced accuracies (0.5 is chance), the others shares of right
    answers (0.2). The provenance says who wrote a label and who judged it. No answer is paid for
    twice.
    """
    from qwen_scope_lens.features.token_effects import promoted_of
    from qwen_scope_lens.labels.packs import LabelPack
    from qwen_scope_lens.labels.scores import questions, requests_of, score, table_of
    from qwen_scope_lens.stores.store import FeatureStore
    from qwen_scope_lens.writers.ledger import Ledger
    from qwen_scope_lens.writers.price import price_of
    from qwen_scope_lens.writers.templates import Templates

    pack, store = LabelPack.read(arguments.pack), FeatureStore.open(arguments.store)
    templates = Templates(arguments.templates)
    asked = questions(
        store,
        pack,
        arguments.kinds,
        promoted=promoted_of(store.manifest.model.id, arguments.sae_folder),
        seed=arguments.seed,
    )
    requests = requests_of(asked, pack, templates, arguments.seed)
    if arguments.price_only:
        remark(str(price_of(requests, prices(arguments))))
        return 0
    folder = arguments.out.with_name(f"{arguments.out.stem}.run")
    with Ledger.open(folder, prices(arguments)) as ledger:
        judge = roles(arguments).open(arguments.judge)
        new = ledger.unanswered(judge.name, requests)
        price = price_of(new, prices(arguments), judge, len(requests) - len(new))
        if not agreed(arguments, price):
            return 1
        scored = score(pack, asked, judge, ledger, templates=templates, seed=arguments.seed)
        remark(ledger.limit_reached or "finished")
        remark(str(ledger.spent))
    show(table_of(scored), arguments.json)
    scored.write(arguments.out)
    remark(f"written: {arguments.out}")
    return 0


WORDS = (
    describe_word,
    Word("score", _score_arguments, _score),
    Word("import", _import_arguments, _import),
    Word("list", _list_arguments, _list),
    Word("show", _show_arguments, _show),
    Word("merge", _merge_arguments, _merge),
    Word("check", _check_arguments, _check),
)
