"""SASFT: a TRL SFTTrainer whose loss also penalises language features on other languages.

TRL handles data, batches, checkpoints and metrics. This trainer adds a language to every token of
the dataset, records the residuals of a few layers, and adds `lam` times the penalty to the loss.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from qwen_scope_lens.errors import BadCorpus, UnknownName, WrongModel
from qwen_scope_lens.extras import require
from qwen_scope_lens.models.architecture import decoder_layers, describe
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.train.checkpoints import WholeCheckpoints
from qwen_scope_lens.train.language_features import LanguageFeature, LanguageFeatures
from qwen_scope_lens.train.penalty import (
    FeatureRows,
    Penalty,
    record_residuals,
    require_graph,
)

require("trl", "train")

from trl import SFTConfig, SFTTrainer  # noqa: E402  (after a clear error where it is missing)
from trl.data_utils import get_dataset_column_names, pack_dataset  # noqa: E402

__all__ = ["PlainTrainer", "SASFTConfig", "SASFTTrainer", "build_penalty"]

NO_LANGUAGE = -1


class PlainTrainer(WholeCheckpoints, SFTTrainer):
    """TRL's SFTTrainer as it is, with checkpoints that are known to be whole."""


@dataclass
class SASFTConfig(SFTConfig):
    """SFTConfig with settings for the penalty. By default nothing is reported to other services.

    Args:
        lam: weight of the penalty. The paper does not give it for Qwen; the published code has
            0.0005 for Gemma-2 and 0.001 for Llama-3.1.
        layers: decoder layers; negative numbers count from the end. Published code: the last two.
        targets: the languages that replies in other languages should not switch to.
        features_per_layer: number of features per target language. Published code: 2.
        threshold: "mean" is the mean pre-activation on the text's language, "zero" is 0.
        positions: "predicting" counts the residuals from which a response token is predicted,
            "response" counts those of the response tokens themselves.
        language_column: the column with the language of each example, named as in the table.
        below_chance: also use features that do not stand out from chance.
        allow_other_model: train a model that may not be the one the features belong to.
    """

    lam: float = field(default=1e-3)
    layers: list[int] = field(default_factory=lambda: [-2, -1])
    targets: list[str] = field(default_factory=lambda: ["zh"])
    features_per_layer: int = field(default=2)
    threshold: Literal["mean", "zero"] = field(default="mean")
    positions: Literal["predicting", "response"] = field(default="predicting")
    language_column: str = field(default="language")
    below_chance: bool = field(default=False)
    allow_other_model: bool = field(default=False)
    report_to: Any = field(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("threshold", ("mean", "zero")),
            ("positions", ("predicting", "response")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} {getattr(self, name)!r}: expected one of {', '.join(allowed)}"
                )
        if not 0 <= self.lam < float("inf"):
            raise ValueError(f"lam {self.lam!r}: expected a finite number of 0 or more")
        if self.features_per_layer < 1 or not self.layers or not self.targets:
            raise ValueError("layers, targets and features_per_layer have to be one or more")
        if not all(isinstance(layer, int) for layer in self.layers):
            raise ValueError(f"layers {self.layers!r}: expected whole numbers")


class SASFTTrainer(WholeCheckpoints, SFTTrainer):
    """`SFTTrainer(..., language_features=table)`: CE + lam * sum_layers mean ReLU(pre - alpha).

    `language_features` is a `LanguageFeatures` or a file that `qsl train languages` wrote. The
    dataset needs a column with languages. Text in a target language costs nothing for the features
    of that language. Gradients reach the model but not the SAE.
    """

    _tag_names = ("trl", "sft", "sasft")
    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        args: SASFTConfig,
        *,
        language_features: LanguageFeatures | str | Path,
        **rest: Any,
    ) -> None:
        if not isinstance(args, SASFTConfig):
            raise WrongModel(f"args is a {type(args).__name__}: expected a SASFTConfig")
        if not isinstance(language_features, LanguageFeatures):
            language_features = LanguageFeatures.load(Path(language_features))
        self._language_number = {name: i for i, name in enumerate(language_features.languages)}
        if not isinstance(model, str):  # before the dataset is read
            _check_model(model, args, language_features)
        super().__init__(model, args, **rest)
        self.data_collator = _WithLanguages(self.data_collator)
        self._penalty = build_penalty(self.model, args, language_features)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any
    ) -> Any:
        column = args.language_column
        if column not in get_dataset_column_names(dataset):
            raise BadCorpus(
                f"the dataset has no column {column!r} with the language of each example: it has"
                f" {', '.join(get_dataset_column_names(dataset))}"
            )
        # TRL packs only input_ids and labels, so packing is done here after languages are added.
        whole = copy.copy(args)
        if packing:
            whole.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, *rest)
        dataset = dataset.map(self._language_of_every_token, fn_kwargs={"column": column})
        if packing:
            dataset = dataset.select_columns(["input_ids", "labels", "languages"])
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
        return dataset

    def _language_of_every_token(self, example: dict[str, Any], column: str) -> dict[str, Any]:
        number = self._language_number.get(example[column])
        if number is None:
            raise UnknownName(
                f"an example is in {example[column]!r}, but the table of language features knows"
                f" {', '.join(self._language_number)}. Make the table with texts in that language"
            )
        return {"languages": [number] * len(example["input_ids"])}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "languages" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "languages"]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        languages = inputs.pop("languages")
        labels = inputs["labels"]
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with record_residuals(model, tuple(self._penalty.rows)) as residuals:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        counted = counted_tokens(labels, languages, self.args.positions)
        with torch.set_grad_enabled(self.args.lam > 0):
            if self.args.lam > 0:
                require_graph(residuals)
            penalty = self._penalty.loss(residuals, languages, counted)
        mean = self.accelerator.gather_for_metrics(penalty.detach()).mean().item()
        self._metrics["train"]["penalty"].append(mean)
        if self.args.lam > 0:
            # The penalty is a mean over this micro-batch. If TRL's loss is already divided by the
            # accumulation steps, the penalty has to be divided as well.
            steps = (
                self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            )
            loss = loss + self.args.lam * penalty.to(loss.device) / steps
        return (loss, outputs) if return_outputs else loss


