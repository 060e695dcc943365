"""Transport: one HTTP request and its whole answer, within a deadline and a size.

The deadline covers the name lookup, the connection, the headers and the body, however slowly they
arrive. The size is that of the unpacked answer, which is unpacked piece by piece. A redirect is an
answer like others: it is never followed, so that the key does not go to another address.
`answers.py` knows what an answer means, `endpoint.py` whether to try again.
"""

from __future__ import annotations

import asyncio
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

__all__ = ["MOST_BYTES", "Answer", "Transport", "Trouble"]

MOST_BYTES = 16 * 2**20
"""The largest answer that is read, in bytes after unpacking."""

CONNECTING = 10.0
"""The most seconds that making a connection may take."""


@dataclass(frozen=True)
class Answer:
    """The answer of a server, unpacked."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    content: bytes


class Trouble(Exception):
    """A try without a usable answer. `what` may quote the server; it is masked already."""

    def __init__(
        self,
        what: str,
        maybe_charged: bool,
        *,
        wait: float | None = None,  # seconds that the server asks us to wait
        final: bool = False,  # this request cannot succeed
        fatal: bool = False,  # no request can succeed
        unreachable: bool = False,
        advice: str = "",
    ) -> None:
        super().__init__(what)
        self.what, self.maybe_charged, self.wait = what, maybe_charged, wait
        self.final, self.fatal, self.unreachable, self.advice = final, fatal, unreachable, advice


class Transport:
    """The connections of one run; `post` may be called from any thread.

    An event loop in its own thread does the waiting, because there it can be stopped at any point.
    """

    def __init__(self, connections: int, timeout: float) -> None:
        self._timeout = timeout
        self._limits = httpx2.Limits(max_connections=connections)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Transport:
        # The deadline ends everything else; this one tells that a server is not there.
        timeout = httpx2.Timeout(None, connect=min(CONNECTING, 0.9 * self._timeout))
        self._client = httpx2.AsyncClient(
            limits=self._limits, timeout=timeout, follow_redirects=False
        )
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def post(self, url: str, content: bytes, headers: Mapping[str, str]) -> Answer:
        """Send one request and read its answer. Raises `Trouble` where there is none."""
        sending = self._post(url, content, {**headers, "Accept-Encoding": "gzip"})
        return asyncio.run_coroutine_threadsafe(sending, self._loop).result()

    async def _post(self, url: str, content: bytes, headers: dict[str, str]) -> Answer:
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._client.stream("POST", url, content=content, headers=headers) as response,
            ):
                found = await _read(response)
        except TimeoutError:
            raise Trouble("no answer in time", True) from None
        except httpx2.TimeoutException as error:
            unreachable = isinstance(error, (httpx2.ConnectTimeout, httpx2.PoolTimeout))
            raise Trouble("no answer in time", not unreachable, unreachable=unreachable) from None
        except httpx2.ConnectError:
            raise Trouble("no connection", False, unreachable=True) from None
        except httpx2.HTTPError as error:
            raise Trouble(f"connection cut ({type(error).__name__})", True) from None
        named = {name.lower(): value for name, value in response.headers.items()}
        return Answer(response.status_code, named, found)


async def _read(response: httpx2.Response) -> bytes:
    """The unpacked content. It is unpacked here, because the library would unpack a whole piece,
    however large the result."""
    coding = response.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity", "gzip", "x-gzip"):
        raise Trouble("an answer in a compression that was not asked for", True, final=True)
    unpacker: Any = zlib.decompressobj(31) if coding.endswith("gzip") else None
    content, came = bytearray(), 0
    async for piece in response.aiter_raw():
        came += len(piece)
        while piece:
            if unpacker is None:
                content += piece
                break
            try:
                content += unpacker.decompress(piece, MOST_BYTES + 1 - len(content))
            except zlib.error:
                raise Trouble("an answer that cannot be unpacked", True) from None
            if len(content) > MOST_BYTES:
                break
            piece = unpacker.unconsumed_tail
            if unpacker.eof and (piece := unpacker.unused_data):
                unpacker = zlib.decompressobj(31)
        if max(came, len(content)) > MOST_BYTES:
            raise Trouble(f"an answer of more than {MOST_BYTES:,} bytes", True, final=True)
    if unpacker is not None and came and not unpacker.eof:
        raise Trouble("an answer that cannot be unpacked", True)
    return bytes(content)
