"""Calibration, sweeps, blame and what they are made of, on tiny random models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import steering_reference as reference
import torch
from tiny_models import make_model, make_tokenizer

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import (
    BadCorpus,
    BadFile,
    BadPlan,
    BadText,
    PlanNeverFired,
    StoreMismatch,
    TooLittleData,
)
from qwen_scope_lens.steering import (
    Calibration,
    Continuation,
    Edit,
    Plan,
    Sampling,
    Sweep,
    blame,
    calibrate,
    generate,
    perplexity,
    repetition,
    steer,
    surprisals,
    sweep,
)
from qwen_scope_lens.steering.blame import Case, read_cases
from qwen_scope_lens.steering.calibrate import calibrate_from_store
from qwen_scope_lens.steering.doses import Measure, parse_open_edit, parse_strengths
from qwen_scope_lens.steering.report import EditReport
from qwen_scope_lens.steering.side_by_side import SideBySide, stream, wrap
from qwen_scope_lens.steering.sweep import (
    CONTROL,
    PLAN,
    Dose,
    Guard,
)
from qwen_scope_lens.tables import printable, width_of

TEXTS = ["a first text, long enough", "another one", "third: 123"]


pytestmark = pytest.mark.usefixtures("tiny_home")


def ref(layer: int, feature: int) -> str:
    return f"local/tiny/{layer}/{feature}"


# --- calibration ---------------------------------------------------------------------------------


def by_hand(tiny_model: Any, tiny_world: Any, layer: int) -> torch.Tensor:
    """Codes of every token that counts, from the published formula."""
    read = qsl.capture(tiny_model, TEXTS, [layer])
    x = read.residuals[layer][read.keep(layer)]
    return reference.planted.model_card_encode(tiny_world[layer], x, reference.K)


def test_typical_activations_are_means_where_features_fire(
    tiny_model: Any, tiny_world: Any
) -> None:
    codes = by_hand(tiny_model, tiny_world, 1)
    found = calibrate(tiny_model, ["local/tiny/1", ref(2, 3)], TEXTS)
    fired = [f for f in range(reference.D_SAE) if bool((codes[:, f] > 0).any())]
    assert [r for r in found if r.startswith("local/tiny/1/")] == [ref(1, f) for f in fired]
    for f in fired:
        values = codes[:, f][codes[:, f] > 0]
        facts = found.facts[ref(1, f)]
        assert facts.mean == pytest.approx(float(values.mean()), rel=1e-5)
        assert facts.largest == pytest.approx(float(values.max()), rel=1e-5)
        assert (facts.fired, facts.rate) == (len(values), pytest.approx(len(values) / len(codes)))
    plan = Plan([f"{ref(1, fired[0])}:add:2typical"]).calibrated(found)
    assert plan.edits[0].value == pytest.approx(2 * found[ref(1, fired[0])])


def test_a_calibration_survives_a_file(tiny_model: Any, tmp_path: Path) -> None:
    found = calibrate(tiny_model, ["local/tiny/1"], TEXTS)
    found.save(tmp_path / "typical.json")
    again = Calibration.load(tmp_path / "typical.json")
    assert again.facts == found.facts
    assert again.provenance["documents"] == 3
    assert again.provenance["saes"] == ["local/tiny/1"]
    for rest in ("", ', "features": {}, "provenance": "x"', ', "features": {}, "provenance": 3'):
        text = f'{{"format": "qsl-calibration", "version": 1{rest}}}'
        (tmp_path / "typical.json").write_text(text)
        with pytest.raises(BadFile, match="damaged"):
            Calibration.load(tmp_path / "typical.json")
    with pytest.raises(TooLittleData):
        calibrate(tiny_model, ["local/tiny/1"], ["x"])  # only a first token


def test_a_store_gives_the_same(tiny_model: Any, tmp_path: Path) -> None:
    from qwen_scope_lens.stores import extract

    store = extract(TEXTS, model=tiny_model, group="local/tiny", layers=[1], out=tmp_path / "store")
    from_store = calibrate_from_store(store, ["local/tiny/1"])
    direct = calibrate(tiny_model, ["local/tiny/1"], TEXTS)
    assert list(from_store) == list(direct)
    for name in direct:
        assert from_store[name] == pytest.approx(direct[name], rel=1e-3)
    with pytest.raises(StoreMismatch):
        calibrate_from_store(store, ["mini-qwen3/w1k-l0-16/1"])


# --- generation, coherence, measures -------------------------------------------------------------


def test_batches_of_any_size_continue_the_same(tiny_model: Any) -> None:
    sampling = Sampling(new_tokens=6)
    plan = Plan([f"{ref(1, 3)}:add:+5"])
    mixed: list[Plan | None] = [plan, None, plan]
    together = generate(tiny_model, TEXTS, mixed, sampling=sampling)
    alone = [
        generate(tiny_model, [t], p, sampling=sampling)[0]
        for t, p in zip(TEXTS, mixed, strict=True)
    ]
    assert together == alone == generate(tiny_model, TEXTS, mixed, sampling=sampling, batch=2)
    assert together[1] == generate(tiny_model, TEXTS, sampling=sampling)[1]
    assert together[0] != generate(tiny_model, TEXTS, sampling=sampling)[0]
    warm = Sampling(new_tokens=6, temperature=1.0, seed=3)
    assert generate(tiny_model, TEXTS, sampling=warm) == generate(tiny_model, TEXTS, sampling=warm)
    with pytest.raises(PlanNeverFired):
        generate(tiny_model, TEXTS, Plan([f"{ref(1, 3)}:add:+5@pos=99"]), sampling=sampling)
    with pytest.raises(BadPlan, match="2 plans for 3"):
        generate(tiny_model, TEXTS, [plan, None])
    with pytest.raises(BadText, match="room"):
        generate(tiny_model, TEXTS, sampling=Sampling(new_tokens=300))


def test_surprisals_are_the_models_own(tiny_model: Any) -> None:
    ids = make_tokenizer()(["prompt", "and more"])["input_ids"]
    cases = [
        Continuation(tuple(ids[0]), (65, 66, 67), ""),
        Continuation(tuple(ids[1]), (70,), ""),
        Continuation(tuple(ids[0]), (), ""),
    ]
    found = surprisals(tiny_model, cases)
    for case, value in zip(cases[:2], found[:2], strict=True):
        whole = torch.tensor([[*case.prompt_ids, *case.ids]])
        with torch.no_grad():
            scores = tiny_model(whole)[0].double().log_softmax(-1)
        at = range(len(case.prompt_ids) - 1, whole.shape[1] - 1)
        truth = -np.mean([float(scores[i, whole[0, i + 1]]) for i in at])
        assert value == pytest.approx(truth, rel=1e-4)
    assert found[2] is None
    assert perplexity(found) == pytest.approx(math.exp((found[0] + found[1]) / 2))  # type: ignore[operator]
    with (
        pytest.raises(BadPlan, match="unsteered"),
        steer(tiny_model, Plan([f"{ref(1, 3)}:add:1"]), must_fire=False),
    ):
        surprisals(tiny_model, cases)


def test_repetition() -> None:
    assert repetition([1, 2, 3]) is None
    assert repetition(range(20)) == 0
    assert repetition([1, 2, 3, 4] * 5) == pytest.approx(1 - 4 / 17)


def test_measures() -> None:
    new, old = Continuation((), (1, 2, 3), "ab 中文"), Continuation((), (1, 9), "ab")
    assert Measure.parse("class=han").of(new, old) == 0.5
    assert Measure.parse("regex=b .").of(new, old) == 1.0
    assert Measure.parse("change").of(new, old) == pytest.approx(2 / 3)
    for bad in ("class=klingon", "regex=(", "regex=", "size"):
        with pytest.raises(BadPlan):
            Measure.parse(bad)


def test_a_control_pushes_as_hard_elsewhere(tiny_model: Any, tiny_world: Any) -> None:
    plan = Plan([f"{ref(1, 3)}:set:4", f"{ref(1, 5)}:add:2"])
    seen: dict[int | None, torch.Tensor] = {}
    reports: dict[int | None, tuple[EditReport, ...]] = {}
    for control in (None, 0, 1):
        with steer(tiny_model, plan, control=control) as report, torch.no_grad():
            tiny_model.run_with_hooks(
                torch.tensor([list(b"some text")]),
                fwd_hooks=[
                    (
                        "blocks.1.hook_resid_post",
                        lambda x, hook, c=control: seen.setdefault(c, x.clone()),
                    ),
                ],
            )
        reports[control] = report.edits
    plain = qsl.capture(tiny_model, [list(b"some text")], [1]).residuals[1]
    pushes = {c: (seen[c][0] - plain)[1:] for c in (None, 0, 1)}
    for i in range(2):
        assert reports[0][i].moved == pytest.approx(reports[None][i].moved, rel=1e-5)
    d = tiny_world[1]["W_dec"][:, [3, 5]]
    along = torch.linalg.lstsq(d, pushes[None].T).solution
    torch.testing.assert_close(d @ along, pushes[None].T, rtol=1e-3, atol=1e-3)
    for c in (0, 1):
        assert float(torch.cosine_similarity(pushes[c], pushes[None], dim=-1).abs().max()) < 0.8
    assert not torch.allclose(pushes[0], pushes[1])


# --- sweeps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("-8:8:4", [-8, -4, 0, 4, 8]),
        ("-0.3:0.3:0.1", [-0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3]),
        ("1:3", [1, 2, 3]),
        ("-4,2:3,2", [-4, 2, 3]),
    ],
)
def test_strengths(text: str, values: list[float]) -> None:
    assert parse_strengths(text) == values


@pytest.mark.parametrize(
    "text", ["", "a", "1:", "3:1", "1:2:0", "1:2:-1", "0:1:0.0001", "nan", "1:2:3:4"]
)
def test_bad_strengths(text: str) -> None:
    with pytest.raises(BadPlan):
        parse_strengths(text)


def test_open_edits() -> None:
    edit = parse_open_edit(f"{ref(1, 3)}:add@generation", "typical")
    assert (edit.op, edit.unit, str(edit.where)) == ("add", "typical", "generation")
    for bad in (f"{ref(1, 3)}:add:3", ref(1, 3), f"{ref(1, 3)}:ablate"):
        with pytest.raises(BadPlan):
            parse_open_edit(bad)


def test_a_sweep_measures_every_dose_and_goes_on(tiny_model: Any, tmp_path: Path) -> None:
    plan = Plan([parse_open_edit(f"{ref(1, 3)}:add")])
    keep = tmp_path / "sweep.json"
    options: dict[str, Any] = {"sampling": Sampling(new_tokens=6), "keep": keep}

    def stop_early(done: int, total: int) -> None:
        assert total == 5
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(tiny_model, plan, [-4, 0, 4], TEXTS, progress=stop_early, **options)
    kept = Sweep.load(keep)
    assert [(d.arm, d.strength) for d in kept.doses] == [(PLAN, 0), (PLAN, -4), (CONTROL, -4)]
    found = sweep(tiny_model, plan, [-4, 4], TEXTS, **options)
    assert found.doses[:3] == kept.doses
    assert Sweep.load(keep) == found
    texts = generate(tiny_model, TEXTS, plan.at(4), sampling=options["sampling"])
    plain = generate(tiny_model, TEXTS, sampling=options["sampling"])
    change = Measure.parse("change")
    effects = [change.of(a, b) for a, b in zip(texts, plain, strict=True)]
    top = found.arm(PLAN)[-1]
    assert top.strength == 4
    assert top.effect == pytest.approx(np.mean(effects))
    assert top.low <= top.effect <= top.high
    assert top.perplexity == pytest.approx(perplexity(surprisals(tiny_model, texts)))
    assert found.plain.effect == 0
    page = found.page().save(tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    assert "95% interval" in str(found)
    with pytest.raises(StoreMismatch, match="other edits"):
        sweep(tiny_model, plan, [-4, 4], TEXTS[:2], **options)
    with pytest.raises(BadPlan, match="the only strength is 0"):
        sweep(tiny_model, plan, [0], TEXTS)


def test_the_guard_refuses_broken_text() -> None:
    def dose(strength: float, height: float | None, repeats: float, effect: float = 0) -> Dose:
        return Dose(PLAN, strength, effect, 0, 0, height, repeats, "")

    doses = (
        dose(0, 10, 0.1),
        dose(1, 19, 0.2, 0.3),
        dose(2, 21, 0.1, 0.9),
        dose(3, 9, 0.3, 1),
        dose(4, None, 0, 1),
        dose(-1, 10, 0, -0.2),
    )
    found = Sweep("p", "raw", "change", "", {}, doses, Guard())
    assert [d.strength for d in found.doses if found.coherent(d)] == [0, 1, -1]
    assert [d.strength for d in found.best() if d] == [-1, 1]


# --- blame ---------------------------------------------------------------------------------------


def test_blame_finds_what_is_stronger_on_the_bad_tokens(tiny_model: Any, tiny_world: Any) -> None:
    """Against sums over the published formula's codes, token by token."""
    cases = [
        Case("ask", "good 12"),
        Case("then", "9 fine", bad=True),
        Case("ok", "well", bad=False),
    ]
    found = blame(tiny_model, ["local/tiny/1", "local/tiny/2"], cases, classes=["digit"], top=500)
    tokenizer = make_tokenizer()
    for layer in (1, 2):
        bad: list[torch.Tensor] = []
        other: list[torch.Tensor] = []
        for case in cases:
            assert isinstance(case.prompt, str)
            text = case.prompt + case.reply
            ids = tokenizer(text)["input_ids"]
            read = qsl.capture(tiny_model, [ids], [layer])
            codes = reference.planted.model_card_encode(
                tiny_world[layer], read.residuals[layer], reference.K
            )
            for at in range(1, len(ids)):  # the first token is left out
                digit = text[at].isdigit() and at >= len(case.prompt) and case.bad
                (bad if digit else other).append(codes[at])
        difference = torch.stack(bad).mean(0) - torch.stack(other).mean(0)
        own = {s.ref.feature: s for s in found if s.ref.layer == layer}
        assert set(own) == set((difference > 1e-9).nonzero().flatten().tolist())
        for feature, suspect in own.items():
            assert suspect.difference == pytest.approx(float(difference[feature]), rel=1e-4)
            rate = float((torch.stack(bad)[:, feature] > 0).double().mean())
            assert suspect.rate_on_bad == pytest.approx(rate)
            assert suspect.strongest in "129"
    assert [s.difference for s in found] == sorted((s.difference for s in found), reverse=True)


