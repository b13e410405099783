"""What the best of k responses is worth, for every k at once: pass@k and best-of-k without bias.

Taking the best of the first k of n samples wastes the others. The mean over all subsets of k of the n samples uses all
of them, has the same expectation and the least variance, and needs no subset to be drawn: in the sorted sample, the
i-th smallest is the best of `C(i - 1, k - 1)` of the `C(n, k)` subsets.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dqo.evaluation.statistics import Interval, bootstrap_interval

Curve = NDArray[np.float64]
"""Shape `(prompts, n)`: column k - 1 is about k responses."""


@lru_cache(maxsize=64)
def _weights(n: int) -> Curve:
    """Chance that the i-th smallest of n is the largest of k drawn, shape `(k, i)`, both from 1 to n."""
    # C(i - 1, k - 1) / C(n, k) step by step from i = n downwards: no binomial is formed, so none overflows.
    k = np.arange(n)[:, None]
    i = np.arange(n - 1, 0, -1)
    steps = np.concatenate([(k + 1) / n, np.clip((i - k) / i, 0.0, None)], axis=1)
    return np.cumprod(steps, axis=1)[:, ::-1]


def expected_best(scores: Sequence[Sequence[float | None]]) -> Curve:
    """Expected highest score among k of a prompt's responses, drawn without replacement, for every k.

    Column 0 is the mean score and the last one the highest. Unbiased for the expected best of k fresh samples.

    Args:
        scores: Score of each response, prompts x any number; None or nan where it could not be scored, which counts as
            one response fewer and not as a failure.

    Returns:
        Shape `(prompts, n)` with n the most responses of a prompt, in the unit of the scores. nan where k is larger
        than the number of a prompt's scored responses.

    Source: expectation of the largest order statistic of a finite population; for scores 0 and 1 it is the estimator
    of Chen et al., 2021 (arXiv 2107.03374), section 2.1 [derived].
    """
    rows = [np.asarray(row, dtype=np.float64) for row in scores]
    curve = np.full((len(rows), max((row.size for row in rows), default=0)), np.nan)
    for row, target in zip(rows, curve, strict=True):
        if row.ndim != 1:
            raise ValueError(f"scores must be one number a response, prompts x any number, got a row of {row.shape}")
        ordered = np.sort(row[~np.isnan(row)])
        target[: ordered.size] = _weights(ordered.size) @ ordered if ordered.size else []
    return curve


def pass_at_k(passed: Sequence[Sequence[bool | float | None]]) -> Curve:
    """Chance that at least one of k responses passes, for every k: `1 - C(n - c, k) / C(n, k)` with c passes among n.

    Args:
        passed: Whether each response passed, prompts x any number, as booleans or 0 and 1; None or nan where it could
            not be judged, which counts as one response fewer.

    Returns:
        Shape `(prompts, n)`, in [0, 1]; see `expected_best`. `pass_at_k(passed)[:, k - 1]` is one value a prompt, for
        `bootstrap_interval` and `paired_difference`.

    Raises:
        ValueError: If a value is something else.

    Source: Chen et al., 2021 (arXiv 2107.03374), section 2.1.
    """
    for prompt, row in enumerate(passed):
        wrong = [value for value in row if value is not None and value not in (0, 1) and value == value]
        if wrong:
            raise ValueError(f"passed must hold 0, 1 or None, got {wrong[0]} for prompt {prompt}")
    return expected_best(passed)


def curve_intervals(curve: Curve, draws: int = 2000, confidence: float = 0.95, seed: int = 0) -> list[Interval]:
    """Mean over prompts with its bootstrap interval for every k.

    Args:
        curve: What `expected_best` or `pass_at_k` returned, or the difference of two of the same prompts, which gives
            the paired one. Where prompts have different numbers of scored responses, large k are about fewer prompts.
        draws: See `bootstrap_interval`.
        confidence: Level of each interval by itself; together they hold less often.
        seed: See `bootstrap_interval`; the same prompts are drawn for every k.

    Returns:
        One interval for each k, from 1 to n.
    """
    return [bootstrap_interval(column, draws, confidence, seed) for column in curve.T]
