"""The server's API, as OpenAI's own client, lm-eval and a browser use it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from serving import GROUP, LABEL, STEERED, Served
from starlette.testclient import TestClient

from qwen_scope_lens.catalog import bundled_model
from qwen_scope_lens.features import read
from qwen_scope_lens.serve.lens import served_name
from qwen_scope_lens.serve.openapi import description
from qwen_scope_lens.serve.web import Serving, _Web, make_app
from qwen_scope_lens.steering import Plan, Sampling, generate

FEATURE = f"{GROUP}/6/423"
CHAT: Any = [{"role": "user", "content": "Name the capital of Spain."}]
NO_THINKING: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def single(served: Served, prompt: Any, plan: str | None, sampling: Sampling) -> str:
    """What `generate` writes for one prompt."""
    lens = served.lens

    def work() -> str:
        [found] = generate(
            lens.model,
            [prompt],
            plan,
            [lens.sae(6)],
            tokenizer=lens.tokenizer,
            sampling=sampling,
            must_fire=False,
            enable_thinking=False,
        )
        return found.text

    return lens.reader.call(work).result()


def test_a_chat_is_what_generate_writes(served: Served, client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["mini-qwen3", "mini-qwen3+chinese"]
    assert client.models.retrieve("mini-qwen3+chinese").owned_by == "qwen-scope-lens"
    for seed, temperature, plan in ((0, 0.0, None), (5, 0.8, None), (7, 1.0, STEERED)):
        sampling = Sampling(24, temperature, 0.9 if temperature else 1.0, seed)
        answer: Any = client.chat.completions.create(
            model="mini-qwen3",
            messages=CHAT,
            max_tokens=24,
            temperature=temperature,
            top_p=sampling.top_p,
            seed=seed,
            extra_body={"plan": plan, **NO_THINKING},
        )
        assert answer.choices[0].message.content == single(served, CHAT, plan, sampling)
        assert answer.usage.completion_tokens == len(answer.choices[0].qsl["token_ids"])
        assert answer.choices[0].qsl["seed"] == seed
    assert answer.choices[0].qsl["fired"]
    assert answer.choices[0].qsl["plan"][0]["fired"] > 3
    assert answer.qsl["plan"] == Plan(STEERED).to_dict()
    named: Any = client.chat.completions.create(
        model="mini-qwen3+chinese",
        messages=CHAT,
        max_completion_tokens=24,
        temperature=1,
        top_p=0.9,
        seed=7,
        extra_body=NO_THINKING,
    )
    assert named.choices[0].message.content == answer.choices[0].message.content
    assert named.qsl["plan_name"] == "chinese"


def test_a_stream_says_what_the_whole_answer_says(served: Served, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "mini-qwen3",
        "messages": CHAT,
        "max_tokens": 12,
        "temperature": 0.9,
        "seed": 3,
        "n": 2,
        "stop": [".", " de"],
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": {
            "plan": STEERED,
            "monitor": [FEATURE],
            "explain": {"top": 2, "layers": [4]},
            **NO_THINKING,
        },
    }
    whole: Any = client.chat.completions.create(**asked)
    chunks: list[Any] = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[0].qsl["prompt"] == whole.qsl["prompt"]
    for index, choice in enumerate(whole.choices):
        own = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason
        scores = [x.model_dump() for c in own if c.logprobs for x in c.logprobs.content]
        assert scores == [x.model_dump() for x in choice.logprobs.content]
        records = [record for c in own for record in getattr(c, "qsl", {}).get("tokens", ())]
        assert records == choice.qsl["tokens"]
        assert [record["id"] for record in records] == choice.qsl["token_ids"]
        assert own[-1].qsl["plan"] == choice.qsl["plan"]
        text = "".join(record["text"] for record in records)
        assert text.startswith(choice.message.content)
        assert choice.finish_reason == "length" or "." in text or " de" in text
        assert max(record["monitor"][FEATURE] for record in records) > 0
        assert {len(record["explain"]["4"]) for record in records} == {2}


def test_records_are_a_reading(served: Served) -> None:
    text = "The kernel reads a file. 内核读取文件。"
    answer = served.post(
        "/v1/completions", prompt=text, max_tokens=1, temperature=0, explain={"layers": [6]}
    )
    found = read(text, GROUP, layers=6, all_tokens=True, promoted=0)
    records = answer["qsl"]["prompt"]
    assert "".join(record["text"] for record in records) == text
    assert records[0]["note"] == "first token"
    for number, record in enumerate(records):
        [best, *_] = found.strongest(6, [number], 1)
        assert record["explain"]["6"][0]["feature"] == str(best.ref)
        assert record["explain"]["6"][0]["activation"] == pytest.approx(best.value, rel=1e-4)
    shown = served.post("/api/read", text=text, layers=[6], top=1, monitor=[FEATURE])
    assert "".join(piece["text"] for piece in shown["pieces"]) == text
    assert [one["6"][0][0] for one in shown["tokens"]] == [
        str(found.strongest(6, found.tokens_of(i), 1)[0].ref) for i in range(len(found.pieces))
    ]
    assert shown["monitor"][0]["track"] == pytest.approx(found.track(_ref(FEATURE)), rel=1e-4)


def _ref(address: str) -> Any:
    from qwen_scope_lens.address import FeatureRef

    return FeatureRef.parse(address)


def test_log_probabilities_of_an_echoed_prompt(served: Served, client: openai.OpenAI) -> None:
    prompt = "The kernel reads"
    answer: Any = client.completions.create(
        model="mini-qwen3", prompt=prompt, max_tokens=1, temperature=0, echo=True, logprobs=1
    )
    scores = answer.choices[0].logprobs
    ids = served.lens.tokenizer(prompt)["input_ids"] + answer.choices[0].qsl["token_ids"]
    assert answer.choices[0].text.startswith(prompt)
    with torch.no_grad():
        logits = served.lens.model(input_ids=torch.tensor([ids])).logits[0].float()
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert scores.token_logprobs[0] is None
    assert scores.token_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-4)
    words = zip(scores.tokens, scores.text_offset, strict=True)
    assert all(answer.choices[0].text.startswith(word, at) for word, at in words)
    assert max(scores.top_logprobs[-1].values()) == scores.token_logprobs[-1]  # it is greedy


def test_lm_eval_measures_through_the_api(served: Served) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    def score(model: str) -> list[tuple[float, bool]]:
        lm = LocalCompletionsAPI(
            base_url=f"{served.url}/v1/completions",
            model=model,
            tokenizer=str(bundled_model("mini-qwen3")),
            max_length=256,
            batch_size=2,
        )
        asked = [("The kernel", " reads a file"), ("The", " kernel")]
        wanted = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
        found: list[tuple[float, bool]] = lm.loglikelihood(wanted, disable_tqdm=True)
        return found

    lens, found = served.lens, score("mini-qwen3")
    ids = lens.tokenizer("The kernel reads a file")["input_ids"]
    start = len(lens.tokenizer("The kernel")["input_ids"])
    with torch.no_grad():
        logits = lens.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    expected = sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))
    assert found[0][0] == pytest.approx(expected, abs=1e-3)
    assert score("mini-qwen3+chinese")[0][0] == pytest.approx(expected, abs=1e-3)  # it acts later


TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"properties": {"x": {"type": "string"}, "n": {"type": "integer"}}},
        },
    }
]
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=f>\n<parameter=x>\n12\nlines\n</parameter>\n<parameter=n>\n12\n"
    "</parameter>\n</function>\n</tool_call>"
)
BROKEN = "<tool_call>{oops}</tool_call>"
X, XN = '{"x": "é"}', '{"x": "12\\nlines", "n": 12}'
REPLIES: list[tuple[str, str | None, list[str]]] = [
    (f"Yes. \n\n{CALL}\n{XML}\n", "Yes.", [X, XN]),
    (CALL, None, [X]),
    (f"{BROKEN} then {CALL}", f"{BROKEN} then", [X]),
    (f"<think>\nI could {CALL}.\n</think>\n\n{XML}", f"<think>\nI could {CALL}.\n</think>", [XN]),
    ("a < b <tool", "a < b <tool", []),
    (f"{CALL[:-3]} \n", f"{CALL[:-3]} \n", []),
    ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "=", []),
    ("<tool_call><function=f>stray</function></tool_call>", "=", []),
]


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: reply[0][:20])
def test_tool_calls_are_told_as_openai_tells_them(
    reply: Any, served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and as a stream, whatever pieces the text comes in."""
    text, content, arguments = reply
    content = text if content == "=" else content
    lens = served.lens
    ids = [*lens.tokenizer(text, add_special_tokens=False)["input_ids"], min(lens.reader._ends)]

    def take(rows: Any, logits: torch.Tensor) -> Any:
        logits = torch.full_like(logits, -1.0)
        logits[0, ids[len(rows[0].tokens)]] = 1.0
        return said(rows, logits)

    said = lens.reader._take
    monkeypatch.setattr(lens.reader, "_take", take)
    asked: Any = {"model": "mini-qwen3", "messages": CHAT, "temperature": 0, "tools": TOOLS}
    answer = client.chat.completions.create(**asked, extra_body=NO_THINKING)
    [choice] = answer.choices
    calls = choice.message.tool_calls or []
    assert choice.message.content == content
    assert [call.function.arguments for call in calls] == arguments
    assert len({call.id for call in calls}) == len(calls)
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    with client.chat.completions.stream(**asked, extra_body=NO_THINKING) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    assert (final.message.content or None) == (content or None)
    assert final.finish_reason == choice.finish_reason
    assert [call.function.arguments for call in final.message.tool_calls or []] == arguments


REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    ({"moniter": []}, 400, "unknown_field", "moniter"),
    ({"logit_bias": {"5": 1}}, 400, "unsupported", "logit_bias"),
    ({"temperature": -1}, 400, "bad_value", "temperature"),
    ({"n": 17}, 400, "bad_value", "n"),
    ({"max_tokens": 2000}, 400, "context_length_exceeded", "prompt"),
    ({"prompt": "x " * 2000}, 400, "context_length_exceeded", "prompt"),
    ({"prompt": [9999999]}, 400, "bad_value", "prompt"),
    ({"prompt": ""}, 400, "bad_text", "prompt"),
    ({"model": "gpt"}, 404, "model_not_found", "model"),
    ({"plan": "none"}, 404, "plan_not_found", "plan"),
    ({"plan": {"edits": []}}, 400, "bad_plan", "plan"),
    ({"plan": f"{GROUP}/6/12:jump"}, 400, "bad_plan", "plan"),
    ({"plan": "mini-qwen3.5/w1k-l0-16/6/1:ablate"}, 400, "bad_value", "plan"),
    ({"monitor": ["mini-qwen3/w1k-l0-16/6/1024"]}, 400, "layer_out_of_range", "monitor"),
    ({"explain": {"layers": [99]}}, 400, "bad_value", "layers"),
    ({"seed": 1.5}, 400, "bad_value", "seed"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: str(next(iter(case[0])))[:20])
