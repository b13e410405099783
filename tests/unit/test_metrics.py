import itertools
import math
from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from nltk.util import ngrams
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse.csgraph import connected_components
from vendi_score import vendi

from dqo.evaluation import metrics
from dqo.evaluation.catalogue import METRICS
from dqo.recipe import DiversityMetric

torch.set_num_threads(1)


def random_groups(seed: int, prompts: int, n: int, words: range, vocabulary: int) -> list[list[str]]:
    """Responses of plain lower-case words, so that splitting at spaces is their tokenisation."""
    rng = np.random.default_rng(seed)
    return [
        [" ".join(f"w{i}" for i in rng.integers(vocabulary, size=rng.choice(words))) for _ in range(n)]
        for _ in range(prompts)
    ]


def unit(rows: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.as_tensor(rows), dim=-1)


def nltk_self_bleu(group: list[str]) -> float:
    tokens = [response.split() for response in group]
    return float(
        np.mean(
            [
                sentence_bleu(
                    tokens[:i] + tokens[i + 1 :],
                    tokens[i],
                    smoothing_function=SmoothingFunction().method1,
                    auto_reweigh=True,
                )
                for i in range(len(tokens))
            ]
        )
    )


# Short texts over few words reach every branch: repeated n-grams to clip, ties, orders without a match, fewer than four
# words, no match at all; longer texts are what a run looks like.
SHAPES = {
    "short, few words": {"prompts": 200, "n": 4, "words": range(1, 8), "vocabulary": 3},
    "short, many words": {"prompts": 100, "n": 3, "words": range(1, 8), "vocabulary": 30},
    "pairs": {"prompts": 100, "n": 2, "words": range(1, 12), "vocabulary": 4},
    "long": {"prompts": 5, "n": 8, "words": range(20, 60), "vocabulary": 40},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_self_bleu_equals_nltk(shape):
    groups = random_groups(seed=1, **shape)
    expected = [1 - nltk_self_bleu(group) for group in groups]
    np.testing.assert_allclose(metrics.self_bleu_diversity(groups), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_self_bleu_equals_sacrebleu(shape):
    # sacrebleu's "floor" smoothing with effective order is nltk's method1 with auto_reweigh, written by other people.
    bleu = BLEU(tokenize="none", smooth_method="floor", smooth_value=0.1, effective_order=True)
    groups = random_groups(seed=2, **shape)
    expected = [
        1 - np.mean([bleu.sentence_score(group[i], group[:i] + group[i + 1 :]).score / 100 for i in range(len(group))])
        for group in groups
    ]
    np.testing.assert_allclose(metrics.self_bleu_diversity(groups), expected, rtol=0, atol=1e-9)


def test_self_bleu_by_hand():
    # "a b c d e": 4/5, 3/4, 2/3, 1/2 of its n-grams are in the other, of equal length: (4/5 * 3/4 * 2/3 * 1/2)^(1/4).
    one_word_changed = 1 - 0.2**0.25
    values = metrics.self_bleu_diversity([["a b c d e", "a b c d x"], ["a b c d e f", "u v w x y z"]])
    np.testing.assert_allclose(values, [one_word_changed, 1.0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("text", ["yes", "the cat", "a b c", "a b c d", "the the the the the", "", "...", "a " * 50])
def test_identical_responses_have_no_self_bleu_diversity(text):
    assert metrics.self_bleu_diversity([[text] * 5]) == [0.0]


def test_one_empty_response_is_unlike_the_others_as_in_nltk():
    group = ["", "a b c d", "a b c e"]
    assert metrics.self_bleu_diversity([group]) == pytest.approx(1 - nltk_self_bleu(group), abs=1e-12)


def test_responses_without_a_word_are_the_same_response():
    # The silent members (BLEU 1 each) and one that nothing resembles (BLEU 0): (1 + 1 + 0) / 3.
    assert metrics.self_bleu_diversity([["", "?!", "a b c d"]]) == pytest.approx(1 - 2 / 3, abs=1e-12)


def test_self_bleu_needs_two_responses():
    assert np.isnan(metrics.self_bleu_diversity([["a b"], []])).all()


def test_self_bleu_ignores_order_case_and_punctuation():
    group = ["The cat sat on a mat.", "a dog, on the mat", "THE CAT!", "on a mat the dog sat"]
    values = metrics.self_bleu_diversity([list(order) for order in itertools.permutations(group)])
    np.testing.assert_allclose(values, values[0], rtol=0, atol=1e-12)
    plain = ["the cat sat on a mat", "a dog on the mat", "the cat", "on a mat the dog sat"]
    assert values[0] == pytest.approx(1 - nltk_self_bleu(plain), abs=1e-12)


def pairs_rouge(group: list[str]) -> list[float]:
    scorer = RougeScorer(["rougeL"])
    return [scorer.score(a, b)["rougeL"].fmeasure for a, b in itertools.combinations(group, 2)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_self_rouge_equals_rouge_score(shape):
    groups = random_groups(seed=7, **shape)
    expected = [1 - np.mean(pairs_rouge(group)) for group in groups]
    np.testing.assert_allclose(metrics.self_rouge_diversity(groups), expected, rtol=0, atol=1e-12)


def test_self_rouge_of_text_with_case_and_punctuation_equals_rouge_score():
    group = ["The cat sat on a mat.", "a dog, on the mat", "THE CAT!", "on a mat the dog sat: 2 times"]
    assert metrics.self_rouge_diversity([group]) == pytest.approx(1 - np.mean(pairs_rouge(group)), abs=1e-12)


def test_self_rouge_by_hand():
    # "a c d" is the longest common subsequence: F1 = 2 * 3 / (4 + 5). Two words of no other order in common: 2 * 1 / 4.
    np.testing.assert_allclose(metrics.self_rouge_diversity([["a b c d", "a c x d y"], ["a b", "b a"]]), [1 / 3, 1 / 2])


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 200])
def test_self_rouge_of_lengths_around_machine_words(length):
    # A carry out of one response's bits must not reach the next one's: the same word fills all of them.
    group = ["a " * length, "a " * (length + 1), "a " * 3, "b " * length]
    assert metrics.self_rouge_diversity([group]) == pytest.approx(1 - np.mean(pairs_rouge(group)), abs=1e-12)


@pytest.mark.parametrize("text", ["yes", "the cat", "", "...", "the the the the the", "a " * 50])
def test_identical_responses_have_no_self_rouge_diversity(text):
    assert metrics.self_rouge_diversity([[text] * 5]) == [0.0]


def test_responses_without_a_word_are_the_same_response_to_self_rouge():
    # One pair of silent members (F1 1), two pairs of a silent and a speaking one (F1 0).
    assert metrics.self_rouge_diversity([["", "?!", "a b c d"]]) == pytest.approx(1 - 1 / 3, abs=1e-12)


def test_self_rouge_needs_two_responses():
    assert np.isnan(metrics.self_rouge_diversity([["a b"], []])).all()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_distinct_n_equals_brute_force(n):
    groups = random_groups(seed=3, prompts=50, n=4, words=range(4, 12), vocabulary=5)
    expected = []
    for group in groups:
        pooled = [gram for response in group for gram in ngrams(response.split(), n)]
        expected.append(len(set(pooled)) / len(pooled))
    np.testing.assert_allclose(metrics.distinct_n(groups, n), expected, rtol=1e-12)


def test_distinct_n_by_hand():
    # Words: the cat / the dog ran. No pair spans two responses: "cat the" would be one.
    groups = [["The cat", "the dog, ran!"]]
    assert metrics.distinct_n(groups, 1) == pytest.approx([4 / 5])
    assert metrics.distinct_n(groups, 2) == pytest.approx([3 / 3])
    assert np.isnan(metrics.distinct_n(groups, 4)).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop", 2),
        ("Don\N{RIGHT SINGLE QUOTATION MARK}t stop", 2),
        ("'quoted' words", 2),
        ("x = 3 * 4", 3),
        ("well-kept", 2),
        ("naïve Übung", 2),
        ("  \n\t", 0),
        ("!?", 0),
    ],
)
def test_word_tokens(text, words):
    # One word more, held by every text: 1 + words unique of 2 + words in all, as "zzz" stands twice.
    expected = (1 + words) / (2 + words)
    assert metrics.distinct_n([[text, "zzz zzz"]], 1) == pytest.approx([expected])


def test_groups_without_a_word():
    groups = [["", "", ""], ["", "!!!", " "]]
    for n in (1, 2, 4):
        assert np.isnan(metrics.distinct_n(groups, n)).all()
    np.testing.assert_array_equal(metrics.self_bleu_diversity(groups), [0.0, 0.0])
    np.testing.assert_allclose(metrics.duplicate_rate(groups), [2 / 3, 1 / 3])


def test_empty_responses_add_nothing_to_distinct_n():
    assert metrics.distinct_n([["a b a", ""]], 1) == metrics.distinct_n([["a b a"]], 1) == [2 / 3]


def test_duplicate_rate():
    groups = [
        ["a b", "A  b\n", " a B", "a b c"],
        ["a", "b", "c", "d"],
        ["a", "a", "a", "a"],
        ["a.", "a", "STRASSE", "straße"],
    ]
    np.testing.assert_allclose(metrics.duplicate_rate(groups), [2 / 4, 0, 3 / 4, 1 / 4])


def brute_gram(vectors: np.ndarray) -> np.ndarray:
    n = len(vectors)
    return np.array([[sum(vectors[i] * vectors[j]) for j in range(n)] for i in range(n)])


@pytest.mark.parametrize("n", [2, 3, 8])
def test_embedding_metrics_equal_second_implementations(n):
    embeddings = unit(np.random.default_rng(4).normal(size=(20, n, 6)) + 0.5)
    grams = [brute_gram(group) for group in embeddings.numpy()]
    pairs = [np.mean([1 - gram[i, j] for i, j in itertools.combinations(range(n), 2)]) for gram in grams]
    np.testing.assert_allclose(metrics.cosine_distance(embeddings), pairs, atol=1e-12)
    volumes = [math.log(np.linalg.det(gram + np.eye(n))) for gram in grams]
    np.testing.assert_allclose(metrics.log_volume(embeddings), volumes, atol=1e-10)
    vendi_package = [vendi.score_X(group, normalize=False) for group in embeddings.numpy()]
    np.testing.assert_allclose(metrics.vendi_score(embeddings), vendi_package, rtol=1e-9)


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("n", [2, 3, 8, 21])
def test_semantic_clusters_equal_second_implementations(n, threshold):
    embeddings = unit(np.random.default_rng(8).normal(size=(20, n, 4)) + 0.6)
    values = metrics.semantic_clusters(embeddings, threshold)
    hierarchies = [linkage(group, "single", metric="cosine") for group in embeddings.numpy()]
    np.testing.assert_array_equal(values, [fcluster(h, 1 - threshold, "distance").max() for h in hierarchies])
    graphs = [brute_gram(group) >= threshold for group in embeddings.numpy()]
    np.testing.assert_array_equal(values, [connected_components(graph)[0] for graph in graphs])


def arc(*degrees: float) -> torch.Tensor:
    angles = np.radians(degrees)
    return torch.tensor(np.stack([np.cos(angles), np.sin(angles)], axis=-1))[None]


def test_a_chain_is_one_cluster():
    # Neighbours 20 degrees apart (cosine 0.94), the ends 100 degrees apart: single linkage joins them all.
    assert metrics.semantic_clusters(arc(0, 20, 40, 60, 80, 100), 0.9) == [1.0]
    assert metrics.semantic_clusters(arc(0, 20, 40, 70, 90, 110), 0.9) == [2.0]
    assert metrics.semantic_clusters(arc(0, 30, 60, 90), 0.9) == [4.0]
    assert metrics.semantic_clusters(arc(60, 0, 90, 30), 0.86) == [1.0]


@pytest.mark.parametrize("threshold", [-1.0, 1.1, math.nan])
def test_a_threshold_that_is_no_cosine_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be in"):
        metrics.semantic_clusters(arc(0, 20), threshold)


def test_embedding_metrics_closed_forms():
    axes = np.eye(8)
    coincident, orthogonal, two_clusters = axes[[0] * 4], axes[:4], axes[[0, 0, 1, 1]]
    embeddings = torch.as_tensor(np.stack([coincident, orthogonal, two_clusters]))
    np.testing.assert_allclose(metrics.cosine_distance(embeddings), [0, 1, 4 / 6], atol=1e-12)
    np.testing.assert_allclose(metrics.vendi_score(embeddings), [1, 4, 2], rtol=1e-9)
    # Two clusters of two: the determinant factors into (1 + 2)^2.
    expected = [math.log(5), 4 * math.log(2), 2 * math.log(3)]
    np.testing.assert_allclose(metrics.log_volume(embeddings), expected, rtol=1e-12)


def test_a_group_of_one():
    single = unit(np.ones((3, 1, 5)))
    assert np.isnan(metrics.cosine_distance(single)).all()
    np.testing.assert_allclose(metrics.vendi_score(single), 1.0)
    np.testing.assert_allclose(metrics.log_volume(single), math.log(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_embeddings_stay_within_the_ranges(dtype):
    row = unit(np.random.default_rng(5).normal(size=(6, 1, 384)))
    embeddings = row.expand(-1, 8, -1).to(dtype)
    np.testing.assert_allclose(metrics.cosine_distance(embeddings), 0, atol=1e-12)
    assert (metrics.cosine_distance(embeddings) >= 0).all()
    np.testing.assert_allclose(metrics.log_volume(embeddings), math.log(9), rtol=1e-12)
    np.testing.assert_allclose(metrics.vendi_score(embeddings), 1, rtol=1e-9)
    np.testing.assert_array_equal(metrics.semantic_clusters(embeddings, 1.0), np.ones(6))


@pytest.mark.parametrize(
    "metric", [metrics.cosine_distance, metrics.log_volume, metrics.vendi_score, metrics.semantic_clusters]
)
@pytest.mark.parametrize("factor", [2.0, 0.0, math.nan])
def test_embeddings_that_are_not_unit_vectors_are_refused(metric, factor):
    embeddings = unit(np.ones((2, 3, 4)))
    embeddings[1, 2] *= factor
    with pytest.raises(ValueError, match="unit norm"):
        metric(embeddings)


@pytest.mark.parametrize(
    "metric", [metrics.cosine_distance, metrics.log_volume, metrics.vendi_score, metrics.semantic_clusters]
)
def test_one_group_without_the_prompt_axis_is_refused(metric):
    with pytest.raises(ValueError, match=r"\(prompts, n, d\), got \(3, 4\)"):
        metric(unit(np.ones((3, 4))))


@pytest.mark.filterwarnings("error")
def test_quality_leaves_unscorable_responses_out():
    qualities = [[0.0, 1.0, 0.5], [None, 0.2, math.nan], [None, math.nan, None], [-2.0, -1.0, None]]
    np.testing.assert_allclose(metrics.quality(qualities), [0.5, 0.2, math.nan, -1.5])
    np.testing.assert_allclose(metrics.best_of_n(qualities), [1.0, 0.2, math.nan, -1.0])


def example(prompts: int = 3, n: int = 4) -> dict:
    rng = np.random.default_rng(6)
    return {
        "groups": random_groups(seed=6, prompts=prompts, n=n, words=range(5, 9), vocabulary=6),
        "embeddings": unit(rng.normal(size=(prompts, n, 5))),
        "qualities": rng.random((prompts, n)).tolist(),
        "truncated": [[False, True, True, True]] * prompts,
        "token_counts": [[3, 5, 5, 7]] * prompts,
    }


def test_group_metrics_is_every_metric_of_the_table():
    inputs = example()
    values = metrics.group_metrics(**inputs)
    assert list(values) == list(METRICS)
    assert {(column.shape, column.dtype) for column in values.values()} == {((3,), np.dtype("float64"))}
    expected = {
        "quality": np.mean(inputs["qualities"], axis=1),
        "best_of_n": np.max(inputs["qualities"], axis=1),
        "distinct_1": metrics.distinct_n(inputs["groups"], 1),
        "distinct_2": metrics.distinct_n(inputs["groups"], 2),
        "distinct_4": metrics.distinct_n(inputs["groups"], 4),
        "self_bleu_diversity": metrics.self_bleu_diversity(inputs["groups"]),
        "self_rouge_diversity": metrics.self_rouge_diversity(inputs["groups"]),
        "cosine_distance": metrics.cosine_distance(inputs["embeddings"]),
        "log_volume": metrics.log_volume(inputs["embeddings"]),
        "vendi_score": metrics.vendi_score(inputs["embeddings"]),
        "semantic_clusters": metrics.semantic_clusters(inputs["embeddings"], 0.8),
        "duplicate_rate": metrics.duplicate_rate(inputs["groups"]),
        "truncation_rate": [0.75] * 3,
        "mean_tokens": [5.0] * 3,
    }
    for name, column in values.items():
        np.testing.assert_allclose(column, expected[name], rtol=1e-12, err_msg=name)


def test_group_metrics_of_no_prompts():
    values = metrics.group_metrics([], torch.zeros(0, 4, 5), [], [], [])
    assert {column.shape for column in values.values()} == {(0,)}


@pytest.mark.parametrize("name", ["groups", "qualities", "truncated", "token_counts"])
def test_group_metrics_refuses_inputs_that_do_not_line_up(name):
    for wrong in (lambda rows: rows[:-1], lambda rows: [*rows[:-1], rows[-1][:-1]]):
        inputs = example()
        inputs[name] = wrong(inputs[name])
        with pytest.raises(ValueError, match=f"{name} must hold 3 prompts x 4"):
            metrics.group_metrics(**inputs)


def test_metric_values_do_not_depend_on_the_other_prompts():
    inputs = example(prompts=5)
    together = metrics.group_metrics(**inputs)
    alone = [metrics.group_metrics(**{name: rows[i : i + 1] for name, rows in inputs.items()}) for i in range(5)]
    for name, column in together.items():
        np.testing.assert_allclose(column, [values[name][0] for values in alone], rtol=1e-12, err_msg=name)


def test_the_gate_only_offers_metrics_of_which_more_is_better():
    assert {METRICS[name].direction for name in get_args(DiversityMetric)} == {"higher"}


def test_directions_hold_for_collapse():
    """A group that repeats itself is worse than a varied one on every diversity metric, as `direction` says."""
    varied = {"groups": [["a b c d", "e f g h", "i j k l"]], "embeddings": torch.eye(3)[None]}
    collapsed = {"groups": [["a b c d"] * 3], "embeddings": torch.eye(3)[None, [0, 0, 0]]}
    rest = {"qualities": [[1.0] * 3], "truncated": [[False] * 3], "token_counts": [[4] * 3]}
    better, worse = metrics.group_metrics(**varied, **rest), metrics.group_metrics(**collapsed, **rest)
    signs = Counter(
        (METRICS[name].direction, int(np.sign(better[name] - worse[name])[0]))
        for name in [*get_args(DiversityMetric), "duplicate_rate"]
    )
    assert signs == {("higher", 1): len(get_args(DiversityMetric)), ("lower", -1): 1}
