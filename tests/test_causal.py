"""Selection by cause: the arms beside a plan, what it costs, and the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tokenizer

import qwen_scope_lens as qsl
from qwen_scope_lens.errors import BadPlan, TooLittleData
from qwen_scope_lens.steering import Examples, Plan, Sampling, Sweep, causes, generate, sweep
from qwen_scope_lens.steering.arms import asking, capability, likeness, mean_difference
from qwen_scope_lens.steering.causal import cause_of
from qwen_scope_lens.steering.generate import Continuation
from qwen_scope_lens.steering.hooks import steer
from qwen_scope_lens.steering.sweep import CONTROL, DIFFERENCE, PLAN, Dose
from qwen_scope_lens.steering.text_quality import perplexity, surprisals

TEXTS = ["a first text, long enough", "another one", "third: 123"]
EXAMPLES = Examples(("good words here", "more good words"), ("bad ones", "others that are bad"))
NEUTRAL = ["a neutral text of some length", "and one more of them"]
REF = "local/tiny/1/3"


pytestmark = pytest.mark.usefixtures("tiny_home")


def test_a_mean_difference_is_that_of_texts(tiny_model: Any) -> None:
    means = []
    for side in (EXAMPLES.positive, EXAMPLES.negative):
        rows = []
        for text in side:
            read = qsl.capture(tiny_model, [text], [1])
            rows.append(read.residuals[1][read.keep(1)].double().mean(0))
        means.append(torch.stack(rows).mean(0))
    found = mean_difference(tiny_model, EXAMPLES, [1])
    torch.testing.assert_close(found[1].double(), means[0] - means[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(TooLittleData, match="at least one of each"):
        Examples(("one",), ())
    with pytest.raises(TooLittleData, match="several tokens"):
        mean_difference(tiny_model, Examples(("a",), ("b",)), [1])


def test_a_push_along_a_direction_is_as_long_as_before(tiny_model: Any, tiny_world: Any) -> None:
    plan = Plan([f"{REF}:add:4"])
    direction = torch.randn(tiny_world[1]["W_dec"].shape[0])
    ids = torch.tensor([list(b"some text")])
    plain = qsl.capture(tiny_model, [ids[0].tolist()], [1]).residuals[1]
    pushed = {}
    for name, control in (("plan", None), ("along", {1: direction})):
        seen: list[torch.Tensor] = []
        with steer(tiny_model, plan, control=control), torch.no_grad():
            tiny_model.run_with_hooks(
                ids,
                fwd_hooks=[
                    ("blocks.1.hook_resid_post", lambda x, hook, s=seen: s.append(x.clone()))
                ],
            )
        pushed[name] = (seen[0][0] - plain)[1:]
    torch.testing.assert_close(
        pushed["along"].norm(dim=-1), pushed["plan"].norm(dim=-1), rtol=1e-3, atol=1e-4
    )
    cosine = torch.cosine_similarity(pushed["along"], direction[None], dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-3, atol=1e-3)
    with (
        pytest.raises(BadPlan, match="a length above 0"),
        steer(tiny_model, plan, control={1: torch.zeros_like(direction)}),
    ):
        pass


def test_every_arm_is_what_it_is_called(tiny_model: Any, tmp_path: Path) -> None:
    plan, keep = Plan([f"{REF}:add:1"]), tmp_path / "sweep.json"
    options: dict[str, Any] = {"sampling": Sampling(new_tokens=5), "allow_other_model": True}
    more: dict[str, Any] = {"ask": "Write well.", "examples": EXAMPLES, "neutral": NEUTRAL}
    found = sweep(tiny_model, plan, [8], TEXTS, "change", keep=keep, **more, **options)
    assert Sweep.load(keep) == found
    assert sweep(tiny_model, plan, [8], TEXTS, "change", keep=keep, **more, **options) == found
    [_, mine] = found.arm(PLAN)
    [_, along] = found.arm(DIFFERENCE)
    [_, chance] = found.arm(CONTROL)
    directions = mean_difference(tiny_model, EXAMPLES, [1])
    texts = generate(tiny_model, TEXTS, plan.at(8), control=directions, **options)
    assert along.sample == texts[0].text
    assert along.perplexity == pytest.approx(perplexity(surprisals(tiny_model, texts)))
    asked = generate(tiny_model, asking(TEXTS, "Write well."), None, **options)
    assert found.asked is not None
    assert found.asked.sample == asked[0].text
    unsteered = capability(tiny_model, NEUTRAL)
    assert found.plain.capability == pytest.approx(unsteered)
    read = [Continuation((ids[0],), tuple(ids[1:]), "") for ids in map(_ids, NEUTRAL)]
    assert unsteered == pytest.approx(perplexity(surprisals(tiny_model, read)))
    assert mine.capability == pytest.approx(capability(tiny_model, NEUTRAL, plan.at(8)))
    assert mine.capability != pytest.approx(unsteered)
    assert chance.capability is None
    only_generation = Plan([f"{REF}:add:8@generation"])
    assert capability(tiny_model, NEUTRAL, only_generation) == pytest.approx(mine.capability)
    with pytest.raises(BadPlan, match="a plan is active"), steer(tiny_model, plan, must_fire=False):
        surprisals(tiny_model, read)
    page = found.page().render()
    assert "prompt only" in page
    assert "mean difference of activations" in page
    assert "prompt only: " in str(found)
    # A file of the version before has none of this.
    old = json.loads(keep.read_text())
    old["version"] = 2
    for part in (old, *old["doses"]):
        part.pop("asked", None)
        part.pop("capability", None)
    old["guard"].pop("neutral_ratio")
    keep.write_text(json.dumps(old))
    assert Sweep.load(keep).asked is None


def _ids(text: str) -> list[int]:
    found: list[int] = make_tokenizer().encode(text, add_special_tokens=False)
    return found


def test_prompts_are_asked_in_their_own_form() -> None:
    chat = [{"role": "user", "content": "hello"}]
    system = [{"role": "system", "content": "be kind"}, *chat]
    assert asking(["a text", chat, system], "Do it.") == [
        "Do it.\na text",
        [{"role": "system", "content": "Do it."}, *chat],
        [{"role": "system", "content": "be kind\nDo it."}, *chat],
    ]
    for prompts, ask in (([[1, 2]], "Do it."), (["a text"], " ")):
        with pytest.raises(BadPlan):
            asking(prompts, ask)


def test_likeness_is_what_the_examples_save(tiny_model: Any) -> None:
    measure = likeness(tiny_model, EXAMPLES)
    text = Continuation((1, 2), tuple(b"good words"), "good words")
    values = []
    for side in (EXAMPLES.positive, EXAMPLES.negative):
        context = tuple(token for one in side for token in _ids(f"{one}\n"))
        [value] = surprisals(tiny_model, [Continuation(context, text.ids, "")])
        assert value is not None
        values.append(value)
    assert measure.of(text, text) == pytest.approx(values[1] - values[0])
    assert measure.of(Continuation((1,), (), ""), text) == 0
    assert measure.name != likeness(tiny_model, Examples(("x",), ("y",))).name


def test_the_verdict_asks_for_more_than_chance() -> None:
    def dose(arm: str, strength: float, effect: float, low: float, cost: float | None) -> Dose:
        return Dose(arm, strength, effect, low, effect, 10.0, 0.0, "", cost)

    def judged(*doses: Dose, asked: float | None = None, prompts: int = 6) -> Any:
        plain = dose(PLAN, 0, 0.0, 0.0, 5.0)
        said = None if asked is None else dose("prompt only", 0, asked, asked, None)
        settings = {"prompts": prompts}
        made = Sweep("p", "norm", "m", "", settings, (plain, *doses), asked=said)
        return cause_of(qsl.FeatureRef.parse("mini-qwen3/w1k-l0-16/6/1"), made)

    good = dose(PLAN, 0.4, 0.8, 0.6, 5.5)
    assert judged(good).verdict == "moves it"
    assert judged(good).cost == pytest.approx(1.1)
    assert judged(good, prompts=3).verdict == "4 prompts are needed for a verdict"
    assert judged(good, dose(CONTROL, 0.4, 0.7, 0.1, None)).verdict.startswith("no effect")
    assert judged(dose(PLAN, 0.4, 0.8, 0.6, 8.0)).verdict == "no dose is coherent"  # 1.6 times
    better = judged(good, dose(DIFFERENCE, 0.2, 0.9, 0.8, 5.0), asked=1.0)
    assert better.verdict == "moves it; asking and the mean difference move it more"
    assert (better.difference, better.asked, better.dose) == (0.9, 1.0, 0.4)
    assert judged(good, asked=1.0).verdict == "moves it; asking moves it more"


def test_features_are_ordered_by_what_they_cause(tiny_model: Any) -> None:
    found = causes(
        tiny_model,
        [REF, "local/tiny/1/5"],
        "change",
        prompts=TEXTS,
        doses=[0.5],
        sampling=Sampling(new_tokens=4),
        allow_other_model=True,
    )
    effects = [row.effect if row.effect is not None else -1.0 for row in found.rows]
    assert effects == sorted(effects, reverse=True)
    assert {row.ref for row in found.rows} == {REF, "local/tiny/1/5"}
    assert "mean difference" in str(found)
    with pytest.raises(BadPlan, match="nothing to measure"):
        causes(tiny_model, [REF])
