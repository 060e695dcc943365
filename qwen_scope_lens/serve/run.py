"""Runs a server until Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
import webbrowser
from contextlib import ExitStack
from typing import Any

from qwen_scope_lens.errors import CannotWrite
from qwen_scope_lens.extras import require
from qwen_scope_lens.serve.web import Serving, make_app

__all__ = ["listen", "serve"]


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises where another program does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise CannotWrite(
            f"port {port} of {host} cannot be used ({error.strerror}): another program listens"
            " there. Choose another with --port"
        ) from error


def make_server(app: Any) -> Any:
    uvicorn = require("uvicorn", "serve")
    Base: Any = uvicorn.Server

    class Server(Base):
        """The first Ctrl-C gives replies three seconds to end, the second one cuts them."""

        should_exit: bool
        force_exit: bool
        ended_by: int | None = None

        def handle_exit(self, sig: int, frame: object) -> None:
            self.force_exit = self.should_exit
            if self.server_state.tasks and not self.force_exit:
                print("replies have three seconds to end; Ctrl-C again cuts them", file=sys.stderr)
            self.should_exit, self.ended_by = True, sig

        def is_news(self, record: logging.LogRecord) -> bool:
            """Not that what was cut when the server ended was cut."""
            kind = record.exc_info[0] if record.exc_info else None
            said = record.getMessage()
            cut = (
                kind is asyncio.CancelledError
                or "CancelledError" in said
                or said.startswith("Cancel ")
            )
            return not (self.should_exit and cut)

    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=3, server_header=False, lifespan="on"
    )
    return Server(config)


def serve(serving: Serving, listening: socket.socket, open_at: str | None = None) -> int | None:
    """Serve until Ctrl-C; then what was recorded is written. `open_at` is opened in a browser.

    Returns the signal that ended it. From then on one more Ctrl-C is ignored, because what is left
    to do takes no time that could be saved; the caller sets the handler back.
    """
    server, log = make_server(make_app(serving)), logging.getLogger("uvicorn.error")
    interrupt = signal.getsignal(signal.SIGINT)
    with ExitStack() as stack:
        stack.callback(serving.lens.close)
        if serving.recorder is not None:  # it may still have to read what another engine wrote
            stack.callback(serving.recorder.close)
        stack.callback(serving.lens.engine.close)
        stack.enter_context(listening)
        if open_at is not None:
            opener = threading.Timer(0.5, webbrowser.open, (open_at,))
            opener.daemon = True
            opener.start()
        log.addFilter(server.is_news)
        stack.callback(log.removeFilter, server.is_news)
        signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, interrupt))
        server.run(sockets=[listening])
    ended_by: int | None = server.ended_by
    return ended_by
