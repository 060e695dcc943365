"""Whether the hub of Hugging Face can be reached, and the ways out where it cannot.

Without any network the hub's client repeats each request for half a minute. So a connection is
tried first, for a few seconds, and where none comes about only the client's cache is read. Once the
hub has answered, nothing is asked here again: the client repeats what fails later, as ever.
"""

from __future__ import annotations

import socket
import time
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

__all__ = ["only_cache", "out_of_reach", "ways_out"]

PAUSES = (0.5, 1.5)  # seconds, before the second and the third try
PATIENCE = 5.0
"""Seconds after which no further try begins. One that gets no answer ends after half of them."""
REMEMBERED = 60.0
"""Seconds in which a hub out of reach is not asked again."""

answers: dict[str, tuple[float, str | None]] = {}


def out_of_reach() -> str | None:
    """Why the hub cannot be reached, or None where it answers, or where a proxy has to know."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    endpoint = constants.ENDPOINT
    asked, reason = answers.get(endpoint, (0.0, ""))
    if reason is None or (reason and time.monotonic() - asked < REMEMBERED):
        return reason
    found = _connect(endpoint)
    answers[endpoint] = (time.monotonic(), found)
    return found


def only_cache(given: bool = False) -> bool:
    """What `local_files_only` has to be: as given, and True where the hub is out of reach."""
    return given or out_of_reach() is not None


def ways_out(*others: str) -> str:
    """Where a file was looked for, and what can be done, as the end of a message."""
    from huggingface_hub import constants

    reason = out_of_reach()
    ways = (
        *others,
        "with a network, let it be downloaded (HTTPS_PROXY names a proxy, HF_ENDPOINT a mirror)",
        "what is in the cache already is found without a network; HF_HUB_OFFLINE=1 asks for nothing"
        " else",
        "the toy model needs no download: mini-qwen3, with the SAEs mini-qwen3/w1k-l0-16",
    )
    return (
        f"the hub's cache, {constants.HF_HUB_CACHE}, does not have it, and {constants.ENDPOINT}"
        f" {f'cannot be asked ({reason})' if reason else 'did not give it'}. Ways out:"
        + "".join(f"\n  - {way}" for way in ways)
    )


def _connect(endpoint: str) -> str | None:
    parts = urlsplit(endpoint)
    host, scheme = parts.hostname or "", parts.scheme
    if not proxy_bypass(host) and {scheme, "all"} & set(getproxies()):
        return None
    end = time.monotonic() + PATIENCE
    port = parts.port or {"http": 80}.get(scheme, 443)
    for pause in (*PAUSES, None):
        try:
            socket.create_connection((host, port), timeout=PATIENCE / 2).close()
        except OSError as error:
            reason = f"{host}: {error.strerror or error}"
        else:
            return None
        if pause is None or time.monotonic() + pause > end:
            break
        time.sleep(pause)
    return reason
