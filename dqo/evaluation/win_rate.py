"""How often one model's response is preferred: raw, and with the judge's taste for length taken out.

An outcome is one number a prompt: 1 for a win, 0 for a loss, 1/2 for a tie (a judge that contradicts itself when the
two responses are swapped has called a tie), None where there is no verdict, which counts for neither side. Where a
prompt was judged several times, it is the mean of those outcomes.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from dqo.evaluation.statistics import CELLS, Interval, Values, bca_bounds, bootstrap_interval, column, none_in

Floats = NDArray[np.float64]


def _outcomes(outcomes: Values) -> Floats:
    values = column(outcomes, "outcomes")
    wrong = values[(values < 0) | (values > 1)]
    if wrong.size:
        raise ValueError(f"outcomes must be between 0 (a loss) and 1 (a win), got {wrong[0]:g}")
    return values


def win_rate(outcomes: Values, draws: int = 2000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Share of prompts won, a tie counting one half, with its bootstrap interval over prompts.

    No bootstrap can see beyond equal outcomes: 20 wins of 20 would be a rate of exactly 1. There the interval says what
    else is compatible with n equal outcomes: at most a share `r = 1 - ((1 - confidence) / 2)^(1/n)` of all prompts has
    another one (Clopper and Pearson's bound for none in n), and these may all be wins, or all losses [ours].

    Args:
        outcomes: One number a prompt in [0, 1], shape `(prompts,)`; nan or None are left out.
        draws: See `bootstrap_interval`.
        confidence: See `bootstrap_interval`.
        seed: See `bootstrap_interval`.

    Returns:
        The rate in [0, 1] with its interval; see `bootstrap_interval` for no prompt or a single one.

    Raises:
        ValueError: If an outcome is out of range; see `bootstrap_interval` for the rest.
    """
    values = _outcomes(outcomes)
    values = values[~np.isnan(values)]
    interval = bootstrap_interval(values, draws, confidence, seed)
    if values.size > 1 and np.ptp(values) == 0.0:
        others = none_in(values.size, confidence)
        return Interval(interval.mean, interval.mean * (1 - others), interval.mean + (1 - interval.mean) * others)
    return interval


@dataclass(frozen=True)
class LengthControlled:
    """A win rate beside what it would be at equal lengths."""

    raw: Interval
    """As `win_rate` gives it, over the same prompts."""
    controlled: Interval
    """Win rate at equal lengths, in [0, 1]."""
    length_effect: float
    """Log odds that `tanh` = 1, a response far longer than the other one, adds; above 0 where longer ones win."""


