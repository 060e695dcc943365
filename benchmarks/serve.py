"""The server's figures: overhead, throughput, recorder, memory, 200 at once, kill -9.

    python benchmarks/serve.py > benchmarks/results/serve.txt
    python benchmarks/serve.py --real MODEL GROUP/LAYER >> benchmarks/results/serve.txt

Times are CPU seconds of the process, in which the server and its client both run, on one thread of
torch: other programs on the machine cost little then. Requests go over HTTP to a real uvicorn.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from _measure import cpu_name, interleaved

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.models import load_model
from qwen_scope_lens.serve.lens import Lens, Options
from qwen_scope_lens.serve.recorder import Recorder, Recording
from qwen_scope_lens.serve.run import listen, make_server
from qwen_scope_lens.serve.web import Serving, make_app
from qwen_scope_lens.steering import Plan, Sampling, generate
from qwen_scope_lens.stores import FeatureStore, Manifest
from qwen_scope_lens.stores.merge import check

TOKENS = 48


class Server:
    """A server in this process, and its client."""

    def __init__(self, lens: Lens, recorder: Recorder | None = None) -> None:
        self.lens, self.recorder = lens, recorder
        listening = listen("127.0.0.1", 0)
        self._server = make_server(make_app(Serving(lens, recorder=recorder)))
        options = {"sockets": [listening]}
        self._thread = threading.Thread(target=self._server.run, kwargs=options, daemon=True)
        self._thread.start()
        self.port = listening.getsockname()[1]
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=600, limits=limits
        )

    def ask(self, prompt: Any, plan: str | None = None, **more: Any) -> list[int]:
        fields = {"prompt": prompt, "plan": plan, "max_tokens": TOKENS, "temperature": 0, **more}
        answer = self.http.post("/v1/completions", json=fields)
        answer.raise_for_status()
        ids: list[int] = answer.json()["choices"][0]["qsl"]["token_ids"]
        return ids

    def close(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(30)
        if self.recorder is not None:
            self.recorder.close()


class Bench:
    """A model, its SAE, and eight plans."""

    def __init__(self, model: str, ref: str, **options: Any) -> None:
        layer = LayerRef.parse(ref)
        bridge = load_model(model)
        self.tokenizer = bridge.tokenizer
        self.model: Any = bridge.release()
        self.model.generation_config.eos_token_id = None  # every reply has its full length
        self.model.config.eos_token_id = None
        self.group, self.layer, self.options = layer.row, layer.layer, options
        self.plans = [f"{ref}/{7 + 5 * i}:{op}" for i, op in enumerate(OPERATIONS)]
        self.lens = self.make_lens(**options)

    def make_lens(self, **options: Any) -> Lens:
        settings = Options(prefix_tokens=0, **options)
        lens = Lens(self.model, self.tokenizer, self.group, [self.layer], options=settings)
        lens.sae(self.layer)
        return lens

    def bare(self, ids: Sequence[int], tokens: int) -> None:
        with torch.no_grad():
            self.model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )

    def alone(self, ids: Sequence[int], plan: str, sampling: Sampling) -> list[int]:
        saes = {f"{self.group.short}/{self.layer}": self.lens.sae(self.layer)}
        [found] = generate(
            self.model,
            [list(ids)],
            Plan.of(plan),
            saes,
            tokenizer=self.tokenizer,
            sampling=sampling,
            must_fire=False,
        )
        return list(found.ids)

    def prompts(self, count: int, size: int = 24) -> list[list[int]]:
        texts = [row["text"] for row in heldout("prose")]
        ids = [self.tokenizer(text)["input_ids"][: size - i % 9] for i, text in enumerate(texts)]
        return [ids[i % len(ids)] for i in range(count)]


OPERATIONS = (
    "add:8@generation",
    "set:20",
    "ablate",
    "project_out",
    "floor:5@class=letter",
    "cap:1",
    "scale:3",
    "add:-0.1norm",
)


def overhead(bench: Bench, server: Server, tokens: int, repeats: int) -> None:
    [ids] = bench.prompts(1)
    times = interleaved(
        {
            "bare": lambda: bench.bare(ids, tokens),
            "request": lambda: server.ask(ids, max_tokens=tokens),
        },
        repeats,
    )
    more = times["request"] / times["bare"] - 1
    print(
        f"overhead of a request of {tokens} tokens against bare generate: {more:+.1%}"
        f" ({1000 * times['request']:,.0f} ms against {1000 * times['bare']:,.0f} ms CPU)"
    )


def throughput(bench: Bench, server: Server, tokens: int, repeats: int) -> None:
    prompts = bench.prompts(8)
    pairs = list(zip(prompts, bench.plans, strict=True))

    def one_by_one() -> None:
        for ids, plan in pairs:
            server.ask(ids, plan, max_tokens=tokens)

    def together() -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda pair: server.ask(*pair, max_tokens=tokens), pairs))

    def steered() -> None:
        for ids, plan in pairs:
            bench.alone(ids, plan, Sampling(tokens))

    times = interleaved(
        {"one by one": one_by_one, "together": together, "generate": steered}, repeats
    )
    for name, what in (("one by one", "one by one"), ("generate", "with steer and generate")):
        ratio = times[name] / times["together"]
        print(
            f"8 requests with 8 plans at once against {what}: {ratio:.1f}x"
            f" ({8 * tokens / times['together']:,.0f} against {8 * tokens / times[name]:,.0f}"
            " tokens per CPU second)"
        )


def recording(bench: Bench, server: Server, folder: Path, repeats: int) -> None:
    recorder = Recorder(server.lens, Recording(folder / "on", (bench.layer,), every=1.0))
    other = Server(server.lens, recorder)
    prompts = bench.prompts(8)

    def ask(one: Server) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one.ask, prompts))
        until = time.monotonic() + 60
        while one.recorder and one.recorder.recorded % 8 and time.monotonic() < until:
            time.sleep(0.01)  # what it costs to write belongs to it

    quickest = {"off": float("inf"), "on": float("inf")}
    for _ in range(3 * repeats):  # the quickest of many turns, as neighbours only slow down
        for name, one in (("off", server), ("on", other)):
            start = time.process_time()
            ask(one)
            quickest[name] = min(quickest[name], time.process_time() - start)
    other.close()
    more = quickest["on"] / quickest["off"] - 1
    print(
        f"recorder on against off, 8 requests at once, one layer: {more:+.1%} (quickest of"
        f" {3 * repeats} turns)"
    )


def flat_memory(server: Server, bench: Bench, requests: int = 1000) -> None:
    prompts = bench.prompts(64)

    def some(count: int) -> None:
        def ask(i: int) -> None:
            server.ask(prompts[i % 64], bench.plans[i % 8], max_tokens=8, monitor=watched(bench))

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, range(count)))

    some(300)
    before = resident()
    some(requests)
    after = resident()
    print(
        f"memory over {requests:,} requests: {before / 1e6:,.0f} MB before, {after / 1e6:,.0f} MB"
        f" after ({after / before - 1:+.2%})"
    )


def watched(bench: Bench) -> list[str]:
    return [f"{bench.group.short}/{bench.layer}/7"]


def resident() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def at_once(bench: Bench, server: Server, count: int = 200) -> None:
    prompts = bench.prompts(count)
    asked = [
        (ids, bench.plans[i % 8], Sampling(16, 0.0 if i % 2 else 1.0, seed=i))
        for i, ids in enumerate(prompts)
    ]

    def ask(ids: list[int], plan: str, sampling: Sampling) -> list[int]:
        return server.ask(
            ids, plan, max_tokens=16, temperature=sampling.temperature, seed=sampling.seed
        )

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda one: ask(*one), asked))
    single = [bench.alone(*one) for one in asked]
    equal = sum(a == b for a, b in zip(found, single, strict=True))
    print(f"{count} requests at once: {len(found)} replies, {equal} equal to their single run")


def killed(bench: Bench, folder: Path, times: int = 20) -> None:
    """A server of its own, in a forked process, is killed while it records."""
    store, rng, recorded = folder / "killed", random.Random(0), []
    whole = 0
    for _ in range(times):
        child = os.fork()
        if child == 0:
            _record_for_ever(bench, store)
        until, before = time.monotonic() + 300, documents(store)
        while documents(store) == before and time.monotonic() < until:
            time.sleep(0.02)  # it has begun to write
        time.sleep(rng.uniform(0.0, 1.0))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = FeatureStore.open(store)
        problems = check(store)
        whole += not problems and found.is_complete
        recorded.append(found.n_docs)
    print(
        f"kill -9 while recording, {times} times: {whole} of {len(recorded)} times the store was"
        f" whole; it grew to {recorded[-1]:,} documents"
    )
    assert recorded == sorted(recorded)


def documents(store: Path) -> int:
    """As the manifest says; the file is replaced whole."""
    return Manifest.read(store).n_docs if Manifest.exists(store) else 0


def _record_for_ever(bench: Bench, store: Path) -> None:
    try:
        lens = bench.make_lens(**bench.options)
        server = Server(lens, Recorder(lens, Recording(store, (bench.layer,), every=0.02)))
        prompts = bench.prompts(64)
        with ThreadPoolExecutor(4) as pool:
            while True:
                list(pool.map(lambda ids: server.ask(ids, max_tokens=4), prompts))
    finally:
        os._exit(1)


@contextmanager
def workplace() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="qsl-serve-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--real", nargs=2, metavar=("MODEL", "GROUP/LAYER"))
    parser.add_argument("--only", nargs="+", help="kill, overhead, throughput, recorder, ...")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if arguments.real:
        model, ref = arguments.real
        bench = Bench(model, ref)
        server = Server(bench.lens)
        print(f"\n{Path(model).name}, {ref}")
        overhead(bench, server, 12, min(3, arguments.repeats))
        throughput(bench, server, 8, 1)
        server.close()
        return
    bench = Bench("mini-qwen3", "mini-qwen3/w1k-l0-16/4")
    print(f"CPU: {cpu_name()}, one thread of torch; torch {torch.__version__}")
    print("mini-qwen3, mini-qwen3/w1k-l0-16/4", flush=True)
    only, repeats = arguments.only, arguments.repeats
    with workplace() as folder:
        bench.lens.engine.close()  # a process with threads is not to be forked
        if not only or "kill" in only:
            killed(bench, folder)
        bench.lens = bench.make_lens()
        server = Server(bench.lens)
        parts: dict[str, Callable[[], None]] = {
            "overhead": lambda: overhead(bench, server, TOKENS, repeats),
            "throughput": lambda: throughput(bench, server, TOKENS, max(2, repeats // 2)),
            "recorder": lambda: recording(bench, server, folder, repeats),
            "at once": lambda: at_once(bench, server),
            "memory": lambda: flat_memory(server, bench),
        }
        for name, part in parts.items():
            if not only or name in only:
                part()
                sys.stdout.flush()
        server.close()


if __name__ == "__main__":
    main()
