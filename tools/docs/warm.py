"""Processes that start warm: forked from one that has imported torch, SAELens and TransformerLens.

Importing them takes eight seconds of CPU, and following all pages starts a hundred processes. With
`follow --warm` the `qsl` on the PATH hands its words, folder, environment and streams to this
server, which forks. A forked process shares nothing but what was imported.

    python -m tools.docs.warm SOCKET         # the server
    python warm.py SOCKET WORD ...           # one command; `session` is the Python of a page
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

__all__ = ["ask", "install", "serve"]

MOST = 1 << 20


def install(folder: Path, python: Path) -> list[str]:
    """Write a `qsl` that asks the server into a folder; return the command of a session."""
    folder.mkdir(parents=True)
    command = f'exec "{python}" -S -E "{__file__}" "{folder / "socket"}"'
    for name, words in (("qsl", 'qsl "$@"'), ("session", "session")):
        (folder / name).write_text(f"#!/bin/sh\n{command} {words}\n")
        (folder / name).chmod(0o755)
    return [str(folder / "session")]


def ask(address: str, words: list[str]) -> int:
    """Have the server run a command on this process's streams; returns its exit code."""
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(address)
        told = json.dumps({"words": words, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
        socket.send_fds(channel, [struct.pack("<I", len(told))], [0, 1, 2])
        channel.sendall(told)
        pid = struct.unpack("<i", channel.recv(4))[0]
        while True:
            try:
                code = channel.recv(4)
                return struct.unpack("<i", code)[0] if code else 1
            except KeyboardInterrupt:
                os.kill(pid, signal.SIGINT)


def serve(address: str) -> None:
    """Import what is heavy, then fork a process for each that asks, until ended."""
    import sae_lens  # noqa: F401
    import torch  # noqa: F401
    import transformer_lens  # noqa: F401
    import transformers  # noqa: F401

    from qwen_scope_lens.cli import main
    from tools.docs import session

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while True:
            channel, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os._exit(_answer(channel, main, session.main))
            channel.close()


def _answer(
    channel: socket.socket, main: Callable[[list[str]], int], session: Callable[[], None]
) -> int:
    """In the forked process: become what the other side asked for, and tell it the exit code."""
    size, streams, _, _ = socket.recv_fds(channel, 4, 3)
    left, told = struct.unpack("<I", size)[0], b""
    while len(told) < left:
        told += channel.recv(min(MOST, left - len(told)))
    asked = json.loads(told)
    for stream, number in zip(streams, (0, 1, 2), strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    channel.sendall(struct.pack("<i", os.getpid()))
    threading.Thread(target=_end_with, args=(channel,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program, *words = asked["words"]
    sys.argv = [program, *words]
    code = 1
    try:
        if program == "qsl":
            code = main(words)
        else:
            session()
            code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        channel.sendall(struct.pack("<i", code))
    return code


def _end_with(channel: socket.socket) -> None:
    """When the one that asked has gone, nobody waits for us."""
    if not channel.recv(1):
        os._exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[1])
