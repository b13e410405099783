import itertools
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from dqo.errors import DQOError
from dqo.evaluation import evaluate_metrics, metrics
from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.evaluate_metrics import (
    CosineDistance,
    DistinctN,
    Diversity,
    DuplicateRate,
    LogVolume,
    SelfBleu,
    SelfRouge,
    SemanticClusters,
    VendiScore,
)
from dqo.evaluation.statistics import bootstrap_interval

torch.set_num_threads(1)

GROUPS = [
    ["the cat sat on a mat", "the cat sat on the mat", "a dog ran home"],
    ["one two three four five", "five four three two one", "six seven"],
    ["yes", "Yes", "no"],
]
ALL = [DistinctN, SelfBleu, SelfRouge, DuplicateRate, CosineDistance, LogVolume, VendiScore, SemanticClusters]


def letters(texts) -> np.ndarray:
    """An encoder: counts of the letters, not normalised."""
    return np.array([[text.lower().count(chr(code)) for code in range(97, 123)] for text in texts], dtype=float)


def embedded(groups) -> torch.Tensor:
    vectors = torch.tensor(np.array([letters(group) for group in groups]))
    return torch.nn.functional.normalize(vectors, dim=-1)


def made(kind, **options):
    return kind(letters, **options) if issubclass(kind, evaluate_metrics.EmbeddingMetric) else kind(**options)


EXPECTED = {
    "distinct_1": lambda: metrics.distinct_n(GROUPS, 1),
    "distinct_2": lambda: metrics.distinct_n(GROUPS, 2),
    "distinct_4": lambda: metrics.distinct_n(GROUPS, 4),
    "self_bleu_diversity": lambda: metrics.self_bleu_diversity(GROUPS),
    "self_rouge_diversity": lambda: metrics.self_rouge_diversity(GROUPS),
    "cosine_distance": lambda: metrics.cosine_distance(embedded(GROUPS)),
    "log_volume": lambda: metrics.log_volume(embedded(GROUPS)),
    "vendi_score": lambda: metrics.vendi_score(embedded(GROUPS)),
    "semantic_clusters": lambda: metrics.semantic_clusters(embedded(GROUPS)),
    "duplicate_rate": lambda: metrics.duplicate_rate(GROUPS),
}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("together", [False, True])
def test_the_numbers_are_those_of_an_evaluation(name, together):
    kind = Diversity if together else next(kind for kind in ALL if name in kind.reports)
    result = made(kind).compute(predictions=GROUPS, per_prompt=True, confidence=0.9, draws=300, seed=4)
    expected = EXPECTED[name]()
    np.testing.assert_allclose(result[f"{name}_per_prompt"], expected, rtol=1e-12)
    interval = bootstrap_interval(expected, 300, 0.9, 4)
    np.testing.assert_allclose(
        [result[name], result[f"{name}_low"], result[f"{name}_high"]], [interval.mean, interval.low, interval.high]
    )


def test_all_at_once_are_the_diversity_metrics_of_the_table_in_its_order():
    rest = {"quality", "best_of_n", "truncation_rate", "mean_tokens"}
    assert list(made(Diversity).compute(predictions=GROUPS)) == [name for name in METRICS if name not in rest]


@pytest.mark.parametrize("kind", [*ALL, Diversity])
def test_info_states_definition_range_and_direction(kind):
    metric = made(kind)
    assert isinstance(metric, evaluate.Metric)
    for name in metric.reports:
        assert name in metric.description and METRICS[name].label in metric.description
        assert f"{METRICS[name].direction} is better" in metric.description.lower()
        assert METRICS[name].range in metric.description
    assert "predictions" in metric.compute.__doc__


@pytest.mark.parametrize("kind", [SelfBleu, SelfRouge])
def test_the_raw_value_is_one_minus_the_diversity(kind):
    result = kind().compute(predictions=GROUPS, confidence=0.95)
    raw, diversity = kind.reports[0].removesuffix("_diversity"), kind.reports[0]
    assert result[raw] == pytest.approx(1 - result[diversity])
    assert result[f"{raw}_low"] == pytest.approx(1 - result[f"{diversity}_high"], abs=0.02)


def test_distinct_n_of_any_order():
    result = DistinctN([3, 5]).compute(predictions=GROUPS)
    np.testing.assert_allclose(result["distinct_3"], np.nanmean(metrics.distinct_n(GROUPS, 3)))
    assert set(result) == {"distinct_3", "distinct_5"}
    for orders in ([], [0], [1.5]):
        with pytest.raises(DQOError, match="orders: got"):
            DistinctN(orders)


@pytest.mark.parametrize("in_memory", [True, False])
def test_groups_added_one_by_one_and_in_batches(in_memory, tmp_path):
    metric = SelfBleu(keep_in_memory=in_memory, cache_dir=str(tmp_path))
    for _ in range(2):  # a second use starts afresh
        metric.add(prediction=GROUPS[0])
        metric.add_batch(predictions=GROUPS[1:])
        assert metric.compute() == SelfBleu().compute(predictions=GROUPS)
    assert not list(tmp_path.rglob("*.arrow"))
    assert any(tmp_path.iterdir()) != in_memory


def test_combine():
    result = evaluate.combine([SelfBleu(), CosineDistance(letters)]).compute(predictions=GROUPS, confidence=0.9)
    assert result == SelfBleu().compute(predictions=GROUPS, confidence=0.9) | CosineDistance(letters).compute(
        predictions=GROUPS, confidence=0.9
    )


