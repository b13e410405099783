import math

import numpy as np
import pytest

from dqo.evaluation.statistics import Interval, bootstrap_interval, overlap, paired_difference

SETTINGS = {"draws": 2000, "confidence": 0.95, "seed": 0}
NAN = math.nan


def coverage(sample, truth: float, repetitions: int = 1000) -> float:
    """Share of data sets whose 95% interval holds the true mean."""
    held = 0
    for seed in range(repetitions):
        interval = bootstrap_interval(sample(np.random.default_rng(seed)), draws=1000, confidence=0.95, seed=seed)
        held += interval.low <= truth <= interval.high
    return held / repetitions


def test_coverage_for_normal_data():
    assert 0.93 <= coverage(lambda rng: rng.normal(size=48), 0.0) <= 0.97


def test_coverage_for_skewed_data():
    # No bootstrap of 48 skewed values reaches 95%; the plain percentile interval held the mean in 92.2% of 2000 data
    # sets like these.
    assert 0.92 <= coverage(lambda rng: rng.exponential(size=48), 1.0) <= 0.97


def test_coverage_for_rare_events():
    # A tenth of the responses truncated, say: the values are 0 or 1.
    assert 0.92 <= coverage(lambda rng: (rng.random(48) < 0.1).astype(float), 0.1) <= 0.98


@pytest.mark.parametrize(("confidence", "z"), [(0.68, 0.9945), (0.95, 1.9600), (0.99, 2.5758)])
def test_interval_is_the_normal_one_for_many_normal_values(confidence, z):
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
    interval = bootstrap_interval(values, draws=5000, confidence=confidence, seed=0)
    half = z * values.std() / math.sqrt(2000)
    assert interval.mean == pytest.approx(values.mean(), rel=1e-12)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.06 * half)


def test_the_longer_side_of_the_interval_is_the_one_of_the_tail():
    values = np.random.default_rng(2).exponential(size=48)
    interval = bootstrap_interval(values, **SETTINGS)
    assert interval.high - interval.mean > 1.1 * (interval.mean - interval.low)


def test_interval_shifts_and_scales_with_the_values():
    values = np.random.default_rng(3).exponential(size=30)
    interval = bootstrap_interval(values, **SETTINGS)
    moved = bootstrap_interval(5 - 2 * values, **SETTINGS)
    assert moved.mean == pytest.approx(5 - 2 * interval.mean)
    assert moved.low == pytest.approx(5 - 2 * interval.high, abs=0.01)
    assert moved.high == pytest.approx(5 - 2 * interval.low, abs=0.01)


def test_same_seed_same_interval():
    values = np.random.default_rng(4).normal(size=48)
    first = bootstrap_interval(values, 500, 0.95, seed=7)
    assert bootstrap_interval(values.tolist(), 500, 0.95, seed=7) == first
    other = bootstrap_interval(values, 500, 0.95, seed=8)
    assert (other.mean, other != first) == (first.mean, True)


def test_undefined_values_are_left_out():
    assert bootstrap_interval([1.0, None, 2.0, NAN, 4.0], **SETTINGS) == bootstrap_interval([1.0, 2.0, 4.0], **SETTINGS)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[], [NAN, NAN], [None]])
def test_no_value_gives_no_interval(values):
    interval = bootstrap_interval(values, **SETTINGS)
    assert np.isnan([interval.mean, interval.low, interval.high]).all()


def test_one_value_gives_a_mean_without_bounds():
    interval = bootstrap_interval([0.5, NAN], **SETTINGS)
    assert interval.mean == 0.5
    assert np.isnan([interval.low, interval.high]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("noise", [0.0, 1e-13])
@pytest.mark.parametrize("value", [0.0, 0.1, -1000.0])
def test_equal_values_give_a_point(value, noise):
    values = value * (1 + noise * np.random.default_rng(5).integers(0, 2, size=48))
    interval = bootstrap_interval(values, **SETTINGS)
    assert interval.low == interval.mean == interval.high == pytest.approx(value, rel=1e-12)


@pytest.mark.filterwarnings("error")
def test_one_prompt_unlike_the_rest_has_finite_bounds():
    values = np.zeros(48)
    values[3] = 1.0
    interval = bootstrap_interval(values, **SETTINGS)
    assert 0.0 <= interval.low < interval.mean == 1 / 48 < interval.high < 0.2


def test_more_than_one_value_a_prompt_is_refused():
    with pytest.raises(ValueError, match=r"values must be one value a prompt.*\(3, 2\)"):
        bootstrap_interval(np.zeros((3, 2)), **SETTINGS)


def test_paired_difference_cancels_what_makes_a_prompt_hard():
    rng = np.random.default_rng(6)
    hardness = rng.normal(0, 10, size=400)
    gain = rng.normal(0.5, 1.0, size=400)
    interval = paired_difference(hardness + gain, hardness, **SETTINGS)
    half = 1.96 * gain.std() / 20
    assert interval.mean == pytest.approx(gain.mean())
    assert interval.low == pytest.approx(gain.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(gain.mean() + half, abs=0.1 * half)
    apart = bootstrap_interval(hardness + gain, **SETTINGS), bootstrap_interval(hardness, **SETTINGS)
    assert interval.low > 0 and overlap(*apart)


def test_paired_difference_uses_the_prompts_that_both_have():
    a, b = [1.0, NAN, 3.0, 7.0, 9.0], [0.0, 5.0, None, 3.0, 8.0]
    assert paired_difference(a, b, **SETTINGS) == bootstrap_interval([1.0, 4.0, 1.0], **SETTINGS)
    assert paired_difference(a, a, **SETTINGS) == Interval(0.0, 0.0, 0.0)


def test_paired_difference_refuses_other_prompts():
    with pytest.raises(ValueError, match="got 3 and 2 values"):
        paired_difference([1, 2, 3], [1, 2], **SETTINGS)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (Interval(1, 0, 2), Interval(4, 3, 5), False),
        (Interval(1, 0, 2), Interval(2, 1, 3), True),
        (Interval(1, 0, 2), Interval(3, 2, 4), True),
        (Interval(5, 0, 10), Interval(4, 3, 5), True),
        (Interval(1, 1, 1), Interval(2, 2, 2), False),
        (Interval(1, 1, 1), Interval(1, 1, 1), True),
        (Interval(0, NAN, NAN), Interval(9, 8, 10), True),
        (Interval(NAN, NAN, NAN), Interval(NAN, NAN, NAN), True),
    ],
)
def test_overlap(a, b, expected):
    assert overlap(a, b) is expected
    assert overlap(b, a) is expected
