"""The OpenAPI description of the server, from one table of paths."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from qwen_scope_lens.serve.engines.abilities import ENGINES
from qwen_scope_lens.version import __version__

__all__ = ["description"]

Json = dict[str, Any]

TEXT: Json = {"type": "string"}
NUMBER: Json = {"type": "number"}
WHOLE: Json = {"type": "integer"}
FLAG: Json = {"type": "boolean"}
OBJECT: Json = {"type": "object"}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _either(*kinds: Json) -> Json:
    return {"oneOf": list(kinds)}


IDS = _list(WHOLE)
ADDRESS: Json = {
    **TEXT,
    "description": "model/group/layer/feature",
    "example": "mini-qwen3/w1k-l0-16/6/498",
}
PLAN = _either(
    {"type": "object", "required": ["edits"], "properties": {"edits": _list(OBJECT)}},
    TEXT,
    _list(TEXT),
    {"type": "null"},
)
SAMPLING: Json = {
    "model": TEXT,
    "temperature": {**NUMBER, "minimum": 0, "default": 1},
    "top_p": {**NUMBER, "exclusiveMinimum": 0, "maximum": 1, "default": 1},
    "seed": {**WHOLE, "minimum": 0},
    "n": {**WHOLE, "minimum": 1, "maximum": 16, "default": 1},
    "stop": _either(TEXT, {**_list(TEXT), "maxItems": 4}),
    "max_tokens": {**WHOLE, "minimum": 0},
    "stream": FLAG,
    "stream_options": {"type": "object", "properties": {"include_usage": FLAG}},
    "plan": PLAN,
    "monitor": {**_list(ADDRESS), "maxItems": 64},
    "explain": _either(
        FLAG, {"type": "object", "properties": {"top": WHOLE, "layers": _list(WHOLE)}}
    ),
}
TEXTS: Json = {
    "layers": _list(WHOLE),
    "top": WHOLE,
    "top_tokens": WHOLE,
    "monitor": _list(ADDRESS),
    "all_tokens": FLAG,
}

BODIES: dict[str, Json] = {
    "POST /v1/completions": {
        **SAMPLING,
        "prompt": _either(TEXT, IDS, _list(TEXT), _list(IDS)),
        "logprobs": {**WHOLE, "minimum": 0, "maximum": 20},
        "echo": FLAG,
    },
    "POST /v1/chat/completions": {
        **SAMPLING,
        "messages": _list(OBJECT),
        "tools": _list(OBJECT),
        "tool_choice": {"enum": ["auto", "none"]},
        "max_completion_tokens": WHOLE,
        "enable_thinking": FLAG,
        "chat_template_kwargs": {"type": "object", "properties": {"enable_thinking": FLAG}},
        "logprobs": FLAG,
        "top_logprobs": {**WHOLE, "minimum": 0, "maximum": 20},
    },
    "POST /api/read": {
        **TEXTS,
        "text": TEXT,
        "messages": _list(OBJECT),
        "token_ids": IDS,
        "enable_thinking": FLAG,
        "plan": PLAN,
        "prompt_tokens": WHOLE,
    },
    "POST /api/compare": {**TEXTS, "a": TEXT, "b": TEXT, "leave_out": _list(TEXT)},
    "POST /api/promoted": {"features": {**_list(ADDRESS), "maxItems": 64}, "top": WHOLE},
    "POST /api/coherence": {
        "prompt": TEXT,
        "messages": _list(OBJECT),
        "enable_thinking": FLAG,
        "plain": IDS,
        "steered": IDS,
    },
    "PUT /api/plans/{name}": {"edits": _list(OBJECT)},
    "POST /api/plans/check": {"plan": PLAN},
    "PUT /api/labels/{address}": {"text": TEXT},
}
NEEDED = {
    "POST /v1/completions": ["prompt"],
    "POST /v1/chat/completions": ["messages"],
    "POST /api/compare": ["a", "b"],
    "POST /api/promoted": ["features"],
    "POST /api/coherence": ["plain", "steered"],
    "PUT /api/plans/{name}": ["edits"],
    "POST /api/plans/check": ["plan"],
    "PUT /api/labels/{address}": ["text"],
}
SUMMARIES = {
    "GET /v1/models": "The model, and the model under each named plan",
    "GET /v1/models/{name}": "One of them",
    "POST /v1/completions": "Continue a text, under a plan",
    "POST /v1/chat/completions": "Answer in a chat, under a plan",
    "GET /api/info": "What is served",
    "POST /api/read": "Which features fire on a text, also under a plan",
    "POST /api/compare": "Which features tell two texts apart",
    "POST /api/promoted": "The labels and promoted tokens of some features",
    "GET /api/feature/{address}": "What is known of a feature",
    "GET /api/search": "Features by address, label or token",
    "GET /api/plans": "The named plans",
    "GET /api/plans/{name}": "A plan as a file",
    "PUT /api/plans/{name}": "Keep a plan under a name",
    "DELETE /api/plans/{name}": "Forget a plan",
    "POST /api/plans/check": "What a plan means, before it runs",
    "GET /api/labels": "All labels",
    "PUT /api/labels/{address}": "Give a feature a label; an empty text takes it away",
    "POST /api/coherence": "Whether a steered text is still language",
    "POST /api/session": "Open /site/ to this browser (only with a token)",
    "GET /health": "Whether the server answers",
    "GET /metrics": "Counters for Prometheus",
    "GET /openapi.json": "This description",
}
QUERIES = {
    "GET /api/search": {"q": TEXT, "layers": TEXT, "limit": WHOLE},
    "GET /api/feature/{address}": {"typical": WHOLE},
    "GET /api/labels": {"format": {"enum": ["jsonl"]}},
}
OPEN = ("GET /health", "GET /openapi.json")


def description() -> Json:
    """The whole of it, OpenAPI 3.1."""
    paths: Json = {}
    for name, summary in SUMMARIES.items():
        method, path = name.split(" ")
        paths.setdefault(path, {})[method.lower()] = _operation(name, path, summary)
    error = {"type": "object", "properties": {"error": {"type": "object", "properties": {}}}}
    for part in ("message", "type", "param", "code"):
        error["properties"]["error"]["properties"][part] = {"type": ["string", "null"]}  # type: ignore[index]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "qsl serve",
            "version": __version__,
            "description": "An OpenAI-compatible server that reads and steers features of SAEs.",
        },
        "paths": paths,
        "x-engines": [asdict(row) for row in ENGINES.values()],
        "components": {
            "schemas": {"Error": error},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(name: str, path: str, summary: str) -> Json:
    inside = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    parameters: list[Json] = [
        {"name": one, "in": "path", "required": True, "schema": TEXT} for one in inside
    ]
    parameters += [
        {"name": one, "in": "query", "schema": schema}
        for one, schema in QUERIES.get(name, {}).items()
    ]
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    found: Json = {
        "summary": summary,
        "responses": {
            "200": {"description": "the answer; see docs/serve.md"},
            "default": {"description": "refused or failed", "content": refused},
        },
        "security": [] if name in OPEN else [{"token": []}],
    }
    if parameters:
        found["parameters"] = parameters
    if name in BODIES:
        schema: Json = {"type": "object", "properties": BODIES[name]}
        if name in NEEDED:
            schema["required"] = NEEDED[name]
        if not name.startswith("PUT"):
            schema["additionalProperties"] = False
        found["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return found
