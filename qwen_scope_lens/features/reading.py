"""What fires on one text: as tables, as a heat map, as a page, and as JSON.

`read.py` makes readings. Every token is kept and shown. The strongest features of the text leave
out its first token and tokens of extreme norm, as all statistics here do, unless the reading was
made with `all_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadText, LayerOutOfRange
from qwen_scope_lens.files import json_text
from qwen_scope_lens.models.token_text import Piece
from qwen_scope_lens.pages import Page, Shaded, shaded_html
from qwen_scope_lens.saes.codes import SparseCodes
from qwen_scope_lens.tables import Table, View

__all__ = ["Firing", "Labels", "Reading", "page_of", "readings_json"]

FORMAT, VERSION = "qwen-scope-reading", 1
TOP, TOP_OF_TOKEN = 5, 3
FIRST, EXTREME, SPECIAL = "first token", "extreme norm", "special token"
FEW_PLACES = 4
"""How many places a note names."""


class Labels(Protocol):
    """What features mean, such as a `LabelPack`."""

    def text(self, ref: FeatureRef, /) -> str:
        """The words for a feature, or an empty text."""


@dataclass(frozen=True)
class Firing:
    """One feature on some tokens."""

    ref: FeatureRef
    value: float  # its largest activation
    token: int  # where that is: the position in the text
    tokens: int  # on how many of the tokens it fires
    label: str = ""
    promotes: tuple[str, ...] = ()  # tokens, the most promoted first


@dataclass(frozen=True, eq=False, repr=False)
class Reading(View):
    """A text through a model and SAEs of one group. Tensors are on the CPU."""

    text: str
    model: str
    group: str
    token_ids: tuple[int, ...]
    pieces: tuple[Piece, ...]  # the tokens as text; those that share a character are one piece
    codes: dict[int, SparseCodes]  # layer -> [n_tokens]
    extreme: dict[int, tuple[bool, ...]]  # layer -> for every token: is its norm extreme?
    special: tuple[bool, ...]  # for every token: is it one of the tokenizer's special tokens?
    truncated: bool = False
    all_tokens: bool = False
    labels: Labels | None = None
    promoted: Mapping[FeatureRef, tuple[str, ...]] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.codes)

    @cached_property
    def _ends(self) -> list[int]:
        return np.cumsum([piece.tokens for piece in self.pieces]).tolist()

    def tokens_of(self, piece: int) -> range:
        """The tokens that make up a piece."""
        return range(self._ends[piece] - self.pieces[piece].tokens, self._ends[piece])

    def piece_of(self, token: int) -> Piece:
        """The piece that a token belongs to."""
        return self.pieces[int(np.searchsorted(self._ends, token, side="right"))]

    def counted(self, layer: int) -> list[int]:
        """The tokens that count when the text's strongest features are chosen."""
        extreme = self.extreme[layer]
        return [i for i in range(len(extreme)) if self.all_tokens or (i > 0 and not extreme[i])]

    def strongest(
        self, layer: int, tokens: Sequence[int] | None = None, top: int | None = TOP
    ) -> list[Firing]:
        """The strongest features of a layer over some tokens, by default all that count.

        Each comes with its largest activation. `top=None` gives all features that fire.
        """
        if layer not in self.codes:
            raise LayerOutOfRange(
                f"layer {layer!r} was not read: this reading has {', '.join(map(str, self.layers))}"
            )
        if top is not None and top < 0:
            raise BadText(f"top={top}: expected a number of features, or None for all")
        rows = np.asarray(self.counted(layer) if tokens is None else list(tokens), dtype=np.int64)
        codes = self.codes[layer][rows.tolist()]
        at, entry = codes.active.numpy().nonzero()
        feature, value = codes.indices.numpy()[at, entry], codes.values.numpy()[at, entry]
        order = np.lexsort((at, -value, feature))
        names, first, counts = np.unique(feature[order], return_index=True, return_counts=True)
        best = order[first]
        chosen = np.lexsort((names, -value[best]))[:top].tolist()
        refs = [FeatureRef(self.group, layer, int(names[i])) for i in chosen]
        return [
            Firing(
                ref,
                float(value[best[i]]),
                int(rows[at[best[i]]]),
                int(counts[i]),
                self.labels.text(ref) if self.labels is not None else "",
                self.promoted.get(ref, ()),
            )
            for ref, i in zip(refs, chosen, strict=True)
        ]

    def _fired(self, layer: int) -> int:
        """How many features fire on the tokens that count."""
        codes = self.codes[layer][self.counted(layer)]
        return len(codes.indices[codes.active].unique())

    def track(self, ref: FeatureRef | str) -> list[float]:
        """What one feature does on every piece of the text. `[n_pieces]`"""
        ref = FeatureRef.parse(ref)
        if ref.group != self.group or ref.layer not in self.codes:
            raise LayerOutOfRange(
                f"{ref} was not read: this reading has {self.group}, layers"
                f" {', '.join(map(str, self.layers))}"
            )
        codes = self.codes[ref.layer]
        mine = (codes.indices.numpy() == ref.feature) & codes.active.numpy()
        values = np.where(mine, codes.values.numpy(), 0).sum(axis=-1)
        return [float(values[list(self.tokens_of(i))].max()) for i in range(len(self.pieces))]

    def notes(self, piece: int, layer: int | None = None) -> list[str]:
        """What is unusual about a piece, in one layer or in any."""
        layers = self.layers if layer is None else (layer,)
        tokens = self.tokens_of(piece)
        notes = {
            FIRST: 0 in tokens,
            EXTREME: any(self.extreme[n][t] for n in layers for t in tokens),
            SPECIAL: any(self.special[t] for t in tokens),
        }
        return [note for note, holds in notes.items() if holds]

    # As tables.

    @property
    def _heat_columns(self) -> tuple[str, ...]:
        """Activations of one layer are on one scale; those of several layers are not."""
        return ("activation",) if len(self.layers) == 1 else ()

    def table(self, most: int | None = None) -> Table:
        """The strongest features of the text; with `most` so many per layer."""
        found = [one for layer in self.layers for one in self.strongest(layer, top=most)]
        every = sum(map(self._fired, self.layers))
        columns = ["feature", "activation", "tokens", "strongest on"]
        columns += ["promotes"] if self.promoted else []
        columns += ["label"] if self.labels is not None else []
        cells = [
            {
                "feature": str(one.ref),
                "activation": one.value,
                "tokens": one.tokens,
                "strongest on": self.piece_of(one.token).text,
                "promotes": " ".join(text.strip() for text in one.promotes),
                "label": one.label,
            }
            for one in found
        ]
        return Table.of(
            columns,
            [[row[name] for name in columns] for row in cells],
            above=tuple(self.said()),
            more=every - len(found),
            formats={"activation": ".4g"},
            heat=self._heat_columns,
        )

    def tokens(self, top: int | None = TOP_OF_TOKEN) -> Table:
        """One row per token, layer and feature, for pandas; the first token and the like, too."""
        rows = []
        for i, piece in enumerate(self.pieces):
            at = self.tokens_of(i)
            for layer in self.layers:
                note = ", ".join(self.notes(i, layer))
                for one in self.strongest(layer, at, top):
                    where = (at.start, piece.text, note, layer)
                    rows.append((*where, one.ref.feature, one.value, one.label))
        columns = ("position", "token", "note", "layer", "feature", "activation", "label")
        return Table.of(columns, rows, formats={"activation": ".4g"}, heat=self._heat_columns)

    def by_token(self, top: int = TOP_OF_TOKEN) -> Table:
        """One row per token, with the strongest features of each layer and their activations."""
        rows = []
        for i, piece in enumerate(self.pieces):
            at = self.tokens_of(i)
            features = [
                ", ".join(
                    f"{one.ref.feature} ({one.value:.3g})" for one in self.strongest(layer, at, top)
                )
                for layer in self.layers
            ]
            rows.append((at.start, piece.text, *features, ", ".join(self.notes(i))))
        names = [f"layer {layer}" for layer in self.layers]
        return Table.of(("token", "text", *names, "note"), rows)

    def said(self) -> list[str]:
        """Which text, model and SAEs this is, and which tokens are special or do not count."""
        plural = "s" * (len(self.layers) > 1)
        length = f"{len(self.token_ids):,} tokens"
        if self.truncated:
            length = f"the first {length}; the text is longer"
        lines = [
            f"{self.group} on {self.model}, layer{plural} {', '.join(map(str, self.layers))}:"
            f" {length}"
        ]
        unusual = [f"the first token, {self._where(FIRST)}"]
        if where := self._where(EXTREME):
            unusual.append(f"tokens of extreme norm, {where}")
        counted = "counted, though statistics leave it out" if self.all_tokens else "not counted"
        lines.append(f"{counted}: {'; '.join(unusual)}")
        if where := self._where(SPECIAL):
            lines.append(f"special tokens: {where}")
        lines += [
            f"layer {layer}: no token counts, so no feature is shown for the text. Read a longer"
            " text, or count all tokens (--all-tokens, in Python all_tokens=True)"
            for layer in self.layers
            if not self.counted(layer)
        ]
        return lines

    def _where(self, note: str) -> str:
        """The first few pieces that a note is about; for extreme norms with their layers."""
        found = [i for i in range(len(self.pieces)) if note in self.notes(i)]
        places = []
        for i in found[:FEW_PLACES]:
            layers = [str(n) for n in self.layers if note in self.notes(i, n)]
            which = f" in layer {', '.join(layers)}" if note == EXTREME else ""
            places.append(f"{self.pieces[i].text!r} at {self.tokens_of(i).start}{which}")
        more = [f"{len(found) - FEW_PLACES} more"] if len(found) > FEW_PLACES else []
        return ", ".join([*places, *more])

    # As a heat map.

    def heat(self, layer: int, top: int = TOP) -> list[tuple[Firing, list[Shaded]]]:
        """Each of the strongest features with the text, its pieces shaded by the activation.

        Pieces that do not count have no shade.
        """
        counts = set(self.counted(layer))
        left_out = [counts.isdisjoint(self.tokens_of(i)) for i in range(len(self.pieces))]
        notes = [self.notes(i, layer) for i in range(len(self.pieces))]
        return [
            (
                one,
                [
                    Shaded(
                        piece.text,
                        None if out else value / one.value,
                        ", ".join([f"{value:.4g}", *note]),
                    )
                    for piece, value, out, note in zip(
                        self.pieces, self.track(one.ref), left_out, notes, strict=True
                    )
                ],
            )
            for one in self.strongest(layer, top=top)
        ]

    def _repr_html_(self) -> str:
        heat = [shaded_html(self._named_heat(layer, TOP)) for layer in self.layers]
        return "".join([self.table(TOP)._repr_html_(), *heat])

    def _named_heat(self, layer: int, top: int) -> list[tuple[str, list[Shaded]]]:
        return [
            (f"{one.ref}  {one.label}".rstrip(), pieces) for one, pieces in self.heat(layer, top)
        ]

    def page(self, top: int = TOP) -> Page:
        """The reading as a self-contained page."""
        return page_of([self], top)

    # As JSON.

    def to_dict(self, top: int = TOP) -> dict[str, Any]:
        """The reading as plain data: per token and per layer the `top` strongest features."""
        tokens = [
            {
                "position": self.tokens_of(i).start,
                "token_ids": [self.token_ids[t] for t in self.tokens_of(i)],
                "text": piece.text,
                "first": 0 in self.tokens_of(i),
                "special": any(self.special[t] for t in self.tokens_of(i)),
                "extreme_in_layers": [
                    layer
                    for layer in self.layers
                    if any(self.extreme[layer][t] for t in self.tokens_of(i))
                ],
                "features": {
                    str(layer): [
                        {"feature": one.ref.feature, "activation": one.value}
                        for one in self.strongest(layer, self.tokens_of(i), top)
                    ]
                    for layer in self.layers
                },
            }
            for i, piece in enumerate(self.pieces)
        ]
        features = [
            {
                "feature": str(one.ref),
                "activation": one.value,
                "tokens": one.tokens,
                "strongest_on": one.token,
                "label": one.label or None,
                "promotes": list(one.promotes),
            }
            for layer in self.layers
            for one in self.strongest(layer, top=top)
        ]
        return {
            "text": self.text,
            "truncated": self.truncated,
            "features": features,
            "tokens": tokens,
        }


def page_of(readings: Iterable[Reading], top: int = TOP) -> Page:
    """One page for some readings: the strongest features of each text, heat maps, every token."""
    page = Page("What fires on a text")
    for number, reading in enumerate(readings, start=1):
        page.heading(f"Text {number}").verbatim(reading.text)
        for line in reading.said():
            page.text(line, quiet=True)
        table = reading.table(top)
        page.table(table.columns, table.rows, table.formats, table.heat)
        for layer in reading.layers:
            page.heading(f"Layer {layer}: the text, shaded by its strongest features")
            page.shaded(reading._named_heat(layer, top))
        page.heading("Token by token")
        tokens = reading.by_token()
        page.table(tokens.columns, tokens.rows)
    return page


def readings_json(readings: Iterable[Reading], top: int = TOP) -> str:
    """Readings with one model and group as versioned JSON."""
    found = list(readings)
    facts: dict[str, Any] = {}
    if found:
        one = found[0]
        facts = {"model": one.model, "sae": one.group, "layers": list(one.layers)}
        facts["counted"] = "all tokens" if one.all_tokens else "all but first and extreme tokens"
    return json_text(FORMAT, VERSION, {**facts, "texts": [one.to_dict(top) for one in found]})
