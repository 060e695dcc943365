"""The embedded default in the catalog and under every verb, and the tour itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

import qwen_scope_lens as qsl
from qwen_scope_lens.catalog import MINI_GROUPS, bundled_model
from qwen_scope_lens.cli import main
from qwen_scope_lens.mini.demo import LAYER, STRENGTHS


@pytest.mark.parametrize("group", MINI_GROUPS, ids=lambda g: g.short)
def test_the_row_is_what_the_files_are(group: qsl.Group) -> None:
    model = qsl.load_model(group.backbone.key)
    assert model.cfg.d_model == group.d_model
    assert model.cfg.n_layers == group.backbone.num_layers
    for layer in group.layers:
        sae = qsl.load_sae(f"{group.short}/{layer}")  # validated against the row
        assert sae.cfg.k == group.k
    with qsl.install():
        sae = SAE.from_pretrained(group.release, f"layer{group.layers[-1]}")
    assert isinstance(sae, qsl.ScopeSAE)


def test_names_of_the_models() -> None:
    for name in ("mini-qwen3", "qwen-scope-lens/mini-qwen3", "Mini-Qwen3"):
        assert bundled_model(name) is not None
    assert bundled_model("Qwen/Qwen3-8B-Base") is None


@pytest.mark.slow  # twice eight layers, with every convention
@pytest.mark.parametrize("group", MINI_GROUPS, ids=lambda g: g.short)
def test_verify_on_every_layer(group: qsl.Group) -> None:
    """Trained, so the right layer fits well, and another layer's residuals are refused."""
    model = qsl.load_model(group.backbone.key)
    for layer in group.layers:
        check = qsl.verify_model(model, qsl.load_sae(f"{group.short}/{layer}"))
        assert check.verification.fvu["as documented"] < 0.3
        assert not check.notes
    read = qsl.capture(model, ["Ein kurzer Text über Programme und Dateien."] * 4, [1])
    with pytest.raises(qsl.ScopeError):
        qsl.verify(qsl.load_sae(f"{group.short}/6"), read.residuals[1])


@pytest.mark.parametrize("group", MINI_GROUPS, ids=lambda g: g.short)
def test_codes_are_the_model_cards_formula_on_real_residuals(group: qsl.Group) -> None:
    import planted

    model, sae = qsl.load_model(group.backbone.key), qsl.load_sae(f"{group.short}/4")
    read = qsl.capture(model, ["The kernel reads a file. 内核读取文件。"], [4])
    x = read.residuals[4]
    weights = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc}
    expected = planted.model_card_encode(weights, x, group.k)
    found = sae.encode_sparse(x)
    torch.testing.assert_close(found.to_dense().double(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_the_tour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs, and steering by the features does what the control does not."""
    site = tmp_path / "site"
    assert main(["demo", "--out", str(site)]) == 0
    assert (site / "index.html").is_file()
    out = capsys.readouterr().out
    assert out.count("* ") == 8
    assert re.search(r"held out 1\.000|held out 0\.9", out)
    assert re.search(r"arithmetic +40 +\d+ +0\.\d\d +100%", out)
    assert f"mini-qwen3/w1k-l0-16/{LAYER}: " in out
    assert "PROBLEM" not in out
    shares = re.findall(r"(the features|control: random) +([a-z ]+?) +(\d+)% zh", out)
    english, chinese = shares[:5], shares[5:]
    assert len(chinese) == 5
    share = {(kind, label): int(value) for kind, label, value in english}
    assert share["the features", "amplified"] > 30
    assert share["the features", "as it is"] == share["control: random", "amplified"] == 0
    share = {(kind, label): int(value) for kind, label, value in chinese}
    assert share["the features", "as it is"] > 80
    assert share["the features", "suppressed"] < share["control: random", "suppressed"]
    assert set(STRENGTHS) == {label for _, label, _ in shares}


@pytest.mark.parametrize("group", MINI_GROUPS, ids=lambda g: g.short)
def test_the_bridge_is_the_plain_model(group: qsl.Group) -> None:
    """Logits and every residual of a trained model, against HF's own forward; bit by bit."""
    import transformers

    folder = bundled_model(group.backbone.key)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    bridge = qsl.load_model(group.backbone.key)
    ids = bridge.tokenizer("The kernel reads 内核 a file.", return_tensors="pt").input_ids
    seen: dict[str, torch.Tensor] = {}
    for layer, module in enumerate(plain.model.layers):
        module.register_forward_hook(
            lambda m, a, out, layer=layer: seen.update(
                {group.hook_name(layer): out[0] if isinstance(out, tuple) else out}
            )
        )
    with torch.no_grad():
        expected = plain(ids).logits
        logits, cache = bridge.run_with_cache(
            ids, names_filter=list(map(group.hook_name, range(8)))
        )
        assert torch.equal(logits, expected)
        for name, residual in seen.items():
            assert torch.equal(cache[name], residual)
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
        theirs = plain.generate(ids, **options)
        ours = bridge.generate(ids, verbose=False, **options)
    assert ours[0].tolist()[: theirs.shape[1]] == theirs[0].tolist()
