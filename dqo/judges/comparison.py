"""One model against another: a judge compares their responses to the same prompts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dqo.errors import DQOError
from dqo.evaluation.statistics import Interval, bootstrap_interval
from dqo.evaluation.win_rate import LengthControlled, length_controlled_win_rate, win_rate
from dqo.judges import Comparison, Identity, Pair, PairwiseJudge, PointwiseJudge, Score
from dqo.tasks.base import Row


@dataclass(frozen=True)
class PromptComparison:
    """The comparisons of one prompt.

    Attributes:
        id: The row's.
        score: Mean over the pairs with a verdict: 1 for a win of the candidate, 0.5 for a tie, 0 for a loss. None where
            no pair has one.
        comparisons: What the judge said of each pair; A is the candidate's response.
        lengths: Mean characters of the candidate's and of the other model's responses over the pairs with a verdict;
            None where no pair has one.
    """

    id: str
    score: float | None
    comparisons: list[Comparison]
    lengths: tuple[float, float] | None


@dataclass(frozen=True)
class ModelComparison:
    """The comparison of two models.

    Attributes:
        judge: Identity of the judge.
        candidate: Name of the model that asks to be promoted.
        against: Name of the model it is compared with.
        win_rate: Mean of the prompts' scores with its interval over prompts (`dqo.evaluation.win_rate`); 0.5 means
            that neither is preferred.
        length_controlled: The win rate at equal lengths, in characters; None where it cannot be told.
        length_effect: Log odds that being far longer adds; None where the former is.
        not_length_controlled: Why it cannot be told; empty where it can.
        tie_rate: Share of the pairs with a verdict that are ties, those whose orders disagree included.
        flip_rate: Share of the pairs with a verdict whose orders disagree. None where there is no verdict, and not
            applicable (None) to a judge that sees one response at a time.
        first_position_rate: Of the single answers with a winner, the share won by the response shown first. Both orders
            are asked, so a judge that looks at the responses alone has exactly 0.5. None where there is no winner, and
            not applicable (None) as the former.
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
    length_controlled: Interval | None
    length_effect: float | None
    not_length_controlled: str
    tie_rate: float | None
    flip_rate: float | None
    first_position_rate: float | None
    longer_win_rate: float | None
    invalid: int
    missing: int
    prompts: list[PromptComparison]

    @property
    def complete(self) -> bool:
        """Whether every pair was judged; what is missing is asked by the next call."""
        return self.missing == 0

    @property
    def pairs(self) -> int:
        """Pairs that the judge was asked about."""
        return sum(len(prompt.comparisons) for prompt in self.prompts)

    def document(self) -> dict[str, Any]:
        """Return everything as JSON can hold it: nan becomes null."""
        content = asdict(self) | {"complete": self.complete, "pairs": self.pairs}
        for name in ("win_rate", "length_controlled"):
            content[name] = None if content[name] is None else json_interval(content[name])
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
        decisive = [
            pair
            for pair, score in zip(pairs[index * responses : (index + 1) * responses], scores, strict=True)
            if score is not None
        ]
        prompts.append(
            PromptComparison(
                name,
                sum(known) / len(known) if known else None,
                comparisons,
                (_mean_length([pair.a for pair in decisive]), _mean_length([pair.b for pair in decisive]))
                if decisive
                else None,
            )
        )
    rates, not_controlled = _win_rates(prompts, draws, confidence, seed)
    lengths = [
        (len(pair.a) > len(pair.b)) == (one.verdict == "A")
        for pair, one in decided
        if one.verdict != "tie" and len(pair.a) != len(pair.b)
    ]
    return ModelComparison(
        judge=dict(judge.identity),
        candidate=str(candidate[0]["model"]),
        against=str(against[0]["model"]),
        win_rate=win_rate([one.score for one in prompts], draws, confidence, seed),
        length_controlled=rates.controlled if rates is not None else None,
        length_effect=rates.length_effect if rates is not None else None,
        not_length_controlled=not_controlled,
        tie_rate=_share([one.verdict == "tie" for _, one in decided]),
        flip_rate=_share([one.orders[0] != one.orders[1] for _, one in decided]) if judge.shows_both else None,
        first_position_rate=_share(
            [
                verdict == shown_first
                for one in said
                for verdict, shown_first in zip(one.orders, ("A", "B"), strict=True)
                if verdict in ("A", "B")
            ]
        )
        if judge.shows_both
        else None,
        longer_win_rate=_share(lengths),
        invalid=sum(one.verdict == "invalid" for one in said),
        missing=sum(one.verdict == "missing" for one in said),
        prompts=prompts,
    )


def _win_rates(
    prompts: Sequence[PromptComparison], draws: int, confidence: float, seed: int
) -> tuple[LengthControlled | None, str]:
    """The win rate at equal lengths, or why there is none."""
    judged = [(one.score, one.lengths) for one in prompts if one.score is not None and one.lengths is not None]
    if not judged:
        return None, "no pair has a verdict"
    own, other = ([lengths[side] for _, lengths in judged] for side in (0, 1))
    try:
        return length_controlled_win_rate([score for score, _ in judged], own, other, draws, confidence, seed), ""
    except ValueError as error:  # every response is longer by the same amount
        return None, str(error)


@dataclass(frozen=True)
class ModelScore:
    """What a judge that scores says of one model.

    Attributes:
        model: Its name.
        score: Mean of the prompts' scores with its bootstrap interval over prompts, in the judge's own unit.
        invalid: Responses on which the judge said nothing readable.
        missing: Responses that were not judged.
        prompts: Id of each row, and the scores of its responses.
    """

    model: str
    score: Interval
    invalid: int
    missing: int
    prompts: list[tuple[str, list[Score]]]

    @property
    def per_prompt(self) -> list[float | None]:
        """Mean of the valid scores of each prompt, None where there is none."""
        return [_mean([one.value for one in scores if one.value is not None]) for _, scores in self.prompts]


def score_model(
    judge: PointwiseJudge,
    rows: Sequence[Row],
    results: Sequence[Mapping[str, Any]],
    responses: int,
    draws: int,
    confidence: float,
    seed: int,
) -> ModelScore:
    """Let a judge score the responses of a model, the first of each group; for the arguments see `compare_models`.

    Raises:
        DQOError: As the judge raises it. A judge that is down is no error: scores are then missing.
    """
    groups = [result["responses"][:responses] for result in results]
    asked = [row for row, group in zip(rows, groups, strict=True) for _ in group]
    said = iter(judge.score([text for group in groups for text in group], asked))
    prompts = [(str(row["id"]), [next(said) for _ in group]) for row, group in zip(rows, groups, strict=True)]
    scores = [one for _, group in prompts for one in group]
    values = [_mean([one.value for one in group if one.value is not None]) for _, group in prompts]
    return ModelScore(
        model=str(results[0]["model"]),
        score=bootstrap_interval(values, draws, confidence, seed),
        invalid=sum(one.status == "invalid" for one in scores),
        missing=sum(one.status == "missing" for one in scores),
        prompts=prompts,
    )


def json_interval(interval: Mapping[str, float]) -> dict[str, float | None]:
    """An interval's fields as JSON can hold them: nan becomes null."""
    return {name: None if math.isnan(value) else value for name, value in interval.items()}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _mean_length(texts: Sequence[str]) -> float:
    return sum(map(len, texts)) / len(texts)


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
