"""Charts inside the report: inline SVG whose colours follow the page, so that they fit its light and dark scheme.

Text in an SVG shrinks with it. The plane and the curves are therefore drawn twice, for a wide page and for a phone, and
the page shows one of the two. Every string goes through `Markup.format`, which escapes it.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.figures import (
    Box,
    History,
    Marker,
    ModelResult,
    curve,
    measured,
    place_labels,
    smooth,
    volume_bounds,
    volume_of,
)

_LABEL_SIZE = 13
_CHARACTER = 0.6  # width of an average bold character, in font sizes; labels are placed without measuring the font

_MARKERS: dict[Marker, str] = {
    "o": "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0z",
    "s": "M-5.4 -5.4h10.8v10.8h-10.8z",
    "^": "M0 -6.8L6.6 5H-6.6z",
    "D": "M0 -7L7 0L0 7L-7 0z",
    "v": "M0 6.8L6.6 -5H-6.6z",
    "X": "M-6.2 -3.6L-3.6 -6.2L0 -2.6L3.6 -6.2L6.2 -3.6L2.6 0L6.2 3.6L3.6 6.2L0 2.6L-3.6 6.2L-6.2 3.6L-2.6 0z",
    "<": "M-6.8 0L5 -6.6V6.6z",
    ">": "M6.8 0L-5 -6.6V6.6z",
    "p": "M0 -6.8L6.5 -2.1L4 5.5H-4L-6.5 -2.1z",
    "h": "M0 -6.8L5.9 -3.4V3.4L0 6.8L-5.9 3.4V-3.4z",
    "*": "M0 -7.4L1.8 -2.4L7 -2.3L2.8 0.9L4.4 6L0 3L-4.4 6L-2.8 0.9L-7 -2.3L-1.8 -2.4z",
    "P": "M-2.4 -6.4h4.8v4h4v4.8h-4v4h-4.8v-4h-4v-4.8h4z",
}


@dataclass(frozen=True)
class Look:
    """How the page shows one model."""

    slot: int
    """The page's CSS gives class `m<slot>` the model's colour."""
    marker: Marker

    def mark(self, x: float = 0.0, y: float = 0.0) -> Markup:
        """Return the marker centred at a point of an SVG."""
        return Markup('<path class="mark m{}" transform="translate({:.1f} {:.1f})" d="{}"/>').format(
            self.slot, x, y, _MARKERS[self.marker]
        )

    @property
    def icon(self) -> Markup:
        """The marker as a small picture for running text."""
        return Markup('<svg class="icon" viewBox="-8 -8 16 16" aria-hidden="true">{}</svg>').format(self.mark())


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    """Position of `low` in the drawing."""
    end: float
    """Position of `high`."""
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _axis(values: Iterable[float], start: float, end: float, ticks: int) -> _Axis:
    """An axis over the values, widened to round ticks."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if high - low <= 1e-9 * abs(high):
        room = 0.1 * abs(high) or 0.05
        low, high = low - room, high + room
    marks = _round_ticks(low, high, ticks)
    return _Axis(marks[0], marks[-1], start, end, tuple(marks))


def _fixed_axis(low: float, high: float, start: float, end: float, ticks: int, integer: bool = False) -> _Axis:
    """An axis from `low` to `high`, with the round ticks that lie between."""
    marks = (mark for mark in _round_ticks(low, high, ticks, integer) if low <= mark <= high)
    return _Axis(low, high, start, end, tuple(marks))


def _volume_axis(n: int, start: float, end: float, ticks: int) -> _Axis:
    """An axis over the whole range of log-volumes, with a little room beyond the bounds."""
    low, high = volume_bounds(n)
    return _fixed_axis(low - 0.03 * (high - low), high + 0.03 * (high - low), start, end, ticks)


def _round_ticks(low: float, high: float, ticks: int, integer: bool = False) -> list[float]:
    locator = MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10], integer=integer)
    return [float(mark) for mark in locator.tick_values(low, high)]


