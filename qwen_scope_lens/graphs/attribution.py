"""`attribute`: the feature graph behind one next token, layer by layer from the target down.

How edges are computed is in `edges.py`. They only lead to the next SAE layer, so the influence of a
layer's features is known before the graph goes on from them, and only the most influential ones are
followed. Their share of the target is counted as circuit-tracer counts it: see `pruning.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import Group, find_group, name_of_model
from qwen_scope_lens.errors import BadText, CheckpointMissing, UnknownName
from qwen_scope_lens.features.reading import Labels
from qwen_scope_lens.graphs.edges import MEMORY, Edges, Level, Target, decompose, edges_from
from qwen_scope_lens.graphs.frozen import EMBEDDINGS, Frozen, frozen
from qwen_scope_lens.graphs.graph import FeatureGraph, Node
from qwen_scope_lens.graphs.kept import Kept, Levels, sae_files
from qwen_scope_lens.models.architecture import Model, decoder_layers, describe
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.models.open import open_model
from qwen_scope_lens.models.tokenize import Content, encode, find_tokenizer
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.saes.load import open_sae
from qwen_scope_lens.saes.locate import HubOptions, locate
from qwen_scope_lens.stores.facts import model_facts
from qwen_scope_lens.version import __version__

__all__ = ["attribute", "check_files", "open_saes", "target_of"]

MOST = 64
LIKELY = 5
SAEOf = Callable[[int], LayerSAE]


def attribute(
    model: str | Path | Model,
    text: Content,
    sae: str,
    *,
    layers: Iterable[int] | None = None,
    target: str | int | None = None,
    target_minus: str | None = None,
    hold: Sequence[str] = ("norms",),
    most: int = MOST,
    steps: int = 1,
    memory: int = MEMORY,
    saes: Mapping[int, LayerSAE] | None = None,
    sae_folder: str | Path | None = None,
    tokenizer: Any = None,
    labels: Labels | None = None,
    device: str | None = None,
    allow_other_model: bool = False,
    progress: bool = False,
    keep: Path | None = None,
    **options: Any,
) -> FeatureGraph:
    """The graph of what makes a model go on with `target` after a text, a chat or token ids.

    Args:
        sae: a group of SAEs, such as `qwen3-8b-base/w64k-l0-50`.
        layers: which layers of the group; by default all of them.
        target: the token whose logit is explained, as text or by its id; by default the most
            probable one. It counts against the mean logit of the vocabulary, or against that of
            `target_minus`.
        hold: what keeps its value while gradients are taken: see `frozen`.
        most: how many features of each layer the graph goes on from, by influence.
        steps: steps of integrated gradients, over all features of the layer below scaled together
            from none to their activations. 1 is the plain gradient at the activations.
        memory: bytes that the gradients of a block of target nodes may take.
        saes: loaded SAEs by layer, instead of those of the group's files.
        keep: a file for the levels that are finished. A graph of the same text, model, SAEs and
            settings goes on from it, so that an interruption costs one level; for SAEs in memory
            the caller knows that they are the same. The caller removes it.
        options: of `encode`, such as `enable_thinking` for a chat.
    """
    row = find_group(sae)
    if min(most, steps, memory) < 1:
        raise BadText(f"most={most}, steps={steps}, memory={memory}: expected 1 or more of each")
    if saes is None:
        check_files(row, layers, sae_folder)
    running = model if isinstance(model, nn.Module) else open_model(model, device=device)
    check_backbone(running, row, allow_other_model=allow_other_model)
    chosen = chosen_layers(running, row, layers)
    sae_of = open_saes(row, sae_folder, device, saes)
    tokenizer = find_tokenizer(running, tokenizer)
    [found] = encode([text], tokenizer, limit=options.pop("limit", 2**31), **options)
    with frozen(running, found.ids, chosen, hold) as one:
        end = target_of(tokenizer, one.logits, target, target_minus)
        kept = None
        if keep is not None:
            made_from = {
                "text": list(found.ids),
                "model": asdict(model_facts(running, chosen)),
                "group": row.short,
                "layers": chosen,
                "saes": None if saes is not None else sae_files(row.short, chosen, sae_folder),
                "target": [end.token, end.minus],
                "settings": [sorted(hold), most, steps, __version__],
            }
            kept = Kept(Path(keep), made_from)
        nodes, edges = _from_the_top(one, chosen, sae_of, end, most, steps, memory, progress, kept)
        chances = one.logits.float().softmax(-1)
        probable = chances.topk(LIKELY)
        likely = zip(probable.indices.tolist(), probable.values.tolist(), strict=True)
    graph = FeatureGraph(
        text=found.text or tokenizer.decode(found.ids),
        tokens=tuple(tokenizer.decode([token]) for token in found.ids),
        token_ids=tuple(found.ids),
        model=name_of_model(describe(running)),
        n_layers=len(decoder_layers(running)),
        group=row.short,
        layers=tuple(chosen),
        target=end.words,
        target_ids=(end.token,) if end.minus is None else (end.token, end.minus),
        probability=float(chances[end.token]),
        likely=tuple((tokenizer.decode([token]), share) for token, share in likely),
        hold=tuple(sorted(hold)),
        steps=steps,
        nodes=tuple(nodes),
        sources=np.concatenate([e[0] for e in edges]),
        targets=np.concatenate([e[1] for e in edges]),
        weights=np.concatenate([e[2] for e in edges]),
    )
    return graph if labels is None else graph.labelled(labels)


def chosen_layers(model: Model, row: Group, layers: Iterable[int] | None) -> list[int]:
    """The wanted layers that the group has, from below; all must be the model's, too."""
    depth = len(decoder_layers(model))
    wanted = row.layers if layers is None else sorted(set(layers))
    chosen = [row.check_layer(layer) for layer in wanted]
    if not chosen or chosen[-1] >= depth:
        raise BadText(
            f"layers {', '.join(map(str, chosen)) or 'none'}: expected some of those that the"
            f" model has, 0..{depth - 1}"
        )
    return chosen


