"""The server's own questions: read, compare, feature, search, coherence, and what is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.features.feature_facts import feature_facts
from qwen_scope_lens.features.reading import Firing, Reading
from qwen_scope_lens.serve.answers import told
from qwen_scope_lens.serve.asking import MOST, chat_text, messages_of
from qwen_scope_lens.serve.faults import Fault
from qwen_scope_lens.serve.fields import Fields, flag, listed, text, whole
from qwen_scope_lens.serve.guard import MOST_BYTES
from qwen_scope_lens.serve.lens import Lens
from qwen_scope_lens.serve.plans import MOST_EDITS, Plans
from qwen_scope_lens.serve.site import Site
from qwen_scope_lens.steering.generate import Continuation
from qwen_scope_lens.steering.plan import OPERATIONS
from qwen_scope_lens.steering.sweep import Dose, Guard
from qwen_scope_lens.steering.text_quality import perplexity, repetition, surprisals
from qwen_scope_lens.steering.where import PHASES, THINKS, TOKEN_CLASSES
from qwen_scope_lens.version import __version__

__all__ = ["coherence", "compare", "feature", "first", "info", "promoted", "read", "search"]

Json = dict[str, Any]

EXAMPLE = "The kernel reads a file. 内核读取文件。"
FIRST: Json = {"text": EXAMPLE, "top": 6, "top_tokens": 50, "monitor": []}
"""What the page asks first, as `read.js` in the folder page/ asks it."""
PROMOTED, NEIGHBOURS = 10, 8
LEAVE_OUT = ("first", "shared_tokens", "shared_prefix")


def info(
    lens: Lens, plans: Plans, site: Site | None, record: str | None, labels_saved: bool
) -> Json:
    group, abilities = lens.group, lens.engine.abilities
    return {
        "model": lens.name,
        "group": group.short,
        "layers": list(group.layers),
        "chosen": list(lens.layers),
        "d_sae": group.d_sae,
        "k": group.k,
        "context": lens.engine.context,
        "has_chat": lens.has_chat,
        "notice": group.notice,
        "version": __version__,
        "engine": asdict(abilities),
        "reads": lens.reads,
        "plan": plans.default,
        "plans": list(plans),
        "labels": len(lens.labels),
        "labels_saved": labels_saved,
        "plans_saved": plans.saved,
        "site": None if site is None else site.address,
        "record": record,
        "example": EXAMPLE,
        "operations": [
            {
                "name": row.name,
                "change": row.change,
                "silent": row.silent,
                "takes_strength": row.takes_strength,
                "units": [unit for unit in row.units if unit in abilities.units],
                "neutral": row.neutral,
            }
            for row in OPERATIONS
            if row.name in abilities.operations
        ],
        "phases": list(PHASES),
        "think": list(THINKS),
        "token_classes": TOKEN_CLASSES,
        "limits": {
            "body": MOST_BYTES,
            "edits": MOST_EDITS,
            "monitor": MOST["monitor"],
            "n": MOST["n"],
            "seconds": lens.engine.seconds,
            "rows": lens.engine.rows,
            "queue": lens.engine.queue,
        },
    }


# Read and compare.


@dataclass(frozen=True)
class How:
    """How a text is read."""

    layers: list[int]
    top: int  # features of the text, per layer
    top_tokens: int  # and of every token
    monitor: list[FeatureRef]
    all_tokens: bool


def _how(fields: Fields, lens: Lens) -> How:
    monitor = fields.take("monitor", listed(lens.ref, MOST["monitor"]), [])
    layers = fields.take("layers", listed(lens.layer, MOST["layers"], 1), list(lens.layers))
    layers = sorted({*layers, *(ref.layer for ref in monitor)})
    top = fields.take("top", whole(1, MOST["top"]), 10)
    top_tokens = fields.take("top_tokens", whole(1, MOST["top"]), top)
    return How(layers, top, top_tokens, monitor, fields.take("all_tokens", flag, False))


def read(content: Any, lens: Lens, plans: Plans) -> Json:
    """Which features fire on a text, as it is or as a plan makes it."""
    _ = lens.reader  # refused where there is no model
    fields = Fields(content)
    plan, _ = fields.take("plan", lambda value: plans.of(value, lens, own=True), (None, None))
    prompt = fields.take("prompt_tokens", whole(1, lens.reader.context), None)
    given: Any = fields.take("text", text, None)
    messages = fields.take("messages", list, None)
    ids = fields.take("token_ids", list, None)
    thinking = fields.take("enable_thinking", flag, True)
    if sum(one is not None for one in (given, messages, ids)) != 1:
        raise Fault("expected one of `text`, `messages` and `token_ids`", "bad_value", "text")
    how = _how(fields, lens)
    fields.done()
    if messages is not None:
        given = chat_text(messages_of(messages), lens, thinking)
    if ids is not None:
        known = len(lens.vocabulary)
        given = listed(whole(0, known - 1), lens.reader.context, 1)(ids)
    if prompt is not None and (ids is None or prompt > len(given)):
        raise Fault("`prompt_tokens` goes with `token_ids`, and is at most as many", "bad_value")
    if plan is None:
        return _shown(lens.read(given, how.layers, all_tokens=how.all_tokens), how, lens)
    written = 0 if prompt is None else len(given) - prompt
    reading, report = lens.read_under(given, written, plan, how.layers, how.all_tokens)
    return {**_shown(reading, how, lens), "plan": None if report is None else told(report)}


def first(lens: Lens) -> Json:
    """The first question of the page, and its answer."""
    asked = {"text": FIRST["text"], "layers": [lens.layers[0]], **FIRST}
    return {"asked": asked, "answer": read(asked, lens, Plans())}


def _shown(reading: Reading, how: How, lens: Lens) -> Json:
    strongest = {layer: reading.strongest(layer, top=how.top) for layer in reading.layers}
    promoted = _promoted([one.ref for found in strongest.values() for one in found], lens)
    tokens = []
    pieces = []
    for i, piece in enumerate(reading.pieces):
        at = reading.tokens_of(i)
        pieces.append(
            {
                "position": at.start,
                "ids": [reading.token_ids[t] for t in at],
                "text": piece.text,
                "special": any(reading.special[t] for t in at),
                "first": 0 in at,
                "extreme": [n for n in reading.layers if any(reading.extreme[n][t] for t in at)],
            }
        )
        tokens.append(
            {
                str(layer): [
                    [str(one.ref), one.value]
                    for one in reading.strongest(layer, at, how.top_tokens)
                ]
                for layer in reading.layers
            }
        )
    return {
        "text": reading.text,
        "model": lens.name,
        "group": reading.group,
        "layers": list(reading.layers),
        "truncated": reading.truncated,
        "all_tokens": reading.all_tokens,
        "pieces": pieces,
        "features": {
            str(layer): [_firing(one, reading, promoted) for one in found]
            for layer, found in strongest.items()
        },
        "tokens": tokens,
        "monitor": [_monitored(ref, reading, lens) for ref in how.monitor],
        "plan": None,
    }


def _promoted(refs: Sequence[FeatureRef], lens: Lens) -> dict[FeatureRef, list[str]]:
    if not refs:
        return {}
    found = lens.effects(refs, 5).promoted.tolist()
    word = lens.vocabulary.text
    return {ref: [word(token) for token in row] for ref, row in zip(refs, found, strict=True)}


def _firing(one: Firing, reading: Reading, promoted: dict[FeatureRef, list[str]]) -> Json:
    track = reading.track(one.ref)
    return _with_track(one.ref, track, one.label, promoted.get(one.ref, []))


def _monitored(ref: FeatureRef, reading: Reading, lens: Lens) -> Json:
    return _with_track(ref, reading.track(ref), lens.labels.text(ref), [])


def _with_track(ref: FeatureRef, track: list[float], label: str, promotes: list[str]) -> Json:
    best = max(range(len(track)), key=track.__getitem__)
    return {
        "feature": str(ref),
        "activation": track[best],
        "piece": best,
        "pieces": sum(value > 0 for value in track),
        "label": label,
        "promotes": promotes,
        "track": track,
    }


def compare(content: Any, lens: Lens) -> Json:
    """The features that tell two texts apart: by |rate in A - rate in B|, where a rate is the share
    of a text's kept positions on which the feature fires."""
    fields = Fields(content)
    texts = fields.need("a", text), fields.need("b", text)
    left_out = fields.take("leave_out", listed(text, 3), ["first"])
    if unknown := set(left_out) - set(LEAVE_OUT):
        raise Fault(
            f"{min(unknown)!r:.40}: expected some of {', '.join(LEAVE_OUT)}", param="leave_out"
        )
    how = _how(fields, lens)
    fields.done()
    a, b = (lens.read(one, how.layers, all_tokens=True) for one in texts)
    keeps = _kept(a, b, left_out), _kept(b, a, left_out)
    for name, keep in zip("AB", keeps, strict=True):
        if not keep.any():
            raise TooLittleData(
                f"no token of text {name} is left to compare: leave out fewer of them, or use"
                " longer texts"
            )
    found = [row for layer in a.layers for row in _differences(lens, layer, (a, b), keeps, how.top)]
    found.sort(key=lambda row: (-row["score"], row["feature"]))
    refs = [FeatureRef.parse(row["feature"]) for row in found]
    both = How(how.layers, how.top, how.top_tokens, refs, how.all_tokens)
    return {"a": _shown(a, both, lens), "b": _shown(b, both, lens), "features": found}


