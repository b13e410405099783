"""The judge's part of the evaluation: its audit, then every model against the gate's other model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dqo.files import write_jsonl
from dqo.judges import ByScore, Comparison, Identity, Pair, PairwiseJudge, Score, reward_model_identity
from dqo.judges.audit import Audit, audit
from dqo.judges.comparison import ModelComparison, ModelScore, compare_models, json_interval, score_model
from dqo.judges.labelled import labelled_of
from dqo.judges.prompt import load_prompt
from dqo.recipe import Judge, JudgeAudit, Recipe
from dqo.tasks.base import Row

VERDICTS_FILE = "judge-verdicts.jsonl"
SCORES_FILE = "judge-scores.jsonl"
AUDIT_FILE = "judge-audit.json"

# How it is asked and where answers and labelled pairs are kept, not what is asked.
_MANNERS = {"labelled", "api_key_env", "max_concurrency", "max_requests", "max_attempts", "timeout", "cache"}


@dataclass(frozen=True)
class Judged:
    """What the judge said.

    Attributes:
        identity: The judge's.
        against: The model that all others are compared with.
        responses: Responses of each group that were judged.
        audit: Its audit on the recipe's labelled pairs, with the recipe's demands.
        comparisons: Model -> its comparison with `against`.
        scores: Model -> its scores, by a judge that scores; empty for one that compares.
        reason: Why something is missing; None where nothing is.
        requests: Requests that this call sent; what the cache knew took none.
    """

    identity: Identity
    against: str
    responses: int
    audit: Audit
    comparisons: Mapping[str, ModelComparison]
    scores: Mapping[str, ModelScore]
    reason: str | None
    requests: int | None

    @property
    def complete(self) -> bool:
        """Whether everything was judged."""
        return self.reason is None

    def settled(self, demands: JudgeAudit) -> bool:
        """Whether another call would find nothing to ask: all is judged, and the judge can be read as is demanded."""
        readable = demands.max_invalid_rate is None or (
            (self.audit.measures.invalid_rate or 0.0) <= demands.max_invalid_rate + 1e-12
        )
        return self.complete and readable

    def document(self) -> dict[str, Any]:
        """The part `judge` of `evaluation.json`."""
        models = {name: one.document() for name, one in self.comparisons.items()}
        for content in models.values():
            content["per_prompt"] = [prompt["score"] for prompt in content.pop("prompts")]
            for name in ("judge", "candidate", "against", "complete"):  # stand above, or are the key
                del content[name]
        return {
            "complete": self.complete,
            "reason": self.reason,
            "identity": self.identity,
            "requests": self.requests,
            "against": self.against,
            "responses": self.responses,
            "audit": {
                "passed": self.audit.passed,
                "reasons": self.audit.reasons,
                "faults": self.audit.faults,
                "labelled": self.audit.labelled,
                "measures": asdict(self.audit.measures),
            },
            "models": models,
            "scores": {
                name: {
                    "score": json_interval(asdict(one.score)),
                    "invalid": one.invalid,
                    "missing": one.missing,
                    "per_prompt": one.per_prompt,
                }
                for name, one in self.scores.items()
            },
        }

    def write(self, folder: Path) -> None:
        """Write the audit, and each verdict and score in a line of its own."""
        self.audit.write(folder / AUDIT_FILE)
        write_jsonl(
            folder / VERDICTS_FILE,
            [
                {
                    "id": prompt.id,
                    "model": name,
                    "against": self.against,
                    "response": index,
                    "verdict": one.verdict,
                    "orders": one.orders,
                    "reasons": one.reasons,
                }
                for name, comparison in self.comparisons.items()
                for prompt in comparison.prompts
                for index, one in enumerate(prompt.comparisons)
            ],
        )
        if self.scores:
            write_jsonl(
                folder / SCORES_FILE,
                [
                    {"id": key, "model": name, "response": index, **asdict(one)}
                    for name, scored in self.scores.items()
                    for key, scores in scored.prompts
                    for index, one in enumerate(scores)
                ],
            )


def audit_figures(judge: Mapping[str, Any]) -> dict[str, float]:
    """Figures of a judge itself under MLflow's names (docs/metrics.md): whether it is done, and its audit.

    Args:
        judge: The part `judge` of `evaluation.json`; what could not be measured, or does not apply, is left out.
    """
    values = {"complete": judge["complete"], "audit_passed": judge["audit"]["passed"]}
    measures = judge["audit"]["measures"].items()
    # `shows_both` says which of the measures apply, and is none.
    values |= {f"audit_{name}": value for name, value in measures if value is not None and name != "shows_both"}
    return {f"judge/{name}": float(value) for name, value in values.items()}


def model_figures(judge: Mapping[str, Any], model: str) -> dict[str, float]:
    """What a judge says of one model under MLflow's names (docs/metrics.md).

    Args:
        judge: The part `judge` of `evaluation.json`; what could not be measured, or does not apply, is left out.
        model: Key of the model; the one that the others are compared with has a score at most.
    """
    values: dict[str, float | None] = {}

    def add(metric: str, interval: Mapping[str, float | None] | None) -> None:
        if interval is not None:
            values.update({metric: interval["mean"], f"{metric}_low": interval["low"]})
            values[f"{metric}_high"] = interval["high"]

    if (found := judge["models"].get(model)) is not None:
        add("win_rate", found["win_rate"])
        add("win_rate_length_controlled", found["length_controlled"])
        for metric in (
            "tie_rate",
            "flip_rate",
            "first_position_rate",
            "longer_win_rate",
            "pairs",
            "invalid",
            "missing",
        ):
            values[metric] = found[metric]
    if (scored := judge["scores"].get(model)) is not None:
        add("score", scored["score"])
    return {f"judge/{metric}": float(value) for metric, value in values.items() if value is not None}


def key_of(settings: Judge | None) -> dict[str, Any] | None:
    """What decides about a judge's part of an evaluation, for the stage's key.

    Raises:
        DQOError: If the prompt, the reward model's configuration or the labelled pairs cannot be read.
    """
    if settings is None:
        return None
    what: Mapping[str, Any]
    if settings.reward is None:
        what = {"prompt_digest": load_prompt(settings.prompt).digest}
    else:
        what = reward_model_identity(settings.reward)
    return settings.model_dump(exclude=_MANNERS) | {**what, "labelled": labelled_of(settings).digest}


def in_workspace(settings: Judge, workspace: Path) -> Judge:
    """The same judge, whose answers are kept in the workspace unless the recipe names another folder."""
    return (
        settings
        if settings.cache or settings.reward is not None
        else settings.model_copy(update={"cache": str(workspace / "judge")})
    )


class _Gone:
    """Stands in for a judge that answers no more: asking it on would only wait for it again."""

    def __init__(self, judge: PairwiseJudge, reason: str) -> None:
        self.identity = judge.identity
        self.shows_both = judge.shows_both
        self.requests = judge.requests
        self.stopped: str | None = reason

    def compare(self, pairs: Sequence[Pair], repeat: int = 0) -> list[Comparison]:
        return [Comparison(("missing", "missing"), (str(self.stopped),) * 2) for _ in pairs]

    def score(self, responses: Sequence[str], rows: Sequence[Row], repeat: int = 0) -> list[Score]:
        return [Score(None, "missing", str(self.stopped)) for _ in responses]


def ask(
    judge: PairwiseJudge,
    recipe: Recipe,
    rows: Sequence[Row],
    sampled: Mapping[str, Sequence[Mapping[str, Any]]],
    tell: Callable[[str], None] = lambda _: None,
) -> Judged:
    """Audit a judge and let it compare every model with the one that the gate names.

    Args:
        judge: The recipe's judge, see `dqo.judges.build`.
        recipe: The recipe.
        rows: Rows of the evaluation.
        sampled: Model -> its rows of `responses.jsonl`, in the order of `rows`.
        tell: Called with what comes next, in words.

    Raises:
        DQOError: If the judge says that no request can succeed (wrong key, unknown model). One that is down, or whose
            budget is spent, is no error: the result is then incomplete.
    """
    settings, evaluation, against = recipe.judge, recipe.evaluation, recipe.gate.against
    assert settings is not None
    tell("judge: audit")
    audited = audit(judge, labelled_of(settings), settings.audit)
    how = (settings.responses, evaluation.bootstrap_draws, evaluation.confidence, recipe.seed)
    # The one that asks to be promoted first: where the budget ends, the rest is left.
    names = sorted((name for name in sampled if name != against), key=lambda name: name != "dqo")
    comparisons: dict[str, ModelComparison] = {}
    scores: dict[str, ModelScore] = {}

    # A call takes a new start on a server that is down: what has stopped once is not asked again.
    stopped = judge.stopped
    for name in names:
        tell(f"judge: {name} against {against}")
        asked = judge if stopped is None else _Gone(judge, stopped)
        comparisons[name] = compare_models(asked, rows, sampled[name], sampled[against], *how)
        stopped = stopped or judge.stopped
    if isinstance(judge, ByScore):
        # Known from the comparisons, so that nothing is asked but what was refused or is missing.
        for name in [*names, against]:
            scorer = judge.judge if stopped is None else _Gone(judge, stopped)
            scores[name] = score_model(scorer, rows, sampled[name], *how)
            stopped = stopped or judge.stopped
    return Judged(
        identity=dict(judge.identity),
        against=against,
        responses=settings.responses,
        audit=audited,
        comparisons={name: comparisons[name] for name in sampled if name in comparisons},
        scores={name: scores[name] for name in sampled if name in scores},
        reason=_reason(stopped, audited, comparisons, scores),
        requests=judge.requests,
    )


def _reason(
    stopped: str | None,
    audited: Audit,
    comparisons: Mapping[str, ModelComparison],
    scores: Mapping[str, ModelScore],
) -> str | None:
    """Why something is missing, with how much; None where nothing is."""
    missing = {
        "answers of its audit": audited.measures.missing,
        f"of {sum(one.pairs for one in comparisons.values())} pairs": sum(one.missing for one in comparisons.values()),
        "scores": sum(one.missing for one in scores.values()),
    }
    counted = [f"{count} {what}" for what, count in missing.items() if count]
    if not counted:
        return None
    words = _words(audited, comparisons, scores)
    first = stopped or next(reason for status, reason in words if status == "missing")
    return f"{first}; missing: {', '.join(counted)}"


def _words(
    audited: Audit, comparisons: Mapping[str, ModelComparison], scores: Mapping[str, ModelScore]
) -> Iterator[tuple[str, str]]:
    """Every answer's status or verdict with the judge's words, in the order they were asked for."""
    for pair in audited.pairs:
        for known in pair["repeats"]:
            yield from zip(known["orders"], known["reasons"], strict=True)
    for one in comparisons.values():
        for prompt in one.prompts:
            for comparison in prompt.comparisons:
                yield from zip(comparison.orders, comparison.reasons, strict=True)
    for scored in scores.values():
        for _, group in scored.prompts:
            yield from ((score.status, score.reasons) for score in group)
