"""Judges of quality behind two interfaces, and what makes them comparable.

| judge | scores a response | compares two responses |
|---|---|---|
| a reward (rule, reference similarity, reward model) | `RewardJudge` | `ByScore` of it |
| a language model, prompt of mode `pointwise` | `dqo.judges.llm.PointwiseLLM` | `ByScore` of it |
| a language model, prompt of mode `pairwise` | - | `dqo.judges.llm.PairwiseLLM`, in both orders |

A verdict is never guessed: what a judge answered unreadably is `invalid`, what it did not answer at all (it was down,
or the budget was spent) is `missing`. Neither is ever a score of 0 or a lost comparison.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dqo.errors import DQOError
from dqo.tasks.base import Row

if TYPE_CHECKING:
    from dqo.recipe import Judge as JudgeSettings
    from dqo.recipe import JudgingModel
    from dqo.rewards import Reward

Verdict = Literal["A", "B", "tie", "invalid", "missing"]
Identity = dict[str, str | int | float | bool | None]
"""What decides about a judge's verdicts, by name: two judges of one identity are the same judge. Holds no secrets."""


@dataclass(frozen=True)
class Score:
    """What a judge says of one response.

    Attributes:
        value: The score in the judge's own unit; None unless `status` is `valid`.
        status: `invalid`: the judge answered unreadably or cannot judge this one; `missing`: it did not answer.
        reasons: The judge's own words; for the other statuses, what went wrong.
    """

    value: float | None
    status: Literal["valid", "invalid", "missing"]
    reasons: str = ""


@dataclass(frozen=True)
class Pair:
    """Two responses to one request.

    Attributes:
        row: The row that was asked, at least its `prompt` (chat messages).
        a: Response A.
        b: Response B.
    """

    row: Row
    a: str
    b: str


@dataclass(frozen=True)
class Comparison:
    """What a judge says of a pair, asked in both orders.

    Attributes:
        orders: The verdict with A shown first, then with B shown first; both name the response, not its place.
        reasons: The judge's words for each order; what went wrong where a verdict is `invalid` or `missing`.
    """

    orders: tuple[Verdict, Verdict]
    reasons: tuple[str, str] = ("", "")

    @property
    def verdict(self) -> Verdict:
        """The verdict of both orders together; where they disagree, the place has decided and it is a tie."""
        for unknown in ("missing", "invalid"):
            if unknown in self.orders:
                return unknown
        return self.orders[0] if self.orders[0] == self.orders[1] else "tie"


class PointwiseJudge(Protocol):
    """Scores responses, each by itself."""

    identity: Identity

    @property
    def requests(self) -> int | None:
        """Requests sent to a server so far; None for a judge without one."""
        ...

    @property
    def stopped(self) -> str | None:
        """See `PairwiseJudge`."""
        ...

    def score(self, responses: Sequence[str], rows: Sequence[Row], repeat: int = 0) -> list[Score]:
        """Score each response to the row of the same index.

        Args:
            responses: The responses.
            rows: The rows that were asked.
            repeat: Another number asks anew instead of taking what is known from an earlier call.
        """
        ...


class PairwiseJudge(Protocol):
    """Compares two responses to the same request.

    Attributes:
        identity: What decides about its verdicts.
        shows_both: Whether one question shows both responses, so that their places may decide. Of a judge that sees one
            response at a time, nothing can be said about places.
    """

    identity: Identity
    shows_both: bool

    @property
    def requests(self) -> int | None:
        """Requests sent to a server so far; None for a judge without one."""
        ...

    @property
    def stopped(self) -> str | None:
        """Why nothing more was asked since the last call: the server is down, or the budget is spent; else None."""
        ...

    def compare(self, pairs: Sequence[Pair], repeat: int = 0) -> list[Comparison]:
        """Compare the responses of each pair.

        Args:
            pairs: The pairs.
            repeat: Another number asks anew instead of taking what is known from an earlier call.
        """
        ...


class RewardJudge:
    """A reward as a judge: the task's rule, reference similarity or a reward model.

    Args:
        reward: Scores the responses.
        of: What decides about its scores besides its name, by name.
    """

    def __init__(self, reward: "Reward", of: Identity | None = None) -> None:
        self._reward = reward
        self._known: dict[str, Score] = {}
        self.identity: Identity = {"kind": "reward", "name": reward.name, **(of or {})}
        self.requests: int | None = None
        self.stopped: str | None = None

    def score(self, responses: Sequence[str], rows: Sequence[Row], repeat: int = 0) -> list[Score]:
        """See `PointwiseJudge`; what the reward cannot judge is invalid.

        A response is scored once, whatever it is compared with afterwards.
        """
        from dqo.rewards import score

        known = self._known if repeat == 0 else {}
        keys = [
            json.dumps([response, row], sort_keys=True, default=str)
            for response, row in zip(responses, rows, strict=True)
        ]
        missing = list({key: place for place, key in enumerate(keys) if key not in known}.values())
        values = score(self._reward, [responses[place] for place in missing], [rows[place] for place in missing])
        for place, value in zip(missing, values, strict=True):
            known[keys[place]] = (
                Score(None, "invalid", "the reward has no value for this response")
                if value is None or math.isnan(value)
                else Score(float(value), "valid", f"scores {value:.4g}")
            )
        return [known[key] for key in keys]


