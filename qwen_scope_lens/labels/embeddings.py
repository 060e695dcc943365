"""Labels by meaning: embeddings of labels and words, so that "snow" finds "winter weather".

Any model that transformers opens from a folder will do, or an OpenAI-compatible endpoint for
embeddings. How the states of a text become one vector (`pooling`), and what has to stand before a
query, is written on a model's card; the default is their mean and nothing. Nothing is downloaded.
The vectors of labels are kept in blocks, each under the digest of its texts and of the model, so
that an interrupted run goes on and a changed pack costs only its changes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.catalog import bundled_model, home_folder
from qwen_scope_lens.errors import CheckpointMissing, GeneratorFailed, UnknownName
from qwen_scope_lens.files import read_text, whole_file
from qwen_scope_lens.labels.packs import Label
from qwen_scope_lens.writers.endpoint import Endpoint
from qwen_scope_lens.writers.generator import Completion, Request
from qwen_scope_lens.writers.masking import Mask
from qwen_scope_lens.writers.transport import Trouble

__all__ = [
    "POOLINGS",
    "Embedder",
    "EndpointEmbedder",
    "LocalEmbedder",
    "Pooling",
    "by_meaning",
    "cache_folder",
    "embedded",
    "open_embedder",
]

Floats = np.ndarray[Any, np.dtype[np.float32]]
Pooling = Literal["mean", "last", "first"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
BLOCK = 256
"""Texts whose vectors are kept in one file."""
AT_ONCE = 32
"""Texts in one forward pass, or in one request."""
MOST_TOKENS = 128
LEAST_CENTRED = 10
"""From so many different labels on, their mean is taken off: what all labels share says nothing."""


class Embedder(Protocol):
    @property
    def key(self) -> str:
        """What the vectors depend on besides the text."""

    @property
    def query(self) -> str:
        """What stands before the words that are looked for, and before no label."""

    def embed(self, texts: Sequence[str]) -> Floats:
        """`[len(texts), width]`, of any length"""


def open_embedder(
    spec: str, pooling: Pooling = "mean", query: str = "", **endpoint: Any
) -> LocalEmbedder | EndpointEmbedder:
    """`openai:URL#MODEL`, the folder of a model, or the name of a bundled one."""
    kind, _, rest = spec.partition(":")
    if kind == "openai":
        url, _, model = rest.partition("#")
        if not model:
            raise UnknownName(f"{spec!r:.80} does not name a model: expected openai:URL#MODEL")
        return EndpointEmbedder(_Vectors(url, model, **endpoint), query)
    place = bundled_model(spec) or Path(spec).expanduser()
    if not (place / "config.json").is_file():
        raise CheckpointMissing(
            f"{spec!r:.80} is not a model for embeddings: expected the folder of a model with its"
            " config.json, or openai:URL#MODEL. Nothing is downloaded here: `hf download NAME"
            " --local-dir FOLDER` makes such a folder"
        )
    return LocalEmbedder(place, pooling, query)


@dataclass
class LocalEmbedder:
    """A model that transformers opens from a folder; its last hidden states, pooled over a text."""

    folder: Path
    pooling: Pooling = "mean"
    query: str = ""
    _opened: tuple[Any, Any] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise UnknownName(f"pooling {self.pooling!r}: expected one of {', '.join(POOLINGS)}")

    @property
    def key(self) -> str:
        files = sorted(
            (path.name, path.stat().st_size)
            for path in self.folder.iterdir()
            if path.suffix in (".safetensors", ".bin", ".json")
        )
        config = read_text(self.folder / "config.json")
        return json.dumps([files, config, self.pooling, MOST_TOKENS])

    def embed(self, texts: Sequence[str]) -> Floats:
        import torch

        tokenizer, model = self._open()
        found = []
        with torch.no_grad():
            for start in range(0, len(texts), AT_ONCE):
                given = tokenizer(
                    list(texts[start : start + AT_ONCE]),
                    padding=True,
                    truncation=True,
                    max_length=MOST_TOKENS,
                    return_tensors="pt",
                )
                given.pop("token_type_ids", None)
                states = model(**given).last_hidden_state.float()
                mask = given["attention_mask"]
                found.append(_pooled(states, mask, self.pooling))
        vectors: Floats = torch.cat(found).numpy()
        return vectors

    def _open(self) -> tuple[Any, Any]:
        if self._opened is None:
            import transformers

            from qwen_scope_lens.models.checkpoint import open_config, open_tokenizer

            name, source = str(self.folder), {"local_files_only": True}
            open_config(name, **source)  # refuses what brings code of its own
            tokenizer: Any = open_tokenizer(name, **source)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            model = transformers.AutoModel.from_pretrained(name, trust_remote_code=False, **source)
            self._opened = tokenizer, model.eval()
        return self._opened


def _pooled(states: Any, mask: Any, pooling: Pooling) -> Any:
    """One vector per text, whichever side the pads are on. `[n, tokens, d] -> [n, d]`"""
    if pooling == "mean":
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    order = mask.flip(1) if pooling == "last" else mask
    place = order.argmax(1)  # the first token that is none of the pads, seen from that side
    if pooling == "last":
        place = mask.shape[1] - 1 - place
    return states[range(len(states)), place]


@dataclass
class EndpointEmbedder:
    """`POST {base_url}/embeddings`, with the tries, the pace and the masked key of `Endpoint`."""

    endpoint: _Vectors
    query: str = ""

    @property
    def key(self) -> str:
        return json.dumps([self.endpoint.base_url, self.endpoint.model])

    def embed(self, texts: Sequence[str]) -> Floats:
        groups = [tuple(texts[n : n + AT_ONCE]) for n in range(0, len(texts), AT_ONCE)]
        requests = [Request(tuple(("text", text) for text in some), "embed") for some in groups]
        book = _Kept()
        self.endpoint.generate(requests, book)
        rows: list[list[float]] = []
        for number, some in enumerate(groups):
            answer = book.answers.get(number)
            if answer is None or answer.error:
                what = answer.error if answer is not None else "no answer"
                raise GeneratorFailed(f"{self.endpoint.base_url} gave no embeddings: {what}")
            vectors = json.loads(answer.text)
            if len(vectors) != len(some):
                raise GeneratorFailed(
                    f"{self.endpoint.base_url} gave {len(vectors)} embeddings for {len(some)} texts"
                )
            rows += vectors
        if len({len(row) for row in rows}) > 1:
            raise GeneratorFailed(f"{self.endpoint.base_url} gave embeddings of several lengths")
        return np.array(rows, dtype=np.float32)


class _Kept:
    """Keeps the answers of one call; nothing limits them."""

    def __init__(self) -> None:
        self.answers: dict[int, Completion] = {}

    def start(self, number: int) -> bool:
        return True

    def finish(self, number: int, completion: Completion) -> None:
        self.answers[number] = completion

    def trouble(self, number: int, what: str, maybe_charged: bool) -> None:
        """The next try follows."""


class _Vectors(Endpoint):
    """An endpoint whose completions are lists of vectors, as JSON."""

    def _asked(self, request: Request) -> tuple[str, dict[str, Any]]:
        texts = [content for _, content in request.messages]
        return "embeddings", {"model": self.model, "input": texts, **self.body}

    def _read(self, content: bytes, request: Request, mask: Mask) -> Completion:
        try:
            rows = sorted(json.loads(content)["data"], key=lambda row: row["index"])
            vectors = [[float(x) for x in row["embedding"]] for row in rows]
            return Completion(json.dumps(vectors, allow_nan=False), "stop")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Trouble("an answer that is not in the form of the API", True) from None


def cache_folder(what: str) -> Path:
    """Where things are kept that can be made again: in QWEN_SCOPE_HOME, or the user's cache."""
    home = home_folder()
    if home is not None:
        return home / "cache" / what
    own = os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else Path.home() / ".cache") / "qwen-scope-lens" / what


