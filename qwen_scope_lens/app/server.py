"""Serves the app, with the site of feature pages beside it, and contacts no other machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qwen_scope_lens.app.gate import Gate
from qwen_scope_lens.app.workbench import Workbench
from qwen_scope_lens.errors import CannotWrite
from qwen_scope_lens.extras import require
from qwen_scope_lens.site.data_files import require_site

__all__ = ["SITE_PATH", "make_web_app", "serve"]

SITE_PATH = "/features"
LOCAL = ("localhost", "127.0.0.1", "::1")

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval';"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:;"
    " connect-src 'self'; worker-src 'self' blob:; frame-ancestors 'none'"
)
"""Gradio's own scripts need the unsafe ones; what the browser may never do is ask elsewhere."""


def make_web_app(
    bench: Workbench, layers: list[int], site: Path | None = None, host: str = "127.0.0.1"
) -> Any:
    """A FastAPI application: the app at /, feature pages at /features."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    gr = require("gradio", "app")
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.staticfiles import StaticFiles

    from qwen_scope_lens.app.layout import STYLE, make_app

    if site is not None:
        require_site(site)
    web = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if host in LOCAL:  # else another site's name, made to point here, could ask in a visitor's name
        web.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, "[::1]"])

    @web.middleware("http")
    async def _policy(request: Any, call_next: Any) -> Any:
        answer = await call_next(request)
        answer.headers["Referrer-Policy"] = "no-referrer"
        if not request.url.path.startswith(SITE_PATH):  # the pages bring a stricter one
            answer.headers["Content-Security-Policy"] = POLICY
        return answer

    web.add_middleware(Gate, under=(SITE_PATH,) if site is not None else ())  # the outermost
    if site is not None:
        web.mount(SITE_PATH, StaticFiles(directory=site, html=True))
    app = make_app(bench, layers, f"{SITE_PATH}/index.html" if site is not None else None)
    app.queue(default_concurrency_limit=4)
    system = ["system-ui", "Noto Sans", "Noto Sans CJK SC", "sans-serif"]
    theme = gr.themes.Base(font=system, font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        web, app, path="/", theme=theme, css=STYLE, footer_links=[], ssr_mode=False
    )


def serve(web: Any, host: str, port: int) -> None:
    """Serve until Ctrl-C."""
    import uvicorn

    config = uvicorn.Config(
        web, host=host, port=port, log_level="warning", timeout_graceful_shutdown=3
    )
    server = uvicorn.Server(config)
    try:
        socket = config.bind_socket() if port else None
    except SystemExit as error:
        raise CannotWrite(
            f"port {port} of {host} cannot be used: another program listens there. Choose another"
            " with --port"
        ) from error
    server.run(sockets=[socket] if socket else None)
