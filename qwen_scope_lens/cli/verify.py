"""Does this SAE belong to these activations? Measures, prints a report, exits with 1 if not.

The SAE is run under its documented convention and under the usual wrong ones on the same tokens.
The file of activations holds one tensor, [tokens, d_model] or [batch, position, d_model], of
residuals after the SAE's decoder layer: .npy, .safetensors, or .pt (tensors only, never code).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_scope_lens.saes.verify import MAX_FVU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sae", metavar="SAE", help="such as qwen3-8b-base/w64k-l0-50/20")
    parser.add_argument("--activations", type=Path, required=True, help=".npy, .safetensors or .pt")
    parser.add_argument("--folder", type=Path, help="read the SAE's file from here only")
    parser.add_argument("--revision", help="commit, tag or branch on the hub")
    parser.add_argument("--max-fvu", type=float, default=MAX_FVU, help="default: %(default)s")
    parser.add_argument(
        "--subtract-b-dec", action="store_true", help="encode x - b_dec (some third-party SAEs)"
    )


def run(arguments: argparse.Namespace) -> int:
    from qwen_scope_lens.saes.checkpoint import read_activations
    from qwen_scope_lens.saes.load import load_sae
    from qwen_scope_lens.saes.verify import verify

    sae = load_sae(
        arguments.sae,
        folder=arguments.folder,
        revision=arguments.revision,
        apply_b_dec_to_input=True if arguments.subtract_b_dec else None,
    )
    print(verify(sae, read_activations(arguments.activations), max_fvu=arguments.max_fvu))
    return 0
