"""What people are told of a run's objective and of who earns its bonus."""

import pytest

from dqo.labels import bonus_earners, label, objective
from dqo.recipe import Defences, Method, parse


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({}, "quality + 1 \u00d7 log-volume"),
        ({"alpha": 0.29, "score": "vendi"}, "quality + 0.29 \u00d7 Vendi score"),
        (
            {"alpha": 0.25, "score": "likelihood", "combine": "multiply"},
            "quality \u00d7 (1 - 0.25 (1 - share of the others that are more likely))",
        ),
    ],
)
def test_the_objective_names_what_is_weighed(method: dict, expected: str):
    assert objective(Method(**method)) == expected


def test_every_score_has_words():
    for score in Method.model_fields["score"].annotation.__args__:
        assert objective(Method(score=score)).startswith("quality + 1 \u00d7 ")


@pytest.mark.parametrize(
    ("defences", "expected"),
    [
        ({}, "every response"),
        ({"unearned": "apart"}, "every response"),
        ({"min_quality": 0.9}, "quality of at least 0.9; the others get a bonus of 0"),
        (
            {"min_quality": 0.9, "quality_gate": "group", "unearned": "apart"},
            "one of the group with quality of at least 0.9; the others get the advantage of their quality alone",
        ),
        (
            {"drop_truncated": True, "max_tokens": 40, "min_prompt_similarity": 0.2, "embed": "answer"},
            "not cut at the token limit, at most 40 tokens, similarity to the prompt of at least 0.2, an answer found; "
            "the others get a bonus of 0",
        ),
    ],
)
def test_who_earns_the_bonus(defences: dict, expected: str):
    assert bonus_earners(Defences(**defences)) == expected


def test_models_are_called_by_what_was_weighed():
    assert label(parse("name: a\nmethod: {alpha: 2}"), "dqo") == "DQO-RL (alpha = 2)"
    assert label(parse("name: a\nmethod: {score: vendi}"), "dqo") == "RL with vendi (alpha = 1)"
    assert label(parse("name: a"), "reward_only") == "Reward-only RL"
