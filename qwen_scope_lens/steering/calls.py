"""Which tokens a forward pass works on: prompt or generated, at which position, and pads.

A pass computes some columns of a longer table: one column with a cache, all of them without.
`Watch` follows the passes of a model, so that a token is known by the same position however it is
computed. What it knows of a text is kept with the text's cache; what it knows of a pass is kept
with the thread that runs it. `passes.py` places a `Watch` on a model, and `token_masks.py` selects
tokens by what it says.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from qwen_scope_lens.errors import BadPlan, PlanBypassed, WrongModel
from qwen_scope_lens.models.architecture import describe
from qwen_scope_lens.steering.where import Gate

__all__ = ["NEVER", "Call", "OfOneModel", "Pass", "Watch"]

NEVER = 2**62
"""The column at which a closed gate opens."""


@dataclass(frozen=True)
class Call:
    """One forward pass over columns `past .. past + columns` of every row."""

    rows: int
    columns: int
    past: int  # columns that a cache holds already
    prompt: int  # columns from here on are generated
    ids: Tensor | None  # [rows, past + columns] as far as known; None when embeddings came in
    real: Tensor | None  # bool [rows, past + columns], False for pads; None: no pads
    generating: bool  # inside `generate`, which may have multiplied the rows
    ends: Tensor | None = None  # [rows, 1] length of each row's prompt, where they were not joined

    @property
    def in_prompt(self) -> bool:
        """Whether some column of this pass belongs to the prompt."""
        return self.past < self.prompt

    @property
    def in_generation(self) -> bool:
        return self.past + self.columns > self.prompt


@dataclass
class Pass:
    """A call that is running."""

    call: Call
    derived: dict[Any, Any] = field(default_factory=dict)  # masks, made once per pass
    fired: set[int] = field(default_factory=set)  # the watched layers that have run
    opened: dict[Gate, Tensor] = field(default_factory=dict)  # int64 [rows]: the column, or NEVER

    def open(self, gate: Gate, flags: Tensor) -> None:
        """Note where a gate opens in this pass. `flags`, bool `[rows, columns]`: is it passed?"""
        call = self.call
        first = flags.to(torch.int8).argmax(1) + call.past
        first = torch.where(flags.any(1), first, NEVER)
        before = self.opened.get(gate)
        if before is None and call.past:
            raise BadPlan(
                f"gate={gate} needs the tokens before these: start the text in the context"
            )
        self.opened[gate] = first if before is None else torch.minimum(before, first)

    def is_open(self, gate: Gate) -> Tensor:
        """Where a gate is open, bool `[rows, columns]`. Its layer has run before the edit's."""
        opened = self.opened[gate]
        at = torch.arange(self.call.columns, device=opened.device) + self.call.past
        return at >= opened[:, None]


@dataclass(frozen=True)
class _Text:
    """What is known of the text that a cache holds."""

    prompt: int
    ids: Tensor | None
    opened: dict[Gate, Tensor] = field(default_factory=dict)


class _Thread(threading.local):
    """What one thread is doing with the model."""

    def __init__(self) -> None:
        self.now: Pass | None = None
        self.outer_waits = False
        self.passes = 0
        self.at_call = 0  # passes before the compiled wrapper was called
        self.inside = 0  # depth of `generate`
        self.prompt: int | None = None  # columns of the prompt of that `generate`
        self.mask: Tensor | None = None  # its pads, as they were given
        self.seen = 0  # columns that its passes have worked on