class ByScore:
    """A pointwise judge that compares: the higher score wins.

    Args:
        judge: Scores the responses.
        margin: Scores that differ by at most this much are a tie, in the judge's own unit.

    Attributes:
        judge: The judge that scores.
        shows_both: See `PairwiseJudge`; it sees one response at a time.

    Raises:
        DQOError: If the margin is negative.
    """

    shows_both = False

    def __init__(self, judge: PointwiseJudge, margin: float = 0.0) -> None:
        if not margin >= 0:
            raise DQOError(f"margin: got {margin}; expected 0 or more")
        self.judge = judge
        self._margin = margin
        self.identity: Identity = {**judge.identity, "margin": margin}

    @property
    def requests(self) -> int | None:
        """See `PairwiseJudge`."""
        return self.judge.requests

    @property
    def stopped(self) -> str | None:
        """See `PairwiseJudge`."""
        return self.judge.stopped

    def compare(self, pairs: Sequence[Pair], repeat: int = 0) -> list[Comparison]:
        """See `PairwiseJudge`; the order plays no part, so both orders have one verdict."""
        rows = [pair.row for pair in pairs]
        scores = self.judge.score([pair.a for pair in pairs] + [pair.b for pair in pairs], rows + rows, repeat=repeat)
        return [self._compared(*both) for both in zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)]

    def _compared(self, a: Score, b: Score) -> Comparison:
        verdict: Verdict
        if "missing" in (a.status, b.status):
            verdict = "missing"
        elif a.value is None or b.value is None:
            verdict = "invalid"
        elif abs(a.value - b.value) <= self._margin:
            verdict = "tie"
        else:
            verdict = "A" if a.value > b.value else "B"
        reasons = f"A: {a.reasons}\nB: {b.reasons}"
        return Comparison((verdict, verdict), (reasons, reasons))


def request_of(row: Row) -> str:
    """The request of a row as a judge reads it: the one message, or the whole conversation with its roles."""
    messages: list[dict[str, Any]] = row["prompt"]
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def check(settings: "JudgeSettings") -> None:
    """See whether a judge can be built and audited, without asking it or writing anything.

    Raises:
        DQOError: As `build`, and if its labelled pairs cannot be read.
    """
    from dqo.judges.client import read_key
    from dqo.judges.labelled import labelled_of
    from dqo.judges.prompt import load_prompt

    labelled_of(settings)
    if settings.reward is not None:
        from dqo.rewards import model

        model.check(settings.reward.as_reward, "judge.reward")
        return
    load_prompt(settings.prompt)
    read_key(settings)


def reward_model_identity(spec: "JudgingModel") -> Identity:
    """What decides about a reward model's scores, with what its name stands for now.

    Raises:
        DQOError: If the model cannot be found.
    """
    from dqo.bundled import identity

    return {
        "model": spec.model,
        "revision": identity(spec.model, spec.revision),
        "max_tokens": spec.max_tokens,
    }


def identity_by_recipe(settings: "JudgeSettings") -> Identity:
    """What a recipe alone decides of its judge's identity, by name, without asking a server or reading a model.

    The server's address is left out, since the same model may have moved, and so is what stands in a directory, which
    may be another machine's.

    Raises:
        DQOError: If the prompt cannot be read.
    """
    if settings.reward is not None:
        from dqo.bundled import identity, is_hub_id

        spec = settings.reward
        revision = {"revision": identity(spec.model, spec.revision)} if is_hub_id(spec.model) else {}
        return {
            "kind": "reward",
            "model": spec.model,
            **revision,
            "max_tokens": spec.max_tokens,
            "margin": spec.margin,
        }
    from dqo.judges.prompt import load_prompt

    prompt = load_prompt(settings.prompt)
    return {
        "kind": prompt.mode,
        "model": settings.model,
        "prompt_digest": prompt.digest,
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "structured_output": settings.structured_output,
    }


def build(settings: "JudgeSettings") -> PairwiseJudge:
    """Return the judge of a recipe's section as one that compares.

    Raises:
        DQOError: If the prompt cannot be read, the key's variable is not set, or the reward model cannot be loaded.
    """
    if settings.reward is not None:
        from dqo.policy import default_device
        from dqo.rewards.model import RewardModel

        model = RewardModel(settings.reward.as_reward, default_device(), "judge.reward")
        return ByScore(RewardJudge(model, reward_model_identity(settings.reward)), settings.reward.margin)
    from dqo.judges.llm import PairwiseLLM, PointwiseLLM
    from dqo.judges.prompt import load_prompt

    prompt = load_prompt(settings.prompt)
    if prompt.mode == "pairwise":
        return PairwiseLLM(settings, prompt)
    return ByScore(PointwiseLLM(settings, prompt))
