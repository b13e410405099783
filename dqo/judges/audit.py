"""The judge audit: what a judge says of pairs whose answer is known, and whether its verdicts may count.

A judge that was not audited, failed, or is not the one that was audited must not decide about a model: an evaluation
holds the audit of its judge (`dqo.stages.judging`), and the gate reads it there; `require` asks it of a file.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dqo import __version__
from dqo.errors import DQOError
from dqo.evaluation.statistics import Interval
from dqo.files import write_text
from dqo.judges import Comparison, Identity, PairwiseJudge
from dqo.judges.agreement import kappa
from dqo.judges.labelled import LabelledPair, LabelledSet
from dqo.recipe import JudgeAudit

_MET, _INAPPLICABLE = ", as demanded", "not applicable"
_DRAWS, _CONFIDENCE, _SEED = 2000, 0.95, 0


@dataclass(frozen=True)
class Measures:
    """What the audit measured; None where the pairs or the verdicts give nothing to measure.

    Attributes:
        kappa: Cohen's kappa of verdicts and labels over the pairs with a verdict, corrected for chance.
        kappa_low: Lower end of its 95 % bootstrap interval.
        kappa_high: Upper end.
        first_position_rate: Share of the single answers with a winner whose winner was shown first. Both orders are
            asked, so a judge that looks at the responses alone has exactly 0.5. Not applicable (None) where
            `shows_both` is false.
        flip_rate: Share of the pairs whose two orders disagree (and so count as a tie). Not applicable, as the former.
        verbosity_bias: Share of the single answers that are for the longer response, among the pairs where that one is
            not the better; pairs of kind `injection` are left out.
        injection_rate: Share of the single answers to pairs of kind `injection` that are for the response that tells
            the judge what to say. Single answers, since a judge that obeys in one order alone gives ties.
        repeat_consistency: Share of the single answers that stay the same when asked again.
        invalid_rate: Share of the single answers that could not be read, after a second try.
        missing: Single answers that never came: the judge was down, or the budget was spent.
        judged: Pairs with a verdict.
        shows_both: Whether the judge sees both responses at once, see `dqo.judges.PairwiseJudge`.
    """

    kappa: float | None
    kappa_low: float | None
    kappa_high: float | None
    first_position_rate: float | None
    flip_rate: float | None
    verbosity_bias: float | None
    injection_rate: float | None
    repeat_consistency: float | None
    invalid_rate: float | None
    missing: int
    judged: int
    shows_both: bool = True


@dataclass(frozen=True)
class Audit:
    """The audit of one judge on one labelled set.

    Attributes:
        judge: The judge's identity.
        labelled: `name`, `digest` and number of `pairs` of the labelled set.
        measures: What was measured.
        passed: Whether every demand was met, at the time of the audit.
        reasons: One sentence a demand.
        pairs: For each pair `id`, `kind`, `label`, `verdict`, and for each repeat its `orders` and `reasons`.
        requests: Requests that were sent; None for a judge without a server.
        version: Of this library.
    """

    judge: Identity
    labelled: dict[str, Any]
    measures: Measures
    passed: bool
    reasons: list[str]
    pairs: list[dict[str, Any]]
    requests: int | None
    version: str

    @property
    def agreement(self) -> dict[str, tuple[int, int]]:
        """For each kind of pair, how many verdicts are as labelled, and how many pairs there are."""
        kinds: dict[str, tuple[int, int]] = {}
        for pair in self.pairs:
            right, total = kinds.get(pair["kind"], (0, 0))
            kinds[pair["kind"]] = right + (pair["verdict"] == pair["label"]), total + 1
        return kinds

    @property
    def faults(self) -> list[str]:
        """The reasons that speak against the judge: demands that it has not met, answers that are missing."""
        return faults_of(self.reasons)

    @property
    def problems(self) -> list[str]:
        """The first things that went wrong, in the server's or the judge's words, each once with how often it came."""
        words = [
            f"{verdict}: {' '.join(reason.split())[:160] or '(nothing)'}"
            for pair in self.pairs
            for comparison in pair["repeats"]
            for verdict, reason in zip(comparison["orders"], comparison["reasons"], strict=True)
            if verdict in ("invalid", "missing")
        ]
        return [f"{text} ({count} times)" for text, count in Counter(words).most_common(3)]

    def write(self, path: Path) -> None:
        """Write the audit as JSON."""
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Audit":
        """Read a written audit.

        Raises:
            DQOError: If there is none, or the file is something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**content, "measures": Measures(**content["measures"])})
        except OSError as error:
            raise DQOError(f"{path}: cannot be read ({error.strerror}); write one with `dqo judge audit`") from None
        except (ValueError, TypeError, LookupError):
            raise DQOError(f"{path}: is no audit of a judge; write one with `dqo judge audit`") from None


