"""Turn texts, chats and token ids into checked token sequences with character spans.

Nothing is put before the first token, because Qwen has no BOS token. This module looks at a model
only to check that a tokenizer belongs to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from qwen_scope_lens.errors import BadText, WrongTokenizer
from qwen_scope_lens.models.architecture import Model, describe, places_of, text_config, unwrap
from qwen_scope_lens.models.checkpoint import Tokenizer, in_short, open_tokenizer

__all__ = [
    "Content",
    "Encoded",
    "check_tokenizer",
    "encode",
    "find_tokenizer",
    "is_ids",
    "render_chat",
]

Content: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[int] | torch.Tensor
"""A text, a chat (messages with `role` and `content`), or token ids `[n]`."""

LEAST_SHARE = 0.9
"""A tokenizer with fewer ids than this share of the model's vocabulary belongs to another model.

In the published Qwen3 and Qwen3.5 models, less than 1% of the rows are unused. Qwen3's tokenizer
fills 61% of Qwen3.5's vocabulary: each of its ids would be accepted, as a token of another text.
"""


@dataclass(frozen=True)
class Encoded:
    """One document, ready for a model."""

    ids: tuple[int, ...]
    text: str | None  # as tokenised (a chat after its template); None for token ids
    spans: tuple[tuple[int, int], ...] | None  # per token, its characters in `text`: [start, end)
    truncated: bool

    def __len__(self) -> int:
        return len(self.ids)


def find_tokenizer(model: Model, tokenizer: Tokenizer | None = None) -> Tokenizer:
    """The given tokenizer, that of the bridge, or that beside the model's local files, checked.

    Nothing is downloaded, so a model from memory without local files needs `tokenizer=`.
    """
    if tokenizer is None:
        tokenizer = vars(model).get("_tokenizer")  # of a TransformerBridge
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


def check_tokenizer(tokenizer: Tokenizer, model: Model) -> None:
    """Raise when the ids of a tokenizer cannot be those of the model."""
    places_of(model)
    vocabulary = int(text_config(model).vocab_size)
    known = len(tokenizer)
    if known > vocabulary:
        raise WrongTokenizer(
            f"the tokenizer makes ids up to {known - 1}, but {describe(model)} embeds only"
            f" {vocabulary}: load the tokenizer of the same repository"
        )
    if known < LEAST_SHARE * vocabulary:
        raise WrongTokenizer(
            f"the tokenizer has {known} ids, but {describe(model)} embeds {vocabulary}: it belongs"
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
                        " this tokenizer: the two do not belong together"
                    )


def _generation_config(model: Model) -> Any:
    return getattr(unwrap(model), "generation_config", None)


def is_ids(document: Any) -> bool:
    """Whether a document consists of token ids, so that it needs no tokenizer."""
    if isinstance(document, torch.Tensor):
        whole = not document.is_floating_point() and document.dtype is not torch.bool
        return document.ndim == 1 and whole
    return (
        isinstance(document, Sequence)
        and not isinstance(document, (str, bytes, bytearray))
        and all(isinstance(token, int) and not isinstance(token, bool) for token in document)
    )


def encode(
    documents: Sequence[Content],
    tokenizer: Tokenizer | None,
    *,
    limit: int,
    truncate: bool = False,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = False,
    first_number: int = 0,
) -> list[Encoded]:
    """Tokenise a list of documents, with one call of the tokenizer.

    `limit` is the largest number of tokens of a document. A longer one raises, or is cut at its end
    if `truncate` is set. Messages count the documents from `first_number`.
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
            texts[i] = render_chat(
                document, tokenizer, enable_thinking, add_generation_prompt, where
            )
        else:
            raise BadText(
                f"{where} is a {type(document).__name__}: expected a text, a list of chat messages"
                " (mappings with role and content) or token ids"
            )
    spans: dict[int, tuple[tuple[int, int], ...]] = {}
    for i, text in texts.items():
        _check_surrogates(text, f"document {first_number + i}")
    if texts:
        if tokenizer is None:
            raise WrongTokenizer("texts need a tokenizer: pass `tokenizer=`, or token ids")
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
            raise BadText(f"document {first_number + i} is empty: it has no token to read")
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


def render_chat(
    messages: Any,
    tokenizer: Tokenizer | None,
    enable_thinking: bool | None,
    add_prompt: bool,
    where: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text that the tokenizer's template makes of a chat, and of the tools that it may call.

    `where` names the chat in messages.
    """
    if enable_thinking is None:
        raise BadText(
            f"{where} is a chat: pass enable_thinking=True or False. The template's text depends on"
            " it, and the default differs between Qwen models"
        )
    if not messages:
        raise BadText(f"{where} is empty: it is a chat without messages")
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise WrongTokenizer(f"{where} is a chat, but this tokenizer has no chat template")
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_prompt,
                enable_thinking=enable_thinking,
                **({} if tools is None else {"tools": list(tools)}),
            )
        )
    except Exception as error:  # a template is a program, and may raise any error
        roles = ", ".join(f"{message.get('role')!r:.20}" for message in messages[:8])
        raise BadText(
            f"{where} is a chat with the roles {roles}. The chat template of the tokenizer does not"
            f" take it ({in_short(error)}): change the messages, or give the text itself"
        ) from error


def _check_surrogates(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadText(
            f"{where} has half of a surrogate pair at character {error.start}, and no tokenizer"
            " takes it: remove it, or decode the text from its bytes again"
        ) from error
