"""The gate: whether an evaluation lets a model become champion, each rule with its outcome in words.

All rules have to hold at once, so their number needs no adjustment: a false pass takes an error on each. Where any
one of several metrics may carry the decision (`gate.diversity_needed: any`), the p-values are adjusted by Holm's
method.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqo.errors import DQOError
from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    holm,
    none_in,
    overlap,
    paired_difference,
    paired_p_value,
)
from dqo.judges import audit as judge_audit
from dqo.recipe import Gate, GateJudge, Judge, JudgeAudit

Outcome = tuple[bool, str]
"""Whether a rule holds, and the sentence that says so."""

_EVALUATE_AGAIN = "evaluate it again"


@dataclass(frozen=True)
class AskedJudge:
    """The judge that the recipe in force asks for; as it stands, any that has passed its audit.

    Attributes:
        demands: What its audit has to show, held against the measures of the one in the evaluation; `None` takes its
            outcome as it stands there, under the demands that the evaluation was made with.
        labelled: Digest of the labelled pairs that the audit has to be made on; `None` takes any.
        identity: What the recipe says of it (`dqo.judges.identity_by_recipe`); empty takes any judge.
    """

    demands: JudgeAudit | None = None
    labelled: str | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_the_evaluation(cls, judge: Judge | None) -> "AskedJudge":
        """That of the recipe which the evaluation was made with: who it is and its pairs are what they are there."""
        return cls(None if judge is None else judge.audit)


@dataclass(frozen=True)
class GateResult:
    """Whether a model may become champion, with the reason of each rule in words.

    Attributes:
        passed: All rules hold.
        reasons: One sentence a rule, whether it holds or not.
    """

    passed: bool
    reasons: list[str]


def describe(gate: Gate) -> list[str]:
    """The rules in words, one each, as what the new model may or must do; the other model's name is left out."""
    names = ", ".join(METRICS[name].label for name in dict.fromkeys(gate.more_diverse_on))
    shown = gate.quality_test == "non_inferior"
    rules = [
        f"lose at most {gate.max_quality_loss:g} in quality"
        + (", with the whole interval of the paired difference" if shown else ""),
        "be more diverse, "
        + {
            "apart": "without overlap of the intervals",
            "paired": "significantly prompt by prompt",
            "holm": "significantly prompt by prompt with Holm's adjustment",
        }[gate.diversity_test]
        + f", on {'any of' if gate.diversity_needed == 'any' else 'all of'}: {names}",
    ]
    if gate.max_length_change is not None:
        rules.append(f"change its length by at most {gate.max_length_change:.0%}")
    if gate.max_truncation_increase is not None:
        rules.append(f"have at most {gate.max_truncation_increase:g} more of its responses truncated")
    if gate.max_duplicate_increase is not None:
        rules.append(f"have at most {gate.max_duplicate_increase:g} more of its responses repeated")
    if gate.judge is not None:
        kind = " at equal lengths" if gate.judge.length_controlled else ""
        bound = "the lower bound of " if gate.judge.decided_by == "low" else ""
        rules.append(
            f"reach {gate.judge.min_win_rate:g} by {bound}its win rate{kind}, by a judge that has passed its audit and "
            f"has said nothing readable on at most {gate.judge.max_invalid_rate:.0%} of the pairs"
            + (
                ""
                if gate.judge.max_flip_rate is None
                else f", with both orders alike on {1 - gate.judge.max_flip_rate:.0%}"
            )
        )
    return rules


