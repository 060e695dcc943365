"""What the app's buttons do: functions from values of its fields to values of its fields.

All that is kept here of a visitor is which run they may stop; their choices come as session state.
"""

from __future__ import annotations

import functools
import html
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.app.steering_run import Outcome, Step, run_steering
from qwen_scope_lens.app.workbench import Kept, Workbench, compare
from qwen_scope_lens.errors import BadPlan, BadText, ScopeError
from qwen_scope_lens.extras import require
from qwen_scope_lens.features.reading import Reading
from qwen_scope_lens.files import json_text, parse_json
from qwen_scope_lens.steering.generate import Sampling
from qwen_scope_lens.steering.plan import FORMAT, MADE_BY, VERSION, Edit, Plan, find_operation

if TYPE_CHECKING:
    import gradio as gr
else:
    gr = require("gradio", "app")  # its types tell it which arguments are its own

__all__ = ["CUSTOM", "FORMS", "LEFT_OUT", "PRESETS", "Actions"]

Rows = list[list[Any]]
Edits = list[dict[str, Any]]

PRESETS = {
    "raw": {"Light": 5.0, "Medium": 20.0, "Strong": 100.0},
    "typical": {"Light": 0.5, "Medium": 1.0, "Strong": 2.0},
    "norm": {"Light": 0.05, "Medium": 0.1, "Strong": 0.3},
}
"""By unit. Those of `raw` are the official demo's, which after a comparison takes `OF_SCORE` times
the score instead: far below the activations of most features. The others are our own."""
OF_SCORE = {"Light": 0.5, "Medium": 2.0, "Strong": 10.0}
CUSTOM = "Custom"

FORMS = {"plain text": None, "chat": False, "chat, thinking": True}
"""How a prompt is given to the model -> `enable_thinking`."""

PAUSE = 0.3
"""Seconds between two pictures of a text that grows."""

LEFT_OUT = ("the first token", "tokens that both have", "the prefix that both have")
"""In the order of `Kept`'s fields."""


def told(work: Callable[..., Any]) -> Callable[..., Any]:
    """A refusal of the package is shown in its own words."""

    @functools.wraps(work)
    def wrapped(*values: Any) -> Any:
        try:
            return work(*values)
        except ScopeError as error:
            raise gr.Error(html.escape(str(error)), duration=None) from error

    return wrapped


def changing(work: Callable[..., Edits]) -> Callable[..., tuple[Any, ...]]:
    """Wrap an action on the plan: it returns the plan, its table, its text as in a file, the Save
    button, and what was refused, in words."""

    @functools.wraps(work)
    def wrapped(self: Actions, edits: Edits, *values: Any) -> tuple[Any, ...]:
        try:
            changed = work(self, edits, *values)
            rows, text = _shown_plan(changed)
        except ScopeError as error:
            refused = f"<p role='alert'>{html.escape(str(error))}</p>"
            return gr.skip(), gr.skip(), gr.skip(), gr.skip(), refused
        return changed, rows, text, gr.Button(interactive=bool(text)), ""

    return wrapped


