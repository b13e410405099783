"""The gate by hand: evaluations written down, and what each rule says of them."""

import math
import re
import statistics
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dqo.errors import DQOError
from dqo.evaluation.statistics import Interval
from dqo.gate import GateResult, decide, describe
from dqo.recipe import Gate, GateJudge

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


def test_the_model_that_is_compared_with_never_passes():
    result = decide(GATE, document(dqo=NEW, reward_only=OLD), "reward_only")
    first, *rest = result.reasons
    assert not result.passed
    assert first == "reward_only is the model that the gate compares with; a new champion has to be better than it"
    assert len(rest) == 2 and all(reason.endswith("not higher with intervals apart") for reason in rest)


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


# --- rules that compare prompt by prompt: expected values by scipy, by enumeration or by hand ---


def paired(new: dict[str, list[float]], old: dict[str, list[float]], **further: Any) -> dict[str, Any]:
    """An evaluation with the values of each prompt; the intervals of `metrics` play no part in these rules."""
    models = {}
    for name, own in (("dqo", new), ("reward_only", old)):
        content = {"log_volume": [1.0] * 8, "quality": [0.5] * 8} | own
        means = {
            metric: {"mean": statistics.fmean(values), "low": None, "high": None} for metric, values in content.items()
        }
        models[name] = {"metrics": means, "per_prompt": content}
    return {"models": models, "confidence": 0.95, "bootstrap_draws": 4000, "seed": 0, "n": 8} | further


def rules(**fields: Any) -> Gate:
    """A gate whose default rules stay out of the way: nothing is asked of quality."""
    return Gate(**({"max_quality_loss": 100.0, "more_diverse_on": ["log_volume"]} | fields))


def outcome(gate: Gate, evaluation: dict[str, Any], word: str) -> tuple[bool, str]:
    """Whether the one rule whose sentence holds a word is said to hold, told apart by that rule alone."""
    (reason,) = [reason for reason in decide(gate, evaluation).reasons if word in reason]
    refused = (
        "not shown",
        "non-inferiority not shown",
        "does not reach",
        "more than the allowed",
        "not passed its audit",
    )
    return not any(words in reason for words in refused), reason


def spread(mean: float, deviation: float, count: int, seed: int) -> np.ndarray:
    """Normal values with exactly this mean and deviation."""
    values = np.random.default_rng(seed).normal(size=count)
    return mean + deviation * (values - values.mean()) / values.std(ddof=1)


def test_non_inferiority_is_decided_by_the_whole_paired_interval():
    hard = np.random.default_rng(1).uniform(0.1, 0.9, 200)  # what makes a prompt hard is the same for both
    difference = spread(-0.02, 0.1, 200, 2)
    evaluation = paired({"quality": list(hard + difference)}, {"quality": list(hard)})
    # Student's interval of the differences: -0.02 -+ 1.972 * 0.1 / sqrt(200); the bootstrap's is the same to 0.001.
    low = -0.02 - float(stats.t.ppf(0.975, 199)) * 0.1 / math.sqrt(200)
    assert low == pytest.approx(-0.03394, abs=1e-5)
    for loss, holds in ((-low + 0.001, True), (-low - 0.001, False)):
        held, reason = outcome(rules(max_quality_loss=loss, quality_test="non_inferior"), evaluation, "quality")
        assert held is holds, reason
        assert re.search(r"paired difference -0\.020 \[-0\.03\d, -0\.00\d\]", reason)
    # The mean alone is within the loss either way.
    assert decide(rules(max_quality_loss=0.021), evaluation).reasons[0].count("is within") == 1


@pytest.mark.parametrize(("loss", "holds"), [(0.0, False), (0.001, True)])
def test_equal_qualities_are_not_inferior_by_any_loss_above_zero(loss: float, holds: bool):
    gate = rules(max_quality_loss=loss, quality_test="non_inferior")
    assert outcome(gate, paired({}, {}), "quality")[0] is holds


def test_what_was_not_measured_holds_no_rule():
    nothing: list[Any] = [None] * 8
    evaluation = paired({}, {})
    for metric in ("quality", "log_volume", "mean_tokens", "truncation_rate", "duplicate_rate"):
        for model in ("dqo", "reward_only"):
            evaluation["models"][model]["per_prompt"][metric] = nothing
            evaluation["models"][model]["metrics"][metric] = {"mean": None, "low": None, "high": None}
    result = decide(
        rules(
            quality_test="non_inferior", diversity_test="holm", max_length_change=0.5, max_truncation_increase=1.0,
            max_duplicate_increase=1.0,
        ),
        evaluation,
    )  # fmt: skip
    assert not result.passed and len(result.reasons) == 5
    assert all("not shown" in reason or "not measured" in reason for reason in result.reasons)


