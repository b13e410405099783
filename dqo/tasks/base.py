"""What a task is: how a row becomes a prompt, when a row is usable, and what a response is worth."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, str]


@dataclass(frozen=True)
class Task:
    """One kind of problem a policy is trained on.

    A row is a mapping with `references` (list of str, the demonstrations) and the task's own `fields`. Every callable
    is pure and a module-level function, so that a task can be pickled and called from several processes.
    """

    name: str
    """What a recipe calls it."""
    fields: tuple[str, ...]
    """Columns a row needs beside `references`."""
    bundled: Path
    """The task's own small data set, one JSON object a line."""
    licence: str
    """SPDX identifier of the bundled data."""
    prompt: Callable[[Row], list[Message]]
    """Chat messages (`role`, `content`) that ask for a response to the row."""
    check: Callable[[Row], str | None]
    """Why the row is unusable, naming field and value; `None` when it is usable. Accepts any mapping."""
    reward: Callable[[str, Row], float | None]
    """Quality of a response in [0, 1]; `None` when it cannot be judged. Expects a row that passes `check`."""
