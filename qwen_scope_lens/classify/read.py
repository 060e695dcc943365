"""Read texts that are not in a store: pooled codes, and the residuals for baselines.

The model runs here, with `models/residuals.py`. `stores/extract.py` fills stores instead, and
`predict.py` makes predictions over long files, which need far less than all codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.classify.pooled import LayerFacts, Pooled, Source, stack_layers
from qwen_scope_lens.models.architecture import Model
from qwen_scope_lens.models.residuals import Capture
from qwen_scope_lens.models.tokenize import Content
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.saes.load import open_sae
from qwen_scope_lens.stores.codec import stored_values
from qwen_scope_lens.stores.facts import sae_facts
from qwen_scope_lens.stores.manifest import Settings
from qwen_scope_lens.stores.reread import document_means, kept_rows

__all__ = ["Reader", "open_reader", "read_documents", "source_of"]


@dataclass(frozen=True)
class Reader:
    """A model and SAEs that read texts in the way that `source` describes."""

    model: Model
    saes: Mapping[int, LayerSAE]
    source: Source

    def captures(self, texts: Iterable[Content]) -> Iterator[Capture]:
        """Residuals of every layer in float32, batch by batch, in no promised order."""
        reading = self.source.reading
        return reading.captures(self.model, texts, list(self.saes), dtype=torch.float32)


def source_of(
    model: str, saes: Sequence[str], keep: bool = True, max_tokens: int | None = None
) -> Source:
    """The source for a reader of these SAEs, such as `mini-qwen3/w1k-l0-16/6`."""
    layers = []
    for name in saes:
        facts = sae_facts(LayerRef.parse(name))
        layers.append(LayerFacts(facts.ref, facts.d_sae, facts.k, facts.sha256))
    return Source(model, tuple(layers), keep, asdict(Settings(max_tokens)))


def open_reader(source: Source, model: Model | None = None) -> Reader:
    """Open the SAEs of `source` and, unless `model` is given, its model up to the last layer."""
    saes = {}
    for facts in source.layers:
        found = sae_facts(LayerRef.parse(facts.ref))
        here = LayerFacts(found.ref, found.d_sae, found.k, found.sha256)
        facts.check_same(here, "this machine")
        saes[facts.layer] = open_sae(facts.ref)
    return Reader(model or source.reading.open_model(), saes, source)


@torch.no_grad()
def read_documents(
    reader: Reader, texts: Sequence[Content], residuals: bool = False
) -> tuple[Pooled, dict[int, np.ndarray]]:
    """Document maxima of every feature and, if `residuals`, mean residuals by layer.

    Values are rounded as a store rounds them.
    """
    from scipy.sparse import csr_matrix

    parts: dict[int, list[tuple[np.ndarray, ...]]] = {layer: [] for layer in reader.saes}
    means = {
        layer: np.zeros((len(texts), sae.cfg.d_in), dtype=np.float32)
        for layer, sae in reader.saes.items()
    }
    tokens = np.zeros(len(texts), dtype=np.int64)
    for batch in _progress(reader.captures(texts), len(texts)):
        numbers = np.array(batch.doc_ids)
        tokens[numbers] = batch.offsets.diff().numpy()
        for layer, sae in reader.saes.items():
            x, doc = kept_rows(batch, layer, reader.source.keep)
            if residuals:
                means[layer][numbers] = document_means(x, doc, len(batch)).numpy()
            codes = sae.encode_sparse(x)
            active = codes.active
            key = (doc[:, None] * sae.cfg.d_sae + codes.indices)[active]
            unique, place = key.unique(return_inverse=True)
            largest = codes.values.new_zeros(len(unique))
            largest.scatter_reduce_(0, place, codes.values[active], "amax")
            rows = numbers[(unique // sae.cfg.d_sae).numpy()]
            values = stored_values(largest.numpy())
            parts[layer].append((rows, (unique % sae.cfg.d_sae).numpy(), values))
    blocks = []
    for layer, found in parts.items():
        rows, columns, values = (np.concatenate(part) for part in zip(*found, strict=True))
        shape = (len(texts), reader.saes[layer].cfg.d_sae)
        blocks.append(csr_matrix((values, (rows, columns)), shape=shape))
    return stack_layers(blocks, reader.source, tokens=tokens), means if residuals else {}


def _progress(batches: Iterator[Capture], total: int) -> Iterator[Capture]:
    from tqdm import tqdm

    with tqdm(total=total, unit="doc", desc="read", leave=False, disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