@pytest.mark.parametrize(
    "groups",
    [
        tuple(map(tuple, GROUPS)),
        np.array(GROUPS),
        np.array(GROUPS, dtype=object),
        pd.Series([np.array(group, dtype=object) for group in GROUPS]),
        Dataset.from_dict({"responses": GROUPS})["responses"],
    ],
    ids=["tuples", "array", "objects", "pandas", "datasets"],
)
def test_columns_of_other_libraries(groups):
    assert SelfRouge().compute(predictions=groups) == SelfRouge().compute(predictions=GROUPS)


def test_ready_embeddings_need_neither_texts_nor_unit_norm():
    vectors = embedded(GROUPS)
    expected = CosineDistance(letters).compute(predictions=GROUPS)
    for given in (vectors, vectors.numpy() * 7, (vectors * torch.rand(3, 3, 1).add(0.1)).float().tolist()):
        for predictions in (None, GROUPS):
            result = CosineDistance().compute(predictions=predictions, embeddings=given)
            assert result["cosine_distance"] == pytest.approx(expected["cosine_distance"], abs=1e-6)
    assert list(Diversity().compute(embeddings=vectors)) == [
        "cosine_distance",
        "log_volume",
        "vendi_score",
        "semantic_clusters",
    ]


def test_groups_of_different_sizes():
    groups = [GROUPS[0], GROUPS[1][:2], [], GROUPS[2][:1], GROUPS[2]]
    values = VendiScore(letters).compute(predictions=groups, per_prompt=True)["vendi_score_per_prompt"]
    alone = [VendiScore(letters).compute(predictions=[group])["vendi_score"] for group in groups]
    np.testing.assert_allclose(values, alone)
    assert [np.isnan(value) for value in values] == [False, False, True, False, False]
    assert values[3] == pytest.approx(1.0)
    given = [letters(group) if group else np.zeros((0, 26)) for group in groups]
    ready = VendiScore().compute(embeddings=given, per_prompt=True)["vendi_score_per_prompt"]
    np.testing.assert_allclose(ready, values)


def test_nothing_defined_gives_nan():
    result = Diversity(letters).compute(predictions=[[], []], confidence=0.95)
    assert np.isnan(list(result.values())).all()


class Encodes:
    """Like a SentenceTransformer: an object that can be called, but embeds with `encode`."""

    def encode(self, texts):
        return letters(texts)

    def __call__(self, texts):
        raise AssertionError("not this one")


def test_an_object_with_encode_is_an_encoder():
    assert LogVolume(Encodes()).compute(predictions=GROUPS) == LogVolume(letters).compute(predictions=GROUPS)


def test_threshold_of_the_clusters():
    by_threshold = [
        SemanticClusters(embedding, threshold=threshold).compute(predictions=GROUPS)["semantic_clusters"]
        for embedding, threshold in itertools.product([letters], [-0.5, 0.8, 1.0])
    ]
    assert by_threshold == sorted(by_threshold) and by_threshold[0] == 1.0 and by_threshold[2] > 2.0
    with pytest.raises(DQOError, match="threshold: got 2"):
        SemanticClusters(threshold=2)


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (None, "predictions: got none"),
        ([], r"predictions: got \[\]"),
        ("text", "predictions: got 'text'"),
        (["a", "b"], r"predictions\[0\]: got 'a'; expected a list of strings"),
        ([["a"], [None]], r"predictions\[1\]\[0\]: got None; expected a string"),
        ([["a", "b\ud800"]], r"predictions\[0\]\[1\]: surrogates"),
    ],
)
def test_what_is_no_group_is_refused_and_leaves_the_metric_usable(predictions, message):
    metric = SelfBleu()
    with pytest.raises(DQOError, match=message):
        metric.compute(predictions=predictions)
    assert metric.compute(predictions=GROUPS) == SelfBleu().compute(predictions=GROUPS)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (np.ones((2, 3, 4)), "got those of 2 prompts; expected 3"),
        (np.ones((3, 2, 4)), r"embeddings\[0\]: got shape \(2, 4\); expected \(3, d\)"),
        (np.ones((3, 3)), r"embeddings\[0\]: got shape \(3,\); expected \(3, d\)"),
        (np.zeros((3, 3, 4)), r"embeddings\[0\]: holds a vector of norm 0"),
        (np.full((3, 3, 4), np.nan), "norm nan"),
        ([["a"]] * 3, r"embeddings\[0\]: not an array of numbers"),
        ([], "embeddings: got none"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused_and_leave_the_metric_usable(embeddings, message):
    metric = CosineDistance(letters)
    with pytest.raises(DQOError, match=message):
        metric.compute(predictions=GROUPS, embeddings=embeddings)
    assert metric.compute(predictions=GROUPS) == CosineDistance(letters).compute(predictions=GROUPS)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (lambda texts: np.ones((1, 4)), r"returned shape \(1, 4\); expected \(9, d\)"),
        (lambda texts: np.zeros((len(texts), 4)), "encoder: holds a vector of norm 0"),
        (3, "encoder: got 3; expected a model's name or a function"),
        ("no/such/folder/", "no/such/folder/"),
    ],
)
def test_an_encoder_that_fails_is_named(encoder, message):
    with pytest.raises(DQOError, match=message):
        CosineDistance(encoder).compute(predictions=GROUPS)


@pytest.mark.slow
def test_nothing_is_downloaded_or_written_with_a_home_that_cannot_be_written(tmp_path: Path):
    """The bundled encoder included: a fresh process without sockets, whose home is no folder."""
    program = f"""
import socket
def refuse(*arguments, **options):
    raise AssertionError("asked the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from dqo.evaluation.evaluate_metrics import Diversity
result = Diversity().compute(predictions={GROUPS!r})
assert 1 < result["vendi_score"] <= 3, result
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": "/dev/null", "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=tmp_path)
    assert list(tmp_path.rglob("*.arrow*")) == []
