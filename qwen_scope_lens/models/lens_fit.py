"""Fit a Jacobian lens, and measure how well a lens tells what the model will say.

transformer-lens has the estimator. Here it runs text by text, and after each text the sum of the
matrices is written beside the target (`FILE.part`, in the form of the reference's checkpoints), so
that the same call goes on after an interruption. The lens itself is written at the end, or when the
minutes are over, with its card: from how many texts and tokens it comes, and its agreement with the
model on held-out texts beside that of the logit lens.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qwen_scope_lens.catalog import name_of_model
from qwen_scope_lens.errors import BadFile, LayerOutOfRange, TooLittleData
from qwen_scope_lens.files import exclusive, whole_file
from qwen_scope_lens.models.architecture import d_model, decoder_layers, describe
from qwen_scope_lens.models.jacobian import Lens, read_lens
from qwen_scope_lens.models.residuals import iter_captures
from qwen_scope_lens.models.unembedding import Unembedding, read_unembedding
from qwen_scope_lens.tables import Table

__all__ = ["LensQuality", "fit_lens", "lens_quality", "quality_table"]

SKIPPED = 1
"""Leading positions that do not count: the first token of a Qwen model has an extreme norm."""
LEAST_TOKENS = SKIPPED + 2
AT_ONCE = 64
"""Positions whose distributions over the vocabulary are in memory at a time."""


@dataclass(frozen=True)
class LensQuality:
    """How near the readouts of one layer are to the model's own distribution, over all positions.

    KL is that of the readout from the model's, in nats; `same_top` is how often both have the same
    most probable token. `plain_` is the logit lens.
    """

    layer: int
    positions: int
    kl: float
    plain_kl: float
    same_top: float
    plain_same_top: float


def fit_lens(
    bridge: Any,
    texts: Sequence[str],
    path: str | Path,
    *,
    corpus: str,
    layers: Iterable[int] | None = None,
    batch: int = 16,
    tokens: int = 128,
    held_out: Sequence[str] = (),
    minutes: float | None = None,
    progress: bool = False,
) -> Lens:
    """Fit a lens with transformer-lens, or go on with it, and write its file.

    Costs `d_model / batch` backward passes of `batch` copies per text. A hundred texts of 128
    tokens are usable, says its reference; published lenses use a thousand.

    Args:
        bridge: from `load_model(name, full_hooks=True)`; float32 is the most exact.
        texts: each counts alike; those of fewer than three tokens are left out.
        corpus: what the texts are, in words, for the card.
        layers: which get a matrix; by default all but the last, which needs none.
        batch: output dimensions per backward pass. More are faster, and need more memory.
        tokens: how much of a text is read.
        held_out: texts on which the finished lens is compared with the logit lens.
        minutes: stop after the text during which they end, and write what there is by then.
    """
    path = Path(path).expanduser()
    last = len(decoder_layers(bridge)) - 1
    chosen = sorted(set(range(last) if layers is None else layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= last:
        raise LayerOutOfRange(
            f"a lens for the layers {', '.join(map(str, chosen)) or '(none)'}: expected some of 0"
            f" to {last - 1}. The last layer needs none"
        )
    rows = [bridge.to_tokens(text)[:, :tokens] for text in texts]
    kept = [
        (text, row.shape[1])
        for text, row in zip(texts, rows, strict=True)
        if row.shape[1] >= LEAST_TOKENS
    ]
    if not kept:
        raise TooLittleData(f"none of {len(texts)} texts has {LEAST_TOKENS} tokens or more")
    settings = {
        "model": name_of_model(describe(bridge)),
        "texts": _digest([text for text, _ in kept]),
        "layers": chosen,
        "tokens": tokens,
        "dtype": str(next(bridge.parameters()).dtype).removeprefix("torch."),
    }
    with exclusive(path.parent, name=f".{path.name}.lock"):
        done = _Sums.go_on(path, settings, chosen, d_model(bridge))
        end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        with tqdm(total=len(kept), initial=done.texts, unit="text", disable=not progress) as bar:
            for text, length in kept[done.texts :]:
                if time.monotonic() >= end and done.texts:
                    break
                done.add(bridge, text, length, batch, tokens, path)
                bar.update()
        _write(done, path, corpus, settings, len(kept), ())
        if held_out:
            lens = read_lens(path, d_model(bridge))
            quality = lens_quality(bridge, lens, held_out, tokens=tokens)
            _write(done, path, corpus, settings, len(kept), quality)
        if done.texts == len(kept):
            done.place(path).unlink(missing_ok=True)
    return read_lens(path, d_model(bridge))


@torch.no_grad()
def lens_quality(
    model: Any,
    lens: Lens,
    texts: Sequence[str],
    *,
    layers: Iterable[int] | None = None,
    tokens: int = 128,
) -> list[LensQuality]:
    """The agreement of a lens, and of the logit lens, with what the model says after each position.

    Positions are those that a fit counts: all but the first and the last of a text.
    """
    chosen = sorted(lens.matrices if layers is None else set(layers))
    last = len(decoder_layers(model)) - 1
    end = read_unembedding(model)
    sums = {layer: torch.zeros(4, dtype=torch.float64) for layer in chosen}
    positions = 0
    reads = iter_captures(
        model, list(texts), sorted({*chosen, last}), truncate=True, max_tokens=tokens
    )
    for read in reads:
        ends = read.offsets[1:] - 1
        inner = torch.ones(len(read.token_ids), dtype=torch.bool)
        inner[ends] = False
        inner &= ~read.first.cpu()
        at = inner.nonzero().flatten()
        positions += len(at)
        for some in at.split(AT_ONCE):
            said = _log_probabilities(end, read.residuals[last][some])
            for layer in chosen:
                x = read.residuals[layer][some].float()
                for place, moved in enumerate((lens.push(layer, x), x)):
                    guess = _log_probabilities(end, moved)
                    kl = (said.exp() * (said - guess)).sum(-1)
                    same = said.argmax(-1) == guess.argmax(-1)
                    sums[layer][place] += kl.double().sum()
                    sums[layer][2 + place] += same.double().sum()
    if not positions:
        raise TooLittleData(f"none of {len(texts)} texts has {LEAST_TOKENS} tokens or more")
    return [
        LensQuality(layer, positions, *(float(one) / positions for one in sums[layer]))
        for layer in chosen
    ]


def quality_table(quality: Sequence[LensQuality]) -> Table:
    """A row per layer, the lens beside the logit lens."""
    columns = ("layer", "positions", "KL", "logit lens", "same top token", "of the logit lens")
    return Table.of(
        columns,
        [
            (one.layer, one.positions, one.kl, one.plain_kl, one.same_top, one.plain_same_top)
            for one in quality
        ],
        below=("", "KL: of the readout from what the model says next, nats per position"),
        formats={"KL": ".2f", "logit lens": ".2f", columns[4]: ".1%", columns[5]: ".1%"},
    )


def _log_probabilities(end: Unembedding, x: Tensor) -> Tensor:
    return end.logits(x.cpu()).log_softmax(-1)


class _Sums:
    """What is done of a fit: the sum of the matrices over the texts so far."""

    def __init__(self, settings: dict[str, Any], sums: dict[int, Tensor]) -> None:
        self.settings, self.sums = settings, sums
        self.texts, self.tokens, self.seconds = 0, 0, 0.0
        self.facts: dict[str, Any] = {}  # transformer-lens's own, of the last text

    @staticmethod
    def place(path: Path) -> Path:
        return path.with_name(f"{path.name}.part")

    @classmethod
    def go_on(cls, path: Path, settings: dict[str, Any], layers: list[int], width: int) -> _Sums:
        """What an earlier call left beside `path`, or nothing yet. Other settings are refused."""
        place = cls.place(path)
        new = cls(settings, {layer: torch.zeros(width, width) for layer in layers})
        if not place.exists():
            return new
        try:
            found = torch.load(place, map_location="cpu", weights_only=True)
            facts = found["metadata"]
            shapes = {layer: tuple(one.shape) for layer, one in found["jacobian_sum"].items()}
            numbers = facts["texts_done"], facts["tokens_done"], facts["seconds"]
            theirs = facts["settings"]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError,
                pickle.UnpicklingError) as error:  # fmt: skip
            raise BadFile(
                f"{place} is damaged ({str(error).splitlines()[0]:.120}): delete it, and the fit"
                " begins anew"
            ) from error
        if theirs != settings or shapes != dict.fromkeys(layers, (width, width)):
            other = [key for key in settings if theirs.get(key) != settings[key]]
            raise BadFile(
                f"{place} is of a fit with other {', '.join(other) or 'layers'}: give the same ones"
                " to go on, delete it to begin anew, or write to another file"
            )
        new.sums = found["jacobian_sum"]
        new.texts, new.tokens, new.seconds = int(numbers[0]), int(numbers[1]), float(numbers[2])
        new.facts = facts["fit"]
        return new

    def add(self, bridge: Any, text: str, length: int, batch: int, tokens: int, path: Path) -> None:
        from transformer_lens.tools.analysis import JacobianLens

        start = time.monotonic()
        found = JacobianLens.fit(
            bridge,
            [text],
            corpus="one text",
            source_layers=list(self.sums),
            dim_batch=batch,
            max_seq_len=tokens,
            skip_first_positions=SKIPPED,
            show_progress=False,
        )
        for layer, matrix in found.jacobians.items():
            self.sums[layer] += matrix
        self.texts, self.tokens = self.texts + 1, self.tokens + length
        self.seconds += time.monotonic() - start
        self.facts = found.metadata
        with whole_file(self.place(path)) as partial:
            torch.save(
                {
                    "jacobian_sum": self.sums,
                    "n_done": self.texts,
                    "next_idx": self.texts,
                    "source_layers": list(self.sums),
                    "target_layer": found.metadata["target_layer"],
                    "skip_first": SKIPPED,
                    "metadata": {
                        "settings": self.settings,
                        "texts_done": self.texts,
                        "tokens_done": self.tokens,
                        "seconds": self.seconds,
                        "fit": self.facts,
                    },
                },
                partial,
            )


def _write(
    done: _Sums,
    path: Path,
    corpus: str,
    settings: dict[str, Any],
    wanted: int,
    quality: Sequence[LensQuality],
) -> None:
    from transformer_lens.tools.analysis import JacobianLens

    card = {
        "model": settings["model"],
        "texts": done.texts,
        "texts_wanted": wanted,
        "tokens": done.tokens,
        "tokens_per_text": settings["tokens"],
        "texts_sha256": settings["texts"],
        "seconds": round(done.seconds, 1),
        "held_out": [asdict(one) for one in quality],
    }
    # transformer-lens compares this name with the bridge's, which for bundled models is a place.
    own = {} if settings["model"] == done.facts["model_name"] else {"model_name": None}
    made = JacobianLens(
        {layer: one / done.texts for layer, one in done.sums.items()},
        n_prompts=done.texts,
        d_model=len(next(iter(done.sums.values()))),
        metadata={**done.facts, **own, "corpus": corpus, "n_prompts": done.texts, "card": card},
    )
    with whole_file(path) as partial:
        made.save(str(partial))


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]
