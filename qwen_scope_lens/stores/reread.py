"""Read documents again, or read other texts, in the way in which a store was made.

A store keeps sparse codes only. Whoever needs residuals, or codes of texts that are not in the
store, needs the same model (its revision and dtype), the same token limit and the same rule for
tokens of extreme norm. `StoreReader` holds all of that. Reading tokens is `models/residuals.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_scope_lens.errors import BadFile, StoreMismatch
from qwen_scope_lens.stores.manifest import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from qwen_scope_lens.models.residuals import Capture
    from qwen_scope_lens.models.tokenize import Content
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["StoreReader", "document_means", "kept_rows", "pooled_residuals"]


@dataclass(frozen=True)
class StoreReader:
    """The model and the settings with which a store's documents were read."""

    model: str
    layers: tuple[int, ...]
    settings: Settings = field(default_factory=Settings)
    dtype: str | None = None  # of the model's weights; None: as in the checkpoint
    revision: str | None = None  # of the model

    @classmethod
    def of(cls, store: FeatureStore, layers: Iterable[int] | None = None) -> StoreReader:
        """How a store was made, for all or some of its layers."""
        wanted = store.layers if layers is None else tuple(sorted(set(layers)))
        for layer in wanted:
            store.sae(layer)  # raises for a layer that was not stored
        made = store.manifest
        return cls(made.model.id, wanted, made.settings, made.model.dtype, made.model.revision)

    @property
    def load_options(self) -> dict[str, Any]:
        """What `open_model` needs beside the name, so that it loads the same weights."""
        import torch

        dtype = None if self.dtype is None else getattr(torch, self.dtype, None)
        if self.dtype is not None and not isinstance(dtype, torch.dtype):
            raise BadFile(f"{self.dtype!r:.60} is not a dtype of torch: the manifest was edited")
        # The weights of a quantised model may be stored as whole numbers: they stay as they are.
        if dtype is not None and not dtype.is_floating_point:
            dtype = None
        return {"dtype": dtype, "revision": self.revision}

    def open_model(self, **options: Any) -> PreTrainedModel:
        """The same model, read only as deep as the layers need. Options as of `load_model`."""
        options = {"up_to_layer": max(self.layers), **self.load_options, **options}
        from qwen_scope_lens.models.open import open_model

        return open_model(self.model, **options)

    def captures(
        self,
        model: nn.Module,
        texts: Iterable[Content],
        layers: Iterable[int] | None = None,
        **options: Any,
    ) -> Iterator[Capture]:
        """Run the model over some texts and yield their residuals, batch by batch.

        `layers` are by default those of this reading. Other options go to `iter_captures` and stand
        before the store's settings.
        """
        if self.settings.last_token:
            raise StoreMismatch(
                "the store holds the last token of each document only, and reading texts again"
                " gives all of their tokens: extract the documents without last_token"
            )
        from qwen_scope_lens.models.residuals import iter_captures

        wanted = self.layers if layers is None else layers
        settings = asdict(self.settings)
        del settings["last_token"]
        return iter_captures(model, texts, wanted, **{**settings, **options})

    def document_residuals(
        self,
        model: nn.Module,
        texts: Sequence[Content],
        *,
        last: bool = False,
        keep: bool = True,
        **options: Any,
    ) -> dict[int, np.ndarray[Any, Any]]:
        """`{layer: [n_docs, d_model]}`: the mean residual of each document's tokens, or its last.

        `keep` leaves out first and extreme-norm tokens (never the last one with `last`). A document
        without a kept token has a row of zeros, as it has no features. Options as of
        `iter_captures`.
        """
        import torch
        from tqdm import tqdm

        found: dict[int, np.ndarray[Any, Any]] = {}
        options = {"dtype": torch.float32, **options}
        with (
            torch.no_grad(),
            tqdm(total=len(texts), unit="doc", desc="residuals", leave=False, disable=None) as bar,
        ):
            for batch in self.captures(model, texts, **options):
                for layer in self.layers:
                    if last:
                        rows = batch.residuals[layer][batch.offsets[1:] - 1].cpu()
                    else:
                        rows = document_means(*kept_rows(batch, layer, keep), len(batch))
                    if layer not in found:
                        found[layer] = np.zeros((len(texts), rows.shape[1]), dtype=np.float32)
                    found[layer][list(batch.doc_ids)] = rows.numpy()
                bar.update(len(batch))
        return found


def kept_rows(batch: Capture, layer: int, keep: bool) -> tuple[Tensor, Tensor]:
    """The residuals of the tokens that count, and the place of each token's document in the batch.

    `-> [n, d_model], [n]`, both on the CPU.
    """
    x, doc = batch.residuals[layer], batch.doc_rows()
    if keep:
        rows = batch.keep(layer)
        x, doc = x[rows], doc[rows.cpu()]
    return x.cpu(), doc


def document_means(x: Tensor, doc: Tensor, n_docs: int) -> Tensor:
    """The mean row of each document; zeros where it has none. `[n, d], [n] -> [n_docs, d]`"""
    total = x.new_zeros((n_docs, x.shape[1])).index_add_(0, doc, x)
    return total / doc.bincount(minlength=n_docs).clamp_min(1)[:, None]


def pooled_residuals(
    store: FeatureStore,
    layers: Iterable[int] | None = None,
    model: nn.Module | None = None,
    *,
    last: bool = False,
    keep: bool = True,
    **options: Any,
) -> dict[int, np.ndarray[Any, Any]]:
    """The residuals of a store's documents: see `StoreReader.document_residuals`.

    The store's own model reads the store's own token ids. Another `model` reads the texts.
    """
    reading = StoreReader.of(store, layers)
    texts: list[Content]
    if model is None:
        model = reading.open_model()
        texts = [store.token_ids(doc).tolist() for doc in range(store.n_docs)]
    else:
        texts = store.documents(["text"])["text"].to_pylist()
    return reading.document_residuals(model, texts, last=last, keep=keep, **options)
