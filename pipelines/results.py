"""The page of an experiment's results: tables and pictures made of nothing but the results file.

Every mean is over prompts and seeds. The interval beside it is a bootstrap over prompts of each prompt's mean over the
seeds: how far other prompts would move it, given these training runs. How far other training runs would is shown as the
range of the seeds' means, where there are several.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dqo.evaluation.best_of import curve_intervals, expected_best, pass_at_k
from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.figures import ModelResult, curve_figure, learning_curves_figure, plane_figure, styles, sweep_figure
from dqo.evaluation.statistics import OverSeeds, over_seeds, overlap
from dqo.files import write_text
from dqo.tasks import get_task
from pipelines.grid import Cell, Claim, Experiment, Part, Results

_SHOWN = (
    "quality",
    "best_of_n",
    "log_volume",
    "distinct_4",
    "self_bleu_diversity",
    "duplicate_rate",
    "truncation_rate",
    "mean_tokens",
)
_DECIDING = ("quality", "best_of_n", "log_volume", "distinct_4", "self_bleu_diversity")
_STARTS = {"base": "base model", "sft": "SFT"}
"""What all runs of a part start from, and what a reader calls it."""
_SIGNED = "{:+.3f} [{:+.3f}, {:+.3f}]"


@dataclass(frozen=True)
class Line:
    """One line of a table: a run with its grid values, over its seeds.

    Attributes:
        title: What a reader calls it.
        run: Name of the run; `base` and `sft` for what the training started from.
        values: The grid's values.
        rows: Finished jobs, a row a seed.
        planned: Seeds that the file asks for.
        model: Which of a row's models is meant.
    """

    title: str
    run: str
    values: dict[str, Any]
    rows: list[dict[str, Any]]
    planned: int
    model: str = "dqo"

    def table(self, metric: str) -> NDArray[np.float64]:
        """Values of shape `(seeds, prompts)`; nan where the metric is not defined or was not measured."""
        empty = [math.nan] * self.rows[0]["prompts"]
        return np.array([row["models"][self.model].get(metric, empty) for row in self.rows], dtype=np.float64)

    def over_seeds(self, metric: str) -> OverSeeds:
        """Mean and intervals of a metric."""
        return over_seeds(self.table(metric))


def write_page(
    experiment: Experiment, cells: Sequence[Cell], results: Results, path: Path, command: str | None = None
) -> None:
    """Write the page and its pictures, which go into a folder of the page's name.

    Args:
        experiment: What the file says.
        cells: See `pipelines.grid.expand`.
        results: What is finished so far; what is missing is said on the page.
        path: The page, Markdown.
        command: Makes the page again, and runs what is missing; said on it.
    """
    done, _ = results.current(cells)
    pictures = path.with_suffix("")
    keys = {cell.key for cell in cells}
    text = [f"# {experiment.title}", ""]
    text += [
        "<!-- Written by `dqo experiment` from the results file; edit the experiment file instead. -->",
        "",
        *([experiment.text, ""] if experiment.text else []),
        f"{len(keys & done.keys())} of {len(keys)} runs are finished. Means over prompts and seeds; in brackets the "
        "95 % bootstrap interval over prompts, and behind it the range of the seeds' means where there are several.",
        "",
        "In the pictures, crosses, bars and bands are the intervals over prompts: other training runs would differ by "
        "more. Learning curves are of the responses that training sampled, thin for single steps and bold for their "
        "moving average; their groups may be of another size than the evaluation's, and volumes of different sizes do "
        "not compare.",
        "",
    ]
    text += _claims(experiment, cells, done)
    for part in experiment.parts:
        text += [f"## {part.title}", "", *([part.text, ""] if part.text else [])]
        labels = list(dict.fromkeys(cell.label for cell in cells if cell.part == part.name))
        for label in labels:
            chosen = [cell for cell in cells if (cell.part, cell.label) == (part.name, label)]
            if len(labels) > 1:
                text += [f"### {label}", ""]
            text += _section(part, label, chosen, done, results, pictures)
    folder = os.path.relpath(results.folder, path.parent)
    text += _provenance([done[key] for key in sorted(keys & done.keys())], Path(folder).as_posix(), command)
    write_text(path, "\n".join(text).rstrip() + "\n")


def _claims(experiment: Experiment, cells: Sequence[Cell], done: Mapping[str, dict[str, Any]]) -> list[str]:
    """Each claim with a line for each recipe: what was found and whether it holds."""
    text: list[str] = []
    for part in experiment.parts:
        if part.claim is None:
            continue
        claim = part.claim
        asked = []
        if claim.higher:
            higher = _all([_in_text(metric) for metric in claim.higher])
            asked.append(f"higher in {higher} (the two models' own 95 % intervals apart)")
        for bound in dict.fromkeys(claim.not_lower.values()):
            bounded = [_in_text(metric) for metric, by in claim.not_lower.items() if by == bound]
            asked.append(f"{f'at most {bound:g}' if bound else 'not'} lower in {_all(bounded)}")
        metrics = [*claim.higher, *claim.not_lower]
        columns = ["task", "seeds", *(METRICS[metric].label for metric in metrics), "holds"]
        text += [
            f"Claimed of {claim.run} beside {part.against}: {'; '.join(asked)}. Differences of the means over prompts "
            "and seeds, and in how many of the seeds they are above 0:",
            "",
            "| " + " | ".join(columns) + " |",
            "|" + "---|" * len(columns),
        ]
        for label in dict.fromkeys(cell.label for cell in cells if cell.part == part.name):
            chosen = [cell for cell in cells if (cell.part, cell.label) == (part.name, label)]
            text.append("| " + " | ".join(_claimed(part, claim, label, chosen, done, metrics)) + " |")
        text += ["", *([claim.text, ""] if claim.text else [])]
    return ["## In short", "", *text] if text else []


def _claimed(
    part: Part,
    claim: Claim,
    label: str,
    cells: Sequence[Cell],
    done: Mapping[str, dict[str, Any]],
    metrics: Sequence[str],
) -> list[str]:
    lines = {line.run: line for line in _lines(cells, done)}
    planned = len({cell.seed for cell in cells})
    empty = [label, f"0 of {planned}", *("" for _ in metrics), "not run yet"]
    if claim.run not in lines or part.against not in lines:
        return empty
    line, beside = _of_shared_seeds(lines[claim.run], lines[part.against])
    if not line.rows:
        return empty
    found, failing = [], []
    for metric in metrics:
        difference = over_seeds(line.table(metric) - beside.table(metric))
        above = f"{sum(mean > 0 for mean in difference.means)} of {len(difference.means)}"
        found.append(f"{difference.prompts.mean:+.3f} ({above})")
        if metric in claim.not_lower:
            # Written so that a mean that is not a number does not hold.
            holds = difference.prompts.mean >= -claim.not_lower[metric]
        else:
            own, other = line.over_seeds(metric).prompts, beside.over_seeds(metric).prompts
            holds = own.mean > other.mean and not overlap(own, other)
        if not holds:
            failing.append(METRICS[metric].label)
    verdict = f"no: {', '.join(failing)}" if failing else "yes"
    if len(line.rows) < planned:
        verdict = f"so far {verdict}"
    return [label, f"{len(line.rows)} of {planned}", *found, verdict]


def _in_text(metric: str) -> str:
    label = METRICS[metric].label
    return label[0].lower() + label[1:]


def _all(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _of_shared_seeds(a: Line, b: Line) -> tuple[Line, Line]:
    """Both lines with the seeds that both have, in one order."""
    mine, theirs = ({row["seed"]: row for row in one.rows} for one in (a, b))
    seeds = [seed for seed in mine if seed in theirs]
    return replace(a, rows=[mine[seed] for seed in seeds]), replace(b, rows=[theirs[seed] for seed in seeds])


def _section(
    part: Part, label: str, cells: Sequence[Cell], done: Mapping[str, dict[str, Any]], results: Results, pictures: Path
) -> list[str]:
    lines = _lines(cells, done)
    if not lines:
        return [f"Not run yet ({len({cell.key for cell in cells})} runs).", ""]
    missing = [line for line in lines if len(line.rows) < line.planned]
    absent = {_title(cell) for cell in cells} - {line.title for line in lines}
    starts = [start for model in _STARTS for start in _starts(lines, model)]
    columns = ["model", *(METRICS[metric].label for metric in _SHOWN)]
    text = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for line in [*starts, *lines]:
        text.append("| " + " | ".join([line.title, *(_cell(line, metric) for metric in _SHOWN)]) + " |")
    text.append("")
    text += _mixed_starts(lines)
    if missing or absent:
        unfinished = [f"{line.title} ({len(line.rows)} of {line.planned} seeds)" for line in missing]
        text += [f"Not finished: {', '.join([*unfinished, *sorted(absent)])}.", ""]
    text += [
        f"Training of {line.title}, seed {row['seed']}, was ended by a health rule: {row['stopped']}.\n"
        for line in lines
        for row in line.rows
        if row.get("stopped")
    ]
    if part.against is not None:
        text += _differences(part, lines)
    if len(lines) > 1:  # one alone is compared with nothing
        text += _pictures(part, label, starts, lines, results, pictures)
    return text


def _title(cell: Cell) -> str:
    return _with_values(cell.run, cell.values)


def _with_values(name: str, values: Mapping[str, Any]) -> str:
    said = ", ".join(f"{field.rpartition('.')[2]} {value}" for field, value in values.items())
    return name + (f" ({said})" if said else "")


def _lines(cells: Sequence[Cell], done: Mapping[str, dict[str, Any]]) -> list[Line]:
    titles = dict.fromkeys(_title(cell) for cell in cells)
    lines = []
    for title in titles:
        own = [cell for cell in cells if _title(cell) == title]
        rows = [done[cell.key] for cell in own if cell.key in done]
        if rows:
            lines.append(Line(title, own[0].run, own[0].values, rows, len(own)))
    return lines


def _starts(lines: Sequence[Line], model: str) -> list[Line]:
    """The base or SFT model, a row a seed; one line for each way in which the grid evaluates it."""
    ways: dict[str, tuple[dict[str, Any], dict[int, dict[str, Any]]]] = {}
    for line in lines:
        values = {field: value for field, value in line.values.items() if field.startswith("evaluation.")}
        _, by_seed = ways.setdefault(_with_values(_STARTS[model], values), (values, {}))
        by_seed |= {row["seed"]: row for row in line.rows}
    return [
        Line(title, model, values, list(by_seed.values()), len(by_seed), model)
        for title, (values, by_seed) in ways.items()
    ]


def _mixed_starts(lines: Sequence[Line]) -> list[str]:
    """Says of which seeds the runs began from different SFT checkpoints: one SFT model says one thing at one seed.

    Told by the words, since embeddings are rounded differently from one machine or version to another.
    """
    said: dict[tuple[int, float | None], set[str]] = {}
    for row in (row for line in lines for row in line.rows):
        spoken = json.dumps([row["models"]["sft"][metric] for metric in ("mean_tokens", "distinct_4")])
        said.setdefault((row["seed"], row.get("temperature")), set()).add(spoken)
    mixed = sorted({seed for (seed, _), spoken in said.items() if len(spoken) > 1})
    if not mixed:
        return []
    return [
        f"Not all runs of seed {', '.join(map(str, mixed))} began from the same SFT checkpoint: their differences hold "
        "that of the checkpoints too.",
        "",
    ]


def _cell(line: Line, metric: str) -> str:
    found = line.over_seeds(metric)
    digits = 1 if metric == "mean_tokens" else 3
    mean, low, high = (f"{value:.{digits}f}" for value in (found.prompts.mean, found.prompts.low, found.prompts.high))
    if mean == "nan":
        return ""
    text = f"{mean} [{low}, {high}]"
    if len(found.means) > 1:
        text += f" {min(found.means):.{digits}f} to {max(found.means):.{digits}f}"
    return text


def _differences(part: Part, lines: Sequence[Line]) -> list[str]:
    """What each run is beside the one the part compares with: paired by seed and prompt."""
    text: list[str] = []
    for line in lines:
        beside = next((one for one in lines if one.run == part.against and one.values == line.values), None)
        if beside is None or line is beside:
            continue
        line, beside = _of_shared_seeds(line, beside)
        if not line.rows:
            continue
        if not text:
            text = [
                f"Differences from {part.against}, paired by seed and prompt, with their own intervals over prompts "
                "(and over seeds, Student's t, where there are several):",
                "",
                "| model | seeds | " + " | ".join(METRICS[metric].label for metric in _DECIDING) + " |",
                "|" + "---|" * (len(_DECIDING) + 2),
            ]
        cells = []
        for metric in _DECIDING:
            difference = over_seeds(line.table(metric) - beside.table(metric))
            cell = _SIGNED.format(difference.prompts.mean, difference.prompts.low, difference.prompts.high)
            if math.isfinite(difference.seeds.low):
                cell += f" ({difference.seeds.low:+.3f} to {difference.seeds.high:+.3f})"
            cells.append(cell)
        text.append("| " + " | ".join([line.title, str(len(line.rows)), *cells]) + " |")
    return [*text, ""] if text else []


def _pictures(
    part: Part, label: str, starts: Sequence[Line], lines: Sequence[Line], results: Results, folder: Path
) -> list[str]:
    text: list[str] = []

    def keep(figure: Figure, name: str, description: str) -> None:
        path = folder / f"{part.name}-{label}-{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, metadata={"Software": None})
        text.extend([f"![{description}]({folder.name}/{path.name})", ""])

    n = lines[0].rows[0]["n"]
    swept = next((name for name, values in part.grid.items() if len(values) > 1), None)
    if swept is not None and not all(isinstance(value, (int, float)) for value in part.grid[swept]):
        swept = None
    # One look a run in all pictures of the part, under the name that its tables use.
    labels = {
        _look(line, swept): _STARTS.get(line.run, line.run) if swept and line.values else line.title
        for line in [*starts, *lines]
    }
    looks = {name: replace(look, label=labels[name]) for name, look in styles(list(labels)).items()}
    models = [
        ModelResult(
            _look(line, swept),
            line.title,
            {metric: line.over_seeds(metric).prompts for metric in METRICS if metric in line.rows[0]["models"]["dqo"]},
            series=line.run if swept and line.values else None,
        )
        for line in [*starts, *lines]
    ]
    keep(plane_figure(models, n=n, looks=looks), "plane", f"Quality against log-volume, {part.title}, {label}")
    if len(lines) > 2:  # beside what they started from, several trained models are one spot
        trained = models[len(starts) :]
        keep(plane_figure(trained, looks=looks), "trained", f"The trained models alone, {part.title}, {label}")
    if swept is not None:
        series = {
            run: {float(line.values[swept]): line for line in [*starts, *lines] if line.run == run}
            for run in dict.fromkeys(line.run for line in [*starts, *lines] if swept in line.values)
        }
        for_metric = {
            metric: {
                run: {value: line.over_seeds(metric).prompts for value, line in sorted(found.items())}
                for run, found in series.items()
            }
            for metric in ("quality", "log_volume")
        }
        setting = swept.rpartition(".")[2].replace("_", " ")
        keep(sweep_figure(for_metric, setting, looks), "sweep", f"Quality and log-volume over {setting}, {label}")
        return text
    keep(
        learning_curves_figure({_look(line, swept): _mean_history(line) for line in lines}, looks),
        "learning",
        f"Quality and log-volume of the rollouts over training, {label}",
    )
    passing = get_task(lines[0].rows[0]["task"]).passing
    curves = {_look(line, swept): curve_intervals(_curve(line, results, passing)) for line in [*starts, *lines]}
    file, title = ("best-of-n", "Expected best quality of n responses")
    if passing is not None:
        file, title = ("pass-at-n", "Chance that one of n responses is right (pass@n)")
        shown = sorted({1, 5, n} & set(range(1, n + 1)))
        text += ["| model | " + " | ".join(f"pass@{k}" for k in shown) + " |", "|" + "---|" * (len(shown) + 1)]
        for name, intervals in curves.items():
            cells = [f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in (intervals[k - 1] for k in shown)]
            text.append("| " + " | ".join([labels[name], *cells]) + " |")
        text.append("")
    keep(curve_figure(curves, "n", title, looks), file, f"{title}, {label}")
    return text


def _look(line: Line, swept: str | None) -> str:
    """What a line's style is known by: runs over the values of one number look alike."""
    return line.run if swept or not line.values else line.title


