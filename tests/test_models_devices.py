"""Models on several devices or processes: where each SAE goes, FSDP, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import make_model
from torch import nn

from qwen_scope_lens.errors import WrongModel
from qwen_scope_lens.models import decoder_layers
from qwen_scope_lens.models.architecture import layer_device
from qwen_scope_lens.models.residuals import capture
from qwen_scope_lens.stores.extraction import Job
from qwen_scope_lens.stores.fingerprints import fingerprint
from qwen_scope_lens.train.penalty import record_residuals

IDS = [5, 6, 7, 8, 9]


def test_the_sae_goes_to_the_device_of_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make_model("Qwen3ForCausalLM")
    layers: Any = decoder_layers(model)
    layers[1]._hf_hook = SimpleNamespace(execution_device=1)  # as accelerate's for device_map
    layers[2]._hf_hook = SimpleNamespace(execution_device="cpu")
    layers[2].to("meta")  # offloaded: the weights are elsewhere
    layers[3].to("meta")
    found = [str(layer_device(model, layer)) for layer in range(4)]
    assert found == ["cpu", "cuda:1", "cpu", "cpu"]
    loaded = []
    monkeypatch.setattr(
        "qwen_scope_lens.saes.load.open_sae", lambda ref, **options: loaded.append(options)
    )
    job: Any = SimpleNamespace(
        model=model,
        manifest=SimpleNamespace(saes={1: SimpleNamespace(ref="g/1")}),
        sae_folder=None,
        sae_revision=None,
    )
    Job._load(job, 1)
    assert loaded[0]["device"] == "cuda:1"


@pytest.fixture
def sharded() -> Iterator[tuple[nn.Module, nn.Module]]:
    """A model, and the same under FSDP 2 in a group of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model: Any = make_model("Qwen3ForCausalLM")
        other = copy.deepcopy(model)
        mesh = init_device_mesh("cpu", (1,))
        for layer in decoder_layers(other):
            fully_shard(layer, mesh=mesh)
        fully_shard(other, mesh=mesh)
        yield model, other
    finally:
        dist.destroy_process_group()


def test_fsdp_reads_and_trains_the_same(sharded: tuple[Any, Any]) -> None:
    _whole, _parts = sharded
    truth, found = (capture(model, [IDS], [1, 3]).residuals for model in sharded)
    for layer in (1, 3):
        assert torch.equal(found[layer], truth[layer])
    grads = []
    for model in sharded:
        model.train()
        with record_residuals(model, (1,)) as residuals:
            out = model(torch.tensor([IDS]))
        (out.logits.square().mean() + residuals[1].square().mean()).backward()
        first: Any = decoder_layers(model)[0]
        grad = first.mlp.up_proj.weight.grad
        grads.append(grad.full_tensor() if hasattr(grad, "full_tensor") else grad)
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[1], grads[0])


def test_a_store_needs_the_whole_model(sharded: tuple[Any, Any]) -> None:
    whole, parts = sharded
    assert fingerprint(whole, 1).startswith("all-weights:")
    with pytest.raises(WrongModel, match=r"shared out among processes.*device_map"):
        fingerprint(parts, 1)
