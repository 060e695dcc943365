"""Documents as token rows: one document per row, never packed, right-padded, batched by length.

Packing would leak state between documents in Qwen3.5's recurrent layers. `corpus.py`
makes the documents; `model.py` and `sae.py` learn from them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from tools.mini.corpus import read

__all__ = ["CONTEXT", "END", "PAD", "batches", "epochs", "load_tokenizer", "padded", "token_rows"]

CONTEXT = 192
"""Longest row in training. A longer document is cut."""

END = "<|endoftext|>"
PAD = -100
"""What `padded` writes into the labels where a row has ended."""


def load_tokenizer(work: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(work / "tokenizer"))


def token_rows(
    work: Path, split: str, tokenizer: Any = None
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The records of a split and their token rows, each ended by `<|endoftext|>` when not cut.

    The tokenizer is the one that `tokenizer.py` left in `work` unless another is given.
    """
    records = read(work, split)
    tokenizer = tokenizer or load_tokenizer(work)
    end = tokenizer.convert_tokens_to_ids(END)
    rows = []
    for start in range(0, len(records), 1000):  # all at once takes gigabytes of offsets
        texts = [record["text"] for record in records[start : start + 1000]]
        rows += [[*row, end][:CONTEXT] for row in tokenizer(texts)["input_ids"]]
    return records, rows


def batches(
    rows: Sequence[Sequence[int]], tokens: int, seed: int | str, window: int = 64
) -> list[list[int]]:
    """Row numbers of every batch of one epoch: shuffled, rows of like length together.

    A batch holds at most `tokens` cells, padding included. Lengths are sorted within windows of
    about `window` batches, so that the order of the corpus stays random.
    """
    rng = random.Random(f"batches/{seed}")
    order = list(range(len(rows)))
    rng.shuffle(order)
    mean = max(1, sum(len(row) for row in rows) // len(rows))
    step = max(1, window * tokens // mean)
    made: list[list[int]] = []
    for start in range(0, len(order), step):
        chunk = sorted(order[start : start + step], key=lambda number: len(rows[number]))
        batch: list[int] = []
        for number in chunk:
            if batch and (len(batch) + 1) * len(rows[number]) > tokens:
                made.append(batch)
                batch = []
            batch.append(number)
        made.append(batch)
    rng.shuffle(made)
    return made


def padded(
    rows: Sequence[Sequence[int]], numbers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids, mask)`, both `[batch, longest]`; pads are 0 in ids and False in the mask."""
    longest = max(len(rows[number]) for number in numbers)
    ids = torch.zeros(len(numbers), longest, dtype=torch.long)
    mask = torch.zeros(len(numbers), longest, dtype=torch.bool)
    for at, number in enumerate(numbers):
        row = torch.tensor(rows[number])
        ids[at, : len(row)] = row
        mask[at, : len(row)] = True
    return ids, mask


def epochs(rows: Sequence[Sequence[int]], tokens: int, seed: int) -> Iterator[list[int]]:
    """Batches without end, epoch after epoch, the same for the same seed."""
    epoch = 0
    while True:
        yield from batches(rows, tokens, f"{seed}/{epoch}")
        epoch += 1
