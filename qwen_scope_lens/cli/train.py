"""Train with features: SASFT against code-switching, rare negatives against repetition.

    qsl train languages store/ --targets zh,ru --out language_features.json
    qsl train sasft texts/sasft.yaml
    # needs a file of your own, without features:
    qsl train sft run.yaml
    qsl train repetition loops texts/prompts.jsonl --model mini-qwen3 \\
        --temperature 0.4 --new-tokens 128 --out own.jsonl
    qsl extract own.jsonl --sae mini-qwen3/w1k-l0-16 --layers 3-6 --out own_loops/
    qsl train repetition find own_loops/ --out repetition.json
    qsl train grpo texts/grpo.yaml
    qsl train measure texts/replies.jsonl --text reply --script zh
    # needs hundreds of prompts, and time:
    qsl train repetition screen repetition.json prompts.jsonl --save-plan plan.json

A run is one YAML file. The settings under `trainer` go to TRL as they are. A run that was
interrupted goes on from its last checkpoint:

    model: Qwen/Qwen3-1.7B                  |    model: Qwen/Qwen3-1.7B
    train: replies.jsonl                    |    train: prompts.jsonl
    language_features: features.json        |    plan: plan.json
    lora: {r: 16}                           |    rewards: [no_repetition]
    trainer:                                |    trainer:
      output_dir: runs/sasft                |      output_dir: runs/grpo
      targets: [zh]                         |      num_generations: 8
      layers: [-2, -1]                      |      max_completion_length: 512
      lam: 0.001                            |      learning_rate: 1.0e-6

`replies.jsonl` has text, messages, or prompt and completion, and a `language` per example;
`prompts.jsonl` has prompts. The store of `find` comes from `qsl extract`, of texts that loop.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    Word,
    add_json,
    add_layers,
    add_model,
    add_store,
    add_words,
    count,
    not_negative,
    output,
    print_json,
    remark,
    seed,
    show,
)
from qwen_scope_lens.cli.plan_options import add_allowance
from qwen_scope_lens.extras import check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, WORDS)


def run(arguments: argparse.Namespace) -> int:
    return arguments.run_word(arguments) or 0


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="RUN.yaml", action=Input, check=inputs.file)
    parser.add_argument("--fresh", action="store_true", help="ignore checkpoints of an earlier try")


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=count, default=2, help="per prompt (%(default)s)")
    parser.add_argument("--new-tokens", type=count, default=256, help="(%(default)s)")
    parser.add_argument("--temperature", type=not_negative, default=0.7, help="(%(default)s)")
    parser.add_argument("--batch", type=count, default=32, help="rows at a time (%(default)s)")
    parser.add_argument("--seed", type=seed, default=0)


def _languages_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("--targets", required=True, metavar="ZH,RU", help="languages to look for")
    parser.add_argument("--out", type=output, required=True, help="a JSON file")
    parser.add_argument(
        "--label",
        default="lang",
        action=Input,
        check=inputs.stored_label,
        help="the label that says it (%(default)s)",
    )
    add_layers(parser)
    parser.add_argument(
        "--per-layer", type=count, default=2, help="features per layer (%(default)s)"
    )
    parser.add_argument("--texts", type=count, default=100, help="per language (%(default)s)")
    parser.add_argument("--seed", type=seed, default=0)
    add_json(parser)


def _languages(arguments: argparse.Namespace) -> None:
    """Find the features of languages, and their mean values, in a store."""
    from qwen_scope_lens.stores.store import FeatureStore
    from qwen_scope_lens.tables import Table
    from qwen_scope_lens.train.language_features import find_language_features

    table = find_language_features(
        FeatureStore.open(arguments.store),
        [target.strip() for target in arguments.targets.split(",")],
        label=arguments.label,
        layers=arguments.layers,
        per_layer=arguments.per_layer,
        texts=arguments.texts,
        seed=arguments.seed,
    )
    table.save(arguments.out)
    rows = [
        (str(f.ref), f.language, f.monolinguality, f.held_out, f.chance, f.stands_out)
        for f in table.features
    ]
    columns = ("feature", "language", "monolinguality", "held out", "chance", "above chance")
    show(Table.of(columns, rows), arguments.json)
    remark(f"written: {arguments.out}; {len(table.languages)} languages have means in it")


def _find_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("--out", type=output, required=True, help="a JSON file")
    parser.add_argument(
        "--label",
        action=Input,
        check=inputs.stored_label,
        help="only documents whose label ...",
    )
    parser.add_argument("--positive", help="... has this value")
    add_layers(parser)
    parser.add_argument("--context", type=count, default=2, help="tokens before (%(default)s)")
    parser.add_argument("--min-times", type=count, default=3, help="occurrences (%(default)s)")
    parser.add_argument("--top", type=count, default=10, help="features per layer (%(default)s)")
    parser.add_argument("--seed", type=seed, default=0)
    add_json(parser)


def _find(arguments: argparse.Namespace) -> None:
    """Find what rises from the first to the last occurrence of a phrase, in a store."""
    from qwen_scope_lens.errors import BadCorpus

    if (arguments.label is None) != (arguments.positive is None):
        raise BadCorpus("--label and --positive belong together: --label kind --positive loop")

    import numpy as np

    from qwen_scope_lens.features.document_sets import DocumentLabel
    from qwen_scope_lens.stores.store import FeatureStore
    from qwen_scope_lens.tables import Table
    from qwen_scope_lens.train.repetition_features import find_repetition_features

    store = FeatureStore.open(arguments.store)
    docs = None
    if arguments.label is not None:
        label = DocumentLabel.of(store, arguments.label)
        docs = np.flatnonzero(label.isin(arguments.positive)).tolist()
    found = find_repetition_features(
        store,
        docs=docs,
        layers=arguments.layers,
        context=arguments.context,
        min_times=arguments.min_times,
        top=arguments.top,
        seed=arguments.seed,
    )
    found.save(arguments.out)
    rows = [
        (str(f.ref), f.rise, f.held_out, f.z, f.chance, f.last)
        for f in found.features[: arguments.top]
    ]
    columns = ("feature", "rise", "held out", "z", "chance z", "last")
    show(Table.of(columns, rows), arguments.json)
    documents = found.settings["documents"]
    remark(
        f"{len(found.features)} candidates from {documents} documents, written to {arguments.out}"
    )
    remark("`qsl train repetition screen` finds out whether any of them makes the model loop")


def _loops_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts",
        type=Path,
        action=Input,
        check=inputs.corpus,
        help="JSONL with a prompt in every row",
    )
    add_model(parser, "a folder, or a name on the hub", required=True, device=False)
    parser.add_argument("--out", type=output, required=True, help="JSONL, for `qsl extract`")
    _sampling_arguments(parser)


def _loops(arguments: argparse.Namespace) -> None:
    """Write continuations of a model's own that end in a loop."""
    import json

    from qwen_scope_lens.files import whole_file
    from qwen_scope_lens.models.open import open_model
    from qwen_scope_lens.train.causes import own_loops

    prompts, sampling = _prompts(arguments)
    found = own_loops(
        open_model(arguments.model),
        prompts,
        samples=arguments.samples,
        sampling=sampling,
        batch=arguments.batch,
    )
    rows = [
        json.dumps({"text": prompt + reply.text}, ensure_ascii=False) for prompt, reply in found
    ]
    with whole_file(arguments.out) as partial:
        partial.write_text("".join(f"{row}\n" for row in rows), "utf-8")
    total = len(prompts) * arguments.samples
    print(f"{len(found)} of {total} continuations end in a loop")
    remark(f"written: {arguments.out}")


