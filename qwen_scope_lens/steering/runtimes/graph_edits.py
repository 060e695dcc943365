"""Plans as graphs: the edits of a layer as one module of fixed shapes, for engines that replay.

A serving engine records a forward pass and replays it: Python does not run between the layers, so
a hook that looks at data never fires. `graph_edits` makes a module per layer that can be recorded.
It has the arithmetic of `layer_edits.py`; the codes come from `saes/fixed_shapes.py`, and which
token is selected comes in as flags, which the host fills in before a pass.

Where the codes of a position could not be decided in the shapes that were given, edits that read
them leave it as it is, and it is counted: `GraphEdits.report` raises unless that is accepted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qwen_scope_lens.errors import BadPlan, PlanBypassed
from qwen_scope_lens.saes.fixed_shapes import FixedMembership
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.steering.layer_edits import LayerEdits, coefficients, moved
from qwen_scope_lens.steering.plan import Edit, Plan
from qwen_scope_lens.steering.readers import SAEs, layer_edits, with_readers
from qwen_scope_lens.steering.report import Report, sums_of

__all__ = ["GraphEdits", "graph_edits"]


def graph_edits(
    plan: Plan | Edit | str,
    saes: SAEs = None,
    *,
    capacity: int | None = None,
    samples: dict[int, Tensor] | None = None,
) -> dict[int, GraphEdits]:
    """The plan as one module per edited layer, which `torch.compile` and `torch.export` accept.

    `capacity` is the number of positions per pass whose codes get the full product with the
    encoder. By default all positions get it, and every pass reads the whole encoder. With fewer, a
    certificate has to settle the others; what it leaves is undecided and counted. `samples`, by
    layer, are residuals `[s, d_model]` that show which features fire often: most certificates need
    them. Raises `BadPlan` for what no graph can hold: gates, and several `project_out` in a layer.
    """
    plan = Plan.of(plan)
    if capacity is not None and (type(capacity) is not int or capacity < 1):
        raise BadPlan(
            f"capacity {capacity!r}: expected a number of positions from 1, or None for all"
        )
    by_layer: dict[int, list[Edit]] = {}
    for edit in plan.edits:
        if edit.where.gate is not None:
            raise BadPlan(
                f"{edit}: whether a gate is open depends on all tokens before, which a recorded"
                " graph does not know. Steer with `qwen_scope_lens.steering.steer`"
            )
        by_layer.setdefault(edit.ref.layer, []).append(edit)
    for layer, edits in by_layer.items():
        if sum(edit.operation.reads == "residual" for edit in edits) > 1:
            raise BadPlan(
                f"layer {layer} has several project_out ({'; '.join(map(str, edits))}): which of"
                " them act together depends on the token, which a recorded graph cannot solve for."
                " Keep one of them per layer"
            )
    known = with_readers(plan.edits, saes)
    samples = samples or {}
    return {
        layer: GraphEdits(layer_edits(edits, known), known, capacity, samples.get(layer))
        for layer, edits in sorted(by_layer.items())
    }


class GraphEdits(nn.Module):
    """The edits of one layer: `module(x, selected)` is the new residual.

    `x [.., d_model]` is the residual after the layer; bool `selected [.., m]` says on which tokens
    each edit acts, in the order of `edits`.
    """

    sums: Tensor
    undecided: Tensor
    lengths: Tensor
    pushes: Tensor
    readers: Any

    def __init__(
        self,
        layer: LayerEdits,
        saes: dict[str, LayerSAE],
        capacity: int | None = None,
        sample: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.edits = layer.edits
        device = layer.readers[0].members.features.device if layer.readers else None
        for name, tensor in zip(_PLACED, layer.placed(device or torch.device("cpu")), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self._at = tuple(reader.at for reader in layer.readers)
        self.readers = nn.ModuleList(
            FixedMembership(
                saes[str(self.edits[at[0]].ref.sae)],
                [self.edits[i].ref.feature for i in at],
                capacity,
                sample,
            )
            for at in self._at
        )
        m = len(self.edits)
        counts = {
            "sums": torch.zeros((4, m), dtype=torch.float64, device=device),
            "undecided": torch.zeros(m, dtype=torch.int64, device=device),
        }
        for name, tensor in counts.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor, selected: Tensor) -> Tensor:
        flat, on = x.flatten(0, -2), selected.flatten(0, -2)
        read: dict[int, Tensor] = {}
        flags = list(on.unbind(-1))
        missed = [torch.zeros_like(self.undecided[0])] * len(flags)
        for at, reader in zip(self._at, self.readers, strict=True):
            values, open_ = reader(flat, torch.stack([flags[i] for i in at], dim=-1))
            for i, a, left in zip(at, values.unbind(-1), open_.unbind(-1), strict=True):
                read[i], missed[i], flags[i] = a, left.sum(), flags[i] & ~left
        placed = [getattr(self, name) for name in _PLACED]
        c = coefficients(self.edits, placed, flat, torch.stack(flags, dim=-1), read)
        precise = torch.promote_types(x.dtype, torch.float32)
        norms = torch.linalg.vector_norm(flat.detach(), dim=-1, dtype=precise)
        self.sums.add_(sums_of(c.detach(), on, self.lengths, norms))
        self.undecided.add_(torch.stack(missed))
        return moved(flat, c, self.pushes).view(x.shape)

    def report(self, *, accept_undecided: bool = False) -> Report:
        """What the edits did since the last `clear`. It asks the host, so call it between passes.

        Raises `PlanBypassed` if an edit left a position as it was because its codes were undecided
        (unless that is accepted), or if the SAE's weights have changed since the module was made.
        """
        if any(reader.stale() for reader in self.readers):
            raise PlanBypassed(
                "the SAE's weights have changed since the graph was made from them: make it again"
            )
        counts = self.undecided.tolist()
        if any(counts) and not accept_undecided:
            lines = [f"  {edit}: {n}" for edit, n in zip(self.edits, counts, strict=True) if n]
            raise PlanBypassed(
                "the edits left tokens as they were, because it was not decided whether the feature"
                " is among the k largest there:\n" + "\n".join(lines) + "\nGive a larger capacity"
                " (None decides every position), or accept_undecided=True where that is meant"
            )
        report = Report(self.edits)
        report.give(self.sums.T.cpu())
        return report

    def clear(self) -> None:
        """Begin to count anew."""
        self.sums.zero_()
        self.undecided.zero_()


_PLACED = ("pushes", "directions", "strengths", "lengths", "still")
