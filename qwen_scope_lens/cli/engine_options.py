"""Options of `qsl serve` that choose which engine writes the replies, and the engine they make."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from qwen_scope_lens.cli import inputs, options
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.errors import BadFile, BadPlan, CannotWrite, CheckpointMissing, UnknownName
from qwen_scope_lens.extras import check
from qwen_scope_lens.files import open_regular

if TYPE_CHECKING:
    from qwen_scope_lens.catalog import Group
    from qwen_scope_lens.serve.engines.outside import Outside

__all__ = ["add_engine", "check_engine", "open_engine", "without_model"]

LLAMA, INTERP = "llama.cpp", "interp-engine"
BACKENDS = ("auto", "eager", "vllm", "vllm-static", "vllm-generate")


def add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine",
        default="own",
        metavar="NAME[=WHERE]",
        help="what writes the replies: own (%(default)s), llama.cpp=PROGRAM (a llama-server to"
        " start), llama.cpp=URL (one that runs), or interp-engine[=BACKEND]",
    )
    group.add_argument(
        "--gguf",
        type=Path,
        action=Input,
        check=inputs.file,
        help="the weights for llama.cpp=PROGRAM; the same model as --model",
    )
    group.add_argument(
        "--engine-args", default="", metavar="TEXT", help='for llama-server: "-ngl 99 -c 8192"'
    )
    group.add_argument(
        "--engine-processes",
        type=options.count,
        default=3,
        help="of llama-server, each with another plan (%(default)s)",
    )
    group.add_argument(
        "--no-reader",
        action="store_true",
        help="load no model beside the engine's: then nothing is read, monitored or recorded",
    )


def check_engine(arguments: argparse.Namespace) -> tuple[str, str]:
    """The engine's name and where it is. What is wrong is said before torch is imported."""
    name, equals, where = arguments.engine.partition("=")
    if name not in ("own", LLAMA, INTERP):
        raise UnknownName(f"--engine {name!r:.60}: expected own, {LLAMA}=WHERE or {INTERP}")
    if name == "own" and (equals or arguments.no_reader):
        raise UnknownName("the server's own engine takes no =WHERE, and cannot do with --no-reader")
    started = name == LLAMA and not _is_http(where)
    if name == LLAMA:
        _check_llama(where, arguments)
    if not started and (arguments.gguf is not None or arguments.engine_args):
        raise UnknownName(f"--gguf and --engine-args go with --engine {LLAMA}=PROGRAM only")
    if name == INTERP:
        if where and where not in BACKENDS:
            raise UnknownName(f"back end {where!r:.60}: expected {', '.join(BACKENDS)}")
        check("interp_engine", "interp")
    if arguments.no_reader and arguments.record is not None:
        raise CannotWrite("--record needs a model that reads the replies: leave --no-reader out")
    if arguments.plan is not None and name != "own":
        from qwen_scope_lens.serve.engines.abilities import ENGINES, refuse_edits
        from qwen_scope_lens.steering.plan import Plan

        refuse_edits(ENGINES[name], Plan.load(arguments.plan).edits)
        if name == LLAMA and not started:
            raise BadPlan(
                "a llama-server that runs already takes no plan: let `qsl serve` start it"
                f" (--engine {LLAMA}=PROGRAM --gguf FILE)"
            )
    return name, where


def _is_http(where: str) -> bool:
    return where.startswith(("http://", "https://"))


def _check_llama(where: str, arguments: argparse.Namespace) -> None:
    if _is_http(where):
        if not urlsplit(where).hostname:
            raise UnknownName(f"{where!r:.60} names no host: expected http://127.0.0.1:8080")
        return
    if not where or shutil.which(where) is None:
        raise CheckpointMissing(
            f"{where or 'nothing'} is not a program: expected --engine {LLAMA}=PROGRAM, the path of"
            " llama.cpp's `llama-server`, or the http:// address of one that runs"
        )
    if arguments.gguf is None:
        raise CheckpointMissing("llama-server needs the model's weights: name them with --gguf")
    try:
        shlex.split(arguments.engine_args)
    except ValueError as error:
        raise UnknownName(f"--engine-args {arguments.engine_args!r:.60}: {error}") from error
    with open_regular(arguments.gguf) as file:
        begin = file.read(4)
    if begin != b"GGUF":
        raise BadFile(
            f"{arguments.gguf} is not a GGUF file: it begins with {begin!r} and not with b'GGUF'."
            " llama.cpp's convert_hf_to_gguf makes one of a model's folder"
        )


def without_model(name: str) -> tuple[Any, frozenset[int], int]:
    """The tokenizer, the end tokens and the context of a model whose weights are not loaded."""
    import transformers

    from qwen_scope_lens.catalog import bundled_model
    from qwen_scope_lens.models.checkpoint import open_config, open_tokenizer
    from qwen_scope_lens.steering.generate import end_tokens

    place = str(bundled_model(name) or name)
    config = open_config(place).get_text_config()
    holder = argparse.Namespace(config=config)
    with suppress(OSError):  # then the configuration has them
        holder.generation_config = transformers.GenerationConfig.from_pretrained(place)
    return (
        open_tokenizer(place),
        frozenset(end_tokens(holder)),
        int(config.max_position_embeddings),
    )


def open_engine(
    choice: tuple[str, str],
    arguments: argparse.Namespace,
    model: str,
    group: Group,
    facts: tuple[Any, frozenset[int], int],
    sae_of: Callable[[str], Any],
) -> Outside:
    """The engine that was chosen, ready. `facts`: tokenizer, end tokens and context."""
    name, where = choice
    tokenizer, ends, context = facts
    limits = {"rows": arguments.rows, "queue": arguments.queue, "seconds": arguments.seconds}
    if name == LLAMA:
        from qwen_scope_lens.serve.engines.llama import LlamaCpp
        from qwen_scope_lens.serve.engines.programs import Address, Programs

        source: Any = Address(where, os.environ.get("LLAMA_API_KEY") or None)
        if not _is_http(where):
            more = shlex.split(arguments.engine_args)
            program = Path(str(shutil.which(where)))
            source = Programs(program, arguments.gguf, more, arguments.engine_processes)
        return LlamaCpp(tokenizer, ends, group.d_model, source, sae_of, **limits)

    from qwen_scope_lens.catalog import bundled_model
    from qwen_scope_lens.serve.engines.interp import InterpEngine, load

    place = str(bundled_model(model) or model)
    running = load(place, where or "auto", arguments.device, arguments.dtype)
    return InterpEngine(
        running, tokenizer, ends, context, group.d_model, sae_of, allow_other_model=True, **limits
    )
