"""One model against another: a judge compares their responses to the same prompts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dqo.errors import DQOError
from dqo.evaluation.statistics import Interval, bootstrap_interval
from dqo.judges import Comparison, Identity, Pair, PairwiseJudge
from dqo.tasks.base import Row


@dataclass(frozen=True)
class PromptComparison:
    """The comparisons of one prompt.

    Attributes:
        id: The row's.
        score: Mean over the pairs with a verdict: 1 for a win of the candidate, 0.5 for a tie, 0 for a loss. None where
            no pair has one.
        comparisons: What the judge said of each pair; A is the candidate's response.
    """

    id: str
    score: float | None
    comparisons: list[Comparison]


@dataclass(frozen=True)
class ModelComparison:
    """The comparison of two models.

    Attributes:
        judge: Identity of the judge.
        candidate: Name of the model that asks to be promoted.
        against: Name of the model it is compared with.
        win_rate: Mean of the prompts' scores with its bootstrap interval over prompts; 0.5 means that neither is
            preferred.
        tie_rate: Share of the pairs with a verdict that are ties, those whose orders disagree included.
        flip_rate: Share of the pairs with a verdict whose orders disagree.
        longer_win_rate: Among the pairs won by one side, the share won by the response with more characters: far from
            0.5, length may be what decides. None where no pair is won, or all of those are of one length.
        invalid: Pairs on which the judge said nothing readable.
        missing: Pairs that were not judged: the judge was down, or its budget was spent.
        prompts: The prompts, in order.
    """

    judge: Identity
    candidate: str
    against: str
    win_rate: Interval
    tie_rate: float | None
    flip_rate: float | None
    longer_win_rate: float | None
    invalid: int
    missing: int
    prompts: list[PromptComparison]

    @property
    def complete(self) -> bool:
        """Whether every pair was judged; what is missing is asked by the next call."""
        return self.missing == 0

    def document(self) -> dict[str, Any]:
        """Return everything as JSON can hold it: nan becomes null."""
        content = asdict(self) | {"complete": self.complete}
        content["win_rate"] = {
            name: None if math.isnan(value) else value for name, value in content["win_rate"].items()
        }
        return content


def compare_models(
    judge: PairwiseJudge,
    rows: Sequence[Row],
    candidate: Sequence[Mapping[str, Any]],
    against: Sequence[Mapping[str, Any]],
    responses: int,
    draws: int,
    confidence: float,
    seed: int,
) -> ModelComparison:
    """Let a judge compare the responses of two models, response i of one with response i of the other.

    The responses of a prompt are drawn independently and alike, so the first few of them are as good as any.

    Args:
        judge: The judge.
        rows: The evaluation's rows, with `id` and `prompt`.
        candidate: The candidate's rows of `responses.jsonl`, in the order of `rows`.
        against: The other model's, in the same order.
        responses: Pairs judged a prompt, the first of each group.
        draws: See `bootstrap_interval`.
        confidence: See `bootstrap_interval`.
        seed: See `bootstrap_interval`.

    Raises:
        DQOError: If the three do not hold the same prompts, or a group holds fewer responses; and as the judge raises
            it. A judge that is down is no error: the result is then incomplete.
    """
    if responses < 1:
        raise DQOError(f"comparison: got {responses} responses a prompt; expected 1 or more")
    names = [str(row["id"]) for row in rows]
    for results in (candidate, against):
        if not results or [result["id"] for result in results] != names:
            raise DQOError(
                f"comparison: the responses are of other prompts than the {len(names)} rows; expected those of one "
                "evaluation"
            )
        fewest = min(len(result["responses"]) for result in results)
        if fewest < responses:
            raise DQOError(
                f"comparison: {responses} responses a prompt were asked for, and {fewest} are there; expected at most "
                "evaluation.n"
            )
    pairs = [
        Pair(row, a, b)
        for row, one, other in zip(rows, candidate, against, strict=True)
        for a, b in zip(one["responses"][:responses], other["responses"][:responses], strict=True)
    ]
    said = judge.compare(pairs)
    decided = [(pair, one) for pair, one in zip(pairs, said, strict=True) if one.verdict in ("A", "B", "tie")]
    prompts = []
    for index, name in enumerate(names):
        comparisons = said[index * responses : (index + 1) * responses]
        scores = [{"A": 1.0, "tie": 0.5, "B": 0.0}.get(one.verdict) for one in comparisons]
        known = [score for score in scores if score is not None]
        prompts.append(PromptComparison(name, sum(known) / len(known) if known else None, comparisons))
    lengths = [
        (len(pair.a) > len(pair.b)) == (one.verdict == "A")
        for pair, one in decided
        if one.verdict != "tie" and len(pair.a) != len(pair.b)
    ]
    return ModelComparison(
        judge=dict(judge.identity),
        candidate=str(candidate[0]["model"]),
        against=str(against[0]["model"]),
        win_rate=bootstrap_interval([one.score for one in prompts], draws, confidence, seed),
        tie_rate=_share([one.verdict == "tie" for _, one in decided]),
        flip_rate=_share([one.orders[0] != one.orders[1] for _, one in decided]),
        longer_win_rate=_share(lengths),
        invalid=sum(one.verdict == "invalid" for one in said),
        missing=sum(one.verdict == "missing" for one in said),
        prompts=prompts,
    )


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
