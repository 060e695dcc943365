"""From a concept to features: candidates from labels, from what texts fire, from what features say.

`fusion.py` joins the columns of evidence into one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from qwen_scope_lens.address import FeatureRef, LayerRef, saes_named
from qwen_scope_lens.catalog import MINI_GROUPS, Group, find_group, lens_beside, name_of_model
from qwen_scope_lens.concepts.concept import COLUMNS, Column, Concept, columns_of
from qwen_scope_lens.concepts.evidence import (
    Floats,
    lifts,
    read_groups,
    readout,
    says,
    share_in_store,
    shares,
)
from qwen_scope_lens.concepts.fusion import by_place, combined, weights_of
from qwen_scope_lens.errors import (
    CheckpointMissing,
    HubUnreachable,
    StoreMismatch,
    UnknownName,
)
from qwen_scope_lens.features.token_effects import promoted_of
from qwen_scope_lens.files import write_json
from qwen_scope_lens.labels.embeddings import Embedder, by_meaning, embedded
from qwen_scope_lens.labels.packs import LabelPack
from qwen_scope_lens.labels.search import bm25
from qwen_scope_lens.models.architecture import Model, describe
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.models.jacobian import Lens, read_lens
from qwen_scope_lens.models.open import open_model
from qwen_scope_lens.models.residuals import Capture
from qwen_scope_lens.models.tokenize import find_tokenizer
from qwen_scope_lens.models.unembedding import read_unembedding
from qwen_scope_lens.saes.load import open_sae
from qwen_scope_lens.saes.locate import HubOptions, locate
from qwen_scope_lens.stores.facts import check_config, check_model
from qwen_scope_lens.tables import Table, View

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["COLUMNS", "Column", "Found", "FoundFeature", "find", "layers_of"]

FORMAT, VERSION = "qwen-scope-find", 1
DEFAULT = MINI_GROUPS[0].short

QUICK_FROM = 2 * 10**12
"""Multiplications of an exact encoding from which a CPU compares mean residuals by default: 1,500
tokens in five layers of 65,536 features and 4,096 dimensions."""
PAIRS: dict[Column, tuple[str, str]] = {
    "examples": ("examples", "neutral"),
    "words": ("words", "fillers"),
}
"""The groups of texts that a column compares."""
QUICK: dict[Column, str] = {
    "examples": "mean pre-activation on the examples minus that on the texts compared with,"
    " in standard deviations of the layer; --exact encodes every token",
    "words": "the same for sentences with the words and with other words",
}
MEANINGS: dict[Column, str] = {
    "examples": "share of all activation on the examples, minus that on the texts compared with",
    "labels": "BM25 of the label",
    "meaning": "cosine of the label's embedding with that of the words",
    "words": "share of all activation on sentences with the words, minus that with other words",
    "says": "how much the direction raises the concept's tokens, in standard deviations",
}


@dataclass(frozen=True)
class FoundFeature:
    """One feature with all that speaks for it; None where a column was not asked for."""

    ref: str
    score: float
    examples: float | None
    labels: float | None
    meaning: float | None
    words: float | None
    says: float | None
    places: dict[str, int]  # column -> the feature's place in it, where it has evidence
    on_examples: float | None  # the share of all activation, 0 to 1
    elsewhere: float | None
    promotes: tuple[str, ...]
    label: str


@dataclass(frozen=True, repr=False)
class Found(View):
    """The features that were found, best first."""

    concept: Concept
    rows: tuple[FoundFeature, ...]
    columns: tuple[Column, ...]
    searched: int  # features
    settings: dict[str, Any]

    @property
    def refs(self) -> tuple[FeatureRef, ...]:
        return tuple(FeatureRef.parse(row.ref) for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        write_json(Path(path), FORMAT, VERSION, self.to_dict())

    def table(self, most: int | None = None) -> Table:
        """The best features, with their evidence in every column that was asked for."""
        rows = self.rows if most is None else self.rows[:most]
        promotes = any(row.promotes for row in self.rows)
        labelled = any(row.label for row in self.rows)
        columns = ["feature", "score", *self.columns]
        columns += ["promotes"] * promotes + ["label"] * labelled
        cells = [
            [
                row.ref,
                row.score,
                *(getattr(row, column) for column in self.columns),
                *([" ".join(text.strip() for text in row.promotes)] if promotes else []),
                *([row.label] if labelled else []),
            ]
            for row in rows
        ]
        quick = self.settings.get("texts") == "mean residuals"
        meanings = MEANINGS | QUICK if quick else MEANINGS
        about = f"{self.concept.words!r} in {self.searched:,} features of {self.settings['sae']}"
        return Table.of(
            columns,
            cells,
            above=(f"{about}, layers {', '.join(map(str, self.settings['layers']))}", ""),
            below=("", *(f"{column}: {meanings[column]}" for column in self.columns)),
            more=len(self.rows) - len(rows),
            formats={
                "score": ".2f",
                "examples": "+.1f" if quick else "+.2%",
                "words": "+.1f" if quick else "+.2%",
                "says": "+.1f",
                "labels": ".1f",
                "meaning": ".2f",
            },
        )


def find(
    words: str,
    sae: str | LayerRef = DEFAULT,
    *,
    examples: Iterable[str] = (),
    against: Iterable[str] = (),
    labels: LabelPack | None = None,
    embedder: Embedder | None = None,
    store: FeatureStore | None = None,
    lens: Lens | Literal["logit"] | None = None,
    model: str | Path | Model | None = None,
    layers: Iterable[int] | int | None = None,
    columns: Sequence[Column] | None = None,
    top: int = 20,
    promoted: int = 5,
    sae_folder: str | Path | None = None,
    device: str | None = None,
    allow_other_model: bool = False,
    exact: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """The features of some layers that fit a concept, best first.

    Args:
        words: the concept's name, such as "polite refusals".
        sae: a group (with `layers`), or the address of one SAE. By default the toy group.
        examples: texts that have the concept; a handful of sentences helps more than all else.
        against: texts that lack it, in place of the bundled neutral texts.
        labels: what features mean.
        embedder: finds labels by meaning, beside BM25 (`labels.open_embedder`).
        store: a feature store, whose documents replace the neutral texts, too.
        lens: a Jacobian lens (`read_lens`) for what features say. By default the one that lies in
            the model's folder, as for the minis; "logit" reads without.
        model: a model in memory, or a name; by default the model that the SAEs were trained on.
        layers: by default every layer whose SAE is on this machine, or the middle one.
        columns: which evidence counts; by default all that the arguments allow. Without `examples`
            and `words` no text is read, and the model does not run.
        top, promoted: how many features are returned, and how many tokens each comes with.
        exact: whether all tokens of the texts are encoded, or only their mean residuals compared
            (`lifts`). By default that is so where encoding would take a CPU minutes.
        progress: called with the number of layers done and of all layers.
    """
    concept = Concept(words, tuple(examples), tuple(against))
    chosen = columns_of(columns, concept, labels is not None, embedder is not None)
    if embedder is not None and "meaning" in chosen:
        embedded(
            [embedder.query + concept.words], embedder
        )  # one that does not answer is known now
    refs = layers_of(sae, layers, sae_folder)
    row, numbers = refs[0].row, [ref.layer for ref in refs]
    if store is not None:
        _require_same(store, refs)
    source = model if isinstance(model, nn.Module) else str(model or row.backbone.model_id)
    if isinstance(source, nn.Module):
        check_model(source, row)
        check_backbone(source, row, allow_other_model=allow_other_model)
    else:
        check_config(source, row)
    reads = [column for column in ("examples", "words") if column in chosen]
    running: Any = source
    if not isinstance(source, nn.Module) and (reads or "says" in chosen or promoted):
        running = _opened(source, row, numbers[-1] if reads else 0, device, allow_other_model)
    tokenizer: Any = find_tokenizer(running) if isinstance(running, nn.Module) else None
    read = [
        group
        for column in reads
        for group in PAIRS[column]
        if group != "neutral" or store is None or concept.against
    ]
    captures, groups = (
        read_groups(running, concept, numbers, tokenizer, read) if reads else ([], [])
    )
    quick = _is_quick(exact, captures, refs, device, store is not None and not concept.against)
    if lens is None and (
        beside := lens_beside(describe(source) if isinstance(source, nn.Module) else source)
    ):
        lens = read_lens(beside, row.d_model)
    used = lens if isinstance(lens, Lens) else None
    end = read_unembedding(source) if promoted or "says" in chosen else None
    wanted = readout(concept, tokenizer, end) if "says" in chosen and end is not None else None
    evidence: dict[str, list[Floats]] = {}
    for number, ref in enumerate(refs):
        opened = open_sae(ref, folder=sae_folder, device=device or "cpu")
        if reads and quick:
            pairs = [PAIRS[column] for column in reads]
            for column, values in zip(
                reads, lifts(opened, ref.layer, captures, groups, pairs), strict=True
            ):
                evidence.setdefault(column, []).append(values)
        elif reads:
            fired = shares(opened, ref.layer, captures, groups)
            if "examples" in chosen:
                on = fired.share["examples"]
                other = (
                    fired.share["neutral"]
                    if store is None or concept.against
                    else share_in_store(store, ref.layer)
                )
                for name, values in (("examples", on - other), ("on", on), ("other", other)):
                    evidence.setdefault(name, []).append(values)
            if "words" in chosen:
                evidence.setdefault("words", []).append(fired.rise("words", "fillers"))
        if wanted is not None and end is not None:
            evidence.setdefault("says", []).append(says(opened, ref.layer, wanted, end, used))
        if progress is not None:
            progress(number + 1, len(refs))
    joined = {name: np.concatenate(parts) for name, parts in evidence.items()}
    if labels is not None and "labels" in chosen:
        joined["labels"] = by_place(bm25(labels, concept.words), refs)
    if labels is not None and embedder is not None and "meaning" in chosen:
        here = {ref: label for ref, label in labels.items() if ref.sae in refs}
        joined["meaning"] = by_place(by_meaning(here, concept.words, embedder), refs)
    score, places = combined({column: joined[column] for column in chosen})
    best = np.argsort(-score, kind="stable")[:top]
    best = best[score[best] > 0]
    d_sae = row.d_sae
    best_refs = [refs[at // d_sae].feature(int(at % d_sae)) for at in best.tolist()]
    tokens = (
        promoted_of(source, sae_folder, promoted, end=end, tokenizer=tokenizer)(best_refs)
        if promoted and best_refs
        else {}
    )

    def of(name: str, at: int) -> float | None:
        return float(joined[name][at]) if name in joined else None

    rows = tuple(
        FoundFeature(
            ref=str(ref),
            score=float(score[at]),
            examples=of("examples", at),
            labels=of("labels", at),
            meaning=of("meaning", at),
            words=of("words", at),
            says=of("says", at),
            places={name: int(order[at]) for name, order in places.items() if order[at]},
            on_examples=of("on", at),
            elsewhere=of("other", at),
            promotes=tokens.get(ref, ()),
            label=labels.text(ref) if labels is not None else "",
        )
        for ref, at in zip(best_refs, best.tolist(), strict=True)
    )
    settings = {
        "sae": row.short,
        "layers": numbers,
        "model": name_of_model(describe(source)) if isinstance(source, nn.Module) else source,
        "weights": weights_of(chosen),
        "lens": None if used is None else {"model": used.model, "prompts": used.prompts},
        "texts": "mean residuals" if quick else "every token",
        "compared_with": "against" if concept.against else "store" if store else "neutral texts",
    }
    return Found(concept, rows, chosen, len(score), settings)


def _is_quick(
    exact: bool | None,
    captures: Sequence[Capture],
    refs: Sequence[LayerRef],
    device: str | None,
    needs_exact: bool,
) -> bool:
    """Whether only the mean residuals of the texts are compared. A store has no residuals."""
    if exact is not None and needs_exact > exact:
        raise StoreMismatch(
            "a store has what features did, and no residuals: with it the texts have to be encoded"
            " exactly. Leave the store out, or give texts to compare with"
        )
    if exact is not None or needs_exact or (device or "cpu") != "cpu":
        return exact is False
    row, tokens = refs[0].row, sum(capture.n_tokens for capture in captures)
    return tokens * len(refs) * row.d_sae * row.d_model > QUICK_FROM


def layers_of(
    sae: str | LayerRef,
    layers: Iterable[int] | int | None = None,
    folder: str | Path | None = None,
) -> tuple[LayerRef, ...]:
    """The SAEs to search: those asked for, or all of the group that are on this machine.

    Where there are none here, it is the middle layer, which then comes from the hub.
    """
    if layers is not None or isinstance(sae, LayerRef):
        return saes_named(sae, layers)
    try:
        row = find_group(sae)
    except UnknownName:
        return saes_named(sae)
    here = []
    for layer in row.layers:
        ref = LayerRef(row.short, layer)
        try:
            locate(ref, folder, HubOptions(local_files_only=True))
        except (CheckpointMissing, HubUnreachable):
            continue
        here.append(ref)
    return tuple(here) or saes_named(sae)


def _require_same(store: FeatureStore, refs: Sequence[LayerRef]) -> None:
    for ref in refs:
        stored = str(store.sae(ref.layer).ref)
        if stored != str(ref):
            raise StoreMismatch(f"the store has codes of {stored}, and {ref} is searched")


def _opened(
    source: str, row: Group, last: int, device: str | None, allow_other_model: bool
) -> Model:
    running = open_model(source, up_to_layer=last, device=device)
    check_backbone(running, row, allow_other_model=allow_other_model)
    return running
