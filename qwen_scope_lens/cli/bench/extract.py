"""`qsl bench extract`, and the options that say how a row of a file becomes a prompt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    Word,
    add_group,
    add_json,
    add_model,
    add_old,
    add_sae_files,
    count,
    from_zero,
    layer_list,
    memory,
    print_json,
    remark,
)
from qwen_scope_lens.errors import BadCorpus
from qwen_scope_lens.extras import check

if TYPE_CHECKING:
    from qwen_scope_lens.bench.prompts import PromptFormat

__all__ = ["WORDS", "add_prompt_format", "prompt_format"]


def add_prompt_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--column", help="the column with the prompt (default: prompt, question or text)"
    )
    parser.add_argument("--template", help="such as 'Q: {question}\\nA. {choices[0]}\\nAnswer:'")
    parser.add_argument("--split", help="of a Hugging Face data set")
    parser.add_argument(
        "--chat", action="store_true", help="send each prompt as a user's message, by chat template"
    )


def prompt_format(arguments: argparse.Namespace) -> PromptFormat:
    from qwen_scope_lens.bench.prompts import PromptFormat

    template = arguments.template
    if template is not None:  # a shell hands over \n as two characters
        template = template.replace("\\n", "\n")
    return PromptFormat(arguments.column, template, arguments.chat, arguments.split)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "benchmarks",
        nargs="*",
        metavar="FILE",
        action=Input,
        check=_benchmark,
        help="or NAME=FILE, or a data set",
    )
    add_group(parser)
    parser.add_argument(
        "--layers",
        type=_layers,
        required=True,
        action=Input,
        check=_of_group,
        help="such as 20 or 0-3,7; or all, to see how the conclusions change from layer to layer",
    )
    add_old(parser, "--layer", "--layers")
    parser.add_argument("--out", required=True, type=Path, help="a folder for the suite")
    add_json(parser)
    add_prompt_format(parser)
    parser.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, help="with --chat: the template's mode"
    )
    parser.add_argument(
        "--last-token",
        action="store_true",
        help="store the last token of each prompt only; no other position can be read then",
    )
    parser.add_argument("--limit", type=count, help="draw this many items of each benchmark by lot")
    parser.add_argument(
        "--seed", type=from_zero, default=0, help="of the draw, kept with it; default: %(default)s"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        action=Input,
        check=lambda task, arguments: check("lm_eval", "lm-eval"),
        help="tasks of lm-eval",
    )
    parser.add_argument(
        "--subtasks", action="store_true", help="make a benchmark of every task of a group, not one"
    )
    parser.add_argument("--task-path", type=Path, help="a folder with lm-eval tasks of your own")
    parser.add_argument(
        "--fewshot", type=from_zero, help="examples before the question (lm-eval tasks)"
    )
    work = parser.add_argument_group("the work")
    add_model(work)
    add_sae_files(work, revision=True)
    work.add_argument("--token-budget", type=count, help="tokens per batch; default: 4096")
    work.add_argument("--sae-memory", type=memory, metavar="SIZE", help="such as 8GB")


def _layers(text: str) -> list[int] | str:
    return text if text == "all" else layer_list(text)


def _of_group(layers: list[int] | str, arguments: argparse.Namespace) -> None:
    inputs.group_layers([] if isinstance(layers, str) else layers, arguments)


def _benchmark(word: str, arguments: argparse.Namespace) -> None:
    inputs.corpus(_named(word)[1], arguments)


def _named(word: str) -> tuple[str, str]:
    """The name and the source of a benchmark, of `FILE` or `NAME=FILE`."""
    name, equals, source = word.partition("=")
    if Path(word).exists():
        return Path(word).stem, word
    return (name, source) if equals else (word.split("/")[-1].split(":")[0], word)


def _extract(arguments: argparse.Namespace) -> None:
    r"""Run the prompts of benchmarks through a model, and keep the features of every token.

        qsl bench extract sums=texts/sums.jsonl words=texts/words.jsonl --out two/ \
            --sae mini-qwen3/w1k-l0-16 --layers 6 --template 'Question: {prompt}\nAnswer:'
        # needs the hub:
        qsl bench extract mmlu=cais/mmlu:all --split test --template 'Q: {question}\nA:' \
            --model Qwen/Qwen3-8B-Base --sae qwen3-8b-base/w64k-l0-50 --layers 20 --out bench/
        # rendered by lm-eval itself; a group of tasks is one benchmark
        qsl bench extract --tasks gsm8k arc_easy --fewshot 5 --sae qwen3-8b-base/w64k-l0-50 \
            --layers 20 --out bench/
        qsl bench extract --tasks mmlu --limit 1000 --seed 1 --sae qwen3-8b-base/w64k-l0-50 \
            --layers 20 --out bench/

    A benchmark is a file (JSONL, CSV, Parquet or text, one item per row), a folder of `datasets`,
    the name of a data set on the hub, or with --tasks a task of lm-eval. It has the name of its
    file, unless NAME=FILE gives it another. A group of lm-eval is one benchmark, and its items are
    called SUBTASK/NUMBER (--subtasks keeps the tasks apart). --limit draws items by lot, with a
    seed, from all subtasks alike. Each benchmark gets one store in --out. Benchmarks that are
    finished are not run again, and later calls may add more. Prompts longer than the model's
    context are refused.
    """
    if not arguments.benchmarks and not arguments.tasks:
        raise BadCorpus("no benchmark was named: pass files, data sets, or --tasks")

    from qwen_scope_lens.bench.suite import extract_suite
    from qwen_scope_lens.catalog import find_group

    prompts, facts = _prompts(arguments)
    suite = extract_suite(
        prompts,
        model=arguments.model or find_group(arguments.sae).backbone.model_id,
        group=arguments.sae,
        layers=arguments.layers,
        out=arguments.out,
        facts=facts,
        say=(lambda line: None) if arguments.quiet else remark,
        enable_thinking=arguments.thinking,
        add_generation_prompt=arguments.chat,
        last_token=arguments.last_token,
        token_budget=arguments.token_budget,
        sae_memory=arguments.sae_memory,
        device=arguments.device,
        sae_folder=arguments.sae_folder,
        sae_revision=arguments.revision,
        progress=not arguments.quiet,
    )
    sizes = {name: suite[name].store.n_docs for name in suite.names}
    if arguments.json:
        rows = [{"benchmark": name, "items": n} for name, n in sizes.items()]
        said = {"suite": str(arguments.out), "layers": suite.layers, "rows": rows}
        print_json(arguments.json, said)
        return
    layers = ", ".join(map(str, suite.layers))
    print(f"{arguments.out}: {len(sizes)} benchmarks, layers {layers}")
    for name, items in sizes.items():
        print(f"  {name}  {items:,} items")


def _prompts(arguments: argparse.Namespace) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The prompts of every benchmark, and how they were made."""
    from qwen_scope_lens.bench.prompts import read_prompts, sampled

    how = prompt_format(arguments)
    draw = {} if arguments.limit is None else {"limit": arguments.limit, "seed": arguments.seed}
    prompts: dict[str, list[Any]] = {}
    facts: dict[str, Any] = {}
    for word in arguments.benchmarks:
        name, source = _named(word)
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
    return prompts, facts


def _new(name: str, prompts: dict[str, list[Any]]) -> None:
    if name in prompts:
        raise BadCorpus(
            f"two benchmarks are called {name}: give one of them another name with NAME=FILE"
        )


def _chat_template(arguments: argparse.Namespace) -> Any:
    """lm-eval renders messages with the model's own template."""
    from functools import partial

    from qwen_scope_lens.catalog import bundled_model, find_group
    from qwen_scope_lens.models.checkpoint import open_tokenizer

    if arguments.thinking is None:
        raise BadCorpus(
            "--chat needs --thinking or --no-thinking: the chat template differs between them"
        )
    name = arguments.model or find_group(arguments.sae).backbone.model_id
    tokenizer = open_tokenizer(str(bundled_model(name) or name))
    return partial(
        tokenizer.apply_chat_template, tokenize=False, enable_thinking=arguments.thinking
    )


WORDS = (Word("extract", _arguments, _extract),)
