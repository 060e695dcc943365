"""Jacobian lenses: what a direction in the middle of a model does to the residual at its end.

A lens has one matrix per layer, the mean derivative of the last residual by the residual after that
layer. transformer-lens fits them, and publishes them for some Qwen models; the logit lens is the
lens whose matrices are the identity. Files are read as tensors and plain data only
(`weights_only`).
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_scope_lens.errors import BadFile, LayerOutOfRange, WrongModel
from qwen_scope_lens.files import open_regular

__all__ = ["Lens", "read_lens"]

ARCHIVE = b"PK\x03\x04"
EXPECTED = "what `qsl lens fit` or transformer-lens's JacobianLens.save wrote"


@dataclass(frozen=True, eq=False)
class Lens:
    """`matrices[layer] @ x` is the effect of x, `[d_model]`, on the last residual."""

    matrices: dict[int, Tensor]  # layer -> [d_model, d_model], in the file's dtype
    width: int
    prompts: int  # on how many texts it was fitted; 0 where the file does not say
    model: str | None
    facts: dict[str, Any] = field(default_factory=dict)  # what the file says of its making

    @property
    def card(self) -> dict[str, Any]:
        """What `fit_lens` wrote about the fit; empty for lenses of others."""
        found = self.facts.get("card")
        return found if isinstance(found, dict) else {}

    def push(self, layer: int, x: Tensor) -> Tensor:
        """The effect of residuals after `layer` on the last one: `x @ J.T`. `[.., d_model]`"""
        matrix = self._of(layer)
        return x.float() if matrix is None else x.float() @ matrix.float().to(x.device).T

    def pull(self, layer: int, readout: Tensor) -> Tensor:
        """A linear readout of the last residual as one of the residual after `layer`: `J.T @ v`.

        `[.., d_model] -> [.., d_model]`, float32. The last layer of the model has no matrix of its
        own: there the readout is the same. Raises where an earlier layer is missing.
        """
        matrix = self._of(layer)
        return readout.float() if matrix is None else readout.float() @ matrix.float()

    def _of(self, layer: int) -> Tensor | None:
        if layer in self.matrices or layer > max(self.matrices):
            return self.matrices.get(layer)
        raise LayerOutOfRange(
            f"the lens has no matrix for layer {layer}: it has"
            f" {', '.join(map(str, sorted(self.matrices)))}. Leave the layer out, or read without"
            " the lens"
        )


def read_lens(path: str | Path, width: int | None = None) -> Lens:
    """Read a file of transformer-lens or of the reference implementation.

    `width` is the d_model that it has to fit. Matrices stay in the file until they are used.
    """
    path = Path(path).expanduser()
    try:
        with open_regular(path) as file:
            begin = file.read(len(ARCHIVE))
    except FileNotFoundError as error:
        raise BadFile(f"{path} does not exist: expected {EXPECTED}") from error
    if begin != ARCHIVE:
        raise BadFile(
            f"{path} is not a Jacobian lens: it begins with {begin!r} and not with {ARCHIVE!r}."
            f" Expected is {EXPECTED}"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise BadFile(
            f"{path} is damaged, or is not a Jacobian lens ({str(error).splitlines()[0]:.120}):"
            f" expected is {EXPECTED}"
        ) from error
    given = content.get("J") if isinstance(content, dict) else None
    if not isinstance(given, dict) or not given:
        raise BadFile(
            f"{path} is not a Jacobian lens: it has no matrices under `J`. Expected is {EXPECTED}"
        )
    matrices: dict[int, Tensor] = {}
    sizes = set()
    for layer, matrix in given.items():
        number = str(layer)
        if not isinstance(matrix, Tensor) or not number.isdecimal() or len(number) > 4:
            raise BadFile(f"{path}: J has {layer!r:.40}, expected layers with one matrix each")
        matrices[int(number)] = matrix
        sizes.add(tuple(matrix.shape))
    side = max(sizes)[0] if max(sizes) else 0
    if sizes != {(side, side)} or not all(m.is_floating_point() for m in matrices.values()):
        raise BadFile(f"{path}: the matrices have the shapes {sorted(sizes)}, expected one square")
    if width is not None and side != width:
        raise WrongModel(
            f"the lens {path} is of a model with d_model {side}, expected {width}: it was fitted on"
            " another model"
        )
    said = content.get("metadata")
    facts = said if isinstance(said, dict) else {}
    prompts = content.get("n_prompts", 0)
    texts = prompts if isinstance(prompts, int) else 0
    lens = Lens(matrices, side, texts, facts.get("model_name"), facts)
    return lens if lens.model else replace(lens, model=lens.card.get("model"))
