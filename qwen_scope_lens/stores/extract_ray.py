"""The same extraction on a cluster: Ray Data hands shards to actors, each with its own model.

An actor loads model and SAEs once and writes whole shards into the store's folder, which all
machines have to see. A lost actor is replaced and its shard made again. The store is the one that
a single process makes, byte for byte on like machines. Ray is the optional extra `ray`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from qwen_scope_lens.errors import BadCorpus, ScopeError
from qwen_scope_lens.extras import require
from qwen_scope_lens.stores.extract import Checked, check, prepare
from qwen_scope_lens.stores.manifest import Settings
from qwen_scope_lens.stores.shard_files import damage, shard_folder
from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["extract_on_ray"]

_ENVIRONMENT = ("QWEN_SCOPE_HOME", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "OMP_NUM_THREADS")
_OBJECT_STORE = 100_000_000  # bytes; only numbers of shards travel


def extract_on_ray(
    documents: Any,
    *,
    model: str,
    group: str,
    layers: Sequence[int],
    out: str | os.PathLike[str],
    settings: Settings,
    workers: int = 2,
    device: str | None = None,
    token_budget: int | None = None,
    shard_docs: int | None = None,
    append: bool = False,
    sae_memory: int | None = None,
    sae_folder: str | os.PathLike[str] | None = None,
    sae_revision: str | None = None,
    progress: bool = True,
) -> FeatureStore:
    """What `extract` does (see there for the arguments), by `workers` actors.

    The cluster is the running one, `RAY_ADDRESS`, or else a local one of this machine. An actor
    takes one CPU, and one GPU where `device` is `cuda`.
    """
    ray = require("ray", "ray")
    data = require("ray.data", "ray")
    if workers < 1:
        raise BadCorpus(f"{workers} workers: expected at least one")
    checked = check(
        documents,
        model=model,
        group=group,
        layers=layers,
        out=out,
        settings=settings,
        token_budget=token_budget,
        shard_docs=shard_docs,
        append=append,
        sae_folder=sae_folder,
        sae_revision=sae_revision,
    )
    first = checked.facts.first_shard
    every = range(first, first + checked.facts.n_shards)
    missing = [n for n in every if not _is_whole(shard_folder(checked.folder, n))]
    if missing:
        own = not ray.is_initialized()
        if own:
            _start(ray, workers)
        try:
            rows = _made(data, (checked, model, device, sae_memory), missing, workers)
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
    return FeatureStore.open(checked.folder)


def _is_whole(folder: Path) -> bool:
    return folder.is_dir() and damage(folder) is None


def _made(
    data: Any,
    job: tuple[Checked, str, str | None, int | None],
    missing: list[int],
    workers: int,
) -> Iterator[Any]:
    """The pipeline: one item, one block, one task, so that a lost actor costs one shard."""
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    device = job[2] or ""
    items = data.from_items([{"shard": n} for n in missing], override_num_blocks=len(missing))
    made = items.map_batches(
        _Maker,
        fn_constructor_args=job,
        batch_size=1,
        compute=data.ActorPoolStrategy(size=min(workers, len(missing))),
        num_cpus=1,
        num_gpus=1 if device.startswith("cuda") else 0,
    )
    rows: Iterator[Any] = made.iter_rows()
    return rows


class _Maker:
    """What an actor is: a prepared job, and the SAEs."""

    def __init__(
        self, checked: Checked, model: str, device: str | None, sae_memory: int | None
    ) -> None:
        self._job = prepare(checked, model, device=device)
        self._encoder = self._job.encoder(sae_memory)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shards = [int(shard) for shard in batch["shard"]]
        if missing := [n for n in shards if not _is_whole(shard_folder(self._job.out, n))]:
            self._job.run(missing, self._encoder, progress=False)
        return batch


def _start(ray: Any, workers: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # they are the job, not its background
    variables = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    local: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:
        local = {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE,
        }
    ray.init(
        runtime_env={"env_vars": variables}, log_to_driver=False, logging_level="ERROR", **local
    )


def _cause(error: BaseException) -> ScopeError:
    """What went wrong in a worker, as our own error where it is one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ScopeError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    words = str(error).strip().splitlines()
    return ScopeError(f"the job failed on the cluster: {words[-1] if words else error!r}")
