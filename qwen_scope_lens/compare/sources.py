"""Open the stores, SAEs and texts that a user names, and compare them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.compare.align import align
from qwen_scope_lens.compare.fidelity import fidelity
from qwen_scope_lens.compare.match import Matching, match_activations, match_decoders
from qwen_scope_lens.compare.one import (
    Counterparts,
    counterparts_by_activation,
    counterparts_by_decoder,
)
from qwen_scope_lens.compare.sides import By, sides_of
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.saes.load import open_sae
from qwen_scope_lens.stores.reread import StoreReader

if TYPE_CHECKING:
    from qwen_scope_lens.stores.store import FeatureStore

__all__ = ["both_fvu", "match_one", "match_sources", "read_texts"]


def match_sources(
    a: str,
    b: str,
    *,
    layers: Sequence[int] | None = None,
    by: By | None = None,
    candidates: int = 8,
    fdr: float = 0.05,
    seed: int = 0,
) -> Matching:
    """Match two stores, or the SAEs at two addresses.

    By default decoders are compared if both SAEs belong to the same model, else activations.
    """
    from qwen_scope_lens.stores.store import FeatureStore

    refs, by = sides_of(a, b, layers, by)
    names = (str(refs[0]), str(refs[1]))
    if by == "decoder":
        from tqdm import tqdm

        x, y = (open_sae(ref).W_dec for ref in refs)
        with tqdm(unit="pair", unit_scale=True, desc="cosines", disable=None) as bar:
            return match_decoders(
                x, y, names, candidates=candidates, fdr=fdr, seed=seed, progress=bar.update
            )
    stores = FeatureStore.open(a), FeatureStore.open(b)
    common = align(stores[0], refs[0].layer, stores[1], refs[1].layer)
    return match_activations(
        common.a, common.b, names, doc=common.doc, candidates=candidates, fdr=fdr, seed=seed
    )


def match_one(
    a: str,
    feature: int,
    b: str,
    *,
    layers: Sequence[int] | None = None,
    by: By | None = None,
    candidates: int = 8,
    seed: int = 0,
) -> Counterparts:
    """The counterparts of one feature of A, which are found without matching all others."""
    from qwen_scope_lens.stores.store import FeatureStore

    refs, by = sides_of(a, b, layers, by)
    names = (str(refs[0]), str(refs[1]))
    if by == "decoder":
        x, y = (open_sae(ref).W_dec for ref in refs)
        return counterparts_by_decoder(x, feature, y, names, candidates=candidates, seed=seed)
    stores = FeatureStore.open(a), FeatureStore.open(b)
    common = align(stores[0], refs[0].layer, stores[1], refs[1].layer)
    return counterparts_by_activation(
        common.a, feature, common.b, names, doc=common.doc, candidates=candidates, seed=seed
    )


def both_fvu(
    base: FeatureStore, tuned: FeatureStore, layers: Sequence[int] | None, texts: int
) -> dict[int, tuple[float, float]]:
    """The unexplained variance of each layer in both models, on the first texts of the stores."""
    from qwen_scope_lens.compare.transfer import load_related

    wanted = list(layers) if layers is not None else [n for n in base.layers if n in tuned.layers]
    sample = [t for t in base.documents(["text"])["text"].to_pylist()[:texts] if t]
    saes = {layer: open_sae(base.sae(layer).ref) for layer in wanted}
    found = []
    for reading in (StoreReader.of(store, wanted) for store in (base, tuned)):
        model = load_related(reading.model, **reading.load_options)
        found.append(
            fidelity(
                model,
                saes,
                sample,
                losses=False,
                max_tokens=reading.settings.max_tokens,
                extreme_norm_ratio=reading.settings.extreme_norm_ratio,
            )
        )
    return {layer: (found[0][layer].fvu, found[1][layer].fvu) for layer in wanted}


def read_texts(path: str | Path, column: str | None, most: int) -> list[Any]:
    """Read the first documents of a corpus file."""
    from qwen_scope_lens.stores.corpus import read_corpus

    texts = [document.content for document in islice(read_corpus(path, column), most)]
    if not texts:
        raise TooLittleData(f"{path} has no document")
    return texts
