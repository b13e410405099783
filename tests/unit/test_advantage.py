"""What each advantage estimates, by exact enumeration of a toy policy, and how members without a reward are treated."""

import itertools
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqo.advantage import group_advantages, weighted
from dqo.determinant import leave_one_out_bonus
from dqo.diversity import Group, group_score, similarity_bonus
from dqo.recipe import Score

ALPHA = 0.7


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Toy:
    """A softmax policy over m responses with fixed embeddings and rewards, and all its groups of k."""

    def __init__(self, m: int, k: int, seed: int = 0) -> None:
        self.m, self.k = m, k
        self.embeddings = torch.nn.functional.normalize(
            torch.randn(m, 3, generator=generator(seed), dtype=torch.float64), dim=-1
        )
        self.reward = torch.rand(m, generator=generator(seed + 1), dtype=torch.float64)
        self.theta = torch.randn(m, generator=generator(seed + 2), dtype=torch.float64).requires_grad_(True)

    def groups(self, size: int) -> Tensor:
        return torch.tensor(list(itertools.product(range(self.m), repeat=size)))

    def chance(self, groups: Tensor) -> Tensor:
        return self.theta.softmax(0)[groups].prod(1)

    def gradient(self, value: Callable[[Tensor], float], size: int) -> Tensor:
        """Exact gradient of E[value(group)] over groups of that size, by autograd through the enumeration."""
        groups = self.groups(size)
        values = torch.tensor([value(group) for group in groups], dtype=torch.float64)
        return torch.autograd.grad(self.chance(groups) @ values, self.theta)[0]

    def volume(self, group: Tensor) -> float:
        """log det(L + I), by numpy, of the members that have a reward."""
        members = self.embeddings[group[~self.reward[group].isnan()]].numpy()
        return math.log(np.linalg.det(members @ members.T + np.eye(len(members))))

    def total_reward(self, group: Tensor) -> float:
        return self.reward[group].nansum().item()

    def inputs(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        rewards = self.reward[groups]
        return rewards, leave_one_out_bonus(self.embeddings[groups], ~rewards.isnan())

    def estimate(self, groups: Tensor, advantages: Tensor) -> Tensor:
        """Exact expectation of sum_i grad log pi(y_i) * A_i; grad log pi(y) = onehot(y) - pi for softmax logits."""
        score = torch.nn.functional.one_hot(groups, self.m) - self.theta.softmax(0)
        return (self.chance(groups) @ (score * advantages.unsqueeze(-1)).sum(1)).detach()


def close(actual: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1e-6, "the test would show nothing"
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def drawn(least_k: int = 2, most: int = 128) -> Callable:
    """Toys by hypothesis: answers, group size and seed of embeddings, rewards and policy, with at most `most` groups.

    They are drawn at random and not the same each time, so what holds for them holds for no special case.
    """
    sizes = [(m, k) for m in range(2, 7) for k in range(least_k, 6) if m**k <= most]
    toys = st.builds(lambda size, seed: Toy(*size, seed), st.sampled_from(sizes), st.integers(0, 2**31 - 1))
    return lambda test: settings(deadline=None, max_examples=15)(given(toy=toys, alpha=st.floats(0.05, 8.0))(test))


# --- what is estimated ------------------------------------------------------------------------------------------------


@drawn()
def test_paper_estimates_the_objective(toy: Toy, alpha: float) -> None:
    groups = toy.groups(toy.k)
    advantages = group_advantages(*toy.inputs(groups), alpha, "paper")
    close(toy.estimate(groups, advantages), toy.gradient(lambda g: toy.total_reward(g) + alpha * toy.volume(g), toy.k))


def test_paper_estimates_the_objective_with_unscored_responses() -> None:
    toy = Toy(4, 3)
    toy.reward[2] = torch.nan
    groups = toy.groups(3)
    advantages = group_advantages(*toy.inputs(groups), ALPHA, "paper")
    close(toy.estimate(groups, advantages), toy.gradient(lambda g: toy.total_reward(g) + ALPHA * toy.volume(g), 3))


@drawn()
def test_centred_estimates_the_objective_of_one_response_less(toy: Toy, alpha: float) -> None:
    groups = toy.groups(toy.k)
    advantages = group_advantages(*toy.inputs(groups), alpha, "centred")
    close(
        toy.estimate(groups, advantages),
        toy.gradient(lambda g: toy.total_reward(g) + alpha * toy.volume(g), toy.k - 1),
    )


@drawn(least_k=3)
def test_centred_bonus_alone_has_factor_one(toy: Toy, alpha: float) -> None:
    groups = toy.groups(toy.k)
    _, bonus = toy.inputs(groups)
    advantages = group_advantages(torch.zeros_like(bonus), bonus, alpha, "centred")
    close(toy.estimate(groups, advantages), alpha * toy.gradient(toy.volume, toy.k - 1))


@drawn()
def test_centred_reward_alone_loses_one_kth(toy: Toy, alpha: float) -> None:
    k, groups = toy.k, toy.groups(toy.k)
    rewards, bonus = toy.inputs(groups)
    for form in ("centred", "decoupled"):
        advantages = group_advantages(rewards, bonus, 0.0, form)
        close(toy.estimate(groups, advantages), (k - 1) / k * toy.gradient(toy.total_reward, k))


@drawn(most=81)
def test_decoupled_keeps_the_whole_bonus_with_a_constant(toy: Toy, alpha: float) -> None:
    k, groups = toy.k, toy.groups(toy.k)
    rewards, bonus = toy.inputs(groups)
    # Each group by itself, so that there is no other group to take the baseline from.
    advantages = torch.cat(
        [group_advantages(rewards[i, None], bonus[i, None], alpha, "decoupled") for i in range(toy.m**k)]
    )
    expected = (k - 1) / k * toy.gradient(toy.total_reward, k) + alpha * toy.gradient(toy.volume, k)
    close(toy.estimate(groups, advantages), expected)


@pytest.mark.parametrize(("m", "k"), [(4, 2), (3, 3)])
def test_decoupled_keeps_the_whole_bonus_with_another_prompts_mean(m: int, k: int) -> None:
    toy, other = Toy(m, k), Toy(2, k, seed=9)
    groups, others = toy.groups(k), other.groups(k)
    estimate = torch.zeros(m, dtype=torch.float64)
    for group, chance in zip(others, other.chance(others).detach(), strict=True):
        beside = other.inputs(group.unsqueeze(0))
        pairs = [toy.inputs(mine.unsqueeze(0)) for mine in groups]
        advantages = torch.stack(
            [
                group_advantages(torch.cat([r, beside[0]]), torch.cat([b, beside[1]]), ALPHA, "decoupled")[0]
                for r, b in pairs
            ]
        )
        estimate += chance * toy.estimate(groups, advantages)
    close(estimate, (k - 1) / k * toy.gradient(toy.total_reward, k) + ALPHA * toy.gradient(toy.volume, k))


class Gated(Toy):
    """The toy policy where only some responses earn a bonus: those of a reward above a threshold."""

    threshold = 0.5
    score = "log_volume"

    @property
    def good(self) -> Tensor:
        return self.reward > self.threshold

    def volume(self, group: Tensor) -> float:
        """The score of those that earn, by numpy; of pairs divided by k - 1, whatever the size of the group."""
        members = self.embeddings[group[self.good[group]]].numpy()
        gram = members @ members.T
        if self.score == "cosine_distance":
            return sum(1 - gram[i, j] for i, j in itertools.combinations(range(len(gram)), 2)) / (self.k - 1)
        if self.score == "vendi":
            shares = np.linalg.eigvalsh(gram) / len(gram) if len(gram) else np.array([])
            shares = shares[shares > 1e-14]
            return math.exp(-(shares * np.log(shares)).sum()) if len(gram) else 0.0
        return math.log(np.linalg.det(gram + np.eye(len(members))))

    def advantages(self, groups: Tensor, form: str, unearned: str) -> Tensor:
        earns, likelihood = self.good[groups], self.theta.detach().log_softmax(0)[groups]
        bonus = group_score(self.score, self.k).bonus(Group(self.embeddings[groups], earns, likelihood))
        if form == "decoupled":  # one group at a time, so that c is a constant
            return torch.cat(
                [
                    group_advantages(self.reward[g][None], b[None], ALPHA, form, earns=e[None], unearned=unearned)
                    for g, b, e in zip(groups, bonus, earns, strict=True)
                ]
            )
        return group_advantages(self.reward[groups], bonus, ALPHA, form, earns=earns, unearned=unearned)


EXPECTED_AT = [("paper", 0, 0), ("centred", 1, 1), ("decoupled", 1, 0)]
"""Of each form: how many responses less than k the estimated rewards and the estimated score are of."""


@pytest.mark.parametrize(("m", "k"), [(5, 3), (4, 4)])
@pytest.mark.parametrize("score", ["log_volume", "cosine_distance", "vendi"])
@pytest.mark.parametrize(("form", "rewards", "volume"), EXPECTED_AT)
def test_a_bonus_of_zero_estimates_the_score_of_those_that_earn(
    m: int, k: int, score: str, form: str, rewards: int, volume: int
):
    toy = Gated(m, k, seed=1)
    toy.score = score
    assert 1 < toy.good.sum() < m
    groups = toy.groups(k)
    of_rewards, of_score = toy.gradient(toy.total_reward, k - rewards), ALPHA * toy.gradient(toy.volume, k - volume)
    assert of_score.abs().max() > 1e-2
    close(toy.estimate(groups, toy.advantages(groups, form, "zero")), of_rewards + of_score)


@pytest.mark.parametrize(("form", "rewards", "counted"), EXPECTED_AT)
def test_the_entropy_of_those_that_earn_has_one_nat_more_for_each(form: str, rewards: int, counted: int):
    """What the estimator leaves out, E[-grad log pi], is 0 over all responses, and not over those that earn."""
    toy = Gated(4, 3, seed=1)
    toy.score = "entropy"
    groups, of = toy.groups(3), toy.groups(3 - counted)
    surprise = (1 - toy.theta.log_softmax(0)[of]).where(toy.good[of], 0.0).sum(1)
    (of_score,) = torch.autograd.grad(toy.chance(of) @ surprise, toy.theta)
    close(
        toy.estimate(groups, toy.advantages(groups, form, "zero")),
        toy.gradient(toy.total_reward, 3 - rewards) + ALPHA * of_score,
    )


def test_apart_pushes_away_what_earns_where_many_do_and_are_alike():
    """The reason for `zero`: four answers, the three right ones all but the same, and a policy that knows them."""
    toy = Gated(4, 4)
    toy.embeddings = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.1, 0], [1.0, -0.1, 0], [1.0, 0, 0.1], [0, 0, 1.0]], dtype=torch.float64), dim=-1
    )
    toy.reward = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    toy.theta = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64).requires_grad_(True)
    groups = toy.groups(4)

    def push(unearned: str) -> float:
        """Change of the chance to be right that the bonus alone makes."""
        bonus = toy.advantages(groups, "decoupled", unearned) - group_advantages(
            toy.reward[groups], torch.zeros(groups.shape, dtype=torch.float64), 0.0, "decoupled"
        )
        chance = toy.theta.softmax(0).detach()
        return (toy.estimate(groups, bonus)[:3] * chance[:3]).sum().item()

    assert push("apart") < 0 < push("zero")


