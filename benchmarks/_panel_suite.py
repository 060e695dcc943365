"""Small benchmarks for the mini models: prompts with one right and some wrong next tokens.

Generated tasks come from the tables of `tools/mini`, cloze items from the held-out texts, which
neither the minis nor the panel were trained on. Some benchmarks are redundant by construction (few
facts, many phrasings), some nested in others, and their sizes differ by a factor of thirty.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qwen_scope_lens.mini import heldout
from tools.mini.tables import CAPITALS, LANGUAGE_NAMES, WORDS

CONTEXT = 24
"""Most tokens before the gap of a cloze item."""


@dataclass(frozen=True)
class Item:
    """The next token after `prompt` is the first of `options`, or one of the wrong others."""

    prompt: str
    options: tuple[int, ...]  # token ids, the right one first


class Maker:
    """Makes items with one tokenizer."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    def item(self, prompt: str, answer: str, wrong: Iterable[str]) -> Item | None:
        """None where an answer does not continue the prompt token by token."""
        before = self.ids(prompt)
        firsts = []
        for text in (answer, *wrong):
            whole = self.ids(prompt + text)
            if whole[: len(before)] != before or len(whole) == len(before):
                if text == answer:
                    return None
                continue
            firsts.append(whole[len(before)])
            if len(set(firsts)) == 4:
                break
        options = tuple(dict.fromkeys(firsts))[:4]
        return Item(prompt, options) if len(options) == 4 else None

    def digits(self, prompt: str, answer: int, rng: random.Random) -> Item | None:
        """One digit of a number, after the digits before it; all ten are options."""
        text = str(answer)
        at = rng.randrange(len(text))
        numbers = [self.ids(d)[0] for d in "0123456789"]
        right = numbers[int(text[at])]
        return Item(prompt + text[:at], (right, *(n for n in numbers if n != right)))

    def fill(
        self, size: int, name: str, make: Callable[[random.Random], Item | None]
    ) -> list[Item]:
        """At most `size` different items; fewer where `make` has no more."""
        rng = random.Random(f"{self.seed}/{name}")
        found: dict[str, Item] = {}
        for _ in range(12 * size):
            item = make(rng)
            if item is not None:
                found.setdefault(item.prompt, item)
            if len(found) == size:
                break
        return list(found.values())


def sums(maker: Maker, digits: int, operators: str) -> Callable[[random.Random], Item | None]:
    low, high = (0, 10**digits - 1) if digits == 1 else (10 ** (digits - 1), 10**digits - 1)

    def make(rng: random.Random) -> Item | None:
        a, b, operator = rng.randint(low, high), rng.randint(low, high), rng.choice(operators)
        if operator == "-" and b > a:
            a, b = b, a
        answer = {"+": a + b, "-": a - b, "*": a * b}[operator]
        return maker.digits(f"{a} {operator} {b} = ", answer, rng)

    return make


def chains(maker: Maker) -> Callable[[random.Random], Item | None]:
    def make(rng: random.Random) -> Item | None:
        a, b, c = rng.randint(0, 9), rng.randint(0, 9), rng.randint(2, 9)
        return maker.digits(f"{a} * {b} + {c} = ", a * b + c, rng)

    return make


def stories(maker: Maker) -> Callable[[random.Random], Item | None]:
    people, goods = ("Anna", "Ben", "Clara", "David", "Mia", "Tom"), ("apples", "books", "coins")

    def make(rng: random.Random) -> Item | None:
        a, b = rng.randint(5, 40), rng.randint(1, 30)
        who, what = rng.choice(people), rng.choice(goods)
        story = f"{who} has {a} {what} and gets {b} more. How many {what} are there?\n"
        return maker.digits(f"{story}The answer is ", a + b, rng)

    return make


def translations(
    maker: Maker, languages: tuple[str, ...]
) -> Callable[[random.Random], Item | None]:
    def make(rng: random.Random) -> Item | None:
        source, target = rng.sample(languages, 2)
        word, *others = rng.sample(WORDS, 7)
        head = f"{LANGUAGE_NAMES[source]} - {LANGUAGE_NAMES[target]}\n"
        prompt = f"{head}{word[source]} -"
        return maker.item(prompt, " " + word[target], (" " + other[target] for other in others))

    return make


def spellings(
    maker: Maker, words: list[str], frames: tuple[str, ...]
) -> Callable[[random.Random], Item | None]:
    def make(rng: random.Random) -> Item | None:
        word = rng.choice(words)
        at = rng.randrange(1, len(word))
        prompt = rng.choice(frames).format(word=word) + "-".join(word[:at])
        letters = [x for x in "abcdefghijklmnopqrstuvwxyz" if x != word[at]]
        rng.shuffle(letters)
        return maker.item(prompt, "-" + word[at], ("-" + x for x in letters))

    return make


def capitals(maker: Maker, frames: tuple[str, ...]) -> Callable[[random.Random], Item | None]:
    def make(rng: random.Random) -> Item | None:
        (land, city), *others = rng.sample(sorted(CAPITALS.items()), 7)
        prompt = rng.choice(frames).format(land=land)
        return maker.item(prompt, " " + city, (" " + other for _, other in others))

    return make


