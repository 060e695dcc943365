"""One job of extraction: documents of some shards through the model, encoded and written.

Either all SAEs stay in memory and the residuals of a batch are dropped once they are encoded, or
(with `sae_memory`) the residuals of some shards are kept and the SAEs go over them one by one. The
codes are the same, bit for bit, because encoding looks at one token at a time.

A batch never crosses the border of a shard, so the bytes of a shard do not depend on where a run
stopped or on which process makes it. `extract.py` checks everything before there is a job.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.files import exclusive
from qwen_scope_lens.models.architecture import layer_device
from qwen_scope_lens.models.residuals import Capture, iter_captures
from qwen_scope_lens.saes.mapped import give_back
from qwen_scope_lens.stores.codec import Packed, pack
from qwen_scope_lens.stores.corpus import Corpus, Document
from qwen_scope_lens.stores.manifest import CorpusFacts, Manifest
from qwen_scope_lens.stores.remote import Remote
from qwen_scope_lens.stores.shard_files import CodedDocument, damage, shard_folder, write_shard

if TYPE_CHECKING:  # SAELens takes seconds, and a corpus is checked before it is needed
    from qwen_scope_lens.saes.layer_sae import LayerSAE

__all__ = ["Encoder", "Job", "Piece", "Sender", "coded_documents"]

TOGETHER = 448
"""The fewest tokens that are encoded at a time, except at the end of a shard: two batches of a
large model on a CPU. An encode reads and converts the whole encoder once, however few its tokens
are, and needs more memory for more of them. On a CPU, 512 are about as fast as 1,024."""


@dataclass
class Piece:
    """One batch: what was captured, without the residuals of layers that are encoded already."""

    capture: Capture
    codes: dict[int, Packed]

    @property
    def residual_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.capture.residuals.values())


class Encoder:
    """The SAEs of some layers.

    With `room` (the bytes of residuals that may wait) only one SAE is in memory at a time. In both
    cases, some batches are encoded together, so that an SAE is read less often.
    """

    def __init__(
        self, load: Callable[[int], LayerSAE], layers: Sequence[int], room: int | None = None
    ) -> None:
        self._load, self._layers, self._room = load, tuple(layers), room
        self._saes = {layer: load(layer) for layer in layers} if room is None else {}
        self._waiting: list[Piece] = []

    def read(self, capture: Capture) -> Piece:
        """Take a new batch: encode it soon, or put its residuals aside in main memory."""
        if self._room is not None:
            on_cpu = {n: x.cpu() for n, x in capture.residuals.items()}
            return Piece(replace(capture, residuals=on_cpu), {})
        piece = Piece(capture, {})
        self._waiting.append(piece)
        if sum(each.capture.n_tokens for each in self._waiting) >= TOGETHER:
            self._encode_waiting()
        return piece

    def is_full(self, pieces: Sequence[Piece]) -> bool:
        """Whether the waiting batches should be encoded now."""
        if self._room is None:
            return True
        return sum(piece.residual_bytes for piece in pieces) * 2 > self._room

    def settle(self, pieces: Sequence[Piece]) -> None:
        """Encode the waiting batches, layer by layer."""
        if self._room is None:
            self._encode_waiting()
            return
        for layer in self._layers:
            sae = self._load(layer)
            for some in _together(pieces):
                _encode(sae, layer, some)
            del sae

    def _encode_waiting(self) -> None:
        for layer, sae in self._saes.items():
            if self._waiting:
                _encode(sae, layer, self._waiting)
                if len(self._saes) > 1:
                    give_back(sae.W_enc)
        self._waiting = []


def _together(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The pieces in groups of at least `TOGETHER` tokens; the last group may have fewer."""
    group: list[Piece] = []
    for piece in pieces:
        group.append(piece)
        if sum(each.capture.n_tokens for each in group) >= TOGETHER:
            yield group
            group = []
    if group:
        yield group


def _encode(sae: LayerSAE, layer: int, pieces: Sequence[Piece]) -> None:
    """Encode the residuals of one layer of some batches, and drop them."""
    device = sae.W_enc.device
    residuals = [piece.capture.residuals.pop(layer).to(device) for piece in pieces]
    packed = pack(sae.encode_sparse(torch.cat(residuals)))
    start = 0
    for piece, residual in zip(pieces, residuals, strict=True):
        piece.codes[layer] = packed.rows(start, start + len(residual))
        start += len(residual)


