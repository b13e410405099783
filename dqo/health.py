"""Health of an RL run: rules on the figures of its steps, judged from `history.jsonl` alone.

A rule has a threshold, an action and a patience: it fires at the step at which its figure has been past the threshold
for that many steps in a row, once for each such streak. Nothing is remembered beside the rows, so a run that is resumed
from its history is judged as if it had never been interrupted. A step at which the figure was not measured (missing, or
not a number) ends a streak: what is not known stops nothing. All thresholds of the defaults are [ours].

`frac_reward_zero_std` is the share of groups with equal rewards as `dqo.rewards.tied_groups` has it, under TRL's name.

| rule | figure of a step | past the threshold |
|---|---|---|
| `zero_variance` | `frac_reward_zero_std` | above `max` |
| `entropy` | `entropy` | below `min` or above `max` |
| `kl` | `kl` | above `max` |
| `length_drift` | `mean_tokens` | above `factor` times, or below 1 / `factor` times, the mean of the first steps |
| `truncation` | `truncation_rate` | above `max` |
| `volume_floor` | `log_volume` | below `min` |
| `volume_collapse` | (first - `log_volume`) / (first - log(1 + k)), first the mean of the first steps | above `max` |
| `duplicates` | `duplicate_rate` | above `max` |
| `encoder_cut` | `encoder_cut_share` | above `max` |
| `unscorable` | `unscorable_rate` | above `max` |
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dqo.recipe import AGAINST_FIRST_STEPS, Health, volume_range

METRICS = {
    "zero_variance": "frac_reward_zero_std",
    "entropy": "entropy",
    "kl": "kl",
    "length_drift": "mean_tokens",
    "truncation": "truncation_rate",
    "volume_floor": "log_volume",
    "volume_collapse": "log_volume",
    "duplicates": "duplicate_rate",
    "encoder_cut": "encoder_cut_share",
    "unscorable": "unscorable_rate",
}
"""Rule -> the figure of a history row that it looks at."""

_WORDS = {
    "zero_variance": "share of groups with equal rewards",
    "entropy": "entropy in nats a token",
    "kl": "KL to the SFT policy",
    "length_drift": "mean tokens of a response",
    "truncation": "share of truncated responses",
    "volume_floor": "log-volume in nats",
    "volume_collapse": "share of the log-volume that was lost",
    "duplicates": "share of repeated responses",
    "encoder_cut": "share of responses that the encoder cut",
    "unscorable": "share of responses without a reward",
}

Row = Mapping[str, Any]
_Side = Literal["above", "below"]


@dataclass(frozen=True)
class Finding:
    """A rule that has fired.

    Attributes:
        rule: Its name in the recipe's `rl.health`.
        action: `warn` or `stop`.
        step: The step at which its patience was over.
        since: First step of the streak.
        value: The rule's figure at `step`; of `volume_collapse` the share that was lost.
        threshold: What it is compared with; of `length_drift` in tokens.
        side: Whether the value is `above` or `below` the threshold.
        detail: What the figure was compared with, in words; empty where the threshold says it.
    """

    rule: str
    action: Literal["warn", "stop"]
    step: int
    since: int
    value: float
    threshold: float
    side: _Side
    detail: str = ""

    @property
    def reason(self) -> str:
        """The finding in one line."""
        steps = f"at step {self.step}" if self.since == self.step else f"at steps {self.since} to {self.step}"
        return (
            f"{self.rule}: {_WORDS[self.rule]} {self.value:.4g} {self.side} {self.threshold:.4g}{self.detail}, {steps}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON takes it, with its reason."""
        return asdict(self) | {"reason": self.reason}


class Monitor:
    """Judges the rows of a run one after another.

    Args:
        health: The rules.
        k: Group size, for the lower end of the log-volume.
        kernel_scale: See `dqo.determinant.log_volume`.
    """

    def __init__(self, health: Health, k: int, kernel_scale: float = 1.0) -> None:
        self._health = health
        self._lowest = volume_range(k, kernel_scale)[0]
        self._firsts: dict[str, list[float]] = {name: [] for name in AGAINST_FIRST_STEPS}
        self._streaks: dict[tuple[str, _Side], list[int]] = {}
        self.findings: list[Finding] = []

    def update(self, row: Row) -> list[Finding]:
        """Judge the next step.

        Args:
            row: Its row of `history.jsonl`: `step`, and the figures by name.

        Returns:
            The rules that fire at this step, in the recipe's order.
        """
        fired = []
        for name, rule in self._health.rules.items():
            past = self._past(name, rule.limits, row)
            for side in ("above", "below"):
                streak = self._streaks.setdefault((name, side), [])
                if past is None or past[2] != side:
                    streak.clear()
                    continue
                streak.append(int(row["step"]))
                if len(streak) == rule.patience:
                    value, threshold, _, detail = past
                    fired.append(Finding(name, rule.action, streak[-1], streak[0], value, threshold, past[2], detail))
        self.findings += fired
        return fired

    def _past(self, name: str, limits: Mapping[str, float], row: Row) -> tuple[float, float, _Side, str] | None:
        """Value, threshold, side and detail where a rule's figure is past its threshold; else None."""
        measured = row.get(METRICS[name])
        if not limits or measured is None or not math.isfinite(measured):
            return None
        value, low, high, detail = float(measured), limits.get("min"), limits.get("max"), ""
        if name in AGAINST_FIRST_STEPS:
            firsts, wanted = self._firsts[name], self._health.baseline_steps
            if len(firsts) < wanted:
                firsts.append(value)
                return None
            first = math.fsum(firsts) / wanted
            if name == "length_drift":
                factor = limits["factor"]
                low, high = first / factor, first * factor
                detail = f" ({factor:g} times away from the {first:.4g} of the first steps)"
            else:
                # Below what k equal responses span, some have left the kernel (no answer, no score): at most all.
                lowest = self._lowest if first >= self._lowest - 1e-6 else 0.0
                if first - lowest <= 1e-6:
                    return None  # as low as it gets from the beginning: nothing was lost
                detail = f" ({first:.4g} nats in the first steps, {value:.4g} now, {lowest:.4g} at least)"
                value = (first - value) / (first - lowest)
        if high is not None and value > high:
            return value, high, "above", detail
        if low is not None and value < low:
            return value, low, "below", detail
        return None

    @property
    def stop(self) -> Finding | None:
        """The finding that ends training, if there is one."""
        return next((finding for finding in self.findings if finding.action == "stop"), None)


def judge(health: Health, rows: Iterable[Row], k: int, kernel_scale: float = 1.0) -> list[Finding]:
    """Judge a whole history.

    Args:
        health: The rules.
        rows: Rows of `history.jsonl` in the order of their steps.
        k: Group size.
        kernel_scale: See `dqo.determinant.log_volume`.

    Returns:
        Every finding in the order in which the rules fired.
    """
    monitor = Monitor(health, k, kernel_scale)
    for row in rows:
        monitor.update(row)
    return monitor.findings