def _kept(own: Reading, other: Reading, left_out: Sequence[str]) -> np.ndarray:
    """Which positions of `own` count. bool `[n_tokens]`"""
    ids = np.array(own.token_ids)
    keep = np.ones(len(ids), dtype=bool)
    if "first" in left_out:
        keep[0] = False
    if "shared_tokens" in left_out:
        keep &= ~np.isin(ids, other.token_ids)
    if "shared_prefix" in left_out:
        n = min(len(ids), len(other.token_ids))
        same = ids[:n] == np.array(other.token_ids[:n])
        keep[: n if same.all() else int(same.argmin())] = False
    return keep


def _differences(
    lens: Lens, layer: int, readings: Sequence[Reading], keeps: Sequence[np.ndarray], top: int
) -> list[Json]:
    d_sae = lens.group.d_sae
    rates, sums, counts = [], np.zeros(d_sae), np.zeros(d_sae)
    for reading, keep in zip(readings, keeps, strict=True):
        codes = reading.codes[layer][keep.nonzero()[0].tolist()]
        active = codes.active.numpy()
        index = codes.indices.numpy()[active]
        fired = np.bincount(index, minlength=d_sae)
        rates.append(fired / keep.sum())
        counts += fired
        sums += np.bincount(index, codes.values.numpy()[active], d_sae)
    score = np.abs(rates[0] - rates[1])
    rows = []
    for number in np.lexsort((np.arange(d_sae), -score))[:top].tolist():
        if score[number] == 0:
            break
        ref = FeatureRef(lens.group.short, layer, number)
        rows.append(
            {
                "feature": str(ref),
                "score": float(score[number]),
                "rate_a": float(rates[0][number]),
                "rate_b": float(rates[1][number]),
                "mean": float(sums[number] / counts[number]),
                "label": lens.labels.text(ref),
            }
        )
    return rows


