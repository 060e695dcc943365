"""Examples of a concept, and near counter-examples, written by a generator.

The prompt is `concept.txt` of `qsl synth templates`. Texts that a model writes about a concept are
its idea of the concept, and they share its style: look at them before you trust what they find.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qwen_scope_lens.errors import GeneratorFailed
from qwen_scope_lens.writers.generator import Generator, Request, Sampling, clean
from qwen_scope_lens.writers.ledger import Ledger
from qwen_scope_lens.writers.templates import Templates

__all__ = ["Written", "examples_requests", "write_examples"]

PAIRS = 5
"""Pairs of one request: few enough that they differ."""
TOKENS = 120
"""Of a pair, at most."""
_LINE = re.compile(r"^\W*(?:\d+\W*)?(yes|no)\b\W*?[:：]\W*?(\S.*)$", re.IGNORECASE)


@dataclass(frozen=True)
class Written:
    """Texts that a generator wrote."""

    examples: tuple[str, ...]
    against: tuple[str, ...]
    generator: str

    def __str__(self) -> str:
        lines = [f"  + {text}" for text in self.examples] + [f"  - {text}" for text in self.against]
        return "\n".join([f"written by {self.generator}:", *lines])


def examples_requests(
    words: str, count: int = 10, templates: Templates | None = None
) -> list[Request]:
    """What a generator is asked for `count` pairs of texts."""
    template = (templates or Templates())["concept"]
    sizes = [min(PAIRS, count - start) for start in range(0, count, PAIRS)]
    return [
        Request(
            template.fill(words=words, count=str(size)),
            "concept",
            seed=number,
            sampling=Sampling(max_tokens=size * TOKENS),
        )
        for number, size in enumerate(sizes)
    ]


def write_examples(
    words: str,
    generator: Generator,
    ledger: Ledger,
    *,
    count: int = 10,
    templates: Templates | None = None,
) -> Written:
    """`count` examples and near counter-examples, or fewer where answers repeat themselves.

    Raises `GeneratorFailed` where no answer has both kinds in the form that was asked for.
    """
    answers = ledger.ask(generator, examples_requests(words, count, templates))
    errors = [answer.error for answer in answers if answer is not None and answer.error]
    if errors and len(errors) == len(answers):
        raise GeneratorFailed(f"{generator.name} gave no answer: {errors[0]}")
    kinds: dict[str, list[str]] = {"yes": [], "no": []}
    for kind, text in _pairs(answer.text for answer in answers if answer is not None):
        kinds[kind].append(text)
    examples, against = (tuple(dict.fromkeys(kinds[kind]))[:count] for kind in ("yes", "no"))
    against = tuple(text for text in against if text not in examples)
    if not examples or not against:
        said = next((answer.text for answer in answers if answer is not None), "")
        raise GeneratorFailed(
            f"{generator.name} wrote {len(examples)} examples and {len(against)} counter-examples:"
            f" expected lines with YES: and NO:, found {said[:120]!r}. Try another model, or give"
            f" --examples and --against; to ask this one again, remove its answers in {ledger.path}"
        )
    return Written(examples, against, generator.name)


def _pairs(answers: Iterable[str]) -> Iterator[tuple[str, str]]:
    for answer in answers:
        for line in clean(answer).splitlines():
            if found := _LINE.match(line.strip()):
                text = clean(found[2].strip("* "))
                if text:
                    yield found[1].casefold(), text