def test_blame_refuses_what_it_cannot_answer(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(TooLittleData, match="no bad reply"):
        blame(tiny_model, ["local/tiny/1"], [Case("a", "b", bad=False)])
    with pytest.raises(TooLittleData, match="class han"):
        blame(tiny_model, ["local/tiny/1"], [Case("a", "b")], classes=["han"])
    path = tmp_path / "cases.jsonl"
    rows = [
        {"prompt": "a", "reply": "b"},
        {"messages": [{"role": "user", "content": "c"}], "reply": "d", "bad": False},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [case.bad for case in read_cases(path)] == [True, False]
    odd = '{"prompt": "a", "reply": "b", "bad": "no"}'
    for text in ("{", '{"prompt": "a"}', "[1]", '{"prompt": "a", "reply": ""}', odd):
        path.write_text(text)
        with pytest.raises((BadCorpus, BadText), match=r"cases\.jsonl, line 1"):
            read_cases(path)


# --- texts in a terminal -------------------------------------------------------------------------


def test_columns_count_what_a_terminal_shows() -> None:
    assert width_of("ab中文e\u0301") == 7
    assert wrap("one two three", 7) == ["one two", "three"]
    assert wrap("abcdefghij", 4) == ["abcd", "efgh", "ij"]
    assert wrap("中文中文", 5) == ["中文", "中文"]
    assert wrap("a\n\nb", 5) == ["a", "", "b"]
    assert wrap("\x1b[2Jx", 9) == ["\\x1b[2Jx"]
    for text in ("the quick  brown fox " * 4, "混合 text 中文 " * 5, "x" * 50):
        for width in (6, 11, 20):
            lines = wrap(text, width)
            assert all(width_of(line) <= width for line in lines)
            assert "".join("".join(lines).split()) == "".join(text.split())


def test_columns_grow_line_by_line() -> None:
    written: list[str] = []
    columns = SideBySide(["left", "right"], 43, written.append)
    texts = ("", "")
    for step in range(1, 40):
        texts = ("word " * step, "中文" * (step // 2))
        columns.update(texts)
    assert len(written) >= 5  # the columns' heads, then whole lines
    columns.finish(texts)
    lines = [line.rstrip("\n") for line in written]
    assert {line.index("|") for line in lines if "|" in line and line.isascii()} == {21}
    left = " ".join(line.split("|")[0] for line in lines[2:])
    assert left.split() == ["word"] * 39


@pytest.mark.parametrize("compare", [False, True])
def test_a_stream_writes_what_generate_makes(tiny_model: Any, compare: bool) -> None:
    written: list[str] = []
    plan = Plan([f"{ref(1, 3)}:add:+5"])
    sampling = Sampling(new_tokens=8)
    report = stream(
        tiny_model, TEXTS[0], plan, sampling, written.append, compare=compare, width=200
    )
    text = generate(tiny_model, TEXTS[:1], plan, sampling=sampling)[0].text
    shown = "".join(written)
    for line in text.replace("\t", "    ").split("\n"):
        assert printable(line).strip() in shown
    assert report.edits[0].fired > 0
    assert len(written) > 2


def test_edits_are_exact_types() -> None:
    with pytest.raises(BadPlan, match="expected a Plan"), steer(make_model(), [3]):  # type: ignore[list-item]
        pass
    assert isinstance(Plan(Edit(ref(1, 3), "ablate")).edits[0], Edit)  # type: ignore[arg-type]
