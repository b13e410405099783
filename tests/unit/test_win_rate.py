import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binomtest, bootstrap
from sklearn.linear_model import LogisticRegression

from dqo.evaluation.statistics import Interval, bootstrap_interval, expanded_level
from dqo.evaluation.win_rate import length_controlled_win_rate, win_rate

NAN = math.nan


def judged(seed: int, prompts: int, quality: float, taste: float, longer: float = 0.0):
    """Outcomes of a judge with a planted preference (log odds) and a planted taste for length, and the lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.normal(600 + longer, 100, size=prompts)
    others = rng.normal(600, 100, size=prompts)
    x = np.tanh((lengths - others) / (lengths - others).std(ddof=1))
    won = (rng.random(prompts) < expit(quality + taste * x)).astype(float)
    return won, lengths, others


def test_a_tie_is_half_a_win():
    interval = win_rate([1, 1, 0, 0.5, 0.5, None, NAN, 1])
    assert interval.mean == pytest.approx(4 / 6)
    assert interval == bootstrap_interval([1, 1, 0, 0.5, 0.5, 1])


def test_coverage_of_the_win_rate():
    held = 0
    for seed in range(1000):
        outcomes = np.random.default_rng(seed).choice([1.0, 0.5, 0.0], p=[0.5, 0.2, 0.3], size=48)
        interval = win_rate(outcomes, draws=500, seed=seed)
        held += interval.low <= 0.6 <= interval.high
    assert 0.93 <= held / 1000 <= 0.97


@pytest.mark.parametrize("n", [2, 12, 48])
def test_equal_outcomes_have_an_exact_interval(n):
    exact = binomtest(n, n).proportion_ci(0.95, "exact")
    interval = win_rate([1.0] * n)
    assert (interval.mean, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(exact.low)
    lost = win_rate([0.0] * n)
    assert (lost.low, lost.mean, lost.high) == (0.0, 0.0, pytest.approx(1 - exact.low))
    tied = win_rate([0.5] * n)  # at most that share is no tie, all won or all lost
    assert (tied.low, tied.mean, tied.high) == pytest.approx((exact.low / 2, 0.5, 1 - exact.low / 2))


@pytest.mark.parametrize("outcome", [-0.1, 1.5])
def test_outcomes_out_of_range_are_refused(outcome):
    with pytest.raises(ValueError, match=f"got {outcome:g}"):
        win_rate([0.0, outcome])


@pytest.mark.filterwarnings("error")
def test_no_verdict_at_all():
    for interval in (win_rate([None, NAN]), length_controlled_win_rate([None], [1], [1]).controlled):
        assert np.isnan([interval.mean, interval.low, interval.high]).all()
    single = length_controlled_win_rate([1.0], [5], [4])
    assert np.isnan([single.raw.low, single.controlled.low]).all() and single.controlled.mean > 0.5


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("difficult", [False, True])
@pytest.mark.parametrize("penalty", [0.1, 2.0])
def test_the_fit_equals_scikit_learn(ties, difficult, penalty):
    won, lengths, others = judged(1, 120, quality=0.4, taste=1.0, longer=30)
    if ties:
        won[::5] = 0.5
    difference = lengths - others
    columns = [np.ones(120), np.tanh(difference / np.std(difference, ddof=1))]
    difficulty = np.random.default_rng(2).normal(size=120) if difficult else None
    columns += [difficulty] if difficult else []
    design = np.stack(columns, axis=1)
    # A soft label is a win and a loss, each with its share of the weight.
    model = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-10, max_iter=1000).fit(
        np.concatenate([design, design]), np.repeat([1, 0], 120), sample_weight=np.concatenate([won, 1 - won])
    )
    equal = design.copy()
    equal[:, 1] = 0
    result = length_controlled_win_rate(won, lengths, others, draws=100, difficulty=difficulty, penalty=penalty)
    assert result.controlled.mean == pytest.approx(model.predict_proba(equal)[:, 1].mean(), abs=1e-6)
    assert result.length_effect == pytest.approx(model.coef_[0, 1], abs=1e-5)


@pytest.mark.parametrize(
    ("quality", "taste", "longer"), [(0.0, 1.5, 150), (0.6, 1.5, 150), (0.6, -1.0, 100), (-0.5, 2.0, 150)]
)
def test_a_planted_preference_is_recovered_from_under_a_planted_taste_for_length(quality, taste, longer):
    won, lengths, others = judged(3, 6000, quality, taste, longer)
    result = length_controlled_win_rate(won, lengths, others, draws=200)
    truth = expit(quality)
    assert result.controlled.low <= truth <= result.controlled.high
    assert result.controlled.mean == pytest.approx(truth, abs=0.03)
    assert result.length_effect == pytest.approx(taste, abs=0.15)
    assert np.sign(result.raw.mean - truth) == np.sign(taste) and abs(result.raw.mean - truth) > 0.08


def test_without_a_difference_in_length_both_rates_agree():
    won, lengths, _ = judged(4, 60, 0.4, 0.0)
    result = length_controlled_win_rate(won, lengths, lengths, draws=300)
    assert result.controlled.mean == pytest.approx(result.raw.mean, abs=0.01)
    assert result.controlled.low == pytest.approx(result.raw.low, abs=0.02)
    assert result.length_effect == 0.0


def test_swapping_the_models_mirrors_the_rates():
    won, lengths, others = judged(5, 80, 0.5, 1.0, 50)
    one, other = (
        length_controlled_win_rate(won, lengths, others, draws=200),
        length_controlled_win_rate(1 - won, others, lengths, draws=200),
    )
    assert other.controlled.mean == pytest.approx(1 - one.controlled.mean, abs=1e-9)
    assert other.length_effect == pytest.approx(one.length_effect, abs=1e-8)
    assert other.controlled.low == pytest.approx(1 - one.controlled.high, abs=0.03)


def test_the_unit_of_length_does_not_matter_and_missing_verdicts_are_left_out():
    won, lengths, others = judged(6, 60, 0.5, 1.0, 50)
    expected = length_controlled_win_rate(won, lengths, others, draws=200)
    scaled = length_controlled_win_rate(won, lengths / 5, others / 5, draws=200)
    assert scaled.controlled.mean == pytest.approx(expected.controlled.mean, abs=1e-9)
    more = length_controlled_win_rate([*won, None], [*lengths, NAN], [*others, -1], draws=200)
    assert more == expected


@pytest.mark.filterwarnings("error")
def test_a_model_that_always_wins_and_is_always_longer_stays_finite():
    lengths = np.linspace(100, 200, 40)
    result = length_controlled_win_rate(np.ones(40), lengths, lengths / 2)
    assert 0.5 < result.controlled.mean < 1.0 and math.isfinite(result.length_effect)
    assert (result.controlled.low, result.controlled.high) == (result.raw.low, 1.0)
    # All wins where it is longer, all losses where it is shorter: length explains everything.
    sides = np.where(np.arange(40) % 2 == 0, 1.0, 0.0)
    split = length_controlled_win_rate(sides, np.where(sides == 1, 300, 100), np.full(40, 200), draws=300)
    assert split.controlled.mean == pytest.approx(0.5) and split.length_effect > 3
    assert split.controlled.low <= 0.5 <= split.controlled.high


@pytest.mark.slow
def test_coverage_of_the_length_controlled_rate():
    held = 0
    for seed in range(1000):
        result = length_controlled_win_rate(*judged(seed, 100, 0.5, 1.0, 60), draws=300, seed=seed)
        held += result.controlled.low <= expit(0.5) <= result.controlled.high
    assert 0.93 <= held / 1000 <= 0.97


def test_the_interval_is_that_of_scipy_with_a_fit_for_every_draw():
    won, lengths, others = judged(8, 60, 0.8, 1.5, 80)
    x = np.tanh((lengths - others) / (lengths - others).std(ddof=1))

    def rate(won, x):
        model = LogisticRegression(C=10, fit_intercept=False).fit(np.stack([np.ones_like(x), x], 1), won)
        return expit(model.coef_[0, 0])

    level = expanded_level(0.9, 60, 600)
    settings = {"paired": True, "vectorized": False, "n_resamples": 600, "rng": np.random.default_rng(0)}
    expected = bootstrap((won, x), rate, confidence_level=level, method="BCa", **settings).confidence_interval
    controlled = length_controlled_win_rate(won, lengths, others, 4000, 0.9).controlled
    width = expected.high - expected.low
    assert controlled.low == pytest.approx(expected.low, abs=0.1 * width)
    assert controlled.high == pytest.approx(expected.high, abs=0.1 * width)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 0], [1], [1, 2]), "lengths must hold the same prompts as outcomes, got 1 and 2"),
        (([1, 0], [1, 2], [1, -2]), "other_lengths must be finite and no length negative, got -2"),
        (([1, 0], [1, NAN], [1, 2]), "lengths must be finite"),
        (([1, 2], [1, 2], [1, 2]), "outcomes must be between"),
        (([1, 0], [3, 4], [1, 2]), "every response is longer by 2"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        length_controlled_win_rate(*arguments)


def test_a_penalty_of_nothing_is_refused():
    with pytest.raises(ValueError, match="penalty must be above 0"):
        length_controlled_win_rate([1, 0], [1, 2], [2, 1], penalty=0)


def test_the_raw_rate_is_the_win_rate():
    won, lengths, others = judged(7, 50, 0.5, 1.0)
    assert length_controlled_win_rate(won, lengths, others, draws=200, seed=3).raw == win_rate(won, 200, seed=3)
    assert isinstance(win_rate(won), Interval)
