"""How sure a mean over prompts is: bootstrap intervals, the unit of resampling being the prompt.

The responses of one prompt depend on each other, so the prompt is what is drawn. A nan (the metric is not defined for
that prompt) is left out. Intervals are bias-corrected and accelerated (BCa): on skewed metrics they miss the truth less
often than plain percentiles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = Sequence[float | None] | NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; bounds are nan where the data cannot give any."""

    mean: float
    low: float
    high: float


def _column(values: Values, name: str) -> NDArray[np.float64]:
    column = np.asarray(values, dtype=np.float64)  # None becomes nan
    if column.ndim != 1:
        raise ValueError(f"{name} must be one value a prompt, shape (prompts,), got {column.shape}")
    return column


def bootstrap_interval(values: Values, draws: int = 2000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean over prompts with its bootstrap interval.

    Args:
        values: One value a prompt, shape `(prompts,)`; nan or None are left out.
        draws: Resamples of the prompts.
        confidence: Level of the interval, in (0, 1).
        seed: Seed of the draws: the same seed and values give the same interval.

    Returns:
        The mean and the BCa interval in the unit of `values`. All three are nan when no value is left; with a single
        value the bounds are nan, because one prompt says nothing about the spread. When all values are equal (to 12
        digits) both bounds are the mean.

    Raises:
        ValueError: If `values` has another shape, or `draws` or `confidence` is out of range.

    Source: Efron, 1987 (BCa), as `scipy.stats.bootstrap` implements it.
    """
    column = _column(values, "values")
    column = column[~np.isnan(column)]
    if column.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(column.mean())
    if column.size == 1:
        return Interval(mean, math.nan, math.nan)
    # BCa divides by the spread of the leave-one-out means, which rounding can make zero.
    if np.ptp(column) <= 1e-12 * np.abs(column).max():
        return Interval(mean, mean, mean)
    bounds = stats.bootstrap(
        (column,),
        np.mean,
        n_resamples=draws,
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high))


def paired_difference(a: Values, b: Values, draws: int = 2000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean of `a - b` over the prompts that both have, with its bootstrap interval.

    The same prompts are drawn for both sides, so what makes a prompt hard for both cancels; the interval is
    usually narrower than two separate ones suggest.

    Args:
        a: One value a prompt, shape `(prompts,)`; nan or None where it is not defined.
        b: The same prompts in the same order.
        draws: See `bootstrap_interval`.
        confidence: See `bootstrap_interval`.
        seed: See `bootstrap_interval`.

    Raises:
        ValueError: If the two are not of one shape; see `bootstrap_interval` for the rest.
    """
    left, right = _column(a, "a"), _column(b, "b")
    if left.shape != right.shape:
        raise ValueError(f"a and b must hold the same prompts, got {left.size} and {right.size} values")
    return bootstrap_interval(left - right, draws, confidence, seed)


def overlap(a: Interval, b: Interval) -> bool:
    """Whether two intervals have a point in common; touching counts, and so does a bound that is nan.

    An interval without bounds cannot be told apart from any other: it is never evidence of a difference.
    """
    return not (a.low > b.high or b.low > a.high)
