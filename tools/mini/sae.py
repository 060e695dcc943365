"""Step 4: a TopK SAE for every layer, trained by SAELens's own trainer, exported as Qwen-Scope's.

Inputs are scaled to a common norm for training and the decoder norms are treated as one; both are
folded into the weights afterwards, so that the file holds a plain `TopK(ReLU(x W_enc + b_enc))`
with decoder columns of length one. Finished layers are skipped on a second call.
Usage: `python -m tools.mini.sae mini-qwen3`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from tools.mini.activations import collect, load_model
from tools.mini.data import token_rows
from tools.mini.durations import measured
from tools.mini.model import step_arguments
from tools.mini.specs import D_SAE, K, ModelSpec

__all__ = ["SAE_FOLDER", "export", "train_all", "train_layer"]

TOKENS = 300_000
"""Of which activations are kept; every SAE sees each of them `SAMPLES / TOKENS` times."""
SAMPLES = 600_000
BATCH = 1024
LR = 5e-3
SEED = 3


def SAE_FOLDER(spec: ModelSpec) -> str:
    """The repository's name, as the official ones are named."""
    return f"SAE-Res-{spec.name}-W{D_SAE // 1024}K-L0_{K}"


def _stream(data: np.ndarray, scale: float, device: str, seed: int) -> Iterator[torch.Tensor]:
    """Shuffled batches without end, the same for the same seed."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(data))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            values = np.sort(order[start : start + BATCH])
            yield torch.from_numpy(data[values].astype(np.float32)).mul_(scale).to(device)


def train_layer(
    data: np.ndarray, samples: int = SAMPLES, d_sae: int | None = None, seed: int = SEED
) -> dict[str, torch.Tensor]:
    """Train on `data [tokens, d_model]`; the official four tensors, for unscaled inputs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    d_sae = d_sae or D_SAE
    torch.manual_seed(seed)
    probe = torch.from_numpy(data[:: max(1, len(data) // 50_000)].astype(np.float32))
    width = probe.shape[1]
    scale = width**0.5 / float(probe.norm(dim=-1).mean())
    mean = (probe.mean(0) * scale).to(device)
    config = TopKTrainingSAEConfig(
        d_in=width,
        d_sae=d_sae,
        k=K,
        device=device,
        apply_b_dec_to_input=False,
        normalize_activations="none",
        rescale_acts_by_decoder_norm=True,
        aux_loss_coefficient=1 / 32,
    )
    sae = TopKTrainingSAE(config)
    with torch.no_grad():
        # Directions of real tokens to begin with leave few features dead; the biases begin as if
        # the mean were subtracted, and a plain encoder learns the rest.
        chosen = torch.randperm(len(probe))[:d_sae]
        tokens = torch.nn.functional.normalize(probe[chosen].to(device) * scale - mean, dim=-1)
        sae.W_dec.copy_(tokens * sae.W_dec.norm(dim=-1).mean())
        sae.W_enc.copy_(tokens.T * sae.W_enc.norm(dim=0).mean())
        sae.b_dec.copy_(mean)
        sae.b_enc.copy_(-(mean @ sae.W_enc))
    steps = samples // BATCH
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=samples,
            train_batch_size_samples=BATCH,
            lr=LR,
            lr_end=LR / 10,
            lr_warm_up_steps=min(50, steps // 4),
            lr_decay_steps=steps // 2,
            device=device,
            dead_feature_window=30,
            feature_sampling_window=10**9,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        _stream(data, scale, device, seed),
    )
    sae = trainer.fit()
    sae.fold_W_dec_norm()
    with torch.no_grad():  # x here is scale * residual; divide codes and biases by it
        return {
            "W_enc": sae.W_enc.T.contiguous().cpu(),
            "W_dec": sae.W_dec.T.contiguous().cpu(),
            "b_enc": (sae.b_enc / scale).cpu(),
            "b_dec": (sae.b_dec / scale).cpu(),
        }


def export(spec: ModelSpec, layers: list[dict[str, torch.Tensor]], folder: Path) -> None:
    """Write `layer{n}.sae.pt` and `config.json` exactly as the official repositories do."""
    folder.mkdir(parents=True, exist_ok=True)
    for layer, tensors in enumerate(layers):
        plain = {name: tensor.detach().float().clone() for name, tensor in tensors.items()}
        torch.save(plain, folder / f"layer{layer}.sae.pt")
    config = {
        "model_type": "topk_sae",
        "base_model": spec.model_id,
        "d_model": spec.d_model,
        "d_sae": D_SAE,
        "k": K,
        "num_layers": spec.layers,
        "hook_point": "resid_post",
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _quick_fvu(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[float, float]:
    pre = torch.relu(x @ tensors["W_enc"].T + tensors["b_enc"])
    values, indices = pre.topk(K, dim=-1)
    codes = torch.zeros_like(pre).scatter_(-1, indices, values)
    error = codes @ tensors["W_dec"].T + tensors["b_dec"] - x
    fvu = float(error.pow(2).sum() / (x - x.mean(0)).pow(2).sum())
    return fvu, float((codes.amax(0) == 0).float().mean())


def train_all(spec: ModelSpec, work: Path) -> None:
    """The SAEs of all layers of a finished model, exported; finished layers are not repeated."""
    model = load_model(work / "models" / spec.name / "final")
    rows = token_rows(work, "train")[1]
    data = collect(model, rows, work / "activations" / spec.name, TOKENS, SEED)
    parts = work / "saes" / spec.name
    parts.mkdir(parents=True, exist_ok=True)
    layers = []
    for layer, values in enumerate(data):
        path = parts / f"layer{layer}.pt"
        if not path.is_file():
            started = time.monotonic()
            tensors = train_layer(values)
            torch.save(tensors, path.with_suffix(".partial"))
            os.replace(path.with_suffix(".partial"), path)
            fvu, dead = _quick_fvu(tensors, torch.from_numpy(values[:40_000].astype(np.float32)))
            spent = time.monotonic() - started
            text = f"FVU {fvu:.3f}, silent {dead:.1%}, {spent:.0f} s"
            print(f"{spec.name} layer {layer}: {text}", flush=True)
        layers.append(torch.load(path, weights_only=True))
    export(spec, layers, parts / SAE_FOLDER(spec))


def main() -> None:
    spec, work = step_arguments(__doc__)
    with measured(work, f"sae {spec.name}"):
        train_all(spec, work)


if __name__ == "__main__":
    main()
