"""Stands before the server and lets only requests through that may ask it.

A page of another site that is open in the same browser can send requests to this machine. So the
`Host` has to be ours (or a foreign name could be made to point here), the `Origin` too, and a body
has to be JSON, which a foreign page cannot send without being asked first. Bodies are small and do
not come slowly. With a token, only who has it may use the model.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from qwen_scope_lens.serve.faults import Fault, fault_of

__all__ = ["LOCAL", "MOST_BYTES", "Guard"]

LOCAL = ("localhost", "127.0.0.1", "::1", "[::1]")
MOST_BYTES = 1 << 20
"""Of a request's body: longer texts than any context. More is not read."""
MOST_SECONDS = 30
"""For a body to arrive."""
CLOSED = ("/v1/", "/api/", "/metrics")
SITE, COOKIE = "/site/", "qsl_site"

HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        b" img-src 'self' data:; font-src 'self'; base-uri 'none'; form-action 'none';"
        b" frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """An ASGI middleware, the outermost. `hosts` None: any name (a token is required then)."""

    def __init__(self, app: Any, hosts: Sequence[str] | None, token: str | None) -> None:
        self._app, self._token = app, token
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self.cookie = secrets.token_urlsafe(24)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks over web sockets
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        try:
            self._check(scope)
            if scope["path"] == "/api/session" and self._token is not None:
                await self._session(scope, guarded)
                return
            again = receive
            if scope["method"] in ("POST", "PUT", "PATCH"):
                again = await _whole(scope, receive)
        except Fault as fault:
            await answer(guarded, fault)
            return
        await self._app(scope, again, guarded)

    def _check(self, scope: Message) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self._hosts is not None and _name_of(host) not in self._hosts:
            raise Fault(f"{host[:100]!r} is not a name of this server", "bad_host", None, 403)
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise Fault(
                f"a page of {origin[:100]} may not ask this server", "bad_origin", None, 403
            )
        foreign = headers.get(b"sec-fetch-site", "none") in ("cross-site", "same-site")
        if foreign and headers.get(b"sec-fetch-mode") != "navigate":
            raise Fault("a page of another site may not ask this server", "bad_origin", None, 403)
        path = str(scope["path"])
        if self._token is not None and path.startswith((*CLOSED, SITE)):
            given = headers.get(b"authorization", "")
            if _same(given, f"Bearer {self._token}"):
                return
            cookies = SimpleCookie(headers.get(b"cookie", ""))
            mine = path.startswith(SITE) and COOKIE in cookies
            if mine and _same(cookies[COOKIE].value, self.cookie):
                return
            raise Fault("expected the header Authorization: Bearer TOKEN", "bad_token", None, 401)

    async def _session(self, scope: Message, send: Send) -> None:
        if scope["method"] != "POST":
            raise Fault("expected POST", "method_not_allowed", None, 405)
        cookie = f"{COOKIE}={self.cookie}; HttpOnly; SameSite=Strict; Path={SITE}"
        headers = [(b"set-cookie", cookie.encode()), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


async def _whole(scope: Message, receive: Receive) -> Receive:
    """The body, read and checked; whoever asks for it next gets it at once."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json" and scope["path"] != "/api/session":
        raise Fault("expected Content-Type: application/json", "not_json", None, 415)
    length = headers.get(b"content-length", b"0")
    too_large = Fault(f"expected {MOST_BYTES} bytes or fewer", "too_large", None, 413)
    if not length.isdigit() or len(length) > 12 or int(length) > MOST_BYTES:
        raise too_large
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(MOST_SECONDS):
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    break  # the client went away
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MOST_BYTES:
                    raise too_large
    except TimeoutError as error:
        raise Fault("the request came too slowly", "too_slow", None, 408) from error
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return again


def _name_of(host: str) -> str:
    """A `Host` header without its port."""
    name = host.lower()
    if name.startswith("["):
        return name.partition("]")[0] + "]"
    return name.rpartition(":")[0] if name.rpartition(":")[2].isdecimal() and ":" in name else name


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


async def answer(send: Send, error: BaseException) -> None:
    """Send a refusal."""
    fault = fault_of(error)
    body = json.dumps(fault.content).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *((name.lower().encode(), value.encode()) for name, value in fault.headers.items()),
    ]
    if fault.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": fault.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
