"""The reward as TRL calls it: what passes, what is refused, and which row it sees."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from dqo.errors import DQOError
from dqo.rewards import RuleReward, TrlReward, score
from dqo.tasks.story import STORY

COLUMNS = {"prompts": ["p", "q"], "references": [["A dog ran."], ["It rained."]], "concepts": [["dog"], ["rain"]]}


def reward(function: Callable[[str, Any], Any]) -> TrlReward:
    task = replace(STORY, reward=function)
    return TrlReward(RuleReward(task), task)


def scored(value: Any, completions: list[Any] = ["one", "two"]) -> list[Any]:  # noqa: B006
    return reward(lambda text, row: value)(completions, **COLUMNS)


class Fixed:
    """A reward that is no task's rule."""

    name = "fixed"

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, responses: Sequence[str], rows: Sequence[Any]) -> list[Any]:
        return [self.value for _ in responses]


def assert_the_same(got: list[Any], expected: float | None) -> None:
    assert got == [expected] * len(got)
    assert all(type(value) is (type(None) if expected is None else float) for value in got)


NUMBERS = [
    (0.0, 0.0), (0.25, 0.25), (1, 1.0), (1.0, 1.0), (None, None), (True, 1.0), (False, 0.0), (Fraction(1, 4), 0.25),
    (np.float32(0.5), 0.5), (np.float64(0.1), 0.1), (np.int64(1), 1.0), (np.bool_(True), 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("value", "expected"), NUMBERS, ids=repr)
def test_a_number_comes_back_as_a_float_and_none_as_it_is(value: Any, expected: float | None):
    assert_the_same(scored(value), expected)
    assert_the_same(score(Fixed(value), ["one", "two"], [{}, {}]), expected)


@pytest.mark.parametrize("value", [-3.5, 1e300, np.float32(-2.0)], ids=repr)
def test_only_a_rule_is_held_to_a_quality_from_0_to_1(value: float):
    assert_the_same(score(Fixed(value), ["one", "two"], [{}, {}]), float(value))
    with pytest.raises(DQOError) as caught:
        scored(value, ["A dog ran."])
    assert str(caught.value) == (
        f"reward 'story_reward': got {value!r} for the response 'A dog ran.'; expected a number in [0, 1], or None "
        "where the response cannot be judged"
    )


def test_a_quality_that_rounding_has_put_beyond_the_bounds_is_the_bound():
    assert sum([np.float32(0.1)] * 10) > 1.0
    assert_the_same(scored(sum([np.float32(0.1)] * 10)), 1.0)
    assert_the_same(scored(0.3 - 0.1 * 3), 0.0)
    assert_the_same(scored(1 - 1e-9), 1 - 1e-9)
    for value in (1 + 1e-5, -1e-5):
        with pytest.raises(DQOError, match=r"expected a number in \[0, 1\]"):
            scored(value)


def test_nan_passes_and_so_leaves_the_response_out_of_its_group():
    assert [math.isnan(value) for value in scored(math.nan)] == [True, True]


BAD = [math.inf, -math.inf, np.float32(math.inf), 10**400, "0.5", [0.5], np.array([0.5]), torch.tensor(0.5), 1j]


@pytest.mark.parametrize("value", BAD, ids=lambda value: repr(value)[:20])
def test_a_value_that_is_no_finite_number_is_refused_with_the_response(value: Any):
    with pytest.raises(DQOError) as caught:
        scored(value, ["A dog ran."])
    message = str(caught.value)
    assert message.startswith("reward 'story_reward': ")
    assert f"got {repr(value)[:80]} for the response 'A dog ran.'" in message
    assert "expected a number in [0, 1], or None" in message
    with pytest.raises(DQOError, match=r"reward 'fixed': got .* expected a finite number, or None"):
        score(Fixed(value), ["A dog ran."], [{}])


def test_one_bad_value_in_the_batch_is_enough_and_a_long_response_is_cut_in_the_message():
    values = iter([0.5, math.inf])
    with pytest.raises(DQOError) as caught:
        reward(lambda text, row: next(values))(["first", "x" * 200], **COLUMNS)
    assert "first" not in str(caught.value)
    assert f"{'x' * 80!r};" in str(caught.value)


def test_what_a_rule_raises_is_named_with_task_response_and_place():
    def rule(text: str, row: Any) -> float:
        return len(row["thing"]) / len(text)

    line = rule.__code__.co_firstlineno + 1
    with pytest.raises(DQOError) as caught:
        reward(rule)(["x" * 200, "two"], **COLUMNS)
    assert str(caught.value) == (
        f"task 'story': reward raises KeyError: 'thing' ({__file__}, line {line}) for {'x' * 80!r}"
    )
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_in_words_of_a_rules_own_is_left_as_it_is():
    def rule(text: str, row: Any) -> float:
        raise DQOError("the dictionary is missing")

    with pytest.raises(DQOError, match=r"^the dictionary is missing$"):
        reward(rule)(["one", "two"], **COLUMNS)


def test_strings_and_message_lists_are_scored_by_their_last_text():
    count = reward(lambda text, row: len(text.split()) / 10)
    answer = {"role": "assistant", "content": "three words here"}
    assert count(["one", "two words"], **COLUMNS) == [0.1, 0.2]
    assert count([[answer], [{"role": "assistant", "content": "a tool call"}, answer]], **COLUMNS) == [0.3, 0.3]


def test_each_response_is_scored_against_the_row_of_its_own_index():
    rows = []
    columns = COLUMNS | {"completion_ids": [[1], [2]], "trainer_state": None}
    reward(lambda text, row: rows.append((text, dict(row))))(["one", "two"], **columns)
    assert rows == [
        ("one", {"prompt": "p", "references": ["A dog ran."], "concepts": ["dog"]}),
        ("two", {"prompt": "q", "references": ["It rained."], "concepts": ["rain"]}),
    ]


def test_the_storys_own_reward_is_what_trl_gets():
    responses = ["The dog ran to the old barn.", "No."]
    rows = [{name: values[index] for name, values in COLUMNS.items()} for index in range(2)]
    expected = [STORY.reward(response, row) for response, row in zip(responses, rows, strict=True)]
    assert expected[0] != expected[1]
    assert TrlReward(RuleReward(STORY), STORY)(responses, **COLUMNS) == expected
    assert TrlReward(RuleReward(STORY), STORY).__name__ == "story_reward"
