"""The command `compare`: evaluated models side by side, in the terminal, as a page, and in MLflow."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dqo import tracking
from dqo.errors import DQOError
from dqo.evaluation import comparison, comparison_report, comparison_sources, figures
from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.comparison import Compared, Difference
from dqo.evaluation.page import number
from dqo.evaluation.statistics import Interval
from dqo.files import write_text
from dqo.shell import short
from pipelines import stores
from pipelines.stores import check_file

_MARKS = {"better": ("▲", "green"), "worse": ("▼", "red"), "differs": ("◆", "cyan"), "not told apart": ("≈", "dim")}


def run(given: Sequence[str], out: Path, uri: str | None, html: Path | None, json_: Path | None) -> int:
    """Compare models with the first one, show and log the result; returns the exit status.

    Args:
        given: What names each model, as documented in docs/comparison.md.
        out: Folder given to `dqo run`, whose MLflow store is read where no address is given.
        uri: MLflow's address; `None` for MLFLOW_TRACKING_URI, else the store in `out`.
        html: Page to write.
        json_: File to write.

    Raises:
        DQOError: If something that was given cannot be found, read, compared or written.
    """
    for option, path, suffix in (("--html", html, ".html"), ("--json", json_, ".json")):
        check_file(option, path, suffix)
    store = stores.find(out, uri)
    models, experiment = comparison_sources.load(given, store)
    result = comparison.compare(models)
    console = Console(highlight=False)
    _show(console, result)
    document = json.dumps(comparison.to_document(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    links = [
        (f"Evaluation of {model.label} in MLflow", tracking.run_link(store or "", experiment or "", model.run_id))
        for model in result.models
        if model.run_id is not None
    ]
    page = comparison_report.render(result, links)
    for path, text in ((html, page), (json_, document)):
        if path is not None:
            try:
                write_text(path, text)
            except OSError as error:
                raise DQOError(f"{path}: cannot be written ({error.strerror})") from None
            console.print(f"Written: {short(path)}", soft_wrap=True, markup=False)
    if store is None or experiment is None:
        console.print("Not logged to MLflow: nothing that was given leads to one of its experiments.", soft_wrap=True)
        return 0
    run_id = _log(store, experiment, result, page, document)
    console.print(f"MLflow: {stores.where(store, experiment, run_id, out)}", soft_wrap=True, markup=False)
    return 0


def _log(store: str, experiment: str, result: Compared, page: str, document: str) -> str:
    """Log everything in a run of its own; returns the run's id.

    Raises:
        DQOError: If MLflow or its artifact store does not take it.
    """
    import mlflow

    client = mlflow.MlflowClient()
    labels = [model.label for model in result.models]
    run_id = None
    try:
        tags = {tracking.STAGE_TAG: "compare"}
        run_id = str(client.create_run(experiment, run_name=f"compare {', '.join(labels)}", tags=tags).info.run_id)
        run = tracking.Run(run_id)
        run.params({f"model_{i}": model.source for i, model in enumerate(result.models, start=1)})
        run.params({f"label_{i}": label for i, label in enumerate(labels, start=1)})
        run.params({"prompts": result.prompts, "confidence": result.confidence})
        run.metrics(comparison.to_metrics(result))
        for name, columns in comparison.to_tables(result).items():
            run.table(columns, name)
        for name, figure in _figures(result).items():
            run.figure(figure, name)
        client.log_text(run_id, page, "comparison.html")
        client.log_text(run_id, document, "comparison.json")
        words = [
            " ".join([comparison.headline(result, position), *comparison.details(result, position)])
            for position in range(1, len(labels))
        ]
        run.tags({"mlflow.note.content": "\n\n".join(words)})
        run.finish()
    except (DQOError, mlflow.exceptions.MlflowException, OSError) as error:  # the first is what `tracking.Run` raises
        if run_id is not None:
            with suppress(mlflow.exceptions.MlflowException):
                client.set_terminated(run_id, "FAILED")
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise DQOError(
            f"MLflow at {tracking.public(store)!r} does not take the comparison ({reason}); what is printed "
            "above holds all the same"
        ) from None
    return run_id


def _figures(result: Compared) -> dict[str, Any]:
    """The figures of the MLflow run by file name."""
    models = comparison_report.results(result)
    differences = {
        metric: [None if one is None else one.interval for one in found] for metric, found in result.differences.items()
    }
    drawn = {"differences.png": figures.differences_figure(models, differences)}
    if result.same_n and figures.measured(models, "log_volume", "quality"):
        drawn["plane.png"] = figures.plane_figure(models, n=result.models[0].n)
    if any(rate is not None for row in result.win_rates for rate in row):
        rates = [[None if rate is None else rate.raw for rate in row] for row in result.win_rates]
        drawn["win_rates.png"] = figures.win_rates_figure([model.label for model in models], rates)
    return drawn


def _show(console: Console, result: Compared) -> None:
    """Print one table, a column a model, and what it says in words."""
    first = result.models[0].label
    table = Table(
        title=f"Means over {result.prompts} common prompts [{100 * result.confidence:g}% interval]; below, the "
        f"difference to {first}, p adjusted",
        title_justify="left", box=None, padding=(0, 2, 0, 0),
    )  # fmt: skip
    table.add_column("metric", no_wrap=True)
    for model in result.models:
        table.add_column(Text(model.label), no_wrap=True)
    for metric, means in result.means.items():
        arrow = {"higher": " ↑", "lower": " ↓"}.get(METRICS[metric].direction, "")
        cells = [_cell(mean, found) for mean, found in zip(means, result.differences[metric], strict=True)]
        table.add_row(METRICS[metric].label + arrow, *cells)
    if result.win_rates[1][0] is not None:
        cells = [Text("")]
        for row in result.win_rates[1:]:
            rates = row[0]
            assert rates is not None
            controlled = f"{comparison.rate_text(rates.controlled)} at equal lengths"
            cells.append(Text.assemble(comparison.rate_text(rates.raw), "\n", (controlled, "dim")))
        table.add_row("Win rate by quality", *cells)
    judge = result.models[0].judge
    if result.judged is not None and judge is not None:
        rates_ = ["the opponent" if rate is None else comparison.rate_text(rate) for rate in result.judged]
        table.add_row(f"Judge's win rate against {judge.against}", *map(Text, rates_))
    for metric, reason in result.left_out.items():
        table.add_row(METRICS[metric].label, Text(f"not compared: {reason}", style="dim"))
    # As wide as it is: a cell that is cut says something else, and lines may wrap where the terminal is narrower.
    table.width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.print(table, crop=False)
    console.print("[green]▲[/] better  [red]▼[/] worse  [cyan]◆[/] different, neither way is better  "
                  "[dim]≈[/] no difference is shown", soft_wrap=True)  # fmt: skip
    console.print()
    for position in range(1, len(result.models)):
        console.print(Text(comparison.headline(result, position), style="bold"), soft_wrap=True)
        for sentence in comparison.details(result, position):
            console.print(Text(f"  {sentence}"), soft_wrap=True)
    console.print("[dim]About these trained models on prompts like these, not about other training seeds.[/]")
    for warning in result.warnings:
        console.print(Text(f"! {warning}", style="yellow"), soft_wrap=True)
    console.print()


def _cell(mean: Interval, difference: Difference | None) -> Text:
    bounds = f" [{number(mean.low)}, {number(mean.high)}]" if math.isfinite(mean.low) else ""
    text = Text(f"{number(mean.mean)}{bounds}")
    if difference is not None and difference.verdict in _MARKS:
        mark, style = _MARKS[difference.verdict]
        text.append(f"\n{mark} ", style=style)
        text.append(
            f"{comparison.difference_text(difference)}, p {comparison.p_text(difference.adjusted)}", style="dim"
        )
    return text
