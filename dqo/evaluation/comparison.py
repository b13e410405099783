"""Evaluated models side by side, on the prompts that all of them answered.

The first model is what the others are compared with. Everything is paired by prompt: means and intervals are those of
the common prompts, differences are of the same prompts, and one model's response wins over another one's to the same
prompt. What cannot be compared (another number of responses, another encoder, another reward) is left out and said.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dqo.errors import DQOError
from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.page import listed, number, signed
from dqo.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    column,
    holm,
    paired_difference,
    paired_p_value,
)
from dqo.evaluation.win_rate import LengthControlled, length_controlled_win_rate, win_rate
from dqo.recipe import smallest_p_value

MOST_MODELS = 8
"""As many as have a colour and a marker of their own."""

DIVERSITY = tuple(
    name for name, metric in METRICS.items() if metric.direction == "higher" and name not in ("quality", "best_of_n")
)
_EMBEDDED = {"cosine_distance", "log_volume", "vendi_score", "semantic_clusters"}
_REWARDED = {"quality", "best_of_n"}
# Means over single responses or over pairs of them; all else grows or shrinks with the group.
_WHATEVER_N = {"quality", "self_rouge_diversity", "cosine_distance", "truncation_rate", "mean_tokens"}

Verdict = Literal["better", "worse", "differs", "not told apart", "not measured"]
_WORDS: dict[Verdict, str] = {"better": "Better on", "worse": "Worse on", "differs": "Different in"}


@dataclass(frozen=True)
class Conditions:
    """What of a recipe two evaluations must share; compared, never read."""

    reward: Any
    """The task and how its responses are scored."""
    encoder: Any
    """What embeds the responses."""
    sampling: Any
    """How the responses are drawn."""


@dataclass(frozen=True)
class Verdicts:
    """What a judge said of one model in its evaluation."""

    identity: Mapping[str, Any]
    """The judge's; two of one identity are the same judge."""
    responses: int
    """Responses of each group that were judged."""
    against: str
    """The model that it compared this one with."""
    opponent: Mapping[str, Sequence[str]]
    """That model's judged responses by prompt id: a name alone may stand for another training."""
    per_prompt: Sequence[float | None] | None
    """Wins with ties as halves, one value a prompt in the order of the model's rows; `None` for the opponent itself."""
    faults: Sequence[str]
    """Why the verdicts must not decide: the judge is not done, or has not passed its audit."""


@dataclass(frozen=True)
class Evaluated:
    """One model as an evaluation measured it."""

    label: str
    """What a reader calls it; no two of a comparison share it."""
    model: str
    """Key of `evaluation.json`."""
    source: str
    """What was given to name it."""
    n: int
    """Responses sampled for a prompt."""
    confidence: float
    """Level of the evaluation's intervals."""
    per_prompt: Mapping[str, Sequence[float | None]]
    """Metric -> one value a prompt, in the order of `rows`."""
    rows: Sequence[Mapping[str, Any]]
    """The model's rows of `responses.jsonl`."""
    data_digest: str | None = None
    recipe_digest: str | None = None
    conditions: Conditions | None = None
    """`None` where the recipe is not known."""
    run_id: str | None = None
    """MLflow run of the evaluation."""
    judge: Verdicts | None = None
    """`None` where no judge was asked about the model."""


