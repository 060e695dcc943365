"""Serve a model with its features: an OpenAI-compatible API, and a page on the same port.

    qsl serve                          # until Ctrl-C; the toy model, no download
    qsl serve --plan polite.json --record served/       # until Ctrl-C; steered and recorded
    # needs the hub:
    qsl serve --model Qwen/Qwen3-8B --sae qwen3-8b-base/w64k-l0-50/20 --port 8000

Clients of OpenAI's API talk to http://127.0.0.1:8765/v1; people open http://127.0.0.1:8765/. A
request can have a plan, addresses to monitor, and can ask which features fired (docs/serve.md).
The plan of --plan is that of requests that name none. --record appends exact codes of prompts and
replies to a feature store, which `qsl rank`, `qsl store` and the like read while the server runs.
--engine lets llama.cpp's `llama-server` or interp-engine write the replies.
The server listens on this machine only, unless --host and a --token are given, and contacts no
other machine.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import tempfile
import threading
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from qwen_scope_lens.address import saes_named
from qwen_scope_lens.cli import engine_options, inputs
from qwen_scope_lens.cli import plan_options as plans
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import (
    add_labels,
    add_layers,
    add_sae_files,
    count,
    from_zero,
    layer_list,
    memory,
    output,
    port,
    positive,
    read_labels,
    remark,
)
from qwen_scope_lens.errors import BadPlan, CannotWrite
from qwen_scope_lens.extras import check

LOCAL = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    plans.add_model(parser)
    parser.add_argument(
        "--sae",
        default="mini-qwen3/w1k-l0-16",
        help="GROUP, GROUP/20 or GROUP/4,10-12 (%(default)s)",
    )
    add_layers(
        parser, "read by default, and recorded; default: the middle one", check=inputs.unchecked
    )
    parser.add_argument(
        "--plan",
        type=Path,
        action=Input,
        check=inputs.plan,
        help="the plan of requests that name none",
    )
    plans.add_calibration(parser)
    parser.add_argument("--plans", type=Path, metavar="FOLDER", help="named plans, kept as files")
    add_labels(parser, "JSON lines: address, text, score, provenance")
    parser.add_argument(
        "--save-labels", type=output, metavar="FILE", help="where labels edited in the page go"
    )
    parser.add_argument(
        "--site",
        type=Path,
        action=Input,
        check=inputs.site,
        help="feature pages that `qsl dash build` wrote",
    )
    add_sae_files(parser)
    parser.add_argument(
        "--sae-cache-max", type=count, default=8, help="SAEs in memory (%(default)s)"
    )
    engine_options.add_engine(parser)
    record = parser.add_argument_group("recording")
    record.add_argument("--record", type=Path, metavar="STORE", help="a feature store to append to")
    record.add_argument(
        "--record-codes-only", action="store_true", help="without texts and token ids"
    )
    record.add_argument(
        "--record-rotate", type=memory, default=1 << 30, metavar="SIZE", help="per store (1GB)"
    )
    record.add_argument(
        "--record-limit", type=memory, metavar="SIZE", help="of all stores; the oldest are deleted"
    )
    record.add_argument(
        "--record-every", type=positive, default=5.0, metavar="S", help="seconds (%(default)s)"
    )
    listening = parser.add_argument_group("listening")
    listening.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    listening.add_argument("--port", type=port, default=8765, help="%(default)s; 0: any free")
    listening.add_argument(
        "--token", help="asked of every request; default: the variable QSL_TOKEN, else none"
    )
    listening.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name of this server"
    )
    listening.add_argument("--rows", type=count, default=16, help="decoded at once (%(default)s)")
    listening.add_argument("--queue", type=count, default=256, help="that may wait (%(default)s)")
    listening.add_argument(
        "--seconds", type=positive, default=600.0, help="a request may take (%(default)s)"
    )
    listening.add_argument(
        "--prefix-cache", type=from_zero, default=8192, metavar="TOKENS", help="(%(default)s)"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(arguments: argparse.Namespace) -> int:
    # What is wrong is said before torch is imported, which takes seconds.
    group_name, slash, numbers = arguments.sae.rpartition("/")
    if slash and re.fullmatch(r"\d+([,-]\d+)+", numbers):  # GROUP/4,10
        refs = saes_named(group_name, layer_list(numbers))
    else:
        refs = saes_named(arguments.sae, arguments.layers)
    token = arguments.token or os.environ.get("QSL_TOKEN") or None
    local = arguments.host in LOCAL
    if not local and token is None:
        raise CannotWrite(
            f"--host {arguments.host} lets other machines use the model: give a --token that they"
            " must know, or leave --host out"
        )
    if arguments.record_limit is not None and arguments.record_limit < arguments.record_rotate:
        raise CannotWrite("--record-limit is below --record-rotate: one store would be too large")
    if arguments.record is not None:
        _check_record(arguments.record)
    check("starlette", "serve")
    check("uvicorn", "serve")
    choice = engine_options.check_engine(arguments)
    inputs.free_port(arguments.host, arguments.port)
    labels = read_labels(arguments.labels)
    if arguments.plans is not None:
        arguments.plans.mkdir(parents=True, exist_ok=True)
    group = refs[0].row
    remark(f"Note: {group.notice}\n")

    from qwen_scope_lens.models.architecture import context_length
    from qwen_scope_lens.models.tokenize import find_tokenizer
    from qwen_scope_lens.serve.lens import Lens, Options
    from qwen_scope_lens.serve.plans import Plans
    from qwen_scope_lens.serve.recorder import Recorder, Recording
    from qwen_scope_lens.serve.run import listen, serve
    from qwen_scope_lens.serve.web import Serving
    from qwen_scope_lens.steering.generate import end_tokens
    from qwen_scope_lens.steering.plan import Plan
    from qwen_scope_lens.steering.typical import Calibration

    plan = None if arguments.plan is None else Plan.load(arguments.plan)
    if plan is not None and any(ref.group != group.short for ref in plan.refs):
        raise BadPlan(f"{arguments.plan} is not of {group.short}, which is to be served")
    typical = None
    if arguments.calibration is not None:
        typical = Calibration.load(arguments.calibration)
    layers, name = [ref.layer for ref in refs], plans.model_of(arguments, [group])
    model = None
    if arguments.no_reader:
        tokenizer, ends, context = engine_options.without_model(name)
    else:
        model = plans.load(arguments, refs)
        tokenizer = find_tokenizer(model)
        ends, context = frozenset(end_tokens(model)), context_length(model)
    options = Options(
        arguments.rows,
        arguments.queue,
        arguments.seconds,
        arguments.prefix_cache,
        max(arguments.sae_cache_max, len(layers)),
        allow_other_model=True,  # `plans.load` has looked
    )
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        engine = None
        if choice[0] != "own":
            facts = tokenizer, ends, context
            engine = engine_options.open_engine(
                choice, arguments, name, group, facts, lambda ref: lens.sae_of(ref)
            )
            stack.callback(engine.close)
        site = _site(arguments, group, layers, stack)
        lens = Lens(
            model,
            tokenizer,
            group,
            layers,
            labels=labels,
            typical=typical,
            sae_folder=arguments.sae_folder,
            options=options,
            engine=engine,
            name=name if model is None else None,
        )
        for layer in layers:
            lens.sae(layer)  # a missing file is reported now
        named = Plans(folder=arguments.plans)
        if plan is not None:
            named = Plans({arguments.plan.stem: plan}, arguments.plan.stem, arguments.plans)
            named.put_ready(arguments.plan.stem, lens)
        recorder = None
        if arguments.record is not None:
            settings = Recording(
                arguments.record,
                tuple(layers),
                arguments.record_codes_only,
                arguments.record_rotate,
                arguments.record_limit,
                arguments.record_every,
            )
            recorder = Recorder(lens, settings, arguments.sae_folder)
        names = (*LOCAL, "[::1]", arguments.host, *arguments.allow_host)
        serving = Serving(
            lens,
            named,
            site,
            recorder,
            token,
            names if local or arguments.allow_host else None,
            arguments.save_labels,
        )
        listening = listen(arguments.host, arguments.port)
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        address = f"http://{host}:{listening.getsockname()[1]}/"
        fragment = "" if token is None else f"#token={token}"
        print(f"{address}  (API: {address}v1; Ctrl-C ends it)", flush=True)
        ended_by = serve(serving, listening, address + fragment if arguments.open else None)
    if ended_by is not None:
        signal.raise_signal(ended_by)
    return 0


def _check_record(store: Path) -> None:
    """Refuse a folder that holds something else. One that was begun and killed may have no more
    than shards."""
    if store.is_dir() and not (store / "manifest.json").is_file():
        names = [path.name for path in store.iterdir() if not path.name.startswith(".")]
        if set(names) - {"shards"}:
            raise CannotWrite(
                f"{store} holds other files than a feature store ({sorted(names)[0]}): name another"
                " folder, or a store that was recorded before"
            )
    elif store.exists() and not store.is_dir():
        raise CannotWrite(f"{store} is a file: expected a folder, or a name that is free")


def _site(arguments: argparse.Namespace, group: Any, layers: list[int], stack: ExitStack) -> Any:
    """The site that was given; for the toy model one that is made while the server answers."""
    from qwen_scope_lens.serve.site import Site

    if arguments.site is None and (group.origin != "mini" or arguments.model is not None):
        return None
    made: Future[Site] = Future()
    if arguments.site is not None:
        made.set_result(Site(arguments.site))
        return made
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qsl-serve-"))

    def make() -> None:
        from qwen_scope_lens.mini import heldout
        from qwen_scope_lens.site.build import site_of_documents

        try:
            texts = list(islice(heldout(), 0, None, 20))
            out = Path(folder, "site")
            model = group.backbone.model_id  # the engine has its own
            made.set_result(Site(site_of_documents(texts, model, group.short, layers, out)))
        except Exception as error:
            made.set_exception(error)

    thread = threading.Thread(target=make, name="qsl-site", daemon=True)
    stack.callback(_end, thread)
    thread.start()
    return made


def _end(thread: threading.Thread) -> None:
    """End a thread at its next line of Python: torch aborts a process that ends while it computes
    in a thread."""
    for _ in range(3):
        if thread.is_alive():
            number = ctypes.c_ulong(thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(SystemExit))
            thread.join(5)
