"""Read residual streams. All of the package reads them through this module.

`iter_captures` goes through a corpus of any length in bounded memory, and `capture` collects the
residuals of a small one. Documents are batched by length and padded on the right. They are never
packed into one row, because the linear attention of Qwen3.5 would carry information from one to the
next. The forward pass ends after the last wanted layer. This module only reads residuals; it
neither pools nor encodes them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qwen_scope_lens.errors import BadText, WrongModel
from qwen_scope_lens.models.architecture import (
    Model,
    check_layer,
    context_length,
    d_model,
    decoder_layers,
    describe,
    input_device,
    places_of,
    text_config,
    unwrap,
)
from qwen_scope_lens.models.checkpoint import Tokenizer
from qwen_scope_lens.models.eager import eagerly
from qwen_scope_lens.models.tokenize import (
    Content,
    Encoded,
    check_tokenizer,
    encode,
    find_tokenizer,
    is_ids,
)

__all__ = ["EXTREME_NORM_RATIO", "Capture", "capture", "extreme_tokens", "iter_captures"]

EXTREME_NORM_RATIO = 10.0
"""A token is extreme when its norm is more than this many times the median norm of its document
(without the first token). The default is our own. Attention sinks of Qwen models reach a hundred
times the median and more."""

_CPU_TOKENS, _WIDE = 256, 512
"""On a CPU, 256 tokens of a model of at least this width keep the matrix products busy. A larger
batch has more pads, and its activations do not stay in the cache."""


@dataclass(frozen=True)
class Capture:
    """The residuals of some documents, one row per token, one document after the other.

    `residuals[layer][offsets[i]:offsets[i + 1]]` are those of document `doc_ids[i]`. There are no
    pads.
    """

    layers: tuple[int, ...]
    residuals: dict[int, Tensor]  # layer -> [n_tokens, d_model]
    norms: dict[int, Tensor]  # layer -> [n_tokens], float32
    extreme: dict[int, Tensor]  # layer -> [n_tokens], bool: see EXTREME_NORM_RATIO
    first: Tensor  # [n_tokens], bool: the first token of its document
    token_ids: Tensor  # [n_tokens], int64, on the CPU
    offsets: Tensor  # [n_docs + 1], int64, on the CPU
    doc_ids: tuple[int, ...]  # the documents' positions in the input
    texts: tuple[str | None, ...]  # as tokenised; None for a document of token ids
    char_spans: tuple[tuple[tuple[int, int], ...] | None, ...]  # per document, per token
    truncated: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.doc_ids)

    @property
    def n_tokens(self) -> int:
        """The number of tokens of all documents."""
        return int(self.offsets[-1])

    def keep(self, layer: int) -> Tensor:
        """The tokens that count in statistics, neither first nor extreme. `[n_tokens]`, bool."""
        extreme = self.extreme[layer]
        return ~(self.first.to(extreme.device) | extreme)

    def doc_rows(self) -> Tensor:
        """For every token, its document's position in `doc_ids`. `[n_tokens]`, int64."""
        return torch.repeat_interleave(torch.arange(len(self)), self.offsets.diff())

    def last_tokens(self) -> Capture:
        """The last token of every document, and nothing else (copies, not views)."""
        rows = self.offsets[1:] - 1

        def of(parts: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: x[rows.to(x.device)] for layer, x in parts.items()}

        return replace(
            self,
            residuals=of(self.residuals),
            norms=of(self.norms),
            extreme=of(self.extreme),
            first=self.first[rows.to(self.first.device)],
            token_ids=self.token_ids[rows],
            offsets=torch.arange(len(self) + 1),
            char_spans=tuple(None if spans is None else spans[-1:] for spans in self.char_spans),
        )

    def doc(self, i: int) -> Capture:
        """The i-th document by itself, as views of the same tensors."""
        i = range(len(self))[i]
        rows = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return replace(
            self,
            residuals={layer: x[rows] for layer, x in self.residuals.items()},
            norms={layer: x[rows] for layer, x in self.norms.items()},
            extreme={layer: x[rows] for layer, x in self.extreme.items()},
            first=self.first[rows],
            token_ids=self.token_ids[rows],
            offsets=self.offsets[i : i + 2] - self.offsets[i],
            doc_ids=self.doc_ids[i : i + 1],
            texts=self.texts[i : i + 1],
            char_spans=self.char_spans[i : i + 1],
            truncated=self.truncated[i : i + 1],
        )


