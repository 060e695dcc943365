"""From a bad reply to the features behind it, by the paper's workflow for bad cases.

Features are ranked by how much more strongly they fire on the bad tokens than on all others: the
prompt, good replies if there are any, and the other tokens of the reply if only some are bad. A
rank is a suspicion; `sweep` and `steer` show whether it is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.errors import BadText, TooLittleData
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.models.residuals import iter_captures
from qwen_scope_lens.models.tokenize import Content, encode, find_tokenizer
from qwen_scope_lens.saes.load import open_sae
from qwen_scope_lens.steering.readers import SAEs, by_address
from qwen_scope_lens.steering.token_masks import token_classes
from qwen_scope_lens.stores.corpus import read_rows

__all__ = ["Case", "Suspect", "blame", "first_bad_token", "read_cases"]


@dataclass(frozen=True)
class Case:
    """A prompt (text or chat) with a reply; `bad=False` for a good one to compare with."""

    prompt: Content
    reply: str
    bad: bool = True


@dataclass(frozen=True)
class Suspect:
    """A feature that is stronger on the bad tokens than elsewhere."""

    ref: FeatureRef
    difference: float  # of the means; features are ranked by it
    on_bad: float  # mean activation over the bad tokens, silence counted as 0
    elsewhere: float
    rate_on_bad: float  # share of tokens where it fires
    rate_elsewhere: float
    strongest: str  # the token of the bad ones where it fires most

    def __str__(self) -> str:
        return (
            f"{self.ref!s:34} {self.on_bad:8.3f} {self.elsewhere:9.3f} {self.rate_on_bad:8.0%}"
            f" {self.rate_elsewhere:10.0%}   {self.strongest!r}"
        )


def read_cases(path: Path) -> list[Case]:
    """Read cases from rows with `prompt` or `messages`, `reply`, and `bad` (default: true)."""
    cases = []
    for where, row in read_rows(path):
        row = row if isinstance(row, dict) else {}
        prompt, reply = row.get("messages", row.get("prompt")), row.get("reply")
        if not prompt or not isinstance(reply, str) or not reply:
            raise BadText(
                f"{where}: expected prompt (or messages) and reply, found"
                f" {', '.join(row) or 'neither'}"
            )
        bad = row.get("bad", True)
        if not isinstance(bad, bool):
            raise BadText(f"{where}: bad is {bad!r}: expected true or false")
        cases.append(Case(prompt, reply, bad))
    return cases


def blame(
    model: Any,
    saes: Iterable[LayerRef | str],
    cases: Sequence[Case],
    *,
    classes: Sequence[str] = (),
    top: int = 20,
    loaded: SAEs = None,
    tokenizer: Any = None,
    enable_thinking: bool | None = None,
    allow_other_model: bool = False,
) -> list[Suspect]:
    """The strongest suspects of all the SAEs.

    `classes` are token classes: only tokens of these classes count as bad, for example `han` where
    Chinese breaks into an English reply. Without them all tokens of bad replies count.
    """
    refs = [LayerRef.parse(one) for one in saes]
    for row in dict.fromkeys(ref.row for ref in refs):
        check_backbone(model, row, allow_other_model=allow_other_model)
    known = by_address(loaded)
    for ref in refs:
        if str(ref) not in known:
            known[str(ref)] = open_sae(ref)
    if not any(case.bad for case in cases):
        raise TooLittleData("there is no bad reply to explain: give at least one")
    tokenizer = find_tokenizer(model, tokenizer)
    rows, flags = _tokens(cases, tokenizer, classes, enable_thinking)
    sums = {ref: _Contrast(ref.row.d_sae) for ref in refs}
    for read in iter_captures(model, rows, [ref.layer for ref in refs], tokenizer=tokenizer):
        bad = torch.cat([flags[i] for i in read.doc_ids])
        for ref in refs:
            sae = known[str(ref)]
            keep = read.keep(ref.layer)
            x = read.residuals[ref.layer][keep].to(sae.W_dec.device)
            codes = sae.encode_sparse(x).to("cpu")
            kept = keep.cpu()
            sums[ref].add(codes, bad[kept], read.token_ids[kept])
    found = [suspect for ref, one in sums.items() for suspect in one.suspects(ref, top, tokenizer)]
    return sorted(found, key=lambda s: -s.difference)[:top]


def first_bad_token(
    cases: Sequence[Case],
    tokenizer: Any,
    classes: Sequence[str] = (),
    enable_thinking: bool | None = None,
) -> tuple[list[int], int]:
    """The token ids before the first bad token of the cases, and its own id."""
    rows, flags = _tokens(cases, tokenizer, classes, enable_thinking)
    row, flag = next(pair for pair in zip(rows, flags, strict=True) if bool(pair[1].any()))
    place = int(flag.nonzero()[0, 0])
    return row[:place], row[place]


def _tokens(
    cases: Sequence[Case], tokenizer: Any, classes: Sequence[str], enable_thinking: bool | None
) -> tuple[list[list[int]], list[Tensor]]:
    """Token ids of every case, prompt and reply, and which of them are bad."""
    options: dict[str, Any] = {"limit": 2**31, "enable_thinking": enable_thinking}
    prompts = encode([c.prompt for c in cases], tokenizer, add_generation_prompt=True, **options)
    replies = encode([case.reply for case in cases], tokenizer, **options)
    rows, flags = [], []
    special = set(tokenizer.all_special_ids)
    for case, prompt, reply in zip(cases, prompts, replies, strict=True):
        bad = [case.bad] * len(reply)
        if classes and case.bad:
            kinds = [token_classes(tokenizer.decode([t]), t in special) for t in reply.ids]
            bad = [bool(kind & set(classes)) for kind in kinds]
        rows.append([*prompt.ids, *reply.ids])
        flags.append(torch.tensor([False] * len(prompt) + bad))
    if not any(bool(flag.any()) for flag in flags):
        raise TooLittleData(f"no token of the bad replies is of class {', '.join(classes)}")
    return rows, flags


class _Contrast:
    """Sums over bad and over other tokens, for all features of an SAE."""

    def __init__(self, d_sae: int) -> None:
        self.sum = torch.zeros(2, d_sae, dtype=torch.float64)
        self.count = torch.zeros(2, d_sae, dtype=torch.float64)
        self.tokens = torch.zeros(2, dtype=torch.float64)
        self.largest = torch.zeros(d_sae)
        self.token = torch.zeros(d_sae, dtype=torch.long)

    def add(self, codes: Any, bad: Tensor, token_ids: Tensor) -> None:
        for side, mask in ((0, ~bad), (1, bad)):
            part = codes[mask]
            index = part.indices[part.active].long()
            values = part.values[part.active]
            self.tokens[side] += len(part)
            self.sum[side].index_add_(0, index, values.double())
            self.count[side].index_add_(0, index, torch.ones_like(values, dtype=torch.float64))
            if side:
                ids = token_ids[mask][:, None].expand_as(part.indices)[part.active]
                self.largest.scatter_reduce_(0, index, values, "amax")
                top = values == self.largest[index]
                self.token[index[top]] = ids[top]

    def suspects(self, ref: LayerRef, top: int, tokenizer: Any) -> list[Suspect]:
        if not self.tokens[1]:
            raise TooLittleData(
                "no bad token counts: each is the first of its text or has an extreme norm"
            )
        mean = self.sum / self.tokens.clamp(min=1)[:, None]
        rate = self.count / self.tokens.clamp(min=1)[:, None]
        difference = mean[1] - mean[0]
        best = difference.topk(min(top, len(difference)))
        return [
            Suspect(
                ref.feature(f),
                float(difference[f]),
                float(mean[1][f]),
                float(mean[0][f]),
                float(rate[1][f]),
                float(rate[0][f]),
                str(tokenizer.decode([int(self.token[f])])),
            )
            for f in best.indices.tolist()
            if difference[f] > 0
        ]
