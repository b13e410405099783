"""Time of the leave-one-out bonus beside one batched Cholesky factorisation and a Python loop of determinants."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dqo.determinant import leave_one_out_bonus

pytestmark = pytest.mark.benchmark


def loop_of_determinants(embeddings: Tensor) -> Tensor:
    """log det(L + I) - log det(L_{-i} + I), one group and one member at a time."""
    bonuses = []
    for group in embeddings:
        kernel = group @ group.T + torch.eye(len(group))
        whole = torch.logdet(kernel)
        for i in range(len(group)):
            rest = [j for j in range(len(group)) if j != i]
            bonuses.append(whole - torch.logdet(kernel[rest][:, rest]))
    return torch.stack(bonuses).view(embeddings.shape[:-1])


def interleaved(functions: dict[str, Callable[[], Tensor]], rounds: int, calls: int) -> dict[str, float]:
    """Median milliseconds of each; they take turns every few calls, so that a busy moment falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            for _ in range(calls):
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


@pytest.mark.parametrize(("prompts", "k", "dimension"), [(256, 16, 384), (4096, 8, 384)])
def test_bonus_beside_cholesky_and_loop(
    prompts: int, k: int, dimension: int, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(prompts, k, dimension, generator=draw), dim=-1)
    kernel = embeddings @ embeddings.mT + torch.eye(k)
    milliseconds = interleaved(
        {
            "bonus": lambda: leave_one_out_bonus(embeddings),
            "cholesky": lambda: torch.linalg.cholesky(kernel),
            "gram": lambda: embeddings @ embeddings.mT,
        },
        rounds=40 if prompts < 1000 else 15,
        calls=10,
    )
    # The loop is hundreds of times slower: fewer repeats, between the same bonus.
    beside_loop = interleaved(
        {"bonus": lambda: leave_one_out_bonus(embeddings), "loop": lambda: loop_of_determinants(embeddings)},
        rounds=2,
        calls=1 if prompts > 1000 else 2,
    )
    torch.testing.assert_close(leave_one_out_bonus(embeddings), loop_of_determinants(embeddings), atol=2e-5, rtol=0)
    bonus, cholesky, loop = milliseconds["bonus"], milliseconds["cholesky"], beside_loop["loop"]
    with capsys.disabled():
        print(
            f"\n{prompts} prompts x {k} responses x {dimension}, float32, {torch.get_num_threads()} threads: "
            f"bonus {bonus:.3f} ms, Cholesky {cholesky:.3f} ms, Gram {milliseconds['gram']:.3f} ms, loop {loop:.0f} ms"
            f"; bonus / Cholesky {bonus / cholesky:.2f}, loop / bonus {loop / bonus:.0f}"
        )
