"""Open, validate and memory-map the tensors of one layer, in any of the known file formats.

Every tensor returned is a view of the file in SAELens's orientation. The view is private and copied
on write, so nothing is ever written to the disk. Pickles are never executed.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen_scope_lens.catalog import BACKBONES, Group
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
from qwen_scope_lens.saes.byte_ranges import Stored, Unknown, refuse_expanded, stored_tensors
from qwen_scope_lens.saes.locate import (
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    LayerFile,
    read_config,
)

__all__ = [
    "LAYOUTS",
    "Layout",
    "SAETensors",
    "layout_of",
    "open_layer",
    "read_activations",
    "read_tensors",
    "subtracts_b_dec",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layout:
    """How a published format orients its matrices, by the names of their axes."""

    name: str
    W_enc: tuple[str, str]
    W_dec: tuple[str, str]

    def shapes(self, group: Group) -> dict[str, tuple[int, ...]]:
        """The shape that each tensor of a group has in this layout."""
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
    """The layout of a file, known from its name."""
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

    @torch.inference_mode(False)  # torch does not count the changes of inference tensors
    def state_dict(self, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
        """The tensors by name: views of the file where dtype and device allow it, else copies."""
        state = {
            name: getattr(self, name).to(device=device, dtype=dtype)
            for name in ("W_enc", "W_dec", "b_enc", "b_dec")
        }
        if dtype == torch.float16:  # whose largest number is 65504
            for name, tensor in state.items():
                if not tensor.isfinite().all():
                    raise NotFinite(f"{name} overflows float16: use bfloat16 or float32")
        return state


def open_layer(file: LayerFile) -> SAETensors:
    """Open a located layer, check it, and return its tensors as views of the file."""
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


@torch.inference_mode(False)
def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a `.pt` or safetensors file, mapped into memory."""
    if path.is_dir():
        raise NotACheckpoint(f"{path} is a folder: expected a file")
    if not path.is_file():
        raise CheckpointMissing(f"no such file: {path}")
    _refuse_pointer_file(path)
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    for name, tensor in found.items():
        _check_plain(path, name, tensor)
    return found


def read_activations(path: Path) -> torch.Tensor:
    """The single tensor in a `.npy`, `.safetensors` or `.pt` file of activations."""
    if not path.is_file():
        raise CheckpointMissing(f"no such file: {path}")
    if path.suffix.lower() == ".npy":
        try:
            # The array is mapped, so it is never larger than its file, whatever its header says.
            return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        except Exception as error:  # numpy parses a damaged header as Python
            raise NotACheckpoint(f"{path} is not a plain array: {_first_line(error)}") from error
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _load_pt(path)
    tensors = list(loaded.values()) if isinstance(loaded, dict) else [loaded]
    if len(tensors) != 1 or not isinstance(tensors[0], torch.Tensor):
        raise WrongKeys(f"{path} holds {_kinds(loaded)}: expected one tensor of activations")
    _check_plain(path, "the tensor", tensors[0])
    return tensors[0]


