"""A double of llama.cpp's `llama-server`: it answers what the real program was recorded to answer.

    python llama_double.py --model FILE --port N [--control-vector FILE] ...

`benchmarks/serve_llama.py --record` wrote `llama_recorded.json` with the real program. A request
that is not in it is answered 501. `--trouble WORD`, or a POST of the word to `/trouble`, makes it
misbehave: see `TROUBLES`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RECORDED = json.loads(Path(__file__).with_name("llama_recorded.json").read_text("utf-8"))

STOP = b'data: {"stop": true, "stop_type": "limit", "content": "", "tokens": []}\n\n'
TROUBLES = {
    "no json": b"<html>hello",
    "no object": b"[1, 2]",
    "no tokens": b'{"content": "x", "stop_type": "limit"}',
    "no number": b'{"tokens": ["x"], "stop_type": "limit"}',
    "no such token": b'{"tokens": [999999], "stop_type": "limit"}',
    "no reason": b'{"tokens": [5], "stop_type": "tired"}',
    "endless": b"x" * (1 << 16),
}
"""What is answered to every completion in place of a reply; "endless" is repeated."""


class Double(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    steered, trouble, loading = False, "", 1

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        key = os.environ.get("LLAMA_API_KEY")
        if self.path == "/health" and Double.loading:
            Double.loading -= 1
            return self._say(503, b'{"error": {"code": 503, "message": "Loading model"}}')
        if self.path != "/health" and key and self.headers["Authorization"] != f"Bearer {key}":
            return self._say(401, b'{"error": {"code": 401, "message": "Invalid API Key"}}')
        if self.path == "/trouble":  # of the double alone
            Double.trouble = body
            return self._say(200, b"{}")
        if self.path == "/completion" and self.trouble:
            return self._misbehave(bool(body["stream"]))
        for row in RECORDED:
            if (row["steered"], row["path"], row["body"]) == (self.steered, self.path, body):
                return self._say(row["status"], row["text"].encode())
        return self._say(501, b'{"error": {"code": 501, "message": "not recorded"}}')

    def _say(self, status: int, text: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text)

    def _misbehave(self, streams: bool) -> None:
        if self.trouble == "dies":
            self.send_response(200)
            self.end_headers()
            event = b'data: {"content": "x", "tokens": [87], "tokens_predicted": 1}\n\n'
            self.wfile.write(event if streams else b'{"tokens": [8')
            self.wfile.flush()
            os._exit(3)
        if self.trouble == "slow":
            time.sleep(20)
        text = TROUBLES.get(self.trouble, STOP)
        self.send_response(200)
        self.end_headers()
        try:
            self.wfile.write(b"data: " + text + b"\n\n" if streams else text)
            while self.trouble == "endless":
                self.wfile.write(text)
        except OSError:
            pass  # it had enough

    def log_message(self, *given: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--control-vector", type=Path)
    parser.add_argument("--trouble", default="")
    given = parser.parse_args()
    if given.trouble == "does not start":
        sys.exit("error: the model cannot be loaded")
    if given.control_vector is not None:
        assert given.control_vector.read_bytes()[:4] == b"GGUF"
    Double.steered, Double.trouble = given.control_vector is not None, given.trouble
    ThreadingHTTPServer((given.host, given.port), Double).serve_forever()


if __name__ == "__main__":
    main()
