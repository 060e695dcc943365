"""What `qsl dash build` and `qsl dash export` do: from the name of a store to a folder of pages."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import bundled_model
from qwen_scope_lens.errors import ScopeError, StoreMismatch, WrongTokenizer
from qwen_scope_lens.features.document_sets import label_text
from qwen_scope_lens.labels.packs import LabelPack
from qwen_scope_lens.models.architecture import Model
from qwen_scope_lens.models.checkpoint import Tokenizer, open_tokenizer
from qwen_scope_lens.models.token_text import Vocabulary
from qwen_scope_lens.models.unembedding import Unembedding, read_unembedding
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.saes.load import open_sae
from qwen_scope_lens.site.earlier import EarlierSite
from qwen_scope_lens.site.layer import LayerPages, Settings, gather
from qwen_scope_lens.site.neuronpedia import Release, write_neuronpedia
from qwen_scope_lens.site.static import DocumentTexts, check_target, write_site
from qwen_scope_lens.stores.extract import extract
from qwen_scope_lens.stores.facts import sae_facts, tokenizer_facts
from qwen_scope_lens.stores.store import FeatureStore
from qwen_scope_lens.version import __version__

__all__ = ["Sources", "build_neuronpedia", "build_site", "document_heads", "site_of_documents"]


@dataclass(frozen=True)
class Sources:
    """What pages are made from. `model=None` takes the store's own model; `tokens=False` does not
    read the model's unembedding, and then pages have no promoted tokens. `texts=False` leaves the
    documents' full texts out of a site."""

    store: FeatureStore
    layers: tuple[int, ...]
    model: str | None = None
    sae_folder: Path | None = None
    labels: LabelPack | None = None
    tokens: bool = True
    texts: bool = True
    settings: Settings = field(default_factory=Settings)

    @property
    def model_name(self) -> str:
        return self.model or self.store.manifest.model.id

    @property
    def refs(self) -> set[str]:
        """The addresses of the layers."""
        return {self.store.sae(layer).ref for layer in self.layers}

    def pages(self, progress: bool = False) -> Iterator[LayerPages]:
        """The pages of one layer after the other; only one layer is in memory at a time."""
        vocabulary = Vocabulary(self._tokenizer())
        out = self._unembedding() if self.tokens else None
        self.check_labels()
        for layer in self.layers:
            yield gather(
                self.store,
                layer,
                vocabulary,
                out,
                sae=self._sae(layer),
                labels=self.labels,
                settings=self.settings,
                others=self._beside(layer),
                progress=progress,
            )

    def _beside(self, layer: int) -> Iterator[tuple[LayerRef, torch.Tensor]]:
        """The directions of the layers before and after this one, among the layers asked for."""
        order = sorted(self.layers)
        place = order.index(layer)
        for other in [*order[max(0, place - 1) : place], *order[place + 1 : place + 2]]:
            yield LayerRef.parse(self.store.sae(other).ref), self._sae(other).W_dec.detach()

    def _tokenizer(self) -> Tokenizer:
        name = str(bundled_model(self.model_name) or self.model_name)
        try:
            tokenizer = open_tokenizer(name)
        except (OSError, ValueError) as error:
            raise WrongTokenizer(
                f"no tokenizer for {name}: --model names the folder or repository of the model"
                " that the store was made with"
            ) from error
        if tokenizer_facts(tokenizer).sha256 != self.store.manifest.tokenizer.sha256:
            raise StoreMismatch(
                f"the tokenizer of {name} is not the one that the store was made with"
                f" ({self.store.manifest.tokenizer.name}): --model names the model that"
                " `qsl extract` used"
            )
        return tokenizer

    def _sae(self, layer: int) -> LayerSAE:
        facts = self.store.sae(layer)
        here = sae_facts(LayerRef.parse(facts.ref), self.sae_folder, facts.revision)
        if here.sha256 != facts.sha256:
            raise StoreMismatch(
                f"the file of {facts.ref} is another than the one that the store was made with:"
                " --sae-folder names the folder that `qsl extract` used"
            )
        return open_sae(facts.ref, folder=self.sae_folder, revision=facts.revision)

    def _unembedding(self) -> Unembedding:
        revision = None if self.model else self.store.manifest.model.revision
        try:
            return read_unembedding(self.model_name, revision=revision)
        except ScopeError as error:
            raise type(error)(
                f"{error}. Promoted tokens need the model's last layer: --model names it, and"
                " --no-tokens makes pages without them"
            ) from error

    def check_labels(self) -> None:
        """Raise when all labels are of other SAEs; warn when they are of other layers only."""
        if self.labels is None:
            return
        here = self.refs
        theirs = {str(ref) for ref in self.labels.saes}
        if here & theirs:
            return
        said = (
            f"the labels are of {', '.join(sorted(theirs))}, the pages are of"
            f" {', '.join(sorted(here))}: no feature has a label"
        )
        if not {ref.rsplit("/", 1)[0] for ref in here} & {ref.group for ref in self.labels.saes}:
            raise StoreMismatch(said)
        warnings.warn(said, stacklevel=2)


