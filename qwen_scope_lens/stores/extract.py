"""From a corpus to a store: documents through the model and the SAEs, shard by shard.

`extract` can be killed at any instant and called again: finished shards stay, and the rest is made
as it would have been made without the interruption. A `Request` says what is wanted, `check`
refuses everything that can be refused before a weight is read, `prepare` loads the model and writes
the manifest, and `Job` in `extraction.py`
finds the shards that are missing and makes them. `extract_ray.py` does the same on a cluster.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import Group, find_group
from qwen_scope_lens.errors import (
    BadCorpus,
    ScopeError,
    StoreDamaged,
    StoreMismatch,
)
from qwen_scope_lens.files import exclusive, is_url, refuse_link
from qwen_scope_lens.models.residuals import EXTREME_NORM_RATIO
from qwen_scope_lens.models.tokenize import find_tokenizer
from qwen_scope_lens.stores import facts
from qwen_scope_lens.stores.corpus import Corpus, Survey, as_corpus, survey
from qwen_scope_lens.stores.extraction import Job, Sender
from qwen_scope_lens.stores.fingerprints import is_sample, sampled_fingerprint
from qwen_scope_lens.stores.manifest import CorpusFacts, Manifest, SAEFacts, Settings
from qwen_scope_lens.stores.remote import Remote
from qwen_scope_lens.stores.store import FeatureStore
from qwen_scope_lens.version import versions

__all__ = [
    "SHARD_DOCS",
    "Checked",
    "Request",
    "check",
    "check_remote",
    "extract",
    "extract_request",
    "prepare",
]

SHARD_DOCS = 512
TOKEN_BUDGET = 4096


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to extract and where to put it, as a caller says it; nothing is loaded yet."""

    model: str | Path | nn.Module  # a name, or a model in memory
    group: str
    layers: Sequence[int]
    out: str | os.PathLike[str]
    settings: Settings = field(default_factory=Settings)
    token_budget: int | None = None
    shard_docs: int | None = None
    append: bool = False
    sae_memory: int | None = None
    sae_folder: str | os.PathLike[str] | None = None
    sae_revision: str | None = None
    device: str | None = None


def extract(
    documents: Any,
    *,
    model: str | Path | nn.Module,
    group: str,
    layers: Sequence[int],
    out: str | os.PathLike[str],
    tokenizer: Any = None,
    max_tokens: int | None = None,
    truncate: bool = True,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = False,
    extreme_norm_ratio: float = EXTREME_NORM_RATIO,
    last_token: bool = False,
    token_budget: int | None = None,
    shard_docs: int | None = None,
    append: bool = False,
    sae_memory: int | None = None,
    worker: tuple[int, int] = (0, 1),
    rank: tuple[int, int] | None = None,
    sae_folder: str | os.PathLike[str] | None = None,
    sae_revision: str | None = None,
    device: str | None = None,
    progress: bool = True,
    **model_options: Any,
) -> FeatureStore:
    """Write the sparse features of every document into a store on disk.

    Args:
        documents: what `read_corpus` returns, or a list of texts, chats, mappings (with `text` and
            labels) or Documents.
        model: a name for `load_model` (only the layers needed are read), or a model in memory.
        group: the SAEs, such as `qwen3-8b-base/w64k-l0-50`; `layers` are the layers to store.
        out: the store's folder, or a URL such as `s3://bucket/store` (extra `remote`).
        max_tokens: longer documents are cut to this many tokens (by default to the model's
            context), or refused with `truncate=False`.
        enable_thinking: must be given for chats.
        last_token: encode and store the last token of each document only, which is all that a
            footprint of prompts needs.
        token_budget: the most tokens per batch, pads included (4096).
        shard_docs: documents per shard (512). A killed run loses at most one shard.
        append: add the documents to a store that has others.
        sae_memory: bytes for SAE weights. Where not all SAEs fit, the residuals of some shards are
            kept and the SAEs go over them one by one.
        worker: (i, n) makes every n-th shard, beginning with shard i, so that n processes share
            the work. `rank` is the older name.
    """
    if rank is not None:
        warnings.warn("rank= is now called worker=", DeprecationWarning, stacklevel=2)
        worker = rank
    settings = Settings(
        max_tokens,
        truncate,
        enable_thinking,
        add_generation_prompt,
        extreme_norm_ratio,
        last_token,
    )
    request = Request(
        model=model,
        group=group,
        layers=layers,
        out=out,
        settings=settings,
        token_budget=token_budget,
        shard_docs=shard_docs,
        append=append,
        sae_memory=sae_memory,
        sae_folder=sae_folder,
        sae_revision=sae_revision,
        device=device,
    )
    return extract_request(
        documents, request, tokenizer=tokenizer, worker=worker, progress=progress, **model_options
    )


def extract_request(
    documents: Any,
    request: Request,
    *,
    tokenizer: Any = None,
    worker: tuple[int, int] = (0, 1),
    progress: bool = True,
    **model_options: Any,
) -> FeatureStore:
    """Do what `extract` does, for a request."""
    i, n = worker
    if not 0 <= i < n:
        raise BadCorpus(f"worker {i}/{n}: expected 0/{n}..{n - 1}/{n}")
    say = _say if progress else _silent
    if is_url(request.out):
        remote = Remote.of(str(request.out))
        with remote.staging(f"{i}-of-{n}") as folder:
            checked = check_remote(documents, request, remote, folder)
            job = prepare(checked, tokenizer, say, **model_options)
            sender, first = Sender.begin(job, remote), job.facts.first_shard
            if missing := sender.missing(range(first + i, first + job.facts.n_shards, n)):
                sender.run(missing, job.encoder(request.sae_memory), progress)
            else:
                say("nothing to do: every shard is there")
        return FeatureStore.open(remote.url)
    checked = check(documents, request)
    job = prepare(checked, tokenizer, say, **model_options)
    lock = job.out if n == 1 else job.out / ".ranks" / f"{i}-of-{n}"
    if lock != job.out:
        refuse_link(lock)
    with exclusive(lock):
        if missing := job.missing(i, n):
            job.run(missing, job.encoder(request.sae_memory), progress)
        else:
            job.say("nothing to do: every shard is there")
    return FeatureStore.open(job.out)


