"""Step 1: the corpus, one JSONL file per split, and the small sample that the package ships.

Real pages are split by page (translations of one page together), generated documents by number
after exact repeats are dropped. Rerunning continues with what the cache holds and gives the same
files. Usage: `python -m tools.mini.corpus [--work build/mini]`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tools.mini import prose as prose_module
from tools.mini.durations import measured
from tools.mini.generated import KINDS, Document, Prose
from tools.mini.sources import CODE_PACKAGE, LANGUAGES, SOURCES, fetch

__all__ = ["SPLITS", "build", "read", "work_folder"]

SPLITS = ("train", "valid", "test")
CAPS = {"train": 1_600_000, "valid": 50_000, "test": 260_000}
"""Bytes of prose per language and of code, by split."""
SEED = 20260511
SAMPLE = 40
"""Shipped documents of each domain, language and label."""


def work_folder(argument: str | Path | None = None) -> Path:
    """Where intermediate files of all steps lie; not in the package."""
    folder = Path(argument or "build/mini")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def split_of(key: str) -> str:
    """The split of a page: 3% valid, 14% test, by a hash of its language-free name."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return "valid" if number < 3 else "test" if number < 17 else "train"


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    partial.rename(path)


def read(work: Path, split: str) -> list[dict[str, Any]]:
    """The documents of a split, as `build` left them."""
    with (work / "corpus" / f"{split}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _real(work: Path) -> dict[str, list[Document]]:
    """Prose of every language and code, capped and split."""
    cache = work / "cache"
    found: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    seen: set[str] = set()
    for source in SOURCES:
        found[source.lang] += prose_module.pages(source, fetch(source.package, cache), seen)
    found["python"] += prose_module.code_documents(fetch(CODE_PACKAGE.package, cache))
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for lang, pages in found.items():
        random.Random(f"{SEED}/{lang}").shuffle(pages)
        room = dict(CAPS)
        domain = "code" if lang == "python" else "prose"
        for key, texts in pages:
            split = split_of(key)
            for text in texts if room[split] > 0 else ():
                splits[split].append(Document(text, lang, domain, "", {"page": key}))
                room[split] -= len(text.encode())
    return splits


def _sentences(documents: list[Document]) -> Prose:
    found: dict[str, list[str]] = {lang: [] for lang in LANGUAGES}
    for document in documents:
        if document.domain == "prose":
            found[document.lang] += [
                line
                for line in prose_module.sentences(document.text)
                if 30 <= len(line.encode()) <= 260 and "\n" not in line
            ]
    return found


def build(work: Path, sample: Path | None = None) -> None:
    """Write `corpus/{train,valid,test}.jsonl`, and the shipped sample of the test split."""
    splits = _real(work)
    sources = {split: _sentences(documents) for split, documents in splits.items()}
    seen: set[str] = set()
    for kind, (count, make) in KINDS.items():
        rng = random.Random(f"{SEED}/{kind}")
        for number in range(count):
            split = "valid" if number % 50 == 0 else "test" if number % 50 < 6 else "train"
            document = make(rng, sources[split])
            if document.text not in seen:
                seen.add(document.text)
                splits[split].append(document)
    folder = work / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    for split, documents in splits.items():
        random.Random(f"{SEED}/{split}").shuffle(documents)
        write_jsonl(folder / f"{split}.jsonl", [document.record() for document in documents])
        counts: Counter[str] = Counter()
        for document in documents:
            counts[f"{document.domain}/{document.lang}"] += len(document.text)
        print(split, len(documents), "documents", sum(counts.values()), "characters", flush=True)
        print("  ", dict(sorted(counts.items())), flush=True)
    if sample is not None:
        _write_sample(splits["test"], sample)


def _write_sample(documents: list[Document], path: Path) -> None:
    taken: Counter[tuple[str, str, str]] = Counter()
    records: list[dict[str, Any]] = []
    for document in documents:
        label = "" if document.domain in ("translation", "arithmetic") else document.label
        key = (document.domain, document.lang, label)
        if taken[key] < SAMPLE:
            taken[key] += 1
            records.append({"id": len(records), "split": "test", **document.record()})
    write_jsonl(path, records)
    print("sample:", len(records), "documents", path.stat().st_size, "bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default=None, help="folder of intermediate files")
    parser.add_argument("--again", action="store_true", help="rebuild what is there")
    arguments = parser.parse_args()
    work = work_folder(arguments.work)
    sample = Path(__file__).parents[1] / "heldout.jsonl"
    done = all((work / "corpus" / f"{split}.jsonl").is_file() for split in SPLITS)
    if done and sample.is_file() and not arguments.again:
        print("corpus: already there")
        return
    with measured(work, "corpus"):
        build(work, sample)


if __name__ == "__main__":
    main()
