"""Tasks by the name a recipe gives them. A new task is one module and one line here (docs/tasks.md)."""

import importlib
import re

from dqo.errors import DQOError
from dqo.tasks.base import PublicSet, Task
from dqo.tasks.calling import place

__all__ = ["TASKS", "PublicSet", "Task", "get_task", "problem"]

# Where each one is, as module:NAME; imported when it is asked for, so that a recipe can be checked at once.
TASKS = {
    "story": "dqo.tasks.story:STORY",
    "reasoning": "dqo.tasks.reasoning:REASONING",
    "instruction": "dqo.tasks.instruction:INSTRUCTION",
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
        DQOError: If there is no such task, or its module cannot be imported.
    """
    if reason := problem(name):
        raise DQOError(f"task: {reason}")
    path, _, attribute = TASKS.get(name, name).partition(":")
    try:
        module = importlib.import_module(path)
    except Exception as error:  # whatever a module of the user's own does when it is imported
        if isinstance(error, ModuleNotFoundError) and error.name and f"{path}.".startswith(f"{error.name}."):
            raise DQOError(
                f"task: got {name!r}, but there is no module {error.name!r}; expected one that is installed or in a "
                "folder of PYTHONPATH"
            ) from None
        # A dataclass calls its missing fields arguments of Task.__init__().
        said = str(error).replace("Task.__init__()", "Task()")
        raise DQOError(
            f"task: got {name!r}, but importing {path!r} fails: {type(error).__name__}: {said}{place(error)}"
        ) from error
    try:
        task = getattr(module, attribute)
    except AttributeError:
        raise DQOError(
            f"task: got {name!r}, but {path!r} has no {attribute!r}; expected the name of a dqo.tasks.Task in it"
        ) from None
    if not isinstance(task, Task):
        raise DQOError(f"task: {name!r} is of type {type(task).__name__}; expected a dqo.tasks.Task")
    return task
