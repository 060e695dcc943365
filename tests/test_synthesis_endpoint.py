"""The real client against a real server that misbehaves; the ledger that never pays twice."""

from __future__ import annotations

import base64
import errno
import gzip
import json
import logging
import signal
import socket
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from endpoint_server import Call, Server, answer
from forks import Fork

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadFile, BadPlan, CannotWrite, GeneratorFailed
from qwen_scope_lens.writers import Endpoint, Ledger, Prices, Request, transport
from qwen_scope_lens.writers.answers import retry_after
from qwen_scope_lens.writers.generator import Sampling, digest
from qwen_scope_lens.writers.masking import EXCERPT, MASKED, Mask

KEY = "sk-secret-0123456789"


def requests(count: int, **more: Any) -> list[Request]:
    return [Request((("user", f"question {i}"),), "prompt", **more) for i in range(count)]


def endpoint(server: Server, **more: Any) -> Endpoint:
    settings: dict[str, Any] = {"backoff": 0.01, "max_backoff": 0.02, "timeout": 2.0}
    return Endpoint(server.url, "writer", **settings | more)


def echo(call: Call) -> Any:
    return answer(f"to {call.prompt}", raw=call.path.endswith("/v1/completions"))


def test_answers_come_in_order_and_concurrently(tmp_path: Path) -> None:
    busy: list[int] = []

    def behave(call: Call) -> Any:
        busy.append(1)
        time.sleep(0.05 + 0.05 * (call.number % 2))
        busy.pop()
        peaks.append(len(busy) + 1)
        return echo(call)

    peaks: list[int] = []
    with Server(behave) as server, Ledger.open(tmp_path) as ledger:
        found = ledger.ask(endpoint(server, concurrency=4), requests(12, seed=7))
        assert [one.text for one in found if one] == [f"to question {i}" for i in range(12)]
        assert 2 <= max(peaks) <= 4
        assert server.calls[0].path == "/v1/chat/completions"
        assert server.calls[0].body["seed"] == 7
        assert server.calls[0].body["model"] == "writer"
        raw = ledger.ask(endpoint(server), requests(1, raw=True, sampling=Sampling(0.1, 0.9, 3)))
        assert raw[0] is not None
        assert raw[0].text == "to question 0"
        assert server.calls[-1].path == "/v1/completions"
        assert server.calls[-1].body["max_tokens"] == 3
        assert ledger.spent.calls == 13
        assert ledger.spent.prompt_tokens == 130