class Actions:
    """The actions; one object serves all visitors."""

    def __init__(self, bench: Workbench, site: str | None) -> None:
        self._bench, self._site = bench, site
        self._runs: dict[str, threading.Event] = {}

    # Read.

    @told
    def read(
        self,
        text: str,
        layers: list[str],
        top: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Reading, list[tuple[str, None]], Rows]:
        reading = self._bench.read(text, [int(layer) for layer in layers], _told_to(progress))
        plain = [(piece.text, None) for piece in reading.pieces]
        return reading, plain, _firings(reading, None, top)

    def on_token(self, reading: Reading | None, top: int, event: gr.SelectData) -> Any:
        if reading is None:  # the server was started again
            return gr.skip()
        return _firings(reading, reading.tokens_of(int(event.index)), top)

    def coloured(self, reading: Reading | None, address: str) -> Any:
        """The text, coloured by one feature's activations."""
        try:
            ref = FeatureRef.parse(address.strip())
        except ScopeError:
            return gr.skip()
        if reading is None or ref.layer not in reading.codes:
            return gr.skip()
        track = reading.track(ref)
        most = max(track) or 1.0
        return [
            (piece.text, value / most if value else None)
            for piece, value in zip(reading.pieces, track, strict=True)
        ]

    # Compare.

    @told
    def compare(
        self,
        a: str,
        b: str,
        layers: list[str],
        top: int,
        left_out: list[str],
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Rows, dict[str, float]]:
        wanted = [int(layer) for layer in layers]
        one, other = (self._bench.read(text, wanted, _told_to(progress)) for text in (a, b))
        kept = Kept(*(name in left_out for name in LEFT_OUT))
        found = compare(self._bench, one, other, int(top), kept)
        rows: Rows = [
            [
                str(row.ref),
                *(round(x, 4) for x in (row.score, row.rate_a, row.rate_b, row.mean)),
                row.label,
            ]
            for row in found
        ]
        return rows, {str(row.ref): row.score for row in found}

    # The chosen feature.

    def picked(self, event: gr.SelectData) -> str:
        return str(event.row_value[0])

    def about(self, address: str) -> str:
        """What is known about the feature, as HTML; every text in it is escaped."""
        bench = self._bench
        try:
            ref = FeatureRef.parse(address.strip())
            if ref.group != bench.group.short:
                raise BadPlan(f"{ref} is not a feature of {bench.group.short}")
            effects = bench.effects(ref)
        except ScopeError as error:
            return f"<p>{html.escape(str(error))}</p>" if address.strip() else ""
        parts = [f"<p><bdi>{html.escape(bench.labels.text(ref, 'No label.'))}</bdi></p>"]
        for name, tokens in (("Promotes", effects.promoted), ("Suppresses", effects.suppressed)):
            texts = [html.escape(bench.vocabulary.text(token)) for token in tokens[0].tolist()]
            shown = "".join(f"<bdi>{text}</bdi>" for text in texts)
            parts.append(f"<p>{name}</p><div class='tokens'>{shown}</div>")
        if self._site is None:
            parts.append(
                "<p>Its examples and statistics: start with <code>--site</code>, a folder that"
                " <code>qsl dash build</code> wrote.</p>"
            )
        else:
            parts.append(
                f"<p><a href='{html.escape(self._site)}#{ref}' target='_blank' rel='noopener'>"
                "Its page: examples, statistics, neighbours</a></p>"
            )
        return "".join(parts)

    # The plan.

    def preset(self, kind: str, unit: str, address: str, scores: dict[str, float]) -> Any:
        """The strength behind a name. `scores` are the last comparison's; where the feature is not
        among them, the largest counts."""
        if kind == CUSTOM:
            return gr.skip()
        score = scores.get(address.strip(), max(scores.values(), default=0.0))
        if unit == "raw" and score:
            return round(OF_SCORE[kind] * score, 4)
        return PRESETS[unit][kind]

    @changing
    def add(
        self, edits: Edits, address: str, op: str, strength: float | None, unit: str, where: str
    ) -> Edits:
        values: dict[str, Any] = {"ref": address.strip(), "op": op, "where": where or "both"}
        if find_operation(op).takes_strength:
            values |= {"strength": strength, "unit": unit}
        return [*edits, Edit.from_dict(values).to_dict()]

    @changing
    def remove(self, edits: Edits) -> Edits:
        return edits[:-1]

    @changing
    def clear(self, edits: Edits) -> Edits:
        return []

    @changing
    def load(self, edits: Edits, text: str) -> Edits:
        """`text` is the content of a file, which the page itself has read."""
        if not text:  # no file was chosen
            return edits
        try:
            plan = Plan.from_dict(parse_json(text, "this file", FORMAT, VERSION, MADE_BY))
        except TypeError as error:
            raise BadPlan(f"this file is not a plan: {error}") from error
        return [edit.to_dict() for edit in plan.edits]

    # Steer.

    def steer(
        self,
        text: str,
        form: str,
        edits: Edits,
        new_tokens: int,
        temperature: float,
        seed: int,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        session = str(request.session_hash)
        try:
            if not text.strip():
                raise BadText("there is no prompt: type some text")
            thinking = FORMS[form]
            prompt = text if thinking is None else [{"role": "user", "content": text}]
            sampling = Sampling(int(new_tokens), float(temperature), seed=int(seed))
            self._stop(session)
            stop = self._runs[session] = threading.Event()
            now: Step | Outcome = Step(0, sampling.new_tokens)
            plan, shown = plan_of(edits), 0.0
            for now in run_steering(
                self._bench, prompt, plan, sampling, enable_thinking=thinking, stop=stop
            ):
                if isinstance(now, Outcome) or time.monotonic() - shown > PAUSE:
                    yield _shown(now, first=not shown)
                    shown = time.monotonic()
            if isinstance(now, Step):
                yield (f"Stopped after {now.tokens or 0} tokens.", *_shown(now)[1:])
        except ScopeError as error:
            raise gr.Error(html.escape(str(error)), duration=None) from error
        finally:
            self._runs.pop(session, None)

    def stop(self, request: gr.Request) -> None:
        """Stop this visitor's run and no other."""
        self._stop(str(request.session_hash))

    def _stop(self, session: str) -> None:
        if event := self._runs.get(session):
            event.set()


def _firings(reading: Reading, tokens: Sequence[int] | None, top: int) -> Rows:
    return [
        [str(one.ref), round(one.value, 3), one.label]
        for layer in reading.layers
        for one in reading.strongest(layer, tokens, int(top))
    ]


def _shown_plan(edits: Edits) -> tuple[Rows, str]:
    """The table, and what the Save button saves. Edits that contradict each other are refused."""
    rows: Rows = [
        [
            edit["ref"],
            edit["op"],
            edit.get("strength", ""),
            edit.get("unit", ""),
            edit.get("where", "both"),
        ]
        for edit in edits
    ]
    return rows, json_text(FORMAT, VERSION, plan_of(edits).to_dict()) if edits else ""


def plan_of(edits: Edits) -> Plan:
    if not edits:
        raise BadPlan("the plan has no edit: choose a feature and add one")
    return Plan.from_dict({"edits": edits})


def _told_to(progress: Any) -> Callable[[int, int], None]:
    return lambda done, n: progress((done, n), unit="layers")


def _shown(now: Step | Outcome, first: bool = False) -> tuple[Any, ...]:
    """Status, both texts, what the plan did, and both tables of next tokens. The last three are
    emptied at first and then left alone until the end, because drawing tables is slow."""
    if isinstance(now, Step):
        said = f"{now.tokens} of {now.most} tokens"
        if now.tokens is None:
            said = "Waiting for another visitor's run to end"
        return said, now.plain, now.steered, *(("", [], []) if first else [gr.skip()] * 3)
    heights = " → ".join("–" if x is None else f"{x:.2f}" for x in now.perplexities)
    repeats = " → ".join("–" if x is None else f"{x:.0%}" for x in now.repetitions)
    said = "Still language" if now.coherent else "**Incoherent: weaken the plan**"
    said += f" (perplexity under the unsteered model {heights}; repeated 4-grams {repeats})."
    if not now.fired:
        said = f"**The plan never fired:** its places or features did not occur. {said}"
    tables = [[[token, round(p, 4)] for token, p in side] for side in now.next_tokens]
    return said, now.plain, now.steered, now.report, *tables
