"""A concept as texts: its words in a few sentences, examples, and what it is compared with.

The words are put into `CARRIERS`, and the same sentences about something else (`FILLERS`) are what
they are compared with, so that only the words differ. Examples are compared with texts that the
user gives, or with the bundled neutral texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from qwen_scope_lens.errors import BadText, TooLittleData, UnknownName

__all__ = [
    "CARRIERS",
    "COLUMNS",
    "FILLERS",
    "Column",
    "Concept",
    "columns_of",
    "neutral_texts",
    "read_examples",
]

Column = Literal["examples", "labels", "meaning", "words", "says"]
COLUMNS: tuple[Column, ...] = get_args(Column)
"""The kinds of evidence, as the table has them."""

CARRIERS = ("{}.", "Topic: {}", "I am reading about {} today.", "This is an example of {}.")
FILLERS = ("the weather", "a small house", "music", "an old friend", "numbers of people")

MOST_EXAMPLES = 500
NEUTRAL_CHARACTERS = 160
"""How much of each neutral text is read: about as much as a sentence."""


@dataclass(frozen=True)
class Concept:
    """What is looked for. `against` replaces the neutral texts as what examples are compared
    with."""

    words: str
    examples: tuple[str, ...] = ()
    against: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.words, str) or not self.words.strip():
            raise BadText("a concept needs some words: such as 'polite refusals'")
        if len(self.words) > 300:
            raise BadText(
                f"the concept has {len(self.words):,} characters: name it in a few words, and give"
                " longer texts as examples"
            )
        for name in ("examples", "against"):
            texts = getattr(self, name)
            if isinstance(texts, str):
                raise BadText(f"{name}: expected several texts, found one: put it into a list")
            texts = tuple(texts)
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise BadText(f"{name}: expected texts, and one is empty or is not a text")
            if len(texts) > MOST_EXAMPLES:
                raise BadText(
                    f"{name}: {len(texts):,} texts, at most {MOST_EXAMPLES} are read. For a"
                    " corpus with labels there is `qsl rank`"
                )
            object.__setattr__(self, name, texts)
        if self.against and not self.examples:
            raise BadText("there are texts to compare with, but no examples: give some")
        if self.against and set(self.against) == set(self.examples):
            raise BadText(
                "the examples and the texts to compare with are the same, so nothing tells them"
                " apart: give other texts to compare with, or leave them out"
            )

    def texts(self) -> Iterator[tuple[str, str]]:
        """Every text that is read, after the name of its group."""
        yield from (("words", carrier.format(self.words)) for carrier in CARRIERS)
        yield from (
            ("fillers", carrier.format(filler)) for filler in FILLERS for carrier in CARRIERS
        )
        if self.examples:
            yield from (("examples", text) for text in self.examples)
            yield from (("neutral", text) for text in self.against or neutral_texts())


def neutral_texts() -> tuple[str, ...]:
    """The beginnings of the bundled texts: prose in ten languages, code, data, arithmetic."""
    from qwen_scope_lens.models.verify import sample_texts  # imports torch

    return tuple(text[:NEUTRAL_CHARACTERS] for text in sample_texts())


def read_examples(path: str | Path) -> tuple[str, ...]:
    """Texts from a file: one per line, or a corpus whose rows have `text`."""
    from qwen_scope_lens.stores.corpus import read_corpus

    found: list[str] = []
    documents: Iterable = read_corpus(path)
    for document in documents:
        if document.text is None:
            raise BadText(f"{path}: expected texts, found a chat")
        found.append(document.text)
        if len(found) > MOST_EXAMPLES:
            break  # `Concept` says what is wrong
    if not found:
        raise BadText(f"{path} has no text")
    return tuple(found)


def columns_of(
    wanted: Sequence[Column] | None, concept: Concept, labels: bool, embedder: bool = False
) -> tuple[Column, ...]:
    """The columns that count: those wanted, or all for which there is something to go by."""
    needs: dict[Column, tuple[str, bool]] = {
        "examples": ("examples", bool(concept.examples)),
        "labels": ("labels", labels),
        "meaning": ("labels and a model for embeddings", labels and embedder),
    }
    possible = [column for column in COLUMNS if column not in needs or needs[column][1]]
    if wanted is None:
        return tuple(possible)
    for column in wanted:
        if column not in COLUMNS:
            raise UnknownName(f"column {column!r}: expected some of {', '.join(COLUMNS)}")
        if column not in possible:
            raise TooLittleData(f"the column {column} needs {needs[column][0]}: give some")
    if not wanted:
        raise TooLittleData(f"no column is chosen: choose some of {', '.join(COLUMNS)}")
    return tuple(column for column in COLUMNS if column in wanted)
