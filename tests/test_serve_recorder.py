"""The flight recorder: a feature store that grows while the server answers."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from forks import command
from serving import GROUP, Served
from starlette.applications import Starlette

from qwen_scope_lens.errors import CannotWrite
from qwen_scope_lens.features import rank, read
from qwen_scope_lens.serve.recorder import Recorder, Recording, rotated
from qwen_scope_lens.serve.rows import Wanted
from qwen_scope_lens.serve.run import make_server
from qwen_scope_lens.stores import FeatureStore, Manifest, merge
from qwen_scope_lens.stores.merge import check


def recorded(recorder: Recorder, count: int) -> FeatureStore:
    """The store, once it has so many documents more."""
    until = time.monotonic() + 30
    while recorder.recorded < count and time.monotonic() < until:
        time.sleep(0.02)
    return FeatureStore.open(recorder.store)


def test_what_was_served_is_recorded_exactly(served: Served) -> None:
    before = served.recorder.recorded
    plain = served.post("/v1/completions", prompt="内核读取 a file", max_tokens=6, temperature=0)
    for word in ("reads", "writes", "opens", "closes", "needs"):
        for plan in ("chinese", None):
            served.post("/v1/completions", prompt=f"It {word} a file", max_tokens=3, plan=plan)
    store = recorded(served.recorder, before + 11)
    assert check(store.path) == []
    table = store.documents(["request", "plan", "text", "prompt_tokens", "seed"]).to_pylist()
    doc = [row["request"] for row in table].index(plain["id"])
    found = table[doc]
    assert found["text"] == "内核读取 a file" + plain["choices"][0]["text"]
    ids = store.token_ids(doc).tolist()
    assert ids[found["prompt_tokens"] :] == plain["choices"][0]["qsl"]["token_ids"]
    assert found["seed"] == plain["choices"][0]["qsl"]["seed"]
    reading = read(torch.tensor(ids), GROUP, layers=[4, 6], all_tokens=True, promoted=0)
    for layer in (4, 6):
        stored = store.by_token(doc, layer).codes.to_dense()
        expected = reading.codes[layer].to_dense()
        assert np.allclose(stored, expected, rtol=0.002, atol=0.01)
    ranking = rank(store, "chinese", label="plan", layers=6)  # while the server goes on
    assert sum(ranking.documents.values()) == len(table)
    assert ranking.tested > 0


@pytest.fixture
def recorder(served: Served, tmp_path: Path) -> Iterator[Any]:
    made: list[Recorder] = []

    def make(name: str = "store", **settings: Any) -> Recorder:
        settings = {"every": 0.05, **settings}
        made.append(Recorder(served.lens, Recording(tmp_path / name, (4,), **settings)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def serve_one(served: Served, recorder: Recorder, prompt: str = "The kernel reads") -> None:
    """One reply, straight from the engine to this recorder."""
    ids = tuple(served.lens.tokenizer(prompt)["input_ids"])
    done: list[Any] = []
    wanted = recorder.watched(Wanted(ids, 3, 0.0))
    [row] = served.lens.engine.submit([wanted], lambda row, step: done.append(step))
    until = time.monotonic() + 30
    while not done and time.monotonic() < until:
        time.sleep(0.005)
    asked: Any = type("Asked", (), {"plan_name": None, "plan": None})()
    recorder.add(row, f"cmpl-{id(row)}/0", asked)


def test_a_reply_whose_client_went_away_is_recorded_as_far_as_it_went(served: Served) -> None:
    before = served.recorder.recorded
    ask = {
        "prompt": "The kernel",
        "max_tokens": 900,
        "temperature": 0,
        "stream": True,
        "plan": None,
    }
    with served.http.stream("POST", "/v1/completions", json=ask) as stream:
        lines = stream.iter_lines()
        texts = [json.loads(next(x for x in lines if x)[6:]) for _ in range(3)]
    store = recorded(served.recorder, before + 1)
    rows = store.documents(["request", "finish", "text", "prompt_tokens"]).to_pylist()
    doc = [row["request"] for row in rows].index(texts[0]["id"])
    found = rows[doc]
    assert found["finish"] == "cut"
    shown = "".join(chunk["choices"][0]["text"] for chunk in texts[:-1])
    assert found["text"].startswith("The kernel" + shown)
    ids = torch.tensor(store.token_ids(doc).tolist())
    assert found["prompt_tokens"] < len(ids) < 900
    reading = read(ids, GROUP, layers=[6], all_tokens=True, promoted=0)
    stored = store.by_token(doc, 6).codes.to_dense()
    assert np.allclose(stored, reading.codes[6].to_dense(), rtol=0.002, atol=0.01)
    assert check(store.path) == []
    assert served.recorder.dropped == 0


def test_codes_can_be_kept_without_texts(served: Served, recorder: Any) -> None:
    one = recorder(codes_only=True)
    serve_one(served, one)
    store = recorded(one, 1)
    assert store.documents(["text"])["text"].to_pylist() == [None]
    assert set(store.token_ids(0).tolist()) == {0}
    assert b"kernel" not in b"".join(p.read_bytes() for p in store.path.rglob("*") if p.is_file())
    assert store.n_nonzero(4) > 0


def test_a_kill_between_shard_and_manifest_costs_no_store(
    served: Served, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = recorder()
    serve_one(served, one)
    recorded(one, 1)

    def killed(*given: Any) -> None:
        raise OSError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", killed)
        serve_one(served, one)
        until = time.monotonic() + 30
        while not one.dropped and time.monotonic() < until:
            time.sleep(0.02)
    store = FeatureStore.open(one.store)  # as the next reader finds it
    assert (store.n_docs, store.is_complete) == (1, True)
    assert len(list((one.store / "shards").iterdir())) == 2
    one.close()
    again = recorder()  # the next server goes on
    serve_one(served, again)
    store = recorded(again, 1)
    assert (store.n_docs, check(store.path)) == (2, [])
    with pytest.raises(CannotWrite, match="another process"):
        recorder()


def test_stores_rotate_and_the_oldest_go(served: Served, recorder: Any, tmp_path: Path) -> None:
    one = recorder(rotate=1)
    for count in range(1, 4):
        serve_one(served, one)
        recorded(one, count)
    older = rotated(one.store)
    assert [path.name for path in older] == ["store-0001", "store-0002"]
    whole = merge([*older, one.store], tmp_path / "whole")
    assert whole.n_docs == 3
    assert check(whole.path) == []
    one.close()
    size = sum(p.stat().st_size for p in one.store.rglob("*") if p.is_file())
    two = recorder(rotate=1, limit=size + size // 2)
    serve_one(served, two)
    recorded(two, 1)
    assert [path.name for path in rotated(two.store)] == ["store-0003"]


def test_the_first_signal_waits_for_replies_and_the_second_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = make_server(Starlette())
    cut: Any = (asyncio.CancelledError, asyncio.CancelledError(), None)
    broken: Any = (ValueError, ValueError(), None)
    names = ("uvicorn.error", logging.ERROR, "", 0)
    records = [
        logging.LogRecord(*names, "Exception in ASGI application", (), cut),
        logging.LogRecord(*names, "Cancel %s running task(s), timeout exceeded", (4,), None),
        logging.LogRecord(*names, "Exception in ASGI application", (), broken),
    ]
    assert [server.is_news(record) for record in records] == [True, True, True]
    server.server_state.tasks.add(object())
    server.handle_exit(signal.SIGINT, None)
    assert (server.should_exit, server.force_exit, server.ended_by) == (True, False, signal.SIGINT)
    assert "Ctrl-C again cuts them" in capsys.readouterr().err
    assert [server.is_news(record) for record in records] == [False, False, True]
    server.handle_exit(signal.SIGINT, None)
    assert server.force_exit
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_in_the_middle_of_replies(times: int, tmp_path: Path) -> None:
    """Nothing but one line is said, and what was written before the cut is in the store."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    listening.close()
    store, log = tmp_path / "served", tmp_path / "log"
    server = command(["serve", "--port", str(port), "--record", str(store)], log)
    url = f"http://127.0.0.1:{port}/v1"
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with suppress(httpx.HTTPError):
            httpx.get(f"{url}/models")
            break
        time.sleep(0.1)
    asked: Any = {"prompt": "It opens", "max_tokens": 480, "stream": True}
    begun = threading.Semaphore(0)

    def ask() -> None:
        with (
            suppress(httpx.HTTPError),
            httpx.stream("POST", f"{url}/completions", json=asked, timeout=60) as reply,
        ):
            for _ in reply.iter_lines():
                begun.release()

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        assert begun.acquire(timeout=60)
    for _ in range(times):
        os.kill(server.pid, signal.SIGINT)
        time.sleep(0.3)
    assert server.wait() == 130
    said = log.read_text()
    assert "Traceback" not in said
    assert "ERROR" not in said
    assert said.endswith("qsl serve: interrupted\n")
    assert check(store) == []
    assert FeatureStore.open(store).n_docs == 4