def enumerated(difference: list[float]) -> float:
    """The two-sided p-value over all ways to swap the sides of each prompt."""
    seen = abs(sum(difference))
    swaps = [abs(sum(s * d for s, d in zip(signs, difference, strict=True))) for signs in product((1, -1), repeat=8)]
    return sum(value >= seen - 1e-9 for value in swaps) / len(swaps)


# Differences over 8 prompts, whose p-values are 2/256, 10/256 and 242/256 by enumeration.
CLEAR = [0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8, 0.1]
FAINT = [0.5, 0.4, 0.6, -0.15, 0.7, 0.2, 0.8, -0.1]
NONE = [0.5, -0.4, 0.6, -0.3, 0.7, -0.2, -0.8, 0.1]


def diversity(**metrics: list[float]) -> dict[str, Any]:
    base = [0.3, 0.5, 0.2, 0.9, 0.4, 0.6, 0.1, 0.8]
    new = {name: [a + d for a, d in zip(base, values, strict=True)] for name, values in metrics.items()}
    return paired(new, dict.fromkeys(metrics, base))


@pytest.mark.parametrize(("test", "faint_holds"), [("paired", True), ("holm", False)])
def test_significance_prompt_by_prompt_with_and_without_holms_adjustment(test: str, faint_holds: bool):
    values = {"log_volume": CLEAR, "distinct_2": FAINT, "self_bleu_diversity": NONE}
    p = {name: enumerated(difference) for name, difference in values.items()}
    # By hand, Holm: the smallest times 3, the next times 2, the largest as it is.
    ranked = sorted(p.values())
    assert ranked[0] * 3 <= 0.05 and 0.025 < ranked[1] <= 0.05 < ranked[2], ranked
    gate = rules(more_diverse_on=list(values), diversity_test=test)
    result = decide(gate, diversity(**values))
    clear, faint, none = result.reasons[1:]
    assert not result.passed
    assert clear.endswith("higher at the level 0.05") and "not shown" not in clear
    assert f"p = {p['log_volume']:.2g}" in clear and f"p = {p['distinct_2']:.2g}" in faint
    assert ("not shown" not in faint) is faint_holds and "not shown to be higher" in none
    if test == "holm":
        assert f"{3 * ranked[0]:.2g} among 3 metrics (Holm)" in clear
        assert f"{2 * ranked[1]:.2g} among 3 metrics (Holm)" in faint


def test_a_significant_fall_is_not_a_rise():
    result = decide(rules(diversity_test="paired"), diversity(log_volume=[-value for value in CLEAR]))
    assert not result.passed and "not shown to be higher" in result.reasons[1]


@pytest.mark.parametrize(("values", "passes"), [((CLEAR, NONE), True), ((FAINT, NONE), False)])
def test_any_metric_may_carry_the_gate_under_holms_adjustment(values: Any, passes: bool):
    gate = rules(more_diverse_on=["log_volume", "distinct_2"], diversity_test="holm", diversity_needed="any")
    result = decide(gate, diversity(log_volume=values[0], distinct_2=values[1]))
    assert result.passed is passes and len(result.reasons) == 2
    assert f"more diverse on {int(passes)} of 2 metrics, of which one is asked for" in result.reasons[1]


def test_the_length_may_change_by_the_limit_up_and_down():
    tokens = spread(50.0, 10.0, 100, 3)
    for factor, limit, holds in (
        (1.10, 0.15, True), (1.10, 0.09, False), (0.90, 0.15, True), (0.90, 0.09, False), (1.0, 0.01, True),
    ):  # fmt: skip
        new = tokens * factor + spread(0.0, 0.5, 100, 4)  # a ratio of the means of exactly `factor`
        evaluation = paired({"mean_tokens": list(new)}, {"mean_tokens": list(tokens)})
        held, reason = outcome(rules(max_length_change=limit), evaluation, "length")
        assert held is holds, (factor, limit, reason)
        assert f"({factor - 1:+.0%})" in reason
    # The mean is within, but so noisy that it is not shown.
    noisy = paired({"mean_tokens": list(tokens + spread(2.5, 40.0, 100, 5))}, {"mean_tokens": list(tokens)})
    assert not outcome(rules(max_length_change=0.1), noisy, "length")[0]


