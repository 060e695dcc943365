"""The app's work without a browser: reading, comparing, steering, sessions, the web server."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_stores import GROUP

import qwen_scope_lens as qsl
from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.app import Workbench
from qwen_scope_lens.app.steering_run import Outcome, Step, run_steering
from qwen_scope_lens.app.workbench import Kept, compare
from qwen_scope_lens.cli import main
from qwen_scope_lens.errors import BadFile, BadText, TooLittleData
from qwen_scope_lens.labels import Label, LabelPack
from qwen_scope_lens.steering import Plan, Sampling

A, B = "The kernel reads a file from the disk.", "内核从磁盘读取文件，然后关闭它。"
LAYERS = [3, 6]


@pytest.fixture(scope="module")
def bench() -> Workbench:
    labels = LabelPack([Label(FeatureRef(GROUP, 6, n), f"label {n}") for n in range(1024)])
    return Workbench(qsl.load_model("mini-qwen3"), qsl.find_group(GROUP), labels)


def strongest(bench: Workbench, text: str, layer: int = 6) -> FeatureRef:
    reading = bench.read(text, [layer])
    return reading.strongest(layer, range(1, len(reading.token_ids)), 1)[0].ref


def test_read_says_what_fires_on_every_token(bench: Workbench) -> None:
    seen = []
    reading = bench.read(B, LAYERS, lambda done, n: seen.append((done, n)))
    assert seen == [(1, 2), (2, 2)]
    assert "".join(piece.text for piece in reading.pieces) == B
    assert sum(piece.tokens for piece in reading.pieces) == len(reading.token_ids)
    residual = qsl.capture(bench.model, [B], [6]).residuals[6]
    dense = qsl.load_sae(f"{GROUP}/6").encode_sparse(residual).to_dense()
    tokens = reading.tokens_of(2)
    found = reading.strongest(6, tokens, 4)
    expected = dense[list(tokens)].amax(0).topk(4)
    assert [one.ref.feature for one in found] == expected.indices.tolist()
    assert [one.value for one in found] == pytest.approx(expected.values.tolist())
    assert found[0].label == f"label {found[0].ref.feature}"
    track = reading.track(found[0].ref)
    assert max(track) == pytest.approx(float(dense[:, found[0].ref.feature].max()))
    with pytest.raises(BadText, match="type some"):
        bench.read("  ", LAYERS)
    with pytest.raises(BadText, match="layer"):
        bench.read(A, [])


def test_saes_in_memory_are_few(bench: Workbench) -> None:
    small = Workbench(bench.model, bench.group, most_saes=2)
    zero, one, two, again, three = (small.sae(layer) for layer in (0, 1, 2, 0, 3))
    assert again is not zero  # 1 and 2 had pushed it out
    assert small.sae(0) is again
    assert small.sae(3) is three
    assert small.sae(2) is not two
    assert small.sae(1) is not one


def test_compare_is_the_difference_of_rates(bench: Workbench) -> None:
    one, other = bench.read(A, LAYERS), bench.read(B, LAYERS)
    found = compare(bench, one, other, top=3)
    assert len(found) == 6
    assert [row.score for row in found] == sorted((row.score for row in found), reverse=True)
    for row in found:
        fires = [
            reading.codes[row.ref.layer].to_dense()[1:, row.ref.feature] for reading in (one, other)
        ]
        rates = [float((x > 0).float().mean()) for x in fires]
        assert [row.rate_a, row.rate_b] == pytest.approx(rates)
        assert row.score == pytest.approx(abs(rates[0] - rates[1]))
        both = torch.cat(fires)
        assert row.mean == pytest.approx(float(both[both > 0].mean()), rel=1e-5)
    best = max(
        abs(
            float((one.codes[6].to_dense()[1:, f] > 0).float().mean())
            - float((other.codes[6].to_dense()[1:, f] > 0).float().mean())
        )
        for f in range(1024)
    )
    assert max(row.score for row in found if row.ref.layer == 6) == pytest.approx(best)


def test_what_a_comparison_leaves_out(bench: Workbench) -> None:
    one = bench.read("The file is open. The file is here.", [6])
    other = bench.read("The file is open. A door.", [6])
    same = [a == b for a, b in zip(one.token_ids, other.token_ids, strict=False)]
    prefix = same.index(False)
    assert prefix > 3
    plain = Kept(drop_first=False)
    assert plain.positions(one, other).all()
    assert Kept().positions(one, other).tolist() == [False] + [True] * (len(one.token_ids) - 1)
    kept = Kept(drop_first=False, drop_shared_prefix=True).positions(one, other)
    assert kept.tolist() == [False] * prefix + [True] * (len(one.token_ids) - prefix)
    kept = Kept(drop_first=False, drop_shared_tokens=True).positions(one, other)
    assert kept.tolist() == [token not in other.token_ids for token in one.token_ids]
    with pytest.raises(TooLittleData, match="no token of text A"):
        compare(bench, one, one, kept=Kept(drop_shared_tokens=True))
    assert compare(bench, one, one) == []  # nothing tells a text from itself


def test_steering_writes_both_texts(bench: Workbench) -> None:
    ref = strongest(bench, B)
    plan = Plan(f"{ref}:add:+3typical")
    steps = list(run_steering(bench, "The file", plan, Sampling(24)))
    assert all(isinstance(step, Step) for step in steps[:-1])
    assert len(steps) > 2
    end = steps[-1]
    assert isinstance(end, Outcome)
    assert end.plain != end.steered
    inner = bench.model.original_model
    ids = bench.model.tokenizer("The file", return_tensors="pt").input_ids
    with torch.no_grad():
        out = inner.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        shares = inner(ids).logits[0, -1].softmax(-1).topk(10)
    assert end.plain == bench.model.tokenizer.decode(out, skip_special_tokens=True)
    assert [p for _, p in end.next_tokens[0]] == pytest.approx(shares.values.tolist(), abs=1e-4)
    assert end.next_tokens[0] != end.next_tokens[1]
    assert end.fired
    assert "fired on" in end.report
    # Much too strong is told to be no language any more.
    *_, wild = run_steering(bench, "The file", Plan(f"{ref}:add:+30typical"), Sampling(24))
    assert isinstance(wild, Outcome)
    assert not wild.coherent
    *_, same = run_steering(bench, "The file", Plan(f"{ref}:add:0"), Sampling(24))
    assert isinstance(same, Outcome)
    assert same.coherent
    assert same.plain == same.steered == end.plain


def test_a_run_can_be_stopped_and_the_next_one_starts(bench: Workbench) -> None:
    plan = Plan(f"{strongest(bench, B)}:add:+1typical")
    stop = threading.Event()
    seen = []
    for step in run_steering(bench, "The file", plan, Sampling(200), stop=stop):
        seen.append(step)
        stop.set()
    assert not any(isinstance(step, Outcome) for step in seen)
    assert not bench.lock.locked()
    run = run_steering(bench, "The file", plan, Sampling(200))
    next(run)
    run.close()  # type: ignore[attr-defined]
    assert not bench.lock.locked()
    *_, end = run_steering(bench, "The file", plan, Sampling(5))
    assert isinstance(end, Outcome)


def test_two_runs_at_once_do_not_steer_each_other(bench: Workbench) -> None:
    plans = [Plan(f"{strongest(bench, text)}:add:+4typical") for text in (A, B)]
    alone = [list(run_steering(bench, "The file", plan, Sampling(16)))[-1] for plan in plans]
    found: dict[int, Any] = {}

    def go(number: int) -> None:
        found[number] = list(run_steering(bench, "The file", plans[number], Sampling(16)))[-1]

    threads = [threading.Thread(target=go, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[0].steered, found[1].steered] == [one.steered for one in alone]
    assert found[0].steered != found[1].steered


def test_an_error_of_a_run_is_raised_where_it_is_awaited(bench: Workbench) -> None:
    plan = Plan(f"{GROUP}/6/1:add:2")
    with pytest.raises(BadText, match="leave no room"):
        list(run_steering(bench, "x", plan, Sampling(100_000)))
    assert not bench.lock.locked()


def test_typical_activations_come_from_the_sample_once(bench: Workbench) -> None:
    ref = strongest(bench, A)
    fresh = Workbench(bench.model, bench.group)
    plan = fresh.calibrated(Plan(f"{ref}:add:+2typical"))
    assert plan.edits[0].typical is not None
    assert plan.edits[0].value == pytest.approx(2 * plan.edits[0].typical)
    fresh.model = None  # a second time nothing is run
    assert fresh.calibrated(Plan(f"{ref}:add:-1typical")).edits[0].typical == plan.edits[0].typical


def test_the_web_app_is_local_and_closed(bench: Workbench, tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    from qwen_scope_lens.app.server import make_web_app

    with pytest.raises(BadFile, match="is not a site of features"):
        make_web_app(bench, [6], tmp_path)
    web = make_web_app(bench, [6])
    with TestClient(web, base_url="http://localhost:7860") as client:
        answer = client.get("/")
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        config = client.get("/config").json()
        assert config["analytics_enabled"] is False
        assert client.get("/", headers={"Host": "attacker.example"}).status_code == 400
        assert client.get("/docs").status_code == 404


def test_the_verb_refuses_what_it_cannot_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["app", "--layers", "99"]) == 1
    assert "99" in capsys.readouterr().err
    assert main(["app", "--sae", "nothing"]) == 1
