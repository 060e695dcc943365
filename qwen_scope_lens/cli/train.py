"""Train with features: SASFT against code-switching, rare negatives against repetition.

    qsl train languages store/ --targets zh,ru --out language_features.json
    qsl train sasft run.yaml
    qsl train repetition loops prompts.jsonl --model Qwen/Qwen3-1.7B --out loops.jsonl
    qsl train repetition find store/ --out repetition.json
    qsl train repetition screen repetition.json prompts.jsonl --save-plan plan.json
    qsl train grpo run.yaml
    qsl train measure replies.jsonl --script zh

A run is one YAML file; what stands under `trainer` goes to TRL as it is, and a run that was
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

`replies.jsonl` has text, messages, or prompt and completion, and a `language` an example;
`prompts.jsonl` has prompts. The store of `find` is `qsl extract`'s, of texts that loop.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from qwen_scope_lens.cli.options import count, from_zero, layer_list, output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    step = steps.add_parser("languages", help="language features and their means, from a store")
    step.add_argument("store", type=Path)
    step.add_argument("--out", type=output, required=True, help="a JSON file")
    step.add_argument("--targets", required=True, help="the unwanted languages: zh or zh,ru")
    step.add_argument("--label", default="lang", help="the label that says it (%(default)s)")
    step.add_argument("--layers", type=layer_list, help="default: all of the store")
    step.add_argument("--per-layer", type=count, default=2, help="features a layer (%(default)s)")
    step.add_argument("--texts", type=count, default=100, help="a language (%(default)s)")
    step.add_argument("--seed", type=_seed, default=0)
    step.set_defaults(work=_languages)

    step = steps.add_parser("sasft", help="fine-tune with the penalty of SASFT")
    _run_arguments(step)
    step.set_defaults(work=_sasft)

    step = steps.add_parser("repetition", help="repetition features")
    what = step.add_subparsers(dest="what", required=True, metavar="loops|find|screen")
    write = what.add_parser("loops", help="continuations of a model's own that end in a loop")
    write.add_argument("prompts", type=Path, help="JSONL with a prompt in every row")
    write.add_argument("--model", required=True)
    write.add_argument("--out", type=output, required=True, help="JSONL, for `qsl extract`")
    _sampling_arguments(write)
    write.set_defaults(work=_loops)
    find = what.add_parser("find", help="what rises from first to last occurrence, from a store")
    find.add_argument("store", type=Path)
    find.add_argument("--out", type=output, required=True, help="a JSON file")
    find.add_argument("--label", help="only documents whose label ...")
    find.add_argument("--positive", help="... has this value")
    find.add_argument("--layers", type=layer_list, help="default: all of the store")
    find.add_argument("--context", type=count, default=2, help="tokens before (%(default)s)")
    find.add_argument("--min-times", type=count, default=3, help="occurrences (%(default)s)")
    find.add_argument("--top", type=count, default=10, help="features a layer (%(default)s)")
    find.add_argument("--seed", type=_seed, default=0)
    find.set_defaults(work=_repetition)
    screen = what.add_parser("screen", help="which of them make a model loop")
    screen.add_argument("found", type=Path, help="the file that `find` wrote")
    screen.add_argument("prompts", type=Path, help="JSONL with a prompt in every row")
    screen.add_argument("--model", help="default: the one the SAEs were trained on")
    screen.add_argument("--top", type=count, default=20, help="candidates (%(default)s)")
    screen.add_argument("--strength", type=_amount, default=0.3,
                        help="of the residual's length (%(default)s)")  # fmt: skip
    screen.add_argument("--controls", type=count, default=8, help="random directions (%(default)s)")
    screen.add_argument("--features", type=count, default=1, help="in the plan (%(default)s)")
    screen.add_argument("--save-plan", type=output, help="a plan for `qsl train grpo`")
    screen.add_argument("--allow-other-model", action="store_true",
                        help="the SAEs are not known to be the model's")  # fmt: skip
    _sampling_arguments(screen)
    screen.set_defaults(work=_screen)

    step = steps.add_parser("grpo", help="GRPO with one steered rollout in each group")
    _run_arguments(step)
    step.set_defaults(work=_grpo)

    step = steps.add_parser("measure", help="code-switching or repeat ratio of finished replies")
    step.add_argument("replies", type=Path, help="JSONL")
    step.add_argument("--text", default="text", help="the column of the reply (%(default)s)")
    step.add_argument("--prompt", help="a column: replies to one prompt are counted together")
    step.add_argument("--script", help="zh, ru, ko, ...: any character of it; else repetition")
    step.set_defaults(work=_measure)


def _run_arguments(step: argparse.ArgumentParser) -> None:
    step.add_argument("config", type=Path, metavar="RUN.yaml")
    step.add_argument("--fresh", action="store_true", help="ignore checkpoints of an earlier try")


def _sampling_arguments(step: argparse.ArgumentParser) -> None:
    step.add_argument("--samples", type=count, default=2, help="of each prompt (%(default)s)")
    step.add_argument("--new-tokens", type=count, default=256, help="(%(default)s)")
    step.add_argument("--temperature", type=_amount, default=0.7, help="(%(default)s)")
    step.add_argument("--batch", type=count, default=32, help="rows at a time (%(default)s)")
    step.add_argument("--seed", type=_seed, default=0)


def _seed(text: str) -> int:
    number = from_zero(text)
    if number >= 2**32:
        raise argparse.ArgumentTypeError(
            f"a seed of {number.bit_length()} bits: expected 32 or less"
        )
    return number


def _amount(text: str) -> float:
    """A finite number of 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of 0 or more")
    return number


