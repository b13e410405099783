"""The command `calibrate`: what it prints, and how it ends."""

import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from dqo.errors import DQOError
from dqo.files import write_jsonl, write_text
from dqo.recipe import Recipe
from dqo.shell import short

if TYPE_CHECKING:
    from dqo.calibration import Calibration
    from dqo.evaluation.statistics import Interval

_KINDS = {
    "paraphrase": "the same in other words",
    "same_topic": "another answer about the same things",
    "unrelated": "an unrelated sentence",
}


def run(
    recipe: Recipe, prompts: int, share: float | None, checkpoint: Path | None, out: Path | None, document: Path | None
) -> int:
    """Calibrate a recipe and print what was found; returns the exit status, 1 where training would be pointless.

    Args:
        recipe: The recipe.
        prompts: Training prompts to sample.
        share: Share of the quality's spread for the balanced alpha; `None` takes the library's.
        checkpoint: Checkpoint to sample from, `None` for the base model.
        out: Folder for `calibration.json` and `responses.jsonl`; `None` writes none.
        document: File for the JSON alone; `None` writes none.

    Raises:
        DQOError: As `dqo.calibration.calibrate`, or if a file cannot be written.
    """
    files = [path for path in (document, out and out / "calibration.json", out and out / "responses.jsonl") if path]
    for path in files:
        _check_writable(path)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    from dqo.calibration import SHARE, calibrate

    status = errors.status("loading the libraries") if errors.is_terminal else nullcontext()
    with status as shown:
        result = calibrate(
            recipe,
            prompts,
            checkpoint,
            SHARE if share is None else share,
            lambda words: shown.update(words) if shown is not None else None,
        )
    show(console, result)
    try:
        if document is not None:
            write_text(document, result.to_json())
        if out is not None:
            write_text(out / "calibration.json", result.to_json())
            write_jsonl(out / "responses.jsonl", result.responses)
    except OSError as error:
        raise DQOError(f"{error.filename or document or out}: cannot be written ({error.strerror})") from None
    if files:
        console.print(f"Written: {', '.join(short(path.absolute()) for path in files)}", soft_wrap=True)
    for problem in result.problems:
        print(f"dqo: problem: {problem}", file=sys.stderr)
    return 1 if result.problems else 0


def _check_writable(path: Path) -> None:
    """Refuse before minutes are spent what could not be written after them."""
    if path.is_dir():
        raise DQOError(f"{path}: is a folder; expected the name of a file")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise DQOError(f"{path}: {there} is not a folder that can be written to")


def show(console: Console, result: "Calibration") -> None:
    """Print a calibration as tables and sentences."""
    lengths, encoder, cost = result.lengths, result.encoder, result.cost
    console.print(
        f"[bold]{result.recipe}[/] ({result.digest}): {result.prompts} training prompts, {result.k} responses each, "
        f"from {result.policy}; nothing was trained",
        soft_wrap=True,
    )
    console.print()

    table = _table("Differences within a group", "", "std", "range", "mean", f"alpha for {result.share:.0%}", "share")
    quality = result.quality
    table.add_row("quality", _number(quality.std), _number(quality.range), _number(quality.mean), "", "")
    rows = [(f"bonus, {one.name}" + (" (the recipe's)" if one.name == result.score else ""), one)
            for one in result.scores]  # fmt: skip
    if result.ungated is not None:
        rows.insert(1, ("  if every response earned it", result.ungated))
    for name, one in rows:
        table.add_row(
            name,
            _number(one.bonus.std),
            _number(one.bonus.range),
            _number(one.bonus.mean),
            _number(one.balanced_alpha),
            "n/a" if one.share is None else f"{one.share:.0%}",
        )
    _print(console, table)
    console.print(
        f"[dim]share: the bonus's weight beside the quality's at alpha = {result.alpha:g}; each score has its own "
        "unit[/]",
        soft_wrap=True,
    )
    console.print(
        f"Ties: {result.tied_groups:.0%} of the groups have equal rewards, {result.tied_pairs:.0%} of the pairs within "
        f"groups; without a reward {result.unscorable:.0%}, without a bonus {result.no_bonus:.0%} of the responses",
        soft_wrap=True,
    )
    console.print()

    console.print("[bold]alpha[/]")
    for sentence in result.reasoning:
        console.print(f"  {sentence}", soft_wrap=True)
    console.print()

    console.print(
        f"[bold]Tokens[/]: mean {lengths.mean:.1f}, median {lengths.median:g}, 95% up to {lengths.p95:g}, longest "
        f"{lengths.longest} of {lengths.limit}; {lengths.truncated:.0%} truncated, {result.encoder_cut:.0%} cut by the "
        "encoder",
        soft_wrap=True,
    )
    console.print()

    table = _table(
        "Encoder, on 60 labelled pairs", "second sentence", "similarity", "AUC of a paraphrase", "one meaning"
    )
    areas = {"same_topic": encoder.auc_same_topic, "unrelated": encoder.auc_unrelated}
    for kind, similarity in encoder.similarity.items():
        area = _interval(areas[kind]) if kind in areas else ""
        table.add_row(_KINDS[kind], _interval(similarity), area, f"{encoder.linked[kind]:.0%}")
    _print(console, table)
    console.print(
        "[dim]AUC: how often a paraphrase is more similar than this kind of pair; one meaning: share that "
        "method.distinct_threshold takes for one[/]",
        soft_wrap=True,
    )
    if encoder.references is not None:
        found = encoder.references
        console.print(
            f"References of {found.prompts} prompts: similarity {found.within:.2f} within a prompt, "
            f"{found.between:.2f} between prompts, AUC {found.auc:.2f}",
            soft_wrap=True,
        )
    console.print()

    table = _table(
        "Seconds of an RL step here", "sampling", "reward", "embedding", "update (estimate)", "step (estimate)"
    )
    table.add_row(*(f"{value:.2f}" for value in (cost.sampling, cost.reward, cost.embedding, cost.update, cost.step)))
    _print(console, table)
    console.print(
        f"RL of {cost.variants} variant{'s' * (cost.variants > 1)} with {cost.steps} steps each: about "
        f"{_minutes(cost.run)} (estimate)",
        soft_wrap=True,
    )
    notes = []
    if cost.processes > 1:
        notes.append(f"with {cost.processes} processes, each as fast as the one here and without what they exchange")
    if cost.engine != "transformers":
        notes.append(f"sampled here by transformers; the recipe's {cost.engine} is usually faster")
    if notes:
        console.print(f"[dim]{'; '.join(notes)}[/]", soft_wrap=True)
    for remark in result.remarks:
        console.print(f"[yellow]! {remark}[/]", soft_wrap=True)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=f"[bold]{title}[/]", title_justify="left", title_style="", box=None, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True, justify="left" if not first or " " in first else "right")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print(console: Console, table: Table) -> None:
    """As wide as it is; see `pipelines.display.summary`."""
    table.width = console.measure(table, options=console.options.update(max_width=400)).maximum
    console.print(table, crop=False)


def _number(value: float | None) -> str:
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _interval(value: "Interval") -> str:
    return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
