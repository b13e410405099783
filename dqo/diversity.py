r"""Group scores: what each response adds to the variety of its group, behind one interface.

The method's own score is the log-volume (`dqo.determinant`). The others are those it is compared with, in leave-one-out
or per-member form, so that like is compared with like: each takes a group's unit-norm embeddings and says what every
member contributes. All are pure torch, batched over groups and free of Python loops.

With L the Gram matrix of the m counted members' embeddings, for member i:

| name | bonus of member i | of | range |
|---|---|---|---|
| `log_volume` | log det(L + I) - log det(L_{-i} + I) | DQO | [log(1 + 1/m), log 2] |
| `elliptical` | phi_i' (I + sum_{j != i} phi_j phi_j')^{-1} phi_i | RepExp (arXiv 2510.11686) | [1/m, 1] |
| `cosine_distance` | mean over j != i of 1 - L[i, j] | pairwise distance | [0, 2] |
| `vendi` | V(L) - V(L_{-i}), V the exp of the eigenvalues' entropy | Vendi score (arXiv 2210.02410) | see below |
| `distinct` | share of the others that mean something else | DARLING (arXiv 2509.02534) | [0, 1] |

The forms of DQO, RepExp and DARLING are [second hand]. `elliptical` is exp(b_i) - 1 of the log-volume's bonus b_i
[derived], so it orders members of one group alike and weighs the odd one out more. `distinct` puts two responses into
one class when a chain of similarities of at least the threshold links them; DARLING asks a trained classifier instead,
and multiplies the reward by the share [second hand], where here it is added like every other score [ours]. `vendi` may
be slightly negative: a response that repeats the most frequent meaning makes the group less even. It is 1 for every
member of a group of orthogonal ones [derived]; no general bound was proven.

Masked members leave the group: they get 0 and change nobody's bonus. A member alone in its group has `log_volume`
log 2, `elliptical` and `vendi` 1, and 0 for what is relative to others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dqo.determinant import leave_one_out_bonus

Bonus = Callable[[Tensor, Tensor | None], Tensor]


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
    """Mean cosine distance of each member to the others.

    It is the leave-one-out difference of the sum over pairs, divided by m - 1.

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
    distance = (others - similarity).clamp(min=0.0) / others.clamp(min=1)
    return torch.where(counted, distance, 0.0)


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


def distinct_bonus(embeddings: Tensor, mask: Tensor | None = None, threshold: float = 0.9) -> Tensor:
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


@dataclass(frozen=True)
class GroupScore:
    """A way to reward variety within a group.

    Attributes:
        middle: A constant near the middle of the bonus's range, the baseline where no other group is there.
        bonus: `(embeddings (..., k, d), mask (..., k)) -> (..., k)`.
    """

    middle: float
    bonus: Bonus


def group_score(name: str, k: int, kernel_scale: float = 1.0, threshold: float = 0.9) -> GroupScore:
    """Return a group score by the name a recipe gives it.

    Args:
        name: See the module's table.
        k: Group size.
        kernel_scale: Of `log_volume` and `elliptical`.
        threshold: Of `distinct`.

    Raises:
        ValueError: If there is no such score.
    """
    one = torch.ones((), dtype=torch.float64)
    match name:
        case "log_volume":
            middle = (torch.log1p(one / k) + torch.log(2 * one)).item() / 2
            return GroupScore(middle, lambda e, m: leave_one_out_bonus(e, m, kernel_scale))
        case "elliptical":
            return GroupScore((1 / k + 1) / 2, lambda e, m: elliptical_bonus(e, m, kernel_scale))
        case "cosine_distance":
            return GroupScore(0.5, cosine_bonus)
        case "vendi":
            return GroupScore(0.5, vendi_bonus)
        case "distinct":
            return GroupScore(0.5, lambda e, m: distinct_bonus(e, m, threshold))
    raise ValueError(f"group score: got {name!r}; expected log_volume, elliptical, cosine_distance, vendi or distinct")