def test_decoupled_with_a_baseline_from_its_own_group_would_be_biased() -> None:
    """Leaving the own group out of c is not a detail: with it in, the enumeration above fails."""
    toy = Toy(4, 3)
    groups = toy.groups(3)
    _, bonus = toy.inputs(groups)
    biased = toy.estimate(groups, bonus - bonus.mean(1, keepdim=True))
    assert (biased - toy.gradient(toy.volume, 3)).abs().max() > 1e-2


@drawn()
def test_shared_log_det_centred_is_no_signal(toy: Toy, alpha: float) -> None:
    """Not in a single group, so neither in expectation."""
    groups = toy.groups(toy.k)
    rewards, _ = toy.inputs(groups)
    shared = torch.tensor([toy.volume(group) for group in groups], dtype=torch.float64)[:, None].expand_as(rewards)
    plain = group_advantages(rewards, shared, 0.0, "centred")
    torch.testing.assert_close(group_advantages(rewards, shared, alpha, "centred"), plain, atol=1e-13, rtol=0)


@given(m=st.integers(2, 7), seed=st.integers(0, 2**31 - 1), alpha=st.floats(0.05, 8.0))
@settings(deadline=None, max_examples=25)
def test_pairs_centred_have_no_bonus_but_decoupled_do(m: int, seed: int, alpha: float) -> None:
    toy = Toy(m, 2, seed)
    rewards, bonus = toy.inputs(toy.groups(2))
    plain = group_advantages(rewards, bonus, 0.0, "centred")
    torch.testing.assert_close(group_advantages(rewards, bonus, alpha, "centred"), plain, atol=1e-13, rtol=0)
    # Two equal responses have log(3/2) each, two others more: the groups' bonuses differ, and with them the advantages.
    assert (group_advantages(rewards, bonus, alpha, "decoupled") - plain).abs().max() > 1e-6


