"""`load_sae` and `open_sae` load the SAE of a layer by name, without touching SAELens's tables.

`load_sae` makes a SAELens SAE. `open_sae` makes one by torch alone, without the seconds that
importing SAELens takes: this package's own verbs call it. `load_directions` reads the directions of
a few features, and only their bytes of the file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import WrongSettings
from qwen_scope_lens.hosted import verified_id
from qwen_scope_lens.saes.byte_ranges import extents
from qwen_scope_lens.saes.checkpoint import SAETensors, open_layer, subtracts_b_dec
from qwen_scope_lens.saes.locate import ARCHITECTURE, HubOptions, LayerFile, locate

if TYPE_CHECKING:
    from qwen_scope_lens.saes.layer_sae import LayerSAE
    from qwen_scope_lens.saes.sae import ScopeSAE

__all__ = [
    "Dtype",
    "build_config",
    "check_dtype",
    "load_directions",
    "load_sae",
    "open_sae",
    "read_layer",
]

Dtype = Literal["float32", "bfloat16", "float16"]


def load_sae(
    name: str | LayerRef,
    sae_id: str | int | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    device: str = "cpu",
    dtype: Dtype | torch.dtype = "float32",
    apply_b_dec_to_input: bool | None = None,
) -> ScopeSAE:
    """Load the SAE of one layer. Its weights are views of the file until something writes to them.

    Args:
        name: the address of the layer (`qwen3-8b-base/w64k-l0-50/20`). With `sae_id`, any name of
            its group: the short form, the SAELens release or the repository id.
        sae_id: the layer, as `layer20`, `layer20.sae.pt` or `20`.
        folder: the only place to look. It holds the files themselves or `<repository name>/`.
            Without it, `$QWEN_SCOPE_HOME/<repository name>/` is searched, then the hub and its
            cache.
        revision: the commit, tag or branch on the hub. The commit is recorded in `cfg.metadata`.
        dtype: a dtype other than that of the file means a copy in memory.
        apply_b_dec_to_input: whether `b_dec` is subtracted before encoding. Needed only for a
            third-party release that does not document it; `verify` tells which convention fits.
            Every official SAE encodes the raw residual.
    """
    config, weights = _read(
        LayerRef.parse(name if sae_id is None else f"{name}/{sae_id}"),
        folder=folder,
        hub=HubOptions(revision, token, local_files_only, force_download),
        device=device,
        dtype=dtype,
        apply_b_dec_to_input=apply_b_dec_to_input,
    )
    from qwen_scope_lens.saes.sae import ScopeSAE, ScopeSAEConfig

    return ScopeSAE.of(ScopeSAEConfig.from_dict(config), weights)


def open_sae(
    name: str | LayerRef,
    *,
    folder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    device: str = "cpu",
    dtype: Dtype | torch.dtype = "float32",
    apply_b_dec_to_input: bool | None = None,
) -> LayerSAE:
    """As `load_sae`, without SAELens and its import. The codes are the same, bit for bit.

    Every function of this package takes both kinds. Hook points inside the SAE, dense activations,
    attaching it to a bridge and saving need the kind that `load_sae` makes.
    """
    from qwen_scope_lens.saes.layer_sae import LayerConfig, LayerSAE

    config, weights = _read(
        LayerRef.parse(name),
        folder=folder,
        hub=HubOptions(revision),
        device=device,
        dtype=dtype,
        apply_b_dec_to_input=apply_b_dec_to_input,
    )
    return LayerSAE.of(LayerConfig.from_dict(config), weights)


def _read(
    ref: LayerRef,
    *,
    folder: str | os.PathLike[str] | None,
    hub: HubOptions,
    device: str,
    dtype: str | torch.dtype,
    apply_b_dec_to_input: bool | None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The SAELens configuration of a layer, and its weights in this dtype, on this device."""
    dtype = check_dtype(dtype)
    config, tensors = read_layer(locate(ref, folder, hub), device=device, dtype=dtype)
    if apply_b_dec_to_input is not None:
        config["apply_b_dec_to_input"] = apply_b_dec_to_input
    with torch.inference_mode(False):  # torch does not count the changes of inference tensors
        return config, tensors.state_dict(getattr(torch, dtype), device)