@pytest.mark.parametrize(
    ("metric", "field", "label"),
    [
        ("truncation_rate", "max_truncation_increase", "Truncated"),
        ("duplicate_rate", "max_duplicate_increase", "Duplicates"),
    ],
)
def test_rates_may_rise_by_the_limit(metric: str, field: str, label: str):
    difference = spread(0.02, 0.05, 100, 6)
    evaluation = paired({metric: list(0.1 + difference)}, {metric: [0.1] * 100})
    high = 0.02 + float(stats.t.ppf(0.975, 99)) * 0.05 / 10
    for limit, holds in ((high + 0.001, True), (high - 0.001, False)):
        held, reason = outcome(rules(**{field: limit}), evaluation, label)
        assert held is holds, reason


@pytest.mark.parametrize("field", ["max_truncation_increase", "max_duplicate_increase"])
def test_no_event_in_a_few_responses_shows_little(field: str):
    """The largest rate at which 64 responses hold no event in one of 40 evaluations, by the binomial distribution."""
    metric, label = {"max_t": ("truncation_rate", "Truncated"), "max_d": ("duplicate_rate", "Duplicates")}[field[:5]]
    most = next(p for p in np.arange(0.04, 0.08, 1e-5) if stats.binom.cdf(0, 64, p) <= 0.025)
    for rate in (0.0, 0.5):
        evaluation = paired({metric: [rate] * 8}, {metric: [rate] * 8})
        assert outcome(rules(**{field: most + 1e-4}), evaluation, label)[0]
        held, reason = outcome(rules(**{field: most - 1e-4}), evaluation, label)
        assert not held and "alike on all 8 prompts (with 64 responses a rise of up to 0.056 may hide)" in reason


def test_a_rare_event_is_hardly_ever_shown_to_be_rarer_than_it_is():
    """Responses of which 1 in 200 is truncated, 8 for each of 48 prompts, against none: the limit is the true rate."""
    rng = np.random.default_rng(0)
    shown = 0
    for _ in range(200):
        rates = list(rng.binomial(8, 0.005, size=48) / 8)
        evaluation = paired({"truncation_rate": rates}, {"truncation_rate": [0.0] * 48}, bootstrap_draws=300)
        evaluation["models"]["dqo"]["per_prompt"] |= {"log_volume": [1.0] * 48, "quality": [0.5] * 48}
        evaluation["models"]["reward_only"]["per_prompt"] |= {"log_volume": [1.0] * 48, "quality": [0.5] * 48}
        shown += outcome(rules(max_truncation_increase=0.005), evaluation, "Truncated")[0]
    assert shown <= 12  # 5 expected, and 32 where no event was taken for proof of none


def test_an_evaluation_without_the_values_of_each_prompt_is_named():
    with pytest.raises(DQOError, match="'dqo' holds no 'quality' of each prompt"):
        decide(Gate(quality_test="non_inferior"), document(dqo=NEW, reward_only=OLD))


# --- the judge ---


SHIPPED = {"name": "shipped", "digest": "0" * 12, "pairs": 60}


def judged(**changed: Any) -> dict[str, Any]:
    """The part that the evaluate stage writes: dqo has won 60 % of the pairs, at equal lengths 55 %."""
    verdicts = {
        "win_rate": {"mean": 0.6, "low": 0.52, "high": 0.68},
        "length_controlled": {"mean": 0.55, "low": 0.46, "high": 0.64},
        "not_length_controlled": "", "pairs": 100, "invalid": 4, "missing": 0, "flip_rate": 0.3,
    }  # fmt: skip
    part = {
        "complete": True, "reason": None, "against": "reward_only", "models": {"dqo": verdicts},
        "audit": {"passed": True, "faults": [], "reasons": [], "labelled": SHIPPED},
    }  # fmt: skip
    return {"judge": part | changed}


def judgement(gate: GateJudge | None, part: dict[str, Any]) -> GateResult:
    asked = GATE.model_copy(update={"judge": gate})
    return decide(asked, document(dqo=NEW, reward_only=OLD) | part)


