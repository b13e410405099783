"""How well verdicts agree with labels: Cohen's kappa and its interval."""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from dqo.evaluation.statistics import Interval


def kappa(
    labels: Sequence[str],
    verdicts: Sequence[str],
    clusters: Sequence[Hashable],
    draws: int,
    confidence: float,
    seed: int,
) -> Interval:
    """Cohen's kappa of two raters over nominal classes, with a bootstrap interval over clusters.

    kappa = (p_o - p_e) / (1 - p_e), with p_o the share of equal classes and p_e the share that independent raters with
    the same margins would have (Cohen, 1960).

    Args:
        labels: One class a case.
        verdicts: One class a case, in the same order.
        clusters: Cases of one cluster depend on each other (a pair and its swapped twin) and are drawn together.
        draws: Resamples of the clusters.
        confidence: Level of the interval, in (0, 1).
        seed: Seed of the draws.

    Returns:
        kappa as `mean` with a percentile interval. All are nan where both raters use one and the same class, or there
        is no case: kappa is not defined there. Draws of that kind are left out of the interval.

    Raises:
        ValueError: If the three are not of one length.
    """
    classes = sorted({*labels, *verdicts})
    index = {name: position for position, name in enumerate(classes)}
    groups = {name: position for position, name in enumerate(dict.fromkeys(clusters))}
    tables = np.zeros((len(groups), len(classes), len(classes)))
    for label, verdict, cluster in zip(labels, verdicts, clusters, strict=True):
        tables[groups[cluster], index[label], index[verdict]] += 1
    value = float(_kappa(tables.sum(axis=0)))
    if math.isnan(value):
        return Interval(math.nan, math.nan, math.nan)
    # A draw of n clusters with replacement is how often each of them comes up.
    counts = np.random.default_rng(seed).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=draws)
    drawn = _kappa(np.einsum("dg,gij->dij", counts, tables))
    drawn = drawn[~np.isnan(drawn)]
    if len(groups) < 2 or not drawn.size:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


def _kappa(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kappa of confusion tables, shape (..., classes, classes); nan where it is not defined."""
    total = tables.sum(axis=(-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = np.trace(tables, axis1=-2, axis2=-1) / total
        expected = (tables.sum(axis=-1) * tables.sum(axis=-2)).sum(axis=-1) / total**2
        return np.where(expected < 1, (observed - expected) / (1 - expected), math.nan)
