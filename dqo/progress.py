"""What a running stage tells the outside: one JSON line an event, appended to a file.

The command line follows the file and draws it. The display is no part of any stage, so nothing a stage computes depends
on who watches.
"""

import json
import time
from pathlib import Path
from typing import Any, Literal

Event = Literal["start", "step", "warning", "done", "cached", "error"]


class Progress:
    """Reports the events of one stage.

    Args:
        path: File to append to.
        stage: Name that the display shows, e.g. `rl: dqo`.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self._path = path
        self._stage = stage

    def __call__(
        self, event: Event, step: int = 0, total: int = 0, message: str = "", metrics: dict[str, float] | None = None
    ) -> None:
        """Append one event; `step` of `total` is in the stage's own unit (optimiser steps, models, rows)."""
        line: dict[str, Any] = {"time": time.time(), "stage": self._stage, "event": event}
        if total:
            line |= {"step": step, "total": total}
        if message:
            line["message"] = message
        if metrics:
            line["metrics"] = {name: value for name, value in metrics.items() if value == value}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
