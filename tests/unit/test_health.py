"""Health rules on histories made by hand: at which step each fires, worked out on paper."""

import json
import math

import pytest

from dqo.errors import DQOError
from dqo.health import METRICS, Monitor, judge
from dqo.recipe import Health, parse, volume_range

OFF: dict[str, dict[str, None]] = {
    "zero_variance": {"max": None}, "entropy": {"min": None}, "length_drift": {"factor": None},
    "truncation": {"max": None}, "volume_collapse": {"max": None}, "duplicates": {"max": None},
    "encoder_cut": {"max": None}, "unscorable": {"max": None},
}  # fmt: skip


def only(rule: str, baseline_steps: int = 3, **settings: object) -> Health:
    """Health with one rule switched on."""
    return Health.model_validate({"baseline_steps": baseline_steps, **(OFF | {rule: settings})})


def rows(metric: str, values: list[float | None]) -> list[dict]:
    return [{"step": step, metric: value} for step, value in enumerate(values, start=1)]


def fired(health: Health, metric: str, values: list[float | None], k: int = 8) -> list[tuple[int, int]]:
    """First and last step of each finding's streak."""
    return [(finding.since, finding.step) for finding in judge(health, rows(metric, values), k)]


# --- when a rule fires ---


@pytest.mark.parametrize(
    ("rule", "metric"),
    [
        ("zero_variance", "frac_reward_zero_std"),
        ("kl", "kl"),
        ("truncation", "truncation_rate"),
        ("duplicates", "duplicate_rate"),
        ("encoder_cut", "encoder_cut_share"),
        ("unscorable", "unscorable_rate"),
    ],
)
def test_a_share_above_its_highest_for_as_many_steps_as_the_patience(rule: str, metric: str):
    health = only(rule, max=0.5, patience=3)
    assert METRICS[rule] == metric
    #                             1    2    3    4    5    6    7    8    9
    assert fired(health, metric, [0.9, 0.9, 0.5, 0.6, 0.6, 0.6, 0.6, 0.1, 0.6]) == [(4, 6)]
    assert fired(health, metric, [0.5] * 9) == []  # at the threshold is not past it
    assert fired(health, metric, [0.6] * 3 + [0.0] + [0.6] * 3) == [(1, 3), (5, 7)]  # once for each streak


def test_entropy_has_a_lowest_and_a_highest():
    low = only("entropy", min=0.2, patience=2)
    assert fired(low, "entropy", [1.0, 0.1, 0.3, 0.1, 0.1, 0.1]) == [(4, 5)]
    both = only("entropy", min=0.2, max=3.0, patience=2)
    # Jumping from below to above is no streak of either.
    assert fired(both, "entropy", [0.1, 4.0, 0.1, 4.0, 4.0]) == [(4, 5)]
    (finding,) = judge(both, rows("entropy", [4.0, 5.0]), 8)
    assert (finding.value, finding.threshold, finding.side) == (5.0, 3.0, "above")


def test_length_drifts_both_ways_from_the_mean_of_the_first_steps():
    health = only("length_drift", baseline_steps=2, factor=1.5, patience=2)
    # The first two have mean 10 + 30 = 40 / 2 = 20: below 13.33.. or above 30.
    assert fired(health, "mean_tokens", [10, 30, 30, 14, 13, 13, 31, 31, 30]) == [(5, 6), (7, 8)]
    short, long = judge(health, rows("mean_tokens", [10, 30, 30, 14, 13, 13, 31, 31, 30]), 8)
    assert (short.side, short.value, short.threshold) == ("below", 13.0, pytest.approx(40 / 3))
    assert (long.side, long.value, long.threshold) == ("above", 31.0, pytest.approx(30))
    assert "1.5 times away from the 20 of the first steps" in long.reason


