"""The rows that are decoded together: prefill, join, step, leave.

transformers' own continuous batching (5.23) is not used, for three reasons. It packs the tokens of
all requests into one row, so a hook on a layer cannot tell whose tokens it sees, and a plan, a gate
and a chat role belong to one text. It draws all requests from one random stream, so a seeded reply
would depend on its neighbours. And it has no cache for linear attention, which Qwen3.5 is made of.
What is needed here is small: the model's own forward pass over rows that are aligned on the right.

A row's numbers do not depend on the other rows, except for the rounding of matrix products, whose
order of summation depends on their shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.models.architecture import (
    decoder_layers,
    describe,
    input_device,
    part,
    places_of,
)
from qwen_scope_lens.serve import caches
from qwen_scope_lens.serve.prefixes import Prefix, PrefixCache
from qwen_scope_lens.serve.rows import Row
from qwen_scope_lens.serve.sampling import logprobs
from qwen_scope_lens.steering.calls import NEVER, Call
from qwen_scope_lens.steering.rows import RowSteering

__all__ = ["Batch"]

HEAD_ROWS = 64
"""How many positions go through the unembedding at a time, where all of a prompt's are wanted."""


class Batch:
    """Rows under way on one model. It belongs to the engine's thread."""

    def __init__(
        self, model: Any, steering: Callable[[], RowSteering], prefixes: PrefixCache
    ) -> None:
        self._model, self._prefixes = model, prefixes
        self._steering = steering()
        self._alone = steering()  # of a prompt that is read while the others wait
        self._device = input_device(model)
        self.rows: list[Row] = []
        self._cache: Any = None
        self._columns = 0
        self._ids = torch.zeros(0, 0, dtype=torch.long)
        self._pads: list[int] = []

    # One row by itself.

    @torch.no_grad()
    def prefill(self, row: Row) -> tuple[Tensor, Any]:
        """Read a prompt. The logits after it, float32 `[vocabulary]`, and the row's cache."""
        wanted = row.wanted
        ids = wanted.prompt
        whole = wanted.prompt_logprobs or wanted.written is not None  # all of it is read now
        known = None if whole else self._prefixes.find(wanted)
        past, logits = 0, None
        cache: Any = transformers.DynamicCache(config=self._model.config)
        if known is not None:
            past, cache, logits = known.length, known.cache, known.logits
            row.opened.update(known.opened)
            if row.report is not None and known.did is not None:
                row.report.give(known.did)
            for layer in wanted.layers:
                row.residuals[layer] = [known.residuals[layer]]
        row.cached = row.read = past
        if logits is None:
            self._alone.arrange([wanted.plan])
            table = torch.tensor([ids], device=self._device)
            prompt = len(ids) - (wanted.written or 0)
            call = Call(1, len(ids) - past, past, prompt, table, None, True)
            with self._pass(self._alone, call, [row], [0]):
                logits = self._read_prompt(row, table[:, past:], cache)
            _settle(self._alone, [row])
        if not caches.supported(cache):
            raise WrongModel(f"{describe(self._model)} keeps a cache of a kind that is not served")
        if not whole:
            self._keep(row, ids, cache, logits)
        return logits, cache

    def _keep(self, row: Row, ids: tuple[int, ...], cache: Any, logits: Tensor | None) -> None:
        residuals = {n: torch.cat(parts) for n, parts in row.residuals.items()}
        did = None if row.report is None else row.report.taken()
        prefix = Prefix(len(ids), cache, logits, residuals, dict(row.opened), did)
        self._prefixes.keep(row.wanted, ids, prefix)

    def _read_prompt(self, row: Row, ids: Tensor, cache: Any) -> Tensor:
        options = {"past_key_values": cache, "use_cache": True}
        if not row.wanted.prompt_logprobs:
            out = self._model(input_ids=ids, logits_to_keep=1, **options)
            return out.logits[0, -1].float()
        places = places_of(self._model)
        root = part(self._model, places.root.rstrip(".")) if places.root else self._model
        hidden = root(input_ids=ids, **options).last_hidden_state[0]
        assert places.head is not None
        head = part(self._model, places.head)
        found: list[Any] = [None]
        tokens = list(row.wanted.prompt[1:])
        for start in range(0, len(tokens), HEAD_ROWS):
            own = tokens[start : start + HEAD_ROWS]
            scores = head(hidden[start : start + len(own)]).float()
            found += logprobs(scores, own, row.wanted.top_logprobs or 0)
        row.prompt_logprobs = found
        return head(hidden[-1:])[0].float()

    # The rows together.

    def join(self, rows: Sequence[Row], ready: Sequence[Any]) -> None:
        """Take rows into the batch, with their caches. The next token of each is chosen already."""
        lengths = [row.read for row in rows]
        parts, sizes = list(ready), list(lengths)
        if self.rows:
            parts, sizes = [self._cache, *parts], [self._columns, *sizes]
        self._cache, self._columns = caches.joined(parts, sizes)
        self.rows = [*self.rows, *rows]
        self._arranged()

    def clear(self) -> list[Row]:
        """Forget everything, after a failure. The rows that were under way."""
        rows, self.rows = self.rows, []
        self._cache, self._columns = None, 0
        self._arranged()
        return rows

    def leave(self, gone: Sequence[Row]) -> None:
        """Let rows go. What an unsteered one has read can begin the next prompt of its chat."""
        _settle(self._steering, self.rows)
        for i, row in enumerate(self.rows):
            if row in gone and row.wanted.plan is None and not row.cancelled:
                own = caches.trimmed(caches.selected(self._cache, [i]), self._pads[i])
                self._keep(row, tuple(row.ids[: row.read]), own, None)
        stay = [i for i, row in enumerate(self.rows) if row not in gone]
        self.rows = [self.rows[i] for i in stay]
        if not self.rows:
            self._cache, self._columns = None, 0
        else:
            self._cache = caches.selected(self._cache, stay)
            spare = self._columns - max(row.read for row in self.rows)
            if spare:
                self._cache, self._columns = (
                    caches.trimmed(self._cache, spare),
                    self._columns - spare,
                )
        self._arranged()

    @torch.no_grad()
    def step(self) -> Tensor:
        """Read the next token of every row. The logits after it, float32 `[rows, vocabulary]`."""
        rows = self.rows
        new = torch.tensor([[row.next] for row in rows])
        self._ids = torch.cat([self._ids, new], dim=1)
        total, device = self._columns + 1, self._device
        mask = None
        if any(self._pads):
            pads = torch.tensor(self._pads, device=device)
            mask = torch.arange(total, device=device)[None] >= pads[:, None]
        call = Call(len(rows), 1, self._columns, self._columns, self._ids, mask, True, self._ends)
        at = torch.tensor([[row.read] for row in rows], device=device)
        with self._pass(self._steering, call, rows, self._pads):
            out = self._model(
                input_ids=new.to(device),
                attention_mask=None if mask is None else mask.long(),
                position_ids=at,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._columns = total
        return out.logits[:, -1].float()

    @contextmanager
    def _pass(
        self, steering: RowSteering, call: Call, rows: Sequence[Row], pads: Sequence[int]
    ) -> Iterator[None]:
        """Steer one pass, and give its rows the residuals that they want."""
        gates = {gate for row in rows for gate in row.opened}
        opened = {
            gate: torch.tensor(
                [
                    _column(row.opened.get(gate, NEVER), p)
                    for row, p in zip(rows, pads, strict=True)
                ],
                device=self._device,
            )
            for gate in gates
        }
        with steering.running(call, opened) as now, ExitStack() as stack:
            for layer in sorted({n for row in rows for n in row.wanted.layers}):
                self._watch(stack, layer, rows)
            yield
            for gate, found in now.opened.items():
                for row, pad, column in zip(rows, pads, found.tolist(), strict=True):
                    if row.wanted.plan is not None:
                        row.opened[gate] = column if column == NEVER else column - pad
            for row in rows:
                row.read += call.columns

    def _watch(self, stack: ExitStack, layer: int, rows: Sequence[Row]) -> None:
        def hook(module: Any, args: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            for i, row in enumerate(rows):
                if layer in row.wanted.layers:
                    row.residuals.setdefault(layer, []).append(x[i].detach())

        handle = decoder_layers(self._model)[layer].register_forward_hook(hook)
        stack.callback(handle.remove)

    def _arranged(self) -> None:
        rows = self.rows
        self._pads = [self._columns - row.read for row in rows]
        table = torch.zeros(len(rows), self._columns, dtype=torch.long)
        for i, row in enumerate(rows):
            table[i, self._pads[i] :] = torch.tensor(row.ids[: row.read])
        self._ids = table
        ends = [len(row.wanted.prompt) for row in rows]
        self._ends = torch.tensor(ends, dtype=torch.long)[:, None]
        self._steering.arrange([row.wanted.plan for row in rows])


def _settle(steering: RowSteering, rows: Sequence[Row]) -> None:
    """Add what the edits did to the rows' own reports."""
    for row, sums in zip(rows, steering.taken(), strict=True):
        if row.report is not None and sums is not None:
            row.report.give(sums)


def _column(position: int, pad: int) -> int:
    return position if position == NEVER else position + pad