def test_what_cannot_be_obeyed_is_refused(case: Any, served: Served) -> None:
    fields, status, code, param = case
    found, error = served.error("/v1/completions", **{"prompt": "The", "max_tokens": 1, **fields})
    assert (found, error["code"], error["param"]) == (status, code, param), error
    assert "Traceback" not in error["message"]


def test_the_clients_see_their_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="moniter"):
        client.completions.create(model="mini-qwen3", prompt="x", extra_body={"moniter": 1})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def test_own_questions(served: Served) -> None:
    http = served.http
    info = http.get("/api/info").json()
    assert info["chosen"] == [4, 6]
    assert info["plans"] == ["chinese"]
    assert info["labels"] == 1
    found = served.post("/api/compare", a="Install the package now", b="内核读取文件内核", top=3)
    assert found["features"][0]["score"] == max(row["score"] for row in found["features"])
    assert [one["feature"] for one in found["a"]["monitor"]] == [
        row["feature"] for row in found["features"]
    ]
    feature = http.get(f"/api/feature/{FEATURE}?typical=1").json()
    assert feature["label"]["text"] == LABEL
    assert feature["typical"] > 0
    assert feature["page"] is None
    assert feature["nearest"][0][1] <= 1
    assert len(feature["promoted"]) == 10
    asked = {"q": feature["promoted"][0][0], "limit": 200}
    by_token = http.get("/api/search", params=asked).json()["features"]
    assert FEATURE in {row["feature"] for row in by_token}
    scores = {row["feature"]: row["score"] for row in by_token}  # as the feature's own page has it
    assert scores[FEATURE] == pytest.approx(feature["promoted"][0][1], rel=1e-3)
    by_number = http.get("/api/search", params={"q": "423", "layers": "6"}).json()["features"]
    assert (by_number[0]["feature"], by_number[0]["why"]) == (FEATURE, "address")
    other = http.get("/api/search", params={"q": "mini-qwen3.5/w1k-l0-16/6/1"}).json()["error"]
    assert "belongs to other SAEs" in other["message"]
    [by_label] = http.get("/api/search", params={"q": "INSTALLING"}).json()["features"]
    assert (by_label["feature"], by_label["why"]) == (FEATURE, "label")
    status = http.get("/api/search", params={"q": "x", "layers": "99"}).status_code
    assert status == 400
    answer = served.post("/api/coherence", prompt="The", plain=[5, 6, 7, 8], steered=[5] * 8)
    assert not answer["coherent"]
    assert answer["repetition"][1] > 0.5