def coded_documents(
    pieces: Sequence[Piece], documents: Sequence[Document], first: int, tokenizer: Any
) -> list[CodedDocument]:
    """The documents of one shard in order; `first` is the number of the first in the stream."""
    found: dict[int, CodedDocument] = {}
    for piece in pieces:
        capture = piece.capture
        ids = capture.token_ids.numpy()
        extreme = {layer: x.cpu().numpy() for layer, x in capture.extreme.items()}
        offsets = capture.offsets.tolist()
        for i, number in enumerate(capture.doc_ids):
            start, end = offsets[i], offsets[i + 1]
            document, text, spans = (
                documents[number - first],
                capture.texts[i],
                capture.char_spans[i],
            )
            found[number] = CodedDocument(
                key=document.key,
                text=text,
                labels=dict(document.labels),
                token_ids=ids[start:end],
                tokens=_strings(text, spans, ids[start:end], tokenizer),
                spans=None if spans is None else np.array(spans, dtype=np.int64).reshape(-1, 2),
                truncated=capture.truncated[i],
                codes={layer: codes.rows(start, end) for layer, codes in piece.codes.items()},
                extreme={layer: flags[start:end] for layer, flags in extreme.items()},
            )
    return [found[first + i] for i in range(len(documents))]


def _strings(text: str | None, spans: Any, ids: np.ndarray, tokenizer: Any) -> list[str]:
    """The characters of each token; for a part of a character, the whole character."""
    if text is None or spans is None:
        return [tokenizer.decode([token]) for token in ids.tolist()]
    return [text[start:end] for start, end in spans]


