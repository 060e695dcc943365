"""Gates in a running model: where another feature has passed its threshold.

The hook of a gate reads the residual after its layer, before any edit there, and notes in the pass
at which column each row's gate opens. `calls.py` keeps that with the text's cache, so a gate that
has opened stays open for the rest of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_scope_lens.saes.few_features import Membership
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.steering.calls import Call, OfOneModel, Pass
from qwen_scope_lens.steering.plan import Edit
from qwen_scope_lens.steering.where import Gate

__all__ = ["GateHook", "gates_by_layer", "positions_in_text"]


def gates_by_layer(edits: Iterable[Edit]) -> dict[int, list[Gate]]:
    """The gates of some edits, by the layer that they read."""
    found: dict[int, list[Gate]] = {}
    for gate in sorted({edit.where.gate for edit in edits if edit.where.gate is not None}):
        found.setdefault(gate.ref.layer, []).append(gate)
    return found


class GateHook(OfOneModel):
    """The forward hook that reads the gates of one layer. `watch` says which pass is running."""

    def __init__(
        self, layer: int, gates: Sequence[Gate], saes: Mapping[str, LayerSAE], watch: Any
    ) -> None:
        self.name = watch.name
        self._layer, self._watch = layer, watch
        by_sae: dict[str, list[Gate]] = {}
        for gate in gates:
            by_sae.setdefault(str(gate.ref.sae), []).append(gate)
        self._readers = [
            (
                Membership(saes[name], [g.ref.feature for g in own], 4 * saes[name].cfg.k),
                own,
                torch.tensor([g.threshold for g in own]),
            )
            for name, own in by_sae.items()
        ]

    @torch.no_grad()
    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        x = (output[0] if isinstance(output, tuple) else output).detach()
        now: Pass | None = self._watch.at_layer(self._layer, module, kwargs)
        if now is None or x.shape[:2] != (now.call.rows, now.call.columns):
            return  # the hook of the edits refuses such a run
        may = positions_in_text(now.call, x.device) != 0
        for members, gates, thresholds in self._readers:
            inside = x.flatten(0, 1).to(members.sae.W_dec.device)
            values = members.values(inside).to(x.device).unflatten(0, x.shape[:2])
            passed = (values > thresholds.to(x.device)) & may[..., None]
            for j, gate in enumerate(gates):
                now.open(gate, passed[..., j])


def positions_in_text(call: Call, device: torch.device) -> Tensor:
    """The position of every column in its row's text, 0 for pads, too. `[rows, columns]`"""
    if call.real is None:
        at = torch.arange(call.past, call.past + call.columns, device=device)
        return at.expand(call.rows, -1)
    return ((call.real.to(device).cumsum(1) - 1).clamp(min=0))[:, call.past :]
