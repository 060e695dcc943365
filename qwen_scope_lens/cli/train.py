"""Train with features: SASFT against code-switching, rare negatives against repetition.

    qsl train languages store/ --targets zh,ru --out language_features.json
    qsl train sasft run.yaml
    qsl train repetition find store/ --label kind --positive loop --out repetition.json
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
`prompts.jsonl` has prompts. `qsl steer --save-plan` writes a plan.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_scope_lens.cli.arguments import count, from_zero, layer_list, output


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
    step.add_argument("--seed", type=from_zero, default=0)
    step.set_defaults(work=_languages)

    step = steps.add_parser("sasft", help="fine-tune with the penalty of SASFT")
    _run_arguments(step)
    step.set_defaults(work=_sasft)

    step = steps.add_parser("repetition", help="repetition features")
    what = step.add_subparsers(dest="what", required=True, metavar="find")
    find = what.add_parser("find", help="what rises from first to last occurrence, from a store")
    find.add_argument("store", type=Path)
    find.add_argument("--out", type=output, required=True, help="a JSON file")
    find.add_argument("--label", help="only documents whose label ...")
    find.add_argument("--positive", help="... has this value")
    find.add_argument("--layers", type=layer_list, help="default: all of the store")
    find.add_argument("--context", type=count, default=2, help="tokens before (%(default)s)")
    find.add_argument("--min-times", type=count, default=3, help="occurrences (%(default)s)")
    find.add_argument("--top", type=count, default=10, help="features a layer (%(default)s)")
    find.add_argument("--seed", type=from_zero, default=0)
    find.set_defaults(work=_repetition)

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


def run(arguments: argparse.Namespace) -> int:
    code: int = arguments.work(arguments)
    return code


def _languages(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.features.store import FeatureStore
    from qwen_scope_lens.training.languages import find_language_features

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
        print(
            f"{f.ref!s:36} {f.language:8} {f.monolinguality:7.3f} {f.held_out:8.3f} {f.chance:7.3f}"
        )
    print(f"written to {arguments.out}; {len(table.languages)} languages have means in it")
    return 0


def _repetition(arguments: argparse.Namespace) -> int:
    import numpy as np

    from qwen_scope_lens.errors import BadCorpus
    from qwen_scope_lens.features.store import FeatureStore
    from qwen_scope_lens.training.repetition import find_repetition_features

    if (arguments.label is None) != (arguments.positive is None):
        raise BadCorpus("--label and --positive belong together: --label kind --positive loop")
    store = FeatureStore.open(arguments.store)
    docs = None
    if arguments.label is not None:
        values = store.labels(arguments.label)
        docs = np.flatnonzero([str(value) == arguments.positive for value in values]).tolist()
        if not docs:
            there = ", ".join(sorted({str(value) for value in values})[:20])
            raise BadCorpus(
                f"no document has {arguments.label} = {arguments.positive}: there are {there}"
            )
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
    count = sum(feature.stands_out for feature in found.features)
    documents = found.settings["documents"]
    print(f"{count} above chance, from {documents} documents; written to {arguments.out}")
    return 0


def _sasft(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.training.runs import run_sasft

    print(f"the model is in {run_sasft(arguments.config, resume=not arguments.fresh)}")
    return 0


def _grpo(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.training.runs import run_grpo

    print(f"the model is in {run_grpo(arguments.config, resume=not arguments.fresh)}")
    return 0


def _measure(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.training.metrics import code_switching_ratio, repeat_ratio
    from qwen_scope_lens.training.runs import read_replies

    replies, prompts = read_replies(arguments.replies, arguments.text, arguments.prompt)
    if arguments.script:
        found = code_switching_ratio(replies, arguments.script, prompts)
        print(f"code-switching ratio, {arguments.script}: {found}")
    else:
        print(f"repeat ratio: {repeat_ratio(replies, prompts)}")
    return 0
