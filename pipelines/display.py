"""What the user sees while a pipeline runs: one line a stage, with step, figures and time left."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dqo.recipe import Recipe

_SHOWN = {
    "quality": "quality",
    "log_volume": "log-volume",
    "demonstration_nll": "nll/token",
    "duplicate_rate": "duplicates",
    "unscorable_rate": "unscorable",
}


@dataclass
class StageState:
    """What is known of one stage.

    Attributes:
        title: Name for people.
        status: `waiting`, `running`, `done`, `cached` or `error`.
    """

    title: str
    status: str = "waiting"
    started: float = 0.0
    ended: float = 0.0
    step: int = 0
    first_step: int = 0
    first_step_time: float = 0.0
    total: int = 0
    message: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def seconds_left(self) -> float | None:
        """Time left at the mean pace of the steps seen so far."""
        done = self.step - self.first_step
        if self.status != "running" or done <= 0:
            return None
        return (time.time() - self.first_step_time) / done * (self.total - self.step)


class Follower:
    """Reads a progress file as it grows, from its present end, and keeps each stage's state.

    Without a file the stages wait; a subclass tells of them by its own `_read`.
    """

    def __init__(self, recipe: Recipe, path: Path | None = None, fresh: bool = False) -> None:
        self.stages = {"prepare": StageState("Prepare data"), "sft": StageState("DQO-SFT")}
        for variant in recipe.variants:
            self.stages[f"rl-{variant}"] = StageState(
                "DQO-RL" if variant == "dqo" else f"RL {variant.replace('_', '-')}"
            )
        self.stages |= {"evaluate": StageState("Evaluate"), "register": StageState("Register")}
        self._path = path
        # A fresh run begins by deleting the file, so what is there now will be gone.
        self._offset = path.stat().st_size if path is not None and path.is_file() and not fresh else 0
        self.error: str | None = None

    def update(self) -> list[tuple[str, dict[str, Any]]]:
        """Read new events; returns them with their stage's name."""
        events = list(self._read())
        for name, event in events:
            state = self.stages.setdefault(name, StageState(name))
            kind = event["event"]
            if kind in ("start", "cached"):
                state.status = "running" if kind == "start" else "cached"
                state.started = state.first_step_time = event["time"]
            elif kind == "done":
                state.status = "cached" if state.status == "cached" else "done"
                state.ended = event["time"]
            elif kind == "warning":
                state.warnings.append(event["message"])
            elif kind == "error":
                state.status, state.ended = "error", event["time"]
                self.error = event.get("message", "")
            if "total" in event:
                if not state.total or event["step"] < state.step or state.step == 0:
                    state.first_step, state.first_step_time = event["step"], event["time"]
                state.step, state.total = event["step"], event["total"]
            if event.get("message") and kind not in ("error", "warning"):
                state.message = event["message"]
            state.metrics |= event.get("metrics", {})
        return events

    def finish(self) -> None:
        """Mark stages that no process reported as taken from Kubeflow's cache."""
        for state in self.stages.values():
            if state.status == "waiting":
                state.status = "cached"

    def _read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._path is None or not self._path.is_file():
            return
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                event = json.loads(line)
                yield event["stage"], event