def test_the_log_volume_collapses_towards_the_volume_of_equal_responses():
    k, lowest = 3, math.log(4)
    health = only("volume_collapse", baseline_steps=2, max=0.5, patience=2)
    start = lowest + 0.6  # the mean of the first two
    values = [start + 0.1, start - 0.1, lowest + 0.31, lowest + 0.29, lowest + 0.31, lowest + 0.2, lowest + 0.15]
    assert fired(health, "log_volume", values, k) == [(6, 7)]
    (finding,) = judge(health, rows("log_volume", values), k)
    assert finding.value == pytest.approx((0.6 - 0.15) / 0.6)
    assert f"{start:.4g} nats in the first steps" in finding.reason
    # The same figures with another kernel scale have another lower end: log(1 + 4 * 3) is above all of them.
    assert judge(health, rows("log_volume", values), k, 2.0) == []


def test_a_run_without_volume_to_lose_has_no_collapse():
    health = only("volume_collapse", baseline_steps=1, patience=1)
    assert fired(health, "log_volume", [math.log(9)] * 4) == []


def test_a_volume_below_that_of_k_equal_responses_can_be_lost_too():
    """Of four responses two have no answer: log(1 + 2) of two equal ones is below log(1 + 4), and all can be lost."""
    health = only("volume_collapse", baseline_steps=1, max=0.4, patience=1)
    assert fired(health, "log_volume", [math.log(3), math.log(3), math.log(2)], 4) == []  # 0.37 of it
    assert fired(health, "log_volume", [math.log(3), math.log(1.5)], 4) == [(2, 2)]  # 0.63
    assert fired(health, "log_volume", [0.0, 0.0], 4) == []


def test_a_floor_may_be_low_where_responses_without_an_answer_leave():
    text = (
        "name: a\ntask: reasoning\nmethod: {{defences: {{embed: {}}}}}\nrl: {{health: {{volume_floor: {{min: {}}}}}}}\n"
    )
    assert parse(text.format("answer", 1.0)).rl.health.volume_floor.min == 1.0
    with pytest.raises(DQOError, match=r"volume_floor.min: got 1; expected more than 2.1972, which no group of 8"):
        parse(text.format("response", 1.0))
    with pytest.raises(DQOError, match=r"volume_floor.min: got 6; expected more than 0 and at most 5.5452"):
        parse(text.format("answer", 6.0))


def test_the_log_volume_has_a_floor():
    health = only("volume_floor", min=3.0, patience=1)
    assert fired(health, "log_volume", [4.0, 2.9, 2.8, 3.0, 2.9]) == [(2, 2), (5, 5)]


@pytest.mark.parametrize("hole", [None, math.nan, math.inf])
def test_a_step_that_was_not_measured_ends_a_streak(hole: float | None):
    health = only("truncation", max=0.5, patience=2)
    assert fired(health, "truncation_rate", [0.9, hole, 0.9, hole, 0.9, 0.9]) == [(5, 6)]
    assert judge(health, [{"step": 1}, {"step": 2}], 8) == []
    # Nor does it count among the first steps.
    drift = only("length_drift", baseline_steps=2, factor=2.0, patience=1)
    assert fired(drift, "mean_tokens", [10, hole, 10, 25]) == [(4, 4)]


def test_a_rule_without_threshold_is_silent():
    assert judge(Health.model_validate(OFF), [{"step": 1, **dict.fromkeys(METRICS.values(), 0.99)}] * 9, 8) == []


def test_only_a_stop_rule_stops_and_the_first_one_counts():
    health = Health.model_validate(
        OFF
        | {"truncation": {"max": 0.1, "patience": 1}}
        | {"duplicates": {"max": 0.1, "patience": 2, "action": "stop"}}
        | {"entropy": {"min": 0.5, "patience": 3, "action": "stop"}}
    )
    monitor, seen = Monitor(health, 8), []
    for step in range(1, 5):
        row = {"step": step, "truncation_rate": 0.2, "duplicate_rate": 0.2, "entropy": 0.1}
        seen.append(([finding.rule for finding in monitor.update(row)], monitor.stop and monitor.stop.rule))
    assert seen == [
        (["truncation"], None), (["duplicates"], "duplicates"), (["entropy"], "duplicates"), ([], "duplicates")
    ]  # fmt: skip