def cut(call: Call) -> None:
    """Announce a body, send half of it, hang up."""
    call.handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{"choices": [')
    call.handler.wfile.flush()
    call.handler.connection.shutdown(socket.SHUT_RDWR)


def hang_up(call: Call) -> None:
    call.handler.connection.shutdown(socket.SHUT_RDWR)


def drip(call: Call) -> None:
    """Byte by byte, each in time, the whole never."""
    call.handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n")
    for _ in range(100):
        call.handler.wfile.write(b" ")
        call.handler.wfile.flush()
        time.sleep(0.02)


ONCE: dict[str, tuple[Any, bool]] = {  # what goes wrong once, and whether it may have been charged
    "full": (lambda call: (429, {"Retry-After": "0"}, b"{}"), False),
    "broken": (lambda call: (500, {}, b"<html>oops"), False),
    "overloaded": (lambda call: (529, {}, b""), False),
    "cut in the middle": (cut, True),
    "no answer": (hang_up, True),
    "slow": (lambda call: time.sleep(0.6), True),
    "byte by byte": (drip, True),
    "no JSON": (lambda call: (200, {}, b"<html>welcome to the proxy"), True),
    "half of a JSON": (lambda call: (200, {}, b'{"choices": [{"mess'), True),
    "another JSON": (lambda call: (200, {}, b'["choices"]'), True),
    "no message": (lambda call: (200, {}, b'{"choices": [{"message": null}]}'), True),
    "no choices": (lambda call: {"choices": []}, True),
    "null choices": (lambda call: {"choices": None}, True),
    "an error that says 200": (lambda call: {"error": {"message": "try later"}}, False),
    "wrong encoding": (lambda call: (200, {"Content-Encoding": "gzip"}, b"no gzip"), True),
}


@pytest.mark.parametrize("wrong", ONCE)
def test_what_goes_wrong_once_is_tried_again(tmp_path: Path, wrong: str) -> None:
    misbehave, charged = ONCE[wrong]

    def behave(call: Call) -> Any:
        return misbehave(call) if call.number == 0 else echo(call)

    with Server(behave) as server, Ledger.open(tmp_path) as ledger:
        found = ledger.ask(endpoint(server, timeout=0.3), requests(1))
        assert found[0] is not None
        assert found[0].text == "to question 0"
        assert len(server.calls) == 2
        assert len({call.key for call in server.calls}) == 1
        assert ledger.spent.calls == 1
        assert sum(ledger.spent.troubles.values()) == 1
        assert ledger.spent.maybe_charged == charged


@pytest.mark.slow
def test_it_waits_as_long_as_the_server_says(tmp_path: Path) -> None:
    def behave(call: Call) -> Any:
        times.append(time.monotonic())
        late = formatdate(time.time() + 2, usegmt=True)  # whole seconds: 1 to 2 of them
        waits = {0: "0.3", 1: late}
        if call.number in waits:
            return 429, {"Retry-After": waits[call.number]}, b"{}"
        return echo(call)

    times: list[float] = []
    with Server(behave) as server, Ledger.open(tmp_path) as ledger:
        ledger.ask(endpoint(server, max_backoff=1), requests(1))
    assert 0.3 <= times[1] - times[0] < 0.9
    assert 0.9 <= times[2] - times[1] < 2.5


def test_one_full_answer_holds_everyone_back(tmp_path: Path) -> None:
    def behave(call: Call) -> Any:
        times.append(time.monotonic())
        return (429, {"Retry-After": "0.4"}, b"{}") if call.number == 0 else echo(call)

    times: list[float] = []
    with Server(behave) as server, Ledger.open(tmp_path) as ledger:
        ledger.ask(endpoint(server, concurrency=1, max_backoff=1), requests(3))
    assert times[1] - times[0] >= 0.4


@pytest.mark.parametrize(
    ("limits", "least"),
    [({"requests_per_minute": 600}, 0.3), ({"tokens_per_minute": 9000, "concurrency": 1}, 0.3)],
)
def test_pace(tmp_path: Path, limits: dict[str, Any], least: float) -> None:
    """Four calls at ten a second, or of 15 tokens at 150 tokens a second."""
    with Server(echo) as server, Ledger.open(tmp_path) as ledger:
        started = time.monotonic()
        ledger.ask(endpoint(server, **limits), requests(4))
        assert least <= time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, {"error": {"message": f"bad key {KEY}"}}, "key is refused"),
        (404, {}, "the address or the model does not exist"),
        (307, {}, "redirect"),
        (429, {"error": {"code": "insufficient_quota"}}, "account is empty"),
    ],
)
def test_what_cannot_get_better_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, body: Any, words: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def behave(call: Call) -> Any:
        return status, {"Location": f"http://a:{KEY}@b/?key={KEY}"}, json.dumps(body).encode()

    with (
        Server(behave) as server,
        Ledger.open(tmp_path) as ledger,
        pytest.raises(GeneratorFailed, match=words) as caught,
    ):
        ledger.ask(endpoint(server, concurrency=1), requests(5))
    assert len(server.calls) == 1
    assert KEY not in str(caught.value)


def test_one_bad_request_fails_alone(tmp_path: Path) -> None:
    def behave(call: Call) -> Any:
        return (400, {}, b"too long") if call.prompt.endswith("1") else echo(call)

    with Server(behave) as server, Ledger.open(tmp_path) as ledger:
        found = ledger.ask(endpoint(server), requests(3))
        assert [bool(one and one.error) for one in found] == [False, True, False]
        assert len(server.calls) == 3  # a 400 is not tried again
        ledger.ask(endpoint(server), requests(3))
        assert len(server.calls) == 4  # but asked again by the next run


def test_answers_that_may_be_charged_are_not_tried_forever(tmp_path: Path) -> None:
    with Server(lambda call: {"choices": []}) as server, Ledger.open(tmp_path) as ledger:
        found = ledger.ask(endpoint(server, charged_tries=2), requests(1))
        assert found[0] is not None
        assert found[0].error == "an answer without choices"
        assert len(server.calls) == 2