def _check_plain(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise if the file does not hold one plain number for each entry of the tensor."""
    kind = "quantised" if tensor.is_quantized else "meta" if tensor.is_meta else None
    if kind is not None or tensor.layout != torch.strided:
        raise NotACheckpoint(
            f"{path}: {name} is of the kind {kind or tensor.layout}: expected plain numbers, such"
            " as tensor.dequantize() or tensor.to_dense() gives them"
        )
    numbers = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
    refuse_expanded(path, name, tensor, numbers)


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
    try:
        is_zip = zipfile.is_zipfile(path)
    except (OSError, ValueError, zipfile.BadZipFile):
        is_zip = False
    if not is_zip:
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
        found = stored_tensors(path)
        whole = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        assert isinstance(whole, torch.UntypedStorage)
        if isinstance(found, Stored):
            return found.view(whole)
        return {name: stored.view(whole) for name, stored in found.items()}
    except Unknown:
        pass  # torch's own reader says what is in it
    try:
        loaded: object = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return loaded
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpoint(
            f"{path} is a pickle that asks to run code or to build objects other than tensors. It"
            f" is refused, and nothing was executed ({_first_line(error)})"
        ) from error
    except Exception as error:  # a damaged archive raises errors of many kinds
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
        raise kind(f"{path} is not a complete safetensors file: {_first_line(error)}") from error


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
        if found.layout != torch.strided or found.device.type != "cpu":
            raise WrongShape(
                f"{path}: {name} is {found.layout} on {found.device}: expected plain dense numbers"
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


def _check_settings(file: LayerFile, layout: Layout) -> None:
    """Compare `config.json` (or a converted `cfg.json`) and the folder's name with the catalog."""
    group, path = file.group, file.config
    found: dict[str, Any] = {}
    wanted: dict[str, Any] = {
        "model_type": "topk_sae",
        "d_model": group.d_model,
        "d_sae": group.d_sae,
        "k": group.k,
        "num_layers": group.backbone.num_layers,
        "hook_point": "resid_post",
    }
    if layout is SAELENS:
        path = file.path.parent / SAE_CFG_FILENAME
        found = read_config(path)
        metadata = found.pop("metadata", None)
        found |= metadata if isinstance(metadata, dict) else {}
        wanted = {
            "architecture": "topk",
            "d_in": group.d_model,
            "d_sae": group.d_sae,
            "k": group.k,
            "normalize_activations": "none",
            "rescale_acts_by_decoder_norm": False,
            "model_name": group.backbone.model_id,
            "hook_name": group.hook_name(file.ref.layer),
        }
        if group.subtracts_b_dec is not None:
            wanted["apply_b_dec_to_input"] = group.subtracts_b_dec
        found = dict.fromkeys(wanted) | found  # a converted folder must say all of these
    elif path is not None:
        found = read_config(path)
        _check_base_model(found.get("base_model"), path, group)
    for name, value in wanted.items():
        if name in found and found[name] != value:
            raise WrongSettings(
                f"{path} says {name} = {found[name]!r:.60}, but {file.ref} has {value!r}:"
                " the files belong to another group, ask for that one"
            )
    folder = file.path.parent.parent if layout is SAELENS else file.path.parent
    _check_folder_name(folder.name, group)


def _check_base_model(name: object, path: Path, group: Group) -> None:
    """Refuse the name of another backbone. Four backbones share one shape, so only the name tells
    them apart. Other spellings pass: how each published file spells its own name is not known."""
    key = str(name).rstrip("/").split("/")[-1].lower()
    if key != group.backbone.key and any(key == backbone.key for backbone in BACKBONES):
        raise WrongSettings(
            f"{path} says base_model = {name!r:.60}, but {group.short} is of"
            f" {group.backbone.model_id}: the files belong to another model, ask for that one"
        )


def _check_folder_name(name: str, group: Group) -> None:
    """Check that a folder with the name of a published repository is that repository."""
    named = re.search(r"(?:SAE-Res-(.+))?-W(\d+)K-L0_(\d+)$", name)
    if named is None or group.origin == "local":
        return
    model = group.backbone.model_id.split("/")[-1]
    if (named[1] or model, int(named[2]) * 1024, int(named[3])) != (model, group.d_sae, group.k):
        raise WrongSettings(
            f"the folder {name} names {named[1] or 'a model'}, width {named[2]}K,"
            f" k = {named[3]}, but {group.short} is of {model}, width {group.d_sae // 1024}K,"
            f" k = {group.k}"
        )


def subtracts_b_dec(file: LayerFile) -> bool:
    """Whether a located layer subtracts `b_dec` before encoding.

    The catalog says so. Where it does not know, the converted folder's `cfg.json` does.
    """
    if file.group.subtracts_b_dec is not None or layout_of(file.path) is not SAELENS:
        return bool(file.group.subtracts_b_dec)
    return bool(read_config(file.path.parent / SAE_CFG_FILENAME).get("apply_b_dec_to_input"))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _kinds(value: object) -> str:
    if isinstance(value, dict):
        kinds = sorted({type(item).__name__ for item in value.values()})
        return f"a dict of {', '.join(kinds) or 'nothing'}"
    return f"a {type(value).__name__}"
