"""What a response is worth: rewards by the kind a recipe names, checked at the door.

| `reward.kind` | quality of a response |
|---|---|
| `rule` | the task's own rule |
| `auto` | the task's own rule |
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dqo.errors import DQOError
from dqo.recipe import Recipe
from dqo.tasks.base import Row, Task

if TYPE_CHECKING:
    import torch


class Reward(Protocol):
    """Scores responses in batches."""

    name: str
    """What logs call it."""

    def __call__(self, responses: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
        """Quality of each response to the row of the same index; None or NaN where it cannot be judged."""
        ...


class RuleReward:
    """A task's own rule.

    Raises:
        DQOError: If the task has none.
    """

    def __init__(self, task: Task) -> None:
        if task.reward is None:
            raise DQOError(
                f"reward.kind: task {task.name!r} has no rule; expected 'reference_similarity', or 'model' with "
                "reward.model"
            )
        self._rule = task.reward
        self.name = f"{task.name}_reward"

    def __call__(self, responses: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
        """See `Reward`."""
        return [self._rule(response, row) for response, row in zip(responses, rows, strict=True)]


def score(reward: Reward, responses: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
    """Score responses and check what comes back.

    Raises:
        DQOError: If a value is infinite or not a number.
    """
    values = reward(responses, rows)
    for text, value in zip(responses, values, strict=True):
        if value is not None and (not isinstance(value, (int, float)) or math.isinf(value)):
            raise DQOError(
                f"reward {reward.name!r}: got {value!r} for the response {text[:80]!r}; expected a finite number, or "
                "None where the response cannot be judged"
            )
    return values


class TrlReward:
    """A reward in the form that TRL calls.

    Args:
        reward: Scores the responses.
        task: Its fields and `references` make up a row.
    """

    def __init__(self, reward: Reward, task: Task) -> None:
        self._reward = reward
        self._fields = ("references", *task.fields)
        self.__name__ = reward.name  # TRL's name for it in logs

    def __call__(self, completions: list[Any], prompts: list[Any], **columns: Any) -> list[float | None]:
        """Score completions; see `score`."""
        texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
        rows = [
            {"prompt": prompts[index], **{name: columns[name][index] for name in self._fields}}
            for index in range(len(texts))
        ]
        return score(self._reward, texts, rows)


def build(recipe: Recipe, task: Task, device: "torch.device") -> Reward:
    """Return the reward a recipe names.

    Args:
        recipe: Its `reward` section, and the encoder's for reference similarity.
        task: The recipe's task.
        device: Where a model runs.

    Raises:
        DQOError: If the task has no rule and the recipe names nothing else, or a model cannot be used.
    """
    return RuleReward(task)