def run(arguments: argparse.Namespace) -> int:
    code: int = arguments.work(arguments)
    return code


def _languages(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.stores.store import FeatureStore
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
    print(f"{'feature':36} {'language':8} {'mono':>7} {'held out':>8} {'chance':>7}")
    for f in table.features:
        line = f"{f.ref!s:36} {f.language:8} {f.monolinguality:7.3f} {f.held_out:8.3f}"
        print(f"{line} {f.chance:7.3f}{'' if f.stands_out else '  below chance'}")
    print(f"written to {arguments.out}; {len(table.languages)} languages have means in it")
    return 0


def _repetition(arguments: argparse.Namespace) -> int:
    import numpy as np

    from qwen_scope_lens.errors import BadCorpus
    from qwen_scope_lens.features.document_sets import DocumentLabel
    from qwen_scope_lens.stores.store import FeatureStore
    from qwen_scope_lens.train.repetition_features import find_repetition_features

    if (arguments.label is None) != (arguments.positive is None):
        raise BadCorpus("--label and --positive belong together: --label kind --positive loop")
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
    head = ("feature", "rise", "held out", "z", "chance z", "last")
    print(f"{head[0]:36} " + " ".join(f"{name:>8}" for name in head[1:]))
    for f in found.features[: arguments.top]:
        numbers = (f.rise, f.held_out, f.z, f.chance, f.last)
        print(f"{f.ref!s:36} " + " ".join(f"{number:8.3f}" for number in numbers))
    documents = found.settings["documents"]
    print(
        f"{len(found.features)} candidates from {documents} documents, written to {arguments.out}"
    )
    print("whether any of them makes the model loop, `qsl train repetition screen` finds out")
    return 0


def _loops(arguments: argparse.Namespace) -> int:
    import json

    from qwen_scope_lens.files import whole_file
    from qwen_scope_lens.models.load import load_model
    from qwen_scope_lens.train.causes import own_loops

    prompts, sampling = _prompts(arguments)
    found = own_loops(
        load_model(arguments.model),
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
    print(f"{len(found)} of {total} continuations end in a loop; written to {arguments.out}")
    return 0


def _screen(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.errors import TooLittleData
    from qwen_scope_lens.models.load import load_model
    from qwen_scope_lens.train.causes import amplified, screen_causes
    from qwen_scope_lens.train.repetition_features import RepetitionFeatures

    refs = [f.ref for f in RepetitionFeatures.load(arguments.found).features[: arguments.top]]
    if not refs:
        raise TooLittleData(f"{arguments.found} has no features: `qsl train repetition find`")
    prompts, sampling = _prompts(arguments)
    causes = screen_causes(
        load_model(arguments.model or refs[0].sae.row.backbone.model_id),
        refs,
        prompts,
        strength=arguments.strength,
        samples=arguments.samples,
        controls=arguments.controls,
        sampling=sampling,
        batch=arguments.batch,
        allow_other_model=arguments.allow_other_model,
    )
    print(causes)
    if not causes.kept:
        raise TooLittleData(
            "no candidate makes the model loop more often than random directions do, so no plan is"
            " written: try more prompts or samples, another strength, or candidates from loops of"
            " the model's own"
        )
    if arguments.save_plan:
        amplified(causes.kept[: arguments.features], arguments.strength).save(arguments.save_plan)
        print(f"plan written to {arguments.save_plan}")
    return 0


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


def _sasft(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.train.runs import run_sasft

    print(f"the model is in {run_sasft(arguments.config, resume=not arguments.fresh)}")
    return 0


def _grpo(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.train.runs import run_grpo

    print(f"the model is in {run_grpo(arguments.config, resume=not arguments.fresh)}")
    return 0


def _measure(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.train.metrics import code_switching_ratio, repeat_ratio
    from qwen_scope_lens.train.runs import read_replies

    replies, prompts = read_replies(arguments.replies, arguments.text, arguments.prompt)
    if arguments.script:
        found = code_switching_ratio(replies, arguments.script, prompts)
        print(f"code-switching ratio, {arguments.script}: {found}")
    else:
        print(f"repeat ratio: {repeat_ratio(replies, prompts)}")
    return 0