def build_site(
    sources: Sources,
    out: Path,
    *,
    title: str | None = None,
    replace_all: bool = False,
    progress: bool = False,
) -> Path:
    """Write all layers into one site.

    Layers that an earlier build wrote into `out` stay, and so do the labels of those that are built
    again; a new label of the same feature wins. `replace_all` drops everything that was there.
    """
    check_target(out)
    store, model = sources.store, Path(sources.model_name).name
    earlier = None if replace_all else EarlierSite.read(out)
    if earlier is not None:
        earlier.check_model(model)
        sources.check_labels()
        old = earlier.labels(sources.refs)
        if old:
            sources = replace(sources, labels=LabelPack.merge([sources.labels or LabelPack(), old]))
    made = (
        f"Made by qwen-scope-lens {__version__} from {store.n_docs:,} documents"
        f" ({store.n_tokens:,} tokens) of {', '.join(c.name for c in store.manifest.corpora)},"
        f" read with {sources.model_name}. First tokens and tokens of extreme norm are left out of"
        " every figure."
    )
    return write_site(
        out,
        sources.pages(progress),
        model=model,
        made=made,
        title=title,
        documents=document_heads(store),
        texts=document_texts(store) if sources.texts else None,
        earlier=earlier,
        progress=progress,
    )


def site_of_documents(
    documents: Sequence[Mapping[str, Any]],
    model: str | Path | Model,
    group: str,
    layers: Sequence[int],
    out: Path,
) -> Path:
    """Make a site from a few documents. The store in between is not kept."""
    with tempfile.TemporaryDirectory(prefix="qsl-store-") as folder:
        store = extract(
            documents,
            model=model,
            group=group,
            layers=layers,
            out=Path(folder) / "store",
            max_tokens=64,
            progress=False,
        )
        return build_site(Sources(store, tuple(layers)), out)


def build_neuronpedia(
    sources: Sources, out: Path, release: Release | None = None, *, progress: bool = False
) -> Path:
    """Write the features of all layers in the layout that Neuronpedia imports.

    It is written whole or not at all; the path returned is `out`. `release=None` takes
    the defaults of `Release`.
    """
    store = sources.store
    return write_neuronpedia(
        out,
        sources.pages(progress),
        release,
        n_prompts=store.n_docs,
        prompt_tokens=store.manifest.settings.max_tokens,
        progress=progress,
    )


def document_texts(store: FeatureStore) -> DocumentTexts:
    """The texts of all documents as the store holds them."""
    hashes = "".join(corpus.sha256 for corpus in store.manifest.corpora)
    texts = store.documents(["text"])["text"].to_pylist()
    return DocumentTexts(hashlib.sha256(hashes.encode()).hexdigest()[:12], texts)


def document_heads(store: FeatureStore) -> Sequence[tuple[str, list[tuple[str, str]]]]:
    """Key and labels of every document, as pages show them."""
    names = store.label_names
    table = store.documents(["key", *names])
    keys = [str(key) for key in table["key"].to_pylist()]
    columns = [table[name].to_pylist() for name in names]
    heads = []
    for key, *values in zip(keys, *columns, strict=True):
        texts = [(name, label_text(value)) for name, value in zip(names, values, strict=True)]
        heads.append((key, [(name, text[:60]) for name, text in texts if text is not None]))
    return heads
