"""The same extraction on a cluster: Ray Data hands shards to actors, each with its own model.

An actor loads the model and the SAEs once. It writes whole shards into the store's folder, which
all machines must be able to write, or sends them to the store's URL. A lost actor is replaced and
its shard is made again. Between machines of the same kind, the store equals that of a single
process byte for byte. Ray is the optional extra `ray`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from qwen_scope_lens.errors import BadCorpus, ScopeError, WrongModel
from qwen_scope_lens.extras import require
from qwen_scope_lens.files import is_url
from qwen_scope_lens.stores.corpus_formats import Given
from qwen_scope_lens.stores.extract import Checked, Request, check, check_remote, prepare
from qwen_scope_lens.stores.extraction import Job, Sender
from qwen_scope_lens.stores.remote import Remote
from qwen_scope_lens.stores.shard_files import damage, shard_folder
from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["extract_on_ray"]

_ENVIRONMENT = ("QWEN_SCOPE_HOME", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "OMP_NUM_THREADS")
_STARTS = 3
_MOST_CHARACTERS = 10_000_000  # of documents in memory
_OBJECT_STORE = 100_000_000  # bytes; only numbers of shards travel


def extract_on_ray(
    documents: Any,
    request: Request,
    *,
    workers: int = 2,
    progress: bool = True,
) -> FeatureStore:
    """Do what `extract` does, with `workers` actors; the request names the model.

    The cluster is the one that runs already, else the one at `RAY_ADDRESS`, else a local one on
    this machine. An actor takes one CPU, and one GPU where the request's device is `cuda`.
    """
    ray = require("ray", "ray")
    data = require("ray.data", "ray")
    if workers < 1:
        raise BadCorpus(f"{workers} workers: expected at least one")
    if not isinstance(request.model, (str, Path)):
        raise WrongModel("on a cluster every actor loads the model: name it, instead of passing it")
    if is_url(request.out):
        remote = Remote.of(str(request.out))
        with remote.staging("ray") as folder:
            checked = check_remote(documents, request, remote, folder)
        there = remote.whole(_shards(checked))
        missing = [n for n in _shards(checked) if n not in there]
    else:
        checked = check(documents, request)
        every = _shards(checked)
        missing = [n for n in every if not _is_whole(shard_folder(checked.folder, n))]
    if missing:
        _refuse_large(checked)
        own = not ray.is_initialized()
        if own:
            _start(ray, workers)
        try:
            rows = _made(data, checked, missing, workers)
            with tqdm(
                total=len(missing), unit="shard", disable=not progress, file=sys.stderr, desc="ray"
            ) as bar:
                for _ in rows:
                    bar.update()
        except ray.exceptions.RayError as error:
            raise _cause(error) from error
        finally:
            if own:
                ray.shutdown()
    return FeatureStore.open(request.out)


def _refuse_large(checked: Checked) -> None:
    """Raise for documents in memory that would not pass through a small object store."""
    characters = checked.survey.characters
    if isinstance(checked.corpus.source.reader, Given) and characters > _MOST_CHARACTERS:
        raise BadCorpus(
            f"{checked.corpus.name} hold {characters:,} characters, and Ray would send them to"
            f" every actor: expected {_MOST_CHARACTERS:,} or fewer. Write them to a file that all"
            " machines can read, and pass read_corpus(path)"
        )


def _shards(checked: Checked) -> range:
    first = checked.facts.first_shard
    return range(first, first + checked.facts.n_shards)


def _is_whole(folder: Path) -> bool:
    return folder.is_dir() and damage(folder) is None


def _made(data: Any, checked: Checked, missing: list[int], workers: int) -> Iterator[Any]:
    """Ray's pipeline: one task per shard, so that a lost actor costs one shard."""
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    device = checked.request.device or ""
    items = data.from_items([{"shard": n} for n in missing], override_num_blocks=len(missing))
    made = items.map_batches(
        _Maker,
        fn_constructor_args=(checked,),
        batch_size=1,
        compute=data.ActorPoolStrategy(size=min(workers, len(missing))),
        num_cpus=1,
        num_gpus=1 if device.startswith("cuda") else 0,
    )
    rows: Iterator[Any] = made.iter_rows()
    return rows


class _Maker:
    """An actor: it holds a prepared job, with the model, and the SAEs."""

    def __init__(self, checked: Checked) -> None:
        self._job: Job | Sender
        if is_url(out := checked.request.out):
            remote = Remote.of(str(out))
            self._folder = tempfile.TemporaryDirectory(prefix="qsl-")
            checked = replace(checked, folder=Path(self._folder.name))
            if (manifest := remote.manifest()) is not None:
                manifest.write(checked.folder)
            job = prepare(checked)
            self._job = Sender.begin(job, remote)
        else:
            job = self._job = prepare(checked)
        self._out = job.out
        self._encoder = job.encoder(checked.request.sae_memory)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shards = [int(shard) for shard in batch["shard"]]
        if isinstance(self._job, Sender):
            missing = self._job.missing(shards)
        else:
            missing = [n for n in shards if not _is_whole(shard_folder(self._out, n))]
        if missing:
            self._job.run(missing, self._encoder, progress=False)
        return batch


def _start(ray: Any, workers: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # not a background job
    variables = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    local: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:
        local = {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE,
        }
    for _ in range(_STARTS):
        try:
            ray.init(
                runtime_env={"env_vars": variables},
                log_to_driver=False,
                logging_level="ERROR",
                **local,
            )
            return
        except Exception as error:  # Ray waits 30 s, which a busy machine can need
            ray.shutdown()
            last = error
    where = os.environ.get("RAY_ADDRESS", "on this machine")
    raise ScopeError(
        f"no Ray cluster could be used {where} ({last}): expected one that answers. Start one with"
        " `ray start --head` and set RAY_ADDRESS=auto, or work without Ray (--worker I/N)"
    ) from last


def _cause(error: BaseException) -> ScopeError:
    """The error of a worker: our own one where there is one in the chain of causes."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ScopeError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    words = str(error).strip().splitlines()
    return ScopeError(f"the job failed on the cluster: {words[-1] if words else error!r}")
