"""`load_sae` gives the right numbers as views of the file; ScopeSAE behaves as SAELens's SAE."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import planted
import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopKSAE

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import CheckpointMissing, HubUnreachable, LayerOutOfRange
from qwen_scope_lens.saes.checkpoint import read_tensors
from qwen_scope_lens.saes.mapped import give_back


@pytest.fixture
def sae(home: Path) -> qsl.ScopeSAE:
    return qsl.load_sae("local/mine/1")


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return planted.tensors(seed=1)


def test_encode_is_the_published_formula(
    sae: qsl.ScopeSAE, weights: dict[str, torch.Tensor]
) -> None:
    x = torch.randn(7, 5, planted.D_MODEL, generator=torch.Generator().manual_seed(3))
    expected = planted.model_card_encode(weights, x, planted.K)
    torch.testing.assert_close(sae.encode(x).double(), expected, atol=1e-5, rtol=1e-5)
    recons = expected @ weights["W_dec"].double().T + weights["b_dec"].double()
    torch.testing.assert_close(sae(x).double(), recons, atol=1e-4, rtol=1e-4)


def test_it_reconstructs_what_was_planted(
    sae: qsl.ScopeSAE, weights: dict[str, torch.Tensor]
) -> None:
    x = planted.activations(weights)
    assert ((sae(x) - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum() < 0.3


@pytest.mark.parametrize(
    "arguments",
    [("local/mine/1",), ("local/mine/layer1.sae.pt",), ("local/mine", "layer1"), ("local/mine", 1)],
)
@pytest.mark.usefixtures("home")
def test_ways_to_name_it(arguments: tuple[str, ...], weights: dict[str, torch.Tensor]) -> None:
    assert torch.equal(qsl.load_sae(*arguments).W_enc, weights["W_enc"].T)


def test_folder_with_the_files_or_with_the_repository(home: Path) -> None:
    for folder in (home, home / "mine"):
        assert qsl.load_sae("local/mine/2", folder=folder).cfg.d_sae == planted.D_SAE
    with pytest.raises(CheckpointMissing, match=r"layer0\.sae\.pt"):
        qsl.load_sae("qwen3-8b-base/w64k-l0-50/0", folder=home)


def test_weights_are_views_until_written_and_the_file_never_changes(home: Path) -> None:
    path = home / "mine" / "layer1.sae.pt"
    before = path.read_bytes()
    sae = qsl.load_sae("local/mine/1")
    assert sae.W_enc.data_ptr() % 4 == 0
    assert not sae.W_enc.is_contiguous()  # the file's rows, seen through SAELens's orientation
    with torch.no_grad():
        sae.W_enc.add_(1.0)
        sae.b_dec.zero_()
    assert path.read_bytes() == before
    assert torch.equal(qsl.load_sae("local/mine/1").W_enc, planted.tensors(seed=1)["W_enc"].T)


@pytest.mark.slow
def test_a_full_size_layer_costs_no_memory(tmp_path: Path) -> None:
    """2048 x 32768, 0.5 GB on disk; loading must not read it."""
    folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    folder.mkdir()
    shapes = {"W_enc": (32768, 2048), "W_dec": (2048, 32768), "b_enc": (32768,), "b_dec": (2048,)}
    torch.save({n: torch.zeros(s) for n, s in shapes.items()}, folder / "layer27.sae.pt")
    before = _resident_bytes()
    sae = qsl.load_sae("qwen3-1.7b-base/w32k-l0-50/27", folder=tmp_path)
    assert _resident_bytes() - before < 64 * 2**20
    assert sae.W_enc.shape == (2048, 32768)


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux's /proc")
def test_only_unchanged_pages_of_a_file_are_given_back(tmp_path: Path) -> None:
    torch.save({"W": torch.arange(8 * 2**20).float().view(2048, 4096)}, tmp_path / "W.pt")
    weight = read_tensors(tmp_path / "W.pt")["W"]
    expected, before = weight.clone(), _resident_bytes()
    assert give_back(weight.T) > 31 * 2**20
    assert before - _resident_bytes() > 31 * 2**20
    assert give_back(weight) == 0  # there are none left
    assert torch.equal(weight, expected)
    assert give_back(weight[:, :2048]) == 0  # between its rows are those of others
    assert give_back(expected) == 0
    weight[1000, 1000] = -1.0
    assert give_back(weight) == 0
    assert weight[1000, 1000] == -1.0
    assert torch.equal(expected[:1000], weight[:1000])


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS in /proc/self/status")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.usefixtures("home")
def test_dtype_at_load(dtype: str, weights: dict[str, torch.Tensor]) -> None:
    sae = qsl.load_sae("local/mine/1", dtype=dtype)  # type: ignore[arg-type]
    expected = getattr(torch, dtype)
    assert {p.dtype for p in sae.parameters()} == {expected}
    assert sae.cfg.dtype == dtype
    assert torch.equal(sae.W_dec, weights["W_dec"].T.to(expected))
    assert sae.encode(torch.randn(3, planted.D_MODEL)).dtype == expected


def test_metadata_says_what_is_known(sae: qsl.ScopeSAE) -> None:
    metadata = sae.cfg.metadata
    assert metadata.hook_name == "blocks.1.hook_resid_post"
    assert metadata.hf_hook_name == "model.layers.1"
    assert metadata.prepend_bos is False
    assert metadata.context_size == 1024  # as in SAELens's own loader
    assert metadata.qwen_scope_ref == "local/mine/1"
    assert sae.cfg.apply_b_dec_to_input is False


def test_hub_cache_with_a_pinned_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, torch.Tensor]
) -> None:
    """The layout of huggingface_hub's cache, with two commits. Nothing is downloaded."""
    import huggingface_hub.constants as constants

    group = qsl.find_group("qwen3-1.7b-base/w32k-l0-50")
    repo = tmp_path / f"models--{group.repo_id.replace('/', '--')}"
    commits = {"main": "a" * 40, "v1": "b" * 40}
    for number, (ref, commit) in enumerate(commits.items()):
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        shapes = {"W_enc": (32768, 2048), "W_dec": (2048, 32768), "b_enc": (32768,)}
        # Of full size, because shapes are checked; in float16, to be quick to write.
        tensors = {n: torch.zeros(s, dtype=torch.float16) for n, s in shapes.items()}
        tensors["b_dec"] = torch.full((2048,), float(number), dtype=torch.float16)
        torch.save(tensors, snapshot / "layer0.sae.pt")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for revision, commit, value in ((None, "a" * 40, 0.0), ("v1", "b" * 40, 1.0)):
        sae = qsl.load_sae(f"{group.short}/0", revision=revision, dtype="float16")
        assert sae.cfg.metadata.revision == commit
        assert sae.b_dec[0] == value
    with pytest.raises(HubUnreachable):
        qsl.load_sae(f"{group.short}/0", revision="c" * 40)


