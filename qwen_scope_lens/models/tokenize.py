"""Texts, chats and token ids become checked token sequences with character spans.

Nothing is ever put before the first token: Qwen has no BOS. This module knows tokenizers and
looks at a model only to see whether a tokenizer belongs to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from qwen_scope_lens.errors import BadText, WrongTokenizer
from qwen_scope_lens.models.architecture import describe, places_of, text_config, unwrap
from qwen_scope_lens.models.checkpoint import in_short, open_tokenizer

__all__ = ["Content", "Encoded", "check_tokenizer", "encode", "find_tokenizer", "is_ids"]

Content: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[int] | torch.Tensor
"""A text, a chat (messages with `role` and `content`), or token ids `[n]`."""

LEAST_SHARE = 0.9
"""A tokenizer with fewer ids than this share of the model's vocabulary belongs elsewhere.

The published Qwen3 and Qwen3.5 models have under 1% unused rows; Qwen3's tokenizer fills 61% of
Qwen3.5's vocabulary, so every one of its ids would pass as a token of the wrong text.
"""


@dataclass(frozen=True)
class Encoded:
    """One document, ready for a model."""

    ids: tuple[int, ...]
    text: str | None  # as tokenised: a chat after its template; None for token ids
    spans: tuple[tuple[int, int], ...] | None  # characters of `text` per token, [start, end)
    truncated: bool

    def __len__(self) -> int:
        return len(self.ids)


def find_tokenizer(model: Any, tokenizer: Any = None) -> Any:
    """The tokenizer given, the bridge's, or the one beside the model's local files; checked.

    Nothing is downloaded: a model from memory without local files needs `tokenizer=`.
    """
    if tokenizer is None:
        tokenizer = vars(model).get("_tokenizer")  # a TransformerBridge
    name = getattr(getattr(unwrap(model), "config", None), "_name_or_path", "")
    if tokenizer is None and name:
        try:
            tokenizer = open_tokenizer(name, local_files_only=True)
        except (OSError, WrongTokenizer):
            tokenizer = None
    if tokenizer is None:
        raise WrongTokenizer(f"no tokenizer is known for {describe(model)}: pass `tokenizer=`")
    check_tokenizer(tokenizer, model)
    return tokenizer


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Raise where the ids of a tokenizer cannot be those of the model."""
    places_of(model)
    vocabulary = int(text_config(model).vocab_size)
    known = len(tokenizer)
    if known > vocabulary:
        raise WrongTokenizer(
            f"the tokenizer makes ids up to {known - 1}, {describe(model)} embeds only"
            f" {vocabulary}: load the tokenizer of the same repository"
        )
    if known < LEAST_SHARE * vocabulary:
        raise WrongTokenizer(
            f"the tokenizer knows {known} ids, {describe(model)} embeds {vocabulary}: it belongs"
            " to another model (Qwen3's and Qwen3.5's differ). Load that of the same repository"
        )
    settings = (unwrap(model).config, text_config(model), _generation_config(model))
    special = set(getattr(tokenizer, "all_special_ids", ()))
    special |= set(getattr(tokenizer, "added_tokens_decoder", ()))
    for name in ("eos_token_id", "pad_token_id"):
        for config in settings:
            value = getattr(config, name, None)
            for token in value if isinstance(value, (list, tuple)) else [value]:
                if token is not None and token not in special:
                    raise WrongTokenizer(
                        f"{name} of {describe(model)} is {token}, which is no special token of"
                        " this tokenizer: they do not belong together"
                    )


def _generation_config(model: Any) -> Any:
    return getattr(unwrap(model), "generation_config", None)


def is_ids(document: Any) -> bool:
    """Whether a document is token ids already, so that no tokenizer is needed."""
    if isinstance(document, torch.Tensor):
        return document.ndim == 1 and not document.is_floating_point()
    return (
        isinstance(document, Sequence)
        and not isinstance(document, str)
        and all(isinstance(token, int) for token in document)
    )


def encode(
    documents: Sequence[Content],
    tokenizer: Any,
    *,
    limit: int,
    truncate: bool = False,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = False,
    first_number: int = 0,
) -> list[Encoded]:
    """Tokenise a list of documents, in one call of the tokenizer.

    `limit` is the most tokens of one document; a longer one raises, or loses its end when
    `truncate` says so. `first_number` is what the first document is called in messages.
    """
    texts: dict[int, str] = {}
    ready: dict[int, tuple[int, ...]] = {}
    for i, document in enumerate(documents):
        where = f"document {first_number + i}"
        if isinstance(document, str):
            texts[i] = document
        elif is_ids(document):
            ready[i] = tuple(int(token) for token in document)  # type: ignore[arg-type]
        elif isinstance(document, Sequence) and all(isinstance(m, Mapping) for m in document):
            texts[i] = _render(document, tokenizer, enable_thinking, add_generation_prompt, where)
        else:
            raise BadText(
                f"{where} is a {type(document).__name__}: expected a text, a list of chat messages"
                " (mappings with role and content) or token ids"
            )
    spans: dict[int, tuple[tuple[int, int], ...]] = {}
    for i, text in texts.items():
        _check_surrogates(text, f"document {first_number + i}")
    if texts:
        fast = bool(getattr(tokenizer, "is_fast", False))
        found = tokenizer(
            list(texts.values()),
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
            **({"return_offsets_mapping": True} if fast else {}),
        )
        for row, i in enumerate(texts):
            ready[i] = tuple(found["input_ids"][row])
            if fast:
                spans[i] = tuple((int(a), int(b)) for a, b in found["offset_mapping"][row])
    result = []
    for i in range(len(documents)):
        ids = ready[i]
        if not ids:
            raise BadText(f"document {first_number + i} is empty: there is no token to read")
        if len(ids) > limit and not truncate:
            raise BadText(
                f"document {first_number + i} has {len(ids)} tokens, the limit is {limit}: pass"
                " truncate=True to keep the beginning, or split it"
            )
        result.append(
            Encoded(
                ids=ids[:limit],
                text=texts.get(i),
                spans=spans[i][:limit] if i in spans else None,
                truncated=len(ids) > limit,
            )
        )
    return result


def _render(
    messages: Any, tokenizer: Any, enable_thinking: bool | None, add_prompt: bool, where: str
) -> str:
    """A chat as the text that the template makes of it."""
    if enable_thinking is None:
        raise BadText(
            f"{where} is a chat: say enable_thinking=True or False, the template changes the text"
            " with it and the default differs between Qwen models"
        )
    if not messages:
        raise BadText(f"{where} is empty: a chat without messages")
    if not getattr(tokenizer, "chat_template", None):
        raise WrongTokenizer(f"{where} is a chat, but this tokenizer has no chat template")
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_prompt,
                enable_thinking=enable_thinking,
            )
        )
    except Exception as error:  # a template is a program: it raises what it likes
        roles = ", ".join(f"{message.get('role')!r:.20}" for message in messages[:8])
        raise BadText(
            f"{where} is a chat with the roles {roles}, which the chat template of the tokenizer"
            f" does not take ({in_short(error)}): change the messages, or give the text itself"
        ) from error


def _check_surrogates(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadText(
            f"{where} has half of a surrogate pair at character {error.start}, which no tokenizer"
            " takes: remove it, or decode the text from its bytes again"
        ) from error
