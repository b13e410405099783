"""What a task is: how a row becomes a prompt, when a row is usable, and what a response is worth."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, str]


@dataclass(frozen=True)
class PublicSet:
    """A public data set on the Hugging Face hub that has the task's form: `data.source: public`.

    Attributes:
        dataset: Id on the hub.
        subset: Configuration name.
        split: Split that is read; the train/evaluation split is always made by the preparation.
        licence: SPDX identifier, or the words of the set's page where it has none.
        columns: Columns that `convert` reads.
        convert: A row of the set as a row of the task: its fields and `references`. A value that needs no converting is
            passed on as it is, for the task's `check` to judge. An error costs the row; the text of a ValueError is the
            reason that the quarantine gives, so it names field, value and what was expected.
    """

    dataset: str
    split: str
    licence: str
    columns: tuple[str, ...]
    convert: Callable[[Row], dict[str, Any]]
    subset: str | None = None


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
    reward: Callable[[str, Row], float | None] | None
    """Quality of a response in [0, 1] by a rule; `None` when it cannot be judged. Expects a row that passes `check`.
    True and False are 1 and 0; anything else outside that range is refused as it comes (`dqo.rewards.RuleReward`).
    A task without a rule (`None`) takes its quality from `reward.kind` of the recipe: reference similarity or a model.
    """
    public: PublicSet | None = None
    """The public data set of the same form."""
    answer: Callable[[str], tuple[int, int] | None] | None = None
    """Where the answer stands in a response, as start and end; `None` when it holds none. A task without the function
    has responses that are all answer."""
    canonical: Callable[[str], str] | None = None
    """One spelling of an answer, the words at `answer`, for all that the rule takes for equal; an answer that it cannot
    read as it is written. A task without the function embeds answers as they are written (`embed: answer`)."""
    passing: float | None = None
    """A response is right where its reward is above this; `None` for a task whose responses are only better or worse.
    """