def embedded(
    texts: Sequence[str],
    embedder: Embedder,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Floats:
    """Vectors of length one, from the cache where it has them. `[len(texts), width]`"""
    folder = folder or cache_folder("embeddings")
    own = hashlib.sha256(embedder.key.encode()).hexdigest()[:16]
    parts = []
    for start in range(0, len(texts), BLOCK):
        block = list(texts[start : start + BLOCK])
        name = hashlib.sha256(json.dumps(block).encode()).hexdigest()[:32]
        path = folder / own / f"{name}.npy"
        found = _read(path, len(block))
        if found is None:
            found = embedder.embed(block)
            with whole_file(path) as partial:
                np.save(partial, found.astype(np.float32), allow_pickle=False)
        parts.append(found)
        if progress is not None:
            progress(min(start + BLOCK, len(texts)), len(texts))
    rows = np.concatenate(parts)
    vectors: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return vectors


def _read(path: Path, rows: int) -> Floats | None:
    """A block of the cache; None where there is none, or it is damaged."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    good = found.ndim == 2 and len(found) == rows and found.dtype == np.float32
    return found if good and np.isfinite(found).all() else None


def by_meaning(
    labels: Mapping[FeatureRef, Label],
    query: str,
    embedder: Embedder,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[FeatureRef, float]:
    """The cosine of every label with the query where it is above 0, from -1 to 1.

    From ten different labels on their mean is taken off both: vectors of a language model have a
    large common part.
    """
    layers: dict[LayerRef, dict[str, None]] = {}  # a layer's blocks are the same in any choice
    for ref, label in labels.items():
        layers.setdefault(ref.sae, {})[label.text] = None
    if not layers:
        return {}
    texts = [text for some in layers.values() for text in some]
    vectors = np.concatenate(
        [embedded(list(some), embedder, folder, progress) for some in layers.values()]
    )
    [wanted] = embedded([embedder.query + query], embedder, folder)
    if len(set(texts)) >= LEAST_CENTRED:
        mean = vectors.mean(0)
        vectors, wanted = vectors - mean, wanted - mean
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(wanted)
    cosines = dict(
        zip(texts, (vectors @ wanted / np.maximum(lengths, 1e-12)).tolist(), strict=True)
    )
    return {ref: cosines[label.text] for ref, label in labels.items() if cosines[label.text] > 0}
