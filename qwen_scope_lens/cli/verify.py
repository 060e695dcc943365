"""Does this SAE belong to this model, or to these activations? Exits with 1 if not.

    qsl verify mini-qwen3/w1k-l0-16/6 --model mini-qwen3
    # needs the hub, and a file of activations:
    qsl verify qwen3-8b-base/w64k-l0-50/20 --model Qwen/Qwen3-8B-Base
    qsl verify qwen3-8b-base/w64k-l0-50/20 --activations residuals.npy

The SAE is run under its documented convention and under the usual wrong ones on the same tokens.
With --model the texts are a small bundled sample (or --texts, one per line), only the layers up to
the SAE's are loaded, and the hook is compared with the layer's own output.
A file of activations holds one tensor, [tokens, d_model] or [batch, position, d_model], of
residuals after the SAE's decoder layer: .npy, .safetensors, or .pt (tensors only, never code).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.cli import inputs
from qwen_scope_lens.cli.inputs import Input
from qwen_scope_lens.cli.options import add_json, add_sae_files, positive, print_json
from qwen_scope_lens.errors import BadText
from qwen_scope_lens.files import read_text

if TYPE_CHECKING:
    from qwen_scope_lens.models.verify import ModelCheck
    from qwen_scope_lens.saes.layer_sae import LayerSAE
    from qwen_scope_lens.saes.verify import Verification


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sae",
        metavar="SAE",
        action=Input,
        check=inputs.layer_address,
        help="such as qwen3-8b-base/w64k-l0-50/20",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", action=Input, check=inputs.model, help="a folder, or a name on the hub"
    )
    source.add_argument(
        "--activations",
        type=Path,
        action=Input,
        check=inputs.file,
        help=".npy, .safetensors or .pt",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        action=Input,
        check=inputs.file,
        help="with --model: a file with one text per line",
    )
    add_sae_files(parser, revision=True)
    parser.add_argument("--max-fvu", type=positive, help="default: 0.8, see docs/verify.md")
    parser.add_argument(
        "--subtract-b-dec", action="store_true", help="encode x - b_dec (some third-party SAEs)"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.revision is None:
        inputs.sae_files([LayerRef.parse(arguments.sae)], arguments.sae_folder)

    from qwen_scope_lens.saes.load import open_sae

    sae = open_sae(
        LayerRef.parse(arguments.sae),
        folder=arguments.sae_folder,
        revision=arguments.revision,
        apply_b_dec_to_input=True if arguments.subtract_b_dec else None,
    )
    check = _with_model if arguments.model else _with_activations
    found = check(sae, arguments)
    if arguments.json:
        print_json(arguments.json, asdict(found))
    else:
        print(found)
    return 0


def _with_model(sae: LayerSAE, arguments: argparse.Namespace) -> ModelCheck:
    from qwen_scope_lens.models.open import open_model
    from qwen_scope_lens.models.verify import verify_model

    texts = None
    if arguments.texts:
        try:
            lines = read_text(arguments.texts).splitlines()
        except (OSError, ValueError) as error:
            raise BadText(f"cannot read {arguments.texts} as UTF-8 text: {error}") from error
        texts = [line for line in lines if line.strip()]
    ref = LayerRef.parse(arguments.sae)
    after = min(ref.layer + 1, ref.row.backbone.num_layers - 1)  # `verify_model` compares with it
    model = open_model(arguments.model, up_to_layer=after)
    return verify_model(model, sae, texts, max_fvu=_limit(arguments))


def _with_activations(sae: LayerSAE, arguments: argparse.Namespace) -> Verification:
    from qwen_scope_lens.saes.checkpoint import read_activations
    from qwen_scope_lens.saes.verify import verify

    return verify(sae, read_activations(arguments.activations), max_fvu=_limit(arguments))


def _limit(arguments: argparse.Namespace) -> float:
    from qwen_scope_lens.saes.verify import MAX_FVU

    return MAX_FVU if arguments.max_fvu is None else float(arguments.max_fvu)
