"""Rare negatives: which rollouts are steered, and plain GRPO when the strength is zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from training_data import GROUP, losses, mini, settings
from trl import GRPOConfig, GRPOTrainer

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadPlan, WrongModel
from qwen_scope_lens.steering import Edit, Plan
from qwen_scope_lens.train import RareNegativeGRPOConfig, RareNegativeGRPOTrainer, no_repetition
from qwen_scope_lens.train.rare_negatives import in_hindsight

PROMPTS = ["The package manager", "Установка программ", "Use the command", "一个文件"]
STRONG = 400.0  # about the length of the residual there


def reward(completions: Sequence[str], **_: Any) -> list[float]:
    """Something that differs between rollouts: the share of letters a."""
    return [text.count("a") / max(1, len(text)) for text in completions]


def plan(strength: float, where: str = "generation") -> Plan:
    return Plan([Edit(FeatureRef(GROUP, 5, 7), "add", strength, where=where)])


def run(folder: Path, strength: float | None, rewards: Any = reward, **changes: Any) -> Any:
    """A trained run: plain GRPO for strength None."""
    given = settings(
        folder,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=8,
        learning_rate=1e-3,
        loss_type="dapo",
        epsilon_high=0.28,
        beta=0.0,
        **changes,
    )
    model, tokenizer = mini()
    data = Dataset.from_list([{"prompt": text} for text in PROMPTS])
    common = {"train_dataset": data, "processing_class": tokenizer}
    if strength is None:
        trainer: Any = GRPOTrainer(model, rewards, GRPOConfig(**given), **common)
    else:
        trainer = RareNegativeGRPOTrainer(
            model, rewards, RareNegativeGRPOConfig(**given), plan=plan(strength), **common
        )
    trainer.train()
    return trainer


def same_weights(a: Any, b: Any) -> bool:
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_zero_strength_is_plain_grpo_bit_for_bit(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", None)
    ours = run(tmp_path / "ours", 0.0)
    assert losses(ours) == losses(plain)
    assert losses(ours, "reward") == losses(plain, "reward")
    assert same_weights(ours, plain)
    steered = run(tmp_path / "steered", STRONG)
    assert not same_weights(steered, plain)
    assert losses(steered, "rollouts/plan_fired") == [1.0, 1.0]
    assert not any(layer._forward_hooks for layer in steered.model.model.layers)


def test_the_last_rollout_of_each_group_is_steered_and_no_other(tmp_path: Path) -> None:
    """Sampled almost greedily, the own rollouts of a prompt agree; the steered one differs."""
    seen: list[list[str]] = []

    def spy(completions: Sequence[str], **_: Any) -> list[float]:
        seen.append(list(completions))
        return [0.0] * len(completions)

    run(tmp_path, STRONG, rewards=spy, max_steps=1, temperature=1e-4)
    (texts,) = seen
    assert len(texts) == 8
    for start in (0, 4):
        own, steered = texts[start : start + 3], texts[start + 3]
        assert len(set(own)) == 1
        assert steered not in own


class EngineDouble:
    """Stands for TRL's VLLMGeneration: every reply is the same three tokens."""

    REPLY = (300, 301, 302)

    def __init__(self, **settings: Any) -> None:
        self.synced = 0

    def sync_weights(self) -> None:
        self.synced += 1

    def generate(self, prompts: Any, **_: Any) -> Any:
        replies = [list(self.REPLY) for _ in prompts]
        return prompts, replies, [[[-1.0] for _ in reply] for reply in replies], None


@pytest.mark.slow
def test_with_vllm_only_the_steered_rollouts_come_from_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contract with TRL's vLLM engine. No real engine has been run."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", EngineDouble)
    seen: list[list[str]] = []

    def spy(completions: Sequence[str], **_: Any) -> list[float]:
        seen.append(list(completions))
        return [float(len(set(text))) for text in completions]

    greedy = {"max_steps": 1, "temperature": 1e-4}
    with_vllm = run(tmp_path / "vllm", STRONG, rewards=spy, use_vllm=True, **greedy)
    without = run(tmp_path / "own", STRONG, rewards=spy, **greedy)
    vllm, own = seen
    engine = without._tokenizer.decode(EngineDouble.REPLY)
    for start in (0, 4):
        assert vllm[start : start + 3] == [engine] * 3
        assert vllm[start + 3] == own[start + 3] != engine
    assert with_vllm.use_vllm
    assert with_vllm.vllm_generation.synced == 1
    assert losses(with_vllm, "rollouts/plan_fired") == [1.0]
    assert all(map(math.isfinite, losses(with_vllm)))
    assert not same_weights(with_vllm, without)


def test_more_than_one_may_be_steered(tmp_path: Path) -> None:
    trainer = run(tmp_path, 5.0, steered_per_group=2, max_steps=1)
    assert trainer.steered_rows(8) == [False, False, True, True] * 2
    with pytest.raises(ValueError, match="less than num_generations"):
        RareNegativeGRPOConfig(
            **settings(tmp_path, per_device_train_batch_size=4),
            num_generations=4,
            steered_per_group=4,
        )


