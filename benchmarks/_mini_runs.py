"""What the replications on the minis share: sentences, prompts, a store, replies, held-out loss."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _measure import cpu_name

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.catalog import bundled_model
from qwen_scope_lens.files import write_json
from qwen_scope_lens.mini import heldout
from qwen_scope_lens.stores import Document, FeatureStore, extract
from qwen_scope_lens.train import (
    LanguageFeature,
    LanguageFeatures,
    has_script,
    mean_pre_activations,
)
from tools.mini.generated import chat
from tools.mini.model import held_out_loss
from tools.mini.prose import sentences

LANGUAGES = ("de", "en", "es", "fr", "ja", "ko", "ru", "zh")
MODEL, GROUP = "mini-qwen3", "mini-qwen3/w1k-l0-16"


def mini() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    folder = bundled_model(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def halves() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Sentences of every language from two disjoint halves of the held-out documents."""
    parts: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    for language in LANGUAGES:
        for number, record in enumerate(heldout("prose", language)):
            lines = [
                line
                for line in sentences(record["text"])
                if 30 <= len(line.encode()) <= 260 and "\n" not in line
            ]
            parts[number % 2].setdefault(language, []).extend(lines)
    return parts


def store_of(
    texts: Sequence[tuple[str, dict[str, str]]], layers: Sequence[int], folder: Path
) -> FeatureStore:
    """A store of labelled texts, made with the mini."""
    documents = [
        Document(str(i), text=text, labels=labels) for i, (text, labels) in enumerate(texts)
    ]
    return extract(documents, model=MODEL, group=GROUP, layers=list(layers), out=folder)


@torch.no_grad()
def replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    samples: int,
    tokens: int,
    temperature: float,
    top_p: float = 1.0,
    seed: int = 0,
) -> tuple[list[list[int]], list[str], list[int]]:
    """Sampled replies: token ids up to the end of the turn, text, and the prompt of each."""
    torch.manual_seed(seed)
    model.eval()
    tokenizer.padding_side = "left"
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=False)
    out = model.generate(
        **batch,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        max_new_tokens=tokens,
        num_return_sequences=samples,
        pad_token_id=tokenizer.pad_token_id,
    )[:, batch["input_ids"].shape[1] :]
    ends = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    ids = []
    for row in out.tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        ids.append(row[:stop])
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return ids, texts, [i // samples for i in range(len(ids))]


def script_tokens(tokenizer: Any, size: int, language: str) -> torch.Tensor:
    """Which of `size` token ids write the language's script, alone. `[size]`"""
    flags = [has_script(tokenizer.decode([i]), language) for i in range(len(tokenizer))]
    return torch.tensor(flags + [False] * (size - len(flags)))


def with_thresholds(
    refs: Sequence[FeatureRef],
    store: FeatureStore,
    table: LanguageFeatures,
    target: str,
    model: Any = None,
) -> LanguageFeatures:
    """Any features as a table to penalise, with their own mean of each of `table`'s languages."""
    values = store.labels("lang")
    docs_of = {name: np.flatnonzero(values == name) for name in table.languages}
    means = mean_pre_activations(store, refs, docs_of, model)
    rows = [LanguageFeature(ref, target, 0.0, 0.0, 0.0, means[ref]) for ref in refs]
    return LanguageFeatures(table.model, tuple(rows), {})


def loss_by_language(model: Any, tokenizer: Any, parts: dict[str, list[str]]) -> dict[str, float]:
    """Held-out loss in nats a token, on conversations in each language."""
    rng = random.Random(0)
    found = {}
    for language, lines in parts.items():
        texts = [chat(rng.choice(lines), rng.choice(lines)) for _ in range(30)]
        rows = [ids[:160] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        found[language] = held_out_loss(model.eval(), rows)
    return found


@torch.no_grad()
def loss_of_each(model: Any, tokenizer: Any, lines: Sequence[str], count: int = 60) -> np.ndarray:
    """Held-out nats and tokens of conversations in one language, one by one. `[count, 2]`"""
    rng = random.Random(1)
    model.eval()
    found = []
    for _ in range(count):
        text = chat(rng.choice(lines), rng.choice(lines))
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:160]])
        logits = model(ids).logits[0, :-1].float()
        nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        found.append((float(nats), ids.shape[1] - 1))
    return np.array(found)


def stamp() -> str:
    """Machine, packages and date, for the foot of a file of results."""
    return (
        f"{cpu_name()}, one thread, torch {torch.__version__}, transformers"
        f" {transformers.__version__}, {time.strftime('%Y-%m-%d')}"
    )


class Cells:
    """Results by name in one JSON file, so that an interrupted run goes on where it was."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        if path is not None and path.is_file():
            self.known = json.loads(path.read_text("utf-8"))

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.known:
            self.known[name] = make()
            if self.path is not None:
                write_json(self.path, "benchmark-cells", 1, self.known)
        return self.known[name]


def prompt(question: str) -> str:
    """A question up to the point where the reply begins."""
    return chat(question, "").removesuffix("<|im_end|>\n")
