"""Every diversity metric and the embeddings of the responses in docs/results-data, scaled to 1,000 prompts x 10.

Beside it a loop over nltk's self-BLEU.
"""

import gzip
import json
import re
import time
from pathlib import Path

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
_RESPONSES = Path(__file__).parents[2] / "docs" / "results-data" / "responses"


def measured_responses() -> list[list[str]]:
    """The groups of N responses to the prompts of the story task, from every model whose runs are kept."""
    groups = set()
    for path in sorted(_RESPONSES.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        groups |= {tuple(row["responses"]) for row in rows if row["prompt"].startswith("Write one short sentence")}
    return [list(group) for group in sorted(groups) if len(group) == N][:PROMPTS]


def test_all_metrics_of_a_thousand_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    groups = measured_responses()
    scale = PROMPTS / len(groups)
    distinct = len({text for group in groups for text in group})
    encoder = ResponseEncoder(Encoder(), "cpu")
    encoder(groups[0])  # the first call allocates

    seconds = {}
    start = time.perf_counter()
    vectors = encoder([text for group in groups for text in group]).vectors.view(-1, N, 384)
    seconds["embeddings"] = time.perf_counter() - start
    start = time.perf_counter()
    result = Diversity().compute(predictions=groups, embeddings=vectors)
    seconds["all metrics"] = time.perf_counter() - start
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

    # Plain words, which both take apart in the same way.
    few = [[" ".join(re.findall("[a-z]+", text.lower())) for text in group] for group in groups[:60]]
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
        print(f"\n{len(groups)} groups of {N} responses, {distinct} distinct, {torch.get_num_threads()} threads; "
              f"seconds for {PROMPTS} groups:")  # fmt: skip
        for name, value in seconds.items():
            print(f"{name:>26}: {scale * value:6.2f} s")
        print(f"self-BLEU, {len(few)} prompts, equal to 1e-9: nltk loop {min(naive):.2f} s, ours {min(ours):.3f} s, "
              f"ratio {ratio:.0f}x")  # fmt: skip
