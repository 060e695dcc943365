"""What the server works with: one model, the SAEs of one group, labels, plans, and a site.

Everything that runs the model goes through the engine's thread. SAEs encode in the threads of the
requests, one at a time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.catalog import Group, name_of_model
from qwen_scope_lens.errors import TooLittleData
from qwen_scope_lens.features.read import as_reading, read_layers
from qwen_scope_lens.features.reading import Reading
from qwen_scope_lens.features.token_effects import TokenEffects, token_effects
from qwen_scope_lens.labels.lookup import Hit, Shelf, look_up
from qwen_scope_lens.labels.packs import Label, LabelPack
from qwen_scope_lens.models.architecture import describe
from qwen_scope_lens.models.residuals import EXTREME_NORM_RATIO, extreme_tokens
from qwen_scope_lens.models.tokenize import Content, encode
from qwen_scope_lens.models.unembedding import Unembedding, read_unembedding
from qwen_scope_lens.models.verify import sample_texts
from qwen_scope_lens.saes.codes import SparseCodes
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.saes.load import open_sae
from qwen_scope_lens.serve.engine import Engine
from qwen_scope_lens.serve.engines.outside import Outside
from qwen_scope_lens.serve.faults import Fault
from qwen_scope_lens.serve.rows import Row, Step, Wanted
from qwen_scope_lens.steering.calibrate import calibrate
from qwen_scope_lens.steering.plan import Plan
from qwen_scope_lens.steering.report import Report

__all__ = ["Lens", "Options"]


@dataclass(frozen=True)
class Options:
    """How much the server does at once, and for whom."""

    rows: int = 16
    queue: int = 256
    seconds: float = 600
    prefix_tokens: int = 8192
    most_saes: int = 8  # in memory; the one used longest ago goes
    allow_other_model: bool = False


class Lens:
    """A model in memory with the SAEs of a group. `layers` are those that are read by default.

    `engine` writes the replies, by default the model itself. Where it is another one, `model` may
    be None; then nothing is read, and `name` says what is served.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        group: Group,
        layers: Sequence[int],
        *,
        labels: LabelPack | None = None,
        typical: Mapping[Any, float] | None = None,
        sae_folder: Path | None = None,
        options: Options | None = None,
        engine: Outside | None = None,
        name: str | None = None,
    ) -> None:
        options = options or Options()
        self.model, self.tokenizer, self.group, self.layers = model, tokenizer, group, tuple(layers)
        full = name or name_of_model(describe(model))
        self.name = served_name(full)
        self.names = (self.name, full)  # requests may use either
        self.labels = labels or LabelPack()
        self._typical = {str(ref): value for ref, value in (typical or {}).items()}
        self._folder, self._most = sae_folder, options.most_saes
        self._saes: OrderedDict[str, LayerSAE] = OrderedDict()
        self._loading, self._encoding = threading.Lock(), threading.Lock()
        self._lens_lock, self._again = threading.Lock(), threading.Lock()
        self._own: Engine | None = None
        if model is not None:
            self._own = Engine(
                model,
                tokenizer,
                self.sae_of,
                rows=options.rows,
                queue=options.queue,
                seconds=options.seconds,
                prefix_tokens=options.prefix_tokens,
                allow_other_model=options.allow_other_model,
            )
        self.engine: Engine | Outside = engine or self.reader
        self.vocabulary = self.engine.vocabulary

    @property
    def reader(self) -> Engine:
        """The engine of the model in memory, which also reads."""
        if self._own is None:
            raise Fault(
                "this server has no model of its own to read with: start it without --no-reader",
                "unsupported",
            )
        return self._own

    @property
    def reads(self) -> bool:
        return self._own is not None

    def close(self) -> None:
        for engine in (self.engine, self._own):
            if engine is not None:
                engine.close()

    def plan_in(self, model: str) -> str | None:
        """The plan that a model's name in a request names, "" for none; None: no such model."""
        for name in self.names:
            if model == name:
                return ""
            if model.startswith(f"{name}+"):
                return model[len(name) + 1 :] or None
        return None

    @property
    def has_chat(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def ref(self, address: Any) -> FeatureRef:
        """A feature of the served group; any other is refused."""
        found = FeatureRef.parse(address)
        if found.group != self.group.short:
            raise Fault(f"{found} is not a feature of {self.group.short}, which is served here")
        return found

    def layer(self, number: Any) -> int:
        if isinstance(number, bool) or number not in self.group.layers:
            raise Fault(f"layer {number!r:.40} is not one of {self.group.short}")
        return int(number)

    # SAEs.

    def sae_of(self, name: str) -> LayerSAE:
        """The SAE of an address, loaded once."""
        ref = LayerRef.parse(name)
        if ref.group != self.group.short:
            raise Fault(f"{name} is not an SAE of {self.group.short}, which is served here")
        with self._loading:
            if name not in self._saes:
                self._saes[name] = open_sae(ref, folder=self._folder)
            self._saes.move_to_end(name)
            while len(self._saes) > self._most:
                self._saes.popitem(last=False)
            return self._saes[name]

    def sae(self, layer: int) -> LayerSAE:
        return self.sae_of(f"{self.group.short}/{layer}")

    @torch.no_grad()
    def encode(self, layer: int, residuals: Tensor) -> SparseCodes:
        """`[n, d_model] -> SparseCodes [n]` on the CPU."""
        sae = self.sae(layer)
        with self._encoding:
            codes = sae.encode_sparse(residuals.to(sae.W_dec.device))
        return codes.detach().to("cpu", torch.float32)

    # Questions.

    def read(self, content: Content, layers: Sequence[int], **options: Any) -> Reading:
        """What fires on a text. It waits for the engine."""
        for layer in layers:
            self.sae(layer)  # loaded by this thread, while the engine goes on

        def work() -> Reading:
            return read_layers(
                self.model,
                content,
                layers,
                self.sae,
                group=self.group.short,
                vocabulary=self.vocabulary,
                labels=self.labels,
                tokenizer=self.tokenizer,
                **options,
            )

        return self.reader.call(work).result()

    def read_under(
        self,
        content: Content,
        written: int,
        plan: Plan,
        layers: Sequence[int],
        all_tokens: bool,
    ) -> tuple[Reading, Report | None]:
        """What fires on a text, of which the last `written` tokens are a reply, under a plan."""
        [found] = encode([content], self.tokenizer, limit=self.reader.context, truncate=False)
        row = self.under_plan(found.ids, min(written, len(found.ids)), plan, layers)
        residuals = {layer: torch.cat(list(row.residuals[layer])) for layer in layers}
        norms = {layer: x.float().norm(dim=-1) for layer, x in residuals.items()}
        count = [len(found.ids)]
        reading = as_reading(
            found.ids,
            residuals,
            {layer: extreme_tokens(x, count, EXTREME_NORM_RATIO) for layer, x in norms.items()},
            self.sae,
            text=content if isinstance(content, str) else None,
            model=self.name,
            group=self.group.short,
            vocabulary=self.vocabulary,
            tokenizer=self.tokenizer,
            labels=self.labels,
            all_tokens=all_tokens,
        )
        return reading, row.report

    def read_again(self, row: Row) -> None:
        """Give a reply that another engine has written the residuals that it wants.

        The model in memory reads prompt and reply under the same plan, and counts what the plan
        does there.
        """
        with self._again:
            if row.residuals:  # the recorder has done it
                return
            found = self.under_plan(row.ids, len(row.tokens), row.wanted.plan, row.wanted.layers)
            row.report = found.report
            row.residuals = found.residuals

    def under_plan(
        self, ids: Sequence[int], written: int, plan: Plan | None, layers: Sequence[int]
    ) -> Row:
        """Read tokens, of which the last `written` are a reply, as the plan makes them."""
        done: Future[Step] = Future()
        wanted = Wanted(tuple(ids), 0, 0.0, plan=plan, layers=tuple(layers), written=written)
        [row] = self.reader.submit([wanted], lambda row, step: done.set_result(step))
        if (error := done.result().error) is not None:
            raise error
        return row

    @cached_property
    def unembedding(self) -> Unembedding:
        _ = self.reader  # refused where there is no model
        return read_unembedding(self.model)

    def effects(self, refs: Sequence[FeatureRef], count: int = 10) -> TokenEffects:
        """The tokens that features promote and suppress. `[n, count]`"""
        with self._lens_lock:
            end = self.unembedding
        rows = torch.cat([self.sae(ref.layer).direction([ref.feature]) for ref in refs])
        directions = rows.detach().float().cpu()
        return token_effects(directions, end, count, vocabulary=len(self.vocabulary))

    def typical(self, refs: Sequence[FeatureRef]) -> dict[str, float]:
        """Typical activations in a bundled sample of texts, of those features that fire there."""
        missing = [ref for ref in refs if str(ref) not in self._typical]
        if missing:
            saes = {f"{self.group.short}/{ref.layer}": self.sae(ref.layer) for ref in missing}
            texts, own = sample_texts(), self.tokenizer
            found = self.reader.call(
                lambda: calibrate(self.model, missing, texts, saes, truncate=True, tokenizer=own)
            ).result()
            self._typical |= {str(ref): float(value) for ref, value in dict(found).items()}
        return {str(ref): self._typical[str(ref)] for ref in refs if str(ref) in self._typical}

    def known_typical(self, ref: FeatureRef) -> float | None:
        return self._typical.get(str(ref))

    def calibrated(self, plan: Plan) -> Plan:
        """With typical activations where strengths need them."""
        needed = [e.ref for e in plan.edits if e.unit == "typical" and e.typical is None]
        if not needed:
            return plan
        known = self.typical(needed)
        if silent := [str(ref) for ref in needed if str(ref) not in known]:
            raise TooLittleData(
                f"{', '.join(silent)} fires on none of the sample texts, so nothing is known of"
                " its typical activation: give the strength as raw or norm"
            )
        return plan.calibrated(known)

    def label(self, ref: FeatureRef, text: str) -> Label | None:
        """Give a feature a label, or take it away with an empty text."""
        others = [label for label in self.labels.values() if label.ref != ref]
        new = Label(ref, text, provenance={"source": "person"}) if text.strip() else None
        self.labels = LabelPack([*others, new] if new else others)
        return new

    def search(self, words: str, layers: Sequence[int], limit: int) -> list[Hit]:
        """Features by address or number, by words of their labels, by a token that they promote."""

        def end() -> Unembedding:
            with self._lens_lock:
                return self.unembedding

        shelf = Shelf(
            [LayerRef(self.group.short, layer) for layer in layers],
            self.labels,
            lambda ref: self.sae(ref.layer).W_dec,
            end if self.reads else None,
            self.tokenizer,
            self.vocabulary,
        )
        return look_up(words, shelf, limit)


def served_name(full: str) -> str:
    """The name of a model in the API. Of a folder, its last part: where it lies is nobody's
    business."""
    if not Path(full).is_dir():
        return full
    parts = Path(full).resolve().parts
    cached = [part for part in parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else parts[-1]
