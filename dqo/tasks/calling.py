"""Calling the functions of a task, which may be a user's own: what goes wrong in one is named as the task's.

`Task.public.convert` is not among them: what it raises costs one row (`dqo.data.sources`).
"""

import traceback
from collections.abc import Mapping
from typing import Any, Literal

from dqo.errors import DQOError
from dqo.tasks.base import Message, Row, Task

_SHOWN = 80  # characters of a response or row in a message


def call(task: Task, function: Literal["prompt", "check", "reward", "answer", "canonical"], *arguments: Any) -> Any:
    """Call one of a task's functions.

    Args:
        task: It has the function.
        function: Its name.
        arguments: What it is called with; the first is named if it fails.

    Raises:
        DQOError: If it raises: the task, the function, the start of the first argument, the exception and its place. A
            DQOError of its own is left as it is.
    """
    try:
        return getattr(task, function)(*arguments)
    except DQOError:
        raise
    except Exception as error:  # whatever a function of the user's own does
        raise DQOError(
            f"task {task.name!r}: {function} raises {type(error).__name__}: {error}{place(error)} for "
            f"{_shown(arguments[0])}"
        ) from error


def check(task: Task, row: Row) -> str | None:
    """Say why a row is unusable; `None` when it is usable.

    Raises:
        DQOError: If the task's `check` raises, or returns neither a text nor `None`.
    """
    problem = call(task, "check", row)
    if problem is None or isinstance(problem, str):
        return problem
    raise _unexpected(task, "check", problem, row, "why the row is unusable, or None")


def prompt(task: Task, row: Row) -> list[Message]:
    """Return the messages that ask for a response to a row that passed `check`; there may be none.

    Raises:
        DQOError: If the task's `prompt` raises, or returns something else.
    """
    messages = call(task, "prompt", row)
    if isinstance(messages, list) and all(
        isinstance(one, Mapping) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    ):
        return messages
    raise _unexpected(task, "prompt", messages, row, "a list of messages, each with the texts `role` and `content`")


def answer(task: Task, response: str) -> tuple[int, int] | None:
    """Say where the answer stands in a response, as start and end; `None` when it holds none.

    Raises:
        DQOError: If the task's `answer` raises, or returns something else.
    """
    found = call(task, "answer", response)
    match found:
        case None:
            return None
        case (int(start), int(end)):
            return start, end
    raise _unexpected(task, "answer", found, response, "start and end of the answer, or None")


def canonical(task: Task, words: str) -> str:
    """Return one spelling of an answer.

    Raises:
        DQOError: If the task's `canonical` raises, or returns no text.
    """
    spelling = call(task, "canonical", words)
    if isinstance(spelling, str):
        return spelling
    raise _unexpected(task, "canonical", spelling, words, "a text")


def place(error: BaseException) -> str:
    """Name the file and line that raised, the way a traceback would: ` (FILE, line N)`, or nothing."""
    if isinstance(error, SyntaxError):  # its text names them
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _unexpected(task: Task, function: str, value: Any, argument: Any, expected: str) -> DQOError:
    return DQOError(
        f"task {task.name!r}: {function} returns {_shown(value)} for {_shown(argument)}; expected {expected}"
    )


def _shown(value: Any) -> str:
    """A value as Python writes it, cut: a text before it is quoted, anything else after."""
    if isinstance(value, str):
        return repr(value[:_SHOWN])
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]} ..."
