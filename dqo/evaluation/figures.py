"""Figures of a run for MLflow and the README: the quality-diversity plane and the learning curves.

What they share with the charts inside the report is here too: each model's colour and marker, the smoothing of noisy
curves, where labels go, and how to read a log-volume.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.optimize import brentq

from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.statistics import Interval

Marker = Literal["o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*"]
History = Sequence[Mapping[str, float]]
"""Rows of one `history.jsonl`: `step` and the metrics of that step."""
Point = tuple[float, float]

_INK, _MUTED, _RULE = "#1d2129", "#5b6370", "#e4e4df"


@dataclass(frozen=True)
class ModelResult:
    """One model of a run and how it was measured."""

    name: str
    """Key of `evaluation.json`: `base`, `sft`, `reward_only`, `dqo`."""
    label: str
    """What a reader calls it, e.g. `DQO-RL (alpha = 1)`."""
    metrics: Mapping[str, Interval]
    """Metric name -> mean over prompts with its interval; nan where it could not be measured."""
    mlflow: str | None = None
    """Address of its run in MLflow."""
    series: str | None = None
    """Models of one series, e.g. a run at several temperatures, share a colour and are joined in their order."""

    @property
    def look(self) -> str:
        """What its style is known by."""
        return self.series or self.name


@dataclass(frozen=True)
class Style:
    """How one model looks in every figure; never told apart by colour alone."""

    label: str
    light: str
    """Colour on a white page."""
    dark: str
    """Colour on a dark page."""
    marker: Marker


# The contenders differ in hue and lightness (CIE76 distance 95 or more for protanopes, deuteranopes and tritanopes);
# what they started from stays grey.
_KNOWN = {
    "base": Style("Base", "#69717d", "#8b949f", "D"),
    "sft": Style("SFT", "#333b47", "#d3d9e0", "s"),
    "reward_only": Style("Reward-only RL", "#c2540a", "#f0883e", "^"),
    "dqo": Style("DQO-RL", "#1464b4", "#58a6ff", "o"),
}
_FURTHER: list[tuple[str, str, Marker]] = [
    ("#0b7d62", "#3fbf9b", "v"),
    ("#a2448f", "#dd84c8", "P"),
    ("#8a6d00", "#d9b934", "X"),
    ("#5a4fcf", "#9d95ff", "<"),
    ("#b3273f", "#ff7a8c", ">"),
    ("#3f7f1f", "#84c95e", "p"),
    ("#00758f", "#4fc3dc", "h"),
    ("#7a4a24", "#c99468", "*"),
]


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Style of each model by name; models this module does not know take further colours in turn."""
    further = cycle(_FURTHER)
    known = {name: _KNOWN.get(name.replace("-", "_")) for name in names}
    return {name: look or Style(name, *next(further)) for name, look in known.items()}


def volume_bounds(n: int) -> tuple[float, float]:
    """Range of the log-volume of n unit-norm embeddings, `(log(1 + n), n log 2)`, in nats [derived]."""
    return math.log(1 + n), n * math.log(2)


def volume_of(groups: float, n: int) -> float:
    """Log-volume of n responses that fall into `groups` equal groups: `groups * log(1 + n / groups)` nats [derived].

    Responses of one group coincide and those of different groups are orthogonal, so the Gram matrix has the eigenvalue
    `n / groups`, `groups` times.
    """
    return groups * math.log1p(n / groups)