def _screen_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "found",
        type=Path,
        action=Input,
        check=inputs.made_by("qsl train repetition find", "qsl-repetition-features"),
        help="the file that `find` wrote",
    )
    parser.add_argument(
        "prompts",
        type=Path,
        action=Input,
        check=inputs.corpus,
        help="JSONL with a prompt in every row",
    )
    add_model(parser, device=False)
    parser.add_argument("--top", type=count, default=20, help="candidates (%(default)s)")
    parser.add_argument(
        "--strength", type=not_negative, default=0.3, help="of the residual's norm (%(default)s)"
    )
    parser.add_argument("--controls", type=count, default=8, help="random directions (%(default)s)")
    parser.add_argument("--features", type=count, default=1, help="in the plan (%(default)s)")
    parser.add_argument("--save-plan", type=output, help="a plan for `qsl train grpo`")
    add_allowance(parser)
    _sampling_arguments(parser)
    add_json(parser)


def _screen(arguments: argparse.Namespace) -> None:
    """Find out which repetition features make a model loop."""
    from qwen_scope_lens.errors import TooLittleData
    from qwen_scope_lens.models.open import open_model
    from qwen_scope_lens.train.causes import amplified, screen_causes
    from qwen_scope_lens.train.repetition_features import RepetitionFeatures

    refs = [f.ref for f in RepetitionFeatures.load(arguments.found).features[: arguments.top]]
    if not refs:
        raise TooLittleData(f"{arguments.found} has no features: `qsl train repetition find`")
    prompts, sampling = _prompts(arguments)
    causes = screen_causes(
        open_model(arguments.model or refs[0].sae.row.backbone.model_id),
        refs,
        prompts,
        strength=arguments.strength,
        samples=arguments.samples,
        controls=arguments.controls,
        sampling=sampling,
        batch=arguments.batch,
        allow_other_model=arguments.allow_other_model,
    )
    if arguments.json:
        rows = [
            {
                "feature": str(one.ref),
                "kept": one.kept,
                "above_random": one.above,
                **asdict(one.ratio),
            }
            for one in causes.candidates
        ]
        facts = {"untouched": causes.untouched, "controls": causes.controls, "rows": rows}
        print_json(arguments.json, facts)
    else:
        print(causes)
    if not causes.kept:
        raise TooLittleData(
            "no candidate makes the model loop more often than random directions do, so no plan is"
            " written: try more prompts or samples, another strength, or candidates from loops of"
            " the model's own"
        )
    if arguments.save_plan:
        amplified(causes.kept[: arguments.features], arguments.strength).save(arguments.save_plan)
        remark(f"plan written: {arguments.save_plan}")


