"""Runs a server until Ctrl-C."""

from __future__ import annotations

import socket
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
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=3, server_header=False, lifespan="on"
    )
    return uvicorn.Server(config)


def serve(serving: Serving, listening: socket.socket, open_at: str | None = None) -> None:
    """Serve until Ctrl-C; then what was recorded is written. `open_at` is opened in a browser."""
    server = make_server(make_app(serving))
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
        server.run(sockets=[listening])