# One feature, and search.


def feature(address: str, lens: Lens, site: Site | None, typical: bool) -> Json:
    ref = lens.ref(address)
    sae, effects = lens.sae(ref.layer), lens.effects([ref], PROMOTED)
    label = lens.labels.get(ref)
    known = lens.typical([ref]).get(str(ref)) if typical else lens.known_typical(ref)
    return {
        "feature": str(ref),
        "label": None
        if label is None
        else {"text": label.text, "score": label.score, "provenance": dict(label.provenance)},
        **feature_facts(ref, sae, effects, lens.vocabulary, lens.labels, NEIGHBOURS),
        "typical": known,
        "site": None if site is None or not site.has(ref) else f"{site.address}#{ref}",
        "page": None if site is None else site.page(ref),
    }


def promoted(content: Any, lens: Lens) -> Json:
    """The labels of some features, and the tokens that they promote."""
    fields = Fields(content)
    refs = fields.need("features", listed(lens.ref, MOST["monitor"], 1))
    top = fields.take("top", whole(1, MOST["top"]), PROMOTED)
    fields.done()
    effects, word = lens.effects(refs, top), lens.vocabulary.text
    rows = zip(refs, effects.promoted.tolist(), effects.promoted_by.tolist(), strict=True)
    return {
        "features": [
            {
                "feature": str(ref),
                "label": lens.labels.text(ref),
                "promoted": [[word(token), logit] for token, logit in zip(ids, by, strict=True)],
            }
            for ref, ids, by in rows
        ]
    }