def unrelated_responses(volume: float, n: int) -> float:
    """How many unrelated responses, each repeated equally often to make n, span this log-volume.

    The inverse of `volume_of`, a way of reading nats; real responses to one prompt are never quite unrelated.

    Args:
        volume: Log-volume in nats; values outside `volume_bounds(n)` are taken as the nearer bound.
        n: Responses in the group.

    Returns:
        A number in [1, n].
    """
    low, high = volume_of(1.0, n), volume_of(float(n), n)  # brentq needs the ends as this function rounds them
    return float(brentq(lambda groups: volume_of(groups, n) - min(max(volume, low), high), 1.0, float(n)))


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred moving average over about an eighth of the curve, shape `(steps,)`; the window shrinks at the ends."""
    half = len(values) // 16
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def curve(history: History, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of one metric, without the steps that have none; both of shape `(steps,)`."""
    rows = [(row["step"], row[metric]) for row in history if math.isfinite(row.get(metric, math.nan))]
    points = np.array(rows, dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


@dataclass(frozen=True)
class Box:
    """A rectangle in a figure's own units."""

    x0: float
    y0: float
    x1: float
    y1: float

    def shared_area(self, other: "Box") -> float:
        """Area that both cover."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(width, 0.0) * max(height, 0.0)

    def nearest(self, point: Point) -> Point:
        """The rectangle's point that is nearest to another one."""
        return min(max(point[0], self.x0), self.x1), min(max(point[1], self.y0), self.y1)

    def distance(self, point: Point) -> float:
        """From a point to the rectangle; 0 inside."""
        return math.dist(point, self.nearest(point))


def place_labels(
    anchors: Sequence[Point], sizes: Sequence[tuple[float, float]], obstacles: Sequence[Box], frame: Box
) -> list[Box]:
    """Find a place for each label beside its own anchor, off the obstacles, the other labels and the frame's edge.

    Args:
        anchors: Points that the labels belong to.
        sizes: Width and height of each label.
        obstacles: What no label should cover: markers, interval bars.
        frame: Where labels must stay.

    Returns:
        One box a label. Where a crowd leaves no free place, the boxes overlap as little as the search can find.
    """
    # Right and left read best; above, below and the corners come next.
    sides = [(1, 0), (-1, 0), (1, -1), (-1, -1), (1, 1), (-1, 1), (0, -1), (0, 1)]

    def candidates(anchor: Point, size: tuple[float, float]) -> list[tuple[float, Box]]:
        found = []
        for distance in (10, 16, 24, 34, 48, 64):
            for rank, (dx, dy) in enumerate(sides):
                # The label's edge or corner that faces the anchor keeps the distance.
                x = anchor[0] + distance * dx - size[0] * (1 - dx) / 2
                y = anchor[1] + distance * dy * (0.6 if dx else 1.0) - size[1] * (1 - dy) / 2
                box = Box(x, y, x + size[0], y + size[1])
                outside = size[0] * size[1] - box.shared_area(frame)
                cost = distance + rank + 20 * outside + sum(10 * box.shared_area(other) for other in obstacles)
                found.append((cost, box))
        return found

    def nearer_to_another(i: int, box: Box) -> bool:
        """Whether a reader would take the label for that of another point."""
        distances = [box.distance(anchor) for anchor in anchors]
        return min((d for j, d in enumerate(distances) if j != i), default=math.inf) < distances[i] + 4

    options = [
        [(cost + (40 if nearer_to_another(i, box) else 0), box) for cost, box in candidates(anchor, size)]
        for i, (anchor, size) in enumerate(zip(anchors, sizes, strict=True))
    ]
    chosen = [min(option, key=lambda item: item[0])[1] for option in options]
    for _ in range(4):  # a few rounds settle labels that want the same place
        for i, option in enumerate(options):
            others = chosen[:i] + chosen[i + 1 :]
            chosen[i] = min(
                option, key=lambda item: item[0] + sum(20 * item[1].shared_area(other) for other in others)
            )[1]
    return chosen


def measured(models: Sequence[ModelResult], *metrics: str) -> list[ModelResult]:
    """Models that have a number for each of the metrics."""
    return [
        model
        for model in models
        if all(metric in model.metrics and math.isfinite(model.metrics[metric].mean) for metric in metrics)
    ]


def _clean(axes: Axes) -> None:
    axes.set_facecolor("white")
    axes.grid(color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=_MUTED, labelsize=9)


def _legend(figure: Figure, axes: Axes) -> None:
    """Name the lines: inside the axes where they are few, else once beside the panels, where no line runs."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    if len(handles) <= 3:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    elif not figure.legends:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width + 0.7 + 0.07 * max(map(len, labels)), height)
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9, labelcolor=_INK)


def _arm(interval: Interval) -> list[list[float]] | None:
    """The two sides of an error bar, or none where the bounds are missing."""
    low, high = interval.mean - interval.low, interval.high - interval.mean
    return [[max(low, 0.0)], [max(high, 0.0)]] if math.isfinite(low + high) else None


def plane_figure(
    models: Sequence[ModelResult],
    x: str = "log_volume",
    y: str = "quality",
    n: int | None = None,
    looks: Mapping[str, Style] | None = None,
) -> Figure:
    """Each model as a point with the cross of its two intervals: diversity to the right, quality upwards.

    Args:
        models: In display order; those without a number for `x` or `y` are left out. Those of one series are joined.
        x: Metric of the horizontal axis.
        y: Metric of the vertical axis.
        n: Responses sampled for a prompt. With it, a log-volume axis spans its whole range and a second scale says how
            many unrelated responses a volume amounts to.
        looks: Style of each `ModelResult.look`, e.g. `styles` of more models than these; by default theirs alone.

    Returns:
        A figure of 7.2 x 4.6 inches on white.
    """
    shown = measured(models, x, y)
    looks = looks or styles([model.look for model in models])
    figure = Figure(figsize=(7.2, 4.6), dpi=160, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    _clean(axes)
    for series in dict.fromkeys(model.series for model in shown if model.series is not None):
        points = [(model.metrics[x].mean, model.metrics[y].mean) for model in shown if model.series == series]
        axes.plot(*zip(*points, strict=True), color=looks[series].light, linewidth=1.2, alpha=0.5)
    for model in shown:
        look, across, up = looks[model.look], model.metrics[x], model.metrics[y]
        axes.errorbar(
            across.mean, up.mean, xerr=_arm(across), yerr=_arm(up), elinewidth=1.6,
            fmt=look.marker, color=look.light, markersize=9, markeredgecolor="white", markeredgewidth=1.2,
        )  # fmt: skip
    unit = "nats, diversity" if x == "log_volume" else "diversity"
    axes.set_xlabel(f"{METRICS[x].label} ({unit})", color=_INK, fontsize=10)
    axes.set_ylabel(METRICS[y].label, color=_INK, fontsize=10)
    axes.margins(x=0.12, y=0.16)
    if n is not None and x == "log_volume":
        low, high = volume_bounds(n)
        axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
        top = axes.secondary_xaxis("top")
        counts = [count for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if count <= n]
        top.set_xticks([volume_of(count, n) for count in counts], [str(count) for count in counts])
        top.set_xlabel(f"as many unrelated responses, of {n}", color=_MUTED, fontsize=9)
        top.tick_params(length=0, labelcolor=_MUTED, labelsize=9)
        top.spines[:].set_visible(False)
    _label_points(figure, axes, shown, looks, x, y)
    return figure


def _label_points(
    figure: Figure, axes: Axes, models: Sequence[ModelResult], looks: Mapping[str, Style], x: str, y: str
) -> None:
    """Write each model's label where it covers nothing, in points (1/72 inch) of the laid-out figure."""
    figure.draw_without_rendering()  # positions and text sizes are known only after the layout
    point = figure.dpi / 72
    texts = [
        axes.text(0, 0, model.label, color=looks[model.look].light, fontsize=10, fontweight="bold") for model in models
    ]
    extents = [text.get_window_extent() for text in texts]

    def place(across: float, up: float) -> Point:
        px, py = axes.transData.transform((across, up))
        return px / point, py / point

    anchors = [place(model.metrics[x].mean, model.metrics[y].mean) for model in models]
    obstacles = [Box(px - 7, py - 7, px + 7, py + 7) for px, py in anchors]
    for model, (px, py) in zip(models, anchors, strict=True):
        across, up = model.metrics[x], model.metrics[y]
        if _arm(across):
            obstacles.append(Box(place(across.low, 0)[0] - 2, py - 2, place(across.high, 0)[0] + 2, py + 2))
        if _arm(up):
            obstacles.append(Box(px - 2, place(0, up.low)[1] - 2, px + 2, place(0, up.high)[1] + 2))
    frame = Box(*(edge / point for edge in axes.get_window_extent().extents))
    sizes = [(extent.width / point, extent.height / point) for extent in extents]
    places = place_labels(anchors, sizes, obstacles, frame)
    for text, anchor, box in zip(texts, anchors, places, strict=True):
        if box.distance(anchor) > 18:  # too far to be read as the marker's own without a line between them
            ends = [(px / 72, py / 72) for px, py in (anchor, box.nearest(anchor))]
            line = Line2D(
                *zip(*ends, strict=True), transform=figure.dpi_scale_trans, color=text.get_color(), linewidth=0.8
            )
            figure.add_artist(line).set_in_layout(False)
        # In inches: a picture saved at another resolution than the figure's keeps its labels.
        text.set(transform=figure.dpi_scale_trans, position=(box.x0 / 72, box.y0 / 72), verticalalignment="bottom")
        text.set_in_layout(False)


def learning_curves_figure(histories: Mapping[str, History], looks: Mapping[str, Style] | None = None) -> Figure:
    """Reward and log-volume of the rollouts over training, one line a variant.

    Args:
        histories: Variant name -> its history; variants without a metric are left out of its panel.
        looks: Style of each variant, e.g. `styles` of more than these; by default theirs alone.

    Returns:
        A figure of 9.6 x 3.6 inches on white, with many variants wider by their legend. Thin lines are single steps,
        bold ones their moving average.
    """
    looks = looks or styles(list(histories))
    figure = Figure(figsize=(9.6, 3.6), dpi=160, layout="constrained", facecolor="white")
    for position, metric in enumerate(("quality", "log_volume"), start=1):
        axes = figure.add_subplot(1, 2, position)
        _clean(axes)
        for variant, history in histories.items():
            steps, values = curve(history, metric)
            if len(steps):
                colour = looks[variant].light
                axes.plot(steps, values, color=colour, alpha=0.35, linewidth=1)
                axes.plot(
                    steps, smooth(values), color=colour, linewidth=2.2, label=looks[variant].label,
                    marker=looks[variant].marker, markevery=[-1], markersize=7, markeredgecolor="white",
                )  # fmt: skip
        axes.set_title(
            f"{METRICS[metric].label} of the rollouts", loc="left", color=_INK, fontsize=11, fontweight="bold"
        )
        axes.set_xlabel("Step", color=_MUTED, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _legend(figure, axes)
    return figure


def sweep_figure(
    series: Mapping[str, Mapping[str, Mapping[float, Interval]]], field: str, looks: Mapping[str, Style] | None = None
) -> Figure:
    """Metrics over the values of one setting, a panel a metric and a line a run.

    Args:
        series: Metric -> run -> value of the setting -> mean with its interval.
        field: What a reader calls the setting.
        looks: Style of each run, e.g. `styles` of more than these; by default theirs alone.

    Returns:
        A figure of 9.6 x 3.6 inches on white, bars for the intervals.
    """
    looks = looks or styles(list(dict.fromkeys(run for runs in series.values() for run in runs)))
    figure = Figure(figsize=(9.6, 3.6), dpi=160, layout="constrained", facecolor="white")
    for position, (metric, runs) in enumerate(series.items(), start=1):
        axes = figure.add_subplot(1, len(series), position)
        _clean(axes)
        for run, points in runs.items():
            look, intervals = looks[run], list(points.values())
            axes.errorbar(
                list(points), [one.mean for one in intervals], yerr=_arms(intervals),
                label=look.label, color=look.light, marker=look.marker, markersize=7, markeredgecolor="white",
                linewidth=2.0, elinewidth=1.4,
            )  # fmt: skip
        axes.set_title(METRICS[metric].label, loc="left", color=_INK, fontsize=11, fontweight="bold")
        axes.set_xlabel(field, color=_MUTED, fontsize=9)
        axes.set_xticks(sorted({value for points in runs.values() for value in points}))
        if len(runs) > 1:
            _legend(figure, axes)
    return figure


def curve_figure(
    curves: Mapping[str, Sequence[Interval]], across: str, up: str, looks: Mapping[str, Style] | None = None
) -> Figure:
    """A value for 1, 2, 3, ... of something, one line a model with its band.

    Args:
        curves: Model -> means with their intervals, for 1, 2, 3, ...
        across: Label of the horizontal axis.
        up: Label of the vertical axis.
        looks: Style of each model, e.g. `styles` of more than these; by default theirs alone.

    Returns:
        A figure of 7.2 x 4.2 inches on white, with many models wider by their legend.
    """
    looks = looks or styles(list(curves))
    figure = Figure(figsize=(7.2, 4.2), dpi=160, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    _clean(axes)
    for model, intervals in curves.items():
        look, numbers = looks[model], range(1, len(intervals) + 1)
        axes.fill_between(
            numbers, [one.low for one in intervals], [one.high for one in intervals], color=look.light, alpha=0.12
        )
        axes.plot(
            numbers, [one.mean for one in intervals], label=look.label, color=look.light, linewidth=2.0,
            marker=look.marker, markersize=6, markeredgecolor="white",
        )  # fmt: skip
    axes.set_xlabel(across, color=_INK, fontsize=10)
    axes.set_ylabel(up, color=_INK, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes)
    return figure


def differences_figure(models: Sequence[ModelResult], differences: Mapping[str, Sequence[Interval | None]]) -> Figure:
    """Differences of models to the first one, a row a metric and a panel a model.

    Metrics have units of their own: each row is divided by its largest absolute bound over all panels. So a row says
    whether a difference excludes zero and how the models compare on it, not how large it is beside another row.

    Args:
        models: In display order.
        differences: Metric -> difference of each model to the first one, in the order of `models`.

    Returns:
        A figure on white whose size grows with metrics and models.
    """
    looks = styles([model.name for model in models])
    panels, rows = models[1:], list(differences)[::-1]
    figure = Figure(
        figsize=(2.4 + 3.0 * len(panels), 1.5 + 0.3 * len(rows)), dpi=160, layout="constrained", facecolor="white"
    )
    figure.suptitle(f"Difference to {models[0].label}", x=0.01, ha="left", color=_MUTED, fontsize=9)
    first: Axes | None = None
    for position, model in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), position, sharey=first)
        first = first or axes
        _clean(axes)
        axes.axvline(0, color=_MUTED, linewidth=1)
        for height, metric in enumerate(rows):
            ends = [end for one in differences[metric] if one for end in (one.low, one.mean, one.high)]
            scale = max((abs(end) for end in ends if math.isfinite(end)), default=0.0) or 1.0
            one = differences[metric][position]
            if one is not None and math.isfinite(one.mean):
                interval = Interval(one.mean / scale, one.low / scale, one.high / scale)
                axes.errorbar(
                    interval.mean, height, xerr=_arm(interval), fmt=looks[model.name].marker,
                    color=looks[model.name].light, elinewidth=1.8, markersize=7, markeredgecolor="white",
                )  # fmt: skip
        axes.set_yticks(range(len(rows)), [METRICS[metric].label for metric in rows])
        axes.tick_params(labelleft=position == 1)
        axes.set_xlim(-1.15, 1.15)
        axes.set_xticks([-1, 0, 1], ["lower", "0", "higher"])
        axes.set_title(model.label, loc="left", color=looks[model.name].light, fontsize=10, fontweight="bold")
    return figure


def win_rates_figure(labels: Sequence[str], rates: Sequence[Sequence[Interval | None]]) -> Figure:
    """How often each row's model wins over each column's, in percent with intervals.

    Args:
        labels: Of the models.
        rates: A row a model, a column an opponent; `None` where there is none.

    Returns:
        A figure on white; violet where the row's model wins, orange where it loses.
    """
    size = len(labels)
    figure = Figure(figsize=(2.2 + 1.5 * size, 1.2 + 0.8 * size), dpi=160, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    means = np.array([[math.nan if one is None else one.mean for one in row] for row in rates])
    axes.imshow(means, cmap="PuOr", vmin=0.0, vmax=1.0, alpha=0.6, aspect="auto")
    for (i, j), mean in np.ndenumerate(means):
        one = rates[i][j]
        if one is not None and math.isfinite(mean):
            text = f"{100 * mean:.0f}%\n[{100 * one.low:.0f}, {100 * one.high:.0f}]"
            axes.text(j, i, text, ha="center", va="center", color=_INK, fontsize=9)
    axes.set_xticks(range(size), [f"against {label}" for label in labels], rotation=20, ha="right", fontsize=8)
    axes.set_yticks(range(size), labels, fontsize=8)
    axes.tick_params(length=0, labelcolor=_INK)
    axes.spines[:].set_visible(False)
    return figure


def _arms(intervals: Sequence[Interval]) -> NDArray[np.float64]:
    """Both sides of the error bars, shape `(2, points)`; nothing where bounds are missing."""
    sides = np.array([[one.mean - one.low, one.high - one.mean] for one in intervals]).T
    return np.nan_to_num(sides).clip(min=0.0)
