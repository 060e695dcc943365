"""What an extraction costs, on paper: GPU hours, bytes and files, from the rows of the catalog.

The assumptions, all of them arguments or constants of this file: a forward pass takes two floating
point operations per active parameter and token, and the number of parameters is the one in the
model's name. A model is read only as deep as its last stored layer. An SAE takes one product of
`d_model` with `d_sae`; selecting, attention scores and copying are not counted. Both reach the
device's peak in bfloat16 times a utilisation. Bytes and writing times per non-zero
are those that `benchmarks/store_scale.py` measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwen_scope_lens.catalog import GROUPS, Backbone, Group
from qwen_scope_lens.errors import LayerOutOfRange, TooLittleData, WrongSettings
from qwen_scope_lens.tables import Table

__all__ = ["Cost", "Job", "cost", "cost_table"]

BY_TOKEN, BY_FEATURE = 4.0, 3.5
"""Bytes per non-zero of the two views of a layer's codes."""
WIDE = 1.0
"""One more byte per non-zero where an SAE has more than 65,536 features."""
PER_TOKEN = 14.0
"""Bytes per token of the text, the tokens and their places."""
WRITING = 12.0
"""CPU seconds per million tokens and layer to round, sort, compress and hash, at k = 50."""
PER_SHARD, PER_LAYER = 4, 5
"""Files of a shard: its own ones, and those of each layer."""


@dataclass(frozen=True)
class Job:
    """What is to be extracted, and on what."""

    tokens: float = 1e9
    layers: int | None = None  # the first so many; None: all
    tokens_per_document: float = 250
    shard_docs: int = 4096
    peak: float = 989e12  # operations per second; an H100 in bfloat16, as its maker says
    utilisation: float = 0.4

    def __post_init__(self) -> None:
        sizes = (self.tokens, self.tokens_per_document, self.shard_docs, self.peak)
        if not all(0 < size < 1e24 for size in sizes) or not 0 < self.utilisation <= 1:
            raise WrongSettings(f"{self}: expected sizes above 0, and a utilisation from 0 to 1")


@dataclass(frozen=True)
class Cost:
    """The cost of one job with one group of SAEs."""

    group: str
    layers: int
    forward_hours: float  # GPU hours
    sae_hours: float
    writing_hours: float  # CPU hours
    bytes: float
    shards: int
    files: int

    @property
    def gpu_hours(self) -> float:
        return self.forward_hours + self.sae_hours


def parameters(backbone: Backbone) -> float:
    """The active parameters of a model, by its name: 8e9 for `Qwen3-8B`, 3e9 for `30B-A3B`."""
    found = re.search(r"-A(\d+(?:\.\d+)?)B", backbone.model_id) or re.search(
        r"-(\d+(?:\.\d+)?)B", backbone.model_id
    )
    if found is None:
        raise TooLittleData(f"{backbone.model_id} does not say how many parameters it has")
    return float(found[1]) * 1e9


def cost(group: Group, job: Job) -> Cost:
    """What `job` costs with the SAEs of `group`."""
    depth = len(group.layers) if job.layers is None else job.layers
    if not 1 <= depth <= len(group.layers):
        raise LayerOutOfRange(
            f"the first {depth} layers: expected 1 to {len(group.layers)}, which {group.short} has"
        )
    last = group.layers[depth - 1]
    share = (last + 1) / group.backbone.num_layers
    speed = job.peak * job.utilisation * 3600
    entries = job.tokens * depth * group.k
    wide = WIDE if group.d_sae > 1 << 16 else 0.0
    shards = math.ceil(job.tokens / job.tokens_per_document / job.shard_docs)
    return Cost(
        group=group.short,
        layers=depth,
        forward_hours=2 * parameters(group.backbone) * share * job.tokens / speed,
        sae_hours=2 * group.d_model * group.d_sae * depth * job.tokens / speed,
        writing_hours=WRITING * entries / 50 / 1e6 / 3600,
        bytes=entries * (BY_TOKEN + BY_FEATURE + wide) + job.tokens * PER_TOKEN,
        shards=shards,
        files=shards * (PER_SHARD + depth * (PER_LAYER + bool(wide))) + 1,
    )


def cost_table(job: Job, groups: Sequence[Group] | None = None) -> Table:
    """One row per group of SAEs; by default all that Qwen published. A group with fewer layers
    than the job takes part with all of its own if another one has so many."""
    wanted = [g for g in GROUPS if g.origin == "official"] if groups is None else groups
    deepest = cost(max(wanted, key=lambda group: len(group.layers)), job).layers
    rows = [cost(group, replace(job, layers=min(deepest, len(group.layers)))) for group in wanted]
    return Table.of(
        (
            "group",
            "layers",
            "GPU h model",
            "GPU h SAEs",
            "GPU h",
            "CPU h writing",
            "TB",
            "shards",
            "files",
        ),
        (
            (
                row.group,
                row.layers,
                row.forward_hours,
                row.sae_hours,
                row.gpu_hours,
                row.writing_hours,
                row.bytes / 1e12,
                row.shards,
                row.files,
            )
            for row in rows
        ),
        above=(
            f"{job.tokens:,.0f} tokens, {job.tokens_per_document:g} per document,"
            f" {job.shard_docs:,} documents per shard;"
            f" {job.peak / 1e12:g} Tflop/s at {job.utilisation:.0%}",
        ),
        below=("On paper: operations by peak and utilisation, bytes and CPU hours as measured.",),
        formats=dict.fromkeys(("GPU h model", "GPU h SAEs", "GPU h", "CPU h writing"), ",.0f")
        | {"TB": ",.1f", "shards": ",", "files": ","},
    )