@dataclass(frozen=True)
class Job:
    """Everything that is decided before the model runs for the first time."""

    out: Path
    corpus: Corpus
    facts: CorpusFacts
    manifest: Manifest
    model: nn.Module
    tokenizer: Any
    token_budget: int
    sae_folder: str | os.PathLike[str] | None
    sae_revision: str | None
    say: Callable[[str], None]

    def missing(self, i: int = 0, n: int = 1) -> list[int]:
        """The shards that process i of n has to make: those that are missing or damaged."""
        first = self.facts.first_shard
        shards = []
        for shard in range(first + i, first + self.facts.n_shards, n):
            folder = shard_folder(self.out, shard)
            if not folder.is_dir():
                shards.append(shard)
            elif (problem := damage(folder)) is not None:
                self.say(f"made again: {problem}")
                shards.append(shard)
        return shards

    def encoder(self, sae_memory: int | None) -> Encoder:
        """The SAEs, all loaded, or one at a time where they do not fit; says what that costs."""
        return Encoder(self._load, self.manifest.layers, self._room(sae_memory))

    def run(
        self,
        shards: Sequence[int],
        encoder: Encoder,
        progress: bool,
        done: Callable[[int], None] = lambda shard: None,
    ) -> None:
        """Run the model and the SAEs over the documents of these shards, and write them to disk.

        The numbers must be ascending, because the corpus is read once from its beginning. A shard
        is written while the model reads the next one; at most one waits. `done` is called with the
        number of each shard that is written.
        """
        total = sum(end - start for start, end in map(self.facts.span, shards))
        waiting: list[_Read] = []
        truncated = 0
        writing: Future[None] | None = None
        with (
            ThreadPoolExecutor(1) as writer,
            tqdm(
                total=total, unit="doc", disable=not progress, file=sys.stderr, desc="extract"
            ) as bar,
        ):
            for read in self._read(shards, encoder, bar):
                waiting.append(read)
                pieces = [piece for each in waiting for piece in each.pieces]
                if not encoder.is_full(pieces) and read.shard != shards[-1]:
                    continue
                encoder.settle(pieces)
                for each in waiting:
                    coded = coded_documents(each.pieces, each.documents, each.first, self.tokenizer)
                    truncated += sum(document.truncated for document in coded)
                    if writing is not None:
                        writing.result()
                    writing = writer.submit(self._write, each.shard, coded, done)
                waiting.clear()
            if writing is not None:
                writing.result()
        if truncated:
            self.say(f"{truncated:,} documents were cut to their first tokens (see `truncated`)")

    def _write(self, shard: int, coded: list[CodedDocument], done: Callable[[int], None]) -> None:
        with exclusive(self.out, part=shard, name=".shards.lock"):
            write_shard(self.out, shard, self.manifest, coded)
        done(shard)

    def _read(self, shards: Sequence[int], encoder: Encoder, bar: tqdm[Any]) -> Iterator[_Read]:
        """Run the model over the documents of each shard."""
        settings = self.manifest.settings
        ahead: deque[Document] = deque()
        captures = iter_captures(
            self.model,
            self._stream(shards, ahead),
            self.manifest.layers,
            tokenizer=self.tokenizer,
            token_budget=self.token_budget,
            window=self.facts.shard_docs,  # a batch never crosses a shard's border
            max_tokens=settings.max_tokens,
            truncate=settings.truncate,
            enable_thinking=settings.enable_thinking,
            add_generation_prompt=settings.add_generation_prompt,
            extreme_norm_ratio=settings.extreme_norm_ratio,
        )
        began, tokens, first = time.monotonic(), 0, 0
        for shard in shards:
            start, end = self.facts.span(shard)
            pieces: list[Piece] = []
            while sum(len(piece.capture) for piece in pieces) < end - start:
                capture = next(captures)
                tokens += capture.n_tokens
                if settings.last_token:
                    capture = capture.last_tokens()
                pieces.append(encoder.read(capture))
                rate = tokens / (time.monotonic() - began)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                bar.update(len(capture))
                del capture  # whose residuals may be elsewhere by now, during the next run
            documents = [ahead.popleft() for _ in range(end - start)]
            yield _Read(shard, first, documents, pieces)
            first += end - start

    def _stream(self, shards: Sequence[int], ahead: deque[Document]) -> Iterator[Any]:
        """The contents of some shards' documents; `ahead` keeps them until they are written."""
        spans = map(self.facts.span, shards)
        start, end = next(spans)
        for number, document in enumerate(self.corpus, start=self.facts.first_doc):
            if number == end:
                if (following := next(spans, None)) is None:
                    return
                start, end = following
            if number >= start:
                ahead.append(document)
                yield document.content

    def _load(self, layer: int) -> LayerSAE:
        from qwen_scope_lens.saes.load import open_sae

        return open_sae(
            self.manifest.saes[layer].ref,
            folder=self.sae_folder,
            revision=self.sae_revision,
            device=str(layer_device(self.model, layer)),
        )

    def _room(self, sae_memory: int | None) -> int | None:
        """The bytes of residuals that may wait, or None where all SAEs fit; says what it costs."""
        one = LayerRef.parse(next(iter(self.manifest.saes.values())).ref).row.bytes_per_layer
        count = len(self.manifest.layers)
        if sae_memory is None or count * one <= sae_memory:
            self.say(f"{count} SAEs in memory: {count * one / 1e9:,.2f} GB")
            return None
        if one > sae_memory:
            raise TooLittleData(
                f"sae_memory is {sae_memory / 1e9:,.2f} GB, one SAE alone needs {one / 1e9:,.2f} GB"
            )
        room = sae_memory - one
        width = count * self.manifest.model.d_model
        width *= 4 if self.manifest.model.dtype == "float32" else 2
        self.say(
            f"{count} SAEs need {count * one / 1e9:,.2f} GB, sae_memory is {sae_memory / 1e9:,.2f}"
            f" GB: they are loaded one at a time, {count * one / 1e9:,.2f} GB read again for every"
            f" {max(1, room // (2 * width)):,} tokens (or every shard of {self.facts.shard_docs}"
            f" documents, where that is more). The residuals of a token take {width:,} bytes"
        )
        return room


@dataclass(frozen=True)
class Sender:
    """A job whose shards are sent to a URL. A shard is on this machine only until it was sent."""

    job: Job
    remote: Remote

    @classmethod
    def begin(cls, job: Job, remote: Remote) -> Sender:
        """Put the manifest there, or compare it with the one that is there."""
        remote.begin(job.manifest)
        return cls(job, remote)

    def missing(self, shards: Sequence[int]) -> list[int]:
        """Those shards that are not at the URL; those that are whole here are sent first."""
        there = self.remote.whole(shards)
        missing = []
        for shard in shards:
            place = shard_folder(self.job.out, shard)
            if shard not in there and place.is_dir() and damage(place) is None:
                self._send(shard)
            elif shard not in there:
                missing.append(shard)
        return missing

    def run(self, shards: Sequence[int], encoder: Encoder, progress: bool) -> None:
        """Make these shards, and send each once it is written."""
        self.job.run(shards, encoder, progress, done=self._send)

    def _send(self, shard: int) -> None:
        self.remote.send(self.job.out, shard)
        shutil.rmtree(shard_folder(self.job.out, shard))


@dataclass(frozen=True)
class _Read:
    """The documents of one shard after the model has read them."""

    shard: int
    first: int  # the number of its first document in the stream
    documents: list[Document]
    pieces: list[Piece]