# --- values -----------------------------------------------------------------------------------------------------------

NAN = math.nan
REWARDS = torch.tensor([[1.0, 0.0, 0.5], [0.25, NAN, 0.75], [NAN, NAN, 1.0], [NAN, NAN, NAN]], dtype=torch.float64)
# Members without a reward carry a value on purpose: it must not be read.
BONUS = torch.tensor([[0.3, 0.6, 0.5], [0.4, 9.0, 0.65], [9.0, NAN, 0.69], [9.0, 9.0, 9.0]], dtype=torch.float64)


def by_hand(form: str, quality_scale: str) -> list[list[float]]:
    """The definition, member by member, in plain Python and numpy."""
    scored = [[i for i, r in enumerate(row) if not math.isnan(r)] for row in REWARDS.tolist()]
    rewards, bonus = REWARDS.tolist(), BONUS.tolist()
    advantages = [[0.0] * 3 for _ in rewards]
    for g, members in enumerate(scored):
        own = [rewards[g][i] for i in members]
        values = own if quality_scale == "group" else [rewards[h][i] for h, row in enumerate(scored) for i in row]
        std = np.std(values, ddof=1) if len(values) > 1 else 0.0
        others = [bonus[h][i] for h, row in enumerate(scored) if h != g for i in row]
        for i in members:
            quality = (rewards[g][i] - np.mean(own)) / (1.0 if quality_scale == "none" else std + 1e-4)
            if form == "paper":
                advantages[g][i] = rewards[g][i] + ALPHA * bonus[g][i]
            elif form == "centred":
                advantages[g][i] = quality + ALPHA * (bonus[g][i] - np.mean([bonus[g][j] for j in members]))
            else:
                advantages[g][i] = quality + ALPHA * (bonus[g][i] - np.mean(others))
    return advantages