@torch.no_grad()
def capture(
    model: Model, texts: Sequence[Content], layers: Iterable[int], **options: Any
) -> Capture:
    """The residuals of all documents, in their order. It takes the options of `iter_captures`."""
    if isinstance(texts, (str, torch.Tensor)):
        raise BadText("expected a sequence of documents, found a single one: put it into a list")
    if len(texts) == 0:
        raise BadText("no documents were given")
    return _join(list(iter_captures(model, texts, layers, **options)))


def iter_captures(
    model: Model,
    texts: Iterable[Content],
    layers: Iterable[int],
    *,
    tokenizer: Tokenizer | None = None,
    token_budget: int = 4096,
    window: int = 512,
    max_tokens: int | None = None,
    truncate: bool = False,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = False,
    extreme_norm_ratio: float = EXTREME_NORM_RATIO,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Capture]:
    """Yield the residuals of a corpus batch by batch. Memory does not grow with the corpus.

    The model is an HF model of a supported class (it may be quantised, spread over devices, or have
    a PEFT adapter) or a TransformerBridge. Hooks and SAEs attached to a bridge act. `layers` count
    from 0: the residual is the output of that decoder layer, `blocks.L.hook_resid_post`.

    `window` documents are read ahead and sorted by length, so batches are not in the order of the
    texts: see `Capture.doc_ids`. A batch has at most `token_budget` tokens, pads included, unless a
    single text is longer; on a CPU, where more are not faster, it has at most 256 (of models whose
    d_model is 512 or more). When memory runs out, the batch is halved with a warning, and the
    budget stays halved.

    A document longer than `max_tokens` (by default the model's context) raises, unless `truncate`
    is set. A chat needs `enable_thinking`. Residuals keep the model's dtype and device unless
    `dtype` or `device` is given.
    """
    places_of(model)
    if unwrap(model).training:
        raise WrongModel(
            f"{describe(model)} is in training mode, where dropout may be active: call"
            " model.eval() first"
        )
    wanted = tuple(sorted({check_layer(model, layer) for layer in layers}))
    if not wanted:
        raise BadText("no layer was asked for: pass layers=[...]")
    if min(token_budget, window, max_tokens or 1) < 1:
        raise ValueError("token_budget, window and max_tokens must be positive")
    if tokenizer is not None:
        check_tokenizer(tokenizer, model)
    prepare = partial(
        encode,
        limit=min(context_length(model), max_tokens or context_length(model)),
        truncate=truncate,
        enable_thinking=enable_thinking,
        add_generation_prompt=add_generation_prompt,
    )
    if input_device(model).type == "cpu" and d_model(model) >= _WIDE:
        token_budget = min(token_budget, _CPU_TOKENS)
    finish = partial(_finish, ratio=extreme_norm_ratio, dtype=dtype, device=device)
    return _batches(model, iter(texts), wanted, tokenizer, token_budget, window, prepare, finish)