def test_a_server_that_only_fails_is_given_up(tmp_path: Path) -> None:
    with (
        Server(lambda call: (500, {}, b"")) as server,
        Ledger.open(tmp_path) as ledger,
        pytest.raises(GeneratorFailed, match="3 requests in a row failed, the last with HTTP 500"),
    ):
        ledger.ask(endpoint(server, tries=2, failures_in_a_row=3, concurrency=2), requests(50))
    assert len(server.calls) < 20


def test_nobody_there(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    client = Endpoint(url, "writer", backoff=0.01, failures_in_a_row=2)
    with Ledger.open(tmp_path) as ledger, pytest.raises(GeneratorFailed, match="no connection"):
        ledger.ask(client, requests(4))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:port/v1", ""])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(GeneratorFailed, match="expected something like"):
        Endpoint(url, "writer")


@pytest.mark.parametrize("url", [f"http://me:{KEY}@host/v1", f"https://host/v1?key={KEY}"])
def test_no_key_in_an_address(url: str) -> None:
    with pytest.raises(GeneratorFailed, match="OPENAI_API_KEY") as caught:
        Endpoint(url, "writer")
    assert KEY not in str(caught.value)


def test_the_key_is_sent_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the server repeats it in answers and errors."""
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")

    def behave(call: Call) -> Any:
        if call.number == 0:
            return 500, {}, call.headers["authorization"].encode()
        if call.prompt.endswith("1"):
            return 400, {}, call.headers["authorization"].encode()
        return answer(f"your key is {call.headers['authorization']}")

    with Server(behave) as server, Ledger.open(tmp_path) as ledger:
        client = endpoint(server, key_variable="MY_KEY", concurrency=1)
        found = ledger.ask(client, requests(3))
        assert server.calls[0].headers["authorization"] == f"Bearer {KEY}"
        assert found[0] is not None
        assert found[0].text == "your key is Bearer [key]"
        seen = repr((found, client, vars(client), ledger.spent))
    written = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert "question" in seen or "your key" in written
    assert KEY not in seen + written


def writings(key: str) -> dict[str, str]:
    """A key as servers, proxies and pages write it."""
    return {
        "plain": key,
        "upper": key.upper(),
        "lower": key.lower(),
        "header": key.title(),
        "json": "".join(f"\\u{ord(c):04x}" for c in key),
        "json in json": "".join(f"\\\\u{ord(c):04X}" for c in key),
        "one letter escaped": key[:5] + f"\\u{ord(key[5]):04x}" + key[6:],
        "address": "".join(f"%{ord(c):02x}" for c in key),
        "address twice": "".join(f"%25{ord(c):02X}" for c in key),
        "slash": quote(key, safe=""),
        "slash in json": key.replace("/", "\\/"),
        "html": "".join(f"&#{ord(c)};" for c in key),
        "html hex": "".join(f"&#x{ord(c):X};" for c in key),
        "hex": key.encode().hex(),
        **{
            f"base64 behind {before!r}": base64.b64encode(f"{before}{key}:x".encode()).decode()
            for before in ("", "a", "me:", "Bearer ")
        },
        "base64 for addresses": base64.urlsafe_b64encode(f"?>{key}".encode()).decode(),
        "base64 in an address": quote(base64.b64encode(f"ab{key}".encode()).decode(), safe=""),
    }


HARD_KEY = "sk-Se/cr+et.0~1?2345==6789>>>???"


@pytest.mark.parametrize("key", [KEY, HARD_KEY])
def test_a_key_is_masked_in_every_writing(key: str) -> None:
    mask = Mask(key)
    for name, written in writings(key).items():
        masked = mask(f"before {written} after")
        assert written not in masked, name
        # Only the edges of base64, which other letters share, may be left of it.
        left = masked.replace("before ", "").replace(" after", "").replace(MASKED, "")
        assert len(left) <= (12 if "base64" in name else 0), (name, masked)
        assert MASKED in masked, name
    text = "An ordinary text, with sk- and 0123456789 and %73%6b and \\u0073."
    assert mask(text) == text
    assert Mask("EMPTY")("the list is EMPTY, or empty") == f"the list is {MASKED}, or empty"
    assert Mask("")(text) == text
    cut = Mask(key).excerpt("x" * (EXCERPT - 10) + key)  # masked before it is cut
    assert cut.endswith(MASKED)
    started = time.monotonic()
    for hostile in (
        "\\" * 200_000,
        "%25" * 100_000,
        "&amp;" * 50_000,
        "A" * 200_000,
        key[0] * 99_999,
    ):
        mask(hostile)
    assert time.monotonic() - started < 20  # not a matter of minutes


ECHOES: dict[str, Callable[[str, Call], Any]] = {
    "finish": lambda said, call: {
        "choices": [{"message": {"content": "x"}, "finish_reason": said}]
    },
    "content": lambda said, call: answer(said),
    "error in the answer": lambda said, call: {"error": {"message": said}},
    "body of an error": lambda said, call: (400, {}, json.dumps({"error": said}).encode()),
    "refusal": lambda said, call: (401, {}, ("x" * 190 + said).encode()),
    "redirect": lambda said, call: (302, {"Location": f"/v1/{said}/more"}, said.encode()),
    "wait": lambda said, call: (503, {"Retry-After": said}, said.encode()),
}


@pytest.mark.parametrize("where", ECHOES)
def test_nothing_that_a_server_repeats_holds_the_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    """Not the ledger, not what is returned, raised or logged."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    some = {name: w for name, w in writings(KEY).items() if "\\" not in w or where != "redirect"}
    said = list(some.values())
    with Server(lambda call: ECHOES[where](said[call.number % len(said)], call)) as server:
        for i in range(len(said)):
            with Ledger.open(tmp_path) as ledger:
                client = endpoint(server, tries=1, concurrency=1)
                try:
                    seen = repr(ledger.ask(client, requests(i + 1)[i:]))
                except GeneratorFailed as error:
                    seen = "".join(traceback.format_exception(error))
                seen += repr((vars(client), ledger.spent))
            assert not [name for name, w in some.items() if w in seen], seen
    kept = (tmp_path / "ledger.jsonl").read_text() + caplog.text
    assert not [name for name, w in some.items() if w in kept]
    assert MASKED in kept + seen


def test_answers_of_another_server_are_used_again_and_named(tmp_path: Path) -> None:
    with Server(echo) as one, Server(echo) as two:
        with Ledger.open(tmp_path) as ledger:
            ledger.ask(endpoint(one), requests(2))
        places = [urlsplit(server.url).netloc for server in (one, two)]
        with Ledger.open(tmp_path) as ledger:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # the same server
                ledger.ask(endpoint(one), requests(2))
            said = f"2 answers of openai:writer .* came from {places[0]}, .* names {places[1]}"
            with pytest.warns(UserWarning, match=said):
                ledger.ask(endpoint(two), requests(3))
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # said once
                ledger.ask(endpoint(two), requests(3))
            assert len(one.calls) == 2
            assert len(two.calls) == 1
        # A ledger from before servers were written is read as it is.
        path = tmp_path / "ledger.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        older = [{k: v for k, v in row.items() if k != "server"} for row in rows]
        assert older != rows
        path.write_text("".join(json.dumps(row) + "\n" for row in older))
        with Ledger.open(tmp_path) as ledger, warnings.catch_warnings():
            warnings.simplefilter("error")
            assert all(ledger.ask(endpoint(two), requests(3)))
        assert len(two.calls) == 1


def test_a_redirect_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server(echo) as other, Ledger.open(tmp_path) as ledger:
        for status in (301, 302, 303, 307, 308):
            moved = (status, {"Location": f"{other.url}/chat/completions"}, b"")
            with (
                Server(lambda call, moved=moved: moved) as server,  # type: ignore[misc]
                pytest.raises(GeneratorFailed, match="give the final address"),
            ):
                ledger.ask(endpoint(server), requests(1))
        assert not other.calls


def test_an_answer_is_measured_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small answer that becomes a large one is given up where it passes the limit."""
    import tracemalloc

    monkeypatch.setattr(transport, "MOST_BYTES", 2**20)
    bomb = gzip.compress(b" " * 48 * 2**20, 9)
    assert len(bomb) < 2**16  # it comes in one piece
    packed = {
        "gzip": bomb,
        "x-gzip": gzip.compress(b"") * 9 + bomb,
        "gzip, gzip": gzip.compress(bomb),
        "br": bomb,
    }
    coding = ""
    with (
        Server(lambda call: (200, {"Content-Encoding": coding}, packed[coding])) as server,
        Ledger.open(tmp_path) as ledger,
    ):
        tracemalloc.start()
        for coding in packed:
            [found] = ledger.ask(endpoint(server, timeout=20.0), requests(1, seed=hash(coding)))
            assert found is not None
            assert found.error == (
                "an answer of more than 1,048,576 bytes"
                if coding.endswith("gzip") and "," not in coding
                else "an answer in a compression that was not asked for"
            )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(server.calls) == 4  # not tried again
    assert peak < 12 * 2**20
    body = json.dumps(answer("packed")).encode()
    half = len(body) // 2
    parts = gzip.compress(body[:half]) + gzip.compress(body[half:])  # two members, one content
    whole = {0: parts, 1: parts[:-9], 2: gzip.compress(body)}
    with (
        Server(lambda call: (200, {"Content-Encoding": "gzip"}, whole[call.number])) as server,
        Ledger.open(tmp_path / "2") as ledger,
    ):
        answers = ledger.ask(endpoint(server, concurrency=1, timeout=20.0), requests(2))
        assert [one.text for one in answers if one] == ["packed"] * 2
        assert ledger.spent.troubles == {"an answer that cannot be unpacked": 1}


def drip_head(call: Call) -> None:
    """A header that never ends, byte by byte, each in time."""
    call.handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    for _ in range(200):
        call.handler.wfile.write(b"a")
        call.handler.wfile.flush()
        time.sleep(0.05)


def continue_for_ever(call: Call) -> None:
    for _ in range(200):
        call.handler.wfile.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        call.handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize("slow", [drip_head, continue_for_ever, drip])
def test_the_deadline_covers_headers(tmp_path: Path, slow: Callable[[Call], None]) -> None:
    with Server(slow) as server, Ledger.open(tmp_path) as ledger:
        started = time.monotonic()
        [found] = ledger.ask(endpoint(server, timeout=0.4, tries=1), requests(1))
        assert time.monotonic() - started < 4  # of ten seconds that it would go on
        assert found is not None
        assert found.error == "no answer in time"
        assert ledger.spent.maybe_charged == 1


@pytest.mark.parametrize(
    "said",
    [
        "nan",
        "-1",
        "1e999",
        "9" * 5000,
        "inf",
        "-inf",
        "Mon, 01 Jan 99999 00:00:00 GMT",
        "Mon, 01 Jan 0001 00:00:00 -0000",
        "Mon, 99 Foo 2020",
        "soon",
        "\u0661",
    ],
)
def test_an_absurd_wait_is_no_wait(said: str) -> None:
    seconds = retry_after({"retry-after": said})
    assert seconds is None or seconds >= 0
    client = Endpoint("http://localhost:1/v1", "m", max_backoff=0.001, backoff=0.001)
    started = time.monotonic()
    client.pause(seconds, 10**6, everyone=True)
    client.keep_pace()
    assert time.monotonic() - started < 5


DEEP = "[" * 900 + "]" * 900
PARTS = f'[{{"text": {DEEP}}}, {{"text": "y"}}]'
ABSURD = {
    "digits": '{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": '
    + "9" * 5000
    + ', "completion_tokens": 1}}',
    "deep": "[" * 100_000,
    "deep finish": f'{{"choices": [{{"message": {{"content": "x"}}, "finish_reason": {DEEP}}}]}}',
    "deep part": f'{{"choices": [{{"message": {{"content": {PARTS}}}}}]}}',
    "deep error": f'{{"error": {{"message": {DEEP}}}}}',
    "half a finish": '{"choices": [{"message": {"content": "x"}, "finish_reason": "\\udead"}]}',
}


@pytest.mark.parametrize("body", ABSURD.values(), ids=ABSURD)
def test_absurd_answers_are_named_or_read(tmp_path: Path, body: str) -> None:
    with Server(lambda call: (200, {}, body.encode())) as server, Ledger.open(tmp_path) as ledger:
        [found] = ledger.ask(endpoint(server, tries=1), requests(1))
        assert found is not None
        assert found.text in ("x", "y") or "answer" in found.error


@pytest.mark.parametrize("count", [10**30, 10**400, -5, True, 1.5, "7", None, [1]])
def test_absurd_counts_are_not_believed(tmp_path: Path, count: Any) -> None:
    usage = {"prompt_tokens": count, "completion_tokens": 5}
    limits = Prices(prompt=1.0, max_cost=5.0, max_tokens=1000)
    with (
        Server(lambda call: answer("to it", usage=usage)) as server,
        Ledger.open(tmp_path, limits) as ledger,
    ):
        ledger.ask(endpoint(server, tokens_per_minute=1e6), requests(1))
        assert ledger.spent.estimated == 1
        assert 0 < ledger.spent.tokens < 20
        assert not ledger.limit_reached


@pytest.mark.parametrize(
    "setting",
    [
        {"timeout": float("nan")},
        {"timeout": 0},
        {"tries": 0},
        {"backoff": float("inf")},
        {"requests_per_minute": float("nan")},
        {"tokens_per_minute": -1},
        {"concurrency": 0},
        {"body": {"temperature": float("nan")}},
    ],
)
def test_settings_that_mean_nothing_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(BadPlan, match=next(iter(setting)) if "body" not in setting else "JSON"):
        Endpoint("http://localhost:1/v1", "m", **setting)
    with pytest.raises(BadPlan, match="finite"):
        Prices(max_cost=float("nan"))


def test_prompts_and_seeds_of_every_kind(tmp_path: Path) -> None:
    odd = [Request((("user", "half \ud83d"),), "prompt", seed=2**70)]
    with Server(lambda call: answer("got " + call.prompt)) as server, Ledger.open(tmp_path) as one:
        [found] = one.ask(endpoint(server), odd)
        assert found is not None
        assert found.text == "got half ?"
        assert server.calls[0].body["seed"] == 2**70


def test_a_key_with_spaces_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk one\nsk two")
    with (
        Server(echo) as server,
        Ledger.open(tmp_path) as ledger,
        pytest.raises(GeneratorFailed, match="set it again"),
    ):
        ledger.ask(endpoint(server), requests(1))
    assert not server.calls


def test_contents_of_every_kind(tmp_path: Path) -> None:
    contents: list[Any] = [None, "", "half \ud83d", [{"type": "text", "text": "in parts"}], "中文"]

    def behave(call: Call) -> Any:
        body = json.dumps(answer(contents[int(call.prompt[-1])], usage=None))
        return 200, {}, body.encode()

    with Server(behave) as server, Ledger.open(tmp_path) as ledger:
        found = ledger.ask(endpoint(server), requests(5))
        texts = [one.text for one in found if one]
        assert texts == ["", "", "half �", "in parts", "中文"]
        assert ledger.spent.estimated == 5
    with Ledger.open(tmp_path) as ledger:
        assert [one.text for one in ledger.ask(endpoint(server), requests(5)) if one] == texts


def test_nothing_is_paid_twice(tmp_path: Path) -> None:
    prices = Prices(prompt=1.0, completion=2.0)
    with Server(echo) as server:
        with Ledger.open(tmp_path, prices) as ledger:
            ledger.ask(endpoint(server), requests(3))
        with Ledger.open(tmp_path, prices) as ledger:
            found = ledger.ask(endpoint(server), [*requests(5), *requests(5)])
            assert [one.text[-1] for one in found if one] == list("0123401234")
            assert ledger.spent.cost == pytest.approx(5 * (10 * 1 + 5 * 2) / 1e6)
            assert ledger.spent.reused == 8
            assert "8 answers were in the ledger" in str(ledger.spent)
    assert max(Counter(call.key for call in server.calls).values()) == 1


def test_the_limits_hold(tmp_path: Path) -> None:
    with Server(echo) as server:
        for limit in (Prices(prompt=1e5, max_cost=2.5), Prices(max_tokens=40)):
            with Ledger.open(tmp_path / str(limit.max_tokens), limit) as ledger:
                found = ledger.ask(endpoint(server, concurrency=1), requests(10))
                assert [one is None for one in found] == [False] * 3 + [True] * 7
                assert "limit of" in ledger.limit_reached


def test_every_difference_is_another_question() -> None:
    [one] = requests(1)
    ref = FeatureRef.parse("mini-qwen3/w1k-l0-16/6/7")
    others = [
        Request((("system", "question 0"),), "prompt"),
        Request(one.messages, "prompt", seed=1),
        Request(one.messages, "prompt", raw=True),
        Request(one.messages, "prompt", sampling=Sampling(max_tokens=1)),
        Request(one.messages, "prompt", target=ref),
    ]
    assert len({digest("a", request) for request in [one, *others]} | {digest("b", one)}) == 7
    assert digest("a", one) == digest("a", Request(one.messages, "reply"))


def test_a_ledger_is_held_by_one(tmp_path: Path) -> None:
    with Ledger.open(tmp_path), pytest.raises(CannotWrite, match="another process"):  # noqa: SIM117
        with Ledger.open(tmp_path):
            pass


def test_a_torn_end_is_cut_and_damage_is_named(tmp_path: Path) -> None:
    with Server(echo) as server:
        with Ledger.open(tmp_path) as ledger:
            ledger.ask(endpoint(server), requests(2))
            ledger.measure({"text": {"a": 1.5}})
        path = tmp_path / "ledger.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole + b'{"event": "answer", "key": "ab')
        with Ledger.open(tmp_path) as ledger:
            assert ledger.spent.calls == 2
            assert ledger.measured("text") == {"a": 1.5}
            ledger.ask(endpoint(server), requests(3))
        assert len(server.calls) == 3
        whole = path.read_bytes()
        path.write_bytes(whole.removesuffix(b"\n"))  # only the end of the last line is missing
        with Ledger.open(tmp_path) as ledger:
            assert ledger.spent.calls == 3
        assert path.read_bytes() == whole
        lines = whole.splitlines(keepends=True)
        of_answer = next(i for i, line in enumerate(lines) if b'"answer"' in line)
        row = json.loads(lines[of_answer])
        for broken in (
            b"garbage",
            b"",
            b"[]",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"event": "answer", "key": ' + b"9" * 5000 + b"}",
            json.dumps({**row, "event": "odd"}).encode(),
            *(json.dumps({**row, name: [1]}).encode() for name in row if name != "generator"),
            *(
                json.dumps({k: v for k, v in row.items() if k != name}).encode()
                for name in ("key", "event", "purpose", "cost", "text")
            ),
            json.dumps({**row, "cost": float("nan")}).encode(),
            json.dumps({**row, "cost": 10**400}).encode(),
            json.dumps({**row, "prompt_tokens": -(10**400)}).encode(),
        ):
            bad = [*lines[:of_answer], broken + b"\n", *lines[of_answer + 1 :]]
            path.write_bytes(b"".join(bad))
            expected = f"line {of_answer + 1} is damaged"
            with pytest.raises(BadFile, match=expected), Ledger.open(tmp_path):
                pass
            assert path.read_bytes() == b"".join(bad)  # nothing that was paid for is lost


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Ledger.open(tmp_path) as ledger:
        ledger.measure({"a": 1})
        before = (tmp_path / "ledger.jsonl").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr("qwen_scope_lens.writers.ledger.os.fsync", full)
            with pytest.raises(CannotWrite, match="No space left"):
                ledger.measure({"b": "x" * 100_000})
        assert (tmp_path / "ledger.jsonl").read_bytes() == before
        assert ledger.measured("b") is None
        ledger.measure({"c": 3})
    with Ledger.open(tmp_path) as ledger:
        assert [ledger.measured(key) for key in "abc"] == [1, None, 3]


def test_killed_anywhere_it_goes_on(tmp_path: Path) -> None:
    """kill -9 twice: what was kept is not asked again; what was in flight is counted."""

    def behave(call: Call) -> Any:
        time.sleep(0.02)
        if call.number in kills:
            running[0].kill()
        return echo(call)

    def ask() -> None:
        requests = [Request((("user", f"question {i}"),), "prompt") for i in range(40)]
        with Ledger.open(tmp_path / "ledger") as ledger:
            found = ledger.ask(Endpoint(server.url, "writer", concurrency=3), requests)
            print(sum(one is not None for one in found), ledger.spent.maybe_charged)

    kills = {13, 31}
    running: list[Fork] = []
    with Server(behave) as server:
        for turn in range(3):
            running[:] = [Fork(ask, tmp_path / f"log{turn}")]
            code = running[0].wait()
            assert code == (0 if turn == 2 else -signal.SIGKILL)
        answered, maybe_charged = map(int, (tmp_path / "log2").read_text().split())
        asked = Counter(call.key for call in server.calls)
    assert answered == len(asked) == 40
    again = sum(asked.values()) - 40
    assert again <= maybe_charged <= 2 * 3  # three at a time, killed twice