@dataclass(frozen=True)
class Checked:
    """A request that was checked: everything is known but the model."""

    request: Request
    group: Group
    corpus: Corpus
    survey: Survey
    saes: dict[int, SAEFacts]
    facts: CorpusFacts  # as they are in the existing store, or as they would be there
    folder: Path


def check(documents: Any, request: Request) -> Checked:
    """Refuse bad rows and other SAEs, settings or documents before a model is loaded."""
    row = find_group(request.group)
    wanted = sorted({row.check_layer(layer) for layer in request.layers})
    if not wanted:
        raise BadCorpus("no layer was asked for: pass layers=[...]")
    if isinstance(request.model, (str, Path)):
        facts.check_config(str(request.model), row)
    corpus = as_corpus(documents)
    found = survey(corpus, corpus.name)
    if found.has_chats and request.settings.enable_thinking is None:
        raise BadCorpus(
            f"{corpus.name} holds chats: say enable_thinking=True or False (--thinking,"
            " --no-thinking), because the template changes the text with it"
        )
    saes = {
        n: facts.sae_facts(LayerRef(row.short, n), request.sae_folder, request.sae_revision)
        for n in wanted
    }
    mine = CorpusFacts(
        name=corpus.name,
        n_docs=found.n_docs,
        sha256=found.sha256,
        shard_docs=request.shard_docs or SHARD_DOCS,
        token_budget=request.token_budget or TOKEN_BUDGET,
        size=corpus.size,
    )
    folder = Path(request.out).expanduser()
    for name in (".manifest", ".ranks", "shards"):
        refuse_link(folder / name)
    if Manifest.exists(folder):
        likely = replace(Manifest.read(folder), saes=saes, settings=request.settings)
        mine = _current(_joined(folder, likely, mine, found.labels, request.append), mine)
    if request.shard_docs not in (None, mine.shard_docs):
        raise StoreMismatch(
            f"{folder} has {mine.shard_docs} documents per shard, {request.shard_docs} were asked"
            " for: leave shard_docs out to go on"
        )
    return Checked(request, row, corpus, found, saes, mine, folder)


def check_remote(documents: Any, request: Request, remote: Remote, folder: Path) -> Checked:
    """Refuse what `check` refuses, for a store at a URL whose manifest is in `folder`."""
    if request.append:
        raise StoreMismatch(
            f"{remote.url}: a store at a URL cannot be appended to. Copy it here (`qsl store"
            " copy`), append, and copy the result to another URL"
        )
    remote.refuse_unreachable()
    try:
        checked = check(documents, replace(request, out=folder))
    except ScopeError as error:
        raise type(error)(str(error).replace(str(folder), remote.url)) from error
    return replace(checked, request=request)


def prepare(
    checked: Checked,
    tokenizer: Any = None,
    say: Callable[[str], None] = lambda line: None,
    **model_options: Any,
) -> Job:
    """Load the model, compare it with the store's model, and write the manifest."""
    request, folder, found = checked.request, checked.folder, checked.survey
    wanted, model = sorted(checked.saes), request.model
    if isinstance(model, (str, Path)):
        from qwen_scope_lens.models.open import open_model

        model = open_model(model, up_to_layer=wanted[-1], device=request.device, **model_options)
    facts.check_model(model, checked.group)
    tokenizer = find_tokenizer(model, tokenizer)
    mine = Manifest(
        model=facts.model_facts(model, wanted),
        tokenizer=facts.tokenizer_facts(tokenizer),
        saes=checked.saes,
        settings=request.settings,
        labels={},
        corpora=(),
        versions=versions(),
    )
    if Manifest.exists(folder) and is_sample(Manifest.read(folder).model.fingerprint):
        older = sampled_fingerprint(model, wanted[-1])
        mine = replace(mine, model=replace(mine.model, fingerprint=older))
        say(
            f"NOTE: {folder} was begun by an older version, which looked at a sample of the model's"
            " weights only: a model that differs in a few of them would not be noticed"
        )
    if note := facts.model_note(mine.model, checked.group):
        say(f"NOTE: {note}")
    with exclusive(folder / ".manifest", wait=True):
        manifest = _joined(folder, mine, checked.facts, found.labels, request.append)
        if not Manifest.exists(folder) or Manifest.read(folder) != manifest:
            manifest.write(folder)
    current = _current(manifest, checked.facts)
    budget = request.token_budget or current.token_budget
    if budget != current.token_budget:
        say(
            f"NOTE: {budget} tokens per batch, but the store was begun with {current.token_budget}:"
            " in floating point, values may differ in their last digit from those of an"
            " undisturbed run"
        )
    return Job(
        out=folder,
        corpus=checked.corpus,
        facts=current,
        manifest=manifest,
        model=model,
        tokenizer=tokenizer,
        token_budget=budget,
        sae_folder=request.sae_folder,
        sae_revision=request.sae_revision,
        say=say,
    )


def _current(manifest: Manifest, corpus: CorpusFacts) -> CorpusFacts:
    [found] = [known for known in manifest.corpora if known.sha256 == corpus.sha256]
    return found


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
