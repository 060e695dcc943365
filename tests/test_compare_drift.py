"""Drift and transfer: an edited layer shows there and beyond, a fine SAE beats a random one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_stores import build_store
from scipy.stats import binomtest

import qwen_scope_lens as qsl
from qwen_scope_lens.cli import main
from qwen_scope_lens.compare import drift, drift_page, fidelity, random_sae, summary, transfer
from qwen_scope_lens.compare.side_by_side import sign_test
from qwen_scope_lens.compare.transfer import load_related
from qwen_scope_lens.errors import StoreMismatch, TooLittleData, WrongModel
from qwen_scope_lens.mini import heldout, model_path
from qwen_scope_lens.models import ScopeBridge, decoder_layers
from qwen_scope_lens.stores import FeatureStore, extract

GROUP, LAYERS, EDITED = "mini-qwen3/w1k-l0-16", (1, 3, 5), 3


@pytest.fixture(scope="module")
def texts() -> list[str]:
    records = [r["text"] for r in heldout("prose")]
    return [text[:120] for text in records[:: max(1, len(records) // 60)]][:60]


@pytest.fixture(scope="module")
def base_model() -> qsl.models.load.ScopeBridge:
    return qsl.load_model("mini-qwen3")


@pytest.fixture(scope="module")
def edited_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model; the MLP of one layer writes twice as much."""
    folder = tmp_path_factory.mktemp("edited") / "edited"
    model = qsl.load_model("mini-qwen3")
    tokenizer = model.tokenizer
    hf: Any = model.release()
    with torch.no_grad():
        edited: Any = decoder_layers(hf)[EDITED]
        edited.mlp.down_proj.weight *= 2
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stores(
    texts: list[str],
    base_model: ScopeBridge,
    edited_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("drift")
    for name, model in (("base", base_model), ("tuned", str(edited_folder))):
        extract(
            texts,
            model=model,
            group=GROUP,
            layers=LAYERS,
            out=folder / name,
            max_tokens=48,
            progress=False,
        )
    return folder / "base", folder / "tuned"


def test_an_edited_layer_drifts_there_and_beyond_and_not_before(
    stores: tuple[Path, Path],
) -> None:
    a, b = map(FeatureStore.open, stores)
    found = drift(a, b)
    before, there, beyond = (found.layers[layer] for layer in LAYERS)
    assert (before.overlap, before.changed.sum(), len(before.pairs)) == (1.0, 0, 0)
    assert before.cosine == pytest.approx(1.0)
    for one in (there, beyond):
        assert one.overlap < 0.95
        assert one.cosine < 0.99
        assert one.changed.sum() > 0
    assert there.l0[0] == pytest.approx(there.rate_base.sum())


def test_a_model_does_not_drift_from_itself(stores: tuple[Path, Path]) -> None:
    store = FeatureStore.open(stores[0])
    layers = drift(store, store).layers
    assert set(layers) == set(LAYERS)
    for one in layers.values():
        assert (one.overlap, one.changed.sum(), len(one.pairs)) == (1.0, 0, 0)


@pytest.fixture(scope="module")
def planted_stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, FeatureStore]:
    """Feature 10 appears, 20 vanishes, 30 doubles in strength, 40 moves; 50 and 60 fire together
    only afterwards; the rest is the same noise, drawn anew."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)

    def noise() -> dict[int, float]:
        return {int(f): 1 + rng.random() for f in rng.integers(100, 160, 3)}

    sides: list[list] = [[], []]
    for _ in range(80):
        for side in (0, 1):
            tokens = [noise() for _ in range(10)]
            for at, token in enumerate(tokens):
                token[30] = (1.0 + side) * (1 + 0.1 * rng.random())
                if at == 3:
                    token[10 if side else 20] = 2.0
                if rng.random() < (0.3, 0.7)[side]:
                    token[40] = 1.0
                if at % 3 == 0:
                    token[50] = 1.0
                if at % 3 == (0 if side else 1):
                    token[60] = 1.0
            sides[side].append(tokens)
    texts = [f"t{n:03d}" + "ab" * 8 for n in range(80)]
    return tuple(  # type: ignore[return-value]
        build_store(folder / str(n), side, texts=texts) for n, side in enumerate(sides)
    )


def test_planted_changes_are_told_apart(
    planted_stores: tuple[FeatureStore, FeatureStore],
) -> None:
    [one] = drift(*planted_stores).layers.values()
    assert one.features("appeared") == [10]
    assert one.features("vanished") == [20]
    assert one.features("stronger") == [30]
    assert one.features("more") == [40]
    assert set(np.flatnonzero(one.changed)) - {10, 20, 30, 40} <= set(range(100, 160))
    assert one.changed[100:160].sum() <= 3
    assert (50, 60) in {(pair.a, pair.b) for pair in one.pairs}
    [pair] = [pair for pair in one.pairs if (pair.a, pair.b) == (50, 60)]
    assert pair.jaccard_tuned > 0.9 > 0.1 > pair.jaccard_base
    assert one.strength_tuned[30] == pytest.approx(2 * one.strength_base[30], rel=0.05)


def test_the_same_noise_drawn_twice_is_no_drift(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    pair = [
        build_store(
            tmp_path / name,
            [
                [{int(f): 1 + rng.random() for f in rng.integers(0, 40, 4)} for _ in range(8)]
                for _ in range(60)
            ],
            texts=[f"t{n:03d}aaaa" for n in range(60)],
        )
        for name in "ab"
    ]
    a, b = pair
    [one] = drift(a, b).layers.values()
    assert one.changed.sum() <= 2
    assert one.overlap < 0.5  # and yet hardly a token has the same features


@pytest.mark.parametrize(("up", "down"), [(0, 0), (3, 0), (10, 2), (7, 7), (1, 30)])
def test_the_sign_test_is_the_binomial_s(up: int, down: int) -> None:
    expected = binomtest(up, up + down).pvalue if up + down else 1.0
    assert sign_test(np.array([up]), np.array([down]))[0] == pytest.approx(expected)


def test_the_report_escapes_links_and_names(
    planted_stores: tuple[FeatureStore, FeatureStore],
) -> None:
    found = drift(*planted_stores)
    labels = {"mini-qwen3/w1k-l0-16/6/10": "<b>new</b>"}
    html = drift_page(found, labels, "site/{layer}/{feature}.html").render()
    assert "&lt;b&gt;new" in html
    assert '<a href="site/6/10.html">mini-qwen3/w1k-l0-16/6/10</a>' in html
    site = drift_page(found, link="../site/").render()
    assert 'href="../site/index.html#mini-qwen3/w1k-l0-16/6/10"' in site
    assert html.count("<svg") >= 2
    assert "appeared" in str(summary(found))
    assert found.to_pandas()["layer"].tolist() == list(found.layers)


def test_other_texts_and_other_saes_are_refused(
    stores: tuple[Path, Path], planted_stores: tuple[FeatureStore, FeatureStore], tmp_path: Path
) -> None:
    base = FeatureStore.open(stores[0])
    with pytest.raises(StoreMismatch, match="no layer is in both"):
        drift(base, planted_stores[0])
    same = [[{1: 1.0}] * 3] * 7
    a = build_store(tmp_path / "a", same, texts=[f"x{n}" for n in range(7)])
    with pytest.raises(StoreMismatch, match="one corpus with one tokenizer"):
        drift(a, planted_stores[0])
    other = build_store(tmp_path / "b", same, group="mini-qwen3.5/w1k-l0-16")
    with pytest.raises(StoreMismatch, match="compared by `qsl compare match`"):
        drift(a, other)
    few = build_store(tmp_path / "c", same[:3])
    with pytest.raises(TooLittleData, match="fewer than 6"):
        drift(few, few)


def test_fidelity_is_that_of_a_plain_loop(base_model: ScopeBridge, texts: list[str]) -> None:
    """Against the formula on one text at a time, in float64, with hooks of our own."""
    sae, layer, some = qsl.load_sae(f"{GROUP}/4"), 4, texts[:5]
    found = fidelity(base_model, {layer: sae}, some, max_tokens=40)[layer]
    hf = base_model.original_model
    rows, errors = [], []
    nlls: dict[str, list[torch.Tensor]] = {"loss": [], "spliced": [], "zeroed": []}
    for text in some:
        ids = base_model.tokenizer(text, return_tensors="pt")["input_ids"][:, :40]
        one = qsl.capture(base_model, [ids[0].tolist()], [layer])
        kept, x = one.keep(layer), one.residuals[layer]
        out = sae.decode(sae.encode(x[kept]))
        rows.append(x[kept].double())
        errors.append((out - x[kept]).double().pow(2).sum())
        for name, new in (("loss", None), ("spliced", out), ("zeroed", torch.zeros_like(out))):

            def hook(
                module: torch.nn.Module,
                args: object,
                output: Any,
                new: torch.Tensor | None = new,
                kept: torch.Tensor = kept,
            ) -> Any:
                changed = (output[0] if isinstance(output, tuple) else output).clone()
                changed[0, kept] = new
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            handle = None if new is None else decoder_layers(hf)[layer].register_forward_hook(hook)
            with torch.no_grad():
                logits = hf(input_ids=ids, use_cache=False).logits[0, :-1]
            if handle is not None:
                handle.remove()
            nlls[name].append(
                torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            )
    x = torch.cat(rows)
    assert found.tokens == len(x)
    assert found.fvu == pytest.approx(float(sum(errors) / (x - x.mean(0)).pow(2).sum()), rel=1e-4)
    for name, values in nlls.items():
        assert getattr(found, name) == pytest.approx(float(torch.cat(values).mean()), rel=1e-4)


@pytest.mark.slow
def test_transfer_orders_own_model_edited_model_and_random_sae(
    base_model: ScopeBridge, edited_folder: Path, texts: list[str]
) -> None:
    saes = {layer: qsl.load_sae(f"{GROUP}/{layer}") for layer in (1, 5)}
    models = {"own": base_model, "edited": lambda: load_related(str(edited_folder))}
    found = transfer(saes, models, texts[:20], name=GROUP, max_tokens=40)
    own, edited, floor = (found.rows[name] for name in ("own", "edited", "random SAE"))
    assert own[1].fvu == pytest.approx(edited[1].fvu)  # before the edit
    assert own[5].fvu < edited[5].fvu
    for layer in (1, 5):
        lost, nothing = own[layer].recovered, floor[layer].recovered
        assert lost is not None
        assert nothing is not None
        assert own[layer].fvu < floor[layer].fvu < 1.2
        assert lost > nothing
        assert own[layer].loss == floor[layer].loss
    assert "random SAE" in str(found.table())
    assert len(found.to_pandas()) == 6
    assert repr(found).startswith(f"Transfer: {GROUP} on 20 texts\nlayer  model")


def test_an_adapter_is_merged_into_the_base_it_names(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tokenizer, hf = (m := qsl.load_model(model_path("mini-qwen3"))).tokenizer, m.release()
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(hf, settings).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(model_path("mini-qwen3"))
    adapted.save_pretrained(tmp_path / "adapter")
    ids = tokenizer("Some words", return_tensors="pt")["input_ids"]
    merged, plain = load_related(str(tmp_path / "adapter")), qsl.load_model("mini-qwen3")
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits
        assert torch.allclose(merged(input_ids=ids).logits, wanted, atol=1e-3)
        assert not torch.allclose(plain.original_model(input_ids=ids).logits, wanted, atol=1e-1)


def test_a_random_sae_knows_the_mean_only() -> None:
    sae = qsl.load_sae(f"{GROUP}/2")
    floor = random_sae(sae, 3)
    assert torch.equal(floor.b_dec, sae.b_dec)
    assert (floor.cfg.k, floor.cfg.d_sae) == (sae.cfg.k, sae.cfg.d_sae)
    codes = floor.encode_sparse(sae.b_dec[None] * 1.0)
    assert codes.values.max() < 1e-3  # the mean itself fires nothing
    assert torch.equal(random_sae(sae, 3).W_enc, floor.W_enc)
    assert not torch.equal(random_sae(sae, 4).W_enc, floor.W_enc)


def test_the_commands_run_on_files(
    stores: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "drift.html"
    words = ["compare", "drift", *map(str, stores), "--fvu", "10", "--out", str(out)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[2].split()[:2] == ["1", "1.000"]
    assert "<html" in out.read_text()
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"Some words, {n} of them"}) for n in range(6)))
    out = tmp_path / "transfer.json"
    words = [
        "compare",
        "transfer",
        "--sae",
        GROUP,
        "--layers",
        "2",
        "--models",
        "mini-qwen3",
        "--texts",
        str(texts),
        "--out",
        str(out),
    ]
    assert main(words) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["model"] for row in rows] == ["mini-qwen3", "random SAE"]
    assert main([*words[:5], "9", *words[6:]]) == 1
    assert "layer 9 is not in" in capsys.readouterr().err


def test_an_sae_of_another_width_is_refused(base_model: ScopeBridge, home: Path) -> None:
    with pytest.raises(WrongModel, match="made for another model"):
        fidelity(base_model, {1: qsl.load_sae("local/mine/1")}, ["some text"])
    with pytest.raises(TooLittleData):
        fidelity(base_model, {}, ["x"])