def decide(
    gate: Gate,
    document: Mapping[str, Any],
    candidate: str = "dqo",
    asked: AskedJudge | None = None,
) -> GateResult:
    """Apply a recipe's gate to an evaluation; nothing but the two is looked at.

    Args:
        gate: The rules.
        document: Content of `evaluation.json`: `models`, each with the interval of every metric and, for rules that
            compare prompt by prompt, its `per_prompt` values; `judge`, where one was asked; and `stopped`, why the
            training of a model was ended before its last step, which no metric makes up for.
        candidate: The model that asks to be promoted.
        asked: The judge that the recipe in force asks for; `None` takes the evaluation's, by the outcome of its audit.

    Returns:
        The decision. The model that the others are compared with never passes. A judge that is not done with an
        evaluation refuses it, whether the gate has rules for it or not.

    Raises:
        DQOError: If the evaluation does not hold a model, a metric or the verdicts that the rules compare.
    """
    if candidate == gate.against:
        _model(document, candidate)
        reason = f"{candidate} is the model that the gate compares with; a new champion has to be better than it"
        return GateResult(False, [reason, *(reason for _, reason in _diversity(gate, document, candidate))])
    outcomes = [
        _quality(gate, document, candidate),
        *_diversity(gate, document, candidate),
        *_regressions(gate, document, candidate),
        *_judge(gate, document, candidate, asked or AskedJudge()),
    ]
    stopped = document.get("stopped", {}).get(candidate)
    if stopped is not None:
        outcomes.insert(0, (False, f"training was stopped by a health rule: {stopped}"))
    return GateResult(all(held for held, _ in outcomes), [reason for _, reason in outcomes])


def _quality(gate: Gate, document: Mapping[str, Any], candidate: str) -> Outcome:
    new, old = _interval(document, candidate, "quality"), _interval(document, gate.against, "quality")
    if gate.quality_test == "non_inferior":
        difference = _paired(document, candidate, gate.against, "quality")
        held = difference.low > -gate.max_quality_loss
        return held, (
            f"quality {new.mean:.3f} against {old.mean:.3f} of {gate.against}, paired difference "
            f"{_signed(difference)}: {'not inferior' if held else 'non-inferiority not shown'} at the allowed loss of "
            f"{gate.max_quality_loss:g}"
        )
    change = new.mean - old.mean
    held = change >= -gate.max_quality_loss
    return held, (
        f"quality {new.mean:.3f} against {old.mean:.3f} of {gate.against} ({change:+.3f}) is "
        f"{'within' if held else 'below'} the allowed loss of {gate.max_quality_loss:g}"
    )


def _diversity(gate: Gate, document: Mapping[str, Any], candidate: str) -> list[Outcome]:
    names: list[str] = list(dict.fromkeys(gate.more_diverse_on))
    if gate.diversity_test == "apart":
        outcomes = []
        for name in names:
            new, old = _interval(document, candidate, name), _interval(document, gate.against, name)
            above = new.mean > old.mean and not overlap(new, old)
            outcomes.append(
                (
                    above,
                    f"{METRICS[name].label} {_show(new)} against {_show(old)} of {gate.against}: "
                    + ("higher, intervals apart" if above else "not higher with intervals apart"),
                )
            )
        return outcomes
    level = 1 - float(document.get("confidence", 0.95))
    seed = int(document.get("seed", 0))
    differences = {name: _paired(document, candidate, gate.against, name) for name in names}
    raw = {
        name: paired_p_value(
            _per_prompt(document, candidate, name), _per_prompt(document, gate.against, name), seed=seed
        )
        for name in names
    }
    known = {name: value for name, value in raw.items() if not math.isnan(value)}
    # What could not be compared is one of the metrics that were looked at: it counts as one that shows nothing.
    adjusted = holm(raw | {name: 1.0 for name in names if name not in known}) if gate.diversity_test == "holm" else raw
    outcomes = []
    for name in names:
        if name not in known:
            outcomes.append((False, f"{METRICS[name].label} against {gate.against}: not measured on any common prompt"))
            continue
        higher = differences[name].mean > 0 and adjusted[name] <= level + 1e-12
        among = f", {adjusted[name]:.2g} among {len(names)} metrics (Holm)" if gate.diversity_test == "holm" else ""
        outcomes.append(
            (
                higher,
                f"{METRICS[name].label} against {gate.against}, paired difference {_signed(differences[name])}, "
                f"p = {raw[name]:.2g}{among}: {'higher' if higher else 'not shown to be higher'} at the level "
                f"{level:.2g}",
            )
        )
    if gate.diversity_needed == "all":
        return outcomes
    count = sum(held for held, _ in outcomes)
    summary = f"more diverse on {count} of {len(names)} metrics, of which one is asked for"
    return [(count > 0, "; ".join([summary, *(reason for _, reason in outcomes)]))]


