"""Jacobian lenses: what a direction in the middle of a model does to the residual at its end.

A lens has one matrix per layer, the mean derivative of the last residual by the residual after that
layer. transformer-lens fits them, and publishes them for some Qwen models; the logit lens is the
lens whose matrices are the identity. Files are read as tensors and plain data only
(`weights_only`).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_scope_lens.errors import BadFile, LayerOutOfRange, WrongModel
from qwen_scope_lens.files import whole_file
from qwen_scope_lens.models.architecture import d_model

__all__ = ["Lens", "fit_lens", "read_lens"]


@dataclass(frozen=True, eq=False)
class Lens:
    """`matrices[layer] @ x` is the effect of x, `[d_model]`, on the last residual."""

    matrices: dict[int, Tensor]  # layer -> [d_model, d_model], in the file's dtype
    width: int
    prompts: int  # on how many texts it was fitted; 0 where the file does not say
    model: str | None

    def pull(self, layer: int, readout: Tensor) -> Tensor:
        """A linear readout of the last residual as one of the residual after `layer`: `J.T @ v`.

        `[.., d_model] -> [.., d_model]`, float32. The last layer of the model has no matrix of its
        own: there the readout is the same. Raises where an earlier layer is missing.
        """
        if layer in self.matrices:
            return readout.float() @ self.matrices[layer].float()
        if layer > max(self.matrices):
            return readout.float()
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
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise BadFile(f"{path} does not exist: expected a Jacobian lens") from error
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise BadFile(
            f"{path} is not a Jacobian lens ({str(error).splitlines()[0]:.120}): expected a file of"
            " transformer-lens's JacobianLens.save"
        ) from error
    given = content.get("J") if isinstance(content, dict) else None
    if not isinstance(given, dict) or not given:
        raise BadFile(
            f"{path} has no matrices under `J`: expected what transformer-lens's JacobianLens.save"
            " wrote"
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
    name = said.get("model_name") if isinstance(said, dict) else None
    prompts = content.get("n_prompts", 0)
    return Lens(matrices, side, prompts if isinstance(prompts, int) else 0, name)


def fit_lens(
    bridge: Any,
    texts: Sequence[str],
    path: str | Path,
    *,
    corpus: str,
    layers: Iterable[int] | None = None,
    batch: int = 16,
    progress: bool = False,
) -> Lens:
    """Fit a lens with transformer-lens and write its file.

    `bridge` comes from `load_model(name, full_hooks=True)`.

    Costs `d_model / batch` backward passes per text. A hundred texts of 128 tokens are usable, says
    its reference; published lenses use a thousand.
    """
    from transformer_lens.tools.analysis import JacobianLens

    found = JacobianLens.fit(
        bridge,
        texts,
        corpus=corpus,
        source_layers=None if layers is None else sorted(set(layers)),
        dim_batch=batch,
        skip_first_positions=1,
        show_progress=progress,
    )
    with whole_file(Path(path)) as partial:
        found.save(str(partial))
    return read_lens(path, d_model(bridge))
