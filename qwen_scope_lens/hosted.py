"""Ids of our SAEs on Neuronpedia: which SAEs an id can mean, and which id was verified.

Neuronpedia names a model, and a source `LAYER-SET` of it: `qwen3.5-2b-pt/11-qwenscope-res-32k`.
Such a name does not say which k the SAE has, so several of ours are candidates. `qsl label import`
finds out by encoding its texts again. With `--record` it writes the answer into `neuronpedia.json`
in the folder of QWEN_SCOPE_HOME; loaded SAEs carry that id then, and exports use it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import GROUPS, HOME_VARIABLE, Group, home_folder, local_groups
from qwen_scope_lens.errors import BadFile, CannotWrite
from qwen_scope_lens.files import exclusive, read_json, write_json

__all__ = ["FILE", "candidates", "ours", "record", "set_name", "verified_id"]

FORMAT, VERSION = "qwen-scope-hosted", 1
FILE = "neuronpedia.json"

_SOURCE = re.compile(
    r"(?P<layer>\d{1,4})-(?P<kind>[a-z0-9._-]+?)-res-(?P<width>\d{1,7}k?)(?:-l0-(?P<k>\d{1,5}))?"
)


def kind_of(group: Group) -> str:
    """The first part of a set's name: qwenscope, mini, or a repository's name."""
    known = {"official": "qwenscope", "mini": "mini"}.get(group.origin)
    return known or re.sub(r"[^a-z0-9]+", "-", group.repo_id.lower()).strip("-")


def set_name(group: Group) -> str:
    """Our name of the set of all layers of a group, with its k: `qwenscope-res-64k-l0-50`."""
    width = f"{group.d_sae // 1024}k" if group.d_sae % 1024 == 0 else str(group.d_sae)
    return f"{kind_of(group)}-res-{width}-l0-{group.k}"


def ours(ref: LayerRef) -> str:
    """The id that we give an SAE which has no verified one: `<model>/<layer>-<set>`."""
    return f"{ref.row.backbone.key}/{ref.layer}-{set_name(ref.row)}"


def candidates(model: str, source: str, said: Mapping[str, Any] | None = None) -> list[LayerRef]:
    """The SAEs that an id on Neuronpedia can mean; none where it names no SAE of ours.

    `said` is the row of `source.jsonl`: a SAELens release or a repository in it decides.
    """
    found = _SOURCE.fullmatch(source)
    if found is None:
        return []
    layer = int(found["layer"])
    width = found["width"]
    d_sae = int(width[:-1]) * 1024 if width.endswith("k") else int(width)
    keys = {model, re.sub(r"-pt$", "-base", model)}
    refs = [
        LayerRef(group.short, layer)
        for group in (*GROUPS, *local_groups())
        if group.backbone.key in keys
        and group.d_sae == d_sae
        and kind_of(group) == found["kind"]
        and layer in group.layers
        and (found["k"] is None or group.k == int(found["k"]))
    ]
    names = (
        {str(said.get(key)).lower() for key in ("saelensRelease", "hfRepoId")} if said else set()
    )
    named = [ref for ref in refs if {name.lower() for name in ref.row.names} & names]
    return named or refs


def verified_id(ref: LayerRef) -> str | None:
    """The id on Neuronpedia under which this SAE's features were found again, if any was."""
    found = _recorded().get(str(ref))
    return str(found["id"]) if isinstance(found, Mapping) and "id" in found else None


def record(ref: LayerRef, hosted: str, facts: Mapping[str, Any]) -> Path:
    """Write a verified id into the file of QWEN_SCOPE_HOME; a later one replaces an earlier one."""
    home = home_folder()
    if home is None:
        raise CannotWrite(
            f"the verified id of {ref} is kept in ${HOME_VARIABLE}/{FILE}: set {HOME_VARIABLE} to"
            " the folder of your SAEs"
        )
    with exclusive(home, wait=True):
        rows = {**_recorded(), str(ref): {"id": hosted, **facts}}
        write_json(home / FILE, FORMAT, VERSION, {"sources": dict(sorted(rows.items()))})
    return home / FILE


def _recorded() -> Mapping[str, Any]:
    home = home_folder()
    if home is None or not (home / FILE).is_file():
        return {}
    rows = read_json(home / FILE, FORMAT, VERSION, "qsl label import --record").get("sources")
    if not isinstance(rows, Mapping):
        raise BadFile(f"{home / FILE} has no sources: delete it, and import the labels again")
    return rows