def test_a_resumed_run_is_judged_as_an_uninterrupted_one():
    """At every place to cut: the rows so far through JSON into a new monitor, then the rest one by one."""
    health = Health.model_validate({"baseline_steps": 2} | {"truncation": {"max": 0.1, "patience": 3}})
    history = [
        {
            "step": step,
            "truncation_rate": (step * 7 % 10) / 10,
            "log_volume": 2.2 + 2.5 / step,
            "mean_tokens": 10 + 3 * step,
            "duplicate_rate": 0.05 * step,
        }
        for step in range(1, 21)
    ]
    whole = judge(health, history, 8)
    assert {finding.rule for finding in whole} == {"truncation", "volume_collapse", "length_drift", "duplicates"}
    for cut in range(len(history) + 1):
        monitor = Monitor(health, 8)
        for row in [json.loads(json.dumps(row)) for row in history[:cut]] + history[cut:]:
            monitor.update(row)
        assert monitor.findings == whole, cut


def test_a_finding_reads_well_and_is_written_whole():
    (finding,) = judge(only("zero_variance", max=0.8, patience=2), rows("frac_reward_zero_std", [0.9, 1.0]), 8)
    assert finding.reason == "zero_variance: share of groups with equal rewards 1 above 0.8, at steps 1 to 2"
    assert json.loads(json.dumps(finding.to_dict())) == {
        "rule": "zero_variance", "action": "warn", "step": 2, "since": 1, "value": 1.0, "threshold": 0.8,
        "side": "above", "detail": "", "reason": finding.reason,
    }  # fmt: skip


def test_the_defaults_are_silent_on_a_run_like_the_quickstarts():
    """Reward-only RL of the quickstart: figures of one real run, to two digits."""
    volume = [4.78, 4.37, 4.0, 4.17, 4.27, 3.71, 3.78, 3.59, 3.69, 3.48, 3.42, 3.32, 3.34, 3.39, 3.2, 3.42, 3.3, 3.29,
              3.06, 3.21, 3.31, 3.26]  # fmt: skip
    tokens = [18.8, 18.2, 17.5, 21, 18.2, 17.2, 17.4, 14, 13.4, 14.5, 14.2, 11.5, 12, 13.4, 11.2, 11.3, 12.8, 12.8,
              11.3, 13.3, 13.6, 14.2]  # fmt: skip
    equal = [0.0] * 11 + [0.25, 0, 0, 0, 0.25, 0.25, 0.25, 0.75, 0, 0.25, 0]
    history = [
        {"step": step, "log_volume": v, "mean_tokens": t, "frac_reward_zero_std": e, "truncation_rate": 0.1,
         "entropy": 3.3 - step / 10, "duplicate_rate": 0.03, "encoder_cut_share": 0.0, "unscorable_rate": 0.0}
        for step, (v, t, e) in enumerate(zip(volume, tokens, equal, strict=True), start=1)
    ]  # fmt: skip
    assert judge(Health(), history, 8) == []


# --- what a recipe may ask for ---


