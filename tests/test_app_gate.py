"""The app against raw requests: it takes and gives no file, and no other page may ask it."""

from __future__ import annotations

import http.client
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from feature_stores import GROUP

import qwen_scope_lens as qsl
from qwen_scope_lens.app import Workbench
from qwen_scope_lens.app.gate import MOST_BYTES
from qwen_scope_lens.app.server import make_web_app

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    import uvicorn

    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    bench = Workbench(qsl.load_model("mini-qwen3"), qsl.find_group(GROUP))
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(make_web_app(bench, [6]), log_level="warning")
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield int(listener.getsockname()[1])
    server.should_exit = True
    thread.join(10)
    del os.environ["GRADIO_TEMP_DIR"]


def ask(
    port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def event(port: int, name: str) -> int:
    config = json.loads(ask(port, "GET", "/config")[1])
    [found] = [one["id"] for one in config["dependencies"] if one["api_name"] == name]
    return int(found)


def predict(port: int, name: str, data: list[Any], **more: Any) -> tuple[int, Any]:
    body = {"data": data, "fn_index": event(port, name), "session_hash": "visitor", **more}
    status, answer = ask(port, "POST", "/gradio_api/run/predict", json.dumps(body), JSON)
    return status, json.loads(answer) if status == 200 else answer.decode()


def test_what_the_page_asks_for_is_answered_and_leaves_no_file(port: int) -> None:
    before = set(os.listdir(tempfile.gettempdir()))
    address = f"{GROUP}/6/12"
    for strength in (1.0, 2.0, 3.0):
        status, answer = predict(port, "add", [None, address, "add", strength, "raw", "both"])
        assert status == 200
        saved = json.loads(answer["data"][2])
        assert saved["edits"][0]["ref"] == address
        text = json.dumps(saved)
        assert predict(port, "load", [None, text])[1]["data"][1]["data"][0][0] == address
    assert "another format" not in str(predict(port, "load", [None, "{}"])[1])
    assert "is not a qsl-plan file" in str(predict(port, "load", [None, "{}"])[1])
    new = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in new if name.startswith("qsl-")]
    assert not list(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("plan.json"))


@pytest.mark.parametrize("shape", ["plain", "deep", "in an event", "url", "in a table"])
def test_a_file_named_in_a_request_is_not_opened(shape: str, port: int, tmp_path: Path) -> None:
    """Before, a FIFO stopped the whole app, and any other file was copied and served."""
    secret, fifo = tmp_path / "secret.txt", tmp_path / "fifo"
    secret.write_text("secret")
    os.mkfifo(fifo)
    for path in (secret, fifo):
        file: Any = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        more: dict[str, Any] = {}
        if shape == "url":
            file = {"url": f"file://{path}", "meta": {"_type": "gradio.FileData"}}
        elif shape == "deep":
            file = [[{"a": [file]}]]
        elif shape == "in a table":
            file = {"headers": ["a"], "data": [[file]], "metadata": None}
        elif shape == "in an event":
            more, file = {"event_data": file}, "text"
        assert predict(port, "about", [file], **more) == (403, "this app takes no files")
        body = {"data": [file], "fn_index": event(port, "read"), "session_hash": "v", **more}
        status, _ = ask(port, "POST", "/gradio_api/queue/join", json.dumps(body), JSON)
        assert status == 403
    assert not list(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("secret.txt"))
    assert ask(port, "GET", "/config")[0] == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=/etc/hostname"),
        ("GET", "/gradio_api/file/etc/hostname"),
        ("GET", "/file=/etc/hostname"),
        ("GET", "/gradio_api/file%3D/etc/hostname"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/"),
        ("GET", "/gradio_api/upload_progress?upload_id=x"),
        ("GET", "/static/../../../../etc/hostname"),
        ("GET", "/assets/%2e%2e/%2e%2e/etc/hostname"),
        ("GET", "/features/index.html"),
        ("GET", "/monitoring"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/upload"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/call/read"),
        ("PUT", "/gradio_api/queue/join"),
        ("DELETE", "/config"),
        ("OPTIONS", "/gradio_api/queue/join"),
    ],
)
def test_other_routes_of_gradio_are_closed(method: str, path: str, port: int) -> None:
    body = json.dumps({"data": []}) if method == "POST" else None
    assert ask(port, method, path, body, JSON)[0] == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://attacker.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, 200),
        ({"Host": "attacker.example"}, 400),
    ],
)
def test_pages_of_other_sites_may_not_ask(headers: dict[str, str], status: int, port: int) -> None:
    assert ask(port, "GET", "/config", None, headers)[0] == status
    own = {"Origin": f"http://127.0.0.1:{port}"}
    assert ask(port, "GET", "/config", None, own)[0] == 200
    if status == 403:
        assert ask(port, "POST", "/gradio_api/reset", "{}", JSON | headers)[0] == 403


def raw(port: int, text: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(text)
        return connection.recv(1000)


def test_bodies_are_small_and_of_one_kind(port: int) -> None:
    start = b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    kind = b"Content-Type: application/json\r\n"
    assert b" 413 " in raw(port, start + kind + b"Content-Length: 300000000\r\n\r\n")
    chunk = b"%x\r\n" % (MOST_BYTES + 1) + b"x" * (MOST_BYTES + 1) + b"\r\n"
    assert b" 413 " in raw(port, start + kind + b"Transfer-Encoding: chunked\r\n\r\n" + chunk)
    assert b" 415 " in raw(port, start + b"Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}")
    deep = "[" * 100_000 + "]" * 100_000
    for body in ("", "{", deep, b"\xff\xfe"):
        assert ask(port, "POST", "/gradio_api/queue/join", body, JSON)[0] == 400
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    key = b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
    asked = b"GET /queue/join HTTP/1.1\r\nHost: 127.0.0.1\r\n" + upgrade + key
    assert b" 101 " not in raw(port, asked)
    assert ask(port, "GET", "/config")[0] == 200
