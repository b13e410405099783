"""Every diversity metric of 1,000 prompts x 10 responses and their embeddings, beside a loop over nltk's self-BLEU."""

import time

import numpy as np
import pytest
import torch

from benchmarks.test_self_bleu import nltk_loop
from dqo.embedding import ResponseEncoder
from dqo.evaluation.evaluate_metrics import (
    DistinctN,
    Diversity,
    DuplicateRate,
    LogVolume,
    SelfBleu,
    SelfRouge,
    SemanticClusters,
    VendiScore,
)
from dqo.evaluation.metrics import self_bleu_diversity
from dqo.recipe import Encoder

pytestmark = pytest.mark.benchmark

PROMPTS, N = 1000, 10
_SENTENCE = "the old man walked along the river and saw a small dog that was looking for its owner near the bridge"
_OTHERS = "woman child garden car house blue green quickly slowly found lost ran jumped sang letter train city winter"


def sample(prompts: int) -> list[list[str]]:
    """Responses of 20 to 30 words: a prompt's share half of their words in order, so n-grams recur as in text."""
    rng = np.random.default_rng(0)
    words, others = np.array(_SENTENCE.split()), np.array(_OTHERS.split())
    groups = []
    for _ in range(prompts):
        common = rng.permutation(np.concatenate([words, others]))[:30]
        group = []
        for _ in range(N):
            length = rng.integers(20, 31)
            changed = rng.random(length) < 0.5
            group.append(" ".join(np.where(changed, rng.choice(others, size=length), common[:length])))
        groups.append(group)
    return groups


def test_all_metrics_of_a_thousand_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    groups = sample(PROMPTS)
    encoder = ResponseEncoder(Encoder(), "cpu")
    encoder(groups[0])  # the first call allocates

    # The forward passes take nearly all the time, and as long for any text of a length: a tenth stands for the rest.
    start = time.perf_counter()
    tenth = encoder([text for group in groups[: PROMPTS // 10] for text in group]).vectors.view(-1, N, 384)
    seconds = {"embeddings (10 x a tenth)": 10 * (time.perf_counter() - start)}
    vectors = tenth.repeat(10, 1, 1)
    start = time.perf_counter()
    result = Diversity().compute(predictions=groups, embeddings=vectors)
    together = seconds["all metrics"] = time.perf_counter() - start
    for metric in (
        DistinctN(),
        SelfBleu(),
        SelfRouge(),
        DuplicateRate(),
        LogVolume(),
        VendiScore(),
        SemanticClusters(),
    ):
        start = time.perf_counter()
        alone = metric.compute(predictions=groups, embeddings=vectors)
        seconds[metric.name] = time.perf_counter() - start
        for name in metric.reports:
            assert alone[name] == pytest.approx(result[name], rel=1e-6)

    few = groups[:60]
    naive, ours = [], []
    for _ in range(3):
        start = time.perf_counter()
        expected = nltk_loop(few)
        naive.append(time.perf_counter() - start)
        start = time.perf_counter()
        values = self_bleu_diversity(few)
        ours.append(time.perf_counter() - start)
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-9)
    ratio = min(naive) / min(ours)

    with capsys.disabled():
        print(f"\n{PROMPTS} prompts x {N} responses of 20 to 30 words, {torch.get_num_threads()} threads")
        for name, value in seconds.items():
            print(f"{name:>26}: {value:6.2f} s")
        print(f"self-BLEU, {len(few)} prompts, equal to 1e-9: nltk loop {min(naive):.2f} s, ours {min(ours):.3f} s, "
              f"ratio {ratio:.0f}x")  # fmt: skip
    assert together < 30
    assert ratio > 10
