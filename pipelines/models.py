"""The commands on registered models: `models`, `promote` and `rollback`."""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dqo import alias_trail, tracking
from dqo.alias_trail import CHALLENGER, CHAMPION, Event, Moved
from dqo.errors import DQOError
from dqo.evaluation import runs
from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.page import number
from dqo.files import write_text
from dqo.mlflow_errors import in_words
from dqo.recipe import Judge, load
from dqo.shell import dqo_command, short
from pipelines import stores

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

    from dqo.gate import AskedJudge

_SHOWN = ("quality", "log_volume", "self_bleu_diversity")
_MOVES = 10
_WIDEST = 1000


def promote(
    name: str, version: str, recipe: Path | None, force: str | None, out: Path, uri: str | None
) -> int:  # fmt: skip
    """Make a version champion if its gate passes; returns the exit status, 1 where it does not.

    Args:
        name: Registered model.
        version: Its number, or an alias that it holds.
        recipe: File whose gate is applied, and whose judge and demands on its audit are asked for; `None` takes those
            of the version's recipe.
        force: Why it is to be champion all the same.
        out: Folder given to `dqo run`.
        uri: MLflow's address.

    Raises:
        DQOError: As `promotion.promote`, or if the recipe or the store cannot be read.
    """
    given = None if recipe is None else load(recipe)
    judge = None if given is None or given.gate.judge is None else given.judge
    asked = None if judge is None else _asked(judge)
    from dqo import promotion

    client = tracking.client_of(stores.require(out, uri), "promoted")
    if not version.isdecimal():
        version = str(runs.version_of(client, f"{name}@{version}", f"{name}@{version}").version)
    gate = None if given is None else given.gate
    done = promotion.promote(client, name, version, gate, force, waiting=_wait, asked=asked)
    console = Console(highlight=False)
    for reason in done.gate.reasons if done.gate is not None else [f"no evaluation: {done.gate_missing}"]:
        console.print(Text(f"  gate: {reason}"), soft_wrap=True)
    if done.moved is None:
        champion = alias_trail.holder(client.get_registered_model(name), CHAMPION)
        is_now = f"version {champion} stays champion" if champion else "no version is champion"
        console.print(Text(
            f"Gate not passed: {is_now}. To promote version {version} all the same, give the reason: --force REASON"
        ), soft_wrap=True)  # fmt: skip
        return 1
    _show_move(console, name, version, done.moved)
    return 0


def _asked(judge: Judge) -> "AskedJudge":
    from dqo.gate import AskedJudge
    from dqo.judges import identity_by_recipe
    from dqo.judges.labelled import labelled_of

    pairs = None if judge.labelled is None else labelled_of(judge).digest
    return AskedJudge(judge.audit, pairs, identity_by_recipe(judge))


def rollback(name: str, why: str, out: Path, uri: str | None) -> int:
    """Give `champion` back to the version that had it before; returns the exit status.

    Raises:
        DQOError: As `promotion.rollback`, or if there is no store.
    """
    from dqo import promotion

    client = tracking.client_of(stores.require(out, uri), "rolled back")
    moved = promotion.rollback(client, name, why, waiting=_wait)
    _show_move(Console(highlight=False), name, moved.event.version if moved.event else None, moved)
    return 0


