r"""Run the prompts of benchmarks through a model, and keep the features of every token.

    qsl bench extract gsm8k.jsonl math.jsonl --model Qwen/Qwen3-8B-Base \
        --sae qwen3-8b-base/w64k-l0-50 --layer 20 --out bench/
    qsl bench extract mmlu=cais/mmlu:all --split test --template 'Q: {question}\nA:' ...
    qsl bench extract --tasks gsm8k arc_easy --fewshot 5 ...        # rendered by lm-eval itself
    qsl bench extract --tasks mmlu --limit 1000 --seed 1 ...        # a group: one benchmark

A benchmark is a file (JSONL, CSV, Parquet, text: an item a row), a folder of `datasets`, the name
of a data set on the hub, or with --tasks a task of lm-eval. It is called as its file unless
NAME=FILE says otherwise. A group of lm-eval is one benchmark, its items are called SUBTASK/NUMBER
(--subtasks keeps its tasks apart). --limit draws items by lot, seeded, from all subtasks alike.
Each benchmark gets one store in --out; what is finished is not run again, and later calls may add
more benchmarks. Prompts longer than the model's context are refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwen_scope_lens.cli.bench.options import add_prompt_format, prompt_format, say, say_nothing
from qwen_scope_lens.cli.options import count, from_zero, layer_list, memory
from qwen_scope_lens.errors import BadCorpus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmarks", nargs="*", metavar="FILE", help="or NAME=FILE, or a data set")
    parser.add_argument("--model", help="a folder or hub name; default: what the SAEs belong to")
    parser.add_argument("--sae", required=True, help="a group, such as qwen3-8b-base/w64k-l0-50")
    layers = parser.add_mutually_exclusive_group(required=True)
    layers.add_argument("--layer", type=from_zero)
    layers.add_argument("--layers", help="such as 0-3,7; or all, to see how conclusions move")
    parser.add_argument("--out", required=True, type=Path, help="a folder for the suite")
    add_prompt_format(parser)
    parser.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, help="with --chat: the template's mode"
    )
    parser.add_argument("--limit", type=count, help="items of each benchmark, drawn by lot")
    parser.add_argument(
        "--seed", type=from_zero, default=0, help="of the draw, kept with it; default: %(default)s"
    )
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="of lm-eval")
    parser.add_argument(
        "--subtasks", action="store_true", help="a benchmark for every task of a group, not one"
    )
    parser.add_argument("--task-path", type=Path, help="a folder with lm-eval tasks of your own")
    parser.add_argument(
        "--fewshot", type=from_zero, help="examples before the question (lm-eval tasks)"
    )
    work = parser.add_argument_group("the work")
    work.add_argument("--token-budget", type=count, help="tokens of a batch, default 4096")
    work.add_argument("--sae-memory", type=memory, metavar="SIZE", help="such as 8GB")
    work.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    work.add_argument("--folder", type=Path, help="read the SAEs from here only")
    work.add_argument("--revision", help="of the SAEs on the hub")
    work.add_argument("--quiet", action="store_true", help="no progress bar, no remarks")


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.bench.suite import extract_suite
    from qwen_scope_lens.catalog import find_group

    prompts, facts = _prompts(arguments)
    layers = arguments.layers
    if layers is None:
        layers = [arguments.layer]
    elif layers != "all":
        try:
            layers = layer_list(layers)
        except argparse.ArgumentTypeError as error:
            raise BadCorpus(str(error)) from error
        except ValueError as error:  # thousands of digits
            raise BadCorpus(f"--layers {layers[:40]}: no list of layers such as 0-3,7") from error
    suite = extract_suite(
        prompts,
        model=arguments.model or find_group(arguments.sae).backbone.model_id,
        group=arguments.sae,
        layers=layers,
        out=arguments.out,
        facts=facts,
        say=say_nothing if arguments.quiet else say,
        enable_thinking=arguments.thinking,
        add_generation_prompt=arguments.chat,
        token_budget=arguments.token_budget,
        sae_memory=arguments.sae_memory,
        device=arguments.device,
        sae_folder=arguments.folder,
        sae_revision=arguments.revision,
        progress=not arguments.quiet,
    )
    print(f"{arguments.out}: {len(suite.names)} benchmarks, layers {_span(suite.layers)}")
    for name in suite.names:
        print(f"  {name}  {suite[name].store.n_docs:,} items")
    return 0


def _prompts(arguments: argparse.Namespace) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The prompts of every benchmark, and how they were made."""
    from qwen_scope_lens.bench.prompts import read_prompts, sampled

    how = prompt_format(arguments)
    draw = {} if arguments.limit is None else {"limit": arguments.limit, "seed": arguments.seed}
    prompts: dict[str, list[Any]] = {}
    facts: dict[str, Any] = {}
    for word in arguments.benchmarks:
        name, equals, source = word.partition("=")
        if not equals or Path(word).exists():
            name, source = (
                Path(word).stem if Path(word).exists() else word.split("/")[-1].split(":")[0],
                word,
            )
        _new(name, prompts)
        everything = list(read_prompts(source, how))
        chosen = sampled(len(everything), arguments.limit, arguments.seed)
        prompts[name] = [everything[i] for i in chosen]
        said = source.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        facts[name] = {"source": said, **how.facts(), **draw}
        facts[name] |= {"drawn_from": len(everything)} if draw else {}
    if arguments.tasks:
        from qwen_scope_lens.bench.prompts import task_prompts

        found = task_prompts(
            arguments.tasks,
            arguments.task_path,
            arguments.fewshot,
            arguments.limit,
            _chat_template(arguments) if arguments.chat else None,
            arguments.seed,
            arguments.subtasks,
        )
        for name, documents in found.items():
            _new(name, prompts)
            prompts[name] = documents
            facts[name] = {"task": name, "fewshot": arguments.fewshot, "chat": arguments.chat}
            facts[name] |= draw
    if not prompts:
        raise BadCorpus("no benchmark was named: pass files, data sets, or --tasks")
    return prompts, facts


def _new(name: str, prompts: dict[str, list[Any]]) -> None:
    if name in prompts:
        raise BadCorpus(f"two benchmarks are called {name}: write NAME=FILE")


def _chat_template(arguments: argparse.Namespace) -> Any:
    """lm-eval renders messages with the model's own template."""
    from functools import partial

    from qwen_scope_lens.catalog import bundled_model, find_group
    from qwen_scope_lens.models.checkpoint import open_tokenizer

    if arguments.thinking is None:
        raise BadCorpus("--chat: say --thinking or --no-thinking, the template differs with it")
    name = arguments.model or find_group(arguments.sae).backbone.model_id
    tokenizer = open_tokenizer(str(bundled_model(name) or name))
    return partial(
        tokenizer.apply_chat_template, tokenize=False, enable_thinking=arguments.thinking
    )


def _span(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