def load_directions(
    name: str | LayerRef | FeatureRef,
    features: int | Sequence[int] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> torch.Tensor:
    """Read a few decoder rows straight from the file. `[m] -> [m, d_model]`

    This is enough to steer with a few features. It reads a few kilobytes per feature from a
    converted folder, and a page per number from a published `.pt`. With the address of one feature
    (and no `features`) it returns that row, `[d_model]`.
    """
    if features is None:
        address = FeatureRef.parse(name)  # type: ignore[arg-type]
        name, features = address.sae, address.feature
    ref = LayerRef.parse(name)  # type: ignore[arg-type]
    wanted = [features] if isinstance(features, int) else list(features)
    for feature in wanted:
        ref.feature(feature)  # raises for a feature out of range
    file = locate(ref, folder, HubOptions(revision))
    transposed = not open_layer(file).W_dec.is_contiguous()
    extent = extents(file.path, ["W_dec"])["W_dec"]
    with file.path.open("rb") as source:
        read = extent.read_columns if transposed else extent.read_rows
        rows = read(source.fileno(), wanted)
    return rows[0] if isinstance(features, int) else rows


def read_layer(file: LayerFile, *, device: str, dtype: str) -> tuple[dict[str, Any], SAETensors]:
    """The SAELens configuration and the checked tensors of a located layer."""
    tensors = open_layer(file)
    if tensors.W_enc.dtype.itemsize < getattr(torch, dtype).itemsize:
        warnings.warn(
            f"{file.path} holds {tensors.W_enc.dtype}: loading it as {dtype} does not bring back"
            " what was rounded away. Remove or re-convert it to use the published numbers",
            stacklevel=4,
        )
    config = build_config(file.ref, device=device, dtype=dtype, revision=file.revision)
    config["apply_b_dec_to_input"] = subtracts_b_dec(file)
    return config, tensors


def check_dtype(dtype: str | torch.dtype) -> Dtype:
    """The name of a dtype in which SAEs can be loaded. Any other raises."""
    name = str(dtype).removeprefix("torch.")
    if name not in get_args(Dtype):
        raise WrongSettings(f"dtype {dtype!r}: expected one of {', '.join(get_args(Dtype))}")
    return name  # type: ignore[return-value]


def build_config(
    ref: LayerRef, *, device: str = "cpu", dtype: str = "float32", revision: str | None = None
) -> dict[str, Any]:
    """The SAELens configuration of a layer. Every fact is from the catalog; none is a guess."""
    group, layer = ref.row, ref.layer
    metadata = {
        "sae_lens_version": version("sae-lens"),
        "sae_lens_training_version": None,  # not trained with SAELens
        "model_name": group.backbone.model_id,
        "hook_name": group.hook_name(layer),
        "hf_hook_name": group.hf_hook_name(layer),
        "prepend_bos": False,  # Qwen has no BOS token
        "context_size": 1024,  # not published; SAELens's own loader says the same
        "dataset_path": None,  # not published
        "neuronpedia_id": verified_id(ref),
        "qwen_scope_ref": str(ref),
        "repo_id": group.repo_id,
        "revision": revision,
    }
    if group.backbone.is_multimodal:
        metadata["hf_hook_name_multimodal"] = group.hf_hook_name(layer, multimodal=True)
    return {
        "architecture": ARCHITECTURE,
        "d_in": group.d_model,
        "d_sae": group.d_sae,
        "k": group.k,
        "apply_b_dec_to_input": bool(group.subtracts_b_dec),
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "device": device,
        "dtype": dtype,
        "metadata": metadata,
    }
