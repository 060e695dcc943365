"""Open, validate and memory-map one layer's tensors, whatever the file format.

Every tensor returned is a view of the file (private, copy on write: nothing ever reaches the disk)
in SAELens's orientation. Pickles are never executed: `.pt` files are read with `weights_only=True`.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from qwen_scope_lens.catalog import Group
from qwen_scope_lens.errors import (
    CheckpointMissing,
    NotACheckpoint,
    NotFinite,
    TruncatedCheckpoint,
    UnsafeCheckpoint,
    WrongKeys,
    WrongSettings,
    WrongShape,
)
from qwen_scope_lens.saes.locate import LayerFile

__all__ = [
    "LAYOUTS",
    "Layout",
    "SAETensors",
    "layout_of",
    "open_layer",
    "read_activations",
    "read_tensors",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layout:
    """How a published format orients its matrices: the names of the axes of each tensor."""

    name: str
    W_enc: tuple[str, str]
    W_dec: tuple[str, str]

    def shapes(self, group: Group) -> dict[str, tuple[int, ...]]:
        size = {"d_sae": group.d_sae, "d_model": group.d_model}
        return {
            "W_enc": (size[self.W_enc[0]], size[self.W_enc[1]]),
            "W_dec": (size[self.W_dec[0]], size[self.W_dec[1]]),
            "b_enc": (group.d_sae,),
            "b_dec": (group.d_model,),
        }


OFFICIAL = Layout("official .pt", ("d_sae", "d_model"), ("d_model", "d_sae"))
SAELENS = Layout("SAELens folder", ("d_model", "d_sae"), ("d_sae", "d_model"))
OPENINTERP = Layout("OpenInterpretability safetensors", SAELENS.W_enc, SAELENS.W_dec)
LAYOUTS = (OFFICIAL, SAELENS, OPENINTERP)


def layout_of(path: Path) -> Layout:
    """Which layout a file has, by its name."""
    if path.name == SAE_WEIGHTS_FILENAME:
        return SAELENS
    if path.suffix == ".safetensors":
        return OPENINTERP
    return OFFICIAL


@dataclass(frozen=True)
class SAETensors:
    """The four tensors of an SAE, oriented as SAELens orients them."""

    W_enc: torch.Tensor  # [d_model, d_sae]
    W_dec: torch.Tensor  # [d_sae, d_model]
    b_enc: torch.Tensor  # [d_sae]
    b_dec: torch.Tensor  # [d_model]

    def state_dict(self, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
        """Views of the file where dtype and device allow, copies otherwise."""
        return {
            name: getattr(self, name).to(device=device, dtype=dtype)
            for name in ("W_enc", "W_dec", "b_enc", "b_dec")
        }


def open_layer(file: LayerFile) -> SAETensors:
    """The validated tensors of a located layer, as views of its file."""
    layout = layout_of(file.path)
    _check_settings(file, layout)
    tensors = read_tensors(file.path)
    _check_tensors(tensors, layout, file.group, file.path)
    rows_first = layout.W_enc == SAELENS.W_enc
    return SAETensors(
        W_enc=tensors["W_enc"] if rows_first else tensors["W_enc"].T,
        W_dec=tensors["W_dec"] if rows_first else tensors["W_dec"].T,
        b_enc=tensors["b_enc"],
        b_dec=tensors["b_dec"],
    )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a `.pt` or safetensors file, memory-mapped."""
    if not path.is_file():
        raise CheckpointMissing(f"no such file: {path}")
    _refuse_pointer_file(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)


def read_activations(path: Path) -> torch.Tensor:
    """The one tensor in a `.npy`, `.safetensors` or `.pt` file."""
    if not path.is_file():
        raise CheckpointMissing(f"no such file: {path}")
    if path.suffix == ".npy":
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, TypeError, EOFError) as error:
            raise NotACheckpoint(f"{path} is no plain array: {_first_line(error)}") from error
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _load_pt(path)
    tensors = list(loaded.values()) if isinstance(loaded, dict) else [loaded]
    if len(tensors) != 1 or not isinstance(tensors[0], torch.Tensor):
        raise WrongKeys(f"{path} holds {_kinds(loaded)}: expected one tensor of activations")
    return tensors[0]


