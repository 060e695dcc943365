"""Code-switching ratio, repeat ratio, and the rewards made of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_scope_lens.errors import TooLittleData, UnknownName
from qwen_scope_lens.train import (
    code_switching_ratio,
    find_repeats,
    has_script,
    no_repetition,
    repeat_ratio,
    share,
)
from qwen_scope_lens.train.metrics import no_script


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("plain English, 123 — “quoted”", "zh", False),
        ("one 字 is enough", "zh", True),
        ("𠀀 beyond the first plane", "zh", True),
        ("ひらがな only", "zh", False),
        ("漢字 in Japanese is Han too", "zh", True),
        ("한 syllable", "ko", True),
        ("ᄒ alone, a conjoining letter", "ko", True),
        ("да", "ru", True),
        ("naïve café ß", "ru", False),
        ("", "ru", False),
    ],
)
def test_any_character_of_the_script_counts(text: str, language: str, expected: bool) -> None:
    assert has_script(text, language) is expected


def test_a_language_without_its_own_script_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"'de' has no script.*zh, ko, ru"):
        has_script("Wort", "de")
    with pytest.raises(UnknownName):
        no_script("de")


def test_ratio_counts_replies_not_characters() -> None:
    found = code_switching_ratio(["abc", "字字字字", "a字", "abc"], "zh")
    assert (found.count, found.total, found.value) == (2, 4, 0.5)
    assert 0 < found.low < 0.5 < found.high < 1
    with pytest.raises(TooLittleData):
        code_switching_ratio([], "zh")


def test_wilson_against_its_formula() -> None:
    """p = 0, n = 10: the upper end is z^2 / (n + z^2)."""
    z2 = 1.959963984540054**2
    found = share([False] * 10)
    assert found.low == 0
    assert found.high == pytest.approx(z2 / (10 + z2))


def test_replies_to_one_prompt_are_resampled_together() -> None:
    """Ten identical replies to each of six prompts say as little as one reply to each."""
    hits = np.repeat([True, False, True, False, True, False], 10).tolist()
    prompts = np.repeat(np.arange(6), 10).tolist()
    alone, together = share(hits), share(hits, prompts)
    assert together.high - together.low > 2 * (alone.high - alone.low)
    with pytest.raises(TooLittleData, match="one prompt"):
        share([True, False], ["a", "a"])
    with pytest.raises(ValueError, match="expected one per reply"):
        share([True], ["a", "b"])


def _ends_in_loop(items: list[int], times: float, least: int, most: int) -> bool:
    """The rule, word by word."""
    for period in range(1, most + 1):
        for length in range(max(least, int(np.ceil(times * period))), len(items) + 1):
            tail = items[len(items) - length :]
            if all(tail[i] == tail[i - period] for i in range(period, length)):
                return True
    return False


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(2, 5), st.integers(2, 12))
def test_loops_are_found_as_the_rule_says(items: list[int], times: int, least: int) -> None:
    found = find_repeats(items, min_times=times, min_items=least, max_period=8)
    assert (found is not None) == _ends_in_loop(items, times, least, 8)


def test_a_loop_may_be_cut_off_and_the_shortest_unit_counts() -> None:
    unit = list(range(7))
    found = find_repeats([9, 9, 9, *unit * 5, 0, 1, 2])
    assert found is not None
    assert found.period == 7
    assert found.times == pytest.approx(38 / 7)
    assert find_repeats([*unit * 5, 99]) is None  # it got out of the loop
    assert find_repeats([]) is None
    assert find_repeats("ha" * 20) is not None
    assert find_repeats("ha" * 20, max_period=1) is None
    with pytest.raises(ValueError, match="min_times"):
        find_repeats("ha", min_times=1)


def test_repeat_ratio_takes_any_detector() -> None:
    replies = ["na " * 20, "a sentence that simply ends here."]
    assert repeat_ratio(replies).count == 1
    assert repeat_ratio(replies, detect=lambda reply: None).count == 0


def test_rewards_have_trls_shape() -> None:
    loop, plain = [5, 6] * 20, list(range(40))
    reward = no_repetition(-2.0, min_times=10)
    ids = [loop, plain]
    assert reward(completions=["", ""], completion_ids=ids, prompts=["", ""]) == [-2.0, 0.0]
    script = no_script("zh")
    message = [{"role": "assistant", "content": "一"}]
    assert script(completions=["plain", message], completion_ids=ids) == [0.0, -1.0]
