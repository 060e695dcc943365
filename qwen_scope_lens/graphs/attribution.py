"""`attribute`: the feature graph behind one next token, layer by layer from the target down.

At every SAE layer the residual is its own decomposition, x = sum of (activation * decoder row)
+ b_dec + error, and a gradient ends there. So an edge is direct: the gradient of a node's
pre-activation with respect to the residual of the SAE layer below, times what the source writes
there. One backward pass serves a block of target nodes, as rows of a batch whose size follows from
a memory budget. Edges only lead to the next SAE layer, so the influence of a layer's features is
known before the graph goes on from them, and only the most influential ones are followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import MINI_HOME, Group, find_group
from qwen_scope_lens.errors import BadText, UnknownName
from qwen_scope_lens.graphs.frozen import EMBEDDINGS, Frozen, frozen
from qwen_scope_lens.graphs.graph import FeatureGraph, Labels, Node
from qwen_scope_lens.models.architecture import Model, decoder_layers, describe
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.models.load import load_model
from qwen_scope_lens.models.tokenize import Content, encode, find_tokenizer
from qwen_scope_lens.saes.load import load_sae
from qwen_scope_lens.saes.sae import ScopeSAE

__all__ = ["Level", "Target", "attribute", "decompose", "edges_from", "open_saes", "target_of"]

MOST, MEMORY = 64, 2**30
LIKELY = 5
CHUNK = 64 * 2**20
"""How many bytes of decoder rows are gathered at a time."""

SAEOf = Callable[[int], ScopeSAE]


@dataclass(frozen=True)
class Target:
    """What is explained: a token's logit minus another's, or minus the mean of all."""

    token: int
    minus: int | None
    words: str

    def value(self, logits: Tensor) -> Tensor:
        """`[rows, vocabulary] -> [rows]`, in float32 or better."""
        other = logits.mean(-1) if self.minus is None else logits[:, self.minus]
        return logits[:, self.token] - other


@dataclass(frozen=True)
class Level:
    """The residual of one SAE layer, taken apart. Of the embeddings, the error is all there is."""

    layer: int
    x: Tensor  # [T, d_model]
    values: Tensor  # [T, k], 0 for padding
    indices: Tensor  # [T, k]
    error: Tensor  # [T, d_model]
    bias: Tensor  # [d_model]
    sae: ScopeSAE | None = None

    def features(self) -> Tensor:
        """What all features together write. `[T, d_model]`"""
        return self.x - self.error - self.bias


def attribute(
    model: str | Path | Model,
    text: Content,
    sae: str,
    *,
    layers: Iterable[int] | None = None,
    target: str | None = None,
    target_minus: str | None = None,
    hold: Sequence[str] = ("norms",),
    most: int = MOST,
    steps: int = 1,
    memory: int = MEMORY,
    saes: Mapping[int, ScopeSAE] | None = None,
    sae_folder: str | Path | None = None,
    tokenizer: Any = None,
    labels: Labels | None = None,
    device: str | None = None,
    allow_other_model: bool = False,
    progress: bool = False,
    **options: Any,
) -> FeatureGraph:
    """The graph of what makes a model go on with `target` after a text.

    Args:
        sae: a group of SAEs, such as `qwen3-8b-base/w64k-l0-50`.
        layers: which layers of the group; by default all of them.
        target: the token whose logit is explained, by default the most probable one. It counts
            against the mean logit of the vocabulary, or against `target_minus`.
        hold: what keeps its value while gradients are taken: see `frozen`.
        most: how many features of each layer the graph goes on from, by influence.
        steps: steps of integrated gradients, over all features of the layer below scaled together
            from none to their activations. 1 is the plain gradient at the activations.
        memory: bytes that the gradients of a block of target nodes may take.
        saes: loaded SAEs by layer, instead of those of the group's files.
        options: of `encode`, such as `enable_thinking` for a chat.
    """
    row = find_group(sae)
    if min(most, steps, memory) < 1:
        raise BadText(f"most={most}, steps={steps}, memory={memory}: expected 1 or more of each")
    running = model if isinstance(model, nn.Module) else load_model(model, device=device)
    check_backbone(running, row, allow_other_model=allow_other_model)
    chosen = chosen_layers(running, row, layers)
    sae_of = open_saes(row, sae_folder, device, saes)
    tokenizer = find_tokenizer(running, tokenizer)
    [found] = encode([text], tokenizer, limit=options.pop("limit", 2**31), **options)
    with frozen(running, found.ids, chosen, hold) as one:
        end = target_of(tokenizer, one.logits, target, target_minus)
        nodes, edges = _from_the_top(one, chosen, sae_of, end, most, steps, memory, progress)
        chances = one.logits.float().softmax(-1)
        probable = chances.topk(LIKELY)
        likely = zip(probable.indices.tolist(), probable.values.tolist(), strict=True)
    name = describe(running)
    graph = FeatureGraph(
        text=found.text or tokenizer.decode(found.ids),
        tokens=tuple(tokenizer.decode([token]) for token in found.ids),
        token_ids=tuple(found.ids),
        model=Path(name).name if Path(name).parent == MINI_HOME else name,
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


def open_saes(
    row: Group,
    folder: str | Path | None = None,
    device: str | None = None,
    known: Mapping[int, ScopeSAE] | None = None,
) -> SAEOf:
    """The SAE of a layer when its turn comes, as views of its file: only rows in use are read."""

    def sae_of(layer: int) -> ScopeSAE:
        if known is not None:
            if layer not in known:
                raise UnknownName(f"no SAE was given for layer {layer}: give it, or leave it out")
            return known[layer]
        return load_sae(LayerRef(row.short, layer), folder=folder, device=device or "cpu")

    return sae_of


def target_of(tokenizer: Any, logits: Tensor, target: str | None, minus: str | None) -> Target:
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

    chosen = int(logits.argmax()) if target is None else token(target, "target")
    word = repr(tokenizer.decode([chosen]))
    if minus is None:
        return Target(chosen, None, f"logit of {word} less the mean")
    other = token(minus, "target_minus")
    if other == chosen:
        raise BadText(f"target and target_minus are one token, {word}: choose another")
    return Target(chosen, other, f"logit of {word} less that of {tokenizer.decode([other])!r}")


@torch.no_grad()
def decompose(one: Frozen, layer: int, sae: ScopeSAE | None) -> Level:
    """Take the residual after a layer apart, with the SAE's own exact selection."""
    x = one.residuals[layer]
    precise = torch.promote_types(x.dtype, torch.float32)
    if sae is None:
        none = x.new_zeros(len(x), 0)
        zeros = torch.zeros(x.shape[-1], dtype=precise, device=x.device)
        return Level(layer, x, none, none.long(), x.to(precise), zeros)
    codes = sae.encode_sparse(x.to(sae.W_dec.device))
    values, indices = codes.values.to(x.device, precise), codes.indices.long().to(x.device)
    error = torch.empty_like(x, dtype=precise)
    bias = sae.b_dec.detach().to(x.device, precise)
    level = Level(layer, x, values, indices, error, bias, sae)
    for rows, directions in _directions(level):
        written = torch.einsum("tk,tkd->td", values[rows], directions)
        error[rows] = x[rows].to(precise) - written - bias
    return level


