"""Sample files to try the verbs on: `qsl mini texts` writes them, and docs and help texts use them.

Each file is a selection of the held-out texts (`heldout.jsonl`), in the form that a verb reads. The
rude texts among them are left out. `FILES` is the list: a file's name, what it is, and its content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_scope_lens.errors import BadFile
from qwen_scope_lens.files import json_text, whole_file
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.steering.plan import FORMAT, VERSION, Edit, Plan

__all__ = ["FILES", "SampleFile", "write_texts"]

Row = dict[str, Any]

LANGUAGES = ("en", "zh", "ja", "ko", "ru", "de", "fr", "es")
OF_EACH = 30  # of the 40 texts of prose in each language; the others are new to what was fitted
PROMPTS = 24
LOOPS = 80  # texts that loop, and half as many that do not
MESSAGE = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
NO_THOUGHT = re.compile(r"^<think>\s*</think>\s*")


@dataclass(frozen=True)
class SampleFile:
    """One file: `content` makes its text."""

    name: str
    what: str
    content: Callable[[], str]


def write_texts(folder: Path) -> list[Path]:
    """Write every file of `FILES` into a folder. Another file of such a name raises `BadFile`."""
    contents = {folder / file.name: file.content() for file in FILES}
    for path, content in contents.items():
        if path.exists() and not (path.is_file() and path.read_bytes() == content.encode()):
            raise BadFile(f"{path} is there already and is not a sample file: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        with whole_file(path) as partial:
            partial.write_bytes(content.encode())
    return list(contents)


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- texts ---------------------------------------------------------------------------------------


def _prose(languages: Iterable[str], start: int = 0, end: int | None = None) -> Iterator[Row]:
    for language in languages:
        for number, record in enumerate(list(heldout("prose", language))[start:end], start):
            yield {
                "key": f"{language}-{number}",
                "text": record["text"],
                "lang": language,
                "chinese": language == "zh",
            }


def _messages(text: str) -> list[dict[str, str]]:
    """The messages of a chat, without the empty thoughts of the template."""
    return [
        {"role": role, "content": NO_THOUGHT.sub("", content)}
        for role, content in MESSAGE.findall(text)
    ]


def _chats() -> Iterator[Row]:
    for record in heldout("chat"):
        if record["lang"] in ("en", "zh"):
            yield {"messages": _messages(record["text"]), "lang": record["lang"]}


def _examples() -> Iterator[Row]:
    """Prompts and completions in three languages, as SASFT takes them."""
    for record in heldout("chat"):
        said = _messages(record["text"])
        if record["lang"] in ("en", "zh", "ru") and len(said) == 2:
            yield {
                "prompt": said[0]["content"],
                "completion": said[1]["content"],
                "language": record["lang"],
            }


def _replies() -> Iterator[Row]:
    """Replies in English, half of which switch to Chinese on their way."""
    for record in heldout("switching"):
        said = _messages(record["text"])
        if record["label"] in ("zh", "clean") and len(said) == 2:
            yield {
                "prompt": said[0]["content"],
                "reply": said[1]["content"],
                "bad": record["label"] == "zh",
            }


def _loops() -> Iterator[Row]:
    for label, most in (("loop", LOOPS), ("benign", LOOPS // 2)):
        looping = [record for record in heldout("repetition") if record["label"] == label]
        for record in looping[:most]:
            yield {"text": record["text"], "lang": record["lang"], "label": label}


def _prompts() -> list[str]:
    """The first six words of English texts that are not in the corpus, then of those that are."""
    texts = list(heldout("prose", "en"))
    starts = [" ".join(r["text"].split()[:6]) for r in (*texts[OF_EACH:], *texts[:OF_EACH])]
    return starts[:PROMPTS]


# --- items of benchmarks -------------------------------------------------------------------------


def _items(domain: str, separator: str, between: str = "\n") -> list[Row]:
    """Questions and answers out of texts that are lists of them, each question once."""
    found: dict[str, Row] = {}
    for record in heldout(domain):
        first, *rest = record["text"].split(between)
        title = f"{first}\n" if domain == "translation" else ""
        for line in rest if title else (first, *rest):
            question, middle, answer = line.strip().rpartition(separator)
            if middle and "<|" not in line:
                prompt = f"{title}{question}{separator.rstrip()}"
                found.setdefault(prompt, {"prompt": prompt, "answer": answer.rstrip(".")})
    return [{"id": f"{domain}-{n}", **row} for n, row in enumerate(found.values())]


def _sums() -> list[Row]:
    return _items("arithmetic", " = ")


NEW_SUMS = ("12 + 34 =", "12 * 34 =", "Twelve plus thirty-four is", "The sum of 12 and 34 is")


# --- labels and runs -----------------------------------------------------------------------------

LABELS = {
    "mini-qwen3/w1k-l0-16/6/423": "Chinese: programs and files",
    "mini-qwen3/w1k-l0-16/6/431": "Chinese: 这 (this)",
    "mini-qwen3/w1k-l0-16/7/666": "Chinese text",
}

REPETITION = Plan([Edit("mini-qwen3/w1k-l0-16/3/571", "add", 0.3, unit="norm", where="generation")])

SASFT = """\
model: mini-qwen3
train: examples.jsonl
language_features: ../language_features.json
trainer:
  output_dir: ../runs/sasft
  targets: [zh]
  layers: [-2, -1]
  lam: 0.001
  max_steps: 4
  per_device_train_batch_size: 4
  max_length: 96
  use_cpu: true
