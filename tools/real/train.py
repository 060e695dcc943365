"""Step 3: a TopK SAE per layer, by SAELens's trainer, from captured residuals; resumable.

The loop goes through `SAETrainer`'s public steps, so that a checkpoint is a whole folder or absent
and the next run takes up the same batch, optimiser and learning rate. Inputs are scaled to a common
norm for training and decoder norms count as one; both are folded into the weights at the end
(`folded`), which leaves a plain `TopK(ReLU(x W_enc + b_enc))` with decoder columns of length one.
Usage: `python -m tools.real.train --work WORK [--layers 4,10] --samples N [--shards N]`.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from qwen_scope_lens.errors import CannotWrite
from qwen_scope_lens.files import exclusive, read_json, whole_file, whole_folder, write_json
from tools.real.capture import residuals_folder
from tools.real.shards import Layer, Source, shards_there

__all__ = ["MADE_BY", "Run", "folded", "read_run", "sae_folder", "train_layer"]

FORMAT = "qsl-real-sae-run"
MADE_BY = "python -m tools.real.train"
PROBE = 50_000
"""Positions that the scale, the mean and the first directions are taken from."""


@dataclass(frozen=True)
class Run:
    """Everything that decides about the weights of one layer's SAE."""

    layer: int
    d_model: int
    shards: int  # of the captured ones, the first
    samples: int  # rows that the trainer sees, repeats included
    width: int = 16  # features per dimension of the residual
    k: int = 50
    batch: int = 2048
    lr: float = 1e-3
    warm_up: int = 100  # steps
    dead_window: int = 100  # steps without firing after which a feature counts as dead
    autocast: bool = True  # bfloat16 products in training, float32 weights
    seed: int = 3

    @property
    def d_sae(self) -> int:
        return self.width * self.d_model

    @property
    def steps(self) -> int:
        return self.samples // self.batch


def sae_folder(work: Path, layer: int) -> Path:
    """The folder of a layer's run: settings, checkpoint, in the end `sae.pt`, `done.json`."""
    return work / "saes" / f"layer{layer}"


def read_run(folder: Path) -> tuple[Run, dict[str, Any]]:
    """The settings of a layer's run, and what it has written about itself at its end."""
    run = Run(**read_json(folder / "run.json", FORMAT, 1, MADE_BY))
    return run, read_json(folder / "done.json", f"{FORMAT}-done", 1, MADE_BY)


def batches(data: Layer, run: Run, scale: float, start: int) -> Iterator[Tensor]:
    """Shuffled batches `[batch, d_model]` without end; step `n` is the same in every run."""
    per_epoch = len(data) // run.batch
    step = start
    while True:
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng([run.seed, epoch]).permutation(len(data))
        for number in range(at, per_epoch):
            rows = order[number * run.batch : (number + 1) * run.batch]
            yield data.take(rows).mul_(scale)
            step += 1


def fresh(data: Layer, run: Run) -> tuple[TopKTrainingSAE, float]:
    """An SAE that begins with directions of real positions around their mean, and the scale.

    Such a beginning leaves few features dead. The biases begin as if the mean were subtracted.
    """
    torch.manual_seed(run.seed)
    chosen = np.random.default_rng(run.seed).permutation(len(data))[: max(PROBE, run.d_sae)]
    probe = data.take(chosen)
    scale = run.d_model**0.5 / float(probe.norm(dim=-1).mean())
    mean = probe.mean(0) * scale
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=run.d_model,
            d_sae=run.d_sae,
            k=run.k,
            device="cpu",
            apply_b_dec_to_input=False,
            normalize_activations="none",
            rescale_acts_by_decoder_norm=True,
            aux_loss_coefficient=1 / 32,
        )
    )
    with torch.no_grad():
        picked = torch.randint(len(probe), (run.d_sae,))
        if len(probe) >= run.d_sae:
            picked = torch.randperm(len(probe))[: run.d_sae]
        towards = torch.nn.functional.normalize(probe[picked] * scale - mean, dim=-1)
        sae.W_dec.copy_(towards * sae.W_dec.norm(dim=-1).mean())
        sae.W_enc.copy_(towards.T * sae.W_enc.norm(dim=0).mean())
        sae.b_dec.copy_(mean)
        sae.b_enc.copy_(-(mean @ sae.W_enc))
    return sae, scale


