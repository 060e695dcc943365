"""Feature stores for tests: planted codes without any model, or a few documents of a mini model.

All are real stores on disk, so that a test of what reads stores reads what users have.

    documents = [[{5: 2.0}, {5: 1.0, 7: 3.0}], [{9: 1.5}]]
    store = build_store(tmp_path / "store", documents, {"lang": ["a", "b"]})

Two documents of two tokens and one; feature 5 fires on both tokens of document 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qwen_scope_lens as qsl
from qwen_scope_lens.stores import (
    CodedDocument,
    CorpusFacts,
    FeatureStore,
    Manifest,
    ModelFacts,
    SAEFacts,
    Settings,
    TokenizerFacts,
    pack,
    write_shard,
)
from qwen_scope_lens.stores.manifest import join_label_types

GROUP, LAYER = "mini-qwen3/w1k-l0-16", 6

Tokens = Sequence[Mapping[int, float]] | qsl.SparseCodes
"""The codes of one document: a mapping of features to values for every token, or codes `[n]`."""


def codes_of(tokens: Tokens, d_sae: int = 1024, k: int = 16) -> qsl.SparseCodes:
    if isinstance(tokens, qsl.SparseCodes):
        return tokens
    dense = torch.zeros(len(tokens), d_sae)
    for row, features in enumerate(tokens):
        assert len(features) <= k
        for feature, value in features.items():
            dense[row, feature] = value
    return qsl.SparseCodes.from_dense(dense, k)


def build_store(
    folder: Path,
    documents: Sequence[Tokens | Mapping[int, Tokens]],
    labels: Mapping[str, Sequence[Any]] | None = None,
    *,
    texts: Sequence[str] | None = None,
    extreme: Iterable[tuple[int, int]] = (),
    group: str = GROUP,
    layers: Sequence[int] = (LAYER,),
    shard_docs: int = 16,
    only_shards: int | None = None,
    saes: Mapping[int, SAEFacts] | None = None,
) -> FeatureStore:
    """A store of planted codes. A document is the tokens of the only layer, or `{layer: tokens}`.

    Without `texts` a token is a word `w0 w1 ..`; with them, its characters are dealt out evenly.
    `extreme` names (document, position) pairs, in all layers. `only_shards` stops early, as a
    killed run does.
    """
    row = qsl.find_group(group)
    facts = dict(
        saes or {n: SAEFacts(f"{row.short}/{n}", row.d_sae, row.k, "0" * 64) for n in layers}
    )
    labels = labels or {}
    kinds: dict[str, str] = {}
    for name, values in labels.items():
        for value in values:
            if value is not None:
                kind = type(value).__name__
                kinds[name] = join_label_types(kinds.get(name, kind), kind)
    corpus = CorpusFacts(
        "planted", len(documents), "0" * 64, shard_docs=shard_docs, labels=tuple(kinds)
    )
    manifest = Manifest(
        model=ModelFacts("planted/model", None, "float32", row.d_model, "0" * 64),
        tokenizer=TokenizerFacts("planted", 1000, "0" * 64),
        saes=facts,
        settings=Settings(),
        labels=kinds,
        corpora=(corpus,),
        versions={"qwen-scope-lens": qsl.__version__},
    )
    folder.mkdir(parents=True, exist_ok=True)
    manifest.write(folder)
    marked = set(extreme)
    coded = []
    for number, document in enumerate(documents):
        by_layer = document if isinstance(document, Mapping) else dict.fromkeys(layers, document)
        codes = {n: codes_of(by_layer[n], facts[n].d_sae, facts[n].k) for n in layers}
        n = len(codes[layers[0]])
        text, spans = _words(n) if texts is None else (texts[number], _even(texts[number], n))
        flags = np.array([(number, i) in marked for i in range(n)])
        coded.append(
            CodedDocument(
                key=str(number),
                text=text,
                labels={name: values[number] for name, values in labels.items()},
                token_ids=np.arange(n),
                tokens=[text[a:b] for a, b in spans],
                spans=spans,
                truncated=False,
                codes={n: pack(codes[n]) for n in layers},
                extreme=dict.fromkeys(layers, flags),
            )
        )
    for shard in range(manifest.n_shards if only_shards is None else only_shards):
        first, end = corpus.span(shard)
        write_shard(folder, shard, manifest, coded[first:end])
    return FeatureStore.open(folder)


def store_of_dense(
    folder: Path,
    dense: Mapping[int, np.ndarray],
    lengths: Sequence[int],
    labels: Mapping[str, Sequence[Any]] | None = None,
    *,
    extreme: np.ndarray | None = None,
    k: int = 8,
    shard_docs: int = 16,
) -> FeatureStore:
    """A store of `{layer: [n_tokens, d_sae]}`, dealt out to documents of the lengths given.

    Every document has a text of its own. `extreme` marks tokens `[n_tokens]` that are to be left
    out, beside every first one.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    codes = {n: qsl.SparseCodes.from_dense(torch.from_numpy(x), k) for n, x in dense.items()}
    documents = [
        {n: x[start:end] for n, x in codes.items()}
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]
    marked = np.flatnonzero(np.zeros(0) if extreme is None else extreme)
    doc = np.searchsorted(offsets, marked, side="right") - 1
    return build_store(
        folder,
        documents,
        labels,
        texts=[f"document {number}" for number in range(len(lengths))],
        extreme=zip(doc.tolist(), (marked - offsets[doc]).tolist(), strict=True),
        layers=sorted(dense),
        shard_docs=shard_docs,
        saes={n: SAEFacts(f"{GROUP}/{n}", x.shape[1], k, "0" * 64) for n, x in dense.items()},
    )