def _batches(
    model: Model,
    stream: Iterator[Content],
    wanted: tuple[int, ...],
    tokenizer: Tokenizer | None,
    budget: int,
    window: int,
    prepare: Callable[..., list[Encoded]],
    finish: Callable[..., Capture],
) -> Iterator[Capture]:
    """The loop of `iter_captures`, once the arguments are checked."""
    number = 0
    while documents := list(islice(stream, window)):
        if tokenizer is None and not all(map(is_ids, documents)):
            tokenizer = find_tokenizer(model)
        encoded = prepare(documents, tokenizer, first_number=number)
        # The longest come first, so a document that does not fit shows at once, not after hours.
        waiting = sorted(enumerate(encoded, start=number), key=lambda pair: -len(pair[1]))
        number += len(documents)
        while waiting:
            longest = len(waiting[0][1])
            count = max(1, budget // longest)
            batch = waiting[:count]
            try:
                read = [_forward(model, [document for _, document in batch], wanted)]
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                if len(batch) == 1:
                    error.add_note(
                        f"one document of {longest} tokens does not fit into memory: split it,"
                        " pass max_tokens with truncate=True, or load fewer layers"
                    )
                    raise
                read = []
            # Not inside the handler: the error would keep the failed run's tensors alive.
            if not read:
                budget = max(1, (len(batch) // 2) * longest)
                warnings.warn(
                    f"out of memory with {len(batch)} documents of up to {longest} tokens: going on"
                    f" with at most {budget} tokens per batch",
                    stacklevel=2,
                )
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            del waiting[: len(batch)]
            yield finish(wanted, batch, read.pop())  # nothing keeps them during the next run


class _EnoughLayers(Exception):
    """Ends a forward pass after the last wanted layer."""


@torch.no_grad()
def _forward(model: Model, batch: Sequence[Encoded], layers: tuple[int, ...]) -> dict[int, Tensor]:
    """Run layers 0..max(layers) on one padded batch. `-> {layer: [n_tokens, d_model]}`"""
    inner = unwrap(model)
    device = input_device(model)
    lengths = torch.tensor([len(document) for document in batch])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    pad = getattr(text_config(model), "pad_token_id", None) or 0
    ids = torch.full(mask.shape, pad)
    ids[mask] = torch.tensor([token for document in batch for token in document.ids])
    vocabulary = int(text_config(model).vocab_size)
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise BadText(
            f"there are token ids outside 0..{vocabulary - 1}, the vocabulary of {describe(model)}"
        )
    found: dict[int, Tensor] = {}
    mine = threading.get_ident()

    def read(layer: int, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != mine:
            return  # another thread's run of the same model
        found[layer] = output[0] if isinstance(output, tuple) else output
        if layer == layers[-1]:
            raise _EnoughLayers

    modules = decoder_layers(model)
    handles = [modules[layer].register_forward_hook(partial(read, layer)) for layer in layers]
    try:
        with eagerly():
            inner(input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False)
    except _EnoughLayers:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if missed := [layer for layer in layers if layer not in found]:
        raise WrongModel(
            f"{describe(model)} ran, but its layers {missed} were not seen: they run from a graph"
            " without our hooks. Pass the model as it was before it was compiled"
        )
    if bool(mask.all()):
        return {layer: x.flatten(0, 1) for layer, x in found.items()}
    return {layer: x[mask.to(x.device)] for layer, x in found.items()}


def _finish(
    layers: tuple[int, ...],
    batch: Sequence[tuple[int, Encoded]],
    residuals: dict[int, Tensor],
    *,
    ratio: float,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Capture:
    """Make a Capture of one batch, with norms and flags."""
    documents = [document for _, document in batch]
    lengths = [len(document) for document in documents]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    first = torch.zeros(int(offsets[-1]), dtype=torch.bool)
    first[offsets[:-1]] = True
    norms = {
        n: torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for n, x in residuals.items()
    }
    extreme = {n: extreme_tokens(x, lengths, ratio) for n, x in norms.items()}

    def place(tensor: Tensor) -> Tensor:
        return tensor if device is None else tensor.to(device)

    some = next(iter(residuals.values()))
    return Capture(
        layers=layers,
        residuals={n: place(x if dtype is None else x.to(dtype)) for n, x in residuals.items()},
        norms={n: place(x) for n, x in norms.items()},
        extreme={n: place(x) for n, x in extreme.items()},
        first=place(first.to(some.device)),
        token_ids=torch.tensor([token for document in documents for token in document.ids]),
        offsets=offsets,
        doc_ids=tuple(number for number, _ in batch),
        texts=tuple(document.text for document in documents),
        char_spans=tuple(document.spans for document in documents),
        truncated=tuple(document.truncated for document in documents),
    )


def extreme_tokens(norms: Tensor, lengths: list[int], ratio: float) -> Tensor:
    """Flag extreme tokens by the median of their own document, whatever the batch.

    The median leaves out the first token, unless it is the only one.
    """
    flags = []
    for rows in norms.split(lengths):
        median = (rows[1:] if len(rows) > 1 else rows).median()
        flags.append(rows > ratio * median)
    return torch.cat(flags)


def _join(parts: Sequence[Capture]) -> Capture:
    """Join several Captures into one, with the documents in the order of `doc_ids`."""
    docs = sorted((d for part in parts for d in map(part.doc, range(len(part)))), key=_number)
    layers = docs[0].layers
    lengths = torch.tensor([0, *(d.n_tokens for d in docs)])
    return Capture(
        layers=layers,
        residuals={n: torch.cat([d.residuals[n] for d in docs]) for n in layers},
        norms={n: torch.cat([d.norms[n] for d in docs]) for n in layers},
        extreme={n: torch.cat([d.extreme[n] for d in docs]) for n in layers},
        first=torch.cat([d.first for d in docs]),
        token_ids=torch.cat([d.token_ids for d in docs]),
        offsets=lengths.cumsum(0),
        doc_ids=tuple(d.doc_ids[0] for d in docs),
        texts=tuple(d.texts[0] for d in docs),
        char_spans=tuple(d.char_spans[0] for d in docs),
        truncated=tuple(d.truncated[0] for d in docs),
    )


def _number(document: Capture) -> int:
    return document.doc_ids[0]


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "DefaultCPUAllocator", "can't allocate")
    )