def _prompts(arguments: argparse.Namespace) -> tuple[list[str], Any]:
    from qwen_scope_lens.errors import BadCorpus
    from qwen_scope_lens.steering.generate import Sampling
    from qwen_scope_lens.stores.corpus import read_rows

    prompts = []
    for where, row in read_rows(arguments.prompts):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise BadCorpus(f"{where}: expected an object with a prompt, a text")
        prompts.append(row["prompt"])
    return prompts, Sampling(arguments.new_tokens, arguments.temperature, seed=arguments.seed)


def _sasft(arguments: argparse.Namespace) -> None:
    """Fine-tune with the penalty of SASFT."""
    check("trl", "train")
    from qwen_scope_lens.train.runs import run_sasft

    print(run_sasft(arguments.config, resume=not arguments.fresh))
    remark("this folder holds the model")


def _sft(arguments: argparse.Namespace) -> None:
    """Fine-tune without any feature: the arm to compare with, or on data of `qsl synth`."""
    check("trl", "train")
    from qwen_scope_lens.train.runs import run_sft

    print(run_sft(arguments.config, resume=not arguments.fresh))
    remark("this folder holds the model, or with lora the adapter")


def _grpo(arguments: argparse.Namespace) -> None:
    """Train with GRPO, with one steered rollout in each group."""
    check("trl", "train")
    from qwen_scope_lens.train.runs import run_grpo

    print(run_grpo(arguments.config, resume=not arguments.fresh))
    remark("this folder holds the model")


def _measure_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "replies",
        type=Path,
        action=Input,
        check=inputs.corpus,
        help="JSONL, such as `qsl synth run` writes",
    )
    parser.add_argument(
        "--text",
        help="the column of the reply; default: text, reply, completion, or the last message of"
        " the assistant in messages",
    )
    parser.add_argument("--prompt", help="a column: replies to one prompt are counted together")
    parser.add_argument(
        "--script", help="zh, ru, ko, ...: count replies with any character of it; else repetition"
    )
    add_json(parser)


def _measure(arguments: argparse.Namespace) -> None:
    """Measure the code-switching ratio or the repeat ratio of finished replies."""
    from qwen_scope_lens.train.metrics import code_switching_ratio, read_replies, repeat_ratio

    replies, prompts = read_replies(arguments.replies, arguments.text, arguments.prompt)
    if arguments.script:
        name = f"code-switching ratio, {arguments.script}"
        found = code_switching_ratio(replies, arguments.script, prompts)
    else:
        name, found = "repeat ratio", repeat_ratio(replies, prompts)
    if arguments.json:
        print_json(arguments.json, {"measure": name, "value": found.value, **asdict(found)})
    else:
        print(f"{name}: {found}")


def _repetition_words(parser: argparse.ArgumentParser) -> None:
    add_words(parser, REPETITION_WORDS, "what")


def _repetition(arguments: argparse.Namespace) -> None:
    """Find the features behind repetition: loops, find, screen."""
    arguments.run_what(arguments)


REPETITION_WORDS = (
    Word("loops", _loops_arguments, _loops),
    Word("find", _find_arguments, _find),
    Word("screen", _screen_arguments, _screen),
)
WORDS = (
    Word("languages", _languages_arguments, _languages),
    Word("sasft", _run_arguments, _sasft),
    Word("sft", _run_arguments, _sft),
    Word("repetition", _repetition_words, _repetition),
    Word("grpo", _run_arguments, _grpo),
    Word("measure", _measure_arguments, _measure),
)