def _mean_history(line: Line) -> list[dict[str, float]]:
    """Mean over the seeds of the metrics that the curves show."""
    by_step: dict[float, list[dict[str, float]]] = {}
    for row in line.rows:
        for one in row["history"]:
            by_step.setdefault(one["step"], []).append(one)
    return [
        {
            "step": step,
            **{metric: float(np.mean([one[metric] for one in found])) for metric in ("quality", "log_volume")},
        }
        for step, found in sorted(by_step.items())
    ]


def _curve(line: Line, results: Results, passing: float | None) -> NDArray[np.float64]:
    """Expected best of 1..n responses for each prompt, or pass@n; the mean over the seeds, shape `(prompts, n)`."""
    curves = []
    for row in line.rows:
        qualities = [one["qualities"] for one in results.responses(row["key"]) if one["model"] == line.model]
        if passing is None:
            curves.append(expected_best(qualities))
        else:
            curves.append(pass_at_k([[None if q is None else q > passing for q in group] for group in qualities]))
    return np.mean(curves, axis=0)


def _provenance(rows: Sequence[dict[str, Any]], folder: str, command: str | None) -> list[str]:
    """Where the rows were made and lie, and how to make them again."""
    if not rows:
        return []
    seconds = sorted(row["seconds"] for row in rows)
    counts = {row["task"]: row["prompts"] for row in rows}
    prompts = (
        str(rows[0]["prompts"])
        if len(set(counts.values())) == 1
        else f"{', '.join(f'{count} ({task})' for task, count in sorted(counts.items()))}"
    )
    machines = ", ".join(sorted({row["machine"] for row in rows}))
    libraries = Counter(row["library"] for row in rows)
    text = [
        "## Where the numbers are from",
        "",
        f"{prompts} evaluation prompts and {rows[0]['n']} responses each. {sum(seconds) / 3600:.1f} hours on "
        f"{machines}: {seconds[0] / 60:.0f} to {seconds[-1] / 60:.0f} minutes a run, half of them at least "
        f"{seconds[len(seconds) // 2] / 60:.0f}, less what an interrupted run had done before; at most "
        f"{max(row['memory_gib'] for row in rows):.1f} GiB. The rows and all responses are in [{folder}]({folder}).",
        "",
        "Version of the library with a digest of its source (each row names its own): "
        f"{', '.join(f'{name} ({number} runs)' for name, number in sorted(libraries.items()))}.",
        "",
    ]
    if command is not None:
        text += ["To run what is missing and write this page again:", "", "```sh", command, "```", ""]
    return text
