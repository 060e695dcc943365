"""What an agent can call: read, feature, search, steer, stores and query, as plain functions.

Each takes and returns plain JSON values, and its docstring is what the agent is told. One model and
the SAEs of one group answer; they are opened with the first call that needs them, and one call at a
time uses them. `server.py` puts the functions behind the protocol.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.address import FeatureRef, LayerRef
from qwen_scope_lens.catalog import Group
from qwen_scope_lens.errors import BadPlan, BadText, TooLittleData, UnknownName
from qwen_scope_lens.labels.lookup import Shelf, look_up
from qwen_scope_lens.labels.packs import LabelPack
from qwen_scope_lens.mcp.folders import Folders
from qwen_scope_lens.tables import plain

if TYPE_CHECKING:
    from qwen_scope_lens.models.token_text import Vocabulary
    from qwen_scope_lens.models.unembedding import Unembedding
    from qwen_scope_lens.saes.layer_sae import LayerSAE
    from qwen_scope_lens.steering.plan import Plan

__all__ = ["Toolbox"]

MOST_CHARACTERS = 200_000
"""Of a text or a query, which is refused before the tokenizer sees it."""

MOST_LAYERS, MOST_TOP, MOST_EDITS, MOST_TOKENS, MOST_ROWS = 8, 50, 64, 512, 200
MOST_SECONDS = 60.0
"""Of one query."""

PROMOTED = 10
"""How many tokens and neighbours `feature` names."""

Answer = dict[str, Any]


@dataclass(eq=False)
class Toolbox:
    """A model with the SAEs of one group, labels, and the folders that may be read."""

    group: Group
    layers: tuple[int, ...]
    model_name: str
    labels: LabelPack = field(default_factory=LabelPack)
    folders: Folders = field(default_factory=Folders)
    sae_folder: Any = None
    device: str | None = None
    allow_other_model: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _saes: dict[int, LayerSAE] = field(default_factory=dict)
    _typical: dict[str, float] = field(default_factory=dict)

    # --- what an agent calls ---------------------------------------------------------------------

    def about(self) -> Answer:
        """What is here: the model, its SAEs, the layers that are read, and the stores for `query`.

        A feature has one address everywhere, GROUP/LAYER/FEATURE; layers count from 0. Call this
        first.
        """
        return {
            "model": self.model_name,
            "group": self.group.short,
            "layers": list(self.layers),
            "layers_of_the_group": list(self.group.layers),
            "features_per_layer": self.group.d_sae,
            "active_per_token": self.group.k,
            "labels": len(self.labels),
            "stores": self.folders.stores(),
            "example": f"{self.group.short}/{self.layers[0]}/0",
            "notice": self.group.notice,
        }

    def read(self, text: str, layers: list[int] | None = None, top: int = 5) -> Answer:
        """Which features fire on a text: the strongest of each layer, and those of every token.

        Args:
            text: at most the model's context; a longer text is refused.
            layers: of the group, at most 8; by default those that `about` names.
            top: how many features per layer, at most 50.

        Each feature comes with its largest activation, the token where that is, the tokens that
        its direction promotes (the logit lens, a hint only in early layers), and its label. The
        first token and tokens of extreme norm are shown and do not count for the strongest.
        """
        from qwen_scope_lens.features.read import read
        from qwen_scope_lens.features.reading import readings_json

        chosen = self._layers(layers)
        _at_most("top", top, MOST_TOP)
        _is_text("text to read", text)
        with self._lock:
            saes = [self._sae(layer) for layer in chosen]
            reading = read(
                text,
                saes,
                model=self._model,
                layers=chosen,
                labels=self.labels,
                top=top,
                allow_other_model=self.allow_other_model,
            )
        answer: Answer = json.loads(readings_json([reading], top))
        return answer

    def feature(self, address: str) -> Answer:
        """Everything that is known of one feature without running the model.

        Its label, the tokens that its direction promotes and suppresses with their logits over the
        mean, the nearest features of its layer by decoder cosine, and the geometry of its
        directions. To see where it fires, use `query` on a store, or `read` a text.

        Args:
            address: GROUP/LAYER/FEATURE, such as the addresses that `read` and `search` give.
        """
        from qwen_scope_lens.features.feature_facts import feature_facts
        from qwen_scope_lens.features.token_effects import token_effects

        ref = self._own(FeatureRef.parse(address))
        with self._lock:
            sae, vocabulary = self._sae(ref.layer), self._vocabulary
            direction = sae.direction([ref.feature]).detach().cpu()
            effects = token_effects(direction, self._end, PROMOTED, vocabulary=len(vocabulary))
            facts = feature_facts(ref, sae, effects, vocabulary, self.labels, PROMOTED)
        label = self.labels.get(ref)
        return {
            "feature": str(ref),
            "label": None if label is None else label.to_row(),
            **facts,
        }

    def search(self, query: str, layers: list[int] | None = None, limit: int = 20) -> Answer:
        """Find features: by address, by the words of their labels, or by a token that they promote.

        To find features by what a sentence means, `read` the sentence instead.

        Args:
            query: a number or an address; words of labels; or a word that is one token, without or
                with a space before it. Its score is the logit over the vocabulary's mean.
            layers: of the group, at most 8; by default those that `about` names.
            limit: how many, at most 50. Found by address come first, then by label, then by token.
        """
        chosen = self._layers(layers)
        _at_most("limit", limit, MOST_TOP)
        _is_text("query", query)
        with self._lock:
            shelf = Shelf(
                [LayerRef(self.group.short, layer) for layer in chosen],
                self.labels,
                lambda ref: self._sae(ref.layer).W_dec,
                lambda: self._end,
                self._tokenizer,
                self._vocabulary,
            )
            hits = look_up(query, shelf, limit)
        return {
            "query": query,
            "features": [
                {
                    "feature": str(hit.ref),
                    "label": self.labels.text(hit.ref),
                    "why": hit.why,
                    "found": hit.found,
                    "score": hit.score,
                }
                for hit in hits
            ],
        }

    def steer(
        self,
        prompt: str,
        edits: list[str],
        new_tokens: int = 60,
        temperature: float = 0.0,
        seed: int = 0,
        chat: bool = False,
    ) -> Answer:
        """Continue a prompt with and without edits of features, side by side.

        Args:
            prompt: a text to continue; with `chat` a user's message.
            edits: each `ADDRESS:OPERATION[:STRENGTH][@WHERE]`, such as GROUP/6/423:add:+2typical,
                GROUP/6/423:ablate, GROUP/6/423:add:-0.1norm@generation. Operations: add, set,
                scale, ablate, floor, cap, project_out. A strength is in activations, or in
                `typical` (the feature's mean activation where it fires), or in `norm` (a fraction
                of the residual's length). At most 64.
            new_tokens: at most 512.

        The answer says of each edit on how many tokens it acted and how far it moved the residual.
        A strong effect is cheap in text that has fallen apart: try half of the strength, too.
        """
        from qwen_scope_lens.steering.generate import Sampling, generate
        from qwen_scope_lens.steering.hooks import steer
        from qwen_scope_lens.steering.plan import Plan

        _at_most("new_tokens", new_tokens, MOST_TOKENS)
        if not edits or len(edits) > MOST_EDITS:
            raise BadPlan(f"there are {len(edits)} edits: expected 1 to {MOST_EDITS}")
        _is_text("prompt", prompt)
        plan = Plan([Plan.of(edit).edits[0] for edit in edits])
        for ref in plan.refs:
            self._own(ref)
        sampling = Sampling(new_tokens, temperature, seed=seed)
        content: Any = [{"role": "user", "content": prompt}] if chat else prompt
        with self._lock:
            plan = self._calibrated(plan)
            saes = {f"{self.group.short}/{n}": self._sae(n) for n in plan.layers}
            options: Answer = {"sampling": sampling, "allow_other_model": self.allow_other_model}
            options |= {"enable_thinking": False} if chat else {}
            [before] = generate(self._model, [content], None, **options)
            with steer(
                self._model,
                plan,
                saes,
                must_fire=False,
                allow_other_model=self.allow_other_model,
            ) as report:
                [after] = generate(self._model, [content], None, **options)
        return {
            "unsteered": before.text,
            "steered": after.text,
            "edits": plain(report.table().records()),
            "fired": report.fired,
        }

    def query(self, store: str, sql: str, limit: int = 50) -> Answer:
        """Ask a feature store of a corpus in SQL; it can only be read.

        Views: features (layer, feature, doc, position, value), documents (doc, key, text, n_tokens,
        truncated, and a column per label), tokens (doc, position, token_id, token, start, end,
        extreme_LAYER). One SELECT, in DuckDB's SQL. For example, where a feature is strongest:
        select value, token, text from features join tokens using (doc, position) join documents
        using (doc) where layer = 6 and feature = 423 order by value desc limit 5

        Args:
            store: one of the `stores` that `about` names.
            limit: how many rows of the answer are given, at most 200.
        """
        from qwen_scope_lens.stores.store import FeatureStore

        _at_most("limit", limit, MOST_ROWS)
        place = self.folders.store(store)
        answer = FeatureStore.open(place).sql(sql, most_seconds=MOST_SECONDS)
        rows = answer.slice(0, limit).to_pylist()
        cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
        return {"columns": answer.column_names, "rows": cells, "more": len(answer) - len(rows)}

    # --- what they share -------------------------------------------------------------------------

    @cached_property
    def _model(self) -> Any:
        from qwen_scope_lens.models.backbone import check_backbone
        from qwen_scope_lens.models.open import open_model

        model = open_model(self.model_name, device=self.device)
        check_backbone(model, self.group, allow_other_model=self.allow_other_model)
        return model

    @property
    def _tokenizer(self) -> Any:
        from qwen_scope_lens.models.tokenize import find_tokenizer

        return find_tokenizer(self._model)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        from qwen_scope_lens.models.token_text import Vocabulary

        return Vocabulary(self._tokenizer)

    @cached_property
    def _end(self) -> Unembedding:
        from qwen_scope_lens.models.unembedding import read_unembedding

        return read_unembedding(self._model)

    def _sae(self, layer: int) -> LayerSAE:
        """The SAE of a layer; the one opened first goes when there are more than `MOST_LAYERS`."""
        from qwen_scope_lens.saes.load import open_sae

        if layer not in self._saes:
            while len(self._saes) >= MOST_LAYERS:
                del self._saes[next(iter(self._saes))]
            ref = LayerRef(self.group.short, layer)
            self._saes[layer] = open_sae(ref, folder=self.sae_folder, device=self.device or "cpu")
        return self._saes[layer]

    def _layers(self, layers: Sequence[int] | None) -> list[int]:
        chosen = sorted(set(layers or self.layers))
        if len(chosen) > MOST_LAYERS:
            raise UnknownName(f"{len(chosen)} layers are asked for: expected at most {MOST_LAYERS}")
        for layer in chosen:
            LayerRef(self.group.short, layer)  # raises for one that does not exist
        return chosen

    def _own(self, ref: FeatureRef) -> FeatureRef:
        if ref.group != self.group.short:
            raise UnknownName(
                f"{ref} belongs to other SAEs than this server's: expected an address of"
                f" {self.group.short}, or `qsl mcp --sae {ref.group}`"
            )
        return ref

    def _calibrated(self, plan: Plan) -> Plan:
        """With typical activations from a bundled sample of texts, where strengths need them."""
        from qwen_scope_lens.models.verify import sample_texts
        from qwen_scope_lens.steering.calibrate import calibrate

        wanted = [e.ref for e in plan.edits if e.unit == "typical" and e.typical is None]
        if missing := [ref for ref in wanted if str(ref) not in self._typical]:
            saes = {f"{self.group.short}/{ref.layer}": self._sae(ref.layer) for ref in missing}
            found = calibrate(
                self._model,
                missing,
                sample_texts(),
                saes,
                truncate=True,
                allow_other_model=self.allow_other_model,
            )
            self._typical |= dict(found)
            if silent := [str(ref) for ref in missing if str(ref) not in self._typical]:
                raise TooLittleData(
                    f"{', '.join(silent)} fires on none of the sample texts, so nothing is known of"
                    " its typical activation: give the strength in activations, or in norm"
                )
        return plan.calibrated(self._typical)


def _at_most(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise UnknownName(f"{name} is {value}: expected 1 to {most}")


def _is_text(what: str, text: str) -> None:
    if not text.strip():
        raise BadText(f"there is no {what}: give some words")
    if len(text) > MOST_CHARACTERS:
        raise BadText(
            f"the {what} has {len(text):,} characters: expected at most {MOST_CHARACTERS:,}"
        )


def _cell(value: Any) -> Any:
    """What JSON has for a value of an answer; others, such as dates, as text."""
    known = value is None or isinstance(value, (Mapping, list, str, int, float, bool))
    return plain(value) if known else str(value)