FRAMES = ("The capital of {land} is", "What is the capital of {land}?")
OPENINGS = (
    "",
    "We know it: ",
    "Note: ",
    "Well, ",
    "Yes. ",
    "Read this. ",
    "Of course, ",
    "Listen: ",
)
PHRASES = tuple(
    start + frame
    for start in OPENINGS
    for frame in (
        "The capital of {land} is",
        "the capital city of {land} is",
        "In {land} the capital is",
    )
)


def cloze(maker: Maker, records: list[dict[str, Any]], name: str) -> Iterator[Item]:
    """Gaps in held-out texts, in a random order; the wrong options are other tokens of theirs."""
    rng = random.Random(f"{maker.seed}/{name}")
    rows = [(r["text"], maker.tokenizer(r["text"], return_offsets_mapping=True)) for r in records]
    pool = [token for _, row in rows for token in row["input_ids"]]
    gaps = [(n, at) for n, (_, row) in enumerate(rows) for at in range(6, len(row["input_ids"]))]
    rng.shuffle(gaps)
    for n, at in gaps:
        text, row = rows[n]
        ids, spans = row["input_ids"], row["offset_mapping"]
        start = max(0, at - CONTEXT)
        prompt = text[spans[start][0] : spans[at][0]]
        if spans[at - 1][1] != spans[at][0] or maker.ids(prompt) != ids[start:at]:
            continue  # inside a character, or the cut changes the tokens
        options = tuple(dict.fromkeys([ids[at], *rng.sample(pool, 12)]))[:4]
        if len(options) == 4:
            yield Item(prompt, options)


def build_suite(tokenizer: Any, seed: int = 8) -> tuple[dict[str, list[Item]], list[Item]]:
    """The benchmarks by name, and the broad control benchmark, whose items are its own."""
    suite = _tasks(Maker(tokenizer, seed), gaps := _gaps(Maker(tokenizer, seed)), 1.0)
    control_tasks = _tasks(Maker(tokenizer, seed + 1), gaps, 0.15)
    known = {item.prompt for items in suite.values() for item in items}
    control = [i for items in control_tasks.values() for i in items if i.prompt not in known]
    rng = random.Random(seed)
    rng.shuffle(control)

    def mixed(size: int, whole: tuple[str, ...], parts: tuple[str, ...]) -> list[Item]:
        """All items of some benchmarks, filled up with items of others."""
        items = [item for name in whole for item in suite[name]]
        rest = [item for name in parts for item in suite[name]]
        items += rng.sample(rest, min(len(rest), max(0, size - len(items))))
        return list({item.prompt: item for item in items}.values())

    suite["arithmetic"] = mixed(1500, ("1-digit",), ("2-digit", "3-digit", "chains", "stories"))
    suite["translation"] = mixed(1200, ("russian words",), ("european words", "cjk words"))
    suite["prose"] = mixed(3000, ("korean", "russian"), ("english", "german", "chinese", "others"))
    del suite["others"], suite["russian words"]
    return suite, control[:1500]


def _gaps(maker: Maker) -> Callable[[str, int], list[Item]]:
    streams: dict[str, Iterator[Item]] = {}

    def take(name: str, size: int) -> list[Item]:
        domain, _, langs = name.partition("/")
        if name not in streams:
            records = [r for r in heldout(domain) if not langs or r["lang"] in langs.split(",")]
            streams[name] = cloze(maker, records, name)
        found: dict[str, Item] = {}
        for item in streams[name]:
            found.setdefault(item.prompt, item)
            if len(found) == size:
                break
        return list(found.values())

    return take


def _tasks(
    maker: Maker, gaps: Callable[[str, int], list[Item]], scale: float
) -> dict[str, list[Item]]:
    words = sorted({w for row in WORDS if (w := row["en"].lower()).isascii() and len(w) > 2})
    few = random.Random(maker.seed).sample(words, 8)
    openings = tuple(f"{start}{{word}}: " for start in (*OPENINGS, "Spell it. ", "Go on. "))
    made = {
        "1-digit": (200, sums(maker, 1, "+-*")),
        "2-digit": (1000, sums(maker, 2, "+-")),
        "3-digit": (700, sums(maker, 3, "+-")),
        "chains": (300, chains(maker)),
        "stories": (500, stories(maker)),
        "european words": (600, translations(maker, ("en", "de", "fr", "es"))),
        "cjk words": (600, translations(maker, ("en", "zh", "ja", "ko"))),
        "russian words": (300, translations(maker, ("en", "ru"))),
        "spelling": (200, spellings(maker, words, ("{word}: ",))),
        "spelling, 8 words": (350, spellings(maker, few, openings)),
        "capitals": (100, capitals(maker, FRAMES)),
        "capitals, rephrased": (1000, capitals(maker, PHRASES)),
    }
    found: dict[str, list[Item]] = defaultdict(list)
    for name, (size, make) in made.items():
        found[name] = maker.fill(max(1, round(scale * size)), name, make)
    for name, size, source in (
        ("code", 800, "code"),
        ("english", 1000, "prose/en"),
        ("german", 500, "prose/de"),
        ("chinese", 500, "prose/zh"),
        ("russian", 300, "prose/ru"),
        ("korean", 150, "prose/ko"),
        ("others", 900, "prose/fr,es,ja"),
        ("requests", 600, "request"),
        ("tone", 800, "tone"),
        ("loops", 400, "repetition"),
        ("facts", 250, "knowledge"),
    ):
        found[name] = gaps(source, max(1, round(scale * size)))
    return dict(found)
