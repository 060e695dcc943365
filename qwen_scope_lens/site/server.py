"""A small static server for a site on this machine. Any other static server works as well."""

from __future__ import annotations

import functools
import http.server
from os import PathLike
from pathlib import Path

from qwen_scope_lens.errors import CannotWrite
from qwen_scope_lens.site.data_files import require_site

__all__ = ["make_server"]


TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript"}
"""As the machine's own table of types differs from one to the next."""


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of one folder. It lists nothing, follows no link out of the folder, lets the
    browser cache nothing without asking, and forbids it to guess types."""

    server_version, sys_version = "qsl", ""

    def end_headers(self) -> None:
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def send_head(self):  # type: ignore[no-untyped-def]
        root = Path(self.directory).resolve()
        wanted = Path(self.translate_path(self.path)).resolve()
        if wanted != root and root not in wanted.parents:  # a link that leads out
            self.send_error(404)
            return None
        if wanted.exists() and not wanted.is_file() and not wanted.is_dir():  # a FIFO would wait
            self.send_error(404)
            return None
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if self._is_local and host not in ("localhost", "127.0.0.1", "[::1]"):
            self.send_error(403)  # another site's name that was made to point here
            return None
        return super().send_head()

    @property
    def _is_local(self) -> bool:
        address = self.server.server_address
        return isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1")

    def guess_type(self, path: str | PathLike[str]) -> str:
        return TYPES.get(Path(path).suffix) or super().guess_type(path)

    def list_directory(self, path):  # type: ignore[no-untyped-def]
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


def make_server(
    site: Path, port: int = 8000, host: str = "127.0.0.1"
) -> http.server.ThreadingHTTPServer:
    """A server that is listening but not yet answering: call `serve_forever()`."""
    require_site(site)
    handler = functools.partial(_Handler, directory=str(site.resolve()))
    try:
        return http.server.ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        raise CannotWrite(
            f"port {port} of {host} cannot be used ({error.strerror}): another program listens"
            " there. Choose another with --port, or 0 for any free one"
        ) from error
