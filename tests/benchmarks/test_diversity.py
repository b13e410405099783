"""Time of every group score for a batch of groups, embeddings given, beside the log-volume's and beside its limit."""

from typing import get_args

import pytest
import torch

from benchmarks.test_determinant import interleaved
from dqo.determinant import log_volume
from dqo.diversity import Group, group_score
from dqo.recipe import Score

pytestmark = pytest.mark.benchmark
# What a score may take on two processors, so that it is nothing beside a step of training; printed and not asserted,
# since a busy machine is no defect.
LIMIT, LIMIT_OF_THE_DETERMINANT = 50.0, 5.0


def test_scores_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    prompts, k, dimension = 256, 8, 384
    draw = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(prompts, k, dimension, generator=draw), dim=-1)
    group = Group(embeddings, None, -30 * torch.rand(prompts, k, generator=draw))
    scores = {name: group_score(name, k).bonus for name in get_args(Score)}
    calls = {name: lambda bonus=bonus: bonus(group) for name, bonus in scores.items()}
    calls["log-determinant"] = lambda: log_volume(embeddings)
    milliseconds = interleaved(calls, rounds=5, calls=5)
    with capsys.disabled():
        print(f"\n{prompts} prompts x k = {k} x d = {dimension}, {torch.get_num_threads()} threads")
        for name, value in milliseconds.items():
            limit = LIMIT_OF_THE_DETERMINANT if name == "log-determinant" else LIMIT
            print(
                f"{name:>16}: {value:7.2f} ms of {limit:2.0f} ({'met' if value <= limit else 'MISSED'}), "
                f"{value / milliseconds['log_volume']:5.1f} x log_volume"
            )
    assert torch.get_num_threads() == 2
    assert all(bonus(group).isfinite().all() for bonus in scores.values())
