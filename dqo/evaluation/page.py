"""What the HTML pages share: how numbers are written, the cells of the metric table, responses, and the file itself.

A page is one file that needs nothing else. Responses are untrusted text: the templates escape everything, and a page
forbids itself every request and every script but its own (a content security policy with that script's hash).
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dqo.evaluation import charts
from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.figures import ModelResult, measured
from dqo.evaluation.statistics import Interval, overlap

MINUS = "\u2212"
_NOT_MEASURED = "n/a"
# Measures of diversity that can be the plane's horizontal axis.
_PLANES = ("log_volume", "self_bleu_diversity", "vendi_score", "distinct_2", "cosine_distance")


@dataclass(frozen=True)
class Response:
    """One response and its reward; `None` where it could not be scored."""

    text: str
    quality: float | None
    truncated: bool = False


@dataclass(frozen=True)
class Example:
    """What every model answered to one prompt."""

    prompt: str
    responses: Mapping[str, Sequence[Response]]
    """Model name -> its n responses in the order they were drawn."""
    concepts: Sequence[str] = ()


def number(value: float | None) -> str:
    """Write a number as the tables do; `n/a` for what could not be measured."""
    if value is None or not math.isfinite(value):
        return _NOT_MEASURED
    decimals = 2 if abs(value) < 100 else 0
    text = f"{value:.{decimals}f}"
    return text.replace("-", MINUS) if float(text) else text.removeprefix("-")


def signed(value: float) -> str:
    """Write a difference: with its sign, unless it rounds to zero."""
    text = number(value)
    return f"+{text}" if text[0] != MINUS and text != _NOT_MEASURED and float(text) else text


def listed(items: Sequence[str]) -> str:
    """Join words as a sentence does: `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def excludes_zero(difference: Interval | None) -> bool:
    """Whether a paired difference is told apart from none; not when it or a bound is missing."""
    return difference is not None and (difference.low > 0 or difference.high < 0)


@dataclass(frozen=True)
class Cell:
    """One model's value of one metric, and where its interval lies in the row's range (percent)."""

    interval: Interval | None
    rank: Literal["best", "not told apart", ""]
    start: float = 0.0
    width: float = 0.0
    point: float = 0.0


def known_mean(interval: Interval | None) -> Interval | None:
    """The interval if its mean is known, else none."""
    return interval if interval is not None and math.isfinite(interval.mean) else None


def cells(models: Sequence[ModelResult], metric: str) -> list[Cell]:
    """A row of the metric table."""
    known = [interval for model in models if (interval := known_mean(model.metrics.get(metric)))]
    ends = [end for i in known for end in (i.low, i.mean, i.high) if math.isfinite(end)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 0.0)
    scale = 100 / (high - low) if high > low else 0.0
    direction = METRICS[metric].direction
    best = None
    if direction != "neutral" and len({interval.mean for interval in known}) > 1:
        best = (max if direction == "higher" else min)(known, key=lambda interval: interval.mean)

    def rank(interval: Interval) -> Literal["best", "not told apart", ""]:
        if best is None:
            return ""
        if interval.mean == best.mean:
            return "best"
        return "not told apart" if overlap(interval, best) else ""

    cells = []
    for model in models:
        interval = known_mean(model.metrics.get(metric))
        if interval is None:
            cells.append(Cell(None, ""))
            continue
        start, end = (interval.low, interval.high) if has_bounds(interval) else (interval.mean, interval.mean)
        cells.append(
            Cell(
                interval,
                rank(interval),
                scale * (start - low) if scale else 50.0,
                scale * (end - start),
                scale * (interval.mean - low) if scale else 50.0,
            )
        )
    return cells


def has_bounds(interval: Interval) -> bool:
    """Whether both ends are known."""
    return math.isfinite(interval.low) and math.isfinite(interval.high)


@dataclass(frozen=True)
class Shown:
    """One response of an example as the page shows it."""

    position: int
    response: Response
    repeats: int | None
    """Position of the response it repeats but for case and white space."""


def with_repeats(responses: Sequence[Response]) -> list[Shown]:
    """Number the responses, and mark those that repeat an earlier one."""
    first: dict[str, int] = {}
    shown = []
    for position, response in enumerate(responses, start=1):
        original = first.setdefault(" ".join(response.text.casefold().split()), position)
        shown.append(Shown(position, response, original if original != position else None))
    return shown


def safe_url(address: str | None) -> str | None:
    """Only web pages become links; anything else (`javascript:`, a file) is left out."""
    return address if address and urlsplit(address).scheme in ("http", "https") else None


def planes(
    models: Sequence[ModelResult], looks: Mapping[str, charts.Look], n: int, lineage: Sequence[tuple[str, str]] = ()
) -> list[tuple[str, list[Markup], list[str]]]:
    """Quality against each measure of diversity that was measured.

    Args:
        models: In display order.
        looks: By model name.
        n: Responses sampled for a prompt.
        lineage: Pairs (trained from, name).

    Returns:
        The measure, its drawings for a phone and for a wide page, and the labels of models that it cannot show.
    """
    return [
        (
            metric,
            [charts.plane(models, looks, metric, n, lineage, narrow) for narrow in (False, True)],
            [model.label for model in models if not measured([model], metric, "quality")],
        )
        for metric in _PLANES
        if measured(models, metric, "quality")
    ]


def render(template: str, scripts: Sequence[str], **context: Any) -> str:
    """Return a page as one HTML document.

    Args:
        template: File beside this module.
        scripts: Files beside this module, joined to the page's one script.
        context: What the template needs.
    """
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "link": safe_url, "repeats": with_repeats}
    environment.tests["told_apart_from_zero"] = excludes_zero
    script = "".join((folder / name).read_text(encoding="utf-8") for name in scripts)
    document = environment.get_template(template).render(
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        metrics=METRICS,
        cells=cells,
        has_bounds=has_bounds,
        **context,
    )
    # JSON can smuggle NUL, which HTML forbids, and lone surrogates, which have no UTF-8 form, into a response.
    return document.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
