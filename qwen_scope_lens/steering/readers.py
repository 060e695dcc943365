"""The SAE of every edit: SAEs that were given are checked, others are read from disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.errors import BadPlan
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.saes.load import load_directions, open_sae
from qwen_scope_lens.steering.layer_edits import LayerEdits
from qwen_scope_lens.steering.plan import Edit

__all__ = ["SAEs", "by_address", "directions_of", "layer_edits", "with_readers"]

SAEs = Iterable[LayerSAE] | Mapping[Any, LayerSAE] | LayerSAE | None
"""SAEs that are loaded already: a mapping by address, or SAEs whose `cfg.metadata` has an address.
A plan's other SAEs are read from disk."""


def layer_edits(edits: Sequence[Edit], saes: SAEs = None) -> LayerEdits:
    """The arithmetic of the edits of one layer; what it needs is read from disk."""
    known = with_readers(edits, saes)
    return LayerEdits.build(edits, directions_of(edits, known), known)


def with_readers(edits: Iterable[Edit], saes: SAEs = None) -> dict[str, LayerSAE]:
    """The given SAEs and, loaded, those whose codes the edits or their gates read; by address."""
    known = by_address(saes)
    for edit in edits:
        read = [edit.ref] if edit.operation.reads == "code" else []
        read += [edit.where.gate.ref] if edit.where.gate is not None else []
        for name in (str(ref.sae) for ref in read):
            if name not in known:
                known[name] = open_sae(name)
    return known


def directions_of(edits: Sequence[Edit], saes: SAEs = None) -> Tensor:
    """The decoder row of every edit's feature, float32 `[m, d_model]`; only these are read."""
    known = by_address(saes)
    by_sae: dict[LayerRef, list[int]] = {}
    for i, edit in enumerate(edits):
        by_sae.setdefault(edit.ref.sae, []).append(i)
    rows: dict[int, Tensor] = {}
    for ref, at in by_sae.items():
        features = [edits[i].ref.feature for i in at]
        sae = known.get(str(ref))
        found = load_directions(ref, features) if sae is None else sae.direction(features)
        rows.update(zip(at, found.detach().float().cpu(), strict=True))
    return torch.stack([rows[i] for i in range(len(edits))])


def by_address(saes: SAEs) -> dict[str, LayerSAE]:
    """Each SAE under the address that it belongs to.

    Raises `BadPlan` for an SAE whose metadata name another address, or whose sizes are those of
    another group.
    """
    if saes is None:
        return {}
    if isinstance(saes, Mapping):
        pairs = [(LayerRef.parse(name), sae) for name, sae in saes.items()]
        for ref, sae in pairs:
            _check_kind(sae)
            _check_claims(ref, sae)
    else:
        pairs = []
        for sae in [saes] if isinstance(saes, LayerSAE) else list(saes):
            _check_kind(sae)
            if sae.cfg.metadata.qwen_scope_ref is None:
                raise BadPlan(
                    "the metadata of a given SAE do not name its address: give it with its address,"
                    " saes={'GROUP/LAYER': sae}"
                )
            pairs.append((LayerRef.parse(sae.cfg.metadata.qwen_scope_ref), sae))
    found: dict[str, LayerSAE] = {}
    for ref, sae in pairs:
        _check_sizes(ref, sae)
        if found.setdefault(str(ref), sae) is not sae:
            raise BadPlan(f"two SAEs were given for {ref}: leave one of them out")
    return found


def _check_kind(sae: Any) -> None:
    if not isinstance(sae, LayerSAE):
        raise BadPlan(
            f"expected SAEs as load_sae() gives them, found {type(sae).__name__}: load the SAE with"
            " load_sae(), or convert it with `qsl convert`"
        )


def _check_claims(ref: LayerRef, sae: LayerSAE) -> None:
    """Compare what the metadata say with the address for which the SAE was given."""
    said = sae.cfg.metadata
    claims = {
        "its address": (said.qwen_scope_ref, str(ref)),
        "its hook": (said.hook_name, ref.row.hook_name(ref.layer)),
        "its model": (said.model_name, ref.row.backbone.model_id),
    }
    for what, (found, expected) in claims.items():
        if found is not None and found != expected:
            raise BadPlan(
                f"the SAE given for {ref} is another one: {what} is {found}, expected {expected}."
                " Give each SAE for its own address, or leave saes out: they are loaded then"
            )


def _check_sizes(ref: LayerRef, sae: LayerSAE) -> None:
    found = (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k)
    expected = (ref.row.d_model, ref.row.d_sae, ref.row.k)
    if found != expected:
        raise BadPlan(
            f"the SAE given for {ref} has d_in, d_sae and k of {found}, that address {expected}:"
            " load it with load_sae()"
        )
