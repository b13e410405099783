"""The gate: whether an evaluation lets a model become champion, each rule with its outcome in words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dqo.errors import DQOError
from dqo.evaluation.metrics import METRICS
from dqo.evaluation.statistics import Interval, overlap
from dqo.recipe import Gate


@dataclass(frozen=True)
class GateResult:
    """Whether a model may become champion, with the reason of each rule in words.

    Attributes:
        passed: All rules hold.
        reasons: One sentence a rule, whether it holds or not.
    """

    passed: bool
    reasons: list[str]


def decide(gate: Gate, document: Mapping[str, Any], candidate: str = "dqo") -> GateResult:
    """Apply a recipe's gate to an evaluation; nothing but the two is looked at.

    Args:
        gate: The rules.
        document: Content of `evaluation.json`: `models`, each with the interval of every metric, and `stopped`, why the
            training of a model was ended before its last step, which no metric makes up for.
        candidate: The model that asks to be promoted.

    Raises:
        DQOError: If the evaluation does not hold a model or a metric that the rules compare.
    """
    new_quality = _interval(document, candidate, "quality")
    old_quality = _interval(document, gate.against, "quality")
    change = new_quality.mean - old_quality.mean
    passed = change >= -gate.max_quality_loss
    reasons = [
        f"quality {new_quality.mean:.3f} against {old_quality.mean:.3f} of {gate.against} ({change:+.3f}) is "
        f"{'within' if passed else 'below'} the allowed loss of {gate.max_quality_loss:g}"
    ]
    for name in gate.more_diverse_on:
        new, old = _interval(document, candidate, name), _interval(document, gate.against, name)
        above = new.mean > old.mean and not overlap(new, old)
        reasons.append(
            f"{METRICS[name].label} {_show(new)} against {_show(old)} of {gate.against}: "
            + ("higher, intervals apart" if above else "not higher with intervals apart")
        )
        passed = passed and above
    stopped = document.get("stopped", {}).get(candidate)
    if stopped is not None:
        return GateResult(False, [f"training was stopped by a health rule: {stopped}", *reasons])
    return GateResult(passed, reasons)


def _interval(document: Mapping[str, Any], model: str, metric: str) -> Interval:
    """A model's metric in `evaluation.json`; what could not be measured stands there as null, and is nan here."""
    models = document.get("models", {})
    if model not in models:
        raise DQOError(
            f"gate: the evaluation holds no model {model!r}; expected one of {', '.join(models) or '(it holds none)'}"
        )
    metrics = models[model]["metrics"]
    if metric not in metrics:
        raise DQOError(f"gate: the evaluation of {model!r} holds no metric {metric!r}; evaluate it again")
    values = {name: math.nan if value is None else float(value) for name, value in metrics[metric].items()}
    return Interval(**values)


def _show(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
