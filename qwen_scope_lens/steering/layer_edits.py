"""The arithmetic of steering: the edits of one layer as a change of its residual.

Every edit becomes one number c per token, and the change is the sum of c d over the edits. All c
are computed from the residual before any edit, so the order of edits does not matter. The change is
computed in float32 and rounded once to the residual's dtype. A token where every c is 0 keeps its
residual bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qwen_scope_lens.errors import BadPlan
from qwen_scope_lens.saes.few_features import Membership, activations_of
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.steering.plan import Edit

__all__ = ["LayerEdits", "coefficients", "moved"]


@dataclass(frozen=True)
class _Reader:
    """An SAE with the edits of the layer that read its codes."""

    members: Membership  # of the features that the edits name
    at: tuple[int, ...]  # numbers of edits

    def activations(self, x: Tensor) -> Tensor:
        """`[n, d_model] -> [n, m]`; differentiable where x is."""
        sae, features = self.members.sae, self.members.features
        inside = x.to(sae.W_dec.device)
        if torch.is_grad_enabled() and x.requires_grad:
            return activations_of(sae.encode_sparse(inside), features).to(x.device)
        return self.members.values(inside).to(x.device)


@dataclass
class LayerEdits:
    """The edits of one layer, in a fixed order, with their directions `[m, d_model]` (float32)."""

    edits: tuple[Edit, ...]
    directions: Tensor
    readers: tuple[_Reader, ...]
    pushes: Tensor  # the changes go along these: the directions, except for a control
    _placed: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def build(
        cls, edits: Sequence[Edit], directions: Tensor, saes: dict[str, LayerSAE]
    ) -> LayerEdits:
        """Build the arithmetic of one layer's edits.

        `directions [m, d_model]` has the decoder row of each edit, in the same order. `saes` has,
        by address, the SAE of every edit that reads a code. Raises `BadPlan` if an edit needs a
        direction and its row is zero.
        """
        by_sae: dict[str, list[int]] = {}
        for i, edit in enumerate(edits):
            if edit.operation.reads == "code":
                by_sae.setdefault(str(edit.ref.sae), []).append(i)
        readers = tuple(
            _Reader(_members(saes[name], [edits[i].ref.feature for i in at]), tuple(at))
            for name, at in by_sae.items()
        )
        directions = directions.detach().to(torch.float32)
        for edit, row in zip(edits, directions, strict=True):
            needs = edit.unit == "norm" or edit.operation.reads == "residual"
            if needs and not bool(row.norm() > 0):
                raise BadPlan(f"{edit}: the feature's decoder row is zero, it has no direction")
        return cls(tuple(edits), directions, readers, directions)

    def astray(self, seed: int) -> LayerEdits:
        """The same changes along random directions of the same lengths, as a control.

        Edits of one feature share a random direction, which does not depend on the other edits.
        """
        rows = []
        for edit, row in zip(self.edits, self.directions, strict=True):
            words = hashlib.sha256(f"{seed} {edit.ref}".encode()).digest()
            rng = torch.Generator().manual_seed(int.from_bytes(words[:7], "big"))
            chance = torch.randn(row.shape, generator=rng)
            rows.append(chance * (row.norm() / chance.norm()))
        return replace(self, pushes=torch.stack(rows), _placed={})

    def along(self, direction: Tensor) -> LayerEdits:
        """The same changes along one direction `[d_model]`, each as long as before."""
        one = direction.detach().float().cpu()
        if one.shape != self.directions.shape[1:] or not 0 < float(one.norm()) < float("inf"):
            raise BadPlan(
                f"a direction of shape {tuple(one.shape)} and length {float(one.norm()):g}:"
                f" expected [{self.directions.shape[1]}] and a length above 0"
            )
        lengths = self.directions.norm(dim=-1, keepdim=True).cpu()
        return replace(self, pushes=lengths * one / one.norm(), _placed={})

    def change(self, x: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
        """The new residual and the c of every edit.

        `x [.., d_model]`, `selected` bool `[.., m]` -> `[.., d_model]` in x's dtype, `[.., m]`.
        """
        c = self.coefficients(x, selected)
        return moved(x, c, self.placed(x.device)[0]), c

    def coefficients(self, x: Tensor, selected: Tensor) -> Tensor:
        """c of every edit: 0 where it is not selected. `[.., d_model], [.., m] -> [.., m]`"""
        read: dict[int, Tensor] = {}
        for reader in self.readers:
            wanted = selected[..., list(reader.at)].any(-1)
            a = _activations_where(reader, x, wanted)
            read.update(zip(reader.at, a.unbind(-1), strict=True))
        return coefficients(self.edits, self.placed(x.device), x, selected, read)

    def placed(self, device: torch.device) -> tuple[Tensor, ...]:
        """Pushes, directions `[m, d_model]`; values, lengths, and which are neutral `[m]`."""
        if device not in self._placed:
            values = torch.tensor([edit.value for edit in self.edits], dtype=torch.float64)
            rows = self.directions.to(device)
            pushes = self.pushes.to(device)
            still = torch.tensor([edit.changes_nothing for edit in self.edits], device=device)
            placed = (pushes, rows, values.to(device), rows.norm(dim=-1), still)
            self._placed[device] = placed
        return self._placed[device]


def moved(x: Tensor, c: Tensor, pushes: Tensor) -> Tensor:
    """The residual moved by `c [.., m]` along `pushes [m, d_model]`; bit for bit x where c is 0."""
    precise = torch.promote_types(x.dtype, torch.float32)
    touched = (c != 0).any(-1, keepdim=True)
    new = x.to(precise) + c.to(precise) @ pushes.to(precise)
    return torch.where(touched, new.to(x.dtype), x)


def coefficients(
    edits: Sequence[Edit],
    placed: Sequence[Tensor],
    x: Tensor,
    selected: Tensor,
    read: Mapping[int, Tensor],
) -> Tensor:
    """c of every edit, from the activations `[..]` of those that read one, by their numbers.

    `placed` are the tensors of `LayerEdits.placed`; `x [.., d_model], selected [.., m] -> [.., m]`.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    _, directions, values, lengths, still = placed
    columns = list(values.to(precise).expand(*x.shape[:-1], -1).unbind(-1))
    if any(edit.unit == "norm" for edit in edits):
        norm = torch.linalg.vector_norm(x.to(precise), dim=-1)
        for i, edit in enumerate(edits):
            if edit.unit == "norm":
                columns[i] = columns[i] * norm / lengths[i].to(precise)
    for i, a in read.items():
        target = edits[i].operation.target
        assert target is not None
        columns[i] = target(a, columns[i]) - a
    out = [i for i, edit in enumerate(edits) if edit.operation.reads == "residual"]
    if out:
        rows = torch.stack([directions[i] for i in out]).to(precise)
        flags = torch.stack([selected[..., i] for i in out], dim=-1)
        for i, share in zip(out, _projection(x.to(precise), rows, flags).unbind(-1), strict=True):
            columns[i] = -share
    c = torch.stack(columns, dim=-1)
    return torch.where(selected & ~still, c, torch.zeros_like(c))


def _members(sae: LayerSAE, features: list[int]) -> Membership:
    return Membership(sae, features, n_witnesses=4 * sae.cfg.k)  # a layer keeps these rows


def _activations_where(reader: _Reader, x: Tensor, wanted: Tensor) -> Tensor:
    """Activations at the wanted tokens; 0 elsewhere, where they are not read."""
    found = x.new_zeros((*x.shape[:-1], len(reader.at)), dtype=torch.float32)
    if bool(wanted.any()):
        found[wanted] = reader.activations(x[wanted])
    return found


def _projection(x: Tensor, rows: Tensor, selected: Tensor) -> Tensor:
    """The share of each row in the projection of x onto the span of the selected rows.

    Several directions of one token are removed together, so that nothing is left along any of them.
    """
    flags = selected.to(x.dtype)
    along = (x @ rows.T) * flags
    if len(rows) == 1:
        return along / (rows @ rows.T)[0]
    gram = (rows @ rows.T) * flags.unsqueeze(-1) * flags.unsqueeze(-2)
    return (torch.linalg.pinv(gram, hermitian=True) @ along.unsqueeze(-1)).squeeze(-1)