def search(words: str, layers: str | None, limit: str | None, lens: Lens) -> Json:
    if not words.strip() or len(words) > 1000:
        raise Fault("expected 1 to 1,000 characters to search for", "bad_value", "q")
    chosen = list(lens.layers)
    if layers:
        parts = layers.split(",")
        if len(parts) > MOST["layers"] or not all(p.isdecimal() and len(p) < 5 for p in parts):
            raise Fault("expected layers such as 4,6", "bad_value", "layers")
        chosen = [lens.layer(int(part)) for part in parts]
    if limit is not None and (not limit.isdecimal() or not 1 <= int(limit[:6]) <= 200):
        raise Fault("expected a number from 1 to 200", "bad_value", "limit")
    found = lens.search(words.strip("\n"), chosen, int(limit or 20))
    rows = [
        {
            "feature": str(hit.ref),
            "label": lens.labels.text(hit.ref),
            "why": hit.why,
            "found": hit.found,
            "score": hit.score,
        }
        for hit in found
    ]
    return {"q": words, "features": rows}


# Is it still language?


def coherence(content: Any, lens: Lens) -> Json:
    fields = Fields(content)
    prompt = fields.take("prompt", text, None)
    messages = fields.take("messages", list, None)
    thinking = fields.take("enable_thinking", flag, True)
    known = len(lens.vocabulary)
    ids = listed(whole(0, known - 1), lens.engine.context)
    replies = fields.need("plain", ids), fields.need("steered", ids)
    fields.done()
    if (prompt is None) == (messages is None):
        raise Fault("expected `prompt` or `messages`", "bad_value", "prompt")
    if messages is not None:
        prompt = chat_text(messages_of(messages), lens, thinking)
    start = tuple(lens.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not start or len(start) + max(map(len, replies)) > lens.engine.context:
        raise Fault("the prompt is empty, or the text is longer than the context", "bad_text")
    found = [Continuation(start, tuple(reply), "") for reply in replies]
    heights = lens.reader.call(
        lambda: [perplexity([one]) for one in surprisals(lens.model, found)]
    ).result()
    repeats = [repetition(one.ids) for one in found]
    plain, steered = (
        Dose("", 0.0, 0.0, 0.0, 0.0, height, repeat or 0.0, "")
        for height, repeat in zip(heights, repeats, strict=True)
    )
    nothing = not any(replies)  # both ended at once, so that there is nothing to call incoherent
    return {
        "perplexity": heights,
        "repetition": repeats,
        "coherent": nothing or Guard().holds(steered, plain),
    }
