"""The report of a run: one HTML file that needs nothing else, with the finding first and the evidence behind it.

Responses are untrusted text: the template escapes everything, and the page forbids itself every request and every
script but its own (a content security policy with that script's hash).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

from dqo.evaluation import charts, page
from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.figures import (
    History,
    ModelResult,
    curve,
    measured,
    styles,
    unrelated_responses,
    volume_bounds,
    volume_of,
)
from dqo.evaluation.page import (
    MINUS,
    Example,
    Response,
    cells,
    known_mean,
    listed,
    signed,
)
from dqo.evaluation.statistics import Interval, overlap
from dqo.files import write_text
from dqo.gate import describe
from dqo.health import Finding as HealthFinding
from dqo.labels import bonus_earners, objective
from dqo.recipe import Recipe

_SHOWN_FIRST = ("log_volume", "quality", "self_bleu_diversity", "best_of_n")
# These look at words alone: nothing of them is in the objective, not even the sentence encoder.
_WORD_DIVERSITY = ("distinct_1", "distinct_2", "distinct_4", "self_bleu_diversity", "self_rouge_diversity")
# What the trainers log beside the metrics of METRICS.
_TRAINING_LABELS = {
    "loss": "Loss",
    "demonstration_nll": "Demonstration NLL (nats)",
    "bonus": "Leave-one-out bonus (nats)",
    "entropy": "Entropy (nats a token)",
    "kl": "KL to the SFT policy",
    "frac_reward_zero_std": "Groups with equal rewards",
    "reward_std": "Reward, standard deviation",
    "unscorable_rate": "Unscorable",
    "clip_ratio": "Clipped",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "step_seconds": "Seconds a step",
}


@dataclass(frozen=True)
class Gate:
    """Whether the model may become champion, and why."""

    passed: bool
    reasons: Sequence[str]


@dataclass(frozen=True)
class Said:
    """What the judge said of `dqo` against its rival on one prompt, about the first response of each."""

    prompt: str
    verdict: str
    """`A` is a response of `dqo`, `B` one of its rival; `tie`, `invalid` or `missing`."""
    orders: Sequence[str]
    """The verdict with A shown first, then with B shown first."""
    reasons: Sequence[str]
    """The judge's words for each order."""


@dataclass(frozen=True)
class Links:
    """Where the run is in MLflow."""

    command: str | None = None
    """The command that opens MLflow, where it is not a server that runs anyway."""
    experiment: str | None = None
    """Address of the experiment."""
    run: str | None = None
    """Address of the pipeline's run."""


@dataclass(frozen=True)
class ReportData:
    """Everything the report shows.

    Raises:
        ValueError: If `models` lacks one of the two that the finding compares, `dqo` and `recipe.gate.against`.
    """

    recipe: Recipe
    models: Sequence[ModelResult]
    """In display order."""
    prompts: int
    """Evaluation prompts that were used."""
    histories: Mapping[str, History]
    """Stage or variant (`sft`, `reward_only`, `dqo`) -> its training history."""
    examples: Sequence[Example]
    """In the order shown. Picked by `first_examples`: the page says that nobody chose them."""
    data_card: Mapping[str, Any]
    """Contents of `card.json`."""
    links: Links = Links()
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Versions, machine, duration, seeds: name -> value, shown as they are."""
    differences: Mapping[str, Interval] = field(default_factory=dict)
    """Metric -> `paired_difference` of `dqo` minus `recipe.gate.against`."""
    gate: Gate | None = None
    """`None` while nobody asked for promotion."""
    health: Mapping[str, Sequence[HealthFinding]] = field(default_factory=dict)
    """Variant -> what health rules found in its training."""
    judge: Mapping[str, Any] | None = None
    """Part `judge` of `evaluation.json`; `None` where no judge was asked."""
    said: Sequence[Said] = ()
    """The judge's words on the prompts of `examples`."""

    def __post_init__(self) -> None:
        missing = {"dqo", self.recipe.gate.against} - {model.name for model in self.models}
        if missing:
            raise ValueError(
                f"models must hold {sorted(missing)}, which the finding compares, got "
                f"{[model.name for model in self.models]}"
            )

    @cached_property
    def by_name(self) -> dict[str, ModelResult]:
        """The models by name."""
        return {model.name: model for model in self.models}

    @cached_property
    def stopped(self) -> dict[str, HealthFinding]:
        """Variants whose training a health rule has ended before its last step, with the finding that did."""
        return {
            name: finding
            for name, found in self.health.items()
            for finding in reversed(found)  # so that the first one stays
            if finding.action == "stop"
        }

    @property
    def model(self) -> ModelResult:
        """The model that the run is about."""
        return self.by_name["dqo"]

    @property
    def rival(self) -> ModelResult:
        """The model it is compared with."""
        return self.by_name[self.recipe.gate.against]