def check_files(row: Group, layers: Iterable[int] | None, folder: str | Path | None = None) -> None:
    """Raise before any work where SAEs of one's own are to be read, and some are not there.

    Nothing is looked for on the hub.
    """
    if row.origin != "local" and folder is None:
        return
    missing: list[str] = []
    there: list[int] = []
    for layer in row.layers if layers is None else layers:
        try:
            locate(LayerRef(row.short, layer), folder, HubOptions(local_files_only=True))
            there.append(layer)
        except CheckpointMissing as error:
            missing.append(str(error) if not missing else "")
    if missing:
        found = ", ".join(map(str, there)) or "none"
        raise CheckpointMissing(
            f"{len(missing)} layers of {row.short} have no file; there are {found}: choose layers"
            f" (--layers). The first that is missing: {missing[0]}"
        )


def open_saes(
    row: Group,
    folder: str | Path | None = None,
    device: str | None = None,
    known: Mapping[int, LayerSAE] | None = None,
) -> SAEOf:
    """The SAE of a layer when its turn comes, as views of its file: only rows in use are read."""

    def sae_of(layer: int) -> LayerSAE:
        if known is not None:
            if layer not in known:
                raise UnknownName(f"no SAE was given for layer {layer}: give it, or leave it out")
            return known[layer]
        return open_sae(LayerRef(row.short, layer), folder=folder, device=device or "cpu")

    return sae_of


def target_of(
    tokenizer: Any, logits: Tensor, target: str | int | None, minus: str | None
) -> Target:
    """The tokens of the target; `logits [vocabulary]` say which is the most probable."""

    def token(text: str, option: str) -> int:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            pieces = [tokenizer.decode([one]) for one in ids]
            raise BadText(
                f"{option} {text!r} is {len(ids)} tokens, {pieces}: expected one. Words begin with"
                " a space, as in ' Paris'; of a longer word take its first token"
            )
        return int(ids[0])

    if isinstance(target, int):
        if not 0 <= target < len(logits):
            raise BadText(f"target {target}: expected a token id from 0 to {len(logits) - 1}")
        chosen = target
    else:
        chosen = int(logits.argmax()) if target is None else token(target, "target")
    word = repr(tokenizer.decode([chosen]))
    if minus is None:
        return Target(chosen, None, f"logit of {word} less the mean")
    other = token(minus, "target_minus")
    if other == chosen:
        raise BadText(f"target and target_minus are one token, {word}: choose another")
    return Target(chosen, other, f"logit of {word} less that of {tokenizer.decode([other])!r}")