def _refuse_pointer_file(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise NotACheckpoint(
                f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its"
                " repository, or download the file from the hub"
            )


def _read_pt(path: Path) -> dict[str, torch.Tensor]:
    loaded = _load_pt(path)
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise WrongKeys(f"{path} holds {_kinds(loaded)}: expected a dict of tensors by name")
    return loaded


def _load_pt(path: Path) -> object:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"PK\x03\x04":
            raise TruncatedCheckpoint(
                f"{path} begins as a torch checkpoint but ends too early"
                f" ({path.stat().st_size:,} bytes): the download or copy was cut off;"
                " fetch it again"
            )
        raise NotACheckpoint(
            f"{path} is not a torch zip checkpoint (it begins with {head!r}): expected a file"
            " written by torch.save since PyTorch 1.6"
        )
    try:
        loaded: object = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return loaded
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpoint(
            f"{path} is a pickle that asks to run code or build other objects than tensors;"
            f" refused, nothing was executed ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise NotACheckpoint(
            f"{path} cannot be read as a torch checkpoint: {_first_line(error)}"
        ) from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        kind = TruncatedCheckpoint if "incomplete" in str(error).lower() else NotACheckpoint
        raise kind(f"{path} is no whole safetensors file: {_first_line(error)}") from error


def _check_tensors(
    tensors: dict[str, torch.Tensor], layout: Layout, group: Group, path: Path
) -> None:
    expected = layout.shapes(group)
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or extra:
        raise WrongKeys(
            f"{path} ({layout.name}): expected the tensors {', '.join(expected)};"
            f" missing {sorted(missing) or 'none'}, unknown {sorted(extra) or 'none'}"
        )
    for name, shape in expected.items():
        found = tensors[name]
        if tuple(found.shape) != shape:
            transposed = " It is transposed." if tuple(found.shape) == shape[::-1] else ""
            raise WrongShape(
                f"{path}: {name} is {tuple(found.shape)}, but {group.short} needs {shape}"
                f" (d_model {group.d_model}, d_sae {group.d_sae}) in the {layout.name} layout."
                f"{transposed} Is this a file of another group?"
            )
        if found.dtype not in DTYPES:
            raise WrongShape(f"{path}: {name} has dtype {found.dtype}: expected one of {DTYPES}")
    for name in ("b_enc", "b_dec"):
        finite = torch.isfinite(tensors[name])
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise NotFinite(
                f"{path}: {name} has {int((~finite).sum())} values that are NaN or infinite, the"
                f" first at {first}: the file is damaged, fetch it again"
            )


# A repository's settings, by their names in `config.json`, and where the catalog has them.
def _settings(group: Group) -> dict[str, object]:
    return {
        "model_type": "topk_sae",
        "d_model": group.d_model,
        "d_sae": group.d_sae,
        "k": group.k,
        "hook_point": "resid_post",
    }


def _check_settings(file: LayerFile, layout: Layout) -> None:
    """`config.json` (or a converted folder's `cfg.json`) and the folder's name, against the row."""
    group = file.group
    if layout is SAELENS:
        path = file.path.parent / SAE_CFG_FILENAME
        wanted = {"architecture": "topk", "d_in": group.d_model, "d_sae": group.d_sae, "k": group.k}
    elif file.config is not None:
        path, wanted = file.config, _settings(group)
    else:
        path, wanted = None, {}
    if path is not None:
        found = read_config(path)
        for name, value in wanted.items():
            if name in found and found[name] != value:
                raise WrongSettings(
                    f"{path} says {name} = {found[name]!r}, but {group.short} has {value!r}:"
                    " the files belong to another group, name that one"
                )
    named = re.search(r"-W(\d+)K-L0_(\d+)$", file.path.parent.name)
    if named and (int(named[1]) * 1024, int(named[2])) != (group.d_sae, group.k):
        raise WrongSettings(
            f"the folder {file.path.parent.name} names width {named[1]}K and k = {named[2]}, but"
            f" {group.short} has width {group.d_sae // 1024}K and k = {group.k}"
        )


def read_config(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointMissing(f"no such file: {path}") from error
    except ValueError as error:
        raise WrongSettings(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise WrongSettings(f"{path} holds {_kinds(found)}: expected a JSON object")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _kinds(value: object) -> str:
    if isinstance(value, dict):
        kinds = sorted({type(item).__name__ for item in value.values()})
        return f"a dict of {', '.join(kinds) or 'nothing'}"
    return f"a {type(value).__name__}"
