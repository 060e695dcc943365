"""Masking: removes the key from text that came from a server, however the server wrote it.

A server that repeats a request repeats its key: as it is, in upper or lower case (as headers are
normalised), with the escapes of JSON, of addresses or of HTML, in base64 or in hexadecimal digits.
Whatever a server said goes through a `Mask` before it is written, printed or logged.
"""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["MASKED", "Mask", "bare", "whole_characters"]

MASKED = "[key]"

SHORT = 8
"""A shorter key is a placeholder, such as EMPTY or none. Only that very word is masked, because its
other writings would be found in ordinary texts."""

EXCERPT = 200
"""The most characters of a server's words that a message repeats."""

LOGGERS = (
    "httpx2",
    "httpcore2.connection",
    "httpcore2.http11",
    "httpcore2.http2",
    "httpcore2.proxy",
    "httpcore2.socks",
)


class Mask:
    """`mask(text)` is the text without the key and without lone surrogates."""

    def __init__(self, key: str) -> None:
        self._pattern = re.compile(_writings(key)) if key else None

    def __call__(self, text: str) -> str:
        text = whole_characters(text)
        return self._pattern.sub(MASKED, text) if self._pattern else text

    def excerpt(self, said: object) -> str:
        """A server's words for one line of a message. They are masked before they are cut, so that
        no part of a key is left at the cut."""
        text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        printable = "".join(c if c.isprintable() else " " for c in self(text))
        return printable[:EXCERPT]

    @contextmanager
    def logs(self) -> Iterator[None]:
        """Mask the log of the HTTP library, which repeats words and headers of servers."""

        def masked(record: logging.LogRecord) -> bool:
            record.msg, record.args = self(record.getMessage()), None
            return True

        loggers = [logging.getLogger(name) for name in LOGGERS]
        for logger in loggers:
            logger.addFilter(masked)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(masked)


def whole_characters(text: str) -> str:
    """The text with lone surrogates (halves of characters) replaced: no file can hold them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def bare(url: str) -> str:
    """An address without the parts that may hold a password."""
    return url.rpartition("@")[2].partition("?")[0].partition("#")[0]


def _writings(key: str) -> str:
    """A regular expression that matches every writing of a key.

    Repetitions in it are bounded, so that no text can make the search slow.
    """
    if len(key) < SHORT:
        return re.escape(key)
    plain = "".join(_character({c.lower(), c.upper()}) for c in key)
    encoded = [plain, f"(?i:{key.encode().hex()})"]
    for before in range(3):  # in base64 a key has three forms, by where it begins
        code = base64.b64encode(b"\0" * before + key.encode()).decode()
        first = -(-before * 8 // 6)  # the outer characters depend on the text around the key
        last = (before + len(key)) * 8 // 6
        same = "".join(_character({c, *_URL_SAFE.get(c, "")}) for c in code[first:last])
        encoded.append(f"[A-Za-z0-9+/_-]{{0,2}}{same}[A-Za-z0-9+/_=-]{{0,3}}")
    return "|".join(encoded)


_URL_SAFE = {"+": "-", "/": "_"}


def _character(same: set[str]) -> str:
    """A regular expression for one character of a key, plain or escaped.

    `same` are the characters that may stand for it.
    """
    ways = []
    for one in sorted(same):
        code = f"(?i:{ord(one):02x})"
        ways += [
            re.escape(one) if one.isalnum() else rf"\\{{0,8}}{re.escape(one)}",
            rf"\\{{1,8}}(?:u00|x|U000000){code}",
            rf"%(?:25){{0,4}}{code}",
            rf"&(?:amp;){{0,4}}#(?:0{{0,6}}{ord(one)}|[xX]0{{0,6}}{code});",
        ]
    return f"(?:{'|'.join(ways)})"