@pytest.mark.parametrize(
    ("form", "quality_scale"),
    [("paper", "none"), *itertools.product(["centred", "decoupled"], ["none", "group", "batch"])],
)
def test_unscored_members_count_nowhere(form: str, quality_scale: str) -> None:
    advantages = group_advantages(REWARDS, BONUS, ALPHA, form, quality_scale)
    np.testing.assert_allclose(advantages, by_hand(form, quality_scale), atol=1e-12)
    assert (advantages[REWARDS.isnan()] == 0).all()


@pytest.mark.parametrize("rewards", [[[0.2, 0.9, 0.4]], [[0.2, 0.9, 0.4], [NAN, NAN, NAN]]])
def test_decoupled_without_other_members_centres_on_the_middle_of_the_range(rewards: list[list[float]]) -> None:
    tensor = torch.tensor(rewards, dtype=torch.float64)
    bonus = torch.tensor([math.log(4 / 3), math.log(2), 0.5], dtype=torch.float64).expand_as(tensor)
    diversity = group_advantages(tensor, bonus, 1.0, "decoupled") - group_advantages(tensor, bonus, 0.0, "decoupled")
    assert diversity[0, 0].item() == pytest.approx(-diversity[0, 1].item(), abs=1e-15)
    assert diversity[0, 1].item() == pytest.approx((math.log(2) - math.log(4 / 3)) / 2, abs=1e-15)
    assert torch.equal(diversity[1:], torch.zeros_like(diversity[1:]))


