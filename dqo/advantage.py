r"""From rewards and bonuses to advantages: three ways, and what the policy gradient then estimates.

Below, g_i = grad log pi(y_i | x), D_k is the group's log det(L + I_k), D_{-i} that of the group without member i, and
b_i = D_k - D_{-i} its bonus. What each form estimates is the expectation of `sum_i g_i * A_i` over groups of k
independent responses of one prompt; all of it is [derived], and checked by enumeration in the tests. A trainer that
averages over members instead of summing scales every line by the same 1/k.

| form | advantage A_i | sum_i g_i A_i estimates the gradient of |
|---|---|---|
| `paper` | r_i + alpha b_i | E[sum of k rewards + alpha D_k], the objective |
| `centred` | r_i - mean r + alpha (b_i - mean b) | E[sum of k-1 rewards + alpha D_{k-1}], the objective at k-1 |
| `decoupled` | r_i - mean r + alpha (b_i - c) | E[sum of k-1 rewards + alpha D_k]; c independent of the group |

Why: D_{-i} does not depend on y_i, so E[g_i D_{-i}] = 0, and E[g_i (anything without y_i)] = 0 makes c free. The group
mean is not free, it contains y_i: it takes away 1/k of the reward's gradient (E[sum_i g_i mean r] = grad E[r], so the
factor (k-1)/k is left), and of the bonus it leaves mean_j D_{-j} - D_{-i}, which is the gradient of E[D_{k-1}] with
factor one. D_1 = log 2 is constant for unit-norm embeddings, so at k = 2 the `centred` bonus is identically zero; so is
any score that all members share.

Members without a reward get advantage 0. `paper` then still estimates its objective, with reward 0 for them and their
rows out of L. Under `centred` the scored members' advantages sum to zero, so that the chance of being scored is left
alone; `decoupled` moves it by alpha times the group's mean bonus less c, which is about zero on average.

Members that earn no bonus (`dqo.defences`) are treated in one of two ways (`unearned`). With D_k the volume of the
members that earn, where each earns or not by what it is itself:

- `zero` (default): their bonus is 0, in every mean and against every baseline. b_i = D_k - D_{-i} holds for them too,
  so the table holds whole [derived, checked by enumeration]. A member that earns adds at least log(1 + 1/k) to the
  volume, so that to earn is never worse than not to.
- `apart`: they take no part in the bonus' means, and their advantage is the quality part alone. The table then holds
  among those that earn, and not for the chance to earn, which `decoupled` moves by alpha (b_i - c): up where few of a
  group earn and are therefore worth much (a single one log 2), down where many do and are alike. So it may pay to fail
  a condition, and where few responses of a group can be right, right ones are pushed away.

Dividing the quality part by a standard deviation (`quality_scale`) makes it a heuristic, as in GRPO, in every form. The
bonus is never divided: alpha would cancel where qualities tie, and differences of 1e-4 would become advantages of 1.
"""

import math
from typing import Literal

from torch import Tensor

_STD_FLOOR = 1e-4  # TRL's constant, so that the reward-only baseline is TRL's GRPO advantage.


