"""What a response is worth: rewards by the kind a recipe names, checked at the door.

| `reward.kind` | quality of a response | range | None (unscorable) |
|---|---|---|---|
| `rule` | the task's own rule, `Task.reward` | [0, 1], others are refused | where the rule says so |
| `reference_similarity` | cosine to the nearest reference, as the encoder sees them | [0, 1] | never |
| `model` | score of a reward model | (0, 1); any number unsquashed | too long, NaN, special tokens |
| `auto` (default) | `rule` where the task has one, else `reference_similarity` | [0, 1] | |

How the two in the middle judge, and how they are gamed, is in `dqo.rewards.similarity` and `dqo.rewards.model`.
Unscorable responses are counted as `unscorable_rate`; they leave the kernel and have advantage 0.
"""

import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dqo.errors import DQOError
from dqo.recipe import Recipe
from dqo.tasks import calling
from dqo.tasks.base import Row, Task

if TYPE_CHECKING:
    import torch

    from dqo.embedding import ResponseEncoder


class Reward(Protocol):
    """Scores responses in batches."""

    name: str
    """What logs call it."""

    def __call__(self, responses: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
        """Quality of each response to the row of the same index; None or NaN where it cannot be judged."""
        ...


TIE = 1e-6
"""Rewards that differ by no more than this are equal: what float32 leaves of sums and means."""


class RuleReward:
    """A task's own rule.

    Raises:
        DQOError: If the task has none.
    """

    def __init__(self, task: Task) -> None:
        if task.reward is None:
            raise _no_rule(task)
        self._task = task
        self.name = f"{task.name}_reward"

    def __call__(self, responses: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
        """See `Reward`.

        Returns:
            In [0, 1]; what rounding has put beyond by no more than `TIE` is that bound.

        Raises:
            DQOError: If the rule raises, or a value is no number or outside [0, 1]: what a recipe may ask of a quality
                (`min_quality`) is checked against that range.
        """
        return [self._judge(response, row) for response, row in zip(responses, rows, strict=True)]

    def _judge(self, response: str, row: Row) -> float | None:
        value = calling.call(self._task, "reward", response, row)
        expected = "a number in [0, 1]"
        quality = _number(self.name, response, value, expected)
        if quality is None or math.isnan(quality):
            return quality
        if not -TIE <= quality <= 1 + TIE:
            raise _refused(self.name, response, value, expected)
        return min(max(quality, 0.0), 1.0)


def score(reward: Reward, responses: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
    """Score responses and check what comes back.

    Returns:
        A float for each real number, numpy's among them; True and False, of a reward that says right or wrong, are 1
        and 0. None and NaN stay.

    Raises:
        DQOError: If a value is infinite or not a number.
    """
    values = reward(responses, rows)
    return [_number(reward.name, text, value, "a finite number") for text, value in zip(responses, values, strict=True)]


def _number(name: str, response: str, value: Any, expected: str) -> float | None:
    """What a reward has returned as a float, NaN included, or None.

    Raises:
        DQOError: If it is infinite or no number.
    """
    if value is None:
        return None
    # Anything else with a __float__, such as an array or a tensor of one value, is more likely a mistake.
    if not isinstance(value, numbers.Real):
        import numpy as np  # what only looks at a recipe does not wait for it

        if not isinstance(value, np.bool_):  # the one number of numpy's that is no Real
            raise _refused(name, response, value, expected)
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if math.isinf(number):
        raise _refused(name, response, value, expected)
    return number


def _refused(name: str, response: str, value: Any, expected: str) -> DQOError:
    return DQOError(
        f"reward {name!r}: got {repr(value)[:80]} for the response {response[:80]!r}; expected {expected}, or None "
        "where the response cannot be judged"
    )


def tied_groups(rewards: "torch.Tensor") -> "torch.Tensor":
    """Say which groups' rewards are all equal, so that they teach nothing about quality.

    Args:
        rewards: Shape `(groups, k)`; NaN where a response could not be scored. A group with fewer than two rewards has
            nothing to compare and counts as equal.

    Returns:
        Boolean, shape `(groups,)`.
    """
    unscored = rewards.isnan()
    highest = rewards.masked_fill(unscored, -math.inf).amax(1)
    lowest = rewards.masked_fill(unscored, math.inf).amin(1)
    return highest - lowest <= TIE  # -inf without any reward


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
        """Score completions; see `score`.

        With TRL's `log_metric` among the columns, the shares of prompts and references that the encoder of reference
        similarity has cut are logged as `encoder_cut_share/prompts` and `encoder_cut_share/references`.
        """
        texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
        rows = [
            {"prompt": prompts[index], **{name: columns[name][index] for name in self._fields}}
            for index in range(len(texts))
        ]
        values = score(self._reward, texts, rows)
        log = columns.get("log_metric")
        if log is not None:
            for name, share in getattr(self._reward, "cut_shares", {}).items():
                log(f"encoder_cut_share/{name}", share)
        return values


def kind(recipe: Recipe, task: Task) -> Literal["rule", "reference_similarity", "model"]:
    """Say which reward a recipe names, with `auto` resolved.

    Raises:
        DQOError: If it names the rule of a task that has none.
    """
    named = recipe.reward.kind
    if named == "auto":
        return "reference_similarity" if task.reward is None else "rule"
    if named == "rule" and task.reward is None:
        raise _no_rule(task)
    return named


def check(recipe: Recipe, task: Task) -> None:
    """Find out before anything is trained whether a recipe's reward can be built, without loading weights.

    Raises:
        DQOError: If the task has no rule and the recipe asks for it, or the reward model is missing or none.
    """
    if kind(recipe, task) == "model":
        from dqo.rewards import model

        model.check(recipe.reward)


def build(recipe: Recipe, task: Task, device: "torch.device", encoder: "ResponseEncoder | None" = None) -> Reward:
    """Return the reward a recipe names.

    Args:
        recipe: Its `reward` section, and the encoder's for reference similarity.
        task: The recipe's task.
        device: Where a model runs.
        encoder: The recipe's encoder where one is loaded already; `None` loads it if it is needed.

    Raises:
        DQOError: If the task has no rule and the recipe names it, or a model cannot be used.
    """
    match kind(recipe, task):
        case "rule":
            return RuleReward(task)
        case "reference_similarity":
            from dqo.embedding import ResponseEncoder
            from dqo.rewards.similarity import ReferenceSimilarity

            return ReferenceSimilarity(encoder or ResponseEncoder(recipe.encoder, device))
        case "model":
            from dqo.rewards.model import RewardModel

            return RewardModel(recipe.reward, device)


def _no_rule(task: Task) -> DQOError:
    return DQOError(
        f"reward.kind: got 'rule', but task {task.name!r} has none; expected 'auto' or 'reference_similarity', or "
        "'model' with reward.model"
    )
