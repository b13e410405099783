"""The gate by hand: evaluations written down, and what each rule says of them."""

import math
from dataclasses import asdict
from typing import Any

import pytest

from dqo.errors import DQOError
from dqo.evaluation.statistics import Interval
from dqo.gate import GateResult, decide
from dqo.recipe import Gate

GATE = Gate(against="reward_only", max_quality_loss=0.05, more_diverse_on=["log_volume", "self_bleu_diversity"])
OLD = {
    "quality": Interval(0.80, 0.75, 0.85),
    "log_volume": Interval(-6.0, -6.5, -5.5),
    "self_bleu_diversity": Interval(0.40, 0.35, 0.45),
}
NEW = {
    "quality": Interval(0.78, 0.73, 0.83),
    "log_volume": Interval(-4.0, -4.5, -3.5),
    "self_bleu_diversity": Interval(0.60, 0.55, 0.65),
}


def document(**models: dict[str, Interval]) -> dict[str, Any]:
    """The part of evaluation.json that the gate reads; what is not known is null there."""

    def shown(interval: Interval) -> dict[str, float | None]:
        return {name: None if math.isnan(value) else value for name, value in asdict(interval).items()}

    return {
        "models": {
            model: {"metrics": {name: shown(interval) for name, interval in metrics.items()}}
            for model, metrics in models.items()
        }
    }


def gate(**changed: Interval) -> GateResult:
    return decide(GATE, document(dqo=NEW | changed, reward_only=OLD))


def test_a_model_that_is_more_diverse_within_the_allowed_loss_passes():
    result = gate()
    assert result.passed
    assert len(result.reasons) == 3
    assert "quality 0.780 against 0.800 of reward_only (-0.020) is within the allowed loss of 0.05" in result.reasons
    assert "-4.000 [-4.500, -3.500]" in result.reasons[1] and "-6.000 [-6.500, -5.500]" in result.reasons[1]
    assert all(reason.endswith("higher, intervals apart") for reason in result.reasons[1:])


@pytest.mark.parametrize(
    ("quality", "passes"), [(0.70, False), (0.749, False), (0.751, True), (0.80, True), (0.95, True)]
)
def test_quality_may_fall_by_the_allowed_loss_only(quality: float, passes: bool):
    result = gate(quality=Interval(quality, quality - 0.05, quality + 0.05))
    assert result.passed is passes
    assert ("is within" in result.reasons[0]) is passes
    assert len(result.reasons) == 3  # the other rules are reported all the same


@pytest.mark.parametrize(
    "volume",
    [
        Interval(-4.0, -5.6, -2.4),  # higher, but reaches below the old upper bound of -5.5
        Interval(-4.0, -5.5, -2.5),  # touches it
        Interval(-8.0, -8.5, -7.5),  # apart, but lower
        Interval(-6.0, -6.5, -5.5),  # the same
        Interval(-4.0, math.nan, math.nan),  # one prompt: no bounds
        Interval(math.nan, math.nan, math.nan),
    ],
)
def test_one_metric_that_is_not_clearly_higher_fails_the_gate(volume: Interval):
    result = gate(log_volume=volume)
    assert not result.passed
    assert result.reasons[1].endswith("not higher with intervals apart")
    assert result.reasons[2].endswith(": higher, intervals apart")


def test_a_model_whose_training_was_stopped_fails_the_gate_whatever_it_measures():
    evaluation = document(dqo=NEW, reward_only=OLD)
    reason = "entropy: 0.01 below 0.05, at steps 3 to 7"
    assert decide(GATE, evaluation).passed
    assert decide(GATE, evaluation | {"stopped": {"reward_only": reason}}).passed  # only the candidate's counts
    result = decide(GATE, evaluation | {"stopped": {"dqo": reason}})
    assert not result.passed
    assert result.reasons == [
        "training was stopped by a health rule: entropy: 0.01 below 0.05, at steps 3 to 7",
        *decide(GATE, evaluation).reasons,  # the other rules are reported all the same
    ]


def test_a_quality_that_is_not_known_fails_the_gate():
    unknown = Interval(math.nan, math.nan, math.nan)
    assert not gate(quality=unknown).passed
    assert not decide(GATE, document(dqo=NEW, reward_only=OLD | {"quality": unknown})).passed


def test_only_the_model_and_the_metrics_that_the_gate_names_count():
    rules = Gate(against="sft", max_quality_loss=0.0, more_diverse_on=["log_volume"])
    worse = OLD | {"quality": Interval(0.78, 0.7, 0.8), "self_bleu_diversity": Interval(0.9, 0.8, 1.0)}
    better = {name: Interval(9.0, 8.0, 10.0) for name in OLD}
    assert decide(rules, document(dqo=NEW, sft=worse, reward_only=better)).passed
    assert not decide(rules, document(dqo=NEW, sft=better, reward_only=worse)).passed


def test_a_model_or_metric_that_was_not_evaluated_is_named():
    with pytest.raises(DQOError, match="no model 'reward_only'; expected one of dqo, sft"):
        decide(GATE, document(dqo=NEW, sft=OLD))
    with pytest.raises(DQOError, match="'dqo' holds no metric 'self_bleu_diversity'"):
        decide(GATE, document(dqo={"quality": NEW["quality"], "log_volume": NEW["log_volume"]}, reward_only=OLD))


def test_any_model_of_the_evaluation_may_be_the_candidate():
    evaluation = document(dqo=OLD, sft=NEW, reward_only=OLD)
    assert decide(GATE, evaluation, "sft").passed and not decide(GATE, evaluation).passed
