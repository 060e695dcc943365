"""Does the language filter of synthesis reject the wrong texts, and only those?

    python benchmarks/language_identification.py [udhr.jsonl.gz]

Every text is asked about in its own language, which may not be refused, and in each other language
of the list, which should be. Texts are the mini's held-out prose and chats, and articles of the
Universal Declaration of Human Rights where a file of rows with `lang` and `text` is given. Short
texts are the first ten words of each, in Chinese, Japanese and Thai the first 20 characters.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from _measure import Printed, cpu_name

from qwen_scope_lens.mini import heldout
from qwen_scope_lens.synth.language import wrong_language

RESULTS = Path(__file__).parent / "results" / "language_identification.txt"
LANGUAGES = (
    "am",
    "ar",
    "de",
    "el",
    "en",
    "es",
    "fr",
    "he",
    "hi",
    "it",
    "ja",
    "ko",
    "pt",
    "ru",
    "th",
    "tr",
    "uk",
    "vi",
    "zh",
)
UNSPACED = ("ja", "th", "zh")


def texts(declaration: Path | None) -> Iterator[tuple[str, str, str]]:
    """source, language, text"""
    for domain in ("prose", "chat"):
        for row in heldout(domain):
            if row["lang"] in LANGUAGES:
                yield f"mini, {domain}", row["lang"], str(row["text"])
    if declaration is not None:
        with gzip.open(declaration, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if row["lang"] in LANGUAGES:
                    yield "declaration", row["lang"], row["text"]


def short(text: str, language: str) -> str:
    return text[:20] if language in UNSPACED else " ".join(text.split()[:10])


def main() -> None:
    say = Printed()
    given = list(texts(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
    say(f"Language filter of synthesis, py3langid {version('py3langid')}, {cpu_name()}")
    say(
        f"{len({language for _, language, _ in given})} languages of texts, each asked about in"
        f" {len(LANGUAGES)}"
    )
    wrong_language("the first call loads the model", "en")
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    began = time.process_time()
    for source, language, text in given:
        for length, some in (("whole", text), ("short", short(text, language))):
            row = counts[f"{source}, {length}"]
            for code in LANGUAGES:
                wrong = bool(wrong_language(some, code))
                if code == language:
                    row[0] += 1
                    row[1] += wrong
                else:
                    row[2] += 1
                    row[3] += not wrong
    calls = sum(row[0] + row[2] for row in counts.values())
    say(f"{1e3 * (time.process_time() - began) / calls:.2f} ms of CPU time per text and language")
    say()
    say(f"{'':22}{'refused in its own':>20}{'let through in another':>26}")
    for source, (own, refused, others, through) in counts.items():
        say(f"{source:22}{refused:>9} of {own:>6,} {'':>4}{through:>12} of {others:>7,}")
    say.save(RESULTS)


if __name__ == "__main__":
    main()