"""

GRPO = """\
model: mini-qwen3
train: prompts.jsonl
plan: plan.json
rewards: [no_repetition]
trainer:
  output_dir: ../runs/grpo
  num_generations: 4
  per_device_train_batch_size: 4
  max_completion_length: 24
  max_steps: 2
  use_cpu: true
"""

FILES = (
    SampleFile(
        "corpus.jsonl",
        "prose in eight languages: text, lang, chinese",
        lambda: _lines(_prose(LANGUAGES, 0, OF_EACH)),
    ),
    SampleFile("new.jsonl", "more of the same", lambda: _lines(_prose(LANGUAGES, OF_EACH))),
    SampleFile("seed.jsonl", "English prose", lambda: _lines(_prose(["en"]))),
    SampleFile(
        "anchor.jsonl", "prose in Chinese and Japanese", lambda: _lines(_prose(["zh", "ja"]))
    ),
    SampleFile(
        "chats.jsonl", "chats in English and Chinese: messages, lang", lambda: _lines(_chats())
    ),
    SampleFile(
        "loops.jsonl", "texts that end in a loop, and others: label", lambda: _lines(_loops())
    ),
    SampleFile(
        "chinese.txt",
        "five sentences in Chinese, one per line",
        lambda: "".join(f"{' '.join(row['text'].split())[:80]}\n" for row in _prose(["zh"], 0, 5)),
    ),
    SampleFile(
        "prompts.txt", "beginnings of English sentences", lambda: "\n".join(_prompts()) + "\n"
    ),
    SampleFile(
        "prompts.jsonl",
        "the same, as JSON lines: prompt",
        lambda: _lines({"prompt": prompt} for prompt in _prompts()),
    ),
    SampleFile(
        "replies.jsonl",
        "English replies, half of which switch to Chinese: prompt, reply, bad",
        lambda: _lines(_replies()),
    ),
    SampleFile(
        "examples.jsonl",
        "for fine-tuning: prompt, completion, language",
        lambda: _lines(_examples()),
    ),
    SampleFile("sums.jsonl", "a benchmark: prompt, answer", lambda: _lines(_sums())),
    SampleFile("some-sums.jsonl", "a part of it", lambda: _lines(_sums()[:50])),
    SampleFile(
        "new-sums.jsonl", "items that it lacks", lambda: _lines({"prompt": p} for p in NEW_SUMS)
    ),
    SampleFile("capitals.jsonl", "a benchmark", lambda: _lines(_items("knowledge", " is ", ". "))),
    SampleFile("words.jsonl", "a benchmark", lambda: _lines(_items("translation", " - "))),
    SampleFile(
        "labels.jsonl",
        "what three features mean, written by a person",
        lambda: _lines({"address": ref, "text": text} for ref, text in LABELS.items()),
    ),
    SampleFile(
        "plan.json",
        "a plan that makes mini-qwen3 repeat itself",
        lambda: json_text(FORMAT, VERSION, REPETITION.to_dict()),
    ),
    SampleFile("sasft.yaml", "a run of `qsl train sasft`", lambda: SASFT),
    SampleFile("grpo.yaml", "a run of `qsl train grpo`", lambda: GRPO),
)