def _join(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _text(x: float, y: float, content: str, kind: str, anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(
        x, y, kind, anchor, content
    )


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, x0, y0, x1, y1)


def _tick_labels(axis: _Axis) -> list[str]:
    """Ticks with the decimals that their spacing needs, and a real minus sign."""
    step = min((b - a for a, b in pairwise(axis.ticks)), default=1.0)
    if step < 1e-3:  # learning rates
        return [f"{tick:.3g}".replace("-", "\u2212") for tick in axis.ticks]
    decimals = next(d for d in range(8) if abs(round(step, d) - step) < 1e-6 * step)
    return [f"{tick:.{decimals}f}".replace("-", "\u2212") for tick in axis.ticks]


def _grid(x: _Axis, y: _Axis) -> Markup:
    parts = []
    for tick, label in zip(y.ticks, _tick_labels(y), strict=True):
        parts.append(_line(x.start, y(tick), x.end, y(tick), "grid"))
        parts.append(_text(x.start - 8, y(tick) + 4, label, "tick", "end"))
    for tick, label in zip(x.ticks, _tick_labels(x), strict=True):
        parts.append(_line(x(tick), y.start, x(tick), y.end, "grid"))
        parts.append(_text(x(tick), y.start + 18, label, "tick", "middle"))
    return _join(parts)


def _figure(width: int, height: int, kind: str, description: str, content: Markup, attributes: Markup) -> Markup:
    return Markup('<svg class="chart {}" viewBox="0 0 {} {}" role="img" aria-label="{}"{}>{}</svg>').format(
        kind, width, height, description, attributes, content
    )


def _finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def _cross(model: ModelResult, x_metric: str, y_metric: str, x: _Axis, y: _Axis) -> list[Box]:
    """The two interval bars of a model, those that have bounds."""
    across, up = model.metrics[x_metric], model.metrics[y_metric]
    px, py = x(across.mean), y(up.mean)
    bars = []
    if _finite(across.low, across.high):
        bars.append(Box(x(across.low), py - 1, x(across.high), py + 1))
    if _finite(up.low, up.high):
        bars.append(Box(px - 1, y(up.high), px + 1, y(up.low)))
    return bars


def _unrelated_scale(n: int, x: _Axis, y: _Axis) -> Markup:
    """A second scale above a log-volume axis: how many unrelated responses a volume amounts to."""
    parts, last = [], -math.inf
    for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        position = x(volume_of(count, n))
        if count <= n and position - last > 24:
            parts.append(_line(position, y.end - 4, position, y.end, "axis"))
            parts.append(_text(position, y.end - 9, str(count), "tick", "middle"))
            last = position
    parts.append(_text(x.end, y.end - 30, f"as many unrelated responses, of {n}", "tick", "end"))
    return _join(parts)


def plane(
    models: Sequence[ModelResult],
    looks: Mapping[str, Look],
    x_metric: str,
    n: int,
    lineage: Sequence[tuple[str, str]],
    narrow: bool,
) -> Markup:
    """Quality against one measure of diversity: a point and the cross of its two intervals for each model.

    Args:
        models: In display order; those without a number are left out.
        looks: By model name.
        x_metric: Measure of diversity; a log-volume axis spans its whole range and gets a second scale.
        n: Responses sampled for a prompt.
        lineage: Pairs (trained from, name), drawn as thin arrows.
        narrow: Draw for a phone.
    """
    width, height = (360, 370) if narrow else (800, 470)
    volume = x_metric == "log_volume"
    left, right, top, bottom = (40, 12, 62 if volume else 30, 44) if narrow else (52, 20, 66 if volume else 34, 48)
    shown = measured(models, x_metric, "quality")
    ticks = 5 if narrow else 8
    x = (
        _volume_axis(n, left, width - right, ticks)
        if volume
        else _axis((value for model in shown for value in _ends(model, x_metric)), left, width - right, ticks)
    )
    y = _axis((value for model in shown for value in _ends(model, "quality")), height - bottom, top, 5)
    anchors = {model.name: (x(model.metrics[x_metric].mean), y(model.metrics["quality"].mean)) for model in shown}
    bars = {model.name: _cross(model, x_metric, "quality", x, y) for model in shown}
    parts = [
        _grid(x, y),
        _text(4, y.end - (30 if volume else 14), "Quality \u2191", "title"),
        _text(x.end, height - 6, f"{METRICS[x_metric].label}{' (nats)' if volume else ''} \u2192", "title", "end"),
    ]
    if volume:
        parts += [_line(x(bound), y.start, x(bound), y.end, "bound") for bound in volume_bounds(n)]
        parts.append(_unrelated_scale(n, x, y))
        parts.append(_text(x.start, height - 6, "\u2190 all mean the same", "tick"))
    parts += [_arrow(anchors[a], anchors[b]) for a, b in lineage if a in anchors and b in anchors]
    for model in shown:
        slot = looks[model.name].slot
        parts += [
            Markup('<rect class="bar m{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1"/>').format(
                slot, bar.x0, bar.y0, bar.x1 - bar.x0, bar.y1 - bar.y0
            )
            for bar in bars[model.name]
        ]
    for model in shown:
        parts.append(
            Markup('<g class="point" tabindex="0" data-tip="{}">{}<title>{}</title></g>').format(
                _spoken(model, x_metric), looks[model.name].mark(*anchors[model.name]), _spoken(model, x_metric)
            )
        )
    sizes = [(len(model.label) * _LABEL_SIZE * _CHARACTER, _LABEL_SIZE * 1.25) for model in shown]
    obstacles = [Box(px - 8, py - 8, px + 8, py + 8) for px, py in anchors.values()]
    obstacles += [Box(bar.x0 - 5, bar.y0 - 2, bar.x1 + 5, bar.y1 + 2) for found in bars.values() for bar in found]
    boxes = place_labels(list(anchors.values()), sizes, obstacles, Box(x.start, y.end, x.end, y.start))
    for model, box in zip(shown, boxes, strict=True):
        kind = f"label m{looks[model.name].slot}"
        # The real font may be narrower than the box: let the text keep to the side that faces its point.
        px = anchors[model.name][0]
        if box.x0 > px:
            at, anchor = box.x0, "start"
        elif box.x1 < px:
            at, anchor = box.x1, "end"
        else:
            at, anchor = (box.x0 + box.x1) / 2, "middle"
        parts.append(_text(at, box.y1 - 0.3 * _LABEL_SIZE, model.label, kind, anchor))
    description = "Quality against " + METRICS[x_metric].label + ": " + "; ".join(_spoken(m, x_metric) for m in shown)
    return _figure(width, height, "narrow" if narrow else "wide", description, _join(parts), Markup(""))


def _ends(model: ModelResult, metric: str) -> tuple[float, float, float]:
    interval = model.metrics[metric]
    return interval.low, interval.mean, interval.high


def _spoken(model: ModelResult, x_metric: str) -> str:
    def words(metric: str) -> str:
        interval = model.metrics[metric]
        bounds = f" [{interval.low:.2f}, {interval.high:.2f}]" if _finite(interval.low, interval.high) else ""
        return f"{METRICS[metric].label} {interval.mean:.2f}{bounds}"

    return f"{model.label}: {words('quality')}, {words(x_metric)}"


def _arrow(a: tuple[float, float], b: tuple[float, float]) -> Markup:
    """A thin line with an open head in its middle: it shows descent and must not look like data."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    length = math.hypot(dx, dy)
    if length < 40:
        return Markup("")
    ux, uy = dx / length, dy / length
    mx, my = (a[0] + b[0]) / 2, (a[1] + b[1]) / 2
    head = [(mx - 5 * ux + side * 4 * uy, my - 5 * uy - side * 4 * ux) for side in (1, -1)]
    (x0, y0), (x1, y1) = head
    line = f"M{a[0] + 12 * ux:.1f} {a[1] + 12 * uy:.1f}L{b[0] - 12 * ux:.1f} {b[1] - 12 * uy:.1f}"
    tip = f"M{x0:.1f} {y0:.1f}L{mx:.1f} {my:.1f}L{x1:.1f} {y1:.1f}"
    return Markup('<path class="descent" d="{}"/>').format(line + tip)


def curves(
    histories: Mapping[str, History],
    looks: Mapping[str, Look],
    labels: Mapping[str, str],
    metric: str,
    title: str,
    size: tuple[int, int],
    kind: str,
    group_size: int,
) -> Markup:
    """One metric over the training steps, a line for each variant that logged it.

    Args:
        histories: By variant; a step without the metric is left out.
        looks: By variant.
        labels: By variant.
        metric: Key of the history rows; a log-volume axis spans its whole range.
        title: Stands above the chart.
        size: Width and height of the drawing.
        kind: CSS class, which says on what page widths it is shown.
        group_size: Responses in a training group.
    """
    width, height = size
    found = {variant: curve(history, metric) for variant, history in histories.items()}
    found = {variant: points for variant, points in found.items() if len(points[0])}
    first, last = min(steps[0] for steps, _ in found.values()), max(steps[-1] for steps, _ in found.values())
    x = _fixed_axis(first, max(last, first + 1), 46, width - 14, 5, integer=True)
    y = (
        _volume_axis(group_size, height - 40, 34, 5)
        if metric == "log_volume"
        else _axis((value for _, values in found.values() for value in values), height - 40, 34, 5)
    )
    parts = [_grid(x, y), _text(4, 16, title, "title"), _text(x.end, height - 6, "step", "tick", "end")]
    if metric == "log_volume":
        least, most = volume_bounds(group_size)
        parts += [_line(x.start, y(bound), x.end, y(bound), "bound") for bound in (least, most)]
        parts.append(_text(x.end, y(most) - 5, "nothing in common", "tick", "end"))
        parts.append(_text(x.start + 4, y(least) - 6, "all mean the same", "tick"))
    for variant, (steps, values) in found.items():
        slot = looks[variant].slot
        for weight, heights in (("raw", values), ("bold", smooth(values))):
            points = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in zip(steps, heights, strict=True))
            parts.append(Markup('<path class="curve {} m{}" d="M{}"/>').format(weight, slot, points))
        parts.append(looks[variant].mark(x(steps[-1]), y(smooth(values)[-1])))
    parts.append(_line(0, y.end, 0, y.start, "cursor"))
    # What the page's script needs to show values under the pointer.
    hover = {
        "x": [x.low, x.high, x.start, x.end],
        "series": [
            {"label": labels[variant], "steps": steps.tolist(), "values": [float(f"{v:.4g}") for v in values]}
            for variant, (steps, values) in found.items()
        ],
    }
    description = f"{title} by training step: " + "; ".join(
        f"{labels[variant]} from {values[0]:.3g} to {values[-1]:.3g}" for variant, (_, values) in found.items()
    )
    return _figure(
        width, height, kind, description, _join(parts), Markup(' data-curves="{}"').format(json.dumps(hover))
    )
