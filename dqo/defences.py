"""Who earns a bonus: conditions against raising the diversity of a group without its quality (docs/method.md).

A response that earns none leaves the kernel, so that it neither gains by differing nor makes others look alike or
unlike, and its advantage is that of its quality alone.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Defences:
    """Conditions on a response that earns a bonus; `None` and False ask nothing.

    Attributes:
        min_quality: Reward that has to be reached.
        quality_gate: Who has to reach it: each `member` for itself, or one member for its whole `group`, so that a
            group of nothing but wrong answers does not learn to differ.
        drop_truncated: A response that was cut at the token limit earns none.
        min_prompt_similarity: Cosine similarity of prompt and response, as the encoder sees them, that has to be
            reached; text in another language or without sense is far from every prompt.
    """

    min_quality: float | None = None
    quality_gate: Literal["member", "group"] = "member"
    drop_truncated: bool = False
    min_prompt_similarity: float | None = None

    def earns(self, rewards: Tensor, truncated: Tensor, similarity: Tensor | None) -> Tensor:
        """Say which members earn a bonus.

        Args:
            rewards: Shape `(groups, k)`; NaN where a response could not be scored, which never earns one.
            truncated: Responses that were cut, boolean, shape `(groups, k)`.
            similarity: Cosine similarity to the prompt, shape `(groups, k)`; needed for `min_prompt_similarity`.

        Returns:
            Boolean, shape `(groups, k)`.

        Raises:
            ValueError: If `min_prompt_similarity` is set and no similarity is given.
        """
        earning = ~rewards.isnan()
        if self.min_quality is not None:
            reached = rewards >= self.min_quality  # false for NaN
            earning = earning & (reached if self.quality_gate == "member" else reached.any(1, keepdim=True))
        if self.drop_truncated:
            earning = earning & ~truncated
        if self.min_prompt_similarity is not None:
            if similarity is None:
                raise ValueError("min_prompt_similarity is set, but no similarity was given")
            earning = earning & (similarity >= self.min_prompt_similarity)
        return earning
