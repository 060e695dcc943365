"""Show one group: shapes, sizes, the memory it needs (before any download), hook and notice."""

from __future__ import annotations

import argparse
import dataclasses

from qwen_scope_lens.catalog import Group, find_group
from qwen_scope_lens.cli.options import add_json, print_json
from qwen_scope_lens.cli.terminal import plain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", metavar="GROUP", help="any name of a group; see `qsl list`")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    group = find_group(arguments.group)
    if arguments.json:
        print_json(arguments.json, {"short": group.short, **dataclasses.asdict(group)})
    else:
        print(plain(describe(group)))
    return 0


def describe(group: Group) -> str:
    layer = group.layers[0]
    model, one = group.backbone, group.bytes_per_layer
    hooks = [group.hook_name(layer), group.hf_hook_name(layer)]
    if model.is_multimodal:
        hooks.append(group.hf_hook_name(layer, multimodal=True) + " (image-text class)")
    subtracts = {True: "yes", False: "no", None: "not documented: `qsl verify` finds out"}
    kind = "mixture of experts" if model.is_moe else "dense"
    facts = {
        "names": "\n".join(dict.fromkeys(group.names)),
        "backbone": f"{model.model_id} ({kind}, {model.tuning}, {model.num_layers} layers)",
        "layers": f"{layers_in_words(group)}, counted from 0 ({len(group.layers)} files)",
        "shape": f"{group.d_model} -> {group.d_sae} features, {group.k} active per token",
        "file": group.file_name(layer),
        "on disk": f"{size(one)} per layer, {size(one * len(group.layers))} in all",
        "in memory": f"views of the file until used; {size(one)} per layer when all of it was read"
        f" ({size(one // 2)} in bfloat16)",
        "hook": "\n".join(hooks),
        "b_dec": f"subtracted before encoding: {subtracts[group.subtracts_b_dec]}",
        "notice": group.notice,
    }
    lines = [group.short]
    for name, text in facts.items():
        first, *rest = _wrap(text)
        lines += [f"  {name:10} {first}", *(f"  {'':10} {line}" for line in rest)]
    return "\n".join(lines)


def layers_in_words(group: Group) -> str:
    first, last = group.layers[0], group.layers[-1]
    if group.layers == tuple(range(first, last + 1)):
        return f"{first}-{last}"
    return ",".join(map(str, group.layers))


def size(count: int) -> str:
    """Bytes in decimal units, as disks and the hub count them."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3f} GB" if value < 100 else f"{value:.0f} GB"


def _wrap(text: str) -> list[str]:
    from textwrap import wrap

    return [line for part in text.splitlines() for line in wrap(part, 84)]
