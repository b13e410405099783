import itertools
import math

import numpy as np
import pytest
from scipy.stats import bootstrap, norm, t

from dqo.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    compare,
    expanded_level,
    holm,
    over_seeds,
    overlap,
    paired_difference,
    paired_p_value,
)

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
    # The plain percentile interval held the mean in 92.2% of 2000 data sets like these.
    assert 0.93 <= coverage(lambda rng: rng.exponential(size=48), 1.0) <= 0.97


def test_coverage_for_few_prompts():
    # Percentiles at the plain level held the mean of 12 values in 90% of data sets like these.
    assert 0.93 <= coverage(lambda rng: rng.normal(size=12), 0.0) <= 0.97


@pytest.mark.parametrize("n", [5, 48, 300])
def test_interval_equals_scipy_at_the_expanded_level(n):
    values = np.random.default_rng(n).exponential(size=n)
    expected = bootstrap(
        (values,), np.mean, confidence_level=expanded_level(0.9, n, 2000), n_resamples=2000, method="BCa",
        rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    interval = bootstrap_interval(values, 2000, 0.9, 5)
    np.testing.assert_allclose([interval.low, interval.high], expected, rtol=1e-9)


def test_the_level_is_expanded_as_student_widens_the_normal_interval():
    for n in (3, 12, 48):
        # Half-widths in deviations over n: the normal quantile at the expanded level against t / sqrt(n - 1) sqrt(n).
        level = expanded_level(0.95, n, 10**12)
        assert norm.ppf((1 + level) / 2) / math.sqrt(n) == pytest.approx(t.ppf(0.975, n - 1) / math.sqrt(n - 1))
    assert expanded_level(0.95, 10**6, 2000) == pytest.approx(0.95, abs=1e-5)
    assert expanded_level(0.95, 2, 2000) == 1 - 1 / 2000


@pytest.mark.filterwarnings("error")
def test_two_prompts_have_finite_bounds():
    interval = bootstrap_interval([1.0, 2.0], **SETTINGS)
    assert 1.0 <= interval.low < 1.5 < interval.high <= 2.0


@pytest.mark.parametrize(("draws", "confidence"), [(0, 0.95), (100, 0.0), (100, 1.0), (100, NAN)])
def test_settings_out_of_range_are_refused(draws, confidence):
    with pytest.raises(ValueError, match="must be"):
        bootstrap_interval([1.0, 2.0], draws, confidence, 0)


def test_coverage_for_rare_events():
    # A tenth of the responses truncated, say: the values are 0 or 1.
    assert 0.93 <= coverage(lambda rng: (rng.random(48) < 0.1).astype(float), 0.1) <= 0.97


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


def test_coverage_of_the_paired_difference():
    # Prompts differ far more from one another than the two models do; the difference is bounded and skewed.
    held = 0
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        hardness = rng.normal(0, 5, size=48)
        interval = paired_difference(hardness + rng.beta(2, 4, size=48), hardness, 1000, 0.95, seed)
        held += interval.low <= 1 / 3 <= interval.high
    assert 0.93 <= held / 1000 <= 0.97


def runs(rng: np.random.Generator, seeds: int, prompts: int = 48) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of several training runs with what made them: an effect of each run and one of each prompt."""
    of_seed = rng.normal(0, 0.5, size=(seeds, 1))
    of_prompt = rng.normal(0, 2.0, size=prompts)
    return 1.0 + of_seed + of_prompt + rng.normal(0, 1, size=(seeds, prompts)), of_seed, of_prompt


@pytest.mark.parametrize("seeds", [1, 3])
def test_coverage_over_prompts_given_the_training_runs(seeds):
    held = 0
    for repetition in range(1000):
        values, of_seed, _ = runs(np.random.default_rng(repetition), seeds)
        interval = over_seeds(values, 500, seed=repetition).prompts
        held += interval.low <= 1.0 + of_seed.mean() <= interval.high
    assert 0.93 <= held / 1000 <= 0.97


@pytest.mark.parametrize("seeds", [2, 5])
def test_coverage_over_training_runs_given_the_prompts(seeds):
    held = 0
    for repetition in range(1000):
        values, _, of_prompt = runs(np.random.default_rng(repetition), seeds)
        interval = over_seeds(values, 100).seeds
        held += interval.low <= 1.0 + of_prompt.mean() <= interval.high
    assert 0.93 <= held / 1000 <= 0.97


def test_over_seeds_by_hand():
    result = over_seeds([[1.0, 3.0, NAN], [2.0, 6.0, 9.0], [3.0, 9.0, 9.0]])
    # Means 2, 4, 6 of the two prompts that all runs have: standard deviation 2, t(2 degrees, 97.5 %) = 4.3027.
    assert result.means == (2.0, 4.0, 6.0)
    assert result.prompts.mean == result.seeds.mean == 4.0
    assert result.seeds.high == pytest.approx(4 + 4.302653 * 2 / math.sqrt(3), rel=1e-6)
    assert result.seeds.low == pytest.approx(4 - 4.302653 * 2 / math.sqrt(3), rel=1e-6)
    assert result.prompts == bootstrap_interval([2.0, 6.0])


@pytest.mark.filterwarnings("error")
def test_over_seeds_of_one_run_and_of_nothing():
    single = over_seeds([[1.0, 2.0]])
    assert single.seeds.mean == 1.5 and np.isnan([single.seeds.low, single.seeds.high]).all()
    assert np.isnan(over_seeds([[NAN], [1.0]]).means).all()
    for wrong in ([1.0, 2.0], np.zeros((0, 3))):
        with pytest.raises(ValueError, match="shape \\(seeds, prompts\\)"):
            over_seeds(wrong)


def test_p_value_of_few_prompts_is_enumerated():
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=7), rng.normal(-0.8, 1, size=7)
    observed = abs(np.mean(a - b))
    swapped = [abs(np.mean((a - b) * signs)) for signs in itertools.product([1, -1], repeat=7)]
    assert paired_p_value(a, b) == pytest.approx(np.mean(np.array(swapped) >= observed - 1e-12))
    assert paired_p_value([*a, NAN], [*b, 1.0]) == paired_p_value(b, a)


def test_p_value_of_many_prompts_is_that_of_the_t_test():
    rng = np.random.default_rng(8)
    difference = rng.normal(0.15, 1.0, size=200)
    student = 2 * t.sf(abs(difference.mean()) / (difference.std(ddof=1) / math.sqrt(200)), 199)
    assert paired_p_value(difference, np.zeros(200)) == pytest.approx(student, abs=0.02)
    assert paired_p_value(difference, difference) == 1.0
    assert paired_p_value(difference + 9, difference) == pytest.approx(1e-4)
    assert math.isnan(paired_p_value([NAN], [1.0]))


def test_p_values_of_equal_models_hold_their_level():
    found = 0
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        hardness = rng.normal(0, 5, size=48)
        found += paired_p_value(hardness + rng.laplace(size=48), hardness + rng.laplace(size=48), 199, seed) <= 0.05
    assert 0.03 <= found / 1000 <= 0.07


@pytest.mark.parametrize("seed", range(20))
def test_holm_is_the_closed_test_of_bonferroni(seed):
    rng = np.random.default_rng(seed)
    p = dict(zip("abcde", rng.choice([0.001, 0.01, 0.012, 0.04, 0.3, 0.9, 1.0], size=5), strict=True))
    subsets = [s for size in range(1, 6) for s in itertools.combinations(p, size)]
    # A hypothesis falls when every set of hypotheses that holds it does.
    expected = {
        name: max(min(1.0, len(subset) * min(p[other] for other in subset)) for subset in subsets if name in subset)
        for name in p
    }
    assert holm(p) == pytest.approx(expected)
    assert list(holm(p)) == list(p)


def test_holm_keeps_the_chance_of_any_false_finding():
    rng = np.random.default_rng(9)
    false, unadjusted = 0, 0
    for _ in range(2000):
        p = {str(i): value for i, value in enumerate(rng.random(8))}
        false += min(holm(p).values()) <= 0.05
        unadjusted += min(p.values()) <= 0.05
    assert 0.03 <= false / 2000 <= 0.06
    assert unadjusted / 2000 > 0.3


@pytest.mark.parametrize("value", [-0.1, 1.1, NAN])
def test_what_is_no_p_value_is_refused(value):
    with pytest.raises(ValueError, match=r"got .* for b"):
        holm({"a": 0.5, "b": value})
    assert holm({}) == {}


def test_compare_is_its_parts():
    rng = np.random.default_rng(10)
    b = {name: rng.normal(size=30) for name in ("x", "y", "z")}
    a = {"z": b["z"] + rng.normal(0.9, 1, 30), "y": b["y"] + rng.normal(0.4, 1, 30), "gone": [1.0] * 30}
    a |= {"x": [None] * 30}
    result = compare(a, b, 300, 0.9, 3)
    assert list(result) == ["z", "y", "x"]
    assert result["y"].difference == paired_difference(a["y"], b["y"], 300, 0.9, 3)
    p = {name: paired_p_value(a[name], b[name], seed=3) for name in ("z", "y")}
    assert {name: result[name].p_value for name in p} == p
    assert {name: result[name].adjusted for name in p} == holm(p)
    assert math.isnan(result["x"].p_value) and math.isnan(result["x"].adjusted)
    with pytest.raises(ValueError, match="no metric is in both"):
        compare(a, {"other": [1.0]})
