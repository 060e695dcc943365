"""The tour that `qsl demo` gives: the main job on the embedded default, offline, in a minute.

Everything it does is a few lines of the public interface; read it as an example. The strengths are
in units of a feature's typical activation (its mean where it fires).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers

import qwen_scope_lens as qsl
from qwen_scope_lens.mini import heldout

__all__ = ["run"]

MODEL, GROUP, LAYER = "mini-qwen3", "mini-qwen3/w1k-l0-16", 6
LANGUAGES = {
    "zh": "Chinese",
    "ja": "Japanese",
    "ko": "Korean",
    "ru": "Russian",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "en": "English",
}
SCRIPTS = {"zh": ("一", "鿿"), "ko": ("가", "힣"), "ru": ("Ѐ", "ӿ")}  # first, last letter
SENTENCES = (
    "The package manager installs programs and their documentation.",
    "Die Paketverwaltung installiert Programme und ihre Dokumentation.",
    "软件包管理器安装程序及其文档。",
    "def install(package):\n    return manager.install(package)",
)
FEATURES_STEERED = 3
STRENGTHS = {"suppressed": -1.0, "as it is": 0.0, "amplified": 2.0}
PROMPTS = {"zh": "安装程序", "ko": "설치 프로그램", "ru": "Программа установки"}
ENGLISH_PROMPT = "The package manager is a tool that"


@dataclass(frozen=True)
class Found:
    """A feature that tells one language from the others."""

    feature: int
    rate: float  # share of the language's tokens it fires on
    elsewhere: float  # the same for the language where it fires most of the others
    typical: float  # mean activation where it fires


def run(language: str = "zh") -> None:
    """Print the tour. `language` is the one to find and steer: zh, ko or ru."""
    started = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    print(
        "Qwen-Scope Lens on a toy: a Qwen3 of 8 layers that this project trained, and its SAEs.\n"
    )
    group = qsl.find_group(GROUP)
    print(f"{group.short}: layers 0-{group.layers[-1]}, d_model {group.d_model},", end=" ")
    print(f"{group.d_sae} features, {group.k} active a token.\n")
    with _step(f"load the model and the SAE of layer {LAYER}"):
        model = qsl.load_model(MODEL)
        sae = qsl.load_sae(f"{GROUP}/{LAYER}")
    with _step("verify that they belong together"):
        check = qsl.verify_model(model, sae)
    _indent(str(check.verification))
    with _step("read four texts"):
        rows = [_strongest(model, sae, text) for text in SENTENCES]
    for text, row in zip(SENTENCES, rows, strict=True):
        print(f"    {text.splitlines()[0][:60]}")
        print(f"        {row}")
    name = LANGUAGES[language]
    with _step(f"find the features of {name}: what fires on it and on no other of 8 languages"):
        found = _find(model, sae, language)
    for one in found:
        ref = f"{GROUP}/{LAYER}/{one.feature}"
        print(
            f"    {ref:30} fires on {one.rate:4.0%} of {name} tokens, on at most"
            f" {one.elsewhere:.0%} of any other language's"
        )
    with _step(f"generate with these {len(found)} features suppressed and amplified"):
        table = _steer(model, sae, found, language)
    _indent(table)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. The same with a real model:")
    print("    qsl verify qwen3-8b-base/w64k-l0-50/20 --model Qwen/Qwen3-8B-Base")


def _strongest(model: Any, sae: qsl.ScopeSAE, text: str) -> str:
    """The features with the largest activation in a text, and the token where."""
    read = qsl.capture(model, [text], [LAYER])
    keep = read.keep(LAYER)
    codes = sae.encode_sparse(read.residuals[LAYER][keep])
    best = codes.to_dense().max(dim=0)
    tokens = [model.tokenizer.decode([int(token)]) for token in read.token_ids[keep]]
    features = best.values.topk(4).indices.tolist()
    return ", ".join(f"{f} on {tokens[int(best.indices[f])]!r}" for f in features)


def _find(model: Any, sae: qsl.ScopeSAE, language: str) -> list[Found]:
    """Ranked by the difference of firing rates to the most similar other language."""
    rates, typical = {}, torch.zeros(sae.cfg.d_sae)
    for other in LANGUAGES:
        texts = [record["text"] for record in heldout("prose", other)][:20]
        read = qsl.capture(model, texts, [LAYER], truncate=True)
        dense = sae.encode_sparse(read.residuals[LAYER][read.keep(LAYER)]).to_dense()
        fired = (dense > 0).sum(dim=0)
        rates[other] = fired / len(dense)
        if other == language:
            typical = dense.sum(dim=0) / fired.clamp(min=1)
    elsewhere = torch.stack([rates[other] for other in rates if other != language]).amax(dim=0)
    best = (rates[language] - elsewhere).topk(FEATURES_STEERED).indices.tolist()
    return [
        Found(f, float(rates[language][f]), float(elsewhere[f]), float(typical[f])) for f in best
    ]


def _steer(model: Any, sae: qsl.ScopeSAE, found: Sequence[Found], language: str) -> str:
    """The share of the language's letters in what is generated, with a random control."""
    features = [one.feature for one in found]
    typical = torch.tensor([one.typical for one in found])
    push = typical @ sae.direction(features)
    rng = torch.Generator().manual_seed(0)
    chance = torch.randn(push.shape, generator=rng)
    controls = {"the features": push, "control: random": chance * push.norm() / chance.norm()}
    lines = []
    for prompt in (ENGLISH_PROMPT, PROMPTS[language]):
        lines.append(f"{prompt} ...")
        for kind, direction in controls.items():
            for label, strength in STRENGTHS.items():
                if strength == 0 and kind != "the features":
                    continue
                text = _generate(model, prompt, strength * direction)
                share = _share(text, SCRIPTS[language])
                shown = " ".join(text.split())[:44]
                lines.append(f"    {kind:16} {label:11} {share:4.0%} {language}   {shown}")
    return "\n".join(lines)


def _generate(model: Any, prompt: str, change: torch.Tensor) -> str:
    """Greedy continuation with `change` added to the residual after the layer, everywhere."""
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    hook = (f"blocks.{LAYER}.hook_resid_post", lambda residual, hook: residual + change)
    with torch.no_grad(), model.hooks(fwd_hooks=[hook]):
        out = model.generate(ids, max_new_tokens=32, do_sample=False, verbose=False)
    return str(model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def _share(text: str, script: tuple[str, str]) -> float:
    letters = [letter for letter in text if letter.isalpha()]
    return sum(script[0] <= letter <= script[1] for letter in letters) / max(1, len(letters))


@contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"* {what} ...", end=" ", flush=True)
    started = time.perf_counter()
    yield
    print(f"{time.perf_counter() - started:.1f} s", flush=True)


def _indent(text: str) -> None:
    print("    " + text.replace("\n", "\n    "))
