r"""Group scores: what each response adds to the variety of its group, behind one interface.

The method's own score is the log-volume (`dqo.determinant`). The others are those it is compared with, in leave-one-out
or per-member form, so that like is compared with like: each takes groups of responses, as unit-norm embeddings or as
log-likelihoods under the policy, and says what every member contributes. All are pure torch, batched over groups and
free of Python loops.

With L the Gram matrix of the m counted members' embeddings and l_i = log pi(y_i | x), for member i:

| name | bonus of member i | of | range |
|---|---|---|---|
| `log_volume` | log det(L + I) - log det(L_{-i} + I) | DQO | [log(1 + 1/m), log 2] |
| `elliptical` | phi_i' (I + sum_{j != i} phi_j phi_j')^{-1} phi_i | RepExp (arXiv 2510.11686) | [1/m, 1] |
| `cosine_distance` | sum over j != i of 1 - L[i, j], over k - 1 | pairwise distance | [0, 2] |
| `vendi` | V(L) - V(L_{-i}), V the exp of the eigenvalues' entropy | Vendi score (arXiv 2210.02410) | see below |
| `distinct` | share of the others that mean something else | DARLING (arXiv 2509.02534) | [0, 1] |
| `similarity` | 1 / (1 + sum over j != i of max(0, L[i, j])) | DRA-GRPO (arXiv 2505.09655) | [1/m, 1] |
| `likelihood` | share of the others that are more likely, ties half | likelihood rank (arXiv 2506.02355) | [0, 1] |
| `entropy` | -l_i | entropy bonus | [0, inf) |

The forms of DQO, RepExp, DARLING, DRA-GRPO and the likelihood rank are [second hand]. `elliptical` is exp(b_i) - 1 of
the log-volume's bonus b_i [derived], so it orders members of one group alike and weighs the odd one out more.
`distinct` puts two responses into one class when a chain of similarities of at least the threshold links them; DARLING
asks a trained classifier instead [second hand]. `vendi` may be slightly negative: a response that repeats the most
frequent meaning makes the group less even. It is 1 for every member of a group of orthogonal ones [derived]; no general
bound was proven.

DARLING multiplies the reward by the share, DRA-GRPO divides it by one plus the similarities, and "rewarding the
unlikely" multiplies it by 1 - beta (1 - rank / k) with rank k for the least likely [second hand]. With `combine:
multiply` (`dqo.advantage.weighted`) the first two are alpha = 1; the third is alpha = beta, but for the rank being
counted among the others, from 0 to 1 [ours]. With `combine: add` all are compared with the volume on equal terms.

`entropy` is the exact estimator of the gradient of the response's entropy: grad E[-l] = E[-l grad l], because E[grad l]
is 0 [derived]. It grows with length, as the entropy of a sequence does. Where members are masked for what they are,
E[grad l] over the others is not 0, and the estimate is that of the sum of 1 - l over these [derived, checked by
enumeration].

Masked members leave the group: they get 0, and the others' bonuses are those of the group of m. Only
`cosine_distance` remembers k: divided by a constant it is the leave-one-out difference of one score, whoever leaves,
which a mean over the m - 1 others is not, since the m of that score would move with the members. A member alone in its
group has `log_volume` log 2, `elliptical` and `vendi` 1, and 0 for what is relative to others.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dqo.determinant import leave_one_out_bonus


@dataclass(frozen=True)
class Group:
    """Responses to one prompt or, with leading dimensions, to many.

    Attributes:
        embeddings: Unit-norm response embeddings, shape `(..., k, d)`.
        mask: Members that count, boolean, shape `(..., k)`; `None` counts all.
        log_likelihood: log pi(y_i | x) under the policy that sampled them, in nats, shape `(..., k)`; for `likelihood`
            and `entropy` only.
    """

    embeddings: Tensor
    mask: Tensor | None = None
    log_likelihood: Tensor | None = None


def _gram(embeddings: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gram matrices `(..., k, k)` with zeros for masked members, and the mask as booleans `(..., k)`."""
    if embeddings.dim() < 2:
        raise ValueError(f"embeddings must have shape (..., k, d), got {tuple(embeddings.shape)}")
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        embeddings = embeddings.float()
    counted = torch.ones(embeddings.shape[:-1], dtype=torch.bool, device=embeddings.device)
    if mask is not None:
        if mask.shape != counted.shape:
            raise ValueError(f"mask must have shape {tuple(counted.shape)}, got {tuple(mask.shape)}")
        counted = mask.bool()
        embeddings = torch.where(counted.unsqueeze(-1), embeddings, 0.0)
    with torch.autocast(embeddings.device.type, enabled=False):
        return embeddings @ embeddings.mT, counted


