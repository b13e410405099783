"""How often one model's response is preferred: raw, and with the judge's taste for length taken out.

An outcome is one number a prompt: 1 for a win, 0 for a loss, 1/2 for a tie (a judge that contradicts itself when the
two responses are swapped has called a tie), None where there is no verdict, which counts for neither side. Where a
prompt was judged several times, it is the mean of those outcomes.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit

from dqo.evaluation.statistics import Interval, Values, bootstrap_interval, column

Floats = NDArray[np.float64]

_CELLS = 2_000_000  # numbers of one batch of bootstrap draws: bounds the memory


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
        others = 1.0 - ((1.0 - confidence) / 2) ** (1.0 / values.size)
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
    (Dubois et al., 2024, arXiv 2404.04475, read in the source of alpaca_eval, `metrics/glm_winrate.py`): intercept,
    tanh of the standardised difference, known difficulty; outcomes between 0 and 1 as soft labels. What differs:

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

    def rate(prompts: NDArray[np.int64], axis: int = -1) -> Floats:
        """Controlled rate of samples of the prompts, shape `(..., n)` -> `(...,)`."""
        drawn = prompts.reshape(-1, prompts.shape[-1])
        coefficients = _fit(design[drawn], won[drawn], penalty)
        level = np.delete(design, 1, axis=1)[drawn] @ np.delete(coefficients, 1, axis=1)[..., None]
        return expit(level[..., 0]).mean(axis=-1).reshape(prompts.shape[:-1])

    everything = np.arange(won.size)
    mean = float(rate(everything))
    effect = float(_fit(design[None], won[None], penalty)[0, 1])
    if won.size == 1 or np.ptp(won) == 0.0:
        return LengthControlled(raw, Interval(mean, raw.low, raw.high), effect)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        bounds = stats.bootstrap(
            (everything,),
            rate,
            n_resamples=draws,
            batch=max(1, _CELLS // design.size),
            vectorized=True,
            confidence_level=confidence,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return LengthControlled(raw, Interval(mean, float(bounds.low), float(bounds.high)), effect)


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


def _fit(design: Floats, outcomes: Floats, penalty: float) -> Floats:
    """Penalised logistic regressions by Newton's method.

    Args:
        design: Shape `(fits, n, p)`.
        outcomes: In [0, 1], shape `(fits, n)`.
        penalty: Of the squares.

    Returns:
        Coefficients, shape `(fits, p)`.
    """
    fits, _, terms = design.shape
    coefficients = np.zeros((fits, terms))

    def loss(candidates: Floats) -> Floats:
        logits = (design @ candidates[..., None])[..., 0]
        return (np.logaddexp(0.0, logits) - outcomes * logits).sum(-1) + penalty / 2 * (candidates**2).sum(-1)

    current = loss(coefficients)
    for _ in range(100):
        chance = expit((design @ coefficients[..., None])[..., 0])
        slope = ((chance - outcomes)[:, None, :] @ design)[:, 0, :] + penalty * coefficients
        curvature = design.mT @ (design * (chance * (1 - chance))[..., None]) + penalty * np.eye(terms)
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
