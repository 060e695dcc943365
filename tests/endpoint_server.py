"""A local HTTP server that speaks the OpenAI API and misbehaves on demand: a test double.

`Server(behave)` calls `behave(call)` for every request and sends what it returns.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Call:
    """One request as the server saw it."""

    number: int  # from 0, over all requests
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    handler: Any = field(repr=False)

    @property
    def prompt(self) -> str:
        if "prompt" in self.body:
            return str(self.body["prompt"])
        return str(self.body["messages"][-1]["content"])

    @property
    def key(self) -> str:
        return self.headers["idempotency-key"]


def answer(text: Any, raw: bool = False, **more: Any) -> dict[str, Any]:
    choice = {"text": text} if raw else {"message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    return {"choices": [choice | {"finish_reason": "stop"}], "usage": usage} | more


class Server:
    """`behave` returns an answer (a dict), (status, headers, bytes), or None (it sent itself)."""

    def __init__(self, behave: Callable[[Call], Any]) -> None:
        self.calls: list[Call] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                with lock:
                    call = Call(len(outer.calls), self.path, headers, json.loads(content), self)
                    outer.calls.append(call)
                found = behave(call)
                if found is None:
                    self.close_connection = True
                    return
                if isinstance(found, dict):
                    found = (200, {}, json.dumps(found).encode())
                status, more, body = found
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **more}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None: ...

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None: ...  # the client hung up

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