def test_unreachable_hub_says_how_to_use_a_folder(home: Path) -> None:
    with pytest.raises(HubUnreachable, match="QWEN_SCOPE_HOME") as caught:
        qsl.load_sae("qwen3-8b-base/w64k-l0-50/20")
    assert "SAE-Res-Qwen3-8B-Base-W64K-L0_50" in str(caught.value)
    assert str(home) in str(caught.value)  # where it looked


def test_single_features(sae: qsl.ScopeSAE, weights: dict[str, torch.Tensor]) -> None:
    assert torch.equal(sae.direction(7), weights["W_dec"][:, 7])
    assert torch.equal(sae.encoder_row([3, 9]), weights["W_enc"][[3, 9]])
    torch.testing.assert_close(sae.decoder_norms(), weights["W_dec"].norm(dim=0))
    assert sae.decoder_norms(chunk=7).shape == (planted.D_SAE,)
    for bad in (planted.D_SAE, -1, [0, planted.D_SAE]):
        with pytest.raises(LayerOutOfRange):
            sae.direction(bad)


def test_saves_as_plain_topk(sae: qsl.ScopeSAE, tmp_path: Path) -> None:
    x = torch.randn(6, planted.D_MODEL)
    sae.save_model(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "cfg.json").read_text())["architecture"] == "topk"
    again = SAE.load_from_disk(tmp_path / "saved")
    assert type(again) is TopKSAE
    assert torch.equal(again.W_dec, sae.W_dec)
    torch.testing.assert_close(again(x), sae(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_error_term_and_hooks_as_in_saelens(
    sae: qsl.ScopeSAE, weights: dict[str, torch.Tensor]
) -> None:
    plain = planted.saelens_sae(weights)
    x = torch.randn(2, 5, planted.D_MODEL)
    for model in (sae, plain):
        model.use_error_term = True

    def double(acts: torch.Tensor, hook: object) -> torch.Tensor:
        return acts * 2

    hooks = [("hook_sae_acts_post", double)]
    torch.testing.assert_close(sae(x), x)
    torch.testing.assert_close(
        sae.run_with_hooks(x, fwd_hooks=hooks), plain.run_with_hooks(x, fwd_hooks=hooks)
    )
    _, mine = sae.run_with_cache(x)
    _, theirs = plain.run_with_cache(x)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name])


