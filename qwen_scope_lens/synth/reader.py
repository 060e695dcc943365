"""Candidates, and the reader that measures the strongest activation of every feature on a text.

The measurement proves that an example has the feature that it was written for. The model runs
unsteered, and first and extreme-norm tokens are left out, as in every statistic of the project.
The rows of candidates are what the output files hold; `pipeline.py` moves candidates along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import StoreMismatch, WrongModel
from qwen_scope_lens.models.architecture import (
    Model,
    context_length,
    d_model,
    decoder_layers,
    describe,
)
from qwen_scope_lens.models.residuals import EXTREME_NORM_RATIO, iter_captures
from qwen_scope_lens.models.tokenize import Content
from qwen_scope_lens.saes.codes import SparseCodes
from qwen_scope_lens.saes.layer_sae import LayerSAE

__all__ = ["KEPT", "VANILLA", "Candidate", "Reader", "Stage", "maxima"]

Stage = Literal["one", "pair", "again"]
"""`one`: written once. With pairs, `pair` looks for x+ and x-, and `again` shows both."""

KEPT = "kept"
VANILLA = "vanilla"


@dataclass
class Candidate:
    number: int  # over all candidates of the run, from 0
    ref: FeatureRef
    kind: str
    style: str  # vanilla, or the style in which a vanilla prompt was rewritten
    stage: Stage
    attempt: int  # the round of its feature, from 0
    sample: int  # its number within the round
    seed: int
    template: str
    prompt: str = ""
    reply: str = ""
    activation: float | None = None  # the maximum of its feature; None: not measured
    fires: Mapping[FeatureRef, float] = field(default_factory=dict)  # all target features that fire
    base: Candidate | None = None  # the vanilla prompt of a rewrite
    unusable: bool = False  # its prompt was not written or was filtered out: it is not rewritten
    outcome: str = ""  # kept, or why it was rejected; empty: not decided yet

    @property
    def open(self) -> bool:
        return not self.outcome

    def messages(self, chat: bool) -> list[dict[str, str]]:
        if not chat:
            return [{"role": "assistant", "content": self.prompt}]
        rows = [{"role": "user", "content": self.prompt}]
        return [*rows, {"role": "assistant", "content": self.reply}] if self.reply else rows

    def to_row(self, generator: str, chat: bool, verified: str) -> dict[str, Any]:
        """A row of the output. Every row has every field, because `datasets` needs that.

        `verified` says which words were read: the prompt, the reply, or either.
        """
        return {
            "messages": self.messages(chat),
            "target": str(self.ref),
            "activation": self.activation,
            "verified": verified,
            "kind": self.kind,
            "style": self.style,
            "stage": self.stage,
            "generator": generator,
            "template": self.template,
            "seed": self.seed,
            "candidate": self.number,
            "rewrite_of": None if self.base is None else self.base.number,
            "attempt": self.attempt,
            "outcome": self.outcome,
            "fires": [{"feature": str(ref), "activation": v} for ref, v in self.fires.items()],
        }


class Reader:
    """A model and the SAEs of the layers that are read."""

    def __init__(
        self,
        model: Model,
        saes: Mapping[LayerRef, LayerSAE],
        *,
        tokenizer: Any = None,
        max_tokens: int | None = None,
        keep: bool = True,
        extreme_norm_ratio: float = EXTREME_NORM_RATIO,
    ) -> None:
        layers = [ref.layer for ref in saes]
        if len(set(layers)) < len(layers):
            raise StoreMismatch(
                f"two SAEs of one layer: {', '.join(map(str, saes))}. Read with one at a time"
            )
        for ref in saes:
            if ref.row.d_model != d_model(model) or ref.layer >= len(decoder_layers(model)):
                raise WrongModel(
                    f"{ref} reads a residual of {ref.row.d_model} numbers after layer {ref.layer};"
                    f" {describe(model)} has {d_model(model)} and"
                    f" {len(decoder_layers(model))} layers"
                )
        self._model, self._saes, self._tokenizer = model, dict(saes), tokenizer
        self._max_tokens = max_tokens or context_length(model)
        self._keep, self._ratio = keep, extreme_norm_ratio

    @property
    def identity(self) -> str:
        """Changes with everything that changes the numbers; part of the key of measurements."""
        facts = [*sorted(map(str, self._saes)), describe(self._model), self._max_tokens, self._keep]
        if self._ratio != EXTREME_NORM_RATIO:  # runs of older versions have it unsaid
            facts.append(self._ratio)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def read(self, texts: Sequence[Content]) -> dict[LayerRef, csr_matrix]:
        """The maximum of every feature over the tokens of a text, one row per text.

        `-> {sae: [n, d_sae]}`. A chat goes through the chat template, without thinking.
        """
        layers = [ref.layer for ref in self._saes]
        parts: dict[LayerRef, list[tuple[int, csr_matrix]]] = {ref: [] for ref in self._saes}
        captures = iter_captures(
            self._model,
            texts,
            layers,
            tokenizer=self._tokenizer,
            max_tokens=self._max_tokens,
            truncate=True,
            enable_thinking=False,
            extreme_norm_ratio=self._ratio,
        )
        for read in captures:
            for ref, sae in self._saes.items():
                codes = sae.encode_sparse(read.residuals[ref.layer])
                if self._keep:
                    codes = codes.mask(read.keep(ref.layer))
                rows = maxima(codes, read.doc_rows().numpy(), len(read))
                parts[ref] += zip(read.doc_ids, rows, strict=True)
        return {ref: _in_order(found, ref.row.d_sae) for ref, found in parts.items()}

    def read_features(
        self, texts: Sequence[Content], refs: Iterable[FeatureRef]
    ) -> list[dict[FeatureRef, float]]:
        """Which of some features fire, and how strongly: one mapping per text."""
        wanted: dict[LayerRef, list[int]] = {}
        for ref in refs:
            wanted.setdefault(ref.sae, []).append(ref.feature)
        if missing := sorted(set(wanted) - set(self._saes)):
            raise StoreMismatch(f"no SAE was loaded for {missing[0]}, which has target features")
        found: list[dict[FeatureRef, float]] = [{} for _ in texts]
        if not len(texts):
            return found
        for sae, matrix in self.read(texts).items():
            features = np.array(wanted.get(sae, []), dtype=np.int64)
            part = matrix[:, features].tocoo()
            for row, column, value in zip(part.row, part.col, part.data, strict=True):
                found[row][sae.feature(int(features[column]))] = float(value)
        return found


def maxima(codes: SparseCodes, doc: np.ndarray[Any, Any], n_docs: int) -> csr_matrix:
    """The largest value of every feature in every document. `doc [n] -> [n_docs, d_sae]`"""
    values = codes.values.float().cpu().numpy()
    indices = codes.indices.cpu().numpy().astype(np.int64)
    active = values > 0
    rows = np.broadcast_to(doc[:, None], values.shape)[active]
    key = rows * codes.d_sae + indices[active]
    order = np.lexsort((-values[active], key))
    key, value = key[order], values[active][order]
    first = np.ones(len(key), dtype=bool)
    first[1:] = key[1:] != key[:-1]
    place = (key[first] // codes.d_sae, key[first] % codes.d_sae)
    return csr_matrix((value[first], place), shape=(n_docs, codes.d_sae))


def _in_order(found: list[tuple[int, csr_matrix]], d_sae: int) -> csr_matrix:
    from scipy.sparse import vstack

    if not found:
        return csr_matrix((0, d_sae), dtype=np.float32)
    return vstack([row for _, row in sorted(found, key=lambda one: one[0])], format="csr")
