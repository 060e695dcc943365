"""Find the file of a layer: in a given folder, in `QWEN_SCOPE_HOME`, or on the hub.

Only directory entries and small JSON files are read here; `checkpoint.py` opens the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import HOME_VARIABLE, MINI_HOME, Group, home_folder
from qwen_scope_lens.errors import CheckpointMissing, HubUnreachable, WrongSettings
from qwen_scope_lens.files import read_text
from qwen_scope_lens.hub import only_cache, ways_out

__all__ = ["CONFIG_NAME", "HubOptions", "LayerFile", "local_path", "locate", "read_config"]

CONFIG_NAME = "config.json"
ARCHITECTURE = "qwen_scope_topk"
"""The name under which `install()` registers ScopeSAE with SAELens. `to_dict` and `save_model`
write plain `topk` instead."""

SAE_CFG_FILENAME = "cfg.json"
SAE_WEIGHTS_FILENAME = "sae_weights.safetensors"
"""The file names of SAELens's constants, which a test compares: importing them takes seconds."""


@dataclass(frozen=True)
class HubOptions:
    """How to ask the hub. `revision` is a commit, tag or branch; None means the main branch."""

    revision: str | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False


@dataclass(frozen=True)
class LayerFile:
    """The file of one layer on the disk."""

    ref: LayerRef
    path: Path
    config: Path | None  # the group's config.json, if there is one
    revision: str | None = None  # the commit, if the file came from the hub

    @property
    def group(self) -> Group:
        return self.ref.row


def locate(
    ref: LayerRef,
    folder: str | os.PathLike[str] | None = None,
    hub: HubOptions | None = None,
    *,
    published: bool = False,
) -> LayerFile:
    """Find the file of a layer.

    A given `folder` is the only place searched. Without one, `QWEN_SCOPE_HOME` is searched before
    the hub. With `published`, converted folders are ignored.
    """
    hub = hub or HubOptions()
    tried = _tried(ref, folder, published)
    for path in tried:
        if path.exists():
            return LayerFile(ref, path, _config_beside(path), _local_revision(path, hub.revision))
    if folder is not None or ref.row.origin in ("local", "mini"):
        where = folder if folder is not None else f"{HOME_VARIABLE}={home_folder() or ''}"
        raise CheckpointMissing(
            f"no file of {ref} in {where}: expected one of\n  " + "\n  ".join(map(str, tried))
        )
    return _from_hub(ref, hub, tried)


def local_path(ref: LayerRef) -> Path | None:
    """The file that `locate` finds without the hub; None where it would ask the hub."""
    return next((path for path in _tried(ref, None, False) if path.exists()), None)


def _tried(ref: LayerRef, folder: str | os.PathLike[str] | None, published: bool) -> list[Path]:
    """Where a layer's file may be on this machine, in the order in which it is looked for."""
    home = home_folder()
    if folder is not None:
        given = Path(folder).expanduser()
        if given.is_file():
            raise CheckpointMissing(f"{given} is a file: folder=... is the folder that holds it")
        roots = [given / ref.row.repo_name, given]
    else:
        roots = [MINI_HOME / ref.row.repo_name] if ref.row.origin == "mini" else []
        roots += [home / ref.row.repo_name] if home else []
    return [path for root in roots for path in _candidates(ref, root, published)]


def _candidates(ref: LayerRef, root: Path, published: bool) -> Iterator[Path]:
    """The converted SAELens folder (in it, each direction is in one place), then the published
    file."""
    if not published:
        yield root / f"layer{ref.layer}" / SAE_WEIGHTS_FILENAME
    yield root / ref.row.file_name(ref.layer)


def _local_revision(path: Path, wanted: str | None) -> str | None:
    """The commit that a converted folder has recorded. Raises if another one was asked for."""
    known = None
    if path.name == SAE_WEIGHTS_FILENAME:
        metadata = read_config(path.parent / SAE_CFG_FILENAME).get("metadata")
        known = metadata.get("revision") if isinstance(metadata, dict) else None
    if wanted is not None and wanted != known:
        raise WrongSettings(
            f"revision {wanted!r} was asked for, but the revision of the local file {path} is"
            f" {known or 'unknown'}: leave the revision out, or take the file from the hub (no"
            f" folder=..., {HOME_VARIABLE} unset)"
        )
    return known


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Anything else raises."""
    try:
        found = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise CheckpointMissing(f"no such file: {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WrongSettings(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise WrongSettings(f"{path} holds a {type(found).__name__}: expected a JSON object")
    return found


def _config_beside(path: Path) -> Path | None:
    config = path.parent / CONFIG_NAME
    return config if path.name != SAE_WEIGHTS_FILENAME and config.is_file() else None


def _from_hub(ref: LayerRef, hub: HubOptions, tried: list[Path]) -> LayerFile:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    group, name = ref.row, ref.row.file_name(ref.layer)
    where = f"{name} in {group.repo_id}" + (f" at revision {hub.revision}" if hub.revision else "")

    def download(filename: str) -> Path:
        return Path(
            hf_hub_download(
                group.repo_id,
                filename,
                revision=hub.revision,
                token=hub.token,
                local_files_only=only_cache(hub.local_files_only),
                force_download=hub.force_download,
            )
        )

    try:
        path = download(name)
    except LocalEntryNotFoundError as error:  # offline, or local_files_only
        raise HubUnreachable(_unreachable(where, ref, tried, error)) from error
    except (RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError) as error:
        raise HubUnreachable(
            f"the hub refused {where} ({type(error).__name__}): check the revision, your network's"
            f" mirror (HF_ENDPOINT) and your token, or {_local_way_out(ref)}"
        ) from error
    except EntryNotFoundError as error:
        raise CheckpointMissing(f"the hub has no file {where}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:  # ValueError: a forced download failed
        raise HubUnreachable(_unreachable(where, ref, tried, error)) from error
    try:
        config: Path | None = download(CONFIG_NAME)
    except (HfHubHTTPError, EntryNotFoundError, OSError, ValueError):
        config = None
    return LayerFile(ref, path, config, _commit_of(path))


def _commit_of(path: Path) -> str | None:
    """The commit of a file in the hub's cache, which keeps files in `snapshots/<commit>/`."""
    parent = path.parent
    return parent.name if parent.parent.name == "snapshots" else None


def _unreachable(where: str, ref: LayerRef, tried: list[Path], error: Exception) -> str:
    looked = "".join(f"\n  not there: {path}" for path in tried) or f" {HOME_VARIABLE} is not set;"
    return (
        f"{ref} cannot be loaded: its file is {where} ({type(error).__name__}).{looked}"
        f"{chr(10) if tried else ' '}{ways_out(_local_way_out(ref))}"
    )


def _local_way_out(ref: LayerRef) -> str:
    group = ref.row
    return (
        f"copy the repository's files to a folder and set {HOME_VARIABLE}=FOLDER, where"
        f" FOLDER/{group.repo_name}/{group.file_name(ref.layer)} exists (or give folder=FOLDER,"
        " --sae-folder FOLDER)"
    )
