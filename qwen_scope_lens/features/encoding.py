"""Residuals of a batch become packed codes of documents, with all SAEs loaded or one at a time.

Either every SAE stays in memory and a batch's residuals are gone once encoded, or (`sae_memory`)
the residuals of some shards are kept and the SAEs go over them one after the other. The codes are
the same, bit for bit: encoding looks at one token at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from qwen_scope_lens.features.corpus import Document
from qwen_scope_lens.features.packed import Packed, pack
from qwen_scope_lens.features.shards import CodedDocument
from qwen_scope_lens.models.capture import Capture

__all__ = ["Encoder", "Piece", "coded_documents"]


@dataclass
class Piece:
    """One batch: what was captured, without the residuals of layers that are encoded."""

    capture: Capture
    codes: dict[int, Packed]

    @property
    def residual_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.capture.residuals.values())


class Encoder:
    """The SAEs of some layers. With `room` (bytes of residuals that may wait) only one of them is
    in memory at a time."""

    def __init__(
        self, load: Callable[[int], Any], layers: Sequence[int], room: int | None = None
    ) -> None:
        self._load, self._layers, self._room = load, tuple(layers), room
        self._saes = {layer: load(layer) for layer in layers} if room is None else {}

    def read(self, capture: Capture) -> Piece:
        """A batch as it comes: encoded at once, or put aside (in main memory)."""
        if self._room is None:
            codes = {n: _encode(self._saes[n], capture.residuals[n]) for n in self._layers}
            return Piece(replace(capture, residuals={}), codes)
        return Piece(replace(capture, residuals={n: x.cpu() for n, x in _own(capture)}), {})

    def is_full(self, pieces: Sequence[Piece]) -> bool:
        """Whether what waits should be settled now."""
        if self._room is None:
            return True
        return sum(piece.residual_bytes for piece in pieces) * 2 > self._room

    def settle(self, pieces: Sequence[Piece]) -> None:
        """Encode what waits, layer by layer."""
        if self._room is None:
            return
        for layer in self._layers:
            sae = self._load(layer)
            for piece in pieces:
                residual = piece.capture.residuals.pop(layer)
                piece.codes[layer] = _encode(sae, residual)
            del sae


def _own(capture: Capture) -> list[tuple[int, Tensor]]:
    return list(capture.residuals.items())


def _encode(sae: Any, residual: Tensor) -> Packed:
    return pack(sae.encode_sparse(residual.to(sae.W_enc.device)))


def coded_documents(
    pieces: Sequence[Piece], documents: Sequence[Document], first: int, tokenizer: Any
) -> list[CodedDocument]:
    """The documents of one shard in order; `first` is the stream's number of `documents[0]`."""
    found: dict[int, CodedDocument] = {}
    for piece in pieces:
        capture = piece.capture
        ids = capture.token_ids.numpy()
        extreme = {layer: x.cpu().numpy() for layer, x in capture.extreme.items()}
        offsets = capture.offsets.tolist()
        for i, number in enumerate(capture.doc_ids):
            start, end = offsets[i], offsets[i + 1]
            document, text, spans = (
                documents[number - first],
                capture.texts[i],
                capture.char_spans[i],
            )
            found[number] = CodedDocument(
                key=document.key,
                text=text,
                labels=dict(document.labels),
                token_ids=ids[start:end],
                tokens=_strings(text, spans, ids[start:end], tokenizer),
                spans=None if spans is None else np.array(spans, dtype=np.int64).reshape(-1, 2),
                truncated=capture.truncated[i],
                codes={layer: codes.rows(start, end) for layer, codes in piece.codes.items()},
                extreme={layer: flags[start:end] for layer, flags in extreme.items()},
            )
    return [found[first + i] for i in range(len(documents))]


def _strings(text: str | None, spans: Any, ids: np.ndarray, tokenizer: Any) -> list[str]:
    """Each token's characters; a token that is part of a character shows the whole character."""
    if text is None or spans is None:
        return [tokenizer.decode([token]) for token in ids.tolist()]
    return [text[start:end] for start, end in spans]
