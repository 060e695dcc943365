"""Other engines behind the server: llama.cpp's program and interp-engine, and what they cannot do.

The double of llama.cpp answers what the real program was recorded to answer. Where the variable
QSL_LLAMA_SERVER names a `llama-server`, the same tests run against it, too.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import os
import queue
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llama_double import TROUBLES
from serving import GROUP, Served
from starlette.testclient import TestClient

from qwen_scope_lens.cli import engine_options, serve
from qwen_scope_lens.errors import (
    BadPlan,
    EngineFailed,
    ScopeError,
    WrongModel,
    WrongTokenizer,
)
from qwen_scope_lens.serve.engine import QueueFull, Stopping, TooLate
from qwen_scope_lens.serve.engines import llama
from qwen_scope_lens.serve.engines.abilities import ENGINES, rows
from qwen_scope_lens.serve.engines.bytes_to_tokens import Speller
from qwen_scope_lens.serve.engines.interp import InterpEngine
from qwen_scope_lens.serve.engines.programs import Address, Programs
from qwen_scope_lens.serve.lens import Lens
from qwen_scope_lens.serve.rows import Row, Wanted
from qwen_scope_lens.serve.web import Serving, make_app
from qwen_scope_lens.steering import Plan
from qwen_scope_lens.steering.generate import end_tokens

TOP = Path(__file__).parent.parent
STEERED = Plan(f"{GROUP}/6/423:add:40@first")
PROMPTS = ("The kernel reads a file", "内核读取文件。", "Emoji 😀 😀")
TOKENS = 16
REAL = os.environ.get("QSL_LLAMA_SERVER")
NO_PROGRAM = "no llama-server: QSL_LLAMA_SERVER names none"


def finish(engine: Any, wanted: Sequence[Wanted]) -> list[Row]:
    told: queue.Queue[Any] = queue.Queue()
    found: list[Row] = engine.submit(wanted, lambda row, step: told.put((row, step)))
    texts: dict[int, str] = {id(row): "" for row in found}
    left = len(found)
    while left:
        row, step = told.get(timeout=60)
        if step.error is not None:
            raise step.error
        texts[id(row)] += step.text
        left -= step.reason is not None
    if all(one.streams for one in wanted):
        assert [texts[id(row)] for row in found] == [row.text.text for row in found]
    return found


def program(folder: Path, *arguments: str) -> Path:
    """The double as a program that one can start."""
    path = folder / f"llama-server{'-'.join(arguments)[:20].replace(' ', '')}"
    double, more = TOP / "tests/llama_double.py", " ".join(f"'{word}'" for word in arguments)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {double} "$@" {more}\n')
    path.chmod(0o755)
    return path


Maker = Callable[..., llama.LlamaCpp]


@pytest.fixture(scope="module")
def llama_engine(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    lens, folder = served.lens, tmp_path_factory.mktemp("llama")
    made = []

    def make(source: Any = None, trouble: str = "", **limits: Any) -> llama.LlamaCpp:
        given = ("--trouble", trouble) if trouble else ()
        source = source or Programs(program(folder, *given), folder / "model.gguf", most=2)
        ends = frozenset(end_tokens(lens.model))
        made.append(llama.LlamaCpp(lens.tokenizer, ends, 128, source, lens.sae_of, **limits))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module", params=["recorded", "real"])
def engine(
    request: pytest.FixtureRequest, served: Served, llama_engine: Maker, tmp_path_factory: Any
) -> llama.LlamaCpp:
    if request.param == "recorded":
        return llama_engine()
    if REAL is None:
        pytest.skip(NO_PROGRAM)
    sys.path.insert(0, str(TOP / "benchmarks"))
    from _llama import write_model  # type: ignore[import-not-found]

    gguf = tmp_path_factory.mktemp("real") / "model.gguf"
    write_model(served.lens.model, gguf, served.lens.tokenizer)
    exact = ["-t", "1", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    return llama_engine(Programs(Path(REAL), gguf, exact))


@pytest.fixture(scope="module")
def lens(served: Served, engine: llama.LlamaCpp) -> Iterator[Lens]:
    ours = served.lens
    found = Lens(ours.model, ours.tokenizer, ours.group, [4, 6], labels=ours.labels, engine=engine)
    yield found
    found.reader.close()


def wanted(lens: Any, prompt: str, plan: Plan | None = None, **more: Any) -> Wanted:
    ids = tuple(lens.tokenizer(prompt)["input_ids"])
    return Wanted(ids, TOKENS, 0.0, plan=plan, **more)


def test_llama_writes_what_our_own_engine_writes(lens: Lens) -> None:
    assert lens.engine.context == 1024
    lens.engine.check(STEERED)
    replies = []
    for plan in (None, STEERED):
        asked = [wanted(lens, prompt, plan) for prompt in PROMPTS]
        ours = finish(lens.reader, asked)
        for streams in (False, True):
            theirs = finish(lens.engine, [wanted(lens, p, plan, streams=streams) for p in PROMPTS])
            for one, other in zip(ours, theirs, strict=True):
                assert (one.tokens, one.text.text) == (other.tokens, other.text.text)
                assert one.reason == other.reason
        replies.append([row.tokens for row in ours])
    assert replies[0] != replies[1]


def test_the_server_speaks_for_llama(lens: Lens, served: Served) -> None:
    http = TestClient(make_app(Serving(lens)), base_url="http://localhost")
    ask = {"prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0, "seed": 0}
    watched = {"monitor": [f"{GROUP}/6/423"], "explain": {"layers": [4], "top": 2}}
    asked = {**ask, **watched, "plan": STEERED.to_dict()}
    theirs = http.post("/v1/completions", json=asked).json()
    ours = served.post("/v1/completions", **asked)
    [one], [other] = theirs["choices"], ours["choices"]
    assert one["text"] == other["text"]
    assert one["qsl"]["token_ids"] == other["qsl"]["token_ids"]
    for found, expected in (
        (theirs["qsl"]["prompt"], ours["qsl"]["prompt"]),
        (one["qsl"]["tokens"], other["qsl"]["tokens"]),
    ):
        for a, b in zip(found, expected, strict=True):
            assert (a["id"], a["text"], a["note"]) == (b["id"], b["text"], b["note"])
            assert a["monitor"] == pytest.approx(b["monitor"], rel=1e-3)
            assert [x["feature"] for x in a["explain"]["4"]] == [
                x["feature"] for x in b["explain"]["4"]
            ]
    assert one["qsl"]["plan"][0]["fired"] == len(theirs["qsl"]["prompt"]) + TOKENS
    events = http.post("/v1/completions", json={**asked, "stream": True}).text.split("\n\n")
    chunks = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    assert "".join(c["choices"][0]["text"] for c in chunks) == one["text"]
    assert chunks[0]["qsl"]["prompt"] is None
    assert chunks[-1]["qsl"]["prompt"] == theirs["qsl"]["prompt"]
    assert chunks[-1]["choices"][0]["qsl"]["tokens"] == one["qsl"]["tokens"]
    unwatched = http.post("/v1/completions", json={**ask, "plan": STEERED.to_dict()}).json()
    assert unwatched["choices"][0]["qsl"]["plan"] is None  # nobody has counted
    assert http.get("/api/info").json()["engine"]["engine"] == "llama.cpp"
    assert "qsl_finished_total" in http.get("/metrics").text


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"plan": f"{GROUP}/6/423:ablate"}, "bad_plan", "does not have the operation ablate"),
    ({"plan": f"{GROUP}/6/423:add:0.1norm@first"}, "bad_plan", "does not have the unit norm"),
    ({"plan": f"{GROUP}/6/423:add:40"}, "bad_plan", "@first"),
    ({"plan": f"{GROUP}/0/4:add:4@first"}, "bad_plan", "no control vector for layer 0"),
    ({"plan": f"{GROUP}/6/4:add:1e300@first"}, "bad_plan", "too strong for float32"),
    ({"logprobs": 2}, "unsupported", "without --engine"),
    ({"max_tokens": 3000}, "context_length_exceeded", "1024"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[2])
def test_what_llama_cannot_do_is_refused_by_name(case: Any, lens: Lens) -> None:
    http = TestClient(make_app(Serving(lens)), base_url="http://localhost")
    fields, code, said = case
    answer = http.post("/v1/completions", json={"prompt": "The", "max_tokens": 1, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code)
    assert said in error["message"]


def test_programs_come_and_go_with_plans(llama_engine: Maker, served: Served) -> None:
    engine = llama_engine(seconds=20)
    programs: Any = engine._source
    lens = served.lens
    first = finish(engine, [wanted(lens, PROMPTS[0])])[0].tokens
    plain = programs.running(None)
    other = Plan(f"{GROUP}/6/423:add:41@first")
    for plan in (STEERED, other):  # the double has no vector's numbers: it answers as steered
        finish(engine, [wanted(lens, PROMPTS[0], plan)])
    assert plain.process.poll() is not None  # two processes at most
    assert programs.running(None) is None
    assert finish(engine, [wanted(lens, PROMPTS[0])])[0].tokens == first  # started again
    killed = programs.running(None).process
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert finish(engine, [wanted(lens, PROMPTS[0])])[0].tokens == first
    with programs.busy(None), programs.busy(other), pytest.raises(QueueFull, match="--engine-proc"):
        finish(engine, [wanted(lens, PROMPTS[0], STEERED)])
    assert len(engine._talks) <= 2
    engine.close()
    with pytest.raises(Stopping):
        finish(engine, [wanted(lens, PROMPTS[0])])


def test_rubbish_from_an_engine_is_an_error_of_the_gateway(
    llama_engine: Maker, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "MOST_LINE", 1 << 18)
    monkeypatch.setattr(llama, "MOST_ANSWER", 1 << 18)
    engine = llama_engine(seconds=20)
    address = engine._source.running(None).address  # type: ignore[union-attr]
    for trouble in [*TROUBLES, "", "dies"]:  # "": a request that was not recorded
        misbehaving = llama.Talk(address).ask("/trouble", trouble)
        asyncio.run(misbehaving)
        for streams in (False, True) if trouble != "dies" else (True,):
            with pytest.raises(EngineFailed):
                finish(engine, [wanted(served.lens, "x", streams=streams)])
    assert engine.gauges["rows"] == 0


@pytest.mark.slow
def test_an_engine_that_does_not_start_or_answer_in_time(
    llama_engine: Maker, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(EngineFailed, match="ended by itself"):
        llama_engine(trouble="does not start")
    assert "the model cannot be loaded" in caplog.text
    with pytest.raises(EngineFailed, match="does not answer"):
        llama_engine(Address("http://127.0.0.1:1"))
    slow = llama_engine(trouble="slow", seconds=1.5)
    with pytest.raises(TooLate):
        finish(slow, [wanted(served.lens, "x")])
    [row] = slow.submit([wanted(served.lens, "x")], lambda row, step: None)
    slow.cancel([row])
    slow.close()
    assert slow.gauges == {"rows": 0, "waiting": 0, "prefix_tokens": 0}


def test_a_running_program_takes_no_plan_and_another_model_is_refused(
    llama_engine: Maker, served: Served
) -> None:
    started = llama_engine()
    address = started._source.running(None).address  # type: ignore[union-attr]
    engine = llama_engine(Address(address.url, address.key))
    assert finish(engine, [wanted(served.lens, PROMPTS[1])])[0].reason == "length"
    with pytest.raises(BadPlan, match="only at its start"):
        engine.check(STEERED)
    with pytest.raises(EngineFailed, match="Invalid API Key"):
        llama_engine(Address(address.url, "guessed"))
    tokenizer = served.lens.tokenizer
    with pytest.raises(WrongModel, match="width 128"):
        asyncio.run(llama.check_server(llama.Talk(address), tokenizer, 64))

    class Other:
        """A tokenizer of the same size that splits otherwise."""

        def __len__(self) -> int:
            return len(tokenizer)

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [*tokenizer(text)["input_ids"], 5]}

    with pytest.raises(WrongTokenizer, match="other tokens"):
        asyncio.run(llama.check_server(llama.Talk(address), Other(), 128))  # type: ignore[arg-type]


def test_hidden_tokens_are_spelled(served: Served) -> None:
    """Whatever way a text is cut into tokens: those inside a character are found again."""
    vocabulary = served.lens.vocabulary
    speller = Speller(vocabulary)
    for text in ("😀", "内核厖矛😀 é", "데비안"):
        ids = served.lens.tokenizer(text)["input_ids"]
        held: list[int] = []
        for token in ids:
            spelled = b"".join(vocabulary.bytes_of(one) or b"" for one in [*held, token])
            try:
                spelled.decode()
            except UnicodeDecodeError:
                held.append(token)
                continue
            hidden = b"".join(vocabulary.bytes_of(one) or b"" for one in held)
            assert speller.tokens(hidden, len(held)) == held
            held = []
    assert speller.tokens(b"abc", 1) is None  # it leaves no character unfinished
    assert speller.tokens(b"\xe4", 2) is None


# --- interp-engine -------------------------------------------------------------------------------


def make_interp(served: Served, model: Any, **limits: Any) -> InterpEngine:
    lens, ends = served.lens, frozenset(end_tokens(served.lens.model))
    return InterpEngine(
        model, lens.tokenizer, ends, 1024, 128, lens.sae_of, allow_other_model=True, **limits
    )


def test_interp_engine_writes_what_our_own_engine_writes(served: Served) -> None:
    from interp_engine import EagerModel

    lens = served.lens
    model = EagerModel("mini-qwen3", hf_model=lens.model, tokenizer=lens.tokenizer, dtype="float32")
    engine = make_interp(served, model)
    plans = (
        None,
        Plan(f"{GROUP}/6/423:add:40@generation"),
        Plan([f"{GROUP}/6/423:project_out", f"{GROUP}/4/12:add:25"]),
    )
    for plan in plans:
        if plan is not None:
            engine.check(plan)
        asked = [wanted(lens, prompt, plan, stop=(".",)) for prompt in PROMPTS[:2]]
        ours, theirs = finish(lens.engine, asked), finish(engine, asked)
        assert [row.tokens for row in ours] == [row.tokens for row in theirs]
        assert [row.reason for row in ours] == [row.reason for row in theirs]
    for text in ("ablate", "add:1@class=han", "add:1@generation,gate=" + f"{GROUP}/2/3>1"):
        with pytest.raises(BadPlan, match="engine"):
            engine.check(Plan(f"{GROUP}/6/423:{text}"))
    engine.close()
    with pytest.raises(WrongModel, match="the SAEs expect 128"):
        make_interp(served, SimpleNamespace(d_model=64))


class Vllm:
    """interp-engine's `VLLMModel` where it matters: it steers what the open block says, and decodes
    requests at the same time."""

    hf_model_id, d_model, n_layers = "mini-qwen3", 128, 8

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, []  # type: ignore[var-annotated]
        self.now = self.most = 0
        self.ended = False

    def describe(self) -> Any:
        return SimpleNamespace(backend="vllm", hooks_available=True, static_writes=[])

    async def warmup(self) -> None:
        self.warm = True

    async def shutdown(self) -> None:
        self.ended = True

    async def generate_steps(
        self,
        prompt_token_ids: Any,
        *,
        max_tokens: Any = 64,
        temperature: Any = None,
        top_k: Any = None,
        top_p: Any = None,
        presence_penalty: Any = None,
        stop_at_eos: Any = True,
        n_logprobs: Any = 0,
        seed: Any = None,
        steering_spec: Any = None,
        position_mask: Any = None,
        generated: Any = True,
    ) -> Any:
        from interp_engine.steer import active_steering

        self.calls.append((len(prompt_token_ids), temperature, top_k, top_p, active_steering(self)))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            for number in range(max_tokens):
                await asyncio.sleep(0.01)
                yield SimpleNamespace(token_id=100 + number)
        finally:
            self.now -= 1


def test_the_double_of_vllm_has_the_signatures_of_the_real_one() -> None:
    from interp_engine import EagerModel
    from interp_engine.vllm_backend import VLLMModel

    for name in ("generate_steps", "describe", "warmup", "shutdown"):
        ours, theirs = (inspect.signature(getattr(one, name)) for one in (Vllm, VLLMModel))
        for one, other in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
            assert (one.name, one.kind, one.default) == (other.name, other.kind, other.default)
        assert inspect.isasyncgenfunction(getattr(Vllm, name)) == inspect.isasyncgenfunction(
            getattr(VLLMModel, name)
        )
    asked = {"max_tokens", "temperature", "top_k", "top_p", "presence_penalty", "seed"}
    assert asked <= set(inspect.signature(EagerModel.generate_steps).parameters)


def test_requests_over_vllm_run_at_once_each_under_its_own_plan(served: Served) -> None:
    model = Vllm(served.lens.tokenizer)
    engine = make_interp(served, model, rows=3)
    plans = (None, STEERED, Plan(f"{GROUP}/6/7:project_out@generation"), None)
    for plan in plans:
        if plan is not None:
            engine.check(plan)
    found = finish(engine, [wanted(served.lens, "The", plan) for plan in plans])
    assert [row.tokens for row in found] == [list(range(100, 100 + TOKENS))] * 4
    assert model.most == 3
    steered = [call[4] for call in model.calls]
    assert [one is not None for one in steered] == [False, True, True, False]
    [spec] = steered[1].specs
    [operation] = spec.layers[6].operations
    expected = 40 * served.lens.sae(6).direction([423])[0]
    assert pytest.approx(expected.tolist(), rel=1e-4) == list(operation.vector)
    assert steered[2].generated is True
    assert {call[1:4] for call in model.calls} == {(0.0, 0, 1.0)}  # nothing of the checkpoint's own
    [row] = engine.submit([wanted(served.lens, "The")], lambda row, step: None)
    engine.cancel([row])
    engine.close()
    assert model.ended
    assert model.now == 0


# --- the command line ----------------------------------------------------------------------------

WRONG: list[tuple[list[str], str]] = [
    (["--engine", "vllm"], "expected own, llama.cpp=WHERE or interp-engine"),
    (["--engine", "own", "--no-reader"], "cannot do with --no-reader"),
    (["--engine", "llama.cpp"], "is not a program"),
    (["--engine", "llama.cpp=/nowhere/llama-server"], "is not a program"),
    (["--engine", "llama.cpp=sh"], "name them with --gguf"),
    (["--engine", "llama.cpp=sh", "--gguf", "x", "--engine-args", "'"], "No closing quotation"),
    (["--engine", "llama.cpp=sh", "--gguf", "{add}"], "is not a GGUF file: it begins with b'{"),
    (["--engine", "llama.cpp=http://"], "names no host"),
    (["--engine", "llama.cpp=http://x", "--gguf", "x"], "go with --engine llama.cpp=PROGRAM only"),
    (["--engine", "interp-engine=cuda"], "expected auto, eager, vllm"),
    (["--engine", "interp-engine", "--engine-args", "-c 1"], "PROGRAM only"),
    (["--engine", "interp-engine", "--no-reader", "--record", "x"], "leave --no-reader out"),
    (["--engine", "interp-engine", "--plan", "{ablate}"], "does not have the operation ablate"),
    (["--engine", "llama.cpp=http://x", "--plan", "{add}"], "takes no plan"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: " ".join(case[0])[-30:])
def test_a_wrong_choice_of_engine_is_refused_before_anything_is_loaded(
    case: Any, tmp_path: Path
) -> None:
    arguments, said = case
    places = {}
    for name, edit in (("ablate", "ablate"), ("add", "add:1@first")):
        places[name] = tmp_path / f"{name}.json"
        Plan(f"{GROUP}/6/423:{edit}").save(places[name])
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    given = parser.parse_args([word.format(**places) for word in arguments])
    with pytest.raises(ScopeError, match=re.escape(said)):
        engine_options.check_engine(given)


def test_a_model_is_known_without_its_weights(served: Served) -> None:
    tokenizer, ends, context = engine_options.without_model("mini-qwen3")
    lens = served.lens
    assert len(tokenizer) == len(lens.tokenizer)
    assert (ends, context) == (frozenset(end_tokens(lens.model)), lens.engine.context)


def test_without_a_reader_nothing_is_read(served: Served) -> None:
    engine = make_interp(served, Vllm(served.lens.tokenizer))
    ours = served.lens
    lens = Lens(None, ours.tokenizer, ours.group, [4], engine=engine, name="mini-qwen3")
    http = TestClient(make_app(Serving(lens)), base_url="http://localhost")
    ask = {"prompt": "The", "max_tokens": 3, "temperature": 0, "plan": str(STEERED)}
    assert http.post("/v1/completions", json=ask).json()["choices"][0]["qsl"]["token_ids"]
    assert http.get("/api/info").json()["reads"] is False
    assert http.get("/api/search", params={"q": "423"}).json()["features"][0]["score"] is None
    assert '"read": ' not in http.get("/").text
    for path, body in (
        ("/v1/completions", {**ask, "monitor": [f"{GROUP}/6/423"]}),
        ("/v1/completions", {**ask, "explain": True}),
        ("/api/read", {"text": "x"}),
        ("/api/compare", {"a": "x", "b": "y"}),
        ("/api/coherence", {"prompt": "x", "plain": [5], "steered": [6]}),
        ("/api/promoted", {"features": [f"{GROUP}/6/423"]}),
        ("/v1/completions", {**ask, "plan": f"{GROUP}/6/423:add:2typical"}),
    ):
        answer = http.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported"), path
        assert "--no-reader" in answer.json()["error"]["message"]
    engine.close()


# --- the table -----------------------------------------------------------------------------------


def test_the_table_of_engines_is_that_of_the_docs(served: Served) -> None:
    page = (TOP / "docs/serve.md").read_text("utf-8")
    for row in rows():
        assert "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" in page
    described = served.http.get("/openapi.json").json()["x-engines"]
    assert [one["engine"] for one in described] == list(ENGINES)
    assert issubclass(EngineFailed, ScopeError)
