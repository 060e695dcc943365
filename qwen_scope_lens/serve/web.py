"""The web application: routes, and what stands around each of them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qwen_scope_lens.extras import require
from qwen_scope_lens.labels.packs import LabelPack
from qwen_scope_lens.serve import questions
from qwen_scope_lens.serve.asking import completion
from qwen_scope_lens.serve.completions import Completion, events
from qwen_scope_lens.serve.faults import Fault, fault_of
from qwen_scope_lens.serve.guard import LOCAL, Guard
from qwen_scope_lens.serve.lens import Lens
from qwen_scope_lens.serve.metrics import Metrics
from qwen_scope_lens.serve.openapi import description
from qwen_scope_lens.serve.plans import Plans
from qwen_scope_lens.serve.recorder import Recorder
from qwen_scope_lens.serve.site import TYPES, Site, content_of, kept, static_files, tag_of
from qwen_scope_lens.steering.plan import Plan

__all__ = ["Serving", "make_app"]

Handler = Callable[[Any], Awaitable[Any]]
log = logging.getLogger(__name__)

BEGIN = b"<!-- begin -->"
"""Where the page takes what it begins with."""


@dataclass(frozen=True)
class Serving:
    """What is served, to whom."""

    lens: Lens
    plans: Plans = field(default_factory=Plans)
    site: Future[Site] | None = None  # one that is still being made is not shown yet
    recorder: Recorder | None = None
    token: str | None = None
    hosts: Sequence[str] | None = LOCAL  # None: under any name
    save_labels: Path | None = None


def make_app(serving: Serving) -> Any:
    """An ASGI application. Closing it does not close the lens."""
    routing = require("starlette.routing", "serve")
    application = require("starlette.applications", "serve").Starlette
    web = _Web(serving)
    routes = [
        routing.Route(path, web.wrapped(path, work), methods=[method], name=f"{method} {path}")
        for method, path, work in web.table()
    ]
    app = application(
        routes=routes,
        exception_handlers={404: web.not_found, 405: web.not_allowed},
        lifespan=web.lifespan,
    )
    return Guard(app, serving.hosts, serving.token)


class _Web:
    def __init__(self, serving: Serving) -> None:
        self._responses = require("starlette.responses", "serve")
        self._serving, self._lens, self._plans = serving, serving.lens, serving.plans
        self._metrics = Metrics(serving.lens, serving.recorder)
        self._created = int(time.time())
        self._stopping = False
        self._files = {name: kept(path) for name, path in static_files().items()}
        self._first: tuple[Any, dict[str, Any]] | None = None  # labels, and the first question

    @property
    def _site(self) -> Site | None:
        made = self._serving.site
        return made.result() if made and made.done() and not made.exception() else None

    def table(self) -> list[tuple[str, str, Handler]]:
        return [
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name:path}", self.model),
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/chat/completions", self.chat),
            ("GET", "/api/info", self.info),
            ("POST", "/api/read", self.read),
            ("POST", "/api/compare", self.compare),
            ("POST", "/api/promoted", self.promoted),
            ("GET", "/api/feature/{address:path}", self.feature),
            ("GET", "/api/search", self.search),
            ("GET", "/api/plans", self.list_plans),
            ("POST", "/api/plans/check", self.check_plan),
            ("GET", "/api/plans/{name}", self.get_plan),
            ("PUT", "/api/plans/{name}", self.put_plan),
            ("DELETE", "/api/plans/{name}", self.delete_plan),
            ("GET", "/api/labels", self.list_labels),
            ("PUT", "/api/labels/{address:path}", self.put_label),
            ("POST", "/api/coherence", self.coherence),
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.metrics),
            ("GET", "/openapi.json", self.openapi),
            ("GET", "/{file:path}", self.file),
        ]

    def wrapped(self, path: str, work: Handler) -> Handler:
        """A route that counts its requests, and tells refusals as OpenAI's errors."""

        async def handler(request: Any) -> Any:
            began, status = time.monotonic(), 500
            try:
                response = await work(request)
                status = response.status_code
            except Exception as error:
                fault = fault_of(error)
                status = fault.status
                response = self._json(fault.content, status, fault.headers)
            finally:
                self._metrics.request(path, status, time.monotonic() - began)
            return response

        return handler

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        beginning = asyncio.ensure_future(asyncio.to_thread(self._begin))
        yield
        self._stopping = True
        beginning.cancel()

    def _begin(self) -> None:
        """Read the page's example before somebody asks."""
        labels = self._lens.labels
        try:
            if self._lens.reads:
                self._first = labels, questions.first(self._lens)
        except Exception:
            log.exception("the example of the page was not read")

    async def not_found(self, request: Any, error: Any) -> Any:
        return self._json(Fault("there is no such page", "not_found", None, 404).content, 404)

    async def not_allowed(self, request: Any, error: Any) -> Any:
        said = f"{request.method} is not what this address takes: see /openapi.json"
        content = Fault(said[:200], "method_not_allowed", None, 405).content
        return self._json(content, 405, dict(error.headers or {}))

    def _json(self, content: Any, status: int = 200, headers: Any = None) -> Any:
        body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        return self._responses.Response(body, status, headers, "application/json")

    # OpenAI's.

    def _models(self) -> list[dict[str, Any]]:
        names = [self._lens.name, *(f"{self._lens.name}+{plan}" for plan in self._plans)]
        facts = {"object": "model", "created": self._created, "owned_by": "qwen-scope-lens"}
        return [{"id": name, **facts} for name in names]

    async def models(self, request: Any) -> Any:
        return self._json({"object": "list", "data": self._models()})

    async def model(self, request: Any) -> Any:
        name = request.path_params["name"]
        named = self._lens.plan_in(name)
        known = self._lens.name + (f"+{named}" if named else "")
        found = [one for one in self._models() if named is not None and one["id"] == known]
        if not found:
            raise Fault("there is no such model: see /v1/models", "model_not_found", "model", 404)
        return self._json(found[0])

    async def completions(self, request: Any) -> Any:
        return await self._completion(request, chat=False)

    async def chat(self, request: Any) -> Any:
        return await self._completion(request, chat=True)

    async def _completion(self, request: Any, chat: bool) -> Any:
        content = _parsed(await request.body())
        asked = await asyncio.to_thread(completion, content, self._lens, self._plans, chat)
        wanted = Completion(self._lens, asked, self._serving.recorder)
        if asked.stream:
            await wanted.begin()  # a full queue is still told by its status
            stream = self._responses.StreamingResponse
            return stream(
                events(wanted, _gone(request)), media_type="text/event-stream; charset=utf-8"
            )
        async with wanted:
            answer = asyncio.ensure_future(wanted.whole())
            gone = asyncio.ensure_future(_gone(request))
            try:
                await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():
                    return self._responses.Response(status_code=499)
                return self._json(await answer)
            finally:
                for task in (answer, gone):
                    task.cancel()
                    with suppress(asyncio.CancelledError, Exception):
                        await task

    # Our own.

    def _info(self) -> dict[str, Any]:
        serving = self._serving
        record = None if serving.recorder is None else str(serving.recorder.store)
        saved = serving.save_labels is not None
        return questions.info(self._lens, self._plans, self._site, record, saved)

    async def info(self, request: Any) -> Any:
        return self._json(self._info())

    async def read(self, request: Any) -> Any:
        return await self._asked(partial(questions.read, plans=self._plans), request)

    async def compare(self, request: Any) -> Any:
        return await self._asked(questions.compare, request)

    async def promoted(self, request: Any) -> Any:
        return await self._asked(questions.promoted, request)

    async def coherence(self, request: Any) -> Any:
        return await self._asked(questions.coherence, request)

    async def _asked(self, question: Callable[[Any, Lens], Any], request: Any) -> Any:
        content = _parsed(await request.body())
        return self._json(await asyncio.to_thread(question, content, self._lens))

    async def feature(self, request: Any) -> Any:
        address = request.path_params["address"]
        typical = request.query_params.get("typical", "") in ("1", "true")
        found = await asyncio.to_thread(questions.feature, address, self._lens, self._site, typical)
        return self._json(found)

    async def search(self, request: Any) -> Any:
        query = request.query_params
        found = await asyncio.to_thread(
            questions.search,
            query.get("q", ""),
            query.get("layers"),
            query.get("limit"),
            self._lens,
        )
        return self._json(found)

    def _plan(self, name: str) -> dict[str, Any]:
        plan = self._plans.named(name)
        return {"name": name, "edits": plan.to_dict()["edits"], "text": str(plan)}

    async def list_plans(self, request: Any) -> Any:
        rows = [self._plan(name) for name in self._plans]
        return self._json({"default": self._plans.default, "plans": rows})

    async def get_plan(self, request: Any) -> Any:
        text = self._plans.file(request.path_params["name"])
        return self._responses.Response(text, media_type="application/json")

    async def put_plan(self, request: Any) -> Any:
        name, content = request.path_params["name"], _parsed(await request.body())

        def work() -> dict[str, Any]:
            plan, _ = self._plans.of(content, self._lens)
            self._plans.put(name, plan)
            return self._plan(name)

        return self._json(await asyncio.to_thread(work))

    async def delete_plan(self, request: Any) -> Any:
        self._plans.delete(request.path_params["name"])
        return self._responses.Response(status_code=204)

    async def check_plan(self, request: Any) -> Any:
        content = _parsed(await request.body())
        given = content.get("plan") if isinstance(content, dict) else None

        def work() -> dict[str, Any]:
            plan: Plan = self._plans.of(given, self._lens)[0]
            edits = [
                {
                    **edit.to_dict(),
                    "text": str(edit),
                    "value": None if edit.unit == "norm" or edit.strength is None else edit.value,
                }
                for edit in plan.edits
            ]
            return {"edits": edits, "text": str(plan)}

        return self._json(await asyncio.to_thread(work))

    async def list_labels(self, request: Any) -> Any:
        rows = [label.to_row() for label in self._lens.labels.values()]
        if request.query_params.get("format") != "jsonl":
            return self._json({"labels": rows})
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        headers = {"Content-Disposition": 'attachment; filename="labels.jsonl"'}
        return self._responses.Response(text, 200, headers, "application/x-ndjson")

    async def put_label(self, request: Any) -> Any:
        ref = self._lens.ref(request.path_params["address"])
        content = _parsed(await request.body())
        words = content.get("text") if isinstance(content, dict) else None
        if not isinstance(words, str) or len(words) > 2000:
            raise Fault("expected a text of at most 2,000 characters", "bad_value", "text")

        def work() -> Any:
            label = self._lens.label(ref, words)
            if self._serving.save_labels is not None:
                LabelPack(self._lens.labels.values()).write(self._serving.save_labels)
            return label

        label = await asyncio.to_thread(work)
        if label is None:
            return self._responses.Response(status_code=204)
        return self._json(label.to_row())

    async def health(self, request: Any) -> Any:
        if self._stopping:
            return self._json({"status": "stopping"}, 503)
        return self._json({"status": "ok"})

    async def metrics(self, request: Any) -> Any:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return self._responses.Response(self._metrics.text(), media_type=kind)

    async def openapi(self, request: Any) -> Any:
        return self._json(description())

    async def file(self, request: Any) -> Any:
        name = request.url.path
        found = self._files.get(name)
        if found is None:
            path = None if self._site is None else self._site.files.get(name)
            if path is None:
                raise Fault("there is no such page", "not_found", None, 404)
            content = await asyncio.to_thread(content_of, path)
            return self._responses.Response(content, media_type=TYPES[path.suffix])
        body, tag = found.body, found.tag
        if name in ("/", "/index.html") and self._serving.token is None:
            body = body.replace(BEGIN, self._beginning())
            tag = tag_of(body)
        headers = {"ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return self._responses.Response(status_code=304, headers=headers)
        return self._responses.Response(body, headers=headers, media_type=found.kind)

    def _beginning(self) -> bytes:
        """What the page would ask first, as data inside it. With a token it has to ask."""
        begin: dict[str, Any] = {"info": self._info()}
        if self._first is not None and self._first[0] is self._lens.labels:
            begin["read"] = self._first[1]
        text = json.dumps(begin, ensure_ascii=False).replace("<", "\\u003c")
        block = f'<script type="application/json" id="begin">{text}</script>'
        return block.encode("utf-8", "replace")


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Fault("the body is not JSON", "not_json") from error


async def _gone(request: Any) -> None:
    """Until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