@pytest.mark.parametrize("form", ["centred", "decoupled"])
@pytest.mark.parametrize("quality_scale", ["group", "batch"])
def test_scale_never_divides_the_bonus(form: str, quality_scale: str) -> None:
    tied = torch.full((2, 4), 0.5, dtype=torch.float64)
    bonus = torch.tensor([[0.6, 0.6001, 0.6, 0.6], [0.5, 0.5, 0.5, 0.5001]], dtype=torch.float64)
    scaled = group_advantages(tied, bonus, 1.0, form, quality_scale)
    torch.testing.assert_close(scaled, group_advantages(tied, bonus, 1.0, form), atol=1e-15, rtol=0)
    torch.testing.assert_close(group_advantages(tied, bonus, 2.0, form, quality_scale), 2 * scaled, atol=1e-15, rtol=0)


@pytest.mark.parametrize("quality_scale", ["group", "batch"])
def test_scaled_quality_has_unit_spread(quality_scale: str) -> None:
    rewards = torch.rand(6, 8, generator=generator(3), dtype=torch.float64)
    rewards += torch.arange(6, dtype=torch.float64)[:, None] * (quality_scale == "group")
    quality = group_advantages(rewards, torch.zeros_like(rewards), 1.0, "centred", quality_scale)
    if quality_scale == "group":
        np.testing.assert_allclose(np.std(quality.numpy(), axis=1, ddof=1), 1.0, atol=1e-3)
    else:
        expected = (rewards - rewards.mean(1, keepdim=True)) / (np.std(rewards.numpy(), ddof=1) + 1e-4)
        torch.testing.assert_close(quality, expected, atol=1e-12, rtol=0)


@given(
    st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**32 - 1), st.sampled_from(["paper", "centred", "decoupled"])
)
@settings(deadline=None, max_examples=40)
def test_order_of_prompts_and_members_does_not_matter(groups: int, k: int, seed: int, form: str) -> None:
    draw = generator(seed)
    rewards = torch.rand(groups, k, generator=draw, dtype=torch.float64)
    rewards[torch.rand(groups, k, generator=draw) < 0.2] = torch.nan
    bonus = torch.rand(groups, k, generator=draw, dtype=torch.float64)
    rows, columns = torch.randperm(groups, generator=draw)[:, None], torch.randperm(k, generator=draw)
    torch.testing.assert_close(
        group_advantages(rewards[rows, columns], bonus[rows, columns], ALPHA, form),
        group_advantages(rewards, bonus, ALPHA, form)[rows, columns],
        atol=1e-13,
        rtol=0,
    )


def test_inputs_stay_as_they_were() -> None:
    rewards, bonus = REWARDS.clone(), BONUS.clone()
    group_advantages(rewards, bonus, ALPHA, "decoupled", "batch")
    assert torch.equal(rewards.nan_to_num(-1), REWARDS.nan_to_num(-1))
    assert torch.equal(bonus.nan_to_num(-1), BONUS.nan_to_num(-1))


