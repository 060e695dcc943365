"""Step 1: a mixture of real texts, cut into documents, split, shuffled and counted in tokens.

Sources: the public data sets (`data_sets.py`), Debian's documentation in eight languages and the
standard library of Python (read as the minis' corpus reads them). Each kind of text has a quota of
tokens; the order is shuffled once, so that any prefix of the file is a sample of the whole mixture.
Usage: `python -m tools.real.texts --model MODEL --work WORK [--data FOLDER]`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_scope_lens.errors import BadFile, TooLittleData
from qwen_scope_lens.files import exclusive, file_sha256, whole_file, write_json
from tools.mini import prose
from tools.mini.corpus import split_of
from tools.mini.sources import CODE_PACKAGE, SOURCES, fetch
from tools.real.data_sets import DATA_SETS, texts

__all__ = [
    "MAX_TOKENS",
    "QUOTAS",
    "SPLITS",
    "Text",
    "build",
    "gather",
    "path_of",
    "read",
    "sha256_of",
]

FORMAT = "qsl-real-texts"
MADE_BY = "python -m tools.real.texts"
SPLITS = ("train", "heldout")
MAX_TOKENS = 256
"""Of a document. A longer one is cut here, so that no later step decides about it."""

QUOTAS = {
    "prose": 0.32,
    "code": 0.15,
    "toxicity": 0.20,
    "benchmarks": 0.16,
    "prompts": 0.12,
    "parallel": 0.04,
    "safety": 0.01,
}
"""Shares of the tokens by kind; what a kind does not have, prose fills up."""
FILL = "prose"
SEED = 20261129


@dataclass(frozen=True)
class Text:
    """One document: where it comes from, and how many tokens it has."""

    text: str
    kind: str
    source: str
    tokens: int = 0


def path_of(work: Path, split: str) -> Path:
    return work / "texts" / f"{split}.jsonl"


def read(work: Path, split: str) -> list[Text]:
    """The documents of a split in their order, as `build` left them."""
    path = path_of(work, split)
    try:
        with path.open(encoding="utf-8") as file:
            return [Text(**json.loads(line)) for line in file]
    except (OSError, ValueError, TypeError) as error:
        raise BadFile(f"{path} cannot be read ({error}): `{MADE_BY}` makes it") from error


def sha256_of(work: Path, split: str) -> str:
    """Of the file of a split; raises where there is none."""
    path = path_of(work, split)
    if not path.is_file():
        raise BadFile(f"{path} does not exist: `{MADE_BY}` makes it")
    return file_sha256(path)


def gather(data: Path | None, cache: Path | None) -> Iterator[tuple[str, Text]]:
    """`(key, text)` of every source; without a folder, the sources behind it are left out."""
    for row in DATA_SETS if data is not None else ():
        assert data is not None
        for key, text in texts(row, data):
            yield key, Text(text, row.kind, row.file)
    if cache is None:
        return
    seen: set[str] = set()
    for source in SOURCES:
        root = fetch(source.package, cache)
        for key, documents in prose.pages(source, root, seen):
            for text in documents:
                yield key, Text(text, "prose", f"{source.package}/{source.lang}")
    for key, documents in prose.code_documents(fetch(CODE_PACKAGE.package, cache)):
        for text in documents:
            yield key, Text(text, "code", CODE_PACKAGE.package)


def split_texts(found: Iterable[tuple[str, Text]]) -> dict[str, list[Text]]:
    """Exact repeats are dropped; 3% of the keys are held out, the same in every language."""
    splits: dict[str, list[Text]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for key, text in found:
        if text.text not in seen:
            seen.add(text.text)
            splits["heldout" if split_of(key) == "valid" else "train"].append(text)
    return splits


def mix(found: list[Text], tokens: int, count: Callable[[list[str]], list[int]]) -> list[Text]:
    """About `tokens` tokens by the quotas, in shuffled order; fewer where there are no more."""
    kinds: dict[str, list[Text]] = defaultdict(list)
    for text in found:
        kinds[text.kind].append(text)
    for kind in kinds:
        kinds[kind] = evenly(kinds[kind])
    taken: list[Text] = []
    missing = 0
    for kind in sorted(QUOTAS, key=lambda kind: kind == FILL):  # what fills up comes last
        wanted = int(QUOTAS[kind] * tokens) + (missing if kind == FILL else 0)
        chosen, got = take(kinds[kind], wanted, count)
        taken += chosen
        missing += max(0, wanted - got)
    random.Random(f"{SEED}/mix").shuffle(taken)
    return taken


def evenly(found: list[Text]) -> list[Text]:
    """Sources take turns, each in shuffled order, so that small ones are not drowned."""
    sources: dict[str, list[Text]] = defaultdict(list)
    for text in found:
        sources[text.source].append(text)
    for name, rows in sources.items():
        random.Random(f"{SEED}/{name}").shuffle(rows)
    order: list[Text] = []
    waiting = [rows for _, rows in sorted(sources.items())]
    while waiting:
        waiting = [rows for rows in waiting if rows]
        order += [rows.pop() for rows in waiting]
    return order


def take(
    found: list[Text], wanted: int, count: Callable[[list[str]], list[int]], step: int = 500
) -> tuple[list[Text], int]:
    """The first texts that hold `wanted` tokens together, with their counts."""
    chosen: list[Text] = []
    got = 0
    for start in range(0, len(found), step):
        if got >= wanted:
            break
        part = found[start : start + step]
        for text, tokens in zip(part, count([text.text for text in part]), strict=True):
            if got < wanted and tokens >= 2:  # the first token is not learned from
                chosen.append(Text(text.text, text.kind, text.source, min(tokens, MAX_TOKENS)))
                got += min(tokens, MAX_TOKENS)
    return chosen, got


def build(
    work: Path,
    tokenizer: Any,
    tokens: int,
    heldout_tokens: int,
    data: Path | None = None,
    debian: bool = True,
) -> dict[str, Any]:
    """Write both splits and `texts/manifest.json`; returns the manifest."""
    count = counter(tokenizer)
    splits = split_texts(gather(data, work / "cache" if debian else None))
    wanted = {"train": tokens, "heldout": heldout_tokens}
    facts: dict[str, Any] = {"max_tokens": MAX_TOKENS, "quotas": QUOTAS, "seed": SEED}
    with exclusive(work / "texts"):
        for split in SPLITS:
            mixed = mix(splits[split], wanted[split], count)
            if not mixed:
                raise TooLittleData(
                    f"the split {split} has no text: give --data, or Debian's packages"
                )
            with whole_file(path_of(work, split)) as partial:
                lines = (json.dumps(asdict(text), ensure_ascii=False) + "\n" for text in mixed)
                partial.write_text("".join(lines), encoding="utf-8")
            kinds: Counter[str] = Counter()
            sources: Counter[str] = Counter()
            for text in mixed:
                kinds[text.kind] += text.tokens
                sources[text.source] += text.tokens
            facts[split] = {
                "documents": len(mixed),
                "tokens": sum(kinds.values()),
                "kinds": dict(sorted(kinds.items())),
                "sources": dict(sorted(sources.items())),
                "sha256": sha256_of(work, split),
            }
        write_json(work / "texts" / "manifest.json", FORMAT, 1, facts)
    return facts


def counter(tokenizer: Any) -> Callable[[list[str]], list[int]]:
    """How many tokens each text has."""

    def count(batch: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]]

    return count


def main(arguments: list[str] | None = None) -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="whose tokenizer counts")
    parser.add_argument("--work", type=Path, required=True, help="folder of everything made")
    parser.add_argument("--data", type=Path, help="folder of the public data sets")
    parser.add_argument("--no-debian", action="store_true", help="leave Debian's texts out")
    parser.add_argument("--tokens", type=int, default=1_600_000)
    parser.add_argument("--heldout-tokens", type=int, default=40_000)
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    facts = build(
        options.work,
        tokenizer,
        options.tokens,
        options.heldout_tokens,
        options.data,
        not options.no_debian,
    )
    for split in SPLITS:
        print(split, {key: facts[split][key] for key in ("documents", "tokens", "kinds")})


if __name__ == "__main__":
    main()