def audit(judge: PairwiseJudge, labelled: LabelledSet, demands: JudgeAudit) -> Audit:
    """Ask a judge about labelled pairs and hold its verdicts against the labels.

    Args:
        judge: The judge.
        labelled: The pairs.
        demands: What it has to show, and how often each question is asked.

    Raises:
        DQOError: As the judge raises it. A judge that is down is no error: the audit is then incomplete and fails.
    """
    asked = [one.pair for one in labelled.pairs]
    rounds = [judge.compare(asked)]
    for repeat in range(1, demands.repeats):
        gone = next((one for one in rounds[-1] if "missing" in one.orders), None)
        # Down or out of its budget: asking again would only wait for it again.
        rounds.append(judge.compare(asked, repeat=repeat) if gone is None else [_unasked(gone)] * len(asked))
    found = measure(labelled.pairs, rounds, judge.shows_both)
    passed, reasons = decide(found, demands, len(labelled.pairs))
    return Audit(
        judge=dict(judge.identity),
        labelled={"name": labelled.name, "digest": labelled.digest, "pairs": len(labelled.pairs)},
        measures=found,
        passed=passed,
        reasons=reasons,
        pairs=[
            {
                "id": one.id,
                "kind": one.kind,
                "label": one.label,
                "verdict": rounds[0][index].verdict,
                "repeats": [asdict(comparisons[index]) for comparisons in rounds],
            }
            for index, one in enumerate(labelled.pairs)
        ],
        requests=judge.requests,
        version=__version__,
    )


def _unasked(gone: Comparison) -> Comparison:
    """A pair of a round that was not begun, for the reason that ended the round before."""
    reason = gone.reasons[gone.orders.index("missing")]
    return Comparison(("missing", "missing"), (reason, reason))


def measure(pairs: Sequence[LabelledPair], rounds: Sequence[Sequence[Comparison]], shows_both: bool = True) -> Measures:
    """Compute an audit's measures; all but consistency, invalid and missing answers are those of the first round.

    Args:
        pairs: The labelled pairs.
        rounds: For each repeat, the comparison of each pair.
        shows_both: See `dqo.judges.PairwiseJudge`; where it is false, what is about places is not applicable.

    Raises:
        ValueError: If a round does not hold a comparison for each pair.
    """
    first = rounds[0]
    decided = [
        (one, comparison.verdict)
        for one, comparison in zip(pairs, first, strict=True)
        if comparison.verdict not in ("invalid", "missing")
    ]
    clusters = [one.twin_of or one.id for one, _ in decided]
    agreement = (
        kappa([one.label for one, _ in decided], [v for _, v in decided], clusters, _DRAWS, _CONFIDENCE, _SEED)
        if decided
        else Interval(math.nan, math.nan, math.nan)
    )
    places = [
        verdict == shown_first
        for comparison in first
        for verdict, shown_first in zip(comparison.orders, ("A", "B"), strict=True)
        if verdict in ("A", "B")
    ]
    flips = [
        comparison.orders[0] != comparison.orders[1]
        for comparison in first
        if not {"invalid", "missing"} & set(comparison.orders)
    ]
    single = [
        (one, order)
        for one, comparison in zip(pairs, first, strict=True)
        for order in comparison.orders
        if order not in ("invalid", "missing")
    ]
    # A response that speaks to the judge is the longer one by its speech: what wins there is another fault.
    verbose = [
        order == one.longer
        for one, order in single
        if one.kind != "injection" and one.longer is not None and one.longer != one.label
    ]
    injected = [order not in ("tie", one.label) for one, order in single if one.kind == "injection"]
    answers = [[order for comparison in comparisons for order in comparison.orders] for comparisons in rounds]
    came = [order for one_round in answers for order in one_round if order != "missing"]
    repeated = [len(set(same)) == 1 for same in zip(*answers, strict=True) if len(same) > 1 and "missing" not in same]
    return Measures(
        kappa=_number(agreement.mean),
        kappa_low=_number(agreement.low),
        kappa_high=_number(agreement.high),
        first_position_rate=_share(places) if shows_both else None,
        flip_rate=_share(flips) if shows_both else None,
        verbosity_bias=_share(verbose),
        injection_rate=_share(injected),
        repeat_consistency=_share(repeated),
        invalid_rate=_share([order == "invalid" for order in came]),
        missing=sum(order == "missing" for one_round in answers for order in one_round),
        judged=len(decided),
        shows_both=shows_both,
    )


@dataclass(frozen=True)
class _Demand:
    """One demand in words: what it is about, the measured value, whether a limit holds, why it does not apply."""

    label: str
    value: float | None
    limit: float | None
    holds: Callable[[float, float], bool]
    wanted: str
    without: str
    shown: str = ""
    inapplicable: str = ""


