r"""The determinantal objective: how much volume a group of responses spans.

For k unit-norm embeddings phi_1..phi_k of one prompt's responses, the Gram matrix is L[i, j] = <phi_i, phi_j> and the
group's score is log det(L + I_k) [paper: arXiv 2509.04784]. All functions are pure torch, batched over any leading
dimensions and free of Python loops; they work in float32 or float64 (half precision is promoted to float32: with unit
vectors the condition number of L + I is at most 1 + k, so float32 is enough) and are differentiable.

Masked members leave the kernel: their rows and columns of L are set to zero, so that with the identity added they
contribute a factor of one to the determinant, exactly as if the group had never held them.
"""

import torch
from torch import Tensor


def _regularised_gram(embeddings: Tensor, mask: Tensor | None, kernel_scale: float) -> Tensor:
    """Return `kernel_scale**2 * L + I` with masked members removed, shape `(..., k, k)`."""
    if embeddings.dim() < 2:
        raise ValueError(f"embeddings must have shape (..., k, d), got {tuple(embeddings.shape)}")
    if not embeddings.is_floating_point():
        raise ValueError(f"embeddings must be floating point, got {embeddings.dtype}")
    if not kernel_scale > 0:
        raise ValueError(f"kernel_scale must be positive, got {kernel_scale}")
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        embeddings = embeddings.float()
    if mask is not None:
        if mask.shape != embeddings.shape[:-1]:
            raise ValueError(f"mask must have shape {tuple(embeddings.shape[:-1])}, got {tuple(mask.shape)}")
        mask = mask.bool()
        if embeddings.requires_grad:
            # A masked NaN would reach the others' gradients through the product below (0 * NaN is NaN).
            embeddings = torch.where(mask.unsqueeze(-1), embeddings, 0.0)
    k, dimension = embeddings.shape[-2:]
    groups = embeddings.reshape(-1, k, dimension)
    identity = torch.eye(k, dtype=embeddings.dtype, device=embeddings.device)
    # One fused call, so that neither the scale nor the identity costs a pass over the data. Autocast would run it in
    # half precision, in which no factorisation exists.
    with torch.autocast(embeddings.device.type, enabled=False):
        gram = torch.baddbmm(identity, groups, groups.mT, alpha=kernel_scale**2)
    gram = gram.view(*embeddings.shape[:-1], k)
    if mask is None:
        return gram
    # where, not a product, for NaN again; and on the k x k kernel, because masking the embeddings would copy them all.
    return torch.where(mask.unsqueeze(-1) & mask.unsqueeze(-2), gram, identity)


def log_volume(embeddings: Tensor, mask: Tensor | None = None, kernel_scale: float = 1.0) -> Tensor:
    r"""Log-volume of each group: `log det(c^2 L + I)`.

    Args:
        embeddings: Response embeddings, shape `(..., k, d)`, unit norm for the stated range.
        mask: Members that count, boolean, shape `(..., k)`; `None` counts all.
        kernel_scale: Factor c on the embeddings; scaling by c is regularising with `I / c^2` up to a constant. Larger
            values tell near-duplicates apart more sharply; 1 is the paper's. In float32 the error for coinciding
            members grows as 1e-7 c^2: above c = 30 pass float64.

    Returns:
        Shape `(...)`, in nats. For unit-norm embeddings and c = 1 it lies in `[log(1 + m), m log 2]` for m counted
        members [derived]: the lower bound when all coincide, the upper when all are orthogonal.

    Raises:
        ValueError: If a shape, dtype or scale does not fit.
        torch.linalg.LinAlgError: If a counted embedding holds NaN (the kernel then has no Cholesky factor).

    Source: the objective is the paper's (arXiv 2509.04784); masking and the kernel scale are ours.
    """
    cholesky = torch.linalg.cholesky(_regularised_gram(embeddings, mask, kernel_scale))
    return 2.0 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def leave_one_out_bonus(embeddings: Tensor, mask: Tensor | None = None, kernel_scale: float = 1.0) -> Tensor:
    r"""What each member adds to its group's log-volume.

    `b_i = log det(L + I_k) - log det(L_{-i} + I_{k-1}) = -log [(L + I_k)^{-1}]_{ii}`, the second form by Cramer's rule
    [derived], so that one batched Cholesky factor gives every member's bonus at once.

    Args:
        embeddings: Response embeddings, shape `(..., k, d)`, unit norm for the stated range.
        mask: Members that count, boolean, shape `(..., k)`; `None` counts all.
        kernel_scale: See `log_volume`.

    Returns:
        Shape `(..., k)`, in nats; exactly 0 for masked members. For unit-norm embeddings, c = 1 and m counted members,
        each lies in `[log(1 + 1/m), log 2]` [derived].

    Raises:
        ValueError: If a shape, dtype or scale does not fit.
        torch.linalg.LinAlgError: If a counted embedding holds NaN (the kernel then has no Cholesky factor).

    Source: leave-one-out form second hand from reviews of the paper; the inverse form is derived (docs/method.md).
    """
    cholesky = torch.linalg.cholesky(_regularised_gram(embeddings, mask, kernel_scale))
    identity = torch.eye(cholesky.shape[-1], dtype=cholesky.dtype, device=cholesky.device)
    # (L + I)^{-1} = C^{-T} C^{-1}, so its i-th diagonal entry is the squared norm of column i of C^{-1}. Solved from
    # the right (X C = I) because that is the faster side on a CPU.
    inverse_factor = torch.linalg.solve_triangular(cholesky, identity, upper=False, left=False)
    bonus = -2.0 * torch.linalg.vector_norm(inverse_factor, dim=-2).log()
    # Masked members already are at -log 1, which would read -0.0.
    return bonus if mask is None else torch.where(mask.bool(), bonus, 0.0)