class OfOneModel:
    """Something that belongs to one model and refuses to be copied or pickled with it."""

    name: str

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise WrongModel(
            f"a plan is active on {self.name}: a copy would stay steered after the block, and its"
            " generate() would run the original. Copy or pickle the model before or after the block"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.__deepcopy__(None)


class Watch(OfOneModel):
    """Follows the passes of one model. Every pass has to reach each of `layers`."""

    def __init__(self, model: Any, root: nn.Module, layers: Sequence[int] = ()) -> None:
        self.name = describe(model)
        self._root: Any = root  # the text model, which runs the layers
        self._layers = frozenset(layers)
        self.looks_back = False  # whether an edit has a thinking phase or a gate
        self._texts: WeakKeyDictionary[Any, _Text] = WeakKeyDictionary()
        self._recomputed = WeakTensorKeyDictionary()
        self._lock = threading.Lock()
        self.thread = _Thread()

    def before(
        self, module: Any, args: Any, kwargs: dict[str, Any], names: Sequence[str], outer: bool
    ) -> None:
        """A pass begins, at the whole model or at the text model inside it."""
        if getattr(module, "_is_replica", False):
            raise WrongModel(
                f"{self.name} runs as one of DataParallel's replicas, which share out the rows of a"
                " batch: a plan cannot tell whose they are. Use one device, or device_map"
            )
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        mine = self.thread
        if not outer and mine.outer_waits:  # the same pass, a floor below
            mine.outer_waits = False
            if mine.now is not None:
                return
        mine.now = None
        mine.outer_waits = outer
        table = ids if ids is not None else embeds
        if table is None:
            return  # the model itself will complain
        mine.now = self._made(table, ids, kwargs)
        mine.passes += 1
        mine.seen = max(mine.seen, mine.now.call.past + mine.now.call.columns)

    def after(self, module: Any, args: Any, output: Any) -> None:
        """A pass has ended, so its layers have run: raise unless the plan was called in each."""
        now = self.thread.now
        if now is None:
            return
        depth = int(self._root.config.num_hidden_layers)
        if missed := sorted(n for n in self._layers - now.fired if n < depth):
            raise PlanBypassed(
                f"a pass of {self.name} over {now.call.columns} columns ended and the plan was not"
                f" called at layer {', '.join(map(str, missed))}: the layers ran from a graph that"
                " knows no hooks. Change the compiler's stance outside of the block only, pass"
                " disable_compile=True to generate(), or steer the model before it is compiled"
            )
        self._remember(getattr(output, "past_key_values", None), now)

    def at_layer(self, layer: int, module: Any, kwargs: dict[str, Any]) -> Pass | None:
        """The pass to which this run of a layer belongs.

        Gradient checkpointing may run layers and their hooks again during the backward pass, in a
        thread of autograd's: they are known by the position embeddings, of which every pass has
        its own.
        """
        now = self.thread.now
        positions = kwargs.get("position_embeddings")
        if getattr(module, "gradient_checkpointing", False) and isinstance(positions, tuple):
            with self._lock:
                found = self._recomputed.get(positions[0])
                if found is None and now is not None:
                    self._recomputed[positions[0]] = now
            now = now if found is None else found
        if now is not None:
            now.fired.add(layer)
        return now

    def _made(self, table: Tensor, ids: Tensor | None, kwargs: dict[str, Any]) -> Pass:
        mine = self.thread
        rows, columns = table.shape[:2]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        total = past + columns
        text = self._text_of(cache) if past else None
        if mine.inside:
            mine.prompt = total if mine.prompt is None else mine.prompt
            prompt = mine.prompt
        elif past == 0:
            prompt = total
        else:  # of a cache from before the context nothing is known: its text counts as prompt
            prompt = past if text is None else text.prompt
        call = Call(
            rows,
            columns,
            past,
            prompt,
            _history(text, ids, past),
            self._real(kwargs.get("attention_mask"), rows, total),
            bool(mine.inside),
        )
        # What a cache was cropped to leave out has opened nothing.
        opened = {} if text is None else text.opened
        now = Pass(call, opened={g: at.masked_fill(at >= past, NEVER) for g, at in opened.items()})
        self._remember(cache, now)
        return now

    def _text_of(self, cache: Any) -> _Text | None:
        with self._lock:
            return self._texts.get(cache)

    def _remember(self, cache: Any, now: Pass) -> None:
        if hasattr(cache, "get_seq_length"):
            with self._lock:
                self._texts[cache] = _Text(now.call.prompt, now.call.ids, now.opened)

    def _real(self, mask: Any, rows: int, total: int) -> Tensor | None:
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= total:
            return mask[:, :total].bool()
        if mask is None or (
            isinstance(mask, Tensor) and mask.ndim == 2 and rows == 1 and bool(mask.all())
        ):
            return None
        if self.thread.inside:
            given = _stretched(self.thread.mask, rows, total)
            if given is None:
                given = _visible(mask, total)
            if given is not None:
                return given
        if rows == 1:
            return None
        raise WrongModel(
            f"{self.name} was run on {rows} rows with an attention mask that does not tell pads"
            f" from tokens: expected [{rows}, {total}], one flag per token"
        )

    @contextmanager
    def generation(self, prompt: int | None, mask: Any, beams: int = 1) -> Iterator[None]:
        """A call of `generate`; `prompt` columns where they are known before the first pass."""
        if beams > 1 and self.looks_back:
            raise BadPlan(
                f"{beams} beams change rows while they are written, and a thinking phase or a gate"
                " belongs to one row's text: generate with num_beams=1"
            )
        mine = self.thread
        if mine.inside == 0:
            mine.prompt, mine.seen = prompt, 0
            mine.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        mine.inside += 1
        try:
            yield
        finally:
            mine.inside -= 1
            if mine.inside == 0:
                mine.prompt = mine.mask = None

    def check_generated(self, made: int) -> None:
        """`generate` is about to return `made` new columns: were the passes seen that they took?

        The last new column is written and never run.
        """
        mine = self.thread
        ran = mine.seen - (mine.prompt or 0)
        if mine.inside == 1 and made > ran + 1:
            raise PlanBypassed(
                f"{self.name} generated {made} tokens, and the plan saw {max(0, ran)} of the"
                f" {made - 1} runs after the prompt: the rest came from a graph that knows no"
                " hooks. Pass disable_compile=True to generate(), and change the compiler's stance"
                " outside of the block only"
            )


def _history(text: _Text | None, ids: Tensor | None, past: int) -> Tensor | None:
    """The token ids of all columns, `[rows, past + columns]`; None where they are not known."""
    if ids is None or past == 0:
        return ids
    before = None if text is None else text.ids
    if before is None or before.shape[1] < past or len(before) != len(ids):
        return None
    return torch.cat([before[:, :past].to(ids.device), ids], dim=1)


def _stretched(mask: Tensor | None, rows: int, total: int) -> Tensor | None:
    """The prompt's mask, repeated for the rows that `generate` made; new tokens are not pads."""
    if mask is None or rows % len(mask):
        return None
    flags = mask.bool().repeat_interleave(rows // len(mask), dim=0)[:, :total]
    return torch.nn.functional.pad(flags, (0, total - flags.shape[1]), value=True)


def _visible(mask: Any, total: int) -> Tensor | None:
    """What the last column may attend to, from a mask `[rows, 1, columns, total or more]`."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-1] < total:
        return None
    last = mask[:, 0, -1, :total]
    return last if last.dtype == torch.bool else last == 0
