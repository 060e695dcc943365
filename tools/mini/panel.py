"""Step 6: a panel of checkpoints that differ in training steps and data, for evaluation studies.

Five short runs of a smaller Qwen3, each on another mixture of the corpus, each kept at several
points. There is one float16 file per checkpoint, one configuration for all, and an index with what
each saw. Usage: `python -m tools.mini.panel [--out benchmarks/data/panel]`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tools.mini.corpus import work_folder
from tools.mini.data import token_rows
from tools.mini.durations import measured
from tools.mini.model import held_out_loss, train
from tools.mini.quality import group_of
from tools.mini.specs import ModelSpec

__all__ = ["MIXTURES", "load_checkpoint", "make"]

Record = dict[str, Any]

MIXTURES: dict[str, Callable[[Record], bool]] = {
    "all": lambda record: True,
    "no-code": lambda record: record["domain"] != "code",
    "english": lambda record: record["lang"] in ("en", "math", "python"),
    "tasks": lambda record: record["domain"] not in ("prose", "code"),
    "prose": lambda record: record["domain"] in ("prose", "code"),
}
"""Which documents of the training split a run sees."""

SNAPSHOTS = (0.12, 0.3, 0.6)


def panel_spec(mixture: str) -> ModelSpec:
    return ModelSpec(
        name=f"panel-{mixture}",
        family="qwen3",
        tokens=1_000_000,
        d_model=64,
        layers=4,
        heads=2,
        kv_heads=1,
        d_mlp=192,
        batch_tokens=2048,
        seed=23,
        snapshots=SNAPSHOTS,
    )


def load_checkpoint(folder: Path, name: str) -> Any:
    """One model of the panel, in float32."""
    model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(str(folder)))
    state = load_file(folder / f"{name}.safetensors")
    model.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    model.tie_weights()
    return model.eval()


def make(work: Path, out: Path) -> list[Record]:
    """Train what is missing and write the panel; returns its index."""
    records, rows = token_rows(work, "train")
    held_records, held_rows = token_rows(work, "valid")
    groups = {
        group: [
            row
            for record, row in zip(held_records, held_rows, strict=True)
            if group_of(record) == group
        ][:40]
        for group in ("en", "zh", "code", "arithmetic")
    }
    out.mkdir(parents=True, exist_ok=True)
    index: list[Record] = []
    for mixture, keep in MIXTURES.items():
        spec = panel_spec(mixture)
        seen = [row for record, row in zip(records, rows, strict=True) if keep(record)]
        final = train(spec, work, seen)
        points = {int(path.name.split("-")[-1]): path for path in final.parent.glob("snapshot-*")}
        points[spec.tokens] = final
        for tokens, path in sorted(points.items()):
            name = f"{mixture}-{round(tokens / 1000):04d}k"
            model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()
            state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
            state.pop("lm_head.weight", None)
            save_file(state, out / f"{name}.safetensors")
            model.config.save_pretrained(out)
            losses = {group: round(held_out_loss(model, part), 3) for group, part in groups.items()}
            index.append({"name": name, "mixture": mixture, "tokens": tokens, "losses": losses})
            print(json.dumps(index[-1]), flush=True)
    partial = out / "index.partial"
    partial.write_text(json.dumps(index, indent=1) + "\n", "utf-8")
    os.replace(partial, out / "index.json")
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default=None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/data/panel"))
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    work = work_folder(arguments.work)
    with measured(work, "panel"):
        index = make(work, arguments.out)
    print(f"panel: {len(index)} checkpoints in {arguments.out}")


if __name__ == "__main__":
    main()