class Display:
    """Draws the stages: a live table on a terminal, plain lines elsewhere (CI, a file)."""

    def __init__(self, console: Console, follower: Follower) -> None:
        self._console = console
        self._follower = follower
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        self._printed: dict[str, int] = {}

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()

    def refresh(self) -> None:
        """Read new events and draw them."""
        events = self._follower.update()
        if self._live is not None:
            self._live.update(self._table())
            return
        for name, event in events:
            self._print_line(name, event)

    def _print_line(self, name: str, event: dict[str, Any]) -> None:
        state, kind = self._follower.stages[name], event["event"]
        if kind == "step":
            # Every fifth of a stage is often enough where lines pile up.
            share = 5 * event["step"] // max(event["total"], 1)
            if share <= self._printed.get(name, 0) and event["step"] != event["total"]:
                return
            self._printed[name] = share
            figures = _figures(state.metrics)
            text = f"  {state.title}: {event['step']}/{event['total']}  {figures}  {event.get('message', '')}"
        elif kind == "done":
            text = f"  {state.title}: done in {_duration(state.ended - state.started)}"
        elif kind == "error":
            text = f"  {state.title}: failed"
        elif kind == "warning":
            text = f"  {state.title}: warning: {event['message']}"
        else:
            text = f"{state.title}" + (" (finished before, reused)" if kind == "cached" else "")
        self._console.print(text.rstrip(), highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Group:
        table = Table.grid(padding=(0, 2))
        marks = {"waiting": ("·", "dim"), "running": ("▶", "cyan"), "done": ("✓", "green"), "cached": ("✓", "green"),
                 "error": ("✗", "red")}  # fmt: skip
        for state in self._follower.stages.values():
            mark, style = marks[state.status]
            bar: Any = ""
            if state.status == "running" and state.total:
                bar = ProgressBar(total=state.total, completed=state.step, width=20)
            elif state.status == "cached":
                bar = Text("reused", style="dim")
            elif state.ended:
                bar = Text(_duration(state.ended - state.started), style="dim")
            elif state.status == "running":
                bar = Text("starting", style="dim")
            steps = f"{state.step}/{state.total}" if state.total and state.status == "running" else ""
            left = state.seconds_left
            note = f"{_duration(left)} left" if left is not None else ""
            detail = _figures(state.metrics) or state.message
            table.add_row(Text(mark, style=style), Text(state.title, style="" if state.ended else style), bar,
                          Text(steps), Text(detail), Text(note, style="dim"))  # fmt: skip
        warnings = [
            Text(f"! {state.title}: {warning}", style="yellow")
            for state in self._follower.stages.values()
            for warning in state.warnings
        ]
        return Group(table, *warnings)


def watch(console: Console, follower: Follower, process: subprocess.Popen[bytes]) -> None:
    """Draw a process's stages until it ends.

    Args:
        console: Where to draw.
        follower: Reads what the stages report.
        process: Runs them; it ended well with status 0.

    Raises:
        KeyboardInterrupt: On Ctrl-C or SIGTERM; the process still runs then.
    """
    # Both explicitly: a shell starts background jobs with SIGINT ignored, and Python then leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Display(console, follower) as display:
        while process.poll() is None:
            display.refresh()
            time.sleep(0.25)
        display.refresh()
        if process.returncode == 0:
            follower.finish()


def _figures(metrics: dict[str, float]) -> str:
    """The figures that are there; a share of responses that nothing could score only where there is one."""
    shown = {name: value for name, value in metrics.items() if name != "unscorable_rate" or value > 0}
    return "  ".join(f"{label} {shown[name]:.2f}" for name, label in _SHOWN.items() if name in shown)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def summary(console: Console, labels: dict[str, str], metrics: dict[str, Any], confidence: float) -> None:
    """Print the run's models with the figures that matter; the three that the finding rests on with intervals."""
    columns = {
        "quality": ("quality", True),
        "log_volume": ("log-volume", True),
        "self_bleu_diversity": ("1 - self-BLEU", True),
        "best_of_n": ("best", False),
        "duplicate_rate": ("dupl.", False),
    }
    table = Table(
        title=f"Means over the evaluation prompts [{100 * confidence:g}% interval]",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    for title, _ in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    for name, values in metrics.items():
        cells = [_cell(values[metric], interval) for metric, (_, interval) in columns.items()]
        table.add_row(labels.get(name, name).partition(" (")[0], *cells)
    # As wide as it is: a cell that is cut says something else, and lines may wrap where the terminal is narrower.
    table.width = console.measure(table, options=console.options.update(max_width=400)).maximum
    console.print(table, crop=False)


def _cell(value: dict[str, float | None], interval: bool) -> str:
    if value["mean"] is None:
        return "n/a"
    if not interval or value["low"] is None:
        return f"{value['mean']:.2f}"
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
