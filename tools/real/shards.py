"""The captured residuals on disk: shards that are whole or absent, and how to read them.

A shard is a safetensors file with every position of its documents, first tokens and sinks included:
`layer{n} [n_tokens, d_model]`, `keep{n} [n_tokens]` bool (which positions count), `tokens
[n_tokens]` int32, `offsets [n_docs + 1]` int64. Shards are mapped, not read: a training step
touches only the rows of its batch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen_scope_lens.errors import BadFile, CannotWrite, TooLittleData
from qwen_scope_lens.files import read_json, write_json

__all__ = ["FORMAT", "Layer", "Source", "plan_shards", "shard_path", "shards_there"]

FORMAT = "qsl-real-residuals"
NAME = "manifest.json"
MADE_BY = "python -m tools.real.capture"


@dataclass(frozen=True)
class Source:
    """What a folder of shards was made from: another one is never mixed in."""

    model: str
    fingerprint: str
    dtype: str  # of the forward pass and of the stored residuals
    num_layers: int  # of the whole model
    d_model: int
    layers: tuple[int, ...]
    texts: dict[str, str]  # split -> sha256
    shard_tokens: int

    def write(self, folder: Path) -> None:
        write_json(folder / NAME, FORMAT, 1, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Source:
        facts: dict[str, Any] = read_json(folder / NAME, FORMAT, 1, MADE_BY)
        try:
            return cls(**{**facts, "layers": tuple(facts["layers"])})
        except (KeyError, TypeError) as error:
            raise BadFile(f"{folder / NAME} lacks a field or has one too many: {error}") from error

    def claim(self, folder: Path) -> None:
        """Make the folder this source's, or raise where it holds another's shards."""
        if not (folder / NAME).exists():
            self.write(folder)
            return
        theirs = asdict(Source.read(folder))
        mine = {**asdict(self), "layers": self.layers}
        if wrong := [name for name, value in mine.items() if theirs[name] != value]:
            said = "; ".join(f"{n}: there {theirs[n]!r}, here {mine[n]!r}" for n in wrong)
            raise CannotWrite(
                f"{folder} holds residuals of another source ({said}): go on with the same, or"
                " choose another --work"
            )


def plan_shards(tokens: Sequence[int], shard_tokens: int) -> list[range]:
    """Runs of documents that hold at least `shard_tokens` tokens each (the last may hold fewer).

    The plan depends on nothing else, so a run with a larger goal goes on where the last stopped.
    """
    runs: list[range] = []
    start, got = 0, 0
    for number, count in enumerate(tokens, start=1):
        got += count
        if got >= shard_tokens or number == len(tokens):
            runs.append(range(start, number))
            start, got = number, 0
    return runs


def shard_path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.safetensors"


def shards_there(folder: Path, split: str) -> list[Path]:
    """The finished shards of a split, in order, without gaps."""
    name = re.compile(rf"{re.escape(split)}-\d{{5}}\.safetensors")
    found = sorted(path for path in folder.glob(f"{split}-*") if name.fullmatch(path.name))
    expected = [shard_path(folder, split, number) for number in range(len(found))]
    if found != expected:
        missing = next(path for path in expected if path not in found)
        raise BadFile(f"{missing} is missing between others: `{MADE_BY}` makes it again")
    return found


class Layer:
    """The residuals of one layer that count in training, over all finished shards of a split."""

    def __init__(
        self, folder: Path, split: str, layer: int, shards: int | None = None, dropped: bool = False
    ) -> None:
        """The first `shards` shards, or all that are there now.

        With `dropped`, those that do not count instead: first tokens and extreme norms.
        """
        paths = shards_there(folder, split)
        if not paths or (shards is not None and len(paths) < shards):
            raise TooLittleData(
                f"{folder} has {len(paths)} shards of {split}, expected"
                f" {'one or more' if shards is None else shards}: `{MADE_BY}` makes them"
            )
        self.parts: list[Tensor] = []
        rows: list[np.ndarray] = []
        self.seen = 0  # positions captured, whether they count or not
        for part, path in enumerate(paths[:shards]):
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    values, keep = file.get_tensor(f"layer{layer}"), file.get_tensor(f"keep{layer}")
            except (OSError, SafetensorError) as error:
                raise BadFile(f"{path} has no residuals of layer {layer}: {error}") from error
            kept = (keep != dropped).nonzero().flatten().numpy()
            rows.append(np.stack([np.full_like(kept, part), kept], axis=1))
            self.parts.append(values)
            self.seen += len(keep)
        self.rows = np.concatenate(rows)  # [n_kept, 2]: shard, row in it

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def d_model(self) -> int:
        return int(self.parts[0].shape[1])

    def take(self, numbers: np.ndarray) -> Tensor:
        """`[n, d_model]` float32: the kept positions of these numbers, in an order of their own."""
        places = self.rows[np.sort(numbers)]
        found = [
            self.parts[part][torch.from_numpy(places[places[:, 0] == part, 1])]
            for part in np.unique(places[:, 0])
        ]
        return torch.cat([*found, self.parts[0][:0]]).float()  # none asked for: none found
