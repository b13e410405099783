"""The determinantal objective against brute-force determinants, closed forms and exact enumeration."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dqo.determinant import leave_one_out_bonus, log_volume

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}

groups = st.tuples(
    st.integers(1, 12),  # k
    st.integers(1, 20),  # d: often below k, where L has no full rank
    st.integers(0, 2**32 - 1),  # seed
    st.sampled_from([torch.float32, torch.float64]),
)
many = settings(deadline=None, max_examples=40)


def unit_vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=-1).to(dtype)


def brute_volume(embeddings: np.ndarray, scale: float = 1.0) -> float:
    gram = scale**2 * embeddings @ embeddings.T
    return math.log(np.linalg.det(gram + np.eye(len(gram))))


def brute_bonus(embeddings: np.ndarray, scale: float = 1.0) -> list[float]:
    whole = brute_volume(embeddings, scale)
    return [whole - brute_volume(np.delete(embeddings, i, axis=0), scale) for i in range(len(embeddings))]


def as_float64(embeddings: Tensor) -> np.ndarray:
    return embeddings.detach().double().numpy()


# --- values -----------------------------------------------------------------------------------------------------------


@given(groups)
@many
def test_equals_determinants_of_submatrices(group: tuple[int, int, int, torch.dtype]) -> None:
    k, d, seed, dtype = group
    embeddings = unit_vectors(k, d, seed=seed, dtype=dtype)
    bonus, volume = leave_one_out_bonus(embeddings), log_volume(embeddings)
    assert bonus.dtype == volume.dtype == dtype
    assert bonus.tolist() == pytest.approx(brute_bonus(as_float64(embeddings)), abs=TOLERANCE[dtype])
    assert volume.item() == pytest.approx(brute_volume(as_float64(embeddings)), abs=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_group_size_up_to_64(dtype: torch.dtype) -> None:
    for k in range(1, 65):
        embeddings = unit_vectors(k, 24, seed=k, dtype=dtype)
        exact = as_float64(embeddings)
        assert leave_one_out_bonus(embeddings).tolist() == pytest.approx(brute_bonus(exact), abs=TOLERANCE[dtype])
        assert log_volume(embeddings).item() == pytest.approx(brute_volume(exact), rel=TOLERANCE[dtype])


def test_random_batch_within_1e_5_in_float32() -> None:
    embeddings = unit_vectors(7, 5, 16, dtype=torch.float32)
    expected = [brute_bonus(as_float64(group)) for group in embeddings]
    np.testing.assert_allclose(leave_one_out_bonus(embeddings), expected, atol=1e-5)


def determinant(matrix: list[list[Fraction]]) -> Fraction:
    if not matrix:
        return Fraction(1)
    minors = ([row[:j] + row[j + 1 :] for row in matrix[1:]] for j in range(len(matrix)))
    return sum(((-1) ** j * matrix[0][j] * determinant(minor) for j, minor in enumerate(minors)), Fraction(0))


def test_equals_exact_rational_determinants() -> None:
    # Pythagorean triples are unit vectors without rounding.
    triples = [(3, 4, 5), (5, -12, 13), (8, 15, 17), (-7, 24, 25), (1, 0, 1)]
    vectors = [(Fraction(a, c), Fraction(b, c)) for a, b, c in triples]
    kernel = [[u[0] * v[0] + u[1] * v[1] + (u == v) for v in vectors] for u in vectors]
    whole = determinant(kernel)
    without = [
        determinant([row[:i] + row[i + 1 :] for j, row in enumerate(kernel) if j != i]) for i in range(len(kernel))
    ]
    embeddings = torch.tensor([[float(a), float(b)] for a, b in vectors], dtype=torch.float64)
    assert log_volume(embeddings).item() == pytest.approx(math.log(whole), abs=1e-14)
    assert leave_one_out_bonus(embeddings).tolist() == pytest.approx([math.log(whole / w) for w in without], abs=1e-14)


@pytest.mark.parametrize("k", [1, 2, 3, 8, 64])
def test_closed_forms_at_both_ends(k: int) -> None:
    same = unit_vectors(1, 80).expand(k, 80)
    assert log_volume(same).item() == pytest.approx(math.log(1 + k), abs=1e-12)
    assert leave_one_out_bonus(same).tolist() == pytest.approx([math.log(1 + 1 / k)] * k, abs=1e-12)
    orthogonal = torch.linalg.qr(torch.randn(80, k, dtype=torch.float64)).Q.T
    assert log_volume(orthogonal).item() == pytest.approx(k * math.log(2), abs=1e-12)
    assert leave_one_out_bonus(orthogonal).tolist() == pytest.approx([math.log(2)] * k, abs=1e-12)


def test_pair_at_a_known_angle() -> None:
    # det [[2, c], [c, 2]] = 4 - c^2
    for cosine in (-1.0, -0.3, 0.0, 0.5, 0.99, 1.0):
        pair = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)
        assert log_volume(pair).item() == pytest.approx(math.log(4 - cosine**2), abs=1e-13)
        assert leave_one_out_bonus(pair).tolist() == pytest.approx([math.log(2 - cosine**2 / 2)] * 2, abs=1e-13)


@given(groups)
@many
def test_stated_bounds_hold(group: tuple[int, int, int, torch.dtype]) -> None:
    k, d, seed, dtype = group
    embeddings, slack = unit_vectors(k, d, seed=seed, dtype=dtype), TOLERANCE[dtype]
    assert math.log(1 + k) - slack <= log_volume(embeddings).item() <= k * math.log(2) + slack
    bonus = leave_one_out_bonus(embeddings)
    assert math.log(1 + 1 / k) - slack <= bonus.min().item()
    assert bonus.max().item() <= math.log(2) + slack


@given(groups)
@many
def test_permutation_permutes_the_bonus(group: tuple[int, int, int, torch.dtype]) -> None:
    k, d, seed, dtype = group
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    embeddings, atol = unit_vectors(k, d, seed=seed, dtype=dtype), TOLERANCE[dtype]
    torch.testing.assert_close(
        leave_one_out_bonus(embeddings[order]), leave_one_out_bonus(embeddings)[order], atol=atol, rtol=0
    )
    torch.testing.assert_close(log_volume(embeddings[order]), log_volume(embeddings), atol=atol, rtol=0)


@given(groups)
@many
def test_duplicates_share_a_bonus_below_their_lone_one(group: tuple[int, int, int, torch.dtype]) -> None:
    k, d, seed, dtype = group
    embeddings = unit_vectors(k, d, seed=seed, dtype=dtype)
    bonus = leave_one_out_bonus(torch.cat([embeddings, embeddings[:1]]))
    assert bonus[0].item() == pytest.approx(bonus[-1].item(), abs=TOLERANCE[dtype])
    # Sherman-Morrison: a copy of member i has elliptical bonus h = 1 - exp(-b_i), and log(1 + h) < -log(1 - h) = b_i.
    alone = leave_one_out_bonus(embeddings)[0].item()
    assert bonus[-1].item() == pytest.approx(math.log(2 - math.exp(-alone)), abs=TOLERANCE[dtype])
    assert bonus[-1].item() < alone


def test_more_members_than_dimensions() -> None:
    # det(I_k + E E^T) = det(I_d + E^T E), whatever the rank.
    embeddings = unit_vectors(3, 40, 4)
    dual = torch.logdet(torch.eye(4, dtype=torch.float64) + embeddings.mT @ embeddings)
    torch.testing.assert_close(log_volume(embeddings), dual, atol=1e-11, rtol=0)
    torch.testing.assert_close(log_volume(embeddings.float()), dual.float(), atol=0, rtol=1e-5)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)], ids=str)
def test_leading_batch_dimensions(lead: tuple[int, ...]) -> None:
    embeddings = unit_vectors(*lead, 4, 6)
    mask = torch.rand(*lead, 4, generator=torch.Generator().manual_seed(1)) < 0.7
    for counted in (None, mask):
        bonus, volume = leave_one_out_bonus(embeddings, counted), log_volume(embeddings, counted)
        assert bonus.shape == (*lead, 4)
        assert volume.shape == lead
        for index in itertools.product(*map(range, lead)):
            one = None if counted is None else counted[index]
            torch.testing.assert_close(bonus[index], leave_one_out_bonus(embeddings[index], one), atol=1e-12, rtol=0)
            torch.testing.assert_close(volume[index], log_volume(embeddings[index], one), atol=1e-12, rtol=0)


def test_non_contiguous_embeddings() -> None:
    embeddings = unit_vectors(5, 3, 8).transpose(0, 1)
    torch.testing.assert_close(leave_one_out_bonus(embeddings), leave_one_out_bonus(embeddings.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    embeddings = unit_vectors(4, 6, 32, dtype=dtype)
    bonus, volume = leave_one_out_bonus(embeddings), log_volume(embeddings)
    assert bonus.dtype == volume.dtype == torch.float32
    expected = [brute_bonus(as_float64(group)) for group in embeddings]
    np.testing.assert_allclose(bonus, expected, atol=2e-5)


def test_autocast_changes_nothing() -> None:
    embeddings = unit_vectors(4, 6, 32, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bonus, volume = leave_one_out_bonus(embeddings), log_volume(embeddings)
    assert torch.equal(bonus, leave_one_out_bonus(embeddings))
    assert torch.equal(volume, log_volume(embeddings))


# --- mask -------------------------------------------------------------------------------------------------------------


@given(groups, st.data())
@many
def test_masked_is_removed(group: tuple[int, int, int, torch.dtype], data: st.DataObject) -> None:
    k, d, seed, dtype = group
    counted = torch.tensor(data.draw(st.lists(st.booleans(), min_size=k, max_size=k)))
    embeddings = unit_vectors(k, d, seed=seed, dtype=dtype)
    rest = embeddings[counted]
    embeddings[~counted] = torch.nan
    for tracked in (False, True):
        bonus = leave_one_out_bonus(embeddings.clone().requires_grad_(tracked), counted).detach()
        volume = log_volume(embeddings.clone().requires_grad_(tracked), counted).item()
        assert bonus[counted].tolist() == pytest.approx(brute_bonus(as_float64(rest)), abs=TOLERANCE[dtype])
        assert list(map(str, bonus[~counted].tolist())) == ["0.0"] * (k - len(rest))
        assert volume == pytest.approx(brute_volume(as_float64(rest)), abs=TOLERANCE[dtype])


@pytest.mark.parametrize("function", [log_volume, leave_one_out_bonus])
def test_masked_rows_get_and_give_no_gradient(function: Callable[..., Tensor]) -> None:
    embeddings = unit_vectors(2, 5, 8)
    counted = torch.tensor([[True, False, True, True, False], [True, True, True, True, True]])
    spoilt = embeddings.clone()
    spoilt[~counted] = torch.nan
    spoilt.requires_grad_(True)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    (function(spoilt, counted) * (weights if function is leave_one_out_bonus else 1.0)).sum().backward()
    assert (spoilt.grad[~counted] == 0).all()
    for group, mask, gradient in zip(embeddings, counted, spoilt.grad, strict=True):
        rest = group[mask].requires_grad_(True)
        (function(rest) * (weights[mask] if function is leave_one_out_bonus else 1.0)).sum().backward()
        torch.testing.assert_close(gradient[mask], rest.grad, atol=1e-12, rtol=0)


def test_all_masked_spans_nothing() -> None:
    embeddings, mask = torch.full((2, 3, 4), torch.nan), torch.zeros(2, 3, dtype=torch.bool)
    assert torch.equal(log_volume(embeddings, mask), torch.zeros(2))
    assert torch.equal(leave_one_out_bonus(embeddings, mask), torch.zeros(2, 3))


def test_integer_mask_reads_as_boolean() -> None:
    embeddings, mask = unit_vectors(4, 8), torch.tensor([1, 0, 1, 1])
    torch.testing.assert_close(leave_one_out_bonus(embeddings, mask), leave_one_out_bonus(embeddings, mask.bool()))


# --- kernel scale -----------------------------------------------------------------------------------------------------


@given(groups, st.floats(0.05, 20.0))
@many
def test_kernel_scale_scales_the_kernel(group: tuple[int, int, int, torch.dtype], scale: float) -> None:
    k, d, seed, _ = group
    embeddings = unit_vectors(k, d, seed=seed)
    exact = embeddings.numpy()
    assert log_volume(embeddings, kernel_scale=scale).item() == pytest.approx(brute_volume(exact, scale), abs=1e-8)
    bonus = leave_one_out_bonus(embeddings, kernel_scale=scale)
    assert bonus.tolist() == pytest.approx(brute_bonus(exact, scale), abs=1e-8)
    # The same as regularising with I / c^2, up to k log c^2 for the group and log c^2 for a member.
    softly = np.linalg.slogdet(exact @ exact.T + np.eye(k) / scale**2).logabsdet
    assert log_volume(embeddings, kernel_scale=scale).item() == pytest.approx(softly + k * math.log(scale**2), abs=1e-8)


def test_kernel_scale_tells_near_duplicates_apart() -> None:
    # Above the floor log(1 + c^2 / (1 + c^2)) of exact copies, an angle of 0.1 is worth far more at c = 10 than at 1.
    pair = torch.tensor([[1.0, 0.0], [math.cos(0.1), math.sin(0.1)]], dtype=torch.float64)
    gains = []
    for scale in (1.0, 10.0):
        diagonal, off = 1 + scale**2, scale**2 * math.cos(0.1)
        bonus = leave_one_out_bonus(pair, kernel_scale=scale)[0].item()
        assert bonus == pytest.approx(math.log(diagonal - off**2 / diagonal), abs=1e-12)
        copies = leave_one_out_bonus(pair[:1].expand(2, 2), kernel_scale=scale)[0].item()
        assert copies == pytest.approx(math.log(1 + scale**2 / diagonal), abs=1e-12)
        gains.append(bonus - copies)
    assert gains[1] > 50 * gains[0] > 0


# --- differentiation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [log_volume, leave_one_out_bonus])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3)], ids=str)
def test_gradcheck(function: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    embeddings = unit_vectors(*shape).requires_grad_(True)
    mask = torch.ones(shape[:-1], dtype=torch.bool)
    mask[..., 1] = False
    assert torch.autograd.gradcheck(function, (embeddings,))
    assert torch.autograd.gradcheck(function, (embeddings, mask, 1.7))


def test_gradient_of_the_volume_in_closed_form() -> None:
    # d log det(E E^T + I) / dE = 2 (E E^T + I)^{-1} E
    embeddings = unit_vectors(4, 6).requires_grad_(True)
    log_volume(embeddings).backward()
    exact = as_float64(embeddings)
    np.testing.assert_allclose(embeddings.grad, 2 * np.linalg.solve(exact @ exact.T + np.eye(4), exact), atol=1e-12)


# --- memory and misuse ------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the largest storage that an operation allocated."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given, self.bytes = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("function", [log_volume, leave_one_out_bonus])
@pytest.mark.parametrize("masked", [False, True])
def test_embeddings_are_never_copied(function: Callable[..., Tensor], masked: bool) -> None:
    embeddings = unit_vectors(3, 5, 4, 384, dtype=torch.float32)
    before, mask = embeddings.clone(), torch.arange(60).view(3, 5, 4) % 3 > 0
    with Largest(embeddings) as largest:
        function(embeddings, mask if masked else None, 2.0)
    assert 0 < largest.bytes <= 3 * 5 * 4 * 4 * 4  # one kernel: groups x k x k x 4 bytes
    assert torch.equal(embeddings, before)


@pytest.mark.parametrize("function", [log_volume, leave_one_out_bonus])
@pytest.mark.parametrize("position", [0, 1, 3])
def test_nan_in_a_counted_member_is_an_error(function: Callable[..., Tensor], position: int) -> None:
    embeddings = unit_vectors(2, 4, 8, dtype=torch.float32)
    embeddings[1, position, 2] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError, match="Batch element 1"):
        function(embeddings)


@pytest.mark.parametrize("function", [log_volume, leave_one_out_bonus])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3),), r"embeddings must have shape \(\.\.\., k, d\), got \(3,\)"),
        ((torch.ones(2, 3, dtype=torch.int64),), r"embeddings must be floating point, got torch\.int64"),
        ((torch.ones(2, 3), torch.ones(3)), r"mask must have shape \(2,\), got \(3,\)"),
        ((torch.ones(4, 2, 3), torch.ones(2)), r"mask must have shape \(4, 2\), got \(2,\)"),
        ((torch.ones(2, 3), None, 0.0), r"kernel_scale must be positive, got 0\.0"),
        ((torch.ones(2, 3), None, math.nan), r"kernel_scale must be positive, got nan"),
    ],
)
def test_misuse_is_named(function: Callable[..., Tensor], arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments)


# --- the policy gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "k"), [(4, 2), (4, 3), (3, 4), (2, 6)])
def test_bonus_is_an_unbiased_policy_gradient(m: int, k: int) -> None:
    """All m^k groups of a softmax policy over m responses: bonus and shared score both give the exact gradient."""
    embeddings = unit_vectors(m, 3, seed=m)
    theta = torch.randn(m, generator=torch.Generator().manual_seed(k), dtype=torch.float64).requires_grad_(True)
    policy = theta.softmax(0)
    groups = torch.tensor(list(itertools.product(range(m), repeat=k)))
    chance = policy[groups].prod(1)
    assert chance.sum().item() == pytest.approx(1.0)

    volume = torch.tensor([brute_volume(as_float64(embeddings[group])) for group in groups], dtype=torch.float64)
    (exact,) = torch.autograd.grad((chance * volume).sum(), theta, retain_graph=True)

    # grad log pi(y) = onehot(y) - pi for softmax logits.
    score = torch.nn.functional.one_hot(groups, m) - policy
    bonus = leave_one_out_bonus(embeddings[groups])
    by_bonus = chance @ (score * bonus.unsqueeze(-1)).sum(1)
    by_shared_score = chance @ (score * log_volume(embeddings[groups])[:, None, None]).sum(1)
    assert exact.abs().max() > 1e-3
    torch.testing.assert_close(by_bonus, exact, atol=1e-12, rtol=0)
    torch.testing.assert_close(by_shared_score, exact, atol=1e-12, rtol=0)

    # The point of the bonus: the same mean with less variance.
    def variance(weights: Tensor) -> float:
        gradient = (score * weights).sum(1)
        return (chance @ (gradient - exact).square().sum(1)).item()

    assert variance(bonus.unsqueeze(-1)) < variance(volume[:, None, None])