def trainer_of(run: Run, sae: TopKTrainingSAE, data: Iterator[Tensor]) -> SAETrainer[Any, Any]:
    config = SAETrainerConfig(
        total_training_samples=run.steps * run.batch,
        train_batch_size_samples=run.batch,
        lr=run.lr,
        lr_end=run.lr / 10,
        lr_warm_up_steps=min(run.warm_up, run.steps // 4),
        lr_decay_steps=run.steps // 2,
        device="cpu",
        autocast=run.autocast,
        dead_feature_window=run.dead_window,
        feature_sampling_window=10**9,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(config, sae, data)


def train_layer(work: Path, run: Run, save_every: int = 25) -> Path:
    """Train one layer's SAE, or go on with it; a finished one is left as it is."""
    folder = sae_folder(work, run.layer)
    with exclusive(folder):
        _claim(folder, run)
        if (folder / "done.json").exists():
            print(f"layer {run.layer}: done before", flush=True)
            return folder
        data = Layer(residuals_folder(work), "train", run.layer, run.shards)
        if len(data) < run.batch or run.steps < 1:
            raise CannotWrite(
                f"{len(data)} positions and {run.samples} samples do not fill one batch of"
                f" {run.batch}: capture more, or ask for a smaller --batch"
            )
        saved = _latest(folder)
        if saved is None:
            sae, scale = fresh(data, run)
            step, seconds = 0, 0.0
        else:
            facts = read_json(saved / "progress.json", f"{FORMAT}-progress", 1, MADE_BY)
            step, seconds, scale = facts["step"], facts["seconds"], facts["scale"]
            sae = TopKTrainingSAE.load_from_disk(saved)
        trainer = trainer_of(run, sae, batches(data, run, scale, step))
        if saved is not None:
            trainer.load_trainer_state(saved)
        started = time.monotonic()
        while trainer.n_training_steps < run.steps:
            loss = trainer.step(next(trainer.data_provider)).losses["mse_loss"].item()
            trainer.n_training_steps += 1
            if trainer.n_training_steps % save_every == 0 or trainer.n_training_steps == run.steps:
                spent = seconds + time.monotonic() - started
                _save(folder, trainer, scale, spent)
                _report(run, trainer, loss, spent, trainer.n_training_steps - step, started)
        tensors = folded(trainer.sae, scale)
        with whole_file(folder / "sae.pt") as partial:
            torch.save(tensors, partial)
        facts = {
            "seconds": seconds + time.monotonic() - started,
            "scale": scale,
            "positions": len(data),
            "captured": data.seen,
            "samples": trainer.n_training_samples,
        }
        write_json(folder / "done.json", f"{FORMAT}-done", 1, facts)
        if (last := _latest(folder)) is not None:
            shutil.rmtree(last)
    return folder


def _claim(folder: Path, run: Run) -> None:
    """Write the run's settings, or raise where the folder holds another run."""
    path = folder / "run.json"
    if not path.exists():
        write_json(path, FORMAT, 1, asdict(run))
        return
    theirs = read_json(path, FORMAT, 1, MADE_BY)
    wrong = [name for name, value in asdict(run).items() if theirs.get(name) != value]
    if wrong:
        said = "; ".join(f"{n}: there {theirs.get(n)!r}, here {getattr(run, n)!r}" for n in wrong)
        raise CannotWrite(
            f"{folder} holds a run with other settings ({said}): go on with the same, move the"
            " folder away, or choose another --work"
        )


def _shards_before(work: Path, layer: int) -> int | None:
    """How many shards a begun run learns from: capturing more of them does not change it."""
    path = sae_folder(work, layer) / "run.json"
    return int(read_json(path, FORMAT, 1, MADE_BY)["shards"]) if path.exists() else None


def _latest(folder: Path) -> Path | None:
    found = [path for path in folder.glob("step-*") if path.is_dir()]
    return max(found, default=None, key=lambda path: int(path.name.removeprefix("step-")))


def _save(folder: Path, trainer: SAETrainer[Any, Any], scale: float, seconds: float) -> None:
    """A checkpoint under its own name; the one before goes only when this one is whole."""
    before = _latest(folder)
    step = trainer.n_training_steps
    with whole_folder(folder / f"step-{step}") as partial:
        trainer.sae.save_model(str(partial))
        trainer.save_trainer_state(partial)
        facts = {"step": step, "scale": scale, "seconds": seconds}
        write_json(partial / "progress.json", f"{FORMAT}-progress", 1, facts)
    if before is not None and before.name != f"step-{step}":
        shutil.rmtree(before)


def _report(
    run: Run,
    trainer: SAETrainer[Any, Any],
    loss: float,
    seconds: float,
    steps: int,
    started: float,
) -> None:
    speed = steps * run.batch / (time.monotonic() - started)
    left = (run.steps - trainer.n_training_steps) * run.batch / speed / 60
    dead = int(trainer.dead_neurons.sum())
    print(
        f"layer {run.layer}: step {trainer.n_training_steps} of {run.steps}, loss {loss:.2f},"
        f" dead {dead}, {speed:.0f} rows/s, {seconds:.0f} s, {left:.0f} minutes left",
        flush=True,
    )


@torch.no_grad()
def folded(sae: TopKTrainingSAE, scale: float) -> dict[str, Tensor]:
    """The official four tensors, for unscaled inputs; leaves the SAE as it was."""
    norm = sae.W_dec.norm(dim=-1)
    # The SAE reads scale * x. Its codes are divided by the scale, so that decoding gives x.
    return {
        "W_enc": (sae.W_enc * norm).T.contiguous().clone(),
        "W_dec": (sae.W_dec / norm[:, None]).T.contiguous().clone(),
        "b_enc": (sae.b_enc * norm / scale).clone(),
        "b_dec": (sae.b_dec / scale).clone(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", help="those to train, else all that were captured")
    parser.add_argument("--samples", type=int, required=True, help="rows seen, repeats included")
    parser.add_argument("--shards", type=int, help="of those captured, the first; else all")
    for name in ("width", "k", "batch", "warm-up", "dead-window", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Run, name.replace("-", "_")))
    parser.add_argument("--lr", type=float, default=Run.lr)
    parser.add_argument("--no-autocast", action="store_true", help="float32 products")
    parser.add_argument("--save-every", type=int, default=25, help="steps")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = residuals_folder(options.work)
    source = Source.read(folder)
    layers = [int(n) for n in options.layers.split(",")] if options.layers else source.layers
    there = len(shards_there(folder, "train"))
    for layer in layers:
        run = Run(
            layer=layer,
            d_model=source.d_model,
            shards=options.shards or _shards_before(options.work, layer) or there,
            samples=options.samples,
            width=options.width,
            k=options.k,
            batch=options.batch,
            lr=options.lr,
            warm_up=options.warm_up,
            dead_window=options.dead_window,
            autocast=not options.no_autocast,
            seed=options.seed,
        )
        train_layer(options.work, run, options.save_every)


if __name__ == "__main__":
    main()