def test_a_reply_is_read_again_as_its_plan_made_it(served: Served) -> None:
    """In the layer that was monitored, to the last digits; and in any other."""
    ask = {"prompt": "The kernel", "max_tokens": 6, "temperature": 0, "plan": STEERED}
    made = served.post("/v1/completions", **ask, monitor=[FEATURE])
    [choice], prompt = made["choices"], made["qsl"]["prompt"]
    ids = [record["id"] for record in prompt] + choice["qsl"]["token_ids"]
    asked = {"token_ids": ids, "prompt_tokens": len(prompt), "plan": STEERED, "layers": [6, 7]}
    again = served.post("/api/read", **asked, monitor=[FEATURE], top=2, top_tokens=1)
    monitored = [one["monitor"][FEATURE] for one in prompt + choice["qsl"]["tokens"]]
    assert again["monitor"][0]["track"] == pytest.approx(monitored, rel=1e-3)
    assert max(monitored[len(prompt) :]) > 50 > max(monitored[: len(prompt)])
    assert [one["fired"] for one in again["plan"]] == [6]
    assert [len(one["6"]) for one in again["tokens"]] == [1] * len(again["pieces"])
    assert len(again["features"]["7"]) == 2
    plain = served.post("/api/read", token_ids=ids, layers=[7])
    assert plain["plan"] is None
    assert plain["tokens"] != [{"7": one["7"]} for one in again["tokens"]]
    for wrong in ({"text": "x", "prompt_tokens": 1}, {"token_ids": [5], "prompt_tokens": 2}):
        assert served.error("/api/read", **wrong)[0] == 400
    refs = [FEATURE, f"{GROUP}/4/1"]
    named = served.post("/api/promoted", features=refs, top=3)["features"]
    assert [one["feature"] for one in named] == refs
    assert named[0]["label"] == LABEL
    own = served.http.get(f"/api/feature/{FEATURE}").json()["promoted"][:3]
    assert named[0]["promoted"] == [[text, pytest.approx(logit)] for text, logit in own]


