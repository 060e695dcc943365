"""Who may ask the server for what."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from serving import GROUP, Served
from starlette.testclient import TestClient

from qwen_scope_lens.serve import guard
from qwen_scope_lens.serve.faults import Fault
from qwen_scope_lens.serve.guard import COOKIE, MOST_BYTES
from qwen_scope_lens.serve.plans import Plans
from qwen_scope_lens.serve.site import listed_files, static_files
from qwen_scope_lens.serve.web import Serving, make_app

HOSTILE = "<script>alert(1)</script>\u202e\x00"


@pytest.fixture(scope="module")
def closed(served: Served) -> TestClient:
    """The same server, with a token and for any host."""
    app = make_app(Serving(served.lens, token="secret", hosts=None))
    return TestClient(app, base_url="http://example.org", raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "attacker.example"}, "bad_host"),
        ({"Host": "localhost.attacker.example:80"}, "bad_host"),
        ({"Origin": "http://attacker.example"}, "bad_origin"),
        ({"Origin": "null"}, "bad_origin"),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, "bad_origin"),
    ],
)
def test_pages_of_other_sites_may_not_ask(
    headers: dict[str, str], code: str, served: Served
) -> None:
    for path in ("/health", "/v1/models", "/"):
        answer = served.http.get(path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, code)
    own = {"Origin": served.url, "Sec-Fetch-Site": "same-origin"}
    assert served.http.get("/health", headers=own).status_code == 200


def test_a_token_is_needed_for_all_but_the_page(closed: TestClient) -> None:
    good = {"Authorization": "Bearer secret"}
    for path in ("/v1/models", "/api/info", "/metrics", "/site/index.html"):
        for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
            answer = closed.get(path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "bad_token")
        assert closed.get(path, headers=good).status_code in (200, 404)
    assert closed.get("/health").status_code == closed.get("/viewer/dom.js").status_code == 200
    assert closed.post("/api/session").status_code == 401
    made = closed.post("/api/session", headers=good)
    assert made.status_code == 204
    assert "HttpOnly; SameSite=Strict; Path=/site/" in str(made.headers)
    assert closed.cookies.get(COOKIE)
    assert closed.get("/site/index.html").status_code == 404  # allowed, and not there
    assert closed.get("/api/info").status_code == 401  # the cookie opens nothing else
    forged = {"Cookie": f"{COOKIE}=x"}
    closed.cookies.clear()
    assert closed.get("/site/index.html", headers=forged).status_code == 401


def test_bodies_are_small_json_and_do_not_dawdle(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    http, path = served.http, "/v1/completions"
    big = json.dumps({"prompt": "x" * MOST_BYTES})
    kind = {"Content-Type": "application/json"}
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"content": "prompt=x"}, 415, "not_json"),
        ({"content": big, "headers": kind}, 413, "too_large"),
        ({"content": iter([big.encode()]), "headers": kind}, 413, "too_large"),
        ({"content": "{", "headers": kind}, 400, "not_json"),
        ({"content": "[" * 100_000, "headers": kind}, 400, "not_json"),
        ({"json": [1]}, 400, "bad_value"),
    ]
    for given, status, code in cases:
        answer = http.post(path, **given)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    monkeypatch.setattr(guard, "MOST_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as slow:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        )
        slow.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
        slow.settimeout(20)
        assert b"408" in slow.recv(200)


def test_only_listed_files_are_given(served: Served, tmp_path: Path) -> None:
    assert "/viewer/viewer.css" in static_files()
    for path in (
        "/../pyproject.toml",
        "/viewer/../serve/web.py",
        "/%2e%2e/x",
        "/site/x",
        "/etc/passwd",
    ):
        assert served.http.get(path).status_code == 404
    answer = served.http.get("/viewer/viewer.css")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    folder = tmp_path / "site"
    (folder / "data").mkdir(parents=True)
    (folder / "index.html").write_text("")
    (folder / "link.json").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path)
    assert set(listed_files(folder)) == {"/site/index.html"}


def test_a_failure_tells_no_traceback(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError("a secret path /etc/x")

    monkeypatch.setattr(served.lens, "encode", fails)
    ask = {"prompt": "The", "max_tokens": 3, "explain": True}
    status, error = served.error("/v1/completions", **ask)
    assert (status, error["type"], error["code"]) == (500, "server_error", "internal")
    assert "secret" not in error["message"]
    assert "a secret path" in caplog.text
    stream = served.http.post("/v1/completions", json={**ask, "stream": True}).text
    assert '"code": "internal"' in stream
    assert stream.endswith("data: [DONE]\n\n")
    assert "secret" not in stream


def test_hostile_texts_come_back_as_text(served: Served) -> None:
    answer = served.http.post("/api/read", json={"text": HOSTILE})
    assert answer.headers["content-type"] == "application/json"
    assert "".join(piece["text"] for piece in answer.json()["pieces"]) == HOSTILE
    status, error = served.error("/v1/completions", prompt="x", plan=HOSTILE)
    assert (status, error["code"]) == (404, "plan_not_found")
    half = served.http.post(
        "/api/read", content=b'{"text": "\\ud800"}', headers={"Content-Type": "application/json"}
    )
    assert (half.status_code, half.json()["error"]["code"]) == (400, "bad_text")
    plans = Plans()
    plan = plans.of(f"{GROUP}/6/1:ablate", served.lens)[0]
    for name in ("../x", "x" * 65, "", ".hidden", "a/b", "none"):
        with pytest.raises(Fault, match="cannot name a plan"):
            plans.put(name, plan)


def test_a_stream_whose_reader_goes_away_frees_its_row(served: Served) -> None:
    engine = served.lens.engine
    before = engine.counts["cancelled"]
    ask = {"prompt": "The", "max_tokens": 900, "temperature": 0, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=ask) as stream:
        next(stream.iter_lines())

    async def until_free() -> None:
        while engine.counts["cancelled"] == before:
            await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(until_free(), 20))
    assert engine.gauges["rows"] == 0