def elliptical_bonus(embeddings: Tensor, mask: Tensor | None = None, kernel_scale: float = 1.0) -> Tensor:
    r"""Elliptical bonus of each member against the others: `phi_i' (I + sum_{j != i} phi_j phi_j')^{-1} phi_i`.

    By the matrix determinant lemma it is `exp(b_i) - 1` of the log-volume's bonus [derived].

    Args:
        embeddings: Unit-norm response embeddings, shape `(..., k, d)`.
        mask: Members that count, boolean, shape `(..., k)`; `None` counts all.
        kernel_scale: Factor on the embeddings.

    Returns:
        Shape `(..., k)`, dimensionless, in `[1/m, 1]` at scale 1; 0 for masked members.

    Raises:
        ValueError: As `dqo.determinant.leave_one_out_bonus`.
    """
    return torch.expm1(leave_one_out_bonus(embeddings, mask, kernel_scale))


def cosine_bonus(embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of the cosine distances of each member to the others that count, divided by k - 1.

    Where all count, that is the mean distance to the others. It is the leave-one-out difference of the sum over pairs
    of counted members, divided by k - 1 [derived, checked by enumeration].

    Args:
        embeddings: Unit-norm response embeddings, shape `(..., k, d)`.
        mask: Members that count, boolean, shape `(..., k)`; `None` counts all.

    Returns:
        Shape `(..., k)`, in [0, 2]; 0 for masked members and for a member alone.

    Raises:
        ValueError: If a shape does not fit.
    """
    gram, counted = _gram(embeddings, mask)
    others = counted.sum(-1, keepdim=True) - 1
    similarity = gram.sum(-1) - gram.diagonal(dim1=-2, dim2=-1)
    # A tensor: CUDA divides by a number of Python as it multiplies by its inverse, which rounds otherwise.
    all_others = torch.full_like(others, max(1, gram.shape[-1] - 1))
    return torch.where(counted, (others - similarity).clamp(min=0.0) / all_others, 0.0)


def vendi_bonus(embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
    """What each member adds to the Vendi score, the effective number of different responses.

    Args:
        embeddings: Unit-norm response embeddings, shape `(..., k, d)`.
        mask: Members that count, boolean, shape `(..., k)`; `None` counts all.

    Returns:
        Shape `(..., k)`, in effective responses; 0 for masked members. The score of an empty group is 0.

    Raises:
        ValueError: If a shape does not fit.

    Source: Friedman and Dieng, 2023 (arXiv 2210.02410), order 1; the leave-one-out form is ours.
    """
    gram, counted = _gram(embeddings, mask)
    k = gram.shape[-1]
    # Member i's row and column are zeroed in the i-th of k copies: the zero eigenvalue adds nothing to the entropy.
    kept = counted.unsqueeze(-2) & ~torch.eye(k, dtype=torch.bool, device=gram.device)
    without = torch.where(kept.unsqueeze(-1) & kept.unsqueeze(-2), gram.unsqueeze(-3), 0.0)
    bonus = _vendi(gram, counted.sum(-1)).unsqueeze(-1) - _vendi(without, kept.sum(-1))
    return torch.where(counted, bonus, 0.0)


def _vendi(gram: Tensor, members: Tensor) -> Tensor:
    shares = torch.linalg.eigvalsh(gram) / members.clamp(min=1).unsqueeze(-1)
    return torch.where(members > 0, torch.special.entr(shares.clamp(min=0.0)).sum(-1).exp(), 0.0)


def same_meaning(gram: Tensor, threshold: float, mask: Tensor | None = None) -> Tensor:
    """Which members of a group a chain of similarities links, each of at least the threshold (single linkage).

    Args:
        gram: Cosine similarities, shape `(..., k, k)`.
        threshold: Similarity from which two members mean the same.
        mask: Members that count, boolean, shape `(..., k)`; `None` counts all.

    Returns:
        Shape `(..., k, k)`, of the gram's dtype: 1 for two members of one class, each with itself, otherwise 0.

    Raises:
        ValueError: If the threshold is not in (-1, 1].
    """
    if not -1.0 < threshold <= 1.0:
        raise ValueError(f"threshold must be in (-1, 1], got {threshold}")
    # float32 puts a vector's product with its copy a rounding below 1.
    linked = gram >= threshold - 1e-6
    if mask is not None:
        linked = linked & mask.unsqueeze(-1) & mask.unsqueeze(-2)
    linked = linked.to(gram.dtype)
    for _ in range(max(1, (gram.shape[-1] - 1).bit_length())):  # squaring doubles the length of the chains it follows
        linked = (linked @ linked).clamp(max=1.0)
    return linked


def distinct_bonus(embeddings: Tensor, mask: Tensor | None = None, threshold: float = 0.7) -> Tensor:
    """Share of the other members that mean something else than this one.

    Args:
        embeddings: Unit-norm response embeddings, shape `(..., k, d)`.
        mask: Members that count, boolean, shape `(..., k)`; `None` counts all.
        threshold: Cosine similarity from which two responses mean the same; linked by a chain, they do too.

    Returns:
        Shape `(..., k)`, in [0, 1]; 0 for masked members and for a member alone.

    Raises:
        ValueError: If a shape does not fit or the threshold is not in (-1, 1].
    """
    gram, counted = _gram(embeddings, mask)
    together = same_meaning(gram, threshold, counted)
    members = counted.sum(-1, keepdim=True)
    return torch.where(counted, (members - together.sum(-1)) / (members - 1).clamp(min=1), 0.0)


def similarity_bonus(embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
    """One over one plus the summed cosine similarity of each member to the others; opposites count as unrelated.

    Args:
        embeddings: Unit-norm response embeddings, shape `(..., k, d)`.
        mask: Members that count, boolean, shape `(..., k)`; `None` counts all.

    Returns:
        Shape `(..., k)`, in [1/m, 1]; 0 for masked members.

    Raises:
        ValueError: If a shape does not fit.

    Source: DRA-GRPO (arXiv 2505.09655) [second hand]; leaving opposites out is ours.
    """
    gram, counted = _gram(embeddings, mask)
    similarity = gram.clamp(min=0.0)
    others = similarity.sum(-1) - similarity.diagonal(dim1=-2, dim2=-1)
    return torch.where(counted, 1 / (1 + others), 0.0)


def unlikeliness(log_likelihood: Tensor, mask: Tensor | None = None) -> Tensor:
    """Share of the other members that the policy finds more likely, ties counted half: 1 for the least likely.

    Args:
        log_likelihood: log pi(y_i | x) in nats, shape `(..., k)`.
        mask: Members that count, boolean, shape `(..., k)`; `None` counts all.

    Returns:
        Shape `(..., k)`, in [0, 1]; 0 for masked members and for a member alone.

    Source: the rank of He et al., 2025 (arXiv 2506.02355) [second hand], counted among the others.
    """
    counted = torch.ones_like(log_likelihood, dtype=torch.bool) if mask is None else mask.bool()
    own, other = log_likelihood.unsqueeze(-1), log_likelihood.unsqueeze(-2)
    k = log_likelihood.shape[-1]
    pairs = counted.unsqueeze(-2) & ~torch.eye(k, dtype=torch.bool, device=log_likelihood.device)
    behind = (other > own).to(log_likelihood.dtype) + 0.5 * (other == own).to(log_likelihood.dtype)
    share = torch.where(pairs, behind, 0.0).sum(-1) / (counted.sum(-1, keepdim=True) - 1).clamp(min=1)
    return torch.where(counted, share, 0.0)


def _likelihood(group: Group) -> Tensor:
    if group.log_likelihood is None:
        raise ValueError("log_likelihood must be given for this score")
    return group.log_likelihood


def _surprise(group: Group) -> Tensor:
    surprise = -_likelihood(group)
    return surprise if group.mask is None else surprise.where(group.mask.bool(), 0.0)


@dataclass(frozen=True)
class GroupScore:
    """A way to reward variety within a group.

    Attributes:
        middle: A constant near the middle of the bonus's range, the baseline where no other group is there; 0 for
            `entropy`, which has no upper bound.
        bonus: What each member contributes, shape `(..., k)`; 0 for masked members.
        of_likelihood: Whether it asks for `Group.log_likelihood`.
    """

    middle: float
    bonus: Callable[[Group], Tensor]
    of_likelihood: bool = False


def group_score(name: str, k: int, kernel_scale: float = 1.0, threshold: float = 0.7) -> GroupScore:
    """Return a group score by the name a recipe gives it.

    Args:
        name: See the module's table.
        k: Group size.
        kernel_scale: Of `log_volume` and `elliptical`.
        threshold: Of `distinct`.

    Raises:
        ValueError: If there is no such score.
    """
    # Of log_volume: all members the same, and all unrelated.
    square = kernel_scale**2
    lowest, highest = math.log1p(square / (1 + square * (k - 1))), math.log1p(square)
    match name:
        case "log_volume":
            return GroupScore((lowest + highest) / 2, lambda g: leave_one_out_bonus(g.embeddings, g.mask, kernel_scale))
        case "elliptical":
            middle = (math.expm1(lowest) + math.expm1(highest)) / 2
            return GroupScore(middle, lambda g: elliptical_bonus(g.embeddings, g.mask, kernel_scale))
        case "cosine_distance":
            return GroupScore(0.5, lambda g: cosine_bonus(g.embeddings, g.mask))
        case "vendi":
            return GroupScore(0.5, lambda g: vendi_bonus(g.embeddings, g.mask))
        case "distinct":
            return GroupScore(0.5, lambda g: distinct_bonus(g.embeddings, g.mask, threshold))
        case "similarity":
            return GroupScore((1 / k + 1) / 2, lambda g: similarity_bonus(g.embeddings, g.mask))
        case "likelihood":
            return GroupScore(0.5, lambda g: unlikeliness(_likelihood(g), g.mask), of_likelihood=True)
        case "entropy":
            return GroupScore(0.0, _surprise, of_likelihood=True)
    raise ValueError(
        f"group score: got {name!r}; expected log_volume, elliptical, cosine_distance, vendi, distinct, similarity, "
        "likelihood or entropy"
    )
