"""Tasks by the name a recipe gives them. A new task is one module and one line here (docs/tasks.md)."""

import importlib
import re

from dqo.errors import DQOError
from dqo.tasks.base import PublicSet, Task

__all__ = ["TASKS", "PublicSet", "Task", "get_task", "problem"]

# Where each one is, as module:NAME; imported when it is asked for, so that a recipe can be checked at once.
TASKS = {
    "story": "dqo.tasks.story:STORY",
    "summarization": "dqo.tasks.summarization:SUMMARIZATION",
}
_OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def problem(name: str) -> str | None:
    """Say why a name cannot be that of a task, without importing anything; `None` when it can."""
    if name in TASKS or _OWN.fullmatch(name):
        return None
    return f"got {name!r}; expected one of: {', '.join(TASKS)}, or module:NAME of a task of your own"


def get_task(name: str) -> Task:
    """Return the task a recipe names: one of `TASKS`, or `module:NAME` of a `Task` that can be imported.

    Raises:
        DQOError: If there is no such task.
    """
    if reason := problem(name):
        raise DQOError(f"task: {reason}")
    module, _, attribute = TASKS.get(name, name).partition(":")
    try:
        task = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DQOError(f"task: got {name!r}, which cannot be imported ({error}); expected module:NAME") from error
    if not isinstance(task, Task):
        raise DQOError(f"task: {name!r} is a {type(task).__name__}; expected a dqo.tasks.Task")
    return task