def _regressions(gate: Gate, document: Mapping[str, Any], candidate: str) -> list[Outcome]:
    """Length, truncation and repeats: the whole paired interval has to lie on the allowed side."""
    outcomes = []
    limit = gate.max_length_change
    if limit is not None:
        new, old = (_per_prompt(document, model, "mean_tokens") for model in (candidate, gate.against))
        # mean(new) / mean(old) <= 1 + limit is mean(new - (1 + limit) old) <= 0: a mean over prompts, which pairs.
        longer, shorter = (_bootstrap(document, new - bound * old) for bound in (1 + limit, 1 - limit))
        held = longer.high <= 0 and shorter.low >= 0
        means = [_interval(document, model, "mean_tokens").mean for model in (candidate, gate.against)]
        change = f" ({means[0] / means[1] - 1:+.0%})" if means[1] > 0 else ""
        outcomes.append(
            (
                held,
                f"length {means[0]:.1f} tokens against {means[1]:.1f} of {gate.against}{change}: "
                f"{'shown' if held else 'not shown'} to change by at most {limit:.0%}",
            )
        )
    for name, bound in (
        ("truncation_rate", gate.max_truncation_increase),
        ("duplicate_rate", gate.max_duplicate_increase),
    ):
        if bound is None:
            continue
        outcomes.append(_rate(gate, document, candidate, name, bound))
    return outcomes


def _rate(gate: Gate, document: Mapping[str, Any], candidate: str, name: str, bound: float) -> Outcome:
    """Whether a rate has risen by at most so much."""
    new, old = (_per_prompt(document, model, name) for model in (candidate, gate.against))
    difference = _paired(document, candidate, gate.against, name)
    most, without = difference.high, ""
    known = new - old
    known = known[~np.isnan(known)]
    # No bootstrap can see beyond prompts that are all alike: a short evaluation without an event would show anything.
    if known.size and not known.any():
        responses = known.size * int(document["n"])
        most = none_in(responses, float(document.get("confidence", 0.95)))
        without = (
            f", alike on all {known.size} prompts (with {responses} responses a rise of up to {most:.2g} may hide)"
        )
    held = most <= bound
    return (
        held,
        f"{METRICS[name].label} against {gate.against}, paired difference {_signed(difference)}{without}: "
        f"{'shown' if held else 'not shown'} to rise by at most {bound:g}",
    )


def _judge(gate: Gate, document: Mapping[str, Any], candidate: str, asked: AskedJudge) -> list[Outcome]:
    found, rules = document.get("judge"), gate.judge
    if found is None:
        if rules is not None:
            raise DQOError(
                "gate.judge: the evaluation asked no judge; expected one of a recipe with a section `judge`: "
                f"{_EVALUATE_AGAIN}"
            )
        return []
    if not found["complete"]:
        return [
            (
                False,
                f"the judge is not done: {found['reason']}; repeat the run, which asks only for what is missing",
            )
        ]
    if rules is None:
        return []
    if found["against"] != gate.against or candidate not in found["models"]:
        raise DQOError(
            f"gate.judge: the evaluation holds no verdicts on {candidate!r} against {gate.against!r}; it holds those "
            f"on {', '.join(found['models']) or '(none)'} against {found['against']!r}; {_EVALUATE_AGAIN}"
        )
    others = {name: value for name, value in asked.identity.items() if found["identity"].get(name) != value}
    if others:
        differences = ", ".join(f"{name} {found['identity'].get(name)!r} and not {others[name]!r}" for name in others)
        return [
            (
                False,
                f"the judge is another one than that of the recipe in force ({differences}), so its verdicts do not "
                f"count; {_EVALUATE_AGAIN} with that recipe",
            )
        ]
    pairs = found["audit"]["labelled"]
    if asked.labelled is not None and pairs["digest"] != asked.labelled:
        return [
            (
                False,
                f"the judge was audited on other labelled pairs ({pairs['name']}, {pairs['digest']}) than those of the "
                f"recipe in force ({asked.labelled}), so its verdicts do not count; {_EVALUATE_AGAIN} with that recipe",
            )
        ]
    passed, faults = _audited(found["audit"], asked.demands)
    if not passed:
        failed = (
            "has passed its audit under other demands and does not meet those of the recipe in force"
            if found["audit"]["passed"]
            else "has not passed its audit"
        )
        return [(False, f"the judge {failed}, so its verdicts do not count: {'; '.join(faults)}")]
    return [*_verdicts(rules, found["models"][candidate], gate.against)]