def refusal(health: str, more: str = "") -> str:
    with pytest.raises(DQOError) as caught:
        parse(f"name: a\nrl: {{health: {{{health}}}{more}}}", "my.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("health", "field", "words"),
    [
        ("truncation: {max: 1.0}", "truncation.max", "less than 1"),
        ("truncation: {max: -0.1}", "truncation.max", "greater than or equal to 0"),
        ("zero_variance: {max: 1.5}", "zero_variance.max", "less than 1"),
        ("volume_collapse: {max: 0}", "volume_collapse.max", "greater than 0"),
        ("duplicates: {max: 0.9}", "duplicates.max", "less than 0.875"),  # 1 - 1/8
        ("kl: {max: 0.5}", "kl.max", "got 0.5 with rl.beta = 0"),
        ("kl: {max: 0}", "kl.max", "greater than 0"),
        ("entropy: {min: 2, max: 1}", "entropy", "min 2 is not below max 1"),
        ("entropy: {min: 0}", "entropy.min", "greater than 0"),
        ("volume_floor: {min: 2.19}", "volume_floor.min", "more than 2.1972"),  # log 9
        ("volume_floor: {min: 5.6}", "volume_floor.min", "at most 5.5452"),  # 8 log 2
        ("length_drift: {factor: 1}", "length_drift.factor", "greater than 1"),
        ("length_drift: {factor: 32, action: stop}", "length_drift.factor", "less than rl.sampling.max_new_tokens"),
        ("truncation: {action: halt}", "truncation.action", "'warn' or 'stop'"),
        ("truncation: {patience: 0}", "truncation.patience", "greater than or equal to 1"),
        ("truncation: {max: null, action: stop}", "truncation.action", "without a threshold"),
        ("kl: {action: stop}", "kl.action", "without a threshold"),
        ("truncation: {action: stop, patience: 21}", "truncation.patience", "rl.steps = 20 does not reach"),
        ("volume_collapse: {action: stop, patience: 18}", "volume_collapse.patience", "got 18 after 3 steps"),
        ("truncation: {patience: 21}", "truncation.patience", "so that nothing would warn"),
        ("baseline_steps: 16", "length_drift.patience", "got 5 after 16 steps"),
        ("length_drift: {factor: 40}", "length_drift.factor", "less than rl.sampling.max_new_tokens"),
        ("entropy: {max: 50}", "entropy.max", "less than 14"),
        ("entropy: {min: 14}", "entropy.min", "less than 14"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(health: str, field: str, words: str):
    message = refusal(health)
    (line,) = [line for line in message.splitlines() if line.strip().startswith(f"rl.health.{field}:")]
    assert words in line


@pytest.mark.parametrize(
    "health",
    [
        "kl: {max: 0.5}}, beta: 0.1, log_completions_every: 1",
        "volume_floor: {min: 2.2}}, beta: 0",
        "volume_collapse: {action: stop, patience: 17}}, beta: 0",
        "truncation: {max: 0}}, beta: 0",
        "truncation: {patience: 20}}, beta: 0",
        "baseline_steps: 15}, beta: 0",
        "truncation: {max: null, patience: 21}}, beta: 0",
        "}, steps: 1, sampling: {max_new_tokens: 2}",
    ],
)
def test_a_rule_that_can_work_is_taken(health: str):
    parse(f"name: a\nrl: {{health: {{{health}}}")


def test_the_range_of_the_volume_follows_k_and_the_kernel_scale():
    """Equal responses: one eigenvalue c^2 k of the kernel; unrelated ones: k eigenvalues c^2."""
    assert volume_range(8) == pytest.approx((math.log(9), 8 * math.log(2)))
    assert volume_range(4, 3.0) == pytest.approx((math.log(37), 4 * math.log(10)))
    wide = parse("name: a\nmethod: {kernel_scale: 3}\nrl: {health: {volume_floor: {min: 10}}}")
    assert wide.rl.health.volume_floor.min == 10
    assert "more than 4.2905" in refusal("volume_floor: {min: 4}", "}\nmethod: {kernel_scale: 3")


@pytest.mark.parametrize("k", [2, 3, 8, 32])
def test_the_defaults_are_allowed_with_every_group_size(k: int):
    recipe = parse(f"name: a\nmethod: {{k: {k}}}\nrl: {{steps: 1}}")
    assert parse(recipe.to_json()) == recipe
    assert recipe.rl.health.stops == {}


def test_only_what_may_change_the_training_belongs_to_its_key():
    warned = Health.model_validate({"truncation": {"max": 0.2}, "baseline_steps": 7})
    assert warned.stops == {}
    stops = Health.model_validate({"truncation": {"max": 0.2, "action": "stop"}, "baseline_steps": 7}).stops
    assert stops == {"truncation": {"action": "stop", "patience": 5, "max": 0.2}}
    drift = Health.model_validate({"length_drift": {"action": "stop"}, "baseline_steps": 7}).stops
    assert drift == {"length_drift": {"action": "stop", "patience": 5, "factor": 2.0}, "baseline_steps": 7}