@pytest.mark.parametrize(
    ("shapes", "form", "quality_scale", "message"),
    [
        (((8,), (8,)), "paper", "none", r"rewards must have shape \(groups, k\) with k >= 2, got \(8,\)"),
        (((8, 1), (8, 1)), "paper", "none", r"rewards must have shape \(groups, k\) with k >= 2, got \(8, 1\)"),
        (((2, 4), (4, 2)), "paper", "none", r"bonus must have the rewards' shape \(2, 4\), got \(4, 2\)"),
        (((2, 4), (2, 4)), "centered", "none", "form must be 'paper', 'centred' or 'decoupled', got 'centered'"),
        (((2, 4), (2, 4)), "centred", "std", "quality_scale must be 'none', 'group' or 'batch', got 'std'"),
        (((2, 4), (2, 4)), "paper", "group", "form 'paper' takes the reward as it is; .* got 'group'"),
    ],
)
def test_misuse_is_named(shapes: tuple, form: str, quality_scale: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(shapes[0]), torch.zeros(shapes[1]), 1.0, form, quality_scale)


def test_weighted_is_each_papers_product():
    rewards = torch.tensor([[1.0, 0.5, math.nan, 0.0]], dtype=torch.float64)
    share = torch.tensor([[0.2, 1.0, 0.5, 0.7]], dtype=torch.float64)
    darling = weighted(rewards, share, 1.0)[0].tolist()
    assert darling[:2] == pytest.approx([0.2, 0.5]) and math.isnan(darling[2]) and darling[3] == 0.0
    # Rewarding the unlikely: r (1 - beta (1 - share)).
    assert weighted(rewards, share, 0.25)[0, :2].tolist() == pytest.approx([1 - 0.25 * 0.8, 0.5])
    # DRA-GRPO: r / (1 + sum of similarities to the others).
    angle = torch.tensor([0.0, 0.4, 1.1, 2.8], dtype=torch.float64)
    vectors = torch.stack([angle.cos(), angle.sin()], -1)
    similarities = [sum(max(0.0, math.cos(a - b)) for b in angle.tolist()) - 1 for a in angle.tolist()]
    got = weighted(torch.full((1, 4), 0.8, dtype=torch.float64), similarity_bonus(vectors)[None], 1.0)[0].tolist()
    assert got == pytest.approx([0.8 / (1 + one) for one in similarities])
    assert weighted(rewards, share, 0.0)[0, :2].tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("alpha", "reward", "message"), [(1.1, 0.5, "alpha must be in"), (0.5, -0.1, "not be negative")]
)
def test_weighted_refuses_what_turns_around(alpha: float, reward: float, message: str):
    with pytest.raises(ValueError, match=message):
        weighted(torch.full((1, 2), reward), torch.ones(1, 2), alpha)


@pytest.mark.parametrize("name", get_args(Score))
def test_two_responses_have_one_bonus_but_for_scores_of_single_responses(name: str):
    """What `dqo recipe check` warns about: centred by a pair, the bonus is gone."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(3, 2, 8, generator=draw), dim=-1)
    bonus = group_score(name, 2).bonus(Group(vectors, torch.ones(3, 2).bool(), torch.randn(3, 2, generator=draw)))
    moved = group_advantages(torch.zeros(3, 2), bonus, 1.0, "centred").abs().max().item()
    assert (moved > 0.1) == (name in ("likelihood", "entropy"))
    assert moved > 0.1 or moved < 1e-6


@pytest.mark.parametrize(("unearned", "moved"), [("zero", True), ("apart", False)])
def test_of_a_pair_one_that_earns_differs_from_one_that_does_not_under_zero(unearned: str, moved: bool):
    bonus, earns = torch.tensor([[0.6, 0.0]]), torch.tensor([[True, False]])
    found = group_advantages(torch.zeros(1, 2), bonus, 1.0, "centred", earns=earns, unearned=unearned)
    assert found.tolist() == [[pytest.approx(0.3), pytest.approx(-0.3)]] if moved else [[0.0, 0.0]]
