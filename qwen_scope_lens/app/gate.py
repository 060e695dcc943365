"""Stands before Gradio, and lets only requests through that this app's own page makes.

Gradio takes files by name, copies them into its cache and serves them, to anybody who can send it a
request. This app needs no files, so no request that names one reaches it: the allowed routes are
listed, bodies are small JSON that names no file, and pages of another origin are refused.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Gate"]

MOST_BYTES = 1 << 20
"""Of a request's body: longer texts than any context. More is not read."""
MOST_SECONDS = 30
"""For a body to arrive."""

API = "/gradio_api"
READS = frozenset(
    {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json"}
    | {f"{API}/{name}" for name in ("queue/data", "startup-events", "info", "app_id", "theme.css")}
)
READS_UNDER = ("/assets/", "/static/", "/svelte/", f"{API}/heartbeat/")
WRITES = frozenset(f"{API}/{name}" for name in ("queue/join", "run/predict", "cancel", "reset"))

FILES = frozenset({"path", "url", "orig_name", "mime_type", "is_stream"})
"""Keys of a file as Gradio sends it; no value of this app's fields has one of them."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """An ASGI middleware. `under` are folders that other parts of the app serve."""

    def __init__(self, app: Any, under: tuple[str, ...] = ()) -> None:
        self._app, self._under = app, (*READS_UNDER, *under)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":  # nothing here speaks over web sockets
            await send({"type": "websocket.close", "code": 1008})
        elif refused := self._refused(scope):
            await _answer(send, *refused)
        elif scope["method"] != "POST":
            await self._app(scope, receive, send)
        else:
            await self._post(scope, receive, send)

    def _refused(self, scope: Message) -> tuple[int, str] | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, f"a page of {origin[:100]} may not ask this app"
        foreign = headers.get(b"sec-fetch-site", "none") in ("cross-site", "same-site")
        if foreign and headers.get(b"sec-fetch-mode") != "navigate":
            return 403, "a page of another site may not ask this app"
        path, method = str(scope["path"]), scope["method"]
        if ".." in path or "\\" in path:
            return 404, "there is no such page"
        if method == "POST" and path.rstrip("/") in WRITES:
            kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
            length = headers.get(b"content-length", "0")
            if kind != "application/json":
                return 415, "expected JSON"
            if not length.isdecimal() or len(length) > 9 or int(length) > MOST_BYTES:
                return 413, f"expected {MOST_BYTES} bytes or fewer"
            return None
        known = path in READS or path.startswith(self._under)
        if method in ("GET", "HEAD") and known:
            return None
        return 404, "there is no such page"

    async def _post(self, scope: Message, receive: Receive, send: Send) -> None:
        body = bytearray()
        more = True
        try:
            async with asyncio.timeout(MOST_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        return  # the visitor went away
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > MOST_BYTES:
                        await _answer(send, 413, f"expected {MOST_BYTES} bytes or fewer")
                        return
        except TimeoutError:
            await _answer(send, 408, "the request came too slowly")
            return
        try:
            content = json.loads(bytes(body))
        except (ValueError, RecursionError):
            await _answer(send, 400, "expected JSON")
            return
        if _names_a_file(content):
            await _answer(send, 403, "this app takes no files")
            return
        sent = False

        async def again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, again, send)


def _names_a_file(content: Any) -> bool:
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if not FILES.isdisjoint(value):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode("utf-8", "replace")
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