@pytest.mark.parametrize(
    ("fields", "passes", "words"),
    [
        (
            {},
            False,
            "win rate at equal lengths 0.550 [0.460, 0.640] against reward_only: its lower bound does not reach",
        ),
        ({"min_win_rate": 0.46}, True, "its lower bound reaches 0.46"),
        ({"min_win_rate": 0.461}, False, "its lower bound does not reach 0.461"),
        ({"decided_by": "mean", "min_win_rate": 0.55}, True, "the rate reaches 0.55"),
        ({"decided_by": "mean", "min_win_rate": 0.56}, False, "the rate does not reach 0.56"),
        ({"length_controlled": False}, True, "the judge's win rate 0.600 [0.520, 0.680] against reward_only"),
        ({"length_controlled": False, "min_win_rate": 0.53}, False, "does not reach 0.53"),
        ({"min_win_rate": 0.4, "max_invalid_rate": 0.04}, True, "4 of 100 pairs (4.0%), at most the allowed 4.0%"),
        (
            {"min_win_rate": 0.4, "max_flip_rate": 0.3},
            True,
            "disagree on 30.0% of the pairs, at most the allowed",
        ),
        ({"min_win_rate": 0.4, "max_flip_rate": 0.2}, False, "disagree on 30.0% of the pairs, more than the allowed"),
        ({"min_win_rate": 0.4, "max_invalid_rate": 0.03}, False, "4 of 100 pairs (4.0%), more than the allowed 3.0%"),
    ],
)
def test_the_win_rate_decides_as_the_gate_says(fields: dict[str, Any], passes: bool, words: str):
    result = judgement(GateJudge(**fields), judged())
    assert result.passed is passes
    assert any(words in reason for reason in result.reasons), result.reasons
    assert result.reasons[:3] == gate().reasons  # the other rules are reported all the same


def test_a_judge_that_failed_its_audit_decides_nothing_however_high_the_win_rate():
    faults = ["kappa: 0.10, not as demanded"]
    failed = judged(audit={"passed": False, "faults": faults, "reasons": [], "labelled": SHIPPED})
    result = judgement(GateJudge(min_win_rate=0.0), failed)
    assert not result.passed
    assert result.reasons[3:] == [
        "the judge has not passed its audit, so its verdicts do not count: kappa: 0.10, not as demanded"
    ]
    assert judgement(None, failed).passed  # it was asked for a look only


def test_a_judge_that_is_not_done_refuses_with_its_reason_whether_it_decides_or_not():
    gone = judged(complete=False, reason="the judge at h:1 is down: 503; missing: 7 of 100 pairs")
    for rules_ in (None, GateJudge(min_win_rate=0.0)):
        result = judgement(rules_, gone)
        assert not result.passed
        assert result.reasons[3] == (
            "the judge is not done: the judge at h:1 is down: 503; missing: 7 of 100 pairs; repeat the run, which asks "
            "only for what is missing"
        )


def test_a_rate_at_equal_lengths_that_cannot_be_told_refuses():
    part = judged()
    part["judge"]["models"]["dqo"] |= {"length_controlled": None, "not_length_controlled": "all longer by 3"}
    result = judgement(GateJudge(min_win_rate=0.0), part)
    assert not result.passed and "cannot be told: all longer by 3" in result.reasons[3]
    assert judgement(GateJudge(length_controlled=False), part).passed
    unknown = judged()
    unknown["judge"]["models"]["dqo"]["win_rate"] = {"mean": None, "low": None, "high": None}
    assert not judgement(GateJudge(min_win_rate=0.0, length_controlled=False), unknown).passed


def test_an_evaluation_without_the_verdicts_that_the_gate_asks_for_is_named():
    with pytest.raises(DQOError, match="the evaluation asked no judge"):
        judgement(GateJudge(), {})
    with pytest.raises(
        DQOError, match="no verdicts on 'dqo' against 'reward_only'; it holds those on dqo against 'sft'"
    ):
        judgement(GateJudge(), judged(against="sft"))


def test_every_rule_of_a_gate_is_described():
    words = " ".join(describe(GATE))
    assert (
        "lose at most 0.05 in quality" in words and "without overlap of the intervals, on all of: Log-volume" in words
    )
    assert len(describe(GATE)) == 2
    everything = Gate(
        quality_test="non_inferior", diversity_test="holm", diversity_needed="any", max_length_change=0.2,
        max_truncation_increase=0.1, max_duplicate_increase=0.15, judge=GateJudge(min_win_rate=0.45),
    )  # fmt: skip
    words = " ".join(describe(everything))
    for expected in (
        "whole interval",
        "Holm",
        "any of",
        "20%",
        "0.1 more",
        "0.15 more",
        "reach 0.45 by the lower bound",
    ):
        assert expected in words