def build_penalty(model: Any, args: SASFTConfig, table: LanguageFeatures) -> Penalty:
    """Encoder rows of the chosen features, and their thresholds on each language of the table."""
    from qwen_scope_lens.saes.load import open_sae

    _check_model(model, args, table)
    count = len(decoder_layers(model))
    rows: dict[int, FeatureRows] = {}
    thresholds: dict[int, torch.Tensor] = {}
    for given in args.layers:
        layer = given + count if given < 0 else given
        if not 0 <= layer < count:
            raise UnknownName(f"layer {given} is not in {describe(model)}: it has {count}")
        chosen = (layer, args.targets, args.features_per_layer)
        features = table.of(*chosen, below_chance=args.below_chance)
        _name_what_is_left_out(table.of(*chosen, below_chance=True), features)
        sae = open_sae(features[0].ref.sae)
        if sae.cfg.d_in != model.config.get_text_config().hidden_size:
            raise WrongModel(
                f"{features[0].ref.sae} reads residuals of width {sae.cfg.d_in},"
                f" {describe(model)} has {model.config.get_text_config().hidden_size}"
            )
        rows[layer] = FeatureRows.of(sae, [feature.ref.feature for feature in features])
        thresholds[layer] = torch.tensor(
            [
                [
                    float("inf")
                    if feature.language == language
                    else (feature.pre_activation[language] if args.threshold == "mean" else 0.0)
                    for feature in features
                ]
                for language in table.languages
            ]
        )
    return Penalty(rows, thresholds)


def _check_model(model: Any, args: SASFTConfig, table: LanguageFeatures) -> None:
    for row in {
        feature.ref.sae.row.short: feature.ref.sae.row for feature in table.features
    }.values():
        check_backbone(model, row, allow_other_model=args.allow_other_model)


def _name_what_is_left_out(
    best: Sequence[LanguageFeature], used: Sequence[LanguageFeature]
) -> None:
    for feature in best:
        if not (feature in used or feature.stands_out):
            warnings.warn(
                f"{feature.ref} is left out of the loss: its monolinguality for {feature.language}"
                f" is {feature.monolinguality:.3g}, chance reaches {feature.chance:.3g}"
                " (below_chance=True uses it anyway)",
                stacklevel=3,
            )


def counted_tokens(labels: torch.Tensor, languages: torch.Tensor, positions: str) -> torch.Tensor:
    """Which residuals the penalty counts. `-> bool [batch, position]`

    The residual at t predicts the token at t + 1, because the model shifts labels. At the end of a
    packed document the next label is masked (-100), so no document affects the next one.
    """
    response = labels != -100
    if positions == "predicting":
        response = torch.cat([response[:, 1:], torch.zeros_like(response[:, :1])], dim=1)
    return response & (languages != NO_LANGUAGE)


class _WithLanguages:
    """A collator that also pads and flattens the languages of tokens, like the token ids."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [torch.tensor(example["languages"]) for example in examples]
        batch: dict[str, Any] = self.inner(
            [{k: v for k, v in example.items() if k != "languages"} for example in examples]
        )
        shape = batch["input_ids"].shape
        if len(shape) == 2 and shape[0] == 1 and len(rows) > 1:  # padding-free: one long row
            rows = [torch.cat(rows)]
        languages = torch.full(shape, NO_LANGUAGE)
        for number, row in enumerate(rows):
            languages[number, : len(row)] = row
        batch["languages"] = languages
        return batch
