"""What the app works with: one model, its SAEs, and the questions that are asked about them.

The model is shared by all sessions and one of them runs at a time (`lock`): hooks of a plan belong
to the model, so two runs at once would steer each other. What a session chose is never kept here.

The score of a feature is |rate in A - rate in B|. A rate is the share of a text's kept positions on
which the feature fires. For two texts this is a first look; `qsl rank` compares groups, with
controls.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.catalog import Group
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.features.read import read_layers
from qwen_scope_lens.features.reading import Reading
from qwen_scope_lens.features.token_effects import TokenEffects, token_effects
from qwen_scope_lens.labels.packs import LabelPack
from qwen_scope_lens.models.token_text import Vocabulary
from qwen_scope_lens.models.unembedding import Unembedding, read_unembedding
from qwen_scope_lens.models.verify import sample_texts
from qwen_scope_lens.saes.load import load_sae
from qwen_scope_lens.saes.sae import ScopeSAE
from qwen_scope_lens.steering.calibrate import calibrate
from qwen_scope_lens.steering.plan import Plan

__all__ = ["Difference", "Kept", "Workbench", "compare"]

OnLayer = Callable[[int, int], None]


@dataclass(eq=False)
class Workbench:
    """A model in memory with the SAEs of one group."""

    model: Any  # a ScopeBridge
    group: Group
    labels: LabelPack = field(default_factory=LabelPack)
    sae_folder: Any = None
    most_saes: int = 8  # in memory; the one used longest ago goes
    lock: threading.Lock = field(default_factory=threading.Lock)
    _loading: threading.Lock = field(default_factory=threading.Lock)
    _saes: OrderedDict[int, ScopeSAE] = field(default_factory=OrderedDict)
    _typical: dict[str, float] = field(default_factory=dict)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.model.tokenizer)

    @cached_property
    def _end(self) -> Unembedding:
        return read_unembedding(self.model)

    @property
    def has_chat(self) -> bool:
        return bool(getattr(self.model.tokenizer, "chat_template", None))

    def ref(self, layer: int, feature: int) -> FeatureRef:
        return LayerRef(self.group.short, layer).feature(feature)

    def sae(self, layer: int) -> ScopeSAE:
        with self._loading:
            if layer not in self._saes:
                ref = LayerRef(self.group.short, layer)
                self._saes[layer] = load_sae(ref, folder=self.sae_folder)
            self._saes.move_to_end(layer)
            while len(self._saes) > self.most_saes:
                self._saes.popitem(last=False)
            return self._saes[layer]

    def saes_of(self, plan: Plan) -> dict[str, ScopeSAE]:
        return {f"{self.group.short}/{layer}": self.sae(layer) for layer in plan.layers}

    def read(self, text: str, layers: Sequence[int], on_layer: OnLayer | None = None) -> Reading:
        """What fires on every token of a text, in every layer of `layers`."""
        with self.lock:
            return read_layers(
                self.model,
                text,
                layers,
                self.sae,
                group=self.group.short,
                vocabulary=self.vocabulary,
                labels=self.labels,
                all_tokens=True,
                on_layer=on_layer,
            )

    def effects(self, ref: FeatureRef, count: int = 10) -> TokenEffects:
        """The tokens that a feature promotes and suppresses."""
        direction = self.sae(ref.layer).direction([ref.feature])
        return token_effects(direction, self._end, count, vocabulary=len(self.vocabulary))

    def calibrated(self, plan: Plan) -> Plan:
        """With typical activations from a bundled sample of texts, where strengths need them."""
        missing = [
            edit.ref
            for edit in plan.edits
            if edit.unit == "typical"
            and edit.typical is None
            and str(edit.ref) not in self._typical
        ]
        if missing:
            saes = {f"{self.group.short}/{ref.layer}": self.sae(ref.layer) for ref in missing}
            with self.lock:
                found = calibrate(self.model, missing, sample_texts(), saes, truncate=True)
            self._typical |= dict(found)
            if silent := [str(ref) for ref in missing if str(ref) not in self._typical]:
                raise TooLittleData(
                    f"{', '.join(silent)} fires on none of the sample texts, so nothing is known of"
                    " its typical activation: give the strength as raw or norm"
                )
        return plan.calibrated(self._typical)


@dataclass(frozen=True)
class Kept:
    """Which positions are left out: by default the first token, which the official demo keeps."""

    drop_first: bool = True
    drop_shared_tokens: bool = False  # tokens that occur in both texts
    drop_shared_prefix: bool = False

    def positions(self, own: Reading, other: Reading) -> np.ndarray:
        """bool `[n_tokens]` of `own`."""
        ids = np.array(own.token_ids)
        keep = np.ones(len(ids), dtype=bool)
        if self.drop_first:
            keep[0] = False
        if self.drop_shared_tokens:
            keep &= ~np.isin(ids, other.token_ids)
        if self.drop_shared_prefix:
            n = min(len(ids), len(other.token_ids))
            same = ids[:n] == np.array(other.token_ids[:n])
            keep[: n if same.all() else int(same.argmin())] = False
        return keep


@dataclass(frozen=True)
class Difference:
    """One feature in both texts."""

    ref: FeatureRef
    score: float
    rate_a: float
    rate_b: float
    mean: float  # where it fires, over both texts
    label: str


def compare(
    bench: Workbench, a: Reading, b: Reading, top: int = 5, kept: Kept | None = None
) -> list[Difference]:
    """The `top` features of every layer, the largest score first."""
    kept = kept or Kept()
    keep_a, keep_b = kept.positions(a, b), kept.positions(b, a)
    for name, keep in (("A", keep_a), ("B", keep_b)):
        if not keep.any():
            raise TooLittleData(
                f"no token of text {name} is left to compare: leave out fewer of them, or use"
                " longer texts"
            )
    found: list[Difference] = []
    for layer in a.codes:
        d_sae = a.codes[layer].d_sae
        rates, sums, counts = [], np.zeros(d_sae), np.zeros(d_sae)
        for reading, keep in ((a, keep_a), (b, keep_b)):
            codes = reading.codes[layer][keep.nonzero()[0].tolist()]
            active = codes.active.numpy()
            index = codes.indices.numpy()[active]
            fired = np.bincount(index, minlength=d_sae)
            rates.append(fired / keep.sum())
            counts += fired
            sums += np.bincount(index, codes.values.numpy()[active], d_sae)
        score = np.abs(rates[0] - rates[1])
        for feature in np.lexsort((np.arange(len(score)), -score))[:top].tolist():
            if score[feature] == 0:
                break
            ref = bench.ref(layer, feature)
            found.append(
                Difference(
                    ref,
                    float(score[feature]),
                    float(rates[0][feature]),
                    float(rates[1][feature]),
                    float(sums[feature] / counts[feature]),
                    bench.labels.text(ref),
                )
            )
    return sorted(found, key=lambda row: (-row.score, row.ref))