def _audited(found: Mapping[str, Any], demands: JudgeAudit | None) -> tuple[bool, list[str]]:
    """Whether a judge has passed its audit, and what speaks against it."""
    if demands is None:
        return bool(found["passed"]), list(found["faults"])
    measures = judge_audit.Measures(**found["measures"])
    passed, reasons = judge_audit.decide(measures, demands, found["labelled"]["pairs"])
    return passed, judge_audit.faults_of(reasons)


def _verdicts(rules: GateJudge, verdicts: Mapping[str, Any], against: str) -> list[Outcome]:
    name = "win rate at equal lengths" if rules.length_controlled else "win rate"
    content = verdicts["length_controlled" if rules.length_controlled else "win_rate"]
    if content is None:
        reason = verdicts["not_length_controlled"]
        first = (False, f"the judge's {name} against {against} cannot be told: {reason}")
    else:
        rate = _from_json(content)
        value = rate.low if rules.decided_by == "low" else rate.mean
        held = value >= rules.min_win_rate
        what = "its lower bound" if rules.decided_by == "low" else "the rate"
        first = (
            held,
            f"the judge's {name} {_show(rate)} against {against}: {what} {'reaches' if held else 'does not reach'} "
            f"{rules.min_win_rate:g}",
        )
    flips = verdicts.get("flip_rate")
    steady: list[Outcome] = []
    if rules.max_flip_rate is not None and flips is not None:  # None: a judge that sees one response at a time
        few = flips <= rules.max_flip_rate + 1e-12
        steady.append(
            (
                few,
                f"the judge's two orders disagree on {flips:.1%} of the pairs, "
                f"{'at most' if few else 'more than'} the allowed {rules.max_flip_rate:.1%}",
            )
        )
    share = verdicts["invalid"] / verdicts["pairs"]
    few = share <= rules.max_invalid_rate + 1e-12
    return [
        first,
        *steady,
        (
            few,
            f"the judge said nothing readable on {verdicts['invalid']} of {verdicts['pairs']} pairs ({share:.1%}), "
            f"{'at most' if few else 'more than'} the allowed {rules.max_invalid_rate:.1%}",
        ),
    ]


def _paired(document: Mapping[str, Any], candidate: str, against: str, metric: str) -> Interval:
    return paired_difference(
        _per_prompt(document, candidate, metric), _per_prompt(document, against, metric), *_bootstrap_settings(document)
    )


def _bootstrap(document: Mapping[str, Any], values: NDArray[np.float64]) -> Interval:
    return bootstrap_interval(values, *_bootstrap_settings(document))


def _bootstrap_settings(document: Mapping[str, Any]) -> tuple[int, float, int]:
    """Draws, confidence and seed of the evaluation, so that the gate finds the report's own intervals."""
    return (
        int(document.get("bootstrap_draws", 2000)),
        float(document.get("confidence", 0.95)),
        int(document.get("seed", 0)),
    )


def _model(document: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    models = document.get("models", {})
    if model not in models:
        raise DQOError(
            f"gate: the evaluation holds no model {model!r}; expected one of {', '.join(models) or '(it holds none)'}"
        )
    found: Mapping[str, Any] = models[model]
    return found


def _interval(document: Mapping[str, Any], model: str, metric: str) -> Interval:
    """A model's metric in `evaluation.json`; what could not be measured stands there as null, and is nan here."""
    metrics = _model(document, model)["metrics"]
    if metric not in metrics:
        raise DQOError(f"gate: the evaluation of {model!r} holds no metric {metric!r}; {_EVALUATE_AGAIN}")
    return _from_json(metrics[metric])


def _per_prompt(document: Mapping[str, Any], model: str, metric: str) -> NDArray[np.float64]:
    """One value a prompt, nan where it was not measured."""
    values = _model(document, model).get("per_prompt", {}).get(metric)
    if values is None:
        raise DQOError(f"gate: the evaluation of {model!r} holds no {metric!r} of each prompt; {_EVALUATE_AGAIN}")
    return np.asarray(values, dtype=np.float64)


def _from_json(values: Mapping[str, float | None]) -> Interval:
    return Interval(**{name: math.nan if value is None else float(value) for name, value in values.items()})


def _show(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