def decide(found: Measures, demands: JudgeAudit, pairs: int) -> tuple[bool, list[str]]:
    """Hold measures against demands.

    A demand that could not be measured is not met: a labelled set without long-winded responses says nothing of a judge
    that likes them. Set the demand to null where it is not wanted. One that does not apply to the judge is left out,
    and the sentence about it says so; where no other is left, nothing is shown and the judge has not passed.

    Args:
        found: The measures.
        demands: What the judge has to show.
        pairs: Size of the labelled set.

    Returns:
        Whether everything holds, and one sentence for each demand.
    """

    def at_least(value: float, limit: float) -> bool:
        return value >= limit - 1e-12

    def at_most(value: float, limit: float) -> bool:
        return value <= limit + 1e-12

    place = found.first_position_rate
    interval = (
        f" [{found.kappa_low:.2f}, {found.kappa_high:.2f}]"
        if found.kappa_low is not None and found.kappa_high is not None
        else ""
    )
    no_winner = "no answer names a winner"
    table = [
        _Demand(
            "agreement with the labels (Cohen's kappa)",
            found.kappa,
            demands.min_kappa,
            at_least,
            "at least",
            "labels and verdicts are all of one class, or there is no verdict",
            interval,
        ),
        _Demand(
            "deviation from one half of the share won by the response shown first",
            None if place is None else abs(place - 0.5),
            demands.max_first_position_deviation,
            at_most,
            "at most",
            no_winner,
            "" if place is None else f" (share {place:.2f})",
            "" if found.shows_both else "the judge sees one response at a time",
        ),
        _Demand(
            "share of wrong answers for the longer response",
            found.verbosity_bias,
            demands.max_verbosity_bias,
            at_most,
            "at most",
            "no answer is about a pair whose longer response is not better",
        ),
        _Demand(
            "share of answers for responses that tell the judge what to say",
            found.injection_rate,
            demands.max_injection_rate,
            at_most,
            "at most",
            "no answer is about a pair of kind 'injection'",
        ),
        _Demand(
            "share of answers that stay the same when asked again",
            found.repeat_consistency,
            demands.min_repeat_consistency,
            at_least,
            "at least",
            "no question was answered twice",
        ),
        _Demand(
            "share of answers that cannot be read",
            found.invalid_rate,
            demands.max_invalid_rate,
            at_most,
            "at most",
            "there is no answer",
        ),
    ]
    passed, reasons, applied = True, [], 0
    if found.missing:
        passed = False
        reasons.append(
            f"incomplete: {found.missing} answers are missing, {found.judged} of {pairs} pairs have a verdict; a "
            "second call asks for the rest"
        )
    for demand in table:
        if demand.limit is None:
            continue
        if demand.inapplicable:
            reasons.append(f"{demand.label}: {_INAPPLICABLE} ({demand.inapplicable})")
            continue
        applied += 1
        if demand.value is None:
            passed = False
            reasons.append(f"{demand.label}: not measured ({demand.without}), so not shown")
            continue
        held = demand.holds(demand.value, demand.limit)
        passed = passed and held
        reasons.append(
            f"{demand.label}: {demand.value:.2f}{demand.shown}{_MET if held else ', not as demanded'} "
            f"({demand.wanted} {demand.limit:g})"
        )
    if not applied:
        passed = False
        reasons.append("nothing is demanded that applies to this judge, so nothing is shown")
    return passed, reasons


def faults_of(reasons: Sequence[str]) -> list[str]:
    """Of the sentences of `decide`, those that speak against the judge."""
    return [reason for reason in reasons if _MET not in reason and f": {_INAPPLICABLE} (" not in reason]


def require(path: Path, judge: Identity, demands: JudgeAudit) -> Audit:
    """Return the audit of a judge whose verdicts may count.

    The demands are held against the audit's measures anew: an audit that passed lower demands does not pass these.

    Args:
        path: A written audit.
        judge: Identity of the judge that is to be used.
        demands: The recipe's demands.

    Raises:
        DQOError: If the file is no audit, it is of another judge (naming what differs), or the demands are not met.
    """
    found = Audit.read(path)
    differing = [
        f"{name} {found.judge.get(name)!r} instead of {judge.get(name)!r}"
        for name in sorted({*found.judge, *judge})
        if found.judge.get(name) != judge.get(name)
    ]
    if differing:
        raise DQOError(f"{path}: is the audit of another judge: {', '.join(differing)}; audit this one")
    passed, reasons = decide(found.measures, demands, found.labelled["pairs"])
    if not passed:
        raise DQOError("\n  ".join([f"{path}: the judge has not passed its audit", *reasons]))
    return found


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
