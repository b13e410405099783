"""Group scores against other formulas: determinants, a second library, pairs one by one, a search for components."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from vendi_score import vendi

from dqo.advantage import group_advantages
from dqo.determinant import leave_one_out_bonus
from dqo.diversity import (
    Group,
    cosine_bonus,
    distinct_bonus,
    elliptical_bonus,
    group_score,
    similarity_bonus,
    unlikeliness,
    vendi_bonus,
)

OF_EMBEDDINGS = ("log_volume", "elliptical", "cosine_distance", "vendi", "distinct", "similarity")
NAMES = (*OF_EMBEDDINGS, "likelihood", "entropy")
K = 6


def groups(count: int = 5, k: int = K, d: int = 4, seed: int = 0) -> Tensor:
    """Unit vectors, crowded enough that some are near each other, with one exact repetition in each group."""
    draw = torch.Generator().manual_seed(seed)
    raw = torch.randn(count, k, d, generator=draw, dtype=torch.float64) + torch.tensor([1.5, 0.0, 0.0, 0.0])[:d]
    raw[:, 1] = raw[:, 0]
    return torch.nn.functional.normalize(raw, dim=-1)


def bonus_of(name: str, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
    return group_score(name, embeddings.shape[-2]).bonus(Group(embeddings, mask, likelihoods(embeddings)))


def likelihoods(embeddings: Tensor) -> Tensor:
    """Log-likelihoods of between -20 and 0 nats that go with a member; equal members have equal ones."""
    return -20 * (embeddings.sum(-1) / embeddings.shape[-1] ** 0.5).abs()


def test_elliptical_is_the_quadratic_form_with_the_inverse():
    embeddings = groups()
    for group, got in zip(embeddings.numpy(), elliptical_bonus(embeddings), strict=True):
        for i in range(K):
            others = np.delete(group, i, axis=0)
            expected = group[i] @ np.linalg.inv(np.eye(4) + others.T @ others) @ group[i]
            assert got[i].item() == pytest.approx(expected, abs=1e-10)


def test_cosine_distance_is_the_mean_over_the_others():
    embeddings = groups()
    for group, got in zip(embeddings.numpy(), cosine_bonus(embeddings), strict=True):
        for i in range(K):
            expected = np.mean([1 - group[i] @ group[j] for j in range(K) if j != i])
            assert got[i].item() == pytest.approx(expected, abs=1e-10)


def test_cosine_distance_sums_over_pairs_of_those_that_count():
    embeddings, counted = groups(), [0, 1, 3, 5]
    mask = torch.tensor([i in counted for i in range(K)]).expand(len(embeddings), K)

    def score(group: np.ndarray, members: list[int]) -> float:
        return sum(1 - group[i] @ group[j] for i, j in itertools.combinations(members, 2)) / (K - 1)

    for group, got in zip(embeddings.numpy(), cosine_bonus(embeddings, mask), strict=True):
        for i in range(K):
            expected = score(group, counted) - score(group, [j for j in counted if j != i])
            assert got[i].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_all_count_the_cosine_distance_is_the_mean_to_the_last_bit(dtype: torch.dtype):
    embeddings = groups(count=50).to(dtype)
    gram = embeddings @ embeddings.mT
    similarity = gram.sum(-1) - gram.diagonal(dim1=-2, dim2=-1)
    expected = (torch.tensor(K - 1) - similarity).clamp(min=0.0) / torch.tensor([K - 1])
    assert torch.equal(cosine_bonus(embeddings), expected)
    assert torch.equal(cosine_bonus(embeddings, torch.ones(50, K, dtype=torch.bool)), expected)


def test_vendi_is_the_difference_of_the_librarys_scores():
    embeddings = groups()
    for group, got in zip(embeddings.numpy(), vendi_bonus(embeddings), strict=True):
        whole = vendi.score_K(group @ group.T)
        for i in range(K):
            others = np.delete(group, i, axis=0)
            assert got[i].item() == pytest.approx(whole - vendi.score_K(others @ others.T), abs=1e-6)


def test_distinct_counts_members_of_other_components():
    """A chain links its ends although they are far apart, as a search through the graph says."""
    angles = torch.tensor([0.0, 20.0, 40.0, 60.0, 120.0, 240.0], dtype=torch.float64) * math.pi / 180
    ring = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    assert distinct_bonus(ring, threshold=math.cos(math.radians(21)))[0].tolist() == pytest.approx(
        [2 / 5, 2 / 5, 2 / 5, 2 / 5, 1.0, 1.0]
    )
    embeddings = groups(count=20)
    for group, got in zip(embeddings.numpy(), distinct_bonus(embeddings, threshold=0.9), strict=True):
        near = group @ group.T >= 0.9 - 1e-9
        for i in range(K):
            reached, frontier = {i}, [i]
            while frontier:
                node = frontier.pop()
                new = [j for j in range(K) if near[node, j] and j not in reached]
                reached.update(new)
                frontier += new
            assert got[i].item() == pytest.approx((K - len(reached)) / (K - 1))


def test_similarity_divides_by_one_plus_the_similarities():
    embeddings = groups()
    embeddings[0, 3] = -embeddings[0, 2]  # opposites are no reason to divide by less than one
    for group, got in zip(embeddings.numpy(), similarity_bonus(embeddings), strict=True):
        for i in range(K):
            expected = 1 / (1 + sum(max(0.0, group[i] @ group[j]) for j in range(K) if j != i))
            assert got[i].item() == pytest.approx(expected, abs=1e-10)


def test_unlikeliness_is_the_rank_among_the_others():
    values = torch.tensor([[-3.0, -1.0, -7.0, -2.0], [-5.0, -5.0, -1.0, -9.0]])
    torch.testing.assert_close(unlikeliness(values), torch.tensor([[2 / 3, 0, 1, 1 / 3], [0.5, 0.5, 0, 1]]))
    mask = torch.tensor([[True, True, False, True], [True, True, False, False]])
    torch.testing.assert_close(unlikeliness(values, mask), torch.tensor([[1, 0, 0, 0.5], [0.5, 0.5, 0, 0]]))


def test_the_entropy_score_estimates_the_gradient_of_the_entropy():
    """All groups of three answers of a softmax policy, against automatic differentiation of its entropy."""
    logits = torch.tensor([0.3, -1.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(), logits, retain_graph=True)
    likelihood, chance = log_p.detach(), log_p.detach().exp()
    got = torch.zeros(4, dtype=torch.float64)
    for rows in itertools.product(range(4), repeat=3):
        index = torch.tensor(rows)
        bonus = group_score("entropy", 3).bonus(Group(torch.zeros(3, 1), None, likelihood[index]))
        advantages = group_advantages(torch.zeros(1, 3), bonus[None].float(), 1.0, "paper")[0].double()
        scores = torch.eye(4, dtype=torch.float64)[index] - chance
        got += chance[index].prod() * (advantages[:, None] * scores).sum(0)
    torch.testing.assert_close(got, 3 * expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["likelihood", "entropy"])
def test_a_score_of_the_likelihood_asks_for_it(name: str):
    assert group_score(name, 4).of_likelihood
    with pytest.raises(ValueError, match="log_likelihood must be given"):
        group_score(name, 4).bonus(Group(groups()))


@pytest.mark.parametrize("name", NAMES)
def test_masked_members_leave_the_group(name: str):
    embeddings = groups()
    mask = torch.ones(embeddings.shape[:-1], dtype=torch.bool)
    mask[:, [2, 4]] = False
    broken = embeddings.clone()
    broken[:, 2] = math.nan
    got = bonus_of(name, broken, mask)
    kept = [0, 1, 3, 5]
    group = Group(embeddings[:, kept], None, likelihoods(embeddings)[:, kept])
    expected = group_score(name, 4).bonus(group)
    if name == "cosine_distance":  # over k - 1, whoever leaves
        expected *= (4 - 1) / (K - 1)
    torch.testing.assert_close(got[:, kept], expected)
    assert not got[:, [2, 4]].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_members_and_of_groups_does_not_matter(name: str):
    embeddings = groups()
    order = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(bonus_of(name, embeddings)[:, order], bonus_of(name, embeddings[:, order]))
    torch.testing.assert_close(bonus_of(name, embeddings)[3], bonus_of(name, embeddings[3]))


@pytest.mark.parametrize(
    ("name", "same", "unlike"),
    [
        ("log_volume", math.log(1 + 1 / K), math.log(2)),
        ("elliptical", 1 / K, 1.0),
        ("cosine_distance", 0.0, 1.0),
        ("vendi", 0.0, 1.0),
        ("distinct", 0.0, 1.0),
        ("similarity", 1 / K, 1.0),
    ],
)
def test_ends_of_the_range(name: str, same: float, unlike: float):
    """Responses that coincide, and responses that have nothing in common."""
    equal = torch.eye(K, dtype=torch.float64)[0].expand(1, K, K)
    torch.testing.assert_close(bonus_of(name, equal), torch.full((1, K), same, dtype=torch.float64))
    torch.testing.assert_close(bonus_of(name, torch.eye(K, dtype=torch.float64)[None]),
                               torch.full((1, K), unlike, dtype=torch.float64))  # fmt: skip


@pytest.mark.parametrize("scale", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("name", ["log_volume", "elliptical"])
def test_the_middle_of_the_range_follows_the_kernel_scale(name: str, scale: float):
    """The ends by determinants: of equal members, and of members at right angles."""
    ends = []
    for gram in (np.ones((K, K)), np.eye(K)):
        kernel = np.eye(K) + scale**2 * gram
        ratio = np.linalg.det(kernel) / np.linalg.det(kernel[1:, 1:])
        ends.append(np.log(ratio) if name == "log_volume" else ratio - 1)
    score = group_score(name, K, scale)
    assert score.middle == pytest.approx(np.mean(ends), rel=1e-9)
    for embeddings, end in zip((torch.eye(K)[:1].expand(K, K), torch.eye(K)), ends, strict=True):
        assert score.bonus(Group(embeddings.double()))[0].item() == pytest.approx(end, rel=1e-6)


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
def test_a_repetition_earns_less_than_the_odd_one_out(name: str):
    base = torch.nn.functional.normalize(torch.tensor([[[1.0, 0.1, 0.0], [1.0, 0.1, 0.0], [0.0, 0.2, 1.0]]]), dim=-1)
    first, second, odd = bonus_of(name, base)[0].tolist()
    assert first == pytest.approx(second, abs=1e-5)
    assert odd > first + 0.05


def test_the_log_volume_is_the_methods_own():
    embeddings = groups()
    assert torch.equal(bonus_of("log_volume", embeddings), leave_one_out_bonus(embeddings))


@pytest.mark.parametrize("name", NAMES)
def test_a_member_alone_and_an_empty_group(name: str):
    embeddings = groups(count=1, k=3)
    alone = bonus_of(name, embeddings, torch.tensor([[True, False, False]]))[0, 0].item()
    expected = {"log_volume": math.log(2), "elliptical": 1.0, "vendi": 1.0, "similarity": 1.0}
    expected["entropy"] = -likelihoods(embeddings)[0, 0].item()
    assert alone == pytest.approx(expected.get(name, 0.0))
    assert not bonus_of(name, embeddings, torch.zeros(1, 3, dtype=torch.bool)).any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="got 'volume'; expected log_volume"):
        group_score("volume", 4)
    with pytest.raises(ValueError, match=r"mask must have shape \(5, 6\), got \(5, 5\)"):
        cosine_bonus(groups(), torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"threshold must be in \(-1, 1\], got 2"):
        distinct_bonus(groups(), threshold=2.0)
    with pytest.raises(ValueError, match=r"shape \(\.\.\., k, d\), got \(4,\)"):
        vendi_bonus(torch.ones(4))
