"""Convert a SAELens TopK SAE to the published layout, for people who publish an SAE of their own.

    qsl convert saelens-to-official converted/*/layer6 --out my-repo/ --num-layers 8

The result is `OUT/layer{n}.sae.pt`, with one `config.json` for all layers. Float32 is kept bit by
bit. The layout cannot express an input bias or decoder-norm rescaling. Such an SAE is refused, or,
with `--fold`, rewritten into an equivalent one, whose numbers differ by rounding.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.errors import CannotWrite, NotACheckpoint, NotFinite, UnsupportedSAE
from qwen_scope_lens.files import whole_file
from qwen_scope_lens.saes.locate import (
    CONFIG_NAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    read_config,
)

if TYPE_CHECKING:  # torch and SAELens take seconds, and `--help` shall not wait for them
    from sae_lens import SAE
    from sae_lens.saes.topk_sae import TopKSAE

__all__ = ["convert"]

RESIDUAL_HOOK = re.compile(r"blocks\.\d+\.(hook_resid_post|hook_out)")


def convert(
    sae: SAE[Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    num_layers: int,
    layer: int | None = None,
    base_model: str | None = None,
    fold: bool = False,
) -> Path:
    """Write one layer file (and `config.json`) and return its path.

    Args:
        sae: the SAE, or a folder that `SAE.load_from_disk` reads.
        num_layers: the number of layers of the model, for `config.json`.
        layer, base_model: by default they are taken from the SAE's metadata (`hook_name`,
            `model_name`).
        fold: fold an input bias or a norm rescaling, which the layout cannot express, into the
            weights.
    """
    import torch
    from sae_lens import SAE
    from sae_lens.util import extract_layer_from_tlens_hook_name

    loaded = sae if isinstance(sae, SAE) else _load(Path(sae))
    plain = _as_published(loaded, fold)
    metadata = plain.cfg.metadata
    if layer is None and RESIDUAL_HOOK.fullmatch(metadata.hook_name or ""):
        layer = extract_layer_from_tlens_hook_name(metadata.hook_name or "")
    base_model = base_model or metadata.model_name
    if layer is None or base_model is None:
        raise UnsupportedSAE(
            f"the SAE's metadata (hook {metadata.hook_name!r}, model {base_model!r}) do not name a"
            " residual stream after a layer, or do not name a model: give layer and base_model"
        )
    if not 0 <= layer < num_layers:
        raise UnsupportedSAE(f"layer {layer} does not exist in a model of {num_layers} layers")
    settings = {
        "model_type": "topk_sae",
        "base_model": base_model,
        "d_model": plain.cfg.d_in,
        "d_sae": plain.cfg.d_sae,
        "k": plain.cfg.k,
        "num_layers": num_layers,
        "hook_point": "resid_post",
        "dtype": "float32",
    }
    tensors = {
        "W_enc": plain.W_enc.detach().T,
        "W_dec": plain.W_dec.detach().T,
        "b_enc": plain.b_enc.detach(),
        "b_dec": plain.b_dec.detach(),
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NotFinite(f"{name} holds NaN or infinity: such an SAE cannot be published")
    target = Path(out) / f"layer{layer}.sae.pt"
    _write_settings(Path(out) / CONFIG_NAME, settings)
    with whole_file(target) as partial, partial.open("wb") as file:
        torch.save({n: t.float().cpu().contiguous() for n, t in tensors.items()}, file)
    return target


def _load(folder: Path) -> SAE[Any]:
    from sae_lens import SAE

    read_config(folder / SAE_CFG_FILENAME)
    if not (folder / SAE_WEIGHTS_FILENAME).is_file():  # opening a FIFO would wait forever
        raise NotACheckpoint(f"{folder} has no file {SAE_WEIGHTS_FILENAME}")
    try:
        return SAE.load_from_disk(folder)
    except Exception as error:  # a damaged cfg.json raises errors of many kinds
        raise NotACheckpoint(f"{folder} is not an SAE as save_model writes it: {error}") from error


def _write_settings(path: Path, settings: dict[str, Any]) -> None:
    if path.exists():
        found = read_config(path)
        if found != settings:
            raise CannotWrite(
                f"{path} describes other SAEs:\n  it has   {found}\n  this is  {settings}\n"
                "  all layers of one folder share model, width and k: choose another --out"
            )
        return
    with whole_file(path) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _as_published(sae: SAE[Any], fold: bool) -> TopKSAE:
    """An SAE with the same function in the published convention. Raises if that needs `fold`."""
    import torch
    from sae_lens.saes.topk_sae import TopKSAE

    if not isinstance(sae, TopKSAE):
        raise UnsupportedSAE(
            f"this is a {type(sae).__name__} ({sae.cfg.architecture()}): the layout holds TopK SAEs"
        )
    for name in ("normalize_activations", "reshape_activations"):
        if getattr(sae.cfg, name) != "none":
            raise UnsupportedSAE(
                f"the SAE has {name} = {getattr(sae.cfg, name)!r}: the layout needs 'none'; fold it"
                " into the weights with SAELens first"
            )
    to_fold = [
        n for n in ("rescale_acts_by_decoder_norm", "apply_b_dec_to_input") if getattr(sae.cfg, n)
    ]
    if not to_fold:
        return sae
    if not fold:
        raise UnsupportedSAE(
            f"the SAE has {' and '.join(to_fold)}, which the layout cannot express. Fold it into"
            " the weights with fold=True (--fold), which keeps the function and changes the numbers"
        )
    sae = copy.deepcopy(sae)
    with torch.no_grad():
        if sae.cfg.rescale_acts_by_decoder_norm:
            sae.fold_W_dec_norm()
            sae.cfg.rescale_acts_by_decoder_norm = False
        if sae.cfg.apply_b_dec_to_input:  # (x - b_dec) W + b = x W + (b - b_dec W)
            shift = sae.b_dec.double() @ sae.W_enc.double()
            sae.b_enc.copy_((sae.b_enc.double() - shift).to(sae.b_enc.dtype))
            sae.cfg.apply_b_dec_to_input = False
    return sae


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from qwen_scope_lens.cli import inputs
    from qwen_scope_lens.cli.inputs import Input
    from qwen_scope_lens.cli.options import add_layer

    parser.add_argument(
        "source",
        metavar="FOLDER",
        action=Input,
        check=inputs.sae_folder,
        help="a folder that SAELens's save_model wrote",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder to write in the published layout"
    )
    parser.add_argument(
        "--num-layers", type=int, required=True, help="the number of layers of the model"
    )
    add_layer(parser, "the layer (default: from the SAE's hook name)", check=inputs.unchecked)
    parser.add_argument("--base-model", help="the model (default: from the SAE's metadata)")
    parser.add_argument(
        "--fold", action="store_true", help="fold an input bias or norm rescaling into the weights"
    )


def run(arguments: argparse.Namespace) -> int:
    path = convert(
        arguments.source,
        arguments.out,
        num_layers=arguments.num_layers,
        layer=arguments.layer,
        base_model=arguments.base_model,
        fold=arguments.fold,
    )
    print(path)
    return 0


if __name__ == "__main__":
    from qwen_scope_lens.cli.verbs import run_alone

    sys.exit(run_alone(__doc__, add_arguments, run))
