"""Who earns a bonus, and for which words: conditions against raising the diversity of a group without its quality.

A response that earns none leaves the kernel, so that it neither gains by differing nor makes others look alike or
unlike. What it gets instead is the trainer's to say (docs/method.md).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dqo.errors import DQOError
from dqo.tasks import calling
from dqo.tasks.base import Task

if TYPE_CHECKING:  # `check` is asked where nothing is computed
    from torch import Tensor

    from dqo.recipe import Recipe

# A reasoning model's thoughts; without an end mark they never ended.
_REASONING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)

Embedded = Literal["response", "through_answer", "answer"]


@dataclass(frozen=True)
class Defences:
    """Conditions on a response that earns a bonus; `None` and False ask nothing.

    Attributes:
        min_quality: Reward that has to be reached.
        quality_gate: Who has to reach it: each `member` for itself, or one member for its whole `group`, so that a
            group of nothing but wrong answers does not learn to differ.
        drop_truncated: A response that was cut at the token limit earns none.
        max_tokens: Longer responses earn none.
        min_prompt_similarity: Cosine similarity of prompt and response, as the encoder sees them, that has to be
            reached; text in another language or without sense is far from every prompt.
    """

    min_quality: float | None = None
    quality_gate: Literal["member", "group"] = "member"
    drop_truncated: bool = False
    max_tokens: int | None = None
    min_prompt_similarity: float | None = None

    def failed(
        self, rewards: "Tensor", truncated: "Tensor", tokens: "Tensor", similarity: "Tensor | None"
    ) -> "dict[str, Tensor]":
        """Say which members fail which condition.

        Args:
            rewards: Shape `(groups, k)`; NaN where a response could not be scored, which never earns a bonus.
            truncated: Responses that were cut, boolean, shape `(groups, k)`.
            tokens: Length of each response in tokens, shape `(groups, k)`.
            similarity: Cosine similarity to the prompt, shape `(groups, k)`; needed for `min_prompt_similarity`.

        Returns:
            For `unscorable` and each condition that is set, by its name: boolean, shape `(groups, k)`.

        Raises:
            ValueError: If `min_prompt_similarity` is set and no similarity is given.
        """
        found = {"unscorable": rewards.isnan()}
        if self.min_quality is not None:
            reached = rewards >= self.min_quality  # false for NaN
            if self.quality_gate == "group":
                reached = reached.any(1, keepdim=True).expand_as(rewards)
            found["min_quality"] = ~reached
        if self.drop_truncated:
            found["drop_truncated"] = truncated
        if self.max_tokens is not None:
            found["max_tokens"] = tokens > self.max_tokens
        if self.min_prompt_similarity is not None:
            if similarity is None:
                raise ValueError("min_prompt_similarity is set, but no similarity was given")
            found["min_prompt_similarity"] = similarity < self.min_prompt_similarity
        return found


def check(recipe: "Recipe", task: Task) -> None:
    """Find out before anything is trained whether a recipe's defences do something for its task.

    Raises:
        DQOError: If part of each response is to be embedded and the task does not say where the answer stands, so that
            all of it would be.
    """
    embed = recipe.method.defences.embed
    if embed != "response" and task.answer is None:
        raise DQOError(
            f"method.defences.embed: got {embed!r}, but task {task.name!r} does not say where in a response its answer "
            "stands; expected 'response', or a task with `answer` (docs/tasks.md)"
        )


def without_reasoning(response: str) -> str:
    """Leave out a reasoning model's thoughts.

    Those are what stands from `<think>` to the next `</think>`, or to the end where none follows, and then what is left
    before a `</think>`: it was opened in the prompt, by the chat template, or held further thoughts. Where thoughts
    that the prompt has opened never end, nothing tells them from an answer, and they stay (`drop_truncated`).
    """
    return _REASONING.sub("", response).rpartition("</think>")[2]


def embedded_text(embed: Embedded, strip_reasoning: bool, task: Task) -> Callable[[str], str | None]:
    """Return the function that picks the words of a response whose meaning counts.

    Args:
        embed: `response`: all of it; `through_answer`: up to the end of its answer, so that what is appended to a right
            answer gains nothing; `answer`: the answer alone, in the task's `canonical` spelling where it has one, so
            that different ways to one answer count as the same.
        strip_reasoning: Whether thoughts are left out first (`without_reasoning`).
        task: Says where the answer stands; one without `answer` has all of a response embedded.

    Returns:
        Response -> text to embed; `None` when no answer is found or nothing is left, for which no bonus is earned. It
        raises a DQOError where a function of the task fails.
    """

    def pick(response: str) -> str | None:
        text = without_reasoning(response) if strip_reasoning else response
        if embed != "response" and task.answer is not None:
            found = calling.answer(task, text)
            if found is None:
                return None
            start, end = found
            if embed == "through_answer":
                text = text[:end]
            else:
                text = text[start:end] if task.canonical is None else calling.canonical(task, text[start:end])
        return text if text.strip() or text == response else None

    return pick