@dataclass(frozen=True)
class Finding:
    """What the numbers say, in one sentence."""

    verdict: Literal["holds", "holds at a price", "quality loss", "not shown", "opposite", "not measured"]
    sentence: str


def first_examples(
    rows: Iterable[Mapping[str, Any]], concepts: Mapping[str, Sequence[str]], count: int = 6
) -> list[Example]:
    """Take the first prompts in the order of their id, a hash of the prompt: nobody picks what looks good.

    Args:
        rows: Rows of `responses.jsonl`, of all models.
        concepts: Prompt id -> its concepts; prompts without any may be left out.
        count: Prompts to take.
    """
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["id"], []).append(row)
    return [
        Example(
            prompt=grouped[key][0]["prompt"],
            concepts=concepts.get(key, ()),
            responses={
                row["model"]: [
                    Response(*drawn) for drawn in zip(row["responses"], row["qualities"], row["truncated"], strict=True)
                ]
                for row in grouped[key]
            },
        )
        for key in sorted(grouped)[:count]
    ]


def find(data: ReportData) -> Finding:
    """Say in one sentence whether the model is more diverse than its rival at an equal quality.

    Diversity is the log-volume, and counts as different when the two intervals have no point in common. Quality may be
    lower by at most the recipe's `gate.max_quality_loss`; a loss within it is called a price when the paired difference
    lies below zero with its whole interval.
    """
    ours, theirs = data.model, data.rival
    missing = [
        f"the {METRICS[metric].label.lower()} of {model.label}"
        for model in (ours, theirs)
        for metric in ("log_volume", "quality")
        if not measured([model], metric)
    ]
    if missing:
        return Finding("not measured", f"This run allows no finding: {listed(missing)} could not be measured.")

    volume, other_volume = ours.metrics["log_volume"], theirs.metrics["log_volume"]
    gain = volume.mean - other_volume.mean
    change = ours.metrics["quality"].mean - theirs.metrics["quality"].mean
    allowed = data.recipe.gate.max_quality_loss
    spans = f"{ours.label} spans {abs(gain):.2f} nats {'more' if gain >= 0 else 'less'} volume than {theirs.label}"
    lost, limit = _told_apart(-change, allowed)
    costly = change < -allowed
    if overlap(volume, other_volume):
        bounds = (volume.low, volume.high, other_volume.low, other_volume.high)
        reason = "the intervals overlap" if all(map(math.isfinite, bounds)) else "an interval is missing"
        cost = f", a loss of more than the {limit} that the recipe allows" if costly else ""
        return Finding(
            "not shown",
            f"No difference in diversity is shown: {spans}, but {reason}; "
            f"the quality difference is {MINUS + lost if costly else signed(change)}{cost}.",
        )
    if gain < 0:
        return Finding("opposite", f"{spans} (intervals do not overlap), at a quality difference of {signed(change)}.")
    if costly:
        return Finding(
            "quality loss",
            f"{spans} (intervals do not overlap), but loses {lost} in quality, more than the {limit} that the recipe "
            "allows.",
        )
    paired = data.differences.get("quality")
    if paired is not None and paired.high < 0:
        return Finding(
            "holds at a price",
            f"{spans} (intervals do not overlap) at the price of {lost} in quality, within the {limit} that the recipe "
            "allows.",
        )
    return Finding("holds", f"{spans} (intervals do not overlap) at a quality difference of {signed(change)}.")