def group_advantages(
    rewards: Tensor,
    bonus: Tensor,
    alpha: float,
    form: Literal["paper", "centred", "decoupled"],
    quality_scale: Literal["none", "group", "batch"] = "none",
    middle: float | None = None,
    earns: Tensor | None = None,
    unearned: Literal["zero", "apart"] = "zero",
) -> Tensor:
    r"""Advantage of every response from its reward and its leave-one-out bonus.

    Args:
        rewards: Shape `(groups, k)`, one row a prompt, k >= 2; NaN where a response could not be scored. Such a member
            gets advantage 0 and counts in no mean or standard deviation, neither of rewards nor of bonuses.
        bonus: Bonus of each response in nats, shape `(groups, k)`: `leave_one_out_bonus` with the scored members as its
            mask. Ignored where the reward is NaN.
        alpha: Diversity weight, reward per nat.
        form: `paper` r_i + alpha b_i; `centred` (r_i - mean r) + alpha (b_i - mean b), means over the group;
            `decoupled` (r_i - mean r) + alpha (b_i - c), where c is the mean bonus over all members of the OTHER
            groups, or, when there is none, `middle`. The module's table says what each estimates.
        quality_scale: Divide the quality part `r_i - mean r` by the standard deviation of the group's rewards (`group`)
            or of all rewards (`batch`), with Bessel's correction and 1e-4 added, as TRL does. One scored member has
            standard deviation 0.
        middle: A constant near the middle of the bonus's range; `None` takes that of the log-volume's,
            `[log(1 + 1/k), log 2]`.
        earns: Members that earn a bonus, boolean, shape `(groups, k)`; `None` lets all scored ones.
        unearned: What the other scored members get: `zero`, a bonus of 0, which counts in the means and is held against
            the baseline; `apart`, the quality part alone. See the module.

    Returns:
        Shape `(groups, k)`, in the units of the reward (`quality_scale="none"`). No gradient is stopped.

    Raises:
        ValueError: If shapes do not fit, k < 2, `form`, `quality_scale` or `unearned` is unknown, or `paper`, which
            takes the reward as it is, meets a `quality_scale`.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must have shape (groups, k) with k >= 2, got {tuple(rewards.shape)}")
    if bonus.shape != rewards.shape:
        raise ValueError(f"bonus must have the rewards' shape {tuple(rewards.shape)}, got {tuple(bonus.shape)}")
    if earns is not None and earns.shape != rewards.shape:
        raise ValueError(f"earns must have the rewards' shape {tuple(rewards.shape)}, got {tuple(earns.shape)}")
    if form not in ("paper", "centred", "decoupled"):
        raise ValueError(f"form must be 'paper', 'centred' or 'decoupled', got {form!r}")
    if quality_scale not in ("none", "group", "batch"):
        raise ValueError(f"quality_scale must be 'none', 'group' or 'batch', got {quality_scale!r}")
    if unearned not in ("apart", "zero"):
        raise ValueError(f"unearned must be 'apart' or 'zero', got {unearned!r}")
    if form == "paper" and quality_scale != "none":
        raise ValueError(f"form 'paper' takes the reward as it is; quality_scale must be 'none', got {quality_scale!r}")

    scored = ~rewards.isnan()
    rewards = rewards.where(scored, 0.0)
    earning = scored if earns is None else scored & earns
    bonus = bonus.where(earning, 0.0)
    if form == "paper":
        return rewards + alpha * bonus

    members = scored.sum(1, keepdim=True)
    quality = (rewards - rewards.sum(1, keepdim=True) / members.clamp(min=1)).where(scored, 0.0)
    if quality_scale == "group":
        quality = quality / (_std(quality, members, dim=1) + _STD_FLOOR)
    elif quality_scale == "batch":
        from_batch = (rewards - rewards.sum() / scored.sum().clamp(min=1)).where(scored, 0.0)
        quality = quality / (_std(from_batch, scored.sum(), dim=(0, 1)) + _STD_FLOOR)

    counted = earning if unearned == "apart" else scored
    totals, members = bonus.sum(1, keepdim=True), counted.sum(1, keepdim=True)
    if form == "centred":
        baseline = totals / members.clamp(min=1)
    else:
        others = members.sum() - members
        if middle is None:
            middle = (math.log1p(1 / rewards.shape[1]) + math.log(2)) / 2
        baseline = ((totals.sum() - totals) / others.clamp(min=1)).where(others > 0, middle)
    return quality + (alpha * (bonus - baseline)).where(counted, 0.0)


def weighted(rewards: Tensor, share: Tensor, alpha: float) -> Tensor:
    """Multiply rewards by a diversity share instead of adding a bonus: `r (1 - alpha (1 - share))`.

    With alpha = 1 this is DARLING's reward times share and DRA-GRPO's reward over one plus the similarities; with the
    share of `likelihood` and alpha = beta it is that of "rewarding the unlikely" [all second hand]. It estimates no
    gradient of a group objective: a member's weight moves with what the others say.

    Args:
        rewards: Shape `(groups, k)`, not negative (a share would make a bad response better); NaN stays NaN.
        share: Shape `(groups, k)`, in [0, 1].
        alpha: In [0, 1]; 0 leaves the rewards as they are.

    Returns:
        Shape `(groups, k)`, to be turned into advantages without a bonus.

    Raises:
        ValueError: If a reward is negative or alpha is not in [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1] to multiply rewards, got {alpha}")
    if (rewards < 0).any():
        raise ValueError(f"rewards must not be negative to be multiplied by a share, got {rewards.nan_to_num().min()}")
    return rewards * (1 - alpha * (1 - share))


def _std(deviations: Tensor, members: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Standard deviation with Bessel's correction from deviations that are zero for members that do not count."""
    return (deviations.square().sum(dim, keepdim=True) / (members - 1).clamp(min=1)).sqrt()
