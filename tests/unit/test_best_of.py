import itertools
import math

import numpy as np
import pytest

from dqo.evaluation.best_of import curve_intervals, expected_best, pass_at_k
from dqo.evaluation.metrics import best_of_n, quality
from dqo.evaluation.statistics import bootstrap_interval, paired_difference

NAN = math.nan


def enumerated(row: list[float], k: int) -> float:
    return float(np.mean([max(subset) for subset in itertools.combinations(row, k)]))


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_expected_best_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(n)
    scores = [*rng.normal(size=(6, n)).tolist(), [0.5] * n, rng.integers(0, 3, size=n).tolist()]
    expected = [[enumerated(row, k) for k in range(1, n + 1)] for row in scores]
    np.testing.assert_allclose(expected_best(scores), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 4, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n):
    groups = [[position < passes for position in range(n)] for passes in range(n + 1)]
    expected = [
        [np.mean([any(subset) for subset in itertools.combinations(group, k)]) for k in range(1, n + 1)]
        for group in groups
    ]
    np.testing.assert_allclose(pass_at_k(groups), expected, rtol=1e-12)


def test_pass_at_k_is_the_formula_of_chen_et_al():
    n = 200
    curve = pass_at_k([[True] * c + [False] * (n - c) for c in (0, 1, 17, 199, 200)])
    for row, c in zip(curve, (0, 1, 17, 199, 200), strict=True):
        exact = [1 - math.comb(n - c, k) / math.comb(n, k) for k in range(1, n + 1)]
        np.testing.assert_allclose(row, exact, rtol=1e-10, atol=1e-15)


def test_thousands_of_responses_do_not_overflow():
    curve = expected_best([np.arange(2000.0)])[0]
    # The largest of k from 0 .. n - 1 is expected at k (n + 1) / (k + 1) - 1.
    k = np.arange(1, 2001)
    np.testing.assert_allclose(curve, k * 2001 / (k + 1) - 1, rtol=1e-9)


def test_pass_at_k_is_unbiased():
    # Prompts pass with chances p: the mean over prompts of n = 6 must be 1 - (1 - p)^k, the naive plug-in is not.
    rng = np.random.default_rng(0)
    passed = rng.random((40_000, 6)) < 0.3
    means = pass_at_k(passed).mean(axis=0)
    np.testing.assert_allclose(means, 1 - 0.7 ** np.arange(1, 7), atol=0.01)


def test_ends_of_the_curve_are_mean_and_best():
    scores = np.random.default_rng(1).normal(size=(5, 7)).tolist()
    curve = expected_best(scores)
    np.testing.assert_allclose(curve[:, 0], quality(scores))
    np.testing.assert_allclose(curve[:, -1], best_of_n(scores))
    assert (np.diff(curve) > 0).all()


def test_unscored_responses_are_fewer_tries_not_failures():
    curve = pass_at_k([[1, None, 0], [NAN, NAN, 1], [None, None, None], [1]])
    np.testing.assert_allclose(curve, [[0.5, 1, NAN], [1, NAN, NAN], [NAN, NAN, NAN], [1, NAN, NAN]])
    assert expected_best([]).shape == (0, 0) and expected_best([[], []]).shape == (2, 0)


@pytest.mark.parametrize("value", [0.5, 2, -1])
def test_what_is_no_pass_or_fail_is_refused(value):
    with pytest.raises(ValueError, match=f"got {value} for prompt 1"):
        pass_at_k([[1, 0], [0, value]])


def test_scores_that_are_not_one_number_a_response_are_refused():
    with pytest.raises(ValueError, match="one number a response"):
        expected_best(np.zeros((2, 3, 4)))


def test_curve_intervals_are_those_of_each_k_and_of_differences():
    rng = np.random.default_rng(2)
    a, b = expected_best(rng.normal(size=(20, 4))), expected_best(rng.normal(size=(20, 4)))
    assert curve_intervals(a, 300, 0.9, 3) == [bootstrap_interval(a[:, k], 300, 0.9, 3) for k in range(4)]
    assert curve_intervals(a - b, 300, 0.9, 3)[2] == paired_difference(a[:, 2], b[:, 2], 300, 0.9, 3)
