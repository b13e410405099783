"""The report of a comparison: one HTML file, what was found first and the responses that disagree most last."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dqo.evaluation import charts, page
from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.comparison import (
    Compared,
    Difference,
    by_disagreement,
    details,
    difference_text,
    disagreement,
    headline,
    p_text,
    rate_text,
)
from dqo.evaluation.figures import ModelResult, styles
from dqo.evaluation.page import Example, Response
from dqo.files import write_text

MOST_EXAMPLES = 200
"""Prompts shown: a page of thousands opens slowly."""


@dataclass(frozen=True)
class _Bar:
    """A difference on its row's scale, in percent of the width; zero lies at 50."""

    difference: Difference
    start: float
    width: float
    point: float

    @property
    def text(self) -> str:
        """The difference with its interval."""
        return difference_text(self.difference)


@dataclass(frozen=True)
class _Shown:
    """One prompt of the page."""

    order: int
    """Position in the evaluation."""
    example: Example
    quality: float
    """Largest minus smallest mean quality of the models."""
    log_volume: float
    counts: Sequence[str]
    """Mean quality of each model."""


def results(result: Compared) -> list[ModelResult]:
    """The models as the figures take them; those whose key no other model has keep their usual colour."""
    keys = [model.model for model in result.models]
    return [
        ModelResult(
            model.model if keys.count(model.model) == 1 else model.label,
            model.label,
            {metric: means[position] for metric, means in result.means.items()},
        )
        for position, model in enumerate(result.models)
    ]


def render(result: Compared, links: Sequence[tuple[str, str]] = ()) -> str:
    """Return the report as one HTML document.

    Args:
        result: The comparison.
        links: Text and address of what is in MLflow.
    """
    models = results(result)
    names = [model.name for model in models]
    style = styles(names)
    looks = {name: charts.Look(slot, style[name].marker) for slot, name in enumerate(names)}
    n = min(model.n for model in result.models)
    others = range(1, len(models))
    return page.render(
        "comparison.html",
        ["page.js", "comparison.js"],
        title=" · ".join(["comparison", *(model.label for model in models)]),
        result=result,
        models=models,
        others=others,
        headlines=[headline(result, position) for position in others],
        details=[details(result, position) for position in others],
        rows=[(METRICS[metric], page.cells(models, metric), _bars(result, metric)) for metric in result.means],
        planes=page.planes(models, looks, n) if result.same_n else [],
        p_text=p_text,
        rate_text=rate_text,
        finite=math.isfinite,
        examples=_examples(result, names)[:MOST_EXAMPLES],
        links=links,
        looks=looks,
        labels={model.name: model.label for model in models},
        style=style,
        n=n,
    )


def write(result: Compared, path: Path, links: Sequence[tuple[str, str]] = ()) -> None:
    """Write the report; see `dqo.files.write_text`."""
    write_text(path, render(result, links))


def _bars(result: Compared, metric: str) -> list[_Bar | None]:
    """The differences of one metric on one scale, `None` for the model that the others are compared with."""
    differences = result.differences[metric]
    ends = [
        abs(end)
        for one in differences
        if one is not None
        for end in (one.interval.low, one.interval.mean, one.interval.high)
        if math.isfinite(end)
    ]
    scale = 50 / (max(ends, default=0.0) or 1.0)
    bars: list[_Bar | None] = []
    for one in differences:
        if one is None or not math.isfinite(one.interval.mean):
            bars.append(None)
            continue
        interval = one.interval
        low, high = (interval.low, interval.high) if page.has_bounds(interval) else (interval.mean, interval.mean)
        bars.append(_Bar(one, 50 + scale * low, scale * (high - low), 50 + scale * interval.mean))
    return bars


def _examples(result: Compared, names: Sequence[str]) -> list[_Shown]:
    apart, shown = disagreement(result), []
    for position in by_disagreement(result):
        rows = [model.rows[position] for model in result.models]
        example = Example(
            prompt=rows[0]["prompt"],
            responses={
                name: [
                    Response(*drawn) for drawn in zip(row["responses"], row["qualities"], row["truncated"], strict=True)
                ]
                for name, row in zip(names, rows, strict=True)
            },
        )
        known = [[value for value in row["qualities"] if value is not None] for row in rows]
        counts = [page.number(sum(values) / len(values) if values else None) for values in known]
        shown.append(_Shown(position, example, apart[position]["quality"], apart[position]["log_volume"], counts))
    return shown
