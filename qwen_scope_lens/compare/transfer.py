"""Measure one group of SAEs on several related models: does an SAE still fit?

Related models are for example a base model, an instruct version, a quantised version or a merged
adapter. The first model is the reference, and a random SAE is the lower bound. `fidelity.py`
measures each pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_scope_lens.compare.fidelity import Fidelity, fidelity
from qwen_scope_lens.errors import NotACheckpoint, TooLittleData, UnknownName
from qwen_scope_lens.extras import require
from qwen_scope_lens.files import read_text, write_json
from qwen_scope_lens.models.tokenize import Content
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.tables import Table, View

__all__ = ["Transfer", "load_related", "random_sae", "transfer"]

FORMAT, VERSION = "qwen-scope-transfer", 1
FLOOR = "random SAE"


@dataclass(frozen=True, repr=False)
class Transfer(View):
    """Fidelity per model and layer; the last row is the random SAE on the first model."""

    sae: str
    rows: dict[str, dict[int, Fidelity]]  # model -> layer -> figures
    texts: int
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        rows = [
            {"model": model, **asdict(found), "recovered": found.recovered}
            for model, layers in self.rows.items()
            for found in layers.values()
        ]
        return {"sae": self.sae, "rows": rows, "texts": self.texts, "settings": self.settings}

    def save(self, path: str | Path) -> None:
        write_json(Path(path), FORMAT, VERSION, self.to_dict())

    def table(self, most: int | None = None) -> Table:
        """One row per layer and model."""
        rows = [
            (n, model, one.fvu, one.l0, one.loss, one.spliced, one.zeroed, one.recovered)
            for n in next(iter(self.rows.values()))
            for model, one in ((model, layers[n]) for model, layers in self.rows.items())
        ]
        return Table.of(
            ("layer", "model", "FVU", "L0", "loss", "spliced", "zeroed", "recovered"),
            rows[:most],
            above=(f"{self.sae} on {self.texts} texts",),
            more=len(rows) - len(rows[:most]),
            formats={"L0": ".1f"},
        )


def transfer(
    saes: Mapping[int, LayerSAE],
    models: Mapping[str, Any],
    texts: Sequence[Content],
    *,
    name: str = "SAE",
    losses: bool = True,
    seed: int = 0,
    **options: Any,
) -> Transfer:
    """Measure `{layer: SAE}` on `{name: model}`; `options` are those of `fidelity`.

    The models are measured one after another. A value may also be a function that loads the model,
    which is called when its turn comes.
    """
    if not models or not saes:
        raise TooLittleData("expected at least one model and one SAE")
    from tqdm import tqdm

    rows: dict[str, dict[int, Fidelity]] = {}
    floor: dict[int, Fidelity] = {}
    total = (len(models) + 1) * len(texts)
    with tqdm(total=total, unit="doc", desc="transfer", disable=None) as bar:
        for model_name, given in models.items():
            model = given() if callable(given) and not isinstance(given, torch.nn.Module) else given
            settled = {"losses": losses, "progress": bar.update, **options}
            rows[model_name] = fidelity(model, saes, texts, **settled)
            if not floor:
                noise = {layer: random_sae(sae, seed + layer) for layer, sae in saes.items()}
                floor = fidelity(model, noise, texts, **settled)
            del model
    rows[FLOOR] = floor
    plain = {k: v for k, v in options.items() if isinstance(v, (int, float, str, type(None)))}
    settings = {"losses": losses, "seed": seed, "reference": next(iter(models)), **plain}
    return Transfer(name, rows, len(texts), settings)


def random_sae(sae: LayerSAE, seed: int = 0) -> LayerSAE:
    """An SAE of the same sizes, k and `b_dec` that encodes and decodes with random unit directions.

    An activation is the projection of `x - b_dec` on its direction. It shows what a dictionary
    reaches that knows only the mean.
    """
    rng = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(sae.cfg.d_sae, sae.cfg.d_in, generator=rng), dim=-1
    ).to(sae.W_dec.device, sae.W_dec.dtype)
    return type(sae).of(
        sae.cfg,
        {
            "W_enc": directions.T.contiguous(),
            "W_dec": directions,
            "b_enc": -(directions @ sae.b_dec.detach()),
            "b_dec": sae.b_dec.detach().clone(),
        },
    )


def load_related(name: str, **options: Any) -> Any:
    """Load a model by name or folder; an adapter is merged into the base model that it names."""
    from qwen_scope_lens.models.checkpoint import check_folder, in_short
    from qwen_scope_lens.models.open import keep_tokenizer, open_model
    from qwen_scope_lens.models.tokenize import find_tokenizer

    folder = Path(name)
    if not (folder / "adapter_config.json").is_file():
        if name.startswith((".", "/")) and not folder.is_dir():
            raise UnknownName(f"{name} is not a folder: expected a model's folder or a hub name")
        return open_model(name, **options)
    peft = require("peft", "train")
    import json

    check_folder(name)
    try:
        content = json.loads(read_text(folder / "adapter_config.json"))
        base = str(content["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise NotACheckpoint(
            f"{folder / 'adapter_config.json'} does not name a base model ({error!r:.100}):"
            " expected a file that PEFT's save_pretrained wrote"
        ) from error
    model = open_model(base, **options)
    tokenizer = find_tokenizer(model)
    try:
        adapted = peft.PeftModel.from_pretrained(model, folder)
    except Exception as error:  # a file that is cut off, settings that no version of PEFT knows
        raise NotACheckpoint(
            f"the adapter in {name} is damaged or does not fit {base} ({in_short(error)})"
        ) from error
    return keep_tokenizer(adapted.merge_and_unload().eval(), tokenizer)