def show(name: str | None, repair: bool, json_: Path | None, out: Path, uri: str | None) -> int:
    """List the registered models, or the versions of one with their figures; returns the exit status.

    Args:
        name: Registered model; `None` lists them all.
        repair: End the moves of aliases that were interrupted.
        json_: File to write.
        out: Folder given to `dqo run`.
        uri: MLflow's address.

    Raises:
        DQOError: If there is no store, no such model, or the file cannot be written.
    """
    if repair and name is None:
        raise DQOError("--repair: expected the name of a registered model with it")
    stores.check_file("--json", json_, ".json")
    client = tracking.client_of(stores.require(out, uri), "listed")
    console = Console(highlight=False)
    with in_words("list the registered models"):
        document = _all(console, client) if name is None else _one(console, client, name, repair)
    if json_ is not None:
        try:
            write_text(json_, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise DQOError(f"{json_}: cannot be written ({error.strerror})") from None
        console.print(f"Written: {short(json_)}", soft_wrap=True, markup=False)
    return 0


def _wait(event: Event) -> None:
    what = f"{event.action} of {event.alias} by {event.by}, begun {event.at}"
    Console(stderr=True, highlight=False).print(
        f"waiting for another move: {what} (at most {alias_trail.PATIENCE:g} s where it is dead)",
        soft_wrap=True, markup=False,
    )  # fmt: skip


def _show_move(console: Console, name: str, version: str | None, moved: Moved) -> None:
    for event in moved.repaired:
        console.print(Text(f"Repaired: {_interrupted(name, event)}", style="yellow"), soft_wrap=True)
    if moved.event is None:
        console.print(Text(f"{name} version {version} is {CHAMPION} already."), soft_wrap=True)
        return
    before = f", before it version {moved.event.origin}" if moved.event.origin else ""
    forced = " by force" if moved.event.forced else ""
    console.print(Text(f"{name} version {moved.event.version} is {CHAMPION}{forced}{before}."), soft_wrap=True)


def _interrupted(name: str, event: Event) -> str:
    what = f"the {event.action} by {event.by} of {event.at}"
    if event.state == "done":
        return f"{what} had stopped after {event.alias} was moved to version {event.version}; it is confirmed"
    if event.state == "interrupted":
        return (
            f"{what} had stopped before {event.alias} was moved; {name} is as it was, repeat it if it is still wanted"
        )
    return f"{what} has not ended: it is at work, or was interrupted"


# --- lists ---


def _all(console: Console, client: "MlflowClient") -> list[dict[str, Any]]:
    found: list[RegisteredModel] = []
    token = None
    while True:
        page = client.search_registered_models(page_token=token)
        found += page
        token = page.token
        if not token:
            break
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("model", "versions", CHAMPION, CHALLENGER, "changed"):
        table.add_column(column, no_wrap=True)
    rows: list[dict[str, Any]] = []
    for model in found:
        versions = runs.versions_of(client, model.name)
        aliases = client.get_registered_model(model.name).aliases
        held = {alias: str(aliases[alias]) if alias in aliases else None for alias in (CHAMPION, CHALLENGER)}
        rows.append(
            {"name": model.name, "versions": len(versions), **held, "changed": _day(model.last_updated_timestamp)}
        )
        table.add_row(*(Text("-" if value is None else str(value)) for value in rows[-1].values()))
    if not rows:
        console.print("No model is registered; `dqo run RECIPE` ends with registering one.", markup=False)
        return rows
    _print(console, table)
    console.print(
        f"\nVersions and figures of one: {dqo_command('models', rows[0]['name'])}", soft_wrap=True, markup=False
    )
    return rows


def _one(console: Console, client: "MlflowClient", name: str, repair: bool) -> dict[str, Any]:
    model = runs.registered_model(client, name, name)
    if repair:
        repaired = alias_trail.repair(client, name)
        for event in repaired:
            console.print(Text(f"Repaired: {_interrupted(name, event)}", style="yellow"), soft_wrap=True)
        if not repaired:
            console.print("Nothing to repair.")
        model = client.get_registered_model(name)
    held: dict[str, list[str]] = {}
    for alias, holder in sorted(model.aliases.items()):
        held.setdefault(str(holder), []).append(alias)
    versions = runs.versions_of(client, name)
    rows = [_row(client, version, held.get(number_, [])) for number_, version in reversed(versions.items())]
    trail = alias_trail.read(model)
    if rows:
        _print(console, _versions_table(rows))
    else:
        console.print(Text(f"{name} has no versions."))
    for note in _notes(name, rows, trail):
        console.print(Text(note, style="yellow"), soft_wrap=True)
    moves = [event for event in trail if event.alias == CHAMPION and event.state in ("done", "interrupted")]
    if moves:
        console.print()
        _print(console, _moves_table(moves[-_MOVES:], len(moves)))
    if CHAMPION in model.aliases and CHALLENGER in model.aliases and len(held) > 1:
        command = dqo_command("compare", f"{name}@{CHAMPION}", f"{name}@{CHALLENGER}")
        console.print(f"\nWhich is better, prompt by prompt: {command}", soft_wrap=True, markup=False)
    return {"name": name, "versions": rows, "trail": [asdict(event) for event in trail]}


def _row(client: "MlflowClient", version: "ModelVersion", aliases: list[str]) -> dict[str, Any]:
    tags = version.tags
    return {
        "version": str(version.version),
        "aliases": aliases,
        "model": tags.get("dqo.model"),
        "made": _day(version.creation_timestamp),
        "evaluated_on": tags.get("dqo.evaluated_on"),
        "gate_passed": {"true": True, "false": False}.get(tags.get("gate.passed", "")),
        "metrics": _figures(client, version),
        "recipe": tags.get("dqo.recipe"),
        "recipe_digest": tags.get("dqo.recipe_digest"),
        "alpha": tags.get("dqo.alpha"),
        "run": version.run_id or None,
    }


def _figures(client: "MlflowClient", version: "ModelVersion") -> dict[str, dict[str, float]]:
    """Mean and interval of each metric: those of the logged model, else the means among the version's tags."""
    from mlflow.exceptions import MlflowException

    found: dict[str, dict[str, float]] = {}
    source = version.source or ""
    model_id = version.model_id or (source.removeprefix("models:/") if source.startswith("models:/m-") else None)
    try:
        logged = client.get_logged_model(model_id).metrics if model_id else None
    except MlflowException:  # deleted
        logged = None
    # MLflow adds those of the training run by itself, without the data; ours name it, and come last.
    for metric in sorted(logged or [], key=lambda one: (one.dataset_digest is not None, one.timestamp)):
        name, kind = metric.key.removeprefix("eval/"), "mean"
        for bound in ("low", "high"):
            if name.endswith(f"_{bound}"):
                name, kind = name.removesuffix(f"_{bound}"), bound
        if name in METRICS and metric.key.startswith("eval/"):
            found.setdefault(name, {})[kind] = metric.value
    for tag, value in version.tags.items():
        name = tag.removeprefix("eval.")
        if name in METRICS and tag.startswith("eval.") and name not in found:
            try:
                mean = float(value)
            except ValueError:  # edited by hand
                continue
            if math.isfinite(mean):
                found[name] = {"mean": mean}
    return found


def _versions_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("version", "model", "aliases", "made"):
        table.add_column(column, no_wrap=True)
    for metric in _SHOWN:
        table.add_column(METRICS[metric].label, no_wrap=True)
    for column in ("gate", "alpha", "evaluated on"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        gate = {True: Text("passed", style="green"), False: Text("not passed", style="red"), None: Text("-")}
        table.add_row(
            row["version"], row["model"] or "-", Text(", ".join(row["aliases"]) or "-"), row["made"],
            *(_cell(row["metrics"].get(metric)) for metric in _SHOWN),
            gate[row["gate_passed"]], Text(row["alpha"] or "-"), Text(row["evaluated_on"] or "not evaluated"),
        )  # fmt: skip
    return table


def _cell(figure: dict[str, float] | None) -> str:
    if figure is None or "mean" not in figure:
        return "-"
    bounds = f" \\[{number(figure['low'])}, {number(figure['high'])}]" if {"low", "high"} <= figure.keys() else ""
    return f"{number(figure['mean'])}{bounds}"


def _moves_table(moves: list[Event], count: int) -> Table:
    title = f"Moves of {CHAMPION}, the last {len(moves)} of {count}" if len(moves) < count else f"Moves of {CHAMPION}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("when (UTC)", "from", "to", "how", "by", "why"):
        table.add_column(column, no_wrap=True)
    for event in moves:
        how = event.action + (" by force" if event.forced else "")
        how += " (interrupted)" if event.state == "interrupted" else ""
        reasons = event.gate.get("reasons") or [""]
        why = event.why or ("gate passed" if event.gate.get("passed") else str(reasons[0]))
        table.add_row(*(Text(str(cell)) for cell in (
            event.at.rstrip("Z").replace("T", " "), event.origin or "-", event.version or "-", how, event.by, why
        )))  # fmt: skip
    return table


def _notes(name: str, rows: list[dict[str, Any]], trail: list[Event]) -> list[str]:
    notes = []
    bases = {row["evaluated_on"] for row in rows if row["evaluated_on"]}
    if len(bases) > 1:
        notes.append(
            "! not all were evaluated on the same prompts with as many responses: log-volumes and means then say "
            "nothing about each other; `dqo compare` pairs what is common"
        )
    for event in alias_trail.interrupted(trail):
        command = dqo_command("models", name, "--repair")
        notes.append(f"! {_interrupted(name, event)}; the next promotion mends it, or: {command}")
    return notes


def _print(console: Console, table: Table) -> None:
    """Print a table as wide as it is: a cell that is cut says something else."""
    table.width = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
    console.print(table, crop=False)


def _day(milliseconds: int | None) -> str | None:
    return None if milliseconds is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(milliseconds / 1000))
