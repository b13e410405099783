"""Time of every group score for a batch of groups, embeddings given; printed side by side with the log-volume's."""

import pytest
import torch

from benchmarks.test_determinant import interleaved
from dqo.diversity import group_score

pytestmark = pytest.mark.benchmark


def test_scores_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    prompts, k, dimension = 256, 8, 384
    draw = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(prompts, k, dimension, generator=draw), dim=-1)
    names = ("log_volume", "elliptical", "cosine_distance", "vendi", "distinct")
    scores = {name: group_score(name, k).bonus for name in names}
    milliseconds = interleaved(
        {name: lambda bonus=bonus: bonus(embeddings, None) for name, bonus in scores.items()}, rounds=5, calls=5
    )
    with capsys.disabled():
        print(f"\n{prompts} prompts x k = {k} x d = {dimension}, {torch.get_num_threads()} threads")
        for name, value in milliseconds.items():
            print(f"{name:>16}: {value:7.2f} ms, {value / milliseconds['log_volume']:5.1f} x log_volume")
    assert all(bonus(embeddings, None).isfinite().all() for bonus in scores.values())
