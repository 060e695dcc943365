"""Plans for other runtimes: llama.cpp control vectors (GGUF), and plain vectors (safetensors).

Both hold one vector per layer, which the runtime adds to the residual after that layer. So only
`add` can be exported, and only where the runtime adds it at the tokens that the plan selects.
Everything else is refused, because the file would not do what the plan does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qwen_scope_lens.errors import BadPlan
from qwen_scope_lens.extras import require
from qwen_scope_lens.families import FAMILIES
from qwen_scope_lens.files import whole_file
from qwen_scope_lens.steering.plan import Edit, Plan
from qwen_scope_lens.steering.readers import SAEs, directions_of
from qwen_scope_lens.steering.where import Where

__all__ = ["FORMATS", "check_gguf", "export", "layer_vectors", "to_gguf", "to_safetensors"]

EVERY_TOKEN = Where(skip_first=False)
AFTER_FIRST = Where()


def layer_vectors(plan: Plan, saes: SAEs = None) -> dict[int, Tensor]:
    """Layer -> the sum of its `add` edits, `[d_model]` float32."""
    for edit in plan.edits:
        _check_constant(edit)
    rows = directions_of(plan.edits, saes).double()
    found: dict[int, Tensor] = {}
    for edit, row in zip(plan.edits, rows, strict=True):
        found[edit.ref.layer] = found.get(edit.ref.layer, torch.zeros_like(row)) + edit.value * row
    vectors = {layer: vector.float() for layer, vector in sorted(found.items())}
    for layer, vector in vectors.items():
        if not vector.isfinite().all():
            raise BadPlan(f"the edits of layer {layer} are too strong for float32: weaken them")
    return vectors


def check_gguf(plan: Plan) -> None:
    """Raise `BadPlan` for a plan that a control vector of llama.cpp cannot express."""
    for edit in plan.edits:
        _check_constant(edit)
        if edit.where != EVERY_TOKEN:
            raise BadPlan(
                f"{edit}: llama.cpp adds a control vector at every token, the first included: say"
                f" so in the edit ({edit.ref}:{edit.op}:..@first), or export safetensors"
            )
        if edit.ref.layer == 0:
            raise BadPlan(f"{edit}: llama.cpp has no control vector for layer 0")


def to_gguf(plan: Plan, path: Path, saes: SAEs = None) -> Path:
    """A control vector: `llama-cli --control-vector FILE`.

    llama.cpp adds `direction.N` after decoder layer N (from 0, as here), has none for layer 0, and
    adds it at every token, the first included.
    """
    check_gguf(plan)
    vectors = layer_vectors(plan, saes)
    gguf = require("gguf", "gguf")
    backbone = plan.edits[0].ref.sae.row.backbone
    with whole_file(path) as partial:
        writer = gguf.GGUFWriter(str(partial), "controlvector")
        family = FAMILIES.get(backbone.family or "")
        writer.add_string("controlvector.model_hint", family.llama_name if family else "")
        writer.add_uint32("controlvector.layer_count", len(vectors))
        writer.add_string("qwen_scope_lens.plan", json.dumps(plan.to_dict()))
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def to_safetensors(plan: Plan, path: Path, saes: SAEs = None) -> Path:
    """Write the plan as one vector per layer into a safetensors file, and return its path.

    Tensor `layers.N` is added to the output of decoder layer N; the metadata says whether the first
    token is included. Raises `BadPlan` unless all edits act on every token, or all on every token
    but the first.
    """
    from safetensors.torch import save_file

    places = {edit.where for edit in plan.edits}
    if not (places == {AFTER_FIRST} or places == {EVERY_TOKEN}):
        raise BadPlan(
            "a file of vectors has no places: expected edits that act on the prompt and the"
            f" generation, all with or all without the first token; found {plan}"
        )
    vectors = layer_vectors(plan, saes)
    backbone = plan.edits[0].ref.sae.row.backbone
    metadata = {
        "format": "qsl-vectors",
        "version": "1",
        "model": backbone.model_id,
        "first_token": "added" if places == {EVERY_TOKEN} else "left out",
        "plan": json.dumps(plan.to_dict()),
    }
    with whole_file(path) as partial:
        tensors = {f"layers.{layer}": vector for layer, vector in vectors.items()}
        save_file(tensors, partial, metadata=metadata)
    return path


FORMATS: dict[str, Callable[[Plan, Path, SAEs], Path]] = {
    ".gguf": to_gguf,
    ".safetensors": to_safetensors,
}
"""By the ending of the file's name."""


def export(plan: Plan, path: Path, saes: SAEs = None) -> Path:
    """Write a plan in the format of the file's ending: .gguf or .safetensors."""
    if path.suffix not in FORMATS:
        raise BadPlan(f"{path}: expected a name that ends with {' or '.join(FORMATS)}")
    return FORMATS[path.suffix](plan, path, saes)


def _check_constant(edit: Edit) -> None:
    if edit.op != "add":
        raise BadPlan(
            f"{edit}: {edit.op} reads the residual, and a constant vector cannot express it."
            " Only `add` can be exported; steer with this package's own backends instead"
        )
    if edit.unit == "norm":
        raise BadPlan(
            f"{edit}: a strength in `norm` depends on each token's residual, a vector cannot:"
            " give it in raw or typical"
        )
