"""One server on the mini for all tests, in a thread of this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.labels.packs import Label, LabelPack
from qwen_scope_lens.models import load_model
from qwen_scope_lens.serve.lens import Lens, Options
from qwen_scope_lens.serve.plans import Plans
from qwen_scope_lens.serve.recorder import Recorder, Recording
from qwen_scope_lens.serve.run import listen, make_server
from qwen_scope_lens.serve.web import Serving, make_app
from qwen_scope_lens.steering import Plan

GROUP = "mini-qwen3/w1k-l0-16"
STEERED = f"{GROUP}/6/423:set:120@generation"
LABEL = "installing <b>software</b>"


class Served:
    """A running server, and what is behind it."""

    def __init__(self, lens: Lens, recorder: Recorder, port: int) -> None:
        self.lens, self.recorder = lens, recorder
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def post(self, path: str, **content: Any) -> Any:
        answer = self.http.post(path, json=content)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def error(self, path: str, **content: Any) -> tuple[int, dict[str, Any]]:
        answer = self.http.post(path, json=content)
        return answer.status_code, answer.json()["error"]


def make_lens(**options: Any) -> Lens:
    bridge = load_model("mini-qwen3")
    tokenizer = bridge.tokenizer
    labels = LabelPack([Label(FeatureRef.parse(f"{GROUP}/6/423"), LABEL)])
    return Lens(
        bridge.release(),
        tokenizer,
        find_group(GROUP),
        [4, 6],
        labels=labels,
        options=Options(**options),
    )


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    lens = make_lens()
    recorder = Recorder(lens, Recording(folder / "served", (4, 6), every=0.1))
    app = make_app(Serving(lens, Plans({"chinese": Plan(STEERED)}), recorder=recorder))
    listening = listen("127.0.0.1", 0)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    served = Served(lens, recorder, listening.getsockname()[1])
    try:
        yield served
    finally:
        served.http.close()
        server.should_exit = True
        thread.join(20)
        recorder.close()
        lens.engine.close()