def test_the_ratio_may_use_the_policy_that_wrote(tmp_path: Path) -> None:
    """Steered log-probabilities equal those of a pass under the plan, row by row."""
    trainer = run(tmp_path, 100.0, behaviour="steered", max_steps=1)
    tokenizer = trainer._tokenizer
    rows = [tokenizer(text)["input_ids"] for text in ("Use the command", "a b")] * 2
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    prompt = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    reply = torch.arange(20).reshape(4, 5) + 300
    output = {
        "prompt_ids": prompt,
        "prompt_mask": (prompt != pad).long(),
        "completion_ids": reply,
        "completion_mask": torch.ones_like(reply),
    }
    found = trainer.behaviour_logprobs(output)
    model = trainer.model.eval()
    direction = 100.0 * _direction()
    assert set(trainer.steered_rows(4)) == {True, False}
    for row, ids in enumerate(rows):
        tokens = torch.tensor([[*ids, *reply[row].tolist()]])
        start = len(ids)

        def push(module: Any, args: Any, x: Any, start: int = start) -> Any:
            x = x[0] if isinstance(x, tuple) else x
            change = torch.zeros_like(x)
            change[:, start:] = direction
            return x + change

        steered = trainer.steered_rows(4)[row]
        handle = model.model.layers[5].register_forward_hook(push) if steered else None
        with torch.no_grad():
            logits = model(tokens).logits[0, start - 1 : -1] / trainer.temperature
        if handle is not None:
            handle.remove()
        expected = logits.log_softmax(-1)[torch.arange(5), reply[row]]
        torch.testing.assert_close(found[row], expected, atol=2e-4, rtol=2e-4)


def _direction() -> torch.Tensor:
    import qwen_scope_lens as qsl

    return qsl.load_directions(f"{GROUP}/5/7").detach()


def test_the_true_ratio_of_a_steered_rollout_is_clipped_away(tmp_path: Path) -> None:
    """Why the default is the unsteered policy: pi / pi_steered lies far below 1 - epsilon."""
    trainer = run(tmp_path, STRONG, behaviour="steered", max_steps=1)
    kept: dict[str, Any] = {}
    original = trainer.behaviour_logprobs

    def spy(output: dict[str, Any]) -> torch.Tensor:
        kept["output"], kept["steered"] = output, original(output)
        return kept["steered"]

    trainer.behaviour_logprobs = spy
    trainer.model.train()
    trainer._generate_and_score_completions([{"prompt": PROMPTS[0]}] * 4)
    output = kept["output"]
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with torch.no_grad():
        plain, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, output["completion_ids"].shape[1]
        )
    ratio = (plain - kept["steered"]).exp()
    torch.testing.assert_close(ratio[:3], torch.ones_like(ratio[:3]), atol=1e-3, rtol=1e-3)
    assert float(ratio[3].median()) < 0.8


def test_hindsight_places_an_edit_as_it_acted() -> None:
    def spans(where: str) -> Any:
        (edit,) = in_hindsight(plan(1.0, where), 9).edits
        assert edit.where.phase == "both"
        return edit.where.positions

    assert spans("generation") == ((9, None),)
    assert spans("both") == ((1, None),)
    assert spans("prompt") == ((1, 9),)
    assert spans("both,first") == ((0, None),)


@pytest.mark.parametrize(
    ("changes", "rest", "named"),
    [
        ({"use_vllm": True, "generation_kwargs": {"top_k": 1}}, {}, "generation_kwargs"),
        ({"use_transformers_continuous_batching": True}, {}, "continuous_batching"),
        ({}, {"rollout_func": print}, "rollout_func"),
        ({}, {"tools": [print]}, "tools"),
        ({"mask_truncated_completions": True}, {}, "endless repetition"),
    ],
)
def test_what_bypasses_the_hooks_is_refused(
    tmp_path: Path, changes: dict[str, Any], rest: dict[str, Any], named: str
) -> None:
    args = RareNegativeGRPOConfig(
        **settings(tmp_path, num_generations=2, per_device_train_batch_size=2, **changes)
    )
    with pytest.raises(WrongModel, match=named):
        RareNegativeGRPOTrainer(None, reward, args, plan=plan(1.0), **rest)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    args = RareNegativeGRPOConfig(
        **settings(tmp_path, num_generations=2, per_device_train_batch_size=2, behaviour="steered")
    )
    with pytest.raises(BadPlan, match="edits without positions"):
        RareNegativeGRPOTrainer(None, reward, args, plan=plan(1.0, "both,pos=3-5"))
    with pytest.raises(BadPlan, match="expected a Plan"):
        RareNegativeGRPOTrainer(None, reward, args, plan=None)  # type: ignore[arg-type]
    with pytest.raises(WrongModel, match="RareNegativeGRPOConfig"):
        RareNegativeGRPOTrainer(
            None, reward, GRPOConfig(**settings(tmp_path, num_generations=2)), plan=plan(1.0)
        )
    with pytest.raises(ValueError, match="behaviour 'other'"):
        RareNegativeGRPOConfig(**settings(tmp_path, num_generations=2), behaviour="other")  # type: ignore[arg-type]


def test_a_reward_of_ours_goes_through_trls_loop(tmp_path: Path) -> None:
    trainer = run(tmp_path, 0.0, rewards=no_repetition(min_times=2, min_items=2))
    rewards = losses(trainer, "reward")
    assert len(rewards) == 2
    assert all(-1 <= value <= 0 for value in rewards)