def test_gradients_as_in_saelens(sae: qsl.ScopeSAE, weights: dict[str, torch.Tensor]) -> None:
    """The input always gets gradients; the weights get them after `requires_grad_()`."""
    plain = planted.saelens_sae(weights)
    x = torch.randn(9, planted.D_MODEL)
    assert not any(p.requires_grad for p in sae.parameters())
    leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    (sae(leaf) ** 2).sum().backward()
    (plain(twin) ** 2).sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad, atol=1e-4, rtol=1e-4)
    plain.zero_grad()
    sae.requires_grad_(True)
    grads = []
    for model in (sae, plain):
        leaf = x.clone().requires_grad_()
        (model(leaf) ** 2).sum().backward()
        grads.append((leaf.grad, *(p.grad for _, p in sorted(model.named_parameters()))))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_to_and_deepcopy(sae: qsl.ScopeSAE) -> None:
    twin = copy.deepcopy(sae)
    assert isinstance(twin, qsl.ScopeSAE)
    twin.to(torch.bfloat16)
    assert (twin.cfg.dtype, sae.cfg.dtype) == ("bfloat16", "float32")
    assert twin.W_enc.dtype == torch.bfloat16


def test_a_direction_is_a_copy_and_wants_whole_numbers(sae: qsl.ScopeSAE) -> None:
    before = sae.W_dec[5].clone(), sae.W_enc[:, 5].clone()
    with torch.no_grad():
        for index in (5, [5], torch.tensor(5)):
            direction, row = sae.direction(index), sae.encoder_row(index)
            direction.mul_(7)
            row.mul_(7)
    assert torch.equal(sae.W_dec[5], before[0])
    assert torch.equal(sae.W_enc[:, 5], before[1])
    for bad in (1.7, torch.zeros(planted.D_SAE, dtype=torch.bool)):
        with pytest.raises(LayerOutOfRange, match="whole numbers"):
            sae.direction(bad)  # type: ignore[arg-type]


def test_the_class_reads_what_it_wrote(sae: qsl.ScopeSAE, tmp_path: Path) -> None:
    sae.save_model(tmp_path / "saved")
    again = qsl.ScopeSAE.load_from_disk(tmp_path / "saved")
    assert type(again) is qsl.ScopeSAE
    assert torch.equal(again.direction(3), sae.direction(3))
    assert type(sae.cfg).from_dict(sae.cfg.to_dict()) == sae.cfg
