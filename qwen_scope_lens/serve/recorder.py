"""The flight recorder: exact codes of prompts and replies, appended to a feature store.

Replies are collected and written every few seconds as one more corpus of the store: first its
shard, whole, then the manifest that names it. Whoever is killed between the two leaves a shard that
no manifest names, and the next write takes its place. So the store can be opened, queried, ranked
and merged at any time; a reader sees what was written when it opened the store. A store that has
grown to its limit takes a number into its name, and a new one begins.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import re
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.errors import ScopeError
from qwen_scope_lens.files import exclusive
from qwen_scope_lens.models.residuals import EXTREME_NORM_RATIO, extreme_tokens
from qwen_scope_lens.serve.asking import Asked
from qwen_scope_lens.serve.lens import Lens
from qwen_scope_lens.serve.plans import NO_PLAN
from qwen_scope_lens.serve.rows import Row, Wanted
from qwen_scope_lens.stores.codec import pack
from qwen_scope_lens.stores.facts import model_facts, sae_facts, tokenizer_facts
from qwen_scope_lens.stores.manifest import CorpusFacts, Manifest, Settings
from qwen_scope_lens.stores.shard_files import CodedDocument, shard_folder, write_shard
from qwen_scope_lens.version import versions

__all__ = ["Recorder", "Recording"]

log = logging.getLogger(__name__)

LABELS = {
    "request": "str",
    "created": "str",
    "plan": "str",
    "temperature": "float",
    "top_p": "float",
    "seed": "int",
    "finish": "str",
    "prompt_tokens": "int",
}
"""What is recorded beside the codes. `prompt_tokens` says where the reply begins."""

MOST_WAITING = 1024
"""Replies that wait to be encoded. More are not recorded, and counted."""
END = object()


@dataclass(frozen=True)
class Recording:
    """How to record."""

    store: Path
    layers: tuple[int, ...]
    codes_only: bool = False  # neither texts nor token ids
    rotate: int = 1 << 30  # bytes after which a new store begins
    limit: int | None = None  # bytes of all of them; the oldest go
    every: float = 5.0  # seconds
    batch: int = 64  # replies


class Recorder:
    """Writes in a thread of its own. Call `close` at the end."""

    def __init__(self, lens: Lens, settings: Recording, sae_folder: Path | None = None) -> None:
        self._lens, self._settings = lens, settings
        self.recorded = self.dropped = 0
        group = lens.group.short
        self._manifest = Manifest(
            model=model_facts(lens.model, settings.layers),
            tokenizer=tokenizer_facts(lens.tokenizer),
            saes={n: sae_facts(LayerRef(group, n), sae_folder) for n in settings.layers},
            settings=Settings(truncate=False, add_generation_prompt=True),
            labels={},
            corpora=(),
            versions=versions(),
        )
        self._lock = ExitStack()
        self._open()
        self._waiting: queue.Queue[Any] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="qsl-recorder", daemon=True)
        self._thread.start()

    @property
    def store(self) -> Path:
        return self._settings.store

    def watched(self, wanted: Wanted) -> Wanted:
        """The same request, whose row also collects the residuals to record."""
        layers = tuple(sorted({*wanted.layers, *self._settings.layers}))
        return replace(wanted, layers=layers)

    def add(self, row: Row, identity: str, asked: Asked) -> None:
        """Record a reply, finished or cut, by a name of its own. It returns at once."""
        name = asked.plan_name or (NO_PLAN if asked.plan is None else str(asked.plan))
        try:
            self._waiting.put_nowait((row, identity, name, time.time()))
        except queue.Full:
            self.dropped += 1
            log.warning("the recorder does not keep up: %d replies were not recorded", self.dropped)

    def close(self) -> None:
        """Write what waits."""
        self._waiting.put(END)
        self._thread.join(timeout=60)
        self._lock.close()

    # The recorder's own thread.

    def _open(self) -> None:
        """Go on with the store that is there, or begin one with the first write."""
        store = self._settings.store
        self._lock.enter_context(exclusive(store))
        if Manifest.exists(store):
            theirs = Manifest.read(store)
            self._manifest.require_same(theirs, "this server", str(store))
            self._manifest = theirs
        self._bytes = _size(store)

    def _run(self) -> None:
        ended = False
        while not ended:
            batch: list[CodedDocument] = []
            until: float | None = None
            while len(batch) < self._settings.batch:
                left: float | None = None if until is None else max(0.0, until - time.monotonic())
                try:
                    item = self._waiting.get(timeout=left)
                except queue.Empty:
                    break
                if item is END:
                    ended = True
                    break
                until = until or time.monotonic() + self._settings.every
                try:
                    batch.append(self._coded(*item))
                except Exception:
                    self.dropped += 1
                    log.exception("a reply was not recorded")
            if batch:
                self._write(batch)

    def _coded(self, row: Row, identity: str, plan: str, created: float) -> CodedDocument:
        if not row.residuals:  # another engine has written it
            self._lens.read_again(row)
        ids, wanted = row.ids, row.wanted
        if row.reason == "cut":  # its last token was chosen, and read by nobody
            ids = ids[: row.read]
        codes, extreme = {}, {}
        for layer in self._settings.layers:
            x = torch.cat(list(row.residuals[layer]))[: len(ids)]
            assert len(x) == len(ids)
            codes[layer] = pack(self._lens.encode(layer, x))
            norms = x.float().norm(dim=-1)
            extreme[layer] = extreme_tokens(norms, [len(ids)], EXTREME_NORM_RATIO).cpu().numpy()
        labels = {
            "request": identity.partition("/")[0],
            "created": datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds"),
            "plan": plan,
            "temperature": wanted.temperature,
            "top_p": wanted.top_p,
            "seed": wanted.seed,
            "finish": row.reason,
            "prompt_tokens": len(wanted.prompt),
        }
        text, tokens, spans = self._texts(ids)
        private = self._settings.codes_only
        number = np.zeros(len(ids), np.int64) if private else np.array(ids, np.int64)
        return CodedDocument(
            key=identity,
            text=None if private else text,
            labels=labels,
            token_ids=number,
            tokens=[""] * len(ids) if private else tokens,
            spans=None if private else spans,
            truncated=False,
            codes=codes,
            extreme=extreme,
        )

    def _texts(self, ids: Sequence[int]) -> tuple[str, list[str], np.ndarray]:
        """The text, and for every token its characters and where they stand."""
        tokens: list[str] = []
        spans: list[tuple[int, int]] = []
        at = 0
        pieces = self._lens.vocabulary.pieces(ids)
        for piece in pieces:
            span = (at, at + len(piece.text))
            tokens += [piece.text] * piece.tokens
            spans += [span] * piece.tokens
            at = span[1]
        text = "".join(piece.text for piece in pieces)
        return text, tokens, np.array(spans, dtype=np.int64).reshape(-1, 2)

    def _write(self, batch: Sequence[CodedDocument]) -> None:
        try:
            if self._bytes > self._settings.rotate and Manifest.exists(self._settings.store):
                self._rotate()
            corpus = CorpusFacts(
                name=f"served {batch[0].labels['created']}",
                n_docs=len(batch),
                sha256=_sha(batch),
                shard_docs=len(batch),
            )
            longer = self._manifest.with_corpus(corpus, LABELS)
            number, store = self._manifest.n_shards, self._settings.store
            write_shard(store, number, longer, batch)
            longer.write(store)
            self._manifest = longer
            self._bytes += _size(shard_folder(store, number))
            self.recorded += len(batch)
        except (ScopeError, OSError):
            self.dropped += len(batch)
            log.exception("%d replies were not recorded", len(batch))

    def _rotate(self) -> None:
        """Give the store that is full a number, and begin a new one."""
        store = self._settings.store
        older = rotated(store)
        number = int(older[-1].name.rpartition("-")[2]) + 1 if older else 1
        self._lock.close()
        store.rename(store.with_name(f"{store.name}-{number:04d}"))
        self._manifest = replace(self._manifest, corpora=(), labels={})
        self._open()
        if self._settings.limit is not None:
            older = rotated(store)
            sizes = [_size(folder) for folder in older]
            while older and sum(sizes) + self._settings.rotate > self._settings.limit:
                shutil.rmtree(older.pop(0))
                sizes.pop(0)


def rotated(store: Path) -> list[Path]:
    """The stores that were full, the oldest first."""
    pattern = re.compile(re.escape(store.name) + r"-\d{4,}")
    found = [p for p in store.parent.glob(f"{store.name}-*") if pattern.fullmatch(p.name)]
    return sorted((p for p in found if Manifest.exists(p)), key=lambda p: (len(p.name), p.name))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sha(batch: Sequence[CodedDocument]) -> str:
    """Over keys and labels, which name every reply once."""
    rows = [[document.key, document.labels] for document in batch]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
