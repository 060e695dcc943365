"""What a client is told when something is refused or fails: OpenAI's error objects.

A refusal of the package is told in its own words. Anything else is logged here, and the client
learns only that it happened.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from qwen_scope_lens.errors import EngineFailed, ScopeError
from qwen_scope_lens.serve.engine import QueueFull, Stopping, TooLate

__all__ = ["Fault", "fault_of"]

log = logging.getLogger(__name__)

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
}
STATUS: dict[type[ScopeError], tuple[int, str]] = {
    QueueFull: (429, "queue_full"),
    TooLate: (408, "too_slow"),
    Stopping: (503, "shutting_down"),
    EngineFailed: (502, "engine_failed"),
}
MOST_TEXT = 2000
"""Characters of a message."""


class Fault(ScopeError):
    """A request that is not answered, and why."""

    def __init__(
        self, message: str, code: str = "bad_value", param: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.code, self.param, self.status = code, param, status

    @property
    def content(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        text = str(self)
        text = text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} ..."
        text = text.encode("utf-8", "replace").decode()
        return {"error": {"message": text, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"} if self.status == 429 else {}


def fault_of(error: BaseException, param: str | None = None) -> Fault:
    """Any exception as what the client is told."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, ScopeError):
        code = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
        status, code = STATUS.get(type(error), (400, code))
        return Fault(str(error), code, param, status)
    log.error("a request failed", exc_info=error)
    return Fault("the request failed; the log of the server says why", "internal", None, 500)
