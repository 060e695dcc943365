"""From a corpus to a store: documents through model and SAEs, shard by shard.

`extract` can be killed at any instant and called again: finished shards stay, the rest is made as
it would have been. Batches never cross a shard's border, so a shard's bytes do not depend on where
a run stopped. Reading residuals is `models/capture.py`, encoding `saes/`, writing `shards.py`; here
is the order in which that happens. The same on a cluster is `ray.py`.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.errors import BadCorpus, StoreDamaged, StoreMismatch, TooLittleData
from qwen_scope_lens.features import facts
from qwen_scope_lens.features.corpus import Corpus, Document, as_corpus, survey
from qwen_scope_lens.features.encoding import Encoder, Piece, coded_documents
from qwen_scope_lens.features.manifest import CorpusFacts, Manifest, Settings
from qwen_scope_lens.features.shards import damage, shard_folder, write_shard
from qwen_scope_lens.features.store import FeatureStore
from qwen_scope_lens.files import exclusive
from qwen_scope_lens.models.capture import EXTREME_NORM_RATIO, iter_captures
from qwen_scope_lens.models.layers import input_device
from qwen_scope_lens.models.load import load_model
from qwen_scope_lens.models.tokens import find_tokenizer

__all__ = ["SHARD_DOCS", "Job", "extract", "prepare"]

SHARD_DOCS = 512
TOKEN_BUDGET = 4096


def extract(
    documents: Any,
    *,
    model: Any,
    group: str,
    layers: Sequence[int],
    out: str | os.PathLike[str],
    tokenizer: Any = None,
    max_tokens: int | None = None,
    truncate: bool = True,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = False,
    extreme_norm_ratio: float = EXTREME_NORM_RATIO,
    token_budget: int | None = None,
    shard_docs: int | None = None,
    append: bool = False,
    sae_memory: int | None = None,
    rank: tuple[int, int] = (0, 1),
    sae_folder: str | os.PathLike[str] | None = None,
    sae_revision: str | None = None,
    device: str | None = None,
    progress: bool = True,
    **model_options: Any,
) -> FeatureStore:
    """The sparse features of every document, in a store on disk.

    Args:
        documents: of `read_corpus`, or a list of texts, chats, mappings (`text`, labels) or
            Documents.
        model: a name for `load_model` (only the layers needed are read), or a model in memory.
        group: the SAEs, `qwen3-8b-base/w64k-l0-50`; `layers` are those to store.
        max_tokens: (else the model's context) cuts longer documents, or refuses them with
            `truncate=False`.
        enable_thinking: has to be said for chats.
        token_budget: tokens of a batch, pads included (4096).
        shard_docs: documents of a shard (512): what a killed run loses at most.
        append: add the documents to a store that has others.
        sae_memory: bytes for SAE weights. Where not all SAEs fit, the residuals of some shards are
            kept and the SAEs go over them one by one.
        rank: (i, n) makes every n-th shard from i: n processes share the work.
    """
    job = prepare(
        documents,
        model=model,
        group=group,
        layers=layers,
        out=out,
        tokenizer=tokenizer,
        settings=Settings(
            max_tokens, truncate, enable_thinking, add_generation_prompt, extreme_norm_ratio
        ),
        token_budget=token_budget,
        shard_docs=shard_docs,
        append=append,
        sae_folder=sae_folder,
        sae_revision=sae_revision,
        device=device,
        say=_say if progress else _silent,
        **model_options,
    )
    i, n = rank
    if not 0 <= i < n:
        raise BadCorpus(f"rank {i}/{n}: expected 0/{n}..{n - 1}/{n}")
    lock = job.out if n == 1 else job.out / ".ranks" / f"{i}-of-{n}"
    with exclusive(lock):
        job.run(job.missing(i, n), sae_memory, progress)
    return FeatureStore.open(job.out)


@dataclass(frozen=True)
class Job:
    """Everything that is settled before the first forward."""

    out: Path
    corpus: Corpus
    facts: CorpusFacts
    manifest: Manifest
    model: Any
    tokenizer: Any
    token_budget: int
    sae_folder: str | os.PathLike[str] | None
    sae_revision: str | None
    say: Callable[[str], None]

    def missing(self, i: int = 0, n: int = 1) -> list[int]:
        """The shards that rank i of n has to make: not there, or damaged."""
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

    def run(self, shards: Sequence[int], sae_memory: int | None, progress: bool) -> None:
        """Make the given shards."""
        if not shards:
            self.say("nothing to do: every shard is there")
            return
        encoder = Encoder(self._load, self.manifest.layers, self._room(sae_memory))
        total = sum(end - start for start, end in map(self.facts.span, shards))
        waiting: list[_Read] = []
        truncated = 0
        with tqdm(
            total=total, unit="doc", disable=not progress, file=sys.stderr, desc="extract"
        ) as bar:
            for read in self._read(shards, encoder, bar):
                waiting.append(read)
                pieces = [piece for each in waiting for piece in each.pieces]
                if not encoder.is_full(pieces) and read.shard != shards[-1]:
                    continue
                encoder.settle(pieces)
                for each in waiting:
                    coded = coded_documents(each.pieces, each.documents, each.first, self.tokenizer)
                    write_shard(self.out, each.shard, self.manifest, coded)
                    truncated += sum(document.truncated for document in coded)
                waiting.clear()
        if truncated:
            self.say(f"{truncated:,} documents were cut to their first tokens (see `truncated`)")

    def _read(self, shards: Sequence[int], encoder: Encoder, bar: Any) -> Iterator[_Read]:
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
                pieces.append(encoder.read(capture))
                tokens += capture.n_tokens
                rate = tokens / (time.monotonic() - began)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                bar.update(len(capture))
            documents = [ahead.popleft() for _ in range(end - start)]
            yield _Read(shard, first, documents, pieces)
            first += end - start

    def _stream(self, shards: Sequence[int], ahead: deque[Document]) -> Iterator[Any]:
        """The contents of the documents of some shards, remembered until they are written."""
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

    def _load(self, layer: int) -> Any:
        from qwen_scope_lens.saes.load import load_sae

        return load_sae(
            self.manifest.saes[layer].ref,
            folder=self.sae_folder,
            revision=self.sae_revision,
            device=str(input_device(self.model)),
        )

    def _room(self, sae_memory: int | None) -> int | None:
        """Bytes of residuals that may wait, or None where all SAEs fit. Says what it costs."""
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
        width = self.manifest.model.d_model * count
        self.say(
            f"{count} SAEs need {count * one / 1e9:,.2f} GB, sae_memory is {sae_memory / 1e9:,.2f}"
            f" GB: they are loaded one at a time, {count * one / 1e9:,.2f} GB read again for every"
            f" {max(1, room // (4 * width)):,} tokens (or every shard of {self.facts.shard_docs}"
            f" documents, where that is more). A token's residuals wait in {4 * width:,} bytes"
        )
        return room


@dataclass(frozen=True)
class _Read:
    """One shard's documents after the forward."""

    shard: int
    first: int  # the stream's number of its first document
    documents: list[Document]
    pieces: list[Piece]


def prepare(
    documents: Any,
    *,
    model: Any,
    group: str,
    layers: Sequence[int],
    out: str | os.PathLike[str],
    tokenizer: Any,
    settings: Settings,
    token_budget: int | None = None,
    shard_docs: int | None = None,
    append: bool = False,
    sae_folder: str | os.PathLike[str] | None = None,
    sae_revision: str | None = None,
    device: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    **model_options: Any,
) -> Job:
    """Check everything that can be checked before the work, and write the manifest."""
    row = find_group(group)
    wanted = sorted({row.check_layer(layer) for layer in layers})
    if not wanted:
        raise BadCorpus("no layer was asked for: pass layers=[...]")
    if isinstance(model, (str, Path)):
        facts.check_config(str(model), row)
    corpus = as_corpus(documents)
    found = survey(corpus, corpus.name)
    if found.has_chats and settings.enable_thinking is None:
        raise BadCorpus(
            f"{corpus.name} holds chats: say enable_thinking=True or False (--thinking,"
            " --no-thinking), the template changes the text with it"
        )
    saes = {n: facts.sae_facts(LayerRef(row.short, n), sae_folder, sae_revision) for n in wanted}
    if isinstance(model, (str, Path)):
        model = load_model(model, up_to_layer=wanted[-1], device=device, **model_options)
    facts.check_model(model, row)
    tokenizer = find_tokenizer(model, tokenizer)
    mine = Manifest(
        model=facts.model_facts(model, wanted),
        tokenizer=facts.tokenizer_facts(tokenizer),
        saes=saes,
        settings=settings,
        labels={},
        corpora=(),
        versions=facts.versions(),
    )
    if note := facts.model_note(mine.model, row):
        say(f"NOTE: {note}")
    corpus_facts = CorpusFacts(
        name=corpus.name,
        n_docs=found.n_docs,
        sha256=found.sha256,
        shard_docs=shard_docs or SHARD_DOCS,
        token_budget=token_budget or TOKEN_BUDGET,
        size=corpus.size,
    )
    folder = Path(out).expanduser()
    with exclusive(folder / ".manifest", wait=True):
        manifest = _joined(folder, mine, corpus_facts, found.labels, append)
        if not Manifest.exists(folder) or Manifest.read(folder) != manifest:
            manifest.write(folder)
    [current] = [c for c in manifest.corpora if c.sha256 == found.sha256]
    if shard_docs not in (None, current.shard_docs):
        raise StoreMismatch(
            f"{folder} has {current.shard_docs} documents a shard, {shard_docs} were asked for:"
            " leave shard_docs out to go on"
        )
    budget = token_budget or current.token_budget
    if budget != current.token_budget:
        say(
            f"NOTE: {budget} tokens a batch, the store was begun with {current.token_budget}: in"
            " floating point, values may differ in their last digit from an undisturbed run's"
        )
    return Job(
        folder, corpus, current, manifest, model, tokenizer, budget, sae_folder, sae_revision, say
    )


def _joined(
    folder: Path, mine: Manifest, corpus: CorpusFacts, labels: dict[str, str], append: bool
) -> Manifest:
    """The manifest after this corpus: a new one, the same (resuming), or one corpus longer."""
    if not Manifest.exists(folder):
        if (folder / "shards").exists():
            raise StoreDamaged(f"{folder} has shards but no manifest.json: choose another folder")
        return mine.with_corpus(corpus, labels)
    theirs = Manifest.read(folder)
    mine.require_same(theirs, "this run", str(folder))
    if any(c.sha256 == corpus.sha256 for c in theirs.corpora):
        return theirs
    if not append:
        raise StoreMismatch(
            f"{folder} holds {', '.join(c.name for c in theirs.corpora)}, with other documents than"
            f" {corpus.name} ({corpus.n_docs:,} documents): pass append=True (--append) to add"
            " these, or choose another folder"
        )
    if not FeatureStore.open(folder).is_complete:
        raise StoreMismatch(
            f"{folder} is not finished: run its own `qsl extract` again first, then append"
        )
    return theirs.with_corpus(corpus, labels)


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _silent(line: str) -> None:
    pass