def evaluated(
    document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], model: str, source: str, where: str
) -> Evaluated:
    """Take one model out of an evaluation.

    Args:
        document: Contents of `evaluation.json`.
        rows: Rows of `responses.jsonl`, of all models.
        model: Its key.
        source: What was given to name it.
        where: The evaluation's place, for messages.

    Raises:
        DQOError: If the evaluation does not hold the model, or its files do not fit each other.
    """
    try:
        models = document["models"]
        if model not in models:
            raise DQOError(f"{source}: the evaluation {where} holds no model {model!r}; it holds {', '.join(models)}")
        own = [row for row in rows if row["model"] == model]
        per_prompt = models[model]["per_prompt"]
        wrong = {name: len(values) for name, values in per_prompt.items() if len(values) != len(own)}
        if not own or wrong:
            raise DQOError(
                f"{source}: the evaluation {where} holds responses of {model} to {len(own)} prompts"
                + (f", and {wrong} values" if wrong else "")
                + "; expected one value a prompt, and a prompt"
            )
        if len({row["id"] for row in own}) != len(own):
            raise DQOError(f"{source}: the evaluation {where} holds a prompt of {model} twice")
        return Evaluated(
            label=source,
            model=model,
            source=source,
            n=document["n"],
            confidence=document["confidence"],
            per_prompt={name: values for name, values in per_prompt.items() if name in METRICS},
            rows=own,
            data_digest=document.get("data_digest"),
            recipe_digest=document.get("recipe_digest"),
            judge=_verdicts(document.get("judge"), model, len(own), rows),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DQOError(
            f"{source}: the evaluation {where} cannot be read ({type(error).__name__}: {error}); expected "
            "evaluation.json and responses.jsonl as the stage `evaluate` writes them"
        ) from None


def _verdicts(
    judge: Mapping[str, Any] | None, model: str, prompts: int, rows: Sequence[Mapping[str, Any]]
) -> Verdicts | None:
    if judge is None or (model not in judge["models"] and model != judge["against"]):
        return None
    said = judge["models"].get(model)
    if said is not None and len(said["per_prompt"]) != prompts:
        return None
    faults = [] if judge["complete"] else ["is not done"]
    faults += [] if judge["audit"]["passed"] else ["has not passed its audit"]
    count = judge["responses"]
    opponent = {row["id"]: row["responses"][:count] for row in rows if row["model"] == judge["against"]}
    per_prompt = None if said is None else said["per_prompt"]
    return Verdicts(judge["identity"], count, judge["against"], opponent, per_prompt, faults)


@dataclass(frozen=True)
class Difference:
    """One model minus the first one on one metric."""

    interval: Interval
    p_value: float
    adjusted: float
    """The p-value, adjusted for all differences of the comparison; nan where there is none."""
    verdict: Verdict
    """`differs` on a metric of which no direction is better."""


@dataclass(frozen=True)
class Compared:
    """Models side by side; lists are in the order of `models`."""

    models: Sequence[Evaluated]
    """With the common prompts alone, in one order."""
    confidence: float
    means: Mapping[str, Sequence[Interval]]
    """Metric -> mean over the common prompts of each model; nan where it was not measured."""
    differences: Mapping[str, Sequence[Difference | None]]
    """Metric -> difference of each model to the first one; `None` for the first itself."""
    win_rates: Sequence[Sequence[LengthControlled | None]]
    """`[i][j]`: how often model i's response wins over model j's; `None` where `i = j` or qualities do not compare."""
    left_out: Mapping[str, str]
    """Metric -> why it is not compared."""
    warnings: Sequence[str]
    judged: Sequence[Interval | None] | None = None
    """Win rate of each model against the one that a judge compared them all with, on the common prompts; `None` for
    that one itself, and in the place of all where there are no such verdicts of one judge."""

    @property
    def prompts(self) -> int:
        """Common prompts."""
        return len(self.models[0].rows)

    @property
    def same_n(self) -> bool:
        """Whether all models were asked for as many responses a prompt."""
        return len({model.n for model in self.models}) == 1

    def on(self, position: int, verdict: Verdict) -> list[str]:
        """Metrics on which a model has this verdict against the first one."""
        return [
            metric
            for metric, differences in self.differences.items()
            if (difference := differences[position]) is not None and difference.verdict == verdict
        ]


def compare(models: Sequence[Evaluated], draws: int = 2000, seed: int = 0) -> Compared:
    """Compare models with the first one on their common prompts.

    A difference counts as shown where its p-value (randomisation test for pairs), adjusted by Holm's method for all
    metrics and models of the comparison, is at most `1 - confidence`. The intervals are not adjusted.

    Args:
        models: Two or more; the first is what the others are compared with.
        draws: Resamples of the prompts of each interval.
        seed: Seed of all draws.

    Raises:
        DQOError: If there are fewer than two models or more than `MOST_MODELS`, two have one label, or no prompt is
            common to all.
    """
    if not 2 <= len(models) <= MOST_MODELS:
        raise DQOError(f"compare: got {len(models)} model(s); expected 2 to {MOST_MODELS}")
    labels = [model.label for model in models]
    runs = [(model.run_id, model.model) for model in models if model.run_id is not None]
    if len(set(labels)) < len(labels) or len(set(runs)) < len(runs):
        raise DQOError(f"compare: one model is given twice; got {', '.join(model.source for model in models)}")
    common, warnings = _common_prompts(models)
    left_out, further = _not_comparable(models)
    confidence = models[0].confidence
    values = {
        metric: [_values(model, metric) for model in common]
        for metric in METRICS
        if metric not in left_out and any(metric in model.per_prompt for model in common)
    }
    means = {
        metric: [bootstrap_interval(one, draws, confidence, seed) for one in found] for metric, found in values.items()
    }
    p_values = {
        (metric, position): paired_p_value(found[position], found[0], seed=seed)
        for metric, found in values.items()
        for position in range(1, len(common))
    }
    known = {f"{metric} {position}": p for (metric, position), p in p_values.items() if not math.isnan(p)}
    adjusted = holm(known)
    prompts, smallest = len(common[0].rows), smallest_p_value(len(common[0].rows))
    if len(known) * smallest > 1 - confidence + 1e-12:
        further.append(
            f"{prompts} prompts are too few to tell any of {len(known)} differences from chance (Holm): the smallest "
            f"p-value of one is {smallest:.2g}; evaluate on more prompts"
        )
    differences: dict[str, list[Difference | None]] = {}
    for metric, found in values.items():
        differences[metric] = [None]
        for position in range(1, len(common)):
            interval = paired_difference(found[position], found[0], draws, confidence, seed)
            p_value = adjusted.get(f"{metric} {position}", math.nan)
            verdict = _verdict(metric, interval.mean, p_value, 1 - confidence)
            differences[metric].append(Difference(interval, p_values[metric, position], p_value, verdict))
    win_rates: list[list[LengthControlled | None]] = [[None] * len(common) for _ in common]
    if "quality" not in left_out:
        for i, one in enumerate(common):
            for j in range(i + 1, len(common)):
                rates = _win_rates(one, common[j], draws, confidence, seed)
                win_rates[i][j], win_rates[j][i] = rates, _other_side(rates)
    judged, about = _judged(common, draws, confidence, seed)
    return Compared(common, confidence, means, differences, win_rates, left_out, [*warnings, *further, *about], judged)


def _judged(
    models: Sequence[Evaluated], draws: int, confidence: float, seed: int
) -> tuple[list[Interval | None] | None, list[str]]:
    """Win rates by one judge against one opponent, and what a reader should know."""
    known = [model.judge for model in models if model.judge is not None]
    if len(known) < len(models):
        return None, []
    first, ids = known[0], [row["id"] for row in models[0].rows]
    if any((one.identity, one.responses) != (first.identity, first.responses) for one in known):
        return None, ["judges differ (judge's model, server, prompt or settings): their verdicts are not compared"]
    if any(one.opponent.get(key) != first.opponent.get(key) for one in known for key in ids):
        return None, ["the judge compared them with different models: its verdicts are not compared"]
    warnings = [
        f"the judge {' and '.join(one.faults)} in the evaluation of {model.label}: its verdicts must not decide"
        for model, one in zip(models, known, strict=True)
        if one.faults
    ]
    rates = [None if one.per_prompt is None else win_rate(one.per_prompt, draws, confidence, seed) for one in known]
    return rates, warnings


def _common_prompts(models: Sequence[Evaluated]) -> tuple[list[Evaluated], list[str]]:
    """The models with the prompts of all, in the first one's order."""
    positions = [{row["id"]: index for index, row in enumerate(model.rows)} for model in models]
    common = [key for key in positions[0] if all(key in one for one in positions)]
    counts = ", ".join(f"{model.label} {len(model.rows)}" for model in models)
    if not common:
        raise DQOError(
            f"compare: no prompt is common to all models (prompts: {counts}); expected evaluations on the same data"
        )
    warnings = []
    if any(len(model.rows) != len(common) for model in models):
        warnings.append(f"compared on the {len(common)} prompts that all answered (prompts: {counts})")
    restricted = [
        replace(
            model,
            rows=[model.rows[places[key]] for key in common],
            per_prompt={name: [values[places[key]] for key in common] for name, values in model.per_prompt.items()},
            judge=model.judge
            if model.judge is None or model.judge.per_prompt is None
            else replace(model.judge, per_prompt=[model.judge.per_prompt[places[key]] for key in common]),
        )
        for model, places in zip(models, positions, strict=True)
    ]
    return restricted, warnings


def _not_comparable(models: Sequence[Evaluated]) -> tuple[dict[str, str], list[str]]:
    """Metrics that mean something else for one of the models, with the reason, and what a reader should know."""
    left_out: dict[str, str] = {}
    warnings = []
    counts = [model.n for model in models]
    if len(set(counts)) > 1:
        reason = f"responses a prompt differ ({', '.join(f'{m.label} {m.n}' for m in models)})"
        affected = [metric for metric in METRICS if metric not in _WHATEVER_N]
        left_out |= dict.fromkeys(affected, reason)
        warnings.append(f"{reason}: not compared on what depends on their number ({', '.join(affected)})")
    known = [model.conditions for model in models if model.conditions is not None]
    for what, reason, affected in (
        ("encoder", "sentence encoders differ", [metric for metric in METRICS if metric in _EMBEDDED]),
        ("reward", "rewards differ", [metric for metric in METRICS if metric in _REWARDED]),
    ):
        if any(getattr(one, what) != getattr(known[0], what) for one in known):
            left_out |= {metric: reason for metric in affected if metric not in left_out}
            warnings.append(f"{reason}: not compared on {', '.join(affected)}")
    digests = {model.data_digest for model in models if model.data_digest is not None}
    if len(digests) > 1 and "quality" not in left_out:
        warnings.append(
            f"the data sets differ ({', '.join(sorted(one[:8] for one in digests))}): where references or answers of "
            "the common prompts were changed, their qualities are not of one measure"
        )
    if any(one.sampling != known[0].sampling for one in known):
        warnings.append("responses were sampled with different settings (evaluation.sampling), which moves diversity")
    unknown = [model.label for model in models if model.conditions is None]
    if unknown:
        warnings.append(
            f"the recipe of {listed(unknown)} is not there: whether encoder, reward and sampling are the same was "
            "not checked"
        )
    return left_out, warnings


def _values(model: Evaluated, metric: str) -> NDArray[np.float64]:
    return column(model.per_prompt.get(metric, [None] * len(model.rows)), metric)


def _verdict(metric: str, difference: float, adjusted: float, level: float) -> Verdict:
    if math.isnan(adjusted):
        return "not measured"
    if adjusted > level:
        return "not told apart"
    direction = METRICS[metric].direction
    if direction == "neutral":
        return "differs"
    return "better" if (difference > 0) == (direction == "higher") else "worse"


def outcome(qualities: Sequence[float | None], others: Sequence[float | None]) -> float | None:
    """How often a response to a prompt has the higher quality, over all pairs of one of each model; a tie is one half.

    Args:
        qualities: Rewards of the model's responses; None where one could not be scored, which leaves its pairs out.
        others: Rewards of the other model's.

    Returns:
        A share in [0, 1], an estimate without bias of the chance for one response of each; None where no pair is left.
    """
    a, b = (column(values, "qualities") for values in (qualities, others))
    a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    if not a.size or not b.size:
        return None
    return float(((a[:, None] > b).mean() + (a[:, None] >= b).mean()) / 2)


def _win_rates(a: Evaluated, b: Evaluated, draws: int, confidence: float, seed: int) -> LengthControlled:
    outcomes = [outcome(x["qualities"], y["qualities"]) for x, y in zip(a.rows, b.rows, strict=True)]
    lengths, others = ([_mean_length(row) for row in model.rows] for model in (a, b))
    apart = np.subtract(lengths, others)[[one is not None for one in outcomes]]
    if apart.size > 1 and apart.any() and np.ptp(apart) == 0:  # length and model cannot be told apart
        return LengthControlled(
            win_rate(outcomes, draws, confidence, seed), Interval(math.nan, math.nan, math.nan), math.nan
        )
    return length_controlled_win_rate(outcomes, lengths, others, draws, confidence, seed)


def _mean_length(row: Mapping[str, Any]) -> float:
    """Characters of a response to this prompt, on average."""
    return sum(map(len, row["responses"])) / len(row["responses"])


def _other_side(rates: LengthControlled) -> LengthControlled:
    """The same pairs seen from the other model; the effect of length is the same for both."""

    def mirrored(rate: Interval) -> Interval:
        return Interval(1 - rate.mean, 1 - rate.high, 1 - rate.low)

    return LengthControlled(mirrored(rates.raw), mirrored(rates.controlled), rates.length_effect)


# --- in words ---


def headline(result: Compared, position: int) -> str:
    """What a model is against the first one, in one sentence: diversity by how many measures, and quality."""
    first, model = result.models[0].label, result.models[position].label
    measures = [
        metric for metric in DIVERSITY if metric in result.differences and _known(result.differences[metric][position])
    ]
    more = [metric for metric in result.on(position, "better") if metric in measures]
    less = [metric for metric in result.on(position, "worse") if metric in measures]
    total = len(measures)
    if not measures:
        diversity = f"{model} and {first} cannot be compared in diversity"
    elif more and less:
        diversity = (
            f"{model} is more diverse than {first} on {len(more)} of {total} measures and less diverse on {len(less)}"
        )
    elif more or less:
        how = f"{'more' if more else 'less'} diverse than {first}"
        found = len(more or less)
        diversity = f"{model} is {how} on {f'all {total}' if found == total else f'{found} of {total}'} measures"
    else:
        diversity = f"No difference in diversity between {model} and {first} is shown by any of {total} measures"
    difference = result.differences.get("quality", [None] * len(result.models))[position]
    if not _known(difference) or difference is None:
        return f"{diversity}; quality cannot be compared."
    # An interval is not adjusted and may exclude zero where the adjusted p says that nothing is shown.
    by = f"({difference_text(difference)}, adjusted p {p_text(difference.adjusted)})"
    if difference.verdict == "not told apart":
        return f"{diversity}; no difference in quality is shown {by}."
    return f"{diversity}; its quality is {'higher' if difference.verdict == 'better' else 'lower'} {by}."


def details(result: Compared, position: int) -> list[str]:
    """On which metrics a model is better and worse than the first one, and how often its responses win."""

    def changes(verdict: Verdict) -> str:
        found = [(METRICS[name].label, result.differences[name][position]) for name in result.on(position, verdict)]
        return listed([f"{label} {signed(one.interval.mean)}" for label, one in found if one is not None])

    sentences = [
        f"{words} {changes(verdict)}."
        for verdict, words in _WORDS.items()
        if result.on(position, verdict)
    ]  # fmt: skip
    same = [METRICS[name].label for name in result.on(position, "not told apart")]
    if same:
        sentences.append(f"No difference is shown on {listed(same)}.")
    rates = result.win_rates[position][0]
    if rates is not None and math.isfinite(rates.raw.mean):
        equal = f" ({rate_text(rates.controlled)} at equal lengths)" if math.isfinite(rates.controlled.mean) else ""
        sentences.append(
            f"Its response has the higher quality than one of {result.models[0].label} to the same prompt in "
            f"{rate_text(rates.raw)} of pairs{equal}, a tie counting one half."
        )
    return sentences


def difference_text(difference: Difference) -> str:
    """A difference with its interval."""
    interval = difference.interval
    bounds = f" [{number(interval.low)}, {number(interval.high)}]" if math.isfinite(interval.low) else ""
    return f"{signed(interval.mean)}{bounds}"


def p_text(p_value: float) -> str:
    """A p-value as tables write it."""
    if math.isnan(p_value):
        return "n/a"
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def rate_text(rate: Interval) -> str:
    """A win rate with its interval, in percent."""
    if not math.isfinite(rate.mean):
        return "n/a"
    bounds = f" [{100 * rate.low:.0f}%, {100 * rate.high:.0f}%]" if math.isfinite(rate.low) else ""
    return f"{100 * rate.mean:.0f}%{bounds}"


def _known(difference: Difference | None) -> bool:
    return difference is not None and difference.verdict != "not measured"


# --- prompts by disagreement ---


def disagreement(result: Compared) -> list[dict[str, float]]:
    """How far the models are apart on each prompt: largest minus smallest value, for quality and log-volume.

    Returns:
        One entry a prompt; 0 where a metric is not compared or fewer than two models have it.
    """

    def spread(metric: str) -> list[float]:
        if metric not in result.means:
            return [0.0] * result.prompts
        table = np.stack([_values(model, metric) for model in result.models])
        known = (~np.isnan(table)).sum(axis=0) > 1
        return [
            float(np.nanmax(table[:, prompt]) - np.nanmin(table[:, prompt])) if known[prompt] else 0.0
            for prompt in range(result.prompts)
        ]

    return [
        {"quality": quality, "log_volume": volume}
        for quality, volume in zip(spread("quality"), spread("log_volume"), strict=True)
    ]


def by_disagreement(result: Compared) -> list[int]:
    """Positions of the prompts, those first on whose quality the models disagree most; then by log-volume."""
    apart = disagreement(result)
    return sorted(range(result.prompts), key=lambda i: (-apart[i]["quality"], -apart[i]["log_volume"]))


# --- as data ---


def to_document(result: Compared) -> dict[str, Any]:
    """Everything as JSON can hold it: nan becomes null."""
    apart = disagreement(result)
    return {
        "models": [
            {
                "label": model.label,
                "given": model.source,
                "model": model.model,
                "mlflow_run": model.run_id,
                "n": model.n,
                "data_digest": model.data_digest,
                "recipe_digest": model.recipe_digest,
            }
            for model in result.models
        ],
        "prompts": result.prompts,
        "confidence": result.confidence,
        "directions": {metric: METRICS[metric].direction for metric in result.means},
        "means": {metric: [_plain(asdict(one)) for one in found] for metric, found in result.means.items()},
        "differences": {
            metric: [None if one is None else _plain(asdict(one)) for one in found]
            for metric, found in result.differences.items()
        },
        "win_rates": [[None if one is None else _plain(asdict(one)) for one in row] for row in result.win_rates],
        "judge": None
        if result.judged is None or result.models[0].judge is None
        else {
            "identity": dict(result.models[0].judge.identity),
            "against": result.models[0].judge.against,
            "win_rates": [None if one is None else _plain(asdict(one)) for one in result.judged],
        },
        "left_out": dict(result.left_out),
        "warnings": list(result.warnings),
        "findings": [
            [headline(result, position), *details(result, position)] for position in range(1, len(result.models))
        ],
        "disagreement": [
            {"id": row["id"], **one} for row, one in zip(result.models[0].rows, apart, strict=True)
        ],
    }  # fmt: skip


def to_metrics(result: Compared) -> dict[str, float]:
    """What a comparison's MLflow run logs: stable names, a model by its position in the command, from 1."""
    found: dict[str, float] = {}

    def add(name: str, interval: Interval) -> None:
        found.update({name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high})

    for position in range(len(result.models)):
        prefix = f"compare/{position + 1}"
        for metric, means in result.means.items():
            add(f"{prefix}/{metric}", means[position])
            difference = result.differences[metric][position]
            if difference is not None:
                add(f"{prefix}/{metric}_difference", difference.interval)
                found[f"{prefix}/{metric}_p"] = difference.adjusted
        rates = result.win_rates[position][0]
        if rates is not None:
            add(f"{prefix}/win_rate", rates.raw)
            add(f"{prefix}/win_rate_length_controlled", rates.controlled)
        judged = None if result.judged is None else result.judged[position]
        if judged is not None:
            add(f"{prefix}/judge_win_rate", judged)
    found["compare/prompts"] = result.prompts
    return {name: value for name, value in found.items() if math.isfinite(value)}


def to_tables(result: Compared) -> dict[str, dict[str, list[Any]]]:
    """The tables of a comparison's MLflow run: file name -> column -> values."""
    metrics: list[dict[str, Any]] = []
    for metric, means in result.means.items():
        for model, mean, difference in zip(result.models, means, result.differences[metric], strict=True):
            interval = difference.interval if difference else Interval(math.nan, math.nan, math.nan)
            metrics.append(
                {
                    "metric": metric,
                    "model": model.label,
                    "mean": mean.mean,
                    "low": mean.low,
                    "high": mean.high,
                    "difference": interval.mean,
                    "difference_low": interval.low,
                    "difference_high": interval.high,
                    "p_adjusted": difference.adjusted if difference else math.nan,
                    "verdict": difference.verdict if difference else "compared with",
                }
            )
    rates = [
        {
            "model": one.label,
            "against": other.label,
            "win_rate": found.raw.mean,
            "low": found.raw.low,
            "high": found.raw.high,
            "length_controlled": found.controlled.mean,
            "length_controlled_low": found.controlled.low,
            "length_controlled_high": found.controlled.high,
        }
        for one, row in zip(result.models, result.win_rates, strict=True)
        for other, found in zip(result.models, row, strict=True)
        if found is not None
    ]
    apart, examples = disagreement(result), []
    for position in by_disagreement(result):
        row = {"prompt": result.models[0].rows[position]["prompt"], **apart[position]}
        examples.append(row | {model.label: "\n".join(model.rows[position]["responses"]) for model in result.models})
    tables = {"comparison_metrics.json": metrics, "win_rates.json": rates, "responses_by_disagreement.json": examples}
    return {name: {key: [row[key] for row in rows] for key in rows[0]} for name, rows in tables.items() if rows}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
