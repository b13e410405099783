"""Tasks by the name a recipe gives them."""

from dqo.errors import DQOError
from dqo.tasks.base import Task
from dqo.tasks.story import STORY

_TASKS = {task.name: task for task in (STORY,)}


def get_task(name: str) -> Task:
    """Return the task a recipe names.

    Raises:
        DQOError: If there is no such task.
    """
    if name not in _TASKS:
        raise DQOError(f"task: got {name!r}; expected one of: {', '.join(_TASKS)}")
    return _TASKS[name]