def _from_the_top(
    one: Frozen,
    layers: Sequence[int],
    sae_of: SAEOf,
    target: Target,
    most: int,
    steps: int,
    memory: int,
    progress: bool,
    kept: Kept | None,
) -> tuple[list[Node], list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Nodes and edges: one level after the other, from the target to the embeddings."""
    value = float(target.value(one.logits[None].float())[0])
    first = Node("target", len(one.layers), one.length - 1, target.token, value, 1.0)
    now = (kept.load() if kept else None) or Levels([first], [], [0])
    seeds: list[tuple[int, Tensor]] = []
    order = [*reversed(layers), EMBEDDINGS]
    total = (len(layers) * most + 1) * steps
    with tqdm(total=total, unit="node", desc="graph", disable=not progress) as bar:
        if now.above is not None:
            bar.update(max(0, now.done - 1) * most * steps + steps)
            if now.above != EMBEDDINGS:
                seeds = _seeds(now, sae_of(now.above))
        for layer in order[now.done :] if now.upper else ():
            bar.set_postfix_str("embeddings" if layer == EMBEDDINGS else f"layer {layer}")
            sae = None if layer == EMBEDDINGS else sae_of(layer)
            level = decompose(one, layer, sae)
            on = [(at, row.to(level.error)) for at, row in seeds]
            step = partial(edges_from, steps=steps, memory=memory, on_block=bar.update)
            found = step(one, level, now.above, on, target)
            now.upper, some = _keep(now.nodes, now.upper, found, level, one.ids, most)
            now.edges.append(some)
            now.above, now.done = layer, now.done + 1
            if kept:
                kept.save(now)
            if not now.upper:
                break
            seeds = [] if sae is None else _seeds(now, sae)
        bar.total = bar.n
    return now.nodes, now.edges


def _seeds(now: Levels, sae: LayerSAE) -> list[tuple[int, Tensor]]:
    """Position and encoder row of each feature that the graph goes on from."""
    nodes = [now.nodes[i] for i in now.upper]
    rows = sae.encoder_row([node.number for node in nodes if node.number is not None])
    return list(zip([node.position or 0 for node in nodes], rows, strict=True))


def _keep(
    nodes: list[Node], upper: list[int], found: Edges, level: Level, ids: list[int], most: int
) -> tuple[list[int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Add a level's nodes that matter; where its features are in `nodes`, and the edges."""
    tokens, k = level.values.shape
    n = len(upper)
    parts = [found.features.reshape(n, -1), found.rest, found.bias[:, None]]
    weights = torch.cat(parts, 1).cpu().double().numpy()
    linear = found.linear.cpu().double().numpy()
    size = np.abs(weights).sum(1)
    flow = np.array([nodes[i].influence for i in upper]) / np.maximum(size, 1e-300)
    influence = flow @ np.abs(weights)
    order = np.argsort(-influence[: tokens * k], kind="stable")[:most]
    features = [int(i) for i in order if influence[i] > 0]
    others = (np.flatnonzero(influence[tokens * k :] > 0) + tokens * k).tolist()
    columns = features + others
    first = len(nodes)
    lengths = level.error.norm(dim=-1).tolist()
    for column in columns:
        share = float(influence[column])
        if column < tokens * k:
            at, entry = divmod(column, k)
            number, value = int(level.indices[at, entry]), float(level.values[at, entry])
            nodes.append(Node("feature", level.layer, at, number, value, share))
        elif column < tokens * (k + 1):
            at = column - tokens * k
            if level.layer == EMBEDDINGS:
                nodes.append(Node("embedding", EMBEDDINGS, at, ids[at], lengths[at], share))
            else:
                nodes.append(Node("error", level.layer, at, None, lengths[at], share))
        else:
            length = float(level.bias.norm())
            nodes.append(Node("bias", level.layer, None, None, length, share))
    kept = weights[:, columns]
    for row, i in enumerate(upper):
        whole = float(weights[row].sum())
        gap = abs(whole - linear[row]) / size[row] if size[row] else 0.0
        nodes[i] = replace(
            nodes[i],
            linear=float(linear[row]),
            left_out=whole - float(kept[row].sum()),
            gap=float(gap),
            features=float(weights[row, : tokens * k].sum()) if k else None,
            removed=float(found.removed[row]) if k else None,
        )
    targets, columns_at = np.nonzero(kept)
    edges = (
        columns_at + first,
        np.array(upper, dtype=np.int64)[targets],
        kept[targets, columns_at],
    )
    return list(range(first, first + len(features))), edges