def length_controlled_win_rate(
    outcomes: Values,
    lengths: Values,
    other_lengths: Values,
    draws: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    difficulty: Values | None = None,
    penalty: float = 0.1,
) -> LengthControlled:
    """Win rate at equal lengths: a logistic model of the outcomes with length among the causes, read without it.

    The model of prompt x, with d the difference of the two lengths and s the standard deviation of d over the prompts:

        logit P(win) = theta + phi * tanh(d / s) + psi * difficulty(x)

    and the controlled rate is the mean over the prompts of P(win) with `phi = 0`. This is the form of AlpacaEval 2
    (Dubois et al., 2024, arXiv 2404.04475 [second hand]; read in the source of alpaca_eval, `metrics/glm_winrate.py`):
    intercept, tanh of the standardised difference, known difficulty; outcomes between 0 and 1 as soft labels. What
    differs:

    - AlpacaEval's difficulties come from a fit over its whole leaderboard. Two models alone cannot tell a prompt's
      difficulty from its outcome, so the term is left out unless `difficulty` is given. Values do not compare with the
      public leaderboard.
    - AlpacaEval penalises the absolute coefficients with a strength chosen by 5-fold cross-validation; here it is their
      squares at a fixed strength, so that the same data always give the same fit. The default is a normal prior of
      standard deviation 3.2 log odds: it moves a rate over 50 prompts by less than 0.01 and keeps a model that won
      everywhere finite.
    - AlpacaEval adds its baseline's deliberately short and long answers as pseudo-data of weight 0.2, against gaming
      by length; here there are none.

    The correction assumes that length acts in the same way for all prompts and that it is not itself what makes a
    response good. Where one side is nearly always the longer one the two causes cannot be told apart; the interval
    then widens.

    Args:
        outcomes: One number a prompt in [0, 1], shape `(prompts,)`; prompts with nan or None are left out.
        lengths: Length of the model's response to each prompt, in characters as AlpacaEval or any unit.
        other_lengths: Length of the other model's response, in the same unit.
        draws: Resamples of the prompts; the model is fitted again for each, with s of all prompts.
        confidence: Level of the intervals, in (0, 1).
        seed: Seed of the draws.
        difficulty: Known difficulty of each prompt, any unit; `None` leaves the term out.
        penalty: Strength of the squares' penalty on theta, phi and psi: `penalty / 2 * (theta^2 + phi^2 + psi^2)` is
            added to the sum of the log losses; above 0.

    Returns:
        The raw and the controlled rate. Without a prompt everything is nan; with a single one, the bounds. Where all
        outcomes are equal the controlled interval is the raw one.

    Raises:
        ValueError: If the inputs do not hold the same prompts, an outcome is out of range, a length is negative or not
            finite, the penalty is not above 0, or every response is longer by the same amount, so that the effect of
            length cannot be told from that of the model.
    """
    won = _outcomes(outcomes)
    named = {"lengths": column(lengths, "lengths"), "other_lengths": column(other_lengths, "other_lengths")}
    if difficulty is not None:
        named["difficulty"] = column(difficulty, "difficulty")
    known = ~np.isnan(won)
    for name, values in named.items():
        if values.shape != won.shape:
            raise ValueError(f"{name} must hold the same prompts as outcomes, got {values.size} and {won.size} values")
        wrong = ~np.isfinite(values) | ((values < 0) & (name != "difficulty"))
        if (wrong & known).any():
            raise ValueError(f"{name} must be finite and no length negative, got {values[wrong & known][0]:g}")
    if not penalty > 0:
        raise ValueError(f"penalty must be above 0, got {penalty:g}")
    won = won[known]
    raw = win_rate(won, draws, confidence, seed)
    if won.size == 0:
        return LengthControlled(raw, raw, math.nan)
    difference = (named["lengths"] - named["other_lengths"])[known]
    columns = [np.ones_like(won), _standardised(difference)]
    if difficulty is not None:
        columns.append(named["difficulty"][known])
    design = np.stack(columns, axis=-1)
    equal = design * (np.arange(design.shape[1]) != 1)  # the same prompts with both responses of one length
    fitted = _fit(design, won, np.ones((1, won.size)), penalty, np.zeros(design.shape[1]))[0]
    chances = expit(equal @ fitted)
    mean, effect = float(chances.mean()), float(fitted[1])
    if won.size == 1 or np.ptp(won) == 0.0:
        return LengthControlled(raw, Interval(mean, raw.low, raw.high), effect)

    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, draws, batch := max(1, CELLS // won.size)):
        counts = rng.multinomial(won.size, np.full(won.size, 1 / won.size), size=min(batch, draws - start))
        refitted = _fit(design, won, counts.astype(np.float64), penalty, fitted)
        drawn.append((counts * expit(refitted @ equal.T)).sum(axis=1) / won.size)
    low, high = bca_bounds(
        np.concatenate(drawn),
        mean,
        _influence(design, equal, won, fitted, penalty),
        confidence,
    )
    return LengthControlled(raw, Interval(mean, low, high), effect)


def _standardised(difference: Floats) -> Floats:
    """The tanh of the differences in units of their standard deviation, shape `(prompts,)`."""
    if not difference.any():
        return np.zeros_like(difference)
    if np.ptp(difference) == 0.0:
        if difference.size == 1:
            return np.sign(difference)
        raise ValueError(
            f"every response is longer by {difference[0]:g}: the effect of length cannot be told from the model's"
        )
    return np.tanh(difference / difference.std(ddof=1))  # of a sample, as pandas computes it


def _fit(design: Floats, outcomes: Floats, weights: Floats, penalty: float, start: Floats) -> Floats:
    """Penalised logistic regressions of the same prompts under different weights, by Newton's method.

    Args:
        design: Shape `(prompts, p)`.
        outcomes: In [0, 1], shape `(prompts,)`.
        weights: How often each prompt counts, shape `(fits, prompts)`.
        penalty: Of the squares.
        start: Shape `(p,)`.

    Returns:
        Coefficients, shape `(fits, p)`.
    """
    terms = design.shape[1]
    products = (design[:, :, None] * design[:, None, :]).reshape(-1, terms * terms)
    coefficients = np.tile(start, (len(weights), 1))

    def loss(candidates: Floats) -> Floats:
        logits = candidates @ design.T
        losses = np.logaddexp(0.0, logits) - outcomes * logits
        return (weights * losses).sum(axis=1) + penalty / 2 * (candidates**2).sum(axis=1)

    current = loss(coefficients)
    for _ in range(100):
        chance = expit(coefficients @ design.T)
        slope = (weights * (chance - outcomes)) @ design + penalty * coefficients
        curvature = ((weights * chance * (1 - chance)) @ products).reshape(-1, terms, terms) + penalty * np.eye(terms)
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        if np.abs(step).max() < 1e-9:
            break
        # A full step can overshoot where the chances saturate: halve it until the loss falls, which a convex one does.
        for _ in range(40):
            proposed = loss(coefficients - step)
            worse = proposed > current + 1e-12 * np.abs(current)
            if not worse.any():
                break
            step[worse] /= 2
        coefficients = coefficients - step
        current = proposed
    return coefficients


def _influence(design: Floats, equal: Floats, outcomes: Floats, fitted: Floats, penalty: float) -> Floats:
    """Change of the controlled rate with the weight of each prompt (infinitesimal jackknife), shape `(prompts,)`.

    By the implicit function theorem the coefficients move by the inverse curvature times the prompt's score.
    """
    chance, level = expit(design @ fitted), expit(equal @ fitted)
    curvature = (design * (chance * (1 - chance))[:, None]).T @ design + penalty * np.eye(design.shape[1])
    slope = ((level * (1 - level))[:, None] * equal).mean(axis=0)
    scores = (outcomes - chance)[:, None] * design
    return scores @ np.linalg.solve(curvature, slope) + (level - level.mean()) / len(outcomes)