def random_codes(
    seed: int, n_tokens: int, d_sae: int, k: int = 8, popular: float = 1.0
) -> np.ndarray:
    """At most k features per token, some far more common than others. `[n_tokens, d_sae]`"""
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=d_sae) ** popular
    dense = np.zeros((n_tokens, d_sae), np.float32)
    for row in dense:
        chosen = rng.choice(
            d_sae, size=rng.integers(1, k + 1), replace=False, p=weights / weights.sum()
        )
        row[chosen] = np.round(rng.gamma(2.0, size=len(chosen)) + 0.1, 2)  # rounded: ties
    return dense


def random_documents(
    n_docs: int,
    n_tokens: int = 12,
    plant: Callable[[int], Mapping[int, float]] = lambda doc: {},
    k: int = 16,
    d_sae: int = 1024,
    seed: int = 0,
) -> list[qsl.SparseCodes]:
    """Random codes; `plant(doc)` are features that fire on every token of that document."""
    rng = torch.Generator().manual_seed(seed)
    documents = []
    for doc in range(n_docs):
        fixed = plant(doc)
        noise = torch.rand(n_tokens, d_sae, generator=rng)
        noise[:, list(fixed)] = 0
        values, index = noise.topk(k - len(fixed), dim=-1)
        dense = torch.zeros(n_tokens, d_sae).scatter_(1, index, values + 0.1)
        for feature, value in fixed.items():
            dense[:, feature] = value
        documents.append(qsl.SparseCodes.from_dense(dense, k))
    return documents


def mini_store(
    folder: Path,
    n_docs: int = 24,
    layers: Sequence[int] = (LAYER,),
    model: str = "mini-qwen3",
    **options: Any,
) -> FeatureStore:
    """The first held-out documents (every language) through a mini model; labels lang, domain."""
    from qwen_scope_lens.mini import heldout
    from qwen_scope_lens.stores import extract

    records = [record for record, _ in zip(heldout(), range(n_docs), strict=False)]
    documents = [
        {"key": str(r["id"]), "text": r["text"], "lang": r["lang"], "domain": r["domain"]}
        for r in records
    ]
    group = f"{model}/w1k-l0-16"
    settings: dict[str, Any] = {"max_tokens": 64, "shard_docs": 8, "progress": False} | options
    return extract(documents, model=model, group=group, layers=layers, out=folder, **settings)


def _words(n: int) -> tuple[str, np.ndarray]:
    words = [f"w{i} " for i in range(n)]
    ends = np.cumsum([len(word) for word in words])
    return "".join(words), np.stack([ends - [len(word) for word in words], ends], axis=1)


def _even(text: str, n: int) -> np.ndarray:
    edges = np.linspace(0, len(text), n + 1).astype(np.int64)
    return np.stack([edges[:-1], edges[1:]], axis=1)
