"""Read a text: which features fire on it, per token and as a whole, with what is known of each.

`read` opens a model and SAEs by their names and reads one text, `read_all` reads several, and
`read_layers` works with what is in memory already. No store is needed. How a reading is shown is in
`reading.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_scope_lens.address import FeatureRef, LayerRef, saes_named
from qwen_scope_lens.catalog import MINI_GROUPS, name_of_model
from qwen_scope_lens.errors import BadText, UnknownName
from qwen_scope_lens.features.reading import Labels, Reading
from qwen_scope_lens.features.token_effects import token_effects
from qwen_scope_lens.models.architecture import Model, describe, places_of
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.models.checkpoint import Tokenizer
from qwen_scope_lens.models.open import open_model
from qwen_scope_lens.models.residuals import capture
from qwen_scope_lens.models.token_text import Vocabulary
from qwen_scope_lens.models.tokenize import Content, find_tokenizer
from qwen_scope_lens.models.unembedding import Unembedding, read_unembedding
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.saes.load import open_sae
from qwen_scope_lens.stores.facts import check_config, check_model

__all__ = ["as_reading", "read", "read_all", "read_layers"]

DEFAULT = MINI_GROUPS[0].short
TOP, PROMOTED = 5, 5

SAEs = str | LayerRef | LayerSAE | Sequence[LayerSAE]
"""A group, the address of one SAE, or SAEs in memory whose metadata have an address."""


def read(
    text: Content,
    sae: SAEs = DEFAULT,
    *,
    model: str | Path | Model | None = None,
    layers: Iterable[int] | int | None = None,
    labels: Labels | None = None,
    top: int = TOP,
    promoted: int = PROMOTED,
    all_tokens: bool = False,
    sae_folder: str | Path | None = None,
    device: str | None = None,
    allow_other_model: bool = False,
    **options: Any,
) -> Reading:
    """Which features fire on a text. By default the toy model reads it.

    Args:
        text: a text, a chat (which needs `enable_thinking`), or token ids.
        sae: a group (with `layers`), the address of one SAE, or loaded SAEs of one group.
        model: a model in memory, or a name; by default the model that the SAEs were trained on. Of
            a checkpoint, the layers after the last wanted one are not loaded.
        layers: which layers of the group; by default its middle layer.
        labels: what features mean, such as a `LabelPack`.
        top: how many features per layer come with the tokens that they promote.
        promoted: how many tokens each of them comes with; 0 does without the unembedding.
        all_tokens: count the first token and tokens of extreme norm, too. A reading shows them in
            any case; its strongest features leave them out by default, as all statistics do.
        options: those of `iter_captures`.
    """
    readings = read_all(
        [text],
        sae,
        model=model,
        layers=layers,
        labels=labels,
        top=top,
        promoted=promoted,
        all_tokens=all_tokens,
        sae_folder=sae_folder,
        device=device,
        allow_other_model=allow_other_model,
        **options,
    )
    return next(readings)


def read_all(
    texts: Iterable[Content],
    sae: SAEs = DEFAULT,
    *,
    model: str | Path | Model | None = None,
    layers: Iterable[int] | int | None = None,
    labels: Labels | None = None,
    top: int = TOP,
    promoted: int = PROMOTED,
    all_tokens: bool = False,
    sae_folder: str | Path | None = None,
    device: str | None = None,
    allow_other_model: bool = False,
    **options: Any,
) -> Iterator[Reading]:
    """Read texts one after the other, with the arguments of `read`. Model and SAEs open once."""
    if isinstance(texts, (str, torch.Tensor)):
        raise BadText("expected a sequence of texts, found a single one: `read` reads one")
    refs, saes = _saes(sae, layers)
    row, wanted = refs[0].row, [ref.layer for ref in refs]
    source = model if isinstance(model, nn.Module) else str(model or row.backbone.model_id)
    if isinstance(source, nn.Module):
        check_model(source, row)
    else:
        check_config(source, row)
    for ref in refs:
        if ref.layer not in saes:
            saes[ref.layer] = open_sae(ref, folder=sae_folder, device=device or "cpu")
    if isinstance(source, nn.Module):
        running = source
    else:
        running = open_model(source, up_to_layer=wanted[-1], device=device)
    check_backbone(running, row, allow_other_model=allow_other_model)
    has_end = not isinstance(source, nn.Module) or places_of(source).head is not None
    tokenizer = find_tokenizer(running, options.pop("tokenizer", None))
    vocabulary = Vocabulary(tokenizer)
    end = read_unembedding(source) if promoted and has_end else None
    lens = _Lens(saes, end, vocabulary, promoted)

    def one(text: Content) -> Reading:
        reading = read_layers(
            running,
            text,
            wanted,
            saes.__getitem__,
            group=row.short,
            vocabulary=vocabulary,
            labels=labels,
            all_tokens=all_tokens,
            tokenizer=tokenizer,
            **options,
        )
        strongest = [found.ref for n in wanted for found in reading.strongest(n, top=top)]
        return replace(reading, promoted=lens.of(strongest))

    return map(one, texts)


def read_layers(
    model: Model,
    text: Content,
    layers: Sequence[int],
    sae_of: Callable[[int], LayerSAE],
    *,
    group: str,
    vocabulary: Vocabulary,
    labels: Labels | None = None,
    all_tokens: bool = False,
    on_layer: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Reading:
    """Read a text with a model in memory; `sae_of(layer)` gives each SAE when its turn comes.

    `on_layer(done, count)` is called after each layer. `options` are those of `iter_captures`.
    """
    if isinstance(text, str) and not text.strip():
        raise BadText("there is no text to read: type some")
    if not layers:
        raise BadText("no layer is chosen: choose one or more")
    found = capture(model, [text], sorted(layers), **options)
    return as_reading(
        found.token_ids.tolist(),
        {layer: found.residuals[layer] for layer in sorted(layers)},
        {layer: found.extreme[layer] for layer in sorted(layers)},
        sae_of,
        text=found.texts[0],
        model=name_of_model(describe(model)),
        group=group,
        vocabulary=vocabulary,
        tokenizer=find_tokenizer(model, options.get("tokenizer")),
        labels=labels,
        all_tokens=all_tokens,
        truncated=found.truncated[0],
        on_layer=on_layer,
    )


def as_reading(
    token_ids: Sequence[int],
    residuals: Mapping[int, Tensor],
    extreme: Mapping[int, Tensor],
    sae_of: Callable[[int], LayerSAE],
    *,
    model: str,
    group: str,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    text: str | None = None,
    labels: Labels | None = None,
    all_tokens: bool = False,
    truncated: bool = False,
    on_layer: Callable[[int, int], None] | None = None,
) -> Reading:
    """The reading of tokens whose residuals are there: `[n_tokens, d_model]` per layer, and bool
    `[n_tokens]` for those of extreme norm."""
    codes = {}
    for done, (layer, x) in enumerate(residuals.items(), start=1):
        sae = sae_of(layer)
        codes[layer] = sae.encode_sparse(x.to(sae.W_dec.device)).detach().to("cpu", torch.float32)
        if on_layer is not None:
            on_layer(done, len(residuals))
    ids = tuple(token_ids)
    pieces = tuple(vocabulary.pieces(ids))
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(int(n) for n, token in added if token.special)}
    return Reading(
        text=text or "".join(piece.text for piece in pieces),
        model=model,
        group=group,
        token_ids=ids,
        pieces=pieces,
        codes=codes,
        extreme={layer: tuple(extreme[layer].tolist()) for layer in codes},
        special=tuple(token in special for token in ids),
        truncated=truncated,
        all_tokens=all_tokens,
        labels=labels,
    )


def _saes(
    sae: SAEs, layers: Iterable[int] | int | None
) -> tuple[tuple[LayerRef, ...], dict[int, LayerSAE]]:
    """The SAEs to read with, by layer, and those of them that are in memory."""
    if isinstance(sae, (str, LayerRef)):
        return saes_named(sae, layers), {}
    found: dict[LayerRef, LayerSAE] = {}
    for one in [sae] if isinstance(sae, nn.Module) else list(sae):
        if not isinstance(one, LayerSAE) or one.cfg.metadata.qwen_scope_ref is None:
            raise UnknownName(
                f"a {type(one).__name__} does not say which SAE it is: expected SAEs as load_sae()"
                " gives them, or the name of a group"
            )
        found[LayerRef.parse(one.cfg.metadata.qwen_scope_ref)] = one
    groups = {ref.group for ref in found}
    if len(groups) != 1:
        raise UnknownName(
            f"the SAEs are of {', '.join(sorted(groups)) or 'no group'}: expected SAEs of one group"
        )
    refs = tuple(sorted(found)) if layers is None else saes_named(groups.pop(), layers)
    if missing := [ref.layer for ref in refs if ref not in found]:
        raise UnknownName(
            f"no SAE was given for the layers {missing}: give it, or the name of the group"
        )
    return refs, {ref.layer: found[ref] for ref in refs}


@dataclass
class _Lens:
    """The promoted tokens of features, found once for each."""

    saes: Mapping[int, LayerSAE]
    end: Unembedding | None
    vocabulary: Vocabulary
    count: int
    known: dict[FeatureRef, tuple[str, ...]] = field(default_factory=dict)

    def of(self, refs: Sequence[FeatureRef]) -> dict[FeatureRef, tuple[str, ...]]:
        new = [ref for ref in refs if ref not in self.known]
        if self.end is None:
            return {}
        if new:
            rows = [self.saes[ref.layer].direction([ref.feature]) for ref in new]
            directions = torch.cat(rows).detach().float().cpu()
            size = len(self.vocabulary)
            effects = token_effects(directions, self.end, self.count, vocabulary=size)
            for ref, tokens in zip(new, effects.promoted.tolist(), strict=True):
                self.known[ref] = tuple(map(self.vocabulary.text, tokens))
        return {ref: self.known[ref] for ref in refs}