def _directions(level: Level) -> Iterable[tuple[slice, Tensor]]:
    """The decoder rows of the features of some tokens at a time. `[t, k, d_model]`"""
    if level.sae is None:
        return
    used, place = level.indices.unique(return_inverse=True)
    rows = level.sae.direction(used.to(level.sae.W_dec.device)).to(level.error)
    size = max(1, CHUNK // max(1, rows[0].nbytes * level.indices.shape[1]))
    for start in range(0, len(level.x), size):
        part = slice(start, start + size)
        yield part, rows[place[part]]


@dataclass(frozen=True)
class Edges:
    """The edges from one level into n nodes above it."""

    features: Tensor  # [n, T, k]
    rest: Tensor  # [n, T], of errors or embeddings
    bias: Tensor  # [n]
    linear: Tensor  # [n]: gradient times residual, computed without the decomposition
    removed: Tensor  # [n]: what the node really loses when no feature is there, by two forward runs


def edges_from(
    one: Frozen,
    level: Level,
    above: int | None,
    seeds: Sequence[tuple[int, Tensor]],
    target: Target,
    *,
    steps: int = 1,
    memory: int = MEMORY,
    on_block: Callable[[int], object] = lambda count: None,
) -> Edges:
    """All edges from a level into nodes of the next SAE layer, `above`, or into the target (None).

    `seeds` are token and encoder row `[d_model]` of each node; of the target, they are not used.
    """
    x, n = level.x, len(seeds) if above is not None else 1
    tokens, k = level.values.shape
    per_row = 2 * one.bytes_per_row(level.layer, above) + 3 * x.numel() * level.error.element_size()
    size = max(1, min(n, memory // per_row))
    found = Edges(
        *(level.error.new_zeros(n, *shape) for shape in ((tokens, k), (tokens,), (), (), ()))
    )
    off = x.to(level.error) - level.features()
    for step in range(steps):
        # Midpoints of the way from no feature to all of them; the plain gradient is at the end.
        share = 1.0 if steps == 1 else (step + 0.5) / steps
        at = x if steps == 1 else (off + share * level.features()).to(x.dtype)
        leaf = at[None].expand(size, -1, -1).contiguous().requires_grad_()
        with torch.enable_grad():
            out = one.run(level.layer, above, leaf)
            scalars = target.value(out.to(level.error)) if above is None else None
        for start in range(0, n, size):
            block = seeds[start : start + size]
            if scalars is not None:
                [gradient] = torch.autograd.grad(scalars.sum(), leaf)
            else:
                seed = torch.zeros_like(out)
                for row, (position, direction) in enumerate(block):
                    seed[row, position] = direction.to(out)
                last = start + size >= n
                [gradient] = torch.autograd.grad(out, leaf, seed, retain_graph=not last)
            count = 1 if scalars is not None else len(block)
            _add(found, slice(start, start + count), gradient[:count].to(level.error), level, steps)
            on_block(count)
    both = torch.stack([x, off.to(x.dtype)])
    with torch.no_grad():
        out = one.run(level.layer, above, both).to(level.error)
    change = target.value(out)[None] if above is None else _read(out, seeds)
    found.removed.copy_(change[:, 0] - change[:, 1])
    return found


def _read(out: Tensor, seeds: Sequence[tuple[int, Tensor]]) -> Tensor:
    """What each node reads from residuals `[rows, T, d_model]`. `[n, rows]`"""
    return torch.stack([out[:, position] @ direction.to(out) for position, direction in seeds])


def _add(found: Edges, rows: slice, gradient: Tensor, level: Level, steps: int) -> None:
    """Add the edges of a block of nodes, from their gradients `[n, T, d_model]`."""
    gradient = gradient / steps
    for part, directions in _directions(level):
        along = torch.einsum("ntd,tkd->ntk", gradient[:, part], directions)
        found.features[rows, part] += along * level.values[part]
    found.rest[rows] += torch.einsum("ntd,td->nt", gradient, level.error)
    found.bias[rows] += gradient.sum(1) @ level.bias
    found.linear[rows] += torch.einsum("ntd,td->n", gradient, level.x.to(gradient))


def _from_the_top(
    one: Frozen,
    layers: Sequence[int],
    sae_of: SAEOf,
    target: Target,
    most: int,
    steps: int,
    memory: int,
    progress: bool,
) -> tuple[list[Node], list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Nodes and edges: one level after the other, from the target to the embeddings."""
    value = float(target.value(one.logits[None].float())[0])
    last = one.length - 1
    nodes = [Node("target", len(one.layers), last, target.token, value, 1.0)]
    edges = []
    upper, above = [0], None
    seeds: list[tuple[int, Tensor]] = []
    total = (len(layers) * most + 1) * steps
    with tqdm(total=total, unit="node", desc="graph", disable=not progress) as bar:
        for layer in [*reversed(layers), EMBEDDINGS]:
            bar.set_postfix_str("embeddings" if layer == EMBEDDINGS else f"layer {layer}")
            sae = None if layer == EMBEDDINGS else sae_of(layer)
            level = decompose(one, layer, sae)
            step = partial(edges_from, steps=steps, memory=memory, on_block=bar.update)
            found = step(one, level, above, seeds, target)
            kept, some = _keep(nodes, upper, found, level, one.ids, most)
            edges.append(some)
            upper, above = kept, layer
            if not kept:
                break
            assert sae is not None or layer == EMBEDDINGS
            seeds = []
            if sae is not None:
                numbers = [nodes[i].number for i in kept]
                rows = sae.encoder_row([n for n in numbers if n is not None])
                at = [nodes[i].position or 0 for i in kept]
                seeds = list(zip(at, rows.to(level.error), strict=True))
        bar.total = bar.n
    return nodes, edges


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
        changes = {"linear": float(linear[row]), "gap": float(gap)}
        if k:
            changes["features"] = float(weights[row, : tokens * k].sum())
            changes["removed"] = float(found.removed[row])
        nodes[i] = replace(nodes[i], left_out=whole - float(kept[row].sum()), **changes)
    targets, columns_at = np.nonzero(kept)
    edges = (
        columns_at + first,
        np.array(upper, dtype=np.int64)[targets],
        kept[targets, columns_at],
    )
    return list(range(first, first + len(features))), edges
