"""The engine: rows with different plans in one batch, each as if it were alone."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_scope_lens.errors import BadText
from qwen_scope_lens.models import load_model
from qwen_scope_lens.saes import load_sae
from qwen_scope_lens.serve.engine import Engine, QueueFull, TooLate
from qwen_scope_lens.serve.rows import Row, Step, Wanted
from qwen_scope_lens.serve.text import GrowingText
from qwen_scope_lens.steering import Plan, Sampling, generate

PROMPTS = (
    "The kernel reads a file",
    "内核读取文件。安装程序",
    "def main():\n",
    "Once upon a time there was a small cat that",
    "x",
    "Install the package",
)
PLANS = (
    None,
    "{g}/6/423:set:90",
    "{g}/4/12:add:25@generation",
    "{g}/4/5:ablate",
    "{g}/6/423:add:40@generation,gate={g}/2/30>5",
    "{g}/6/7:project_out",
)
TOKENS = 10


class Machine:
    """An engine on a mini, and what `generate` says to the same questions."""

    def __init__(self, name: str, **options: Any) -> None:
        self.group = f"{name}/w1k-l0-16"
        bridge = load_model(name)
        self.tokenizer = bridge.tokenizer
        self.model: Any = bridge.release()
        self._saes: dict[str, Any] = {}
        self.engine = Engine(self.model, self.tokenizer, self.sae_of, **options)
        self.steps: queue.Queue[tuple[Row, Step]] = queue.Queue()

    def sae_of(self, name: str) -> Any:
        if name not in self._saes:
            self._saes[name] = load_sae(name)
        return self._saes[name]

    def plan(self, text: str | None) -> Plan | None:
        return None if text is None else Plan.of(text.format(g=self.group))

    def wanted(self, prompt: str, plan: str | None, **more: Any) -> Wanted:
        ids = tuple(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return Wanted(ids, TOKENS, plan=self.plan(plan), **more)

    def submit(self, wanted: Sequence[Wanted]) -> list[Row]:
        return self.engine.submit(wanted, lambda row, step: self.steps.put((row, step)))

    def finish(self, rows: Sequence[Row]) -> list[list[int]]:
        left = {id(row) for row in rows}
        while left:
            row, step = self.steps.get(timeout=60)
            if step.error is not None:
                raise step.error
            if step.reason is not None:
                left.discard(id(row))
        return [row.tokens for row in rows]

    def alone(self, prompt: str, plan: str | None, sampling: Sampling) -> list[int]:
        chosen = self.plan(plan)
        needed = (
            {} if chosen is None else {str(r.sae): self.sae_of(str(r.sae)) for r in chosen.refs}
        )
        [found] = generate(
            self.model,
            [prompt],
            chosen,
            needed,
            tokenizer=self.tokenizer,
            sampling=sampling,
            must_fire=False,
        )
        return list(found.ids)


@pytest.fixture(scope="module", params=["mini-qwen3", "mini-qwen3.5"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    found = Machine(request.param, rows=4, prefix_tokens=200)
    yield found
    found.engine.close()


def test_every_reply_equals_its_single_run(machine: Machine) -> None:
    """Six requests share four rows, so that rows join and leave while others go on. The second
    time the prompts come from the prefix cache."""
    for temperature in (0.0, 1.0) if machine.group.startswith("mini-qwen3/") else (1.0,):
        sampling = Sampling(TOKENS, temperature, 0.9 if temperature else 1.0, seed=11)
        pairs = list(zip(PROMPTS, PLANS, strict=True))
        single = [machine.alone(*pair, sampling) for pair in pairs]
        for again in (False, True):
            rows = machine.submit(
                [
                    machine.wanted(
                        *pair,
                        temperature=temperature,
                        top_p=sampling.top_p,
                        seed=11,
                        layers=(4,) if i % 2 else (),
                    )
                    for i, pair in enumerate(pairs)
                ]
            )
            assert machine.finish(rows) == single
            for row in rows:
                for parts in row.residuals.values():  # every token of the text was read once
                    assert sum(map(len, parts)) == len(row.ids)
            if again and temperature:
                assert sum(row.cached for row in rows) > 10
    assert machine.engine.gauges["rows"] == machine.engine.gauges["waiting"] == 0
    assert machine.engine.gauges["prefix_tokens"] <= 200


def test_reports_and_residuals_do_not_depend_on_the_cache(machine: Machine) -> None:
    """A plan that acts on the prompt reports the same where the prompt was known."""
    wanted = machine.wanted(
        "The kernel reads a file and then it reads", "{g}/4/12:add:9", temperature=0, layers=(4,)
    )
    rows = []
    for _ in range(2):
        [row] = machine.submit([wanted])
        machine.finish([row])
        rows.append(row)
    first, second = rows
    assert (first.cached, second.cached) == (0, len(wanted.prompt))
    assert first.report is not None
    assert second.report is not None
    assert str(first.report) == str(second.report)
    x, y = (torch.cat(row.residuals[4]) for row in rows)
    assert torch.allclose(x, y, atol=1e-4)
    other = machine.wanted(
        "The kernel reads a file and then it reads", "{g}/4/12:add:-9", temperature=0
    )
    [row] = machine.submit([other])
    machine.finish([row])
    assert row.cached == 0  # what another plan did to the prompt is not used


def test_a_prompt_that_is_read_in_between_changes_nothing(machine: Machine) -> None:
    """Neither what the others write nor what their reports say."""
    sampling = Sampling(TOKENS, 0.0)
    prompt, plan = "The kernel reads", "{g}/4/12:add:25"
    expected = machine.alone(prompt, plan, sampling)
    [row] = machine.submit([machine.wanted(prompt, plan, temperature=0)])
    machine.finish([row])
    assert row.tokens == expected
    alone = [(one.selected, one.fired) for one in row.report.edits]  # type: ignore[union-attr]
    [going] = machine.submit([machine.wanted(prompt, plan, temperature=0, streams=True)])
    short = replace(machine.wanted("x", "{g}/6/423:set:300", temperature=0), new_tokens=1)
    asked, ended = 1, 0
    while ended < asked:
        row, step = machine.steps.get(timeout=60)
        assert step.error is None
        ended += step.reason is not None
        if row is going and step.reason is None and asked < 4:
            machine.submit([short])  # ends with its first token
            asked += 1
    assert asked == 4
    assert going.tokens == expected
    assert [(one.selected, one.fired) for one in going.report.edits] == alone  # type: ignore[union-attr]


def test_a_step_that_fails_fails_its_rows_and_no_others(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    wanted = machine.wanted("The kernel", "{g}/4/12:add:25", temperature=0)
    with monkeypatch.context() as patch:
        patch.setattr(machine.engine._batch, "step", fails)
        machine.submit([wanted, wanted])
        errors = [machine.steps.get(timeout=60)[1].error for _ in range(2)]
    assert [str(error) for error in errors] == ["out of memory"] * 2
    assert machine.finish(machine.submit([wanted])) == [
        machine.alone("The kernel", "{g}/4/12:add:25", Sampling(TOKENS))
    ]


def test_a_client_that_goes_away_frees_its_row(machine: Machine) -> None:
    long = machine.wanted("The kernel", None, temperature=0)
    rows = machine.submit([Wanted(long.prompt, 900, 0.0, streams=True) for _ in range(5)])
    machine.steps.get(timeout=60)  # it has begun
    machine.engine.cancel(rows)
    [quick] = machine.submit([long])
    assert len(machine.finish([quick])[0]) <= TOKENS
    assert all(len(row.tokens) < 900 and row.reason == "cut" for row in rows)
    assert machine.engine.gauges["rows"] == 0


def test_limits() -> None:
    machine = Machine("mini-qwen3", rows=1, queue=2, seconds=1.0)
    engine = machine.engine
    release = queue.Queue[None]()
    try:
        engine.call(lambda: release.get(timeout=30))  # the engine is busy
        time.sleep(0.05)
        one = machine.wanted("The", None)
        machine.submit([one, one])
        with pytest.raises(QueueFull, match="queue holds 2"):
            machine.submit([one])
        with pytest.raises(BadText, match="1024"):
            machine.submit([Wanted(one.prompt, 5000)])
        time.sleep(1.1)
        release.put(None)
        for _ in range(2):
            assert isinstance(machine.steps.get(timeout=30)[1].error, TooLate)
        wrong = Wanted((10**9,), 2)  # an embedding that does not exist
        machine.submit([wrong])
        assert isinstance(machine.steps.get(timeout=30)[1].error, IndexError)
        [row] = machine.submit([Wanted(one.prompt, 1)])  # and the next one is served
        machine.finish([row])
    finally:
        release.put(None)
        engine.close()


class Letters:
    """A vocabulary whose tokens are bytes."""

    def bytes_of(self, token: int) -> bytes:
        return bytes([token])


@settings(max_examples=60, deadline=None)
@given(
    st.text("ab.é文", max_size=12),
    st.lists(st.text("ab.é文", min_size=1, max_size=3), max_size=3),
)
def test_text_grows_to_the_first_stop_and_never_beyond(text: str, stops: list[str]) -> None:
    vocabulary: Any = Letters()
    growing = GrowingText(vocabulary, frozenset(), stops)
    shown = ""
    for token in text.encode():
        shown += growing.add(token)
        assert text.startswith(shown)
        if growing.stopped:
            break
    shown += growing.end()
    ends = [at for at in map(text.find, stops) if at >= 0]
    assert growing.stopped == bool(ends)
    if not ends:
        assert shown == growing.text == text
    else:  # the first stop that is complete ends the text where it began
        known = next(text[:k] for k in range(len(text) + 1) if any(s in text[:k] for s in stops))
        cut = min(known.find(stop) for stop in stops if stop in known)
        assert shown == growing.text == text[:cut]
