"""The reward as TRL calls it: what passes, what is refused, and which row it sees."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dqo.errors import DQOError
from dqo.rewards import RuleReward, TrlReward
from dqo.tasks.story import STORY

COLUMNS = {"prompts": ["p", "q"], "references": [["A dog ran."], ["It rained."]], "concepts": [["dog"], ["rain"]]}


def reward(function: Callable[[str, Any], Any]) -> TrlReward:
    task = replace(STORY, reward=function)
    return TrlReward(RuleReward(task), task)


def scored(value: Any, completions: list[Any] = ["one", "two"]) -> list[Any]:  # noqa: B006
    return reward(lambda text, row: value)(completions, **COLUMNS)


@pytest.mark.parametrize("value", [0.0, 0.25, 1, 1.0, -3.5, 1e300, None])
def test_a_finite_number_or_none_passes_as_it_is(value: float | None):
    assert scored(value) == [value, value]


def test_nan_passes_and_so_leaves_the_response_out_of_its_group():
    assert [math.isnan(value) for value in scored(math.nan)] == [True, True]


@pytest.mark.parametrize("value", [math.inf, -math.inf, "0.5", [0.5]], ids=repr)
def test_a_value_that_is_no_finite_number_is_refused_with_the_response(value: Any):
    with pytest.raises(DQOError) as caught:
        scored(value, ["A dog ran."])
    message = str(caught.value)
    assert message.startswith("reward 'story_reward': ")
    assert f"got {value!r} for the response 'A dog ran.'" in message
    assert "expected a finite number, or None" in message


def test_one_bad_value_in_the_batch_is_enough_and_a_long_response_is_cut_in_the_message():
    values = iter([0.5, math.inf])
    with pytest.raises(DQOError) as caught:
        reward(lambda text, row: next(values))(["first", "x" * 200], **COLUMNS)
    assert "first" not in str(caught.value)
    assert f"{'x' * 80!r};" in str(caught.value)


def test_strings_and_message_lists_are_scored_by_their_last_text():
    count = reward(lambda text, row: len(text.split()))
    answer = {"role": "assistant", "content": "three words here"}
    assert count(["one", "two words"], **COLUMNS) == [1, 2]
    assert count([[answer], [{"role": "assistant", "content": "a tool call"}, answer]], **COLUMNS) == [3, 3]


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
