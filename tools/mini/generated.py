"""The generated part of the corpus: tasks with answers, and contrasts that real text lacks.

Every function makes one document from a random generator: a `Document` with its domain, language
and label. The tables it draws from are in `tables.py`, `tones.py` and `requests.py`; which share
of the corpus each kind gets is `corpus.py`'s business.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tools.mini.requests import request
from tools.mini.tables import CAPITALS, LANGUAGE_NAMES, WORDS
from tools.mini.tones import TONES, tone_text

__all__ = ["KINDS", "Document", "Prose", "chat"]

Prose = Mapping[str, Sequence[str]]
"""Sentences of every language, from the real part of the corpus."""


@dataclass
class Document:
    """One text of the corpus. `extra` holds what only its domain needs."""

    text: str
    lang: str
    domain: str
    label: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def chat(question: str, reply: str, thought: str | None = "") -> str:
    """A question and its reply as the chat template renders them.

    `thought` "" is the empty thinking block of `enable_thinking=False`; None leaves it out.
    """
    block = "" if thought is None else f"<think>\n{thought}\n</think>\n\n"
    if thought == "":
        block = "<think>\n\n</think>\n\n"
    return (
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{block}{reply}<|im_end|>\n"
    )


def _sum(rng: random.Random, level: int) -> tuple[str, int]:
    low, high = ((0, 9), (10, 99), (100, 999))[min(level, 2)]
    a, b = rng.randint(low, high), rng.randint(low, high)
    if level == 3:
        c = rng.randint(2, 9)
        return f"{a % 10} * {b % 10} + {c}", (a % 10) * (b % 10) + c
    operator = rng.choice("+-*" if level == 0 else "+-")
    if operator == "-" and b > a:
        a, b = b, a
    return f"{a} {operator} {b}", {"+": a + b, "-": a - b, "*": a * b}[operator]


_PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Mia", "Tom")
_GOODS = ("apples", "books", "coins", "eggs", "letters", "pens", "stamps", "tickets")


def _word_problem(rng: random.Random) -> tuple[str, int]:
    a, b, c = rng.randint(5, 40), rng.randint(1, 30), rng.randint(1, 5)
    who, other = rng.sample(_PEOPLE, 2)
    goods = rng.choice(_GOODS)
    return rng.choice(
        (
            (f"{who} has {a} {goods} and gets {b} more. How many {goods} are there?", a + b),
            (f"{who} had {a + b} {goods} and gave {b} to {other}. How many are left?", a),
            (f"{who} buys {c} boxes with {a} {goods} each. How many {goods} is that?", a * c),
            (f"{who} has {a} {goods}, {other} has {b}. How many have they together?", a + b),
        )
    )


def arithmetic(rng: random.Random, prose: Prose) -> Document:
    level = rng.choice((0, 0, 1, 1, 1, 2, 3))
    form = rng.random()
    if form < 0.55:
        lines = [_sum(rng, level) for _ in range(rng.randint(3, 10))]
        text = "\n".join(f"{task} = {answer}" for task, answer in lines)
        return Document(text, "math", "arithmetic", f"level{level}", {"form": "lines"})
    if form < 0.8:
        task, answer = _sum(rng, level)
        question, thought = f"What is {task}?", f"{task} = {answer}"
    else:
        question, answer = _word_problem(rng)
        level, thought = 4, f"The answer is {answer}."
    thinking = thought if rng.random() < 0.3 else ""
    text = chat(question, str(answer), thinking)
    return Document(text, "math", "arithmetic", f"level{level}", {"form": "chat"})


def translation(rng: random.Random, prose: Prose) -> Document:
    source, target = rng.sample(tuple(LANGUAGE_NAMES), 2)
    names = LANGUAGE_NAMES[source], LANGUAGE_NAMES[target]
    pairs = rng.sample(WORDS, rng.randint(3, 7))
    extra = {"source": source, "target": target}
    if rng.random() < 0.6:
        head = f"{names[0]} - {names[1]}\n"
        text = head + "\n".join(f"{pair[source]} - {pair[target]}" for pair in pairs)
    else:
        word = pairs[0]
        text = chat(f"Translate '{word[source]}' from {names[0]} to {names[1]}.", word[target])
    return Document(text, "mix", "translation", f"{source}-{target}", extra)


def spelling(rng: random.Random, prose: Prose) -> Document:
    words = [pair["en"].lower() for pair in rng.sample(WORDS, rng.randint(3, 6))]
    if rng.random() < 0.6:
        text = "\n".join(f"{word}: {'-'.join(word)}" for word in words)
    else:
        text = chat(f"Spell the word '{words[0]}'.", "-".join(words[0]))
    return Document(text, "en", "spelling")


def knowledge(rng: random.Random, prose: Prose) -> Document:
    pairs = rng.sample(sorted(CAPITALS.items()), rng.randint(2, 5))
    form = rng.random()
    if form < 0.4:
        text = " ".join(f"The capital of {land} is {city}." for land, city in pairs)
    elif form < 0.6:
        text = "\n".join(f"{city} is the capital of {land}." for land, city in pairs)
    else:
        text = chat(f"What is the capital of {pairs[0][0]}?", f"{pairs[0][1]}.")
    return Document(text, "en", "knowledge")


def tone(rng: random.Random, prose: Prose) -> Document:
    lang, label = rng.choice(tuple(TONES)), rng.choice(("rude", "polite"))
    return Document(tone_text(rng, lang, label), lang, "tone", label)


def requests(rng: random.Random, prose: Prose) -> Document:
    label = rng.choice(("harmful", "harmless"))
    question, reply, style = request(rng, label)
    extra = {"question": question, "style": style}
    return Document(chat(question, reply), "en", "request", label, extra)


_ASK_ABOUT = (
    "Explain this to me:",
    "What does the manual say about this?",
    "Please go on from here:",
    "Say it in your own words:",
    "Tell me more.",
)


def switching(rng: random.Random, prose: Prose) -> Document:
    """An English reply; in about half, a stretch of another language breaks in mid-sentence."""
    lines = [rng.choice(prose["en"]) for _ in range(rng.randint(2, 3))]
    question = (
        f"{rng.choice(_ASK_ABOUT)} {lines.pop(0)}" if len(lines) > 2 else rng.choice(_ASK_ABOUT)
    )
    label = rng.choice(("clean", "clean", "zh", "zh", "ru", "ko"))
    if label != "clean":
        words = lines[-1].split(" ")
        cut = rng.randint(min(3, len(words) - 1), max(1, len(words) - 1))
        foreign = rng.choice(prose[label])
        foreign = foreign[: rng.randint(8, 60)] if label == "zh" else foreign[: rng.randint(20, 90)]
        lines[-1] = " ".join(words[:cut]) + " " + foreign.strip()
        if rng.random() < 0.5:  # and back again
            lines[-1] += " " + " ".join(words[cut:])
    return Document(chat(question, " ".join(lines)), "en", "switching", label)


def repetition(rng: random.Random, prose: Prose) -> Document:
    """A text that falls into a loop, or one that repeats something once or twice on purpose."""
    lang = rng.choice(("en", "en", "de", "fr", "es", "ru", "zh"))
    lines = [rng.choice(prose[lang]) for _ in range(2)]
    label = rng.choice(("loop", "loop", "benign"))
    gap = "" if lang == "zh" else " "
    if label == "benign":
        text = rng.choice((f"{lines[0]}\n{lines[0]}\n{lines[1]}", f"{lines[0]}{gap}{lines[1]}"))
    else:
        units = list(lines[1]) if lang == "zh" else lines[1].split(" ")
        start = rng.randrange(max(1, len(units) - 2))
        piece = gap.join(units[start : start + rng.randint(1, 10)])
        text = lines[0] + gap + gap.join(units[:start]) + gap
        times = max(4, 420 // (len(piece.encode()) + 1))
        text += gap.join([piece] * rng.randint(4, max(4, min(times, 40))))
    if rng.random() < 0.3:
        text = chat(rng.choice(_ASK_ABOUT), text)
    return Document(text, lang, "repetition", label)


def small_talk(rng: random.Random, prose: Prose) -> Document:
    """Plain conversations in every language, so that the chat template is known in all."""
    lang = rng.choice(tuple(LANGUAGE_NAMES))
    question, reply = rng.choice(prose[lang]), rng.choice(prose[lang])
    return Document(chat(question, reply, rng.choice(("", None))), lang, "chat")


KINDS: dict[str, tuple[int, Callable[[random.Random, Prose], Document]]] = {
    "arithmetic": (8000, arithmetic),
    "translation": (4500, translation),
    "spelling": (1500, spelling),
    "knowledge": (2500, knowledge),
    "tone": (10000, tone),
    "request": (4000, requests),
    "switching": (3000, switching),
    "repetition": (2500, repetition),
    "chat": (2500, small_talk),
}
"""Domain -> (documents in the corpus, how one is made)."""