def agreement(data: ReportData) -> tuple[int, int]:
    """How many measures of diversity that look at words alone confirm the finding.

    Returns:
        Measures whose intervals lie apart in favour of `dqo`, and measures that both models have.
    """
    both = [metric for metric in _WORD_DIVERSITY if len(measured([data.model, data.rival], metric)) == 2]
    return sum(data.model.metrics[metric].low > data.rival.metrics[metric].high for metric in both), len(both)


def _told_apart(a: float, b: float) -> tuple[str, str]:
    """Write two numbers with as many decimals, two or more, as it takes to see that they differ."""
    for decimals in range(2, 6):
        texts = f"{a:.{decimals}f}", f"{b:.{decimals}f}"
        if texts[0] != texts[1]:
            break
    return texts


def _flat(card: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as rows; the innermost ones share a row: `rows` -> `train 302, eval 58`."""
    rows = []
    for key, value in card.items():
        name = f"{prefix}{key}".replace("_", " ")
        if not isinstance(value, Mapping):
            rows.append((name, _inline(value)))
        elif any(isinstance(inner, Mapping) for inner in value.values()):
            rows += _flat(value, f"{name}, ")
        else:
            parts = [f"{inner} {_inline(item)}".replace("_", " ") for inner, item in value.items()]
            rows.append((name, ", ".join(parts) or "none"))
    return rows


def _inline(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return "none" if value is None else str(value)


def _curve_sets(data: ReportData, looks: Mapping[str, charts.Look], labels: Mapping[str, str]) -> dict[str, Any]:
    """The two large charts of the RL variants, and the small ones of everything else that was logged."""
    trained = {name: data.histories[name] for name in data.recipe.variants if name in data.histories}

    def draw(histories: Mapping[str, History], metric: str, title: str, size: tuple[int, int], kind: str) -> Markup:
        return charts.curves(histories, looks, labels, metric, title, size, kind, data.recipe.method.k)

    def logged(histories: Mapping[str, History], metric: str) -> bool:
        return any(len(curve(history, metric)[0]) for history in histories.values())

    def title(metric: str) -> str:
        return METRICS[metric].label if metric in METRICS else _TRAINING_LABELS[metric]

    large = [
        (draw(trained, metric, heading, (540, 320), "wide"), draw(trained, metric, heading, (360, 260), "narrow"))
        for metric, heading in (("quality", "Quality (reward)"), ("log_volume", "Log-volume (nats)"))
        if logged(trained, metric)
    ]
    everything = [*METRICS, *_TRAINING_LABELS]
    sft = {"sft": data.histories["sft"]} if "sft" in data.histories else {}
    small = [
        draw(histories, metric, title(metric) + suffix, (300, 200), "small")
        for histories, suffix, already in ((sft, " (SFT)", ()), (trained, "", ("quality", "log_volume")))
        for metric in everything
        if metric not in already and logged(histories, metric)
    ]
    return {"large": large, "small": small, "variants": list(trained)}


@dataclass(frozen=True)
class _JudgeRow:
    """A model against the rival, or the rival itself (without verdicts)."""

    name: str
    verdicts: Mapping[str, Any] | None
    win_rate: Interval | None
    equal_lengths: Interval | None
    score: Interval | None


def _judge_rows(data: ReportData) -> list[_JudgeRow]:
    """What the judge said, a row a model in display order."""
    if data.judge is None:
        return []

    def interval(content: Mapping[str, float | None] | None) -> Interval | None:
        if content is None:
            return None
        return known_mean(Interval(**{name: math.nan if v is None else v for name, v in content.items()}))

    rows = []
    for model in data.models:
        verdicts, scores = data.judge["models"].get(model.name), data.judge["scores"].get(model.name)
        if verdicts is not None or scores is not None:
            rates = verdicts or {"win_rate": None, "length_controlled": None}
            rows.append(
                _JudgeRow(
                    model.name,
                    verdicts,
                    interval(rates["win_rate"]),
                    interval(rates["length_controlled"]),
                    None if scores is None else interval(scores["score"]),
                )
            )
    return rows


def _recipe_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """The recipe in a few lines; the whole of it stands below them."""

    def source(model: str, revision: str | None) -> str:
        return f"{model} @ {revision}" if revision else model

    lora = recipe.policy.lora
    method, sft, rl, evaluation = recipe.method, recipe.sft, recipe.rl, recipe.evaluation
    return [
        ("Task", recipe.task),
        ("Data", source(recipe.data.source, recipe.data.revision)),
        ("Policy", source(recipe.policy.model, recipe.policy.revision)),
        ("Trained weights", f"LoRA, rank {lora.r}, on {lora.target_modules}" if lora else "all"),
        ("Sentence encoder", source(recipe.encoder.model, recipe.encoder.revision)),
        ("Objective", f"{objective(method)}, groups of {method.k}"),
        ("Bonus for", bonus_earners(method.defences)),
        ("Advantage", f"{method.advantage}, quality scale {method.quality_scale}"),
        ("SFT", f"{sft.steps} steps of {sft.prompts_per_step} prompts, lr {sft.learning_rate:g}, alpha {sft.alpha:g}"),
        ("RL", f"{rl.steps} steps of {rl.prompts_per_step} prompts \u00d7 {method.k}, lr {rl.learning_rate:g}, "
               f"beta {rl.beta:g}"),
        ("Evaluation", f"{evaluation.n} responses a prompt, temperature {evaluation.sampling.temperature:g}, "
                       f"at most {evaluation.sampling.max_new_tokens} tokens"),
        ("Seed", str(recipe.seed)),
        ("Recipe digest", recipe.digest),
    ]  # fmt: skip


def render(data: ReportData) -> str:
    """Return the report as one HTML document."""
    names = [model.name for model in data.models]
    names += [name for name in data.histories if name not in names]
    style = styles(names)
    looks = {name: charts.Look(slot, style[name].marker) for slot, name in enumerate(names)}
    labels = {name: data.by_name[name].label if name in data.by_name else style[name].label for name in names}
    lineage = [("base", "sft"), *(("sft", variant) for variant in data.recipe.variants)]
    n = data.recipe.evaluation.n
    shown_metrics = [metric for metric in METRICS if any(metric in model.metrics for model in data.models)]
    volume, other_volume = (known_mean(model.metrics.get("log_volume")) for model in (data.model, data.rival))
    return page.render(
        "report.html",
        ["page.js"],
        title=f"{data.recipe.name} · quality and diversity",
        data=data,
        recipe=data.recipe,
        finding=find(data),
        agreement=agreement(data),
        key_metrics=[metric for metric in _SHOWN_FIRST if metric in shown_metrics],
        unrelated=[unrelated_responses(v.mean, n) for v in (volume, other_volume) if v],
        planes=page.planes(data.models, looks, n, lineage),
        curves=_curve_sets(data, looks, labels),
        table=[(METRICS[metric], cells(data.models, metric), data.differences.get(metric)) for metric in shown_metrics],
        judged=_judge_rows(data),
        gate_rules=describe(data.recipe.gate),
        looks=looks,
        labels=labels,
        style=style,
        n=n,
        k=data.recipe.method.k,
        bounds=volume_bounds(n),
        volumes=[(count, volume_of(count, n)) for count in range(1, n + 1) if n <= 10 or count in (1, 2, 4, 8, 16, n)],
        card=_flat(data.data_card),
        environment=_flat(data.environment),
        objective=objective(data.recipe.method),
        recipe_rows=_recipe_rows(data.recipe),
    )


def write(data: ReportData, path: Path) -> None:
    """Write the report; see `dqo.files.write_text`."""
    write_text(path, render(data))