def test_the_page_begins_with_what_it_would_ask_first(served: Served) -> None:
    with TestClient(make_app(Serving(served.lens)), base_url="http://localhost") as http:
        until = time.monotonic() + 30
        while '"read": ' not in (page := http.get("/")).text and time.monotonic() < until:
            time.sleep(0.05)
        data = page.text.partition('id="begin">')[2].partition("</script>")[0]
        begin = json.loads(data)
        assert begin["info"] == http.get("/api/info").json()
        read = http.post("/api/read", json=begin["read"]["asked"]).json()
        assert begin["read"]["answer"] == read
        tag = {"If-None-Match": page.headers["etag"]}
        assert http.get("/", headers=tag).status_code == 304
    script = served.http.get("/read.js").text  # the same names in the same order
    asked = re.search(r"const asked = \{ (text.*?) \};", script)
    assert asked is not None
    names = re.findall(r"(?:^|, )(\w+)(?=,|: )", asked[1])
    assert list(begin["read"]["asked"]) == names
    closed = TestClient(make_app(Serving(served.lens, token="x", hosts=None)))
    assert 'id="begin"' not in closed.get("/").text  # what is served is told to no one without it


def test_a_folder_is_served_under_its_name(
    served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert served_name(str(folder)) == "my-model"
    snapshot = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert served_name(str(snapshot)) == "Qwen/Qwen3-8B"
    assert served_name("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    full = str(tmp_path / "a+b" / "mini-qwen3")
    monkeypatch.setattr(served.lens, "names", ("mini-qwen3", full))
    assert [one.id for one in client.models.list()] == ["mini-qwen3", "mini-qwen3+chinese"]
    for name in ("mini-qwen3+chinese", f"{full}+chinese"):
        answer: Any = client.completions.create(model=name, prompt="The", max_tokens=1)
        assert answer.qsl["plan_name"] == "chinese"
    for wrong in (f"{full}+", f"{full}+none", f"{full}x", "mini-qwen3+"):
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=wrong, prompt="The", max_tokens=1)


def test_plans_and_labels_are_kept(served: Served) -> None:
    http = served.http
    plan = {"edits": [{"ref": FEATURE, "op": "add", "strength": 2, "unit": "typical"}]}
    made = http.put("/api/plans/mine", json=plan).json()
    assert made["edits"][0]["typical"] > 0
    checked = served.post("/api/plans/check", plan=plan)["edits"][0]
    assert checked["value"] == pytest.approx(2 * made["edits"][0]["typical"])
    assert Plan.from_dict(http.get("/api/plans/mine").json()).edits[0].strength == 2
    assert [one["name"] for one in http.get("/api/plans").json()["plans"]] == ["chinese", "mine"]
    assert http.put("/api/plans/..%2Fx", json=plan).status_code in (400, 404, 405)
    assert http.delete("/api/plans/mine").status_code == 204
    assert http.get("/api/plans/mine").status_code == 404
    address = f"{GROUP}/4/7"
    assert http.put(f"/api/labels/{address}", json={"text": "new"}).json()["text"] == "new"
    rows = [json.loads(row) for row in http.get("/api/labels?format=jsonl").text.splitlines()]
    assert {row["address"] for row in rows} == {address, FEATURE}
    assert http.put(f"/api/labels/{address}", json={"text": " "}).status_code == 204
    assert len(served.lens.labels) == 1


def test_the_description_has_every_address(served: Served) -> None:
    described = description()["paths"]
    table = _Web(Serving(served.lens)).table()
    routes = {(path.replace(":path", ""), method.lower()) for method, path, _ in table}
    told = {(path, method) for path, methods in described.items() for method in methods}
    assert routes - told == {("/{file}", "get")}
    assert told - routes == {("/api/session", "post")}  # the guard answers it
    assert served.http.get("/openapi.json").json() == json.loads(json.dumps(description()))
    metrics = served.http.get("/metrics").text
    assert 'qsl_requests_total{path="/v1/models",status="200"}' in metrics
    assert "qsl_new_tokens_total 0" not in metrics
