"""The shipped mini models, SAEs and texts: present, in the official layout, and fit to load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_scope_lens.mini import HELDOUT, MODELS, heldout, model_path, sae_folder
from tools.mini.panel import load_checkpoint
from tools.mini.release import LIMIT, size

Tensors = dict[str, torch.Tensor]
TEXT = "Select the table and print it. 请选择表格。 Выберите таблицу. 표를 선택합니다. 12 + 30 = 42"


def encode(sae: Tensors, x: torch.Tensor, k: int) -> torch.Tensor:
    """The published formula: `TopK(ReLU(x W_enc + b_enc))`."""
    pre = torch.relu(x @ sae["W_enc"].T + sae["b_enc"])
    values, indices = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter_(-1, indices, values)


def decode(sae: Tensors, codes: torch.Tensor) -> torch.Tensor:
    return codes @ sae["W_dec"].T + sae["b_dec"]


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_everything_fits_the_limit() -> None:
    assert size() <= LIMIT


def test_sae_repository_is_laid_out_as_the_official_ones(name: str) -> None:
    config = json.loads((sae_folder(name) / "config.json").read_text())
    assert set(config) == {
        "model_type",
        "base_model",
        "d_model",
        "d_sae",
        "k",
        "num_layers",
        "hook_point",
        "dtype",
    }
    assert config["model_type"] == "topk_sae"
    assert config["hook_point"] == "resid_post"
    d_sae, d_model = config["d_sae"], config["d_model"]
    for layer in range(config["num_layers"]):
        tensors = torch.load(sae_folder(name) / f"layer{layer}.sae.pt", weights_only=True)
        assert {key: tuple(value.shape) for key, value in tensors.items()} == {
            "W_enc": (d_sae, d_model),
            "W_dec": (d_model, d_sae),
            "b_enc": (d_sae,),
            "b_dec": (d_model,),
        }
        assert all(value.dtype == torch.float32 for value in tensors.values())
        assert torch.allclose(tensors["W_dec"].norm(dim=0), torch.ones(d_sae), atol=1e-3)
    assert not (sae_folder(name) / f"layer{config['num_layers']}.sae.pt").exists()


def test_tokenizer_round_trip_and_qwen_conventions(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    for text in (TEXT, "  spaces\t\tand\n\nlines  ", "العربية ελληνικά 🙂", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert len(tokenizer(token)["input_ids"]) == 1
    assert len(tokenizer("2026")["input_ids"]) == 4  # one token a digit


def test_chat_template_follows_enable_thinking(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    messages = [{"role": "user", "content": "Hi"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    plain = tokenizer.apply_chat_template(messages, **options)
    assert plain == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    quiet = tokenizer.apply_chat_template(messages, enable_thinking=False, **options)
    assert quiet == plain + "<think>\n\n</think>\n\n"


def test_model_loads_in_float32_and_its_saes_rebuild_the_residual(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(name)).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    assert next(model.parameters()).dtype == torch.float32
    config = json.loads((sae_folder(name) / "config.json").read_text())
    assert config["num_layers"] == model.config.num_hidden_layers >= 6
    assert config["d_model"] == model.config.hidden_size
    layer = config["num_layers"] // 2
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[layer + 1][0, 1:]
    tensors = torch.load(sae_folder(name) / f"layer{layer}.sae.pt", weights_only=True)
    error = decode(tensors, encode(tensors, x, config["k"])) - x
    assert float(error.pow(2).sum() / (x - x.mean(0)).pow(2).sum()) < 0.5


def test_sae_lens_gives_the_same_codes(name: str) -> None:
    config = json.loads((sae_folder(name) / "config.json").read_text())
    tensors = torch.load(sae_folder(name) / "layer0.sae.pt", weights_only=True)
    sae = SAE.from_dict(
        {
            "architecture": "topk",
            "d_in": config["d_model"],
            "d_sae": config["d_sae"],
            "k": config["k"],
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "rescale_acts_by_decoder_norm": False,
        }
    )
    with torch.no_grad():
        sae.W_enc.copy_(tensors["W_enc"].T)
        sae.W_dec.copy_(tensors["W_dec"].T)
        sae.b_enc.copy_(tensors["b_enc"])
        sae.b_dec.copy_(tensors["b_dec"])
    x = torch.randn(5, config["d_model"], generator=torch.Generator().manual_seed(0)) * 3
    codes = encode(tensors, x, config["k"])
    assert torch.allclose(sae.encode(x), codes, atol=1e-4)
    assert torch.allclose(sae.decode(codes), decode(tensors, codes), atol=1e-4)


def test_heldout_sample_covers_languages_and_contrasts() -> None:
    assert HELDOUT.stat().st_size < 1_000_000
    records = list(heldout())
    assert all(record["split"] == "test" and record["text"] for record in records)
    prose = {record["lang"] for record in heldout("prose")}
    assert prose == {"en", "de", "fr", "es", "ru", "zh", "ja", "ko"}
    for domain, labels in (
        ("tone", {"rude", "polite"}),
        ("request", {"harmful", "harmless"}),
        ("switching", {"clean", "zh", "ru", "ko"}),
        ("repetition", {"loop", "benign"}),
    ):
        assert {record["label"] for record in records if record["domain"] == domain} == labels


def test_no_single_word_separates_the_tones() -> None:
    """A rule "contains this word" must stay weak, or the contrast would be a keyword."""
    for lang in ("en", "de", "fr", "es", "ru"):
        records = list(heldout("tone", lang))
        bags = [set(record["text"].lower().split()) for record in records]
        rude = [record["label"] == "rude" for record in records]
        best = 0.0
        for word in set().union(*bags):
            hits = sum(word in bag and label for bag, label in zip(bags, rude, strict=True))
            fires = sum(word in bag for bag in bags)
            for right, all_hits, of in (
                (hits, fires, sum(rude)),
                (fires - hits, fires, len(rude) - sum(rude)),
            ):
                best = max(best, 2 * right / (all_hits + of))
        assert best < 0.85, lang


def test_unknown_model_is_refused() -> None:
    with pytest.raises(KeyError, match="mini-qwen3"):
        model_path("mini-qwen4")


def test_panel_has_enough_checkpoints_that_load() -> None:
    panel = Path(__file__).parents[1] / "benchmarks" / "data" / "panel"
    index = json.loads((panel / "index.json").read_text())
    assert len(index) >= 14
    assert len({(row["mixture"], row["tokens"]) for row in index}) == len(index)
    assert len({row["mixture"] for row in index}) >= 3
    assert sum(path.stat().st_size for path in panel.iterdir()) < 25_000_000
    first, last = (load_checkpoint(panel, row["name"]) for row in (index[0], index[3]))
    tokenizer = AutoTokenizer.from_pretrained(model_path("mini-qwen3"))
    ids = tokenizer(next(heldout("prose", "en"))["text"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert last(ids, labels=ids).loss < first(ids, labels=ids).loss - 0.5
