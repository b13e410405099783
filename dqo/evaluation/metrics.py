r"""What is measured on one prompt's group of responses: one number a prompt and metric.

Text metrics take groups of any size, as `Sequence[Sequence[str]]` (prompts x responses); embedding metrics take a
tensor of shape `(prompts, n, d)`. Every function returns a float64 array of shape `(prompts,)`. Where a metric is not
defined for a prompt its value is nan, and the statistics leave that prompt out.

Text is compared as lower-cased word tokens: runs of letters, digits and underscores, with the apostrophes inside a
word. Punctuation and operators do not count, and a script written without spaces gives one token a run: for such a
language the embedding metrics are the ones to read.

A response without a word (empty, or punctuation only) stays a member of its group, under one rule: such responses are
all the same response. So a policy that falls silent is never credited for more than one way of doing it. A group of
nothing else has `self_bleu_diversity` and `self_rouge_diversity` 0 and no `distinct_n` (nan: there is no n-gram to
count). Embeddings are those of the text as it is: empty responses coincide, and a group of nothing else is at the lower
bound of the embedding metrics.

The same functions behind the interface of the `evaluate` library are in `dqo.evaluation.evaluate_metrics`; sources and
blind spots of each metric are in docs/metrics.md.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqo import determinant
from dqo.diversity import same_meaning
from dqo.evaluation.catalogue import CLUSTER_THRESHOLD

Groups = Sequence[Sequence[str]]
PerPrompt = NDArray[np.float64]

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
_BLEU_ORDERS = 4
_BLEU_EPSILON = 0.1  # matches credited where there is none: nltk's SmoothingFunction().method1
_UNIT_NORM_TOLERANCE = 0.01  # half precision stays far below; embeddings nobody normalised do not


def _words(response: str) -> list[str]:
    return _WORD.findall(response.lower())


def _ngram_counts(words: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def distinct_n(groups: Groups, n: int) -> PerPrompt:
    """Unique n-grams over all n-grams of a group's responses, pooled.

    No n-gram spans two responses. The value falls with the amount of text, so compare it at equal n and similar length.

    Args:
        groups: Responses, prompts x any number.
        n: Words in an n-gram, at least 1.

    Returns:
        Shape `(prompts,)`, in (0, 1]; nan for a group without any n-gram.

    Source: Li et al., 2016 (arXiv 1510.03055), over a group instead of a corpus.
    """
    values = []
    for group in groups:
        pooled: Counter[tuple[str, ...]] = Counter()
        for response in group:
            pooled.update(_ngram_counts(_words(response), n))
        values.append(len(pooled) / pooled.total() if pooled else math.nan)
    return np.array(values, dtype=np.float64)


def _clipped_matches(group: list[list[str]]) -> list[list[int]]:
    """N-grams of each response that another response holds, clipped at the largest count among those others.

    Only what begins with a shared n-gram can be a longer shared one, so each order looks at what the last one left. An
    n-gram that stands once in a response matches where any other response holds it; only repeated ones need counts.
    N-grams are written as whole numbers in base `words of the group`, which are quick to compare.

    Returns:
        One list a member, of its matches of order 1 to 4.
    """
    numbers: dict[str, int] = {}
    words = [[numbers.setdefault(word, len(numbers)) for word in response] for response in group]
    base = len(numbers)
    ends = [list(range(1, len(response) + 1)) for response in words]  # where the next word of each n-gram stands
    ngrams = words
    matches: list[list[int]] = [[] for _ in group]
    for order in range(1, _BLEU_ORDERS + 1):
        different = [set(response) for response in ngrams]
        holders = Counter(chain.from_iterable(different))
        shared = {ngram for ngram, responses in holders.items() if responses > 1}
        counts: list[Counter[int]] = []
        for member, response in enumerate(ngrams):
            common = different[member] & shared
            matched = len(common)
            if len(different[member]) < len(response):
                counts = counts or [Counter(other) for other in ngrams]
                for ngram in common:
                    if (count := counts[member][ngram]) > 1:
                        others = [other.get(ngram, 0) for other in counts[:member]]
                        others += [other.get(ngram, 0) for other in counts[member + 1 :]]
                        matched += min(count, max(others)) - 1
            matches[member].append(matched)
        if order < _BLEU_ORDERS:
            longer = [
                [
                    (end + 1, ngram * base + response[end])
                    for end, ngram in zip(places, found, strict=True)
                    if ngram in shared and end < len(response)
                ]
                for response, places, found in zip(words, ends, ngrams, strict=True)
            ]
            ends = [[end for end, _ in found] for found in longer]
            ngrams = [[ngram for _, ngram in found] for found in longer]
    return matches


def _bleu_against_others(group: list[list[str]]) -> list[float]:
    """BLEU-4 of each response with all others of its group as references; the group has two members or more."""
    matches = _clipped_matches(group)
    lengths = [len(words) for words in group]
    scores = []
    for member, length in enumerate(lengths):
        others = lengths[:member] + lengths[member + 1 :]
        if length == 0:
            scores.append(float(0 in others))
            continue
        if matches[member][0] == 0:
            scores.append(0.0)
            continue
        brevity = 0.0
        if length not in others:
            closest = min(others, key=lambda other: (abs(other - length), other))
            brevity = min(0.0, 1 - closest / length)
        # A response shorter than four words has no 4-gram to match: weigh the orders it has, or a group of identical
        # short answers would look diverse.
        orders = min(_BLEU_ORDERS, length)
        precisions = [(matches[member][i] or _BLEU_EPSILON) / (length - i) for i in range(orders)]
        scores.append(math.exp(brevity + math.fsum(map(math.log, precisions)) / orders))
    return scores


def self_bleu_diversity(groups: Groups) -> PerPrompt:
    """One minus self-BLEU: the mean BLEU-4 of each response against the others of its group.

    BLEU is `nltk.translate.bleu_score.sentence_bleu(others, response, smoothing_function=SmoothingFunction().method1,
    auto_reweigh=True)` on lower-cased words: a precision without a match counts 0.1 matches, and responses of fewer
    than four words are scored on the orders they have. The one difference: a response without a word has BLEU 1 where
    another one has no word either, for which nltk says 0 (see the module).

    Args:
        groups: Responses, prompts x any number.

    Returns:
        Shape `(prompts,)`, in [0, 1]; nan for a group of fewer than two responses.

    Source: Zhu et al., 2018 (arXiv 1802.01886), over a group instead of a corpus.
    """
    values = [
        1.0 - math.fsum(_bleu_against_others([_words(response) for response in group])) / len(group)
        if len(group) > 1
        else math.nan
        for group in groups
    ]
    return np.array(values, dtype=np.float64)


def _rouge_l_of_pairs(group: list[list[str]]) -> list[float]:
    """ROUGE-L F1 of every pair of the group, in no stated order.

    The longest common subsequences of a response with all members before it are found at once: a bit of `unmatched`
    stands for a word of a member, and each word of the response moves every member's bits by one addition. A bit that
    stays 0 lies between two members and takes the carry.
    """
    places: dict[str, int] = {}
    every_place = 0
    lanes: list[tuple[int, int, int]] = []  # of each member so far: its first bit, a mask as long as it, its length
    end = 0
    scores = []
    for words in group:
        unmatched = every_place
        for word in words:
            if place := places.get(word):
                unmatched = (unmatched + (unmatched & place) | unmatched & ~place) & every_place
        for start, mask, length in lanes:
            shared = length - (unmatched >> start & mask).bit_count()
            scores.append(2 * shared / (length + len(words)) if length or words else 1.0)
        mask = (1 << len(words)) - 1
        for position, word in enumerate(words, start=end):
            places[word] = places.get(word, 0) | 1 << position
        every_place |= mask << end
        lanes.append((end, mask, len(words)))
        end += len(words) + 1
    return scores


def self_rouge_diversity(groups: Groups) -> PerPrompt:
    """One minus self-ROUGE: the mean ROUGE-L F1 over the pairs of a group's responses.

    ROUGE-L F1 of a pair is `2 LCS / (a + b)`, with LCS the length of the longest common subsequence of their
    lower-cased words and a, b their lengths. It is that of the package rouge-score without its stemmer, but for the
    words (see the module) and for two responses without a word, whose F1 is 1 here and 0 there.

    Args:
        groups: Responses, prompts x any number.

    Returns:
        Shape `(prompts,)`, in [0, 1]; nan for a group of fewer than two responses.

    Source: ROUGE-L by Lin, 2004 (ROUGE: A Package for Automatic Evaluation of Summaries); the additions that find the
    subsequences by Hyyrö, 2004 [second hand], many members in one integer [ours]. The mean over pairs is our reading of
    "self-ROUGE" [ours]: the method's paper is not at hand to compare with.
    """
    values = []
    for group in groups:
        scores = _rouge_l_of_pairs([_words(response) for response in group])
        values.append(1.0 - math.fsum(scores) / len(scores) if scores else math.nan)
    return np.array(values, dtype=np.float64)


def duplicate_rate(groups: Groups) -> PerPrompt:
    """Share of responses that equal an earlier one of their group once case and white space are folded.

    Args:
        groups: Responses, prompts x any number.

    Returns:
        Shape `(prompts,)`, in [0, 1 - 1/n]; nan for a group without a response.
    """
    values = [
        1.0 - len({" ".join(response.casefold().split()) for response in group}) / len(group) if group else math.nan
        for group in groups
    ]
    return np.array(values, dtype=np.float64)


def _unit_vectors(embeddings: Tensor) -> Tensor:
    """Check embeddings `(prompts, n, d)` and remove their rounding: float64, exactly unit norm."""
    if embeddings.dim() != 3:
        raise ValueError(f"embeddings must have shape (prompts, n, d), got {tuple(embeddings.shape)}")
    vectors = embeddings.detach().double()
    norms = vectors.norm(dim=-1, keepdim=True)
    # Not "any above": nan must fail too.
    if not ((norms - 1).abs() <= _UNIT_NORM_TOLERANCE).all():
        raise ValueError(f"embeddings must have unit norm, got norms from {norms.min():.4g} to {norms.max():.4g}")
    return vectors / norms


def cosine_distance(embeddings: Tensor) -> PerPrompt:
    """Mean of `1 - cos` over the pairs of a group.

    Args:
        embeddings: Unit-norm response embeddings, shape `(prompts, n, d)`.

    Returns:
        Shape `(prompts,)`, in `[0, n / (n - 1)]`; nan where n is 1.

    Raises:
        ValueError: If the shape is another or a norm is not 1.
    """
    vectors = _unit_vectors(embeddings)
    n = vectors.shape[1]
    if n < 2:
        return np.full(len(vectors), np.nan)
    # The squared norm of the sum is the sum over the Gram matrix: n ones and every pair twice.
    pairs = (vectors.sum(dim=1).square().sum(dim=-1) - n) / (n * (n - 1))
    return (1.0 - pairs).clamp(min=0.0).cpu().numpy()


def log_volume(embeddings: Tensor) -> PerPrompt:
    """`log det(L + I)` of each group, in nats: `dqo.determinant.log_volume` in float64 at the paper's kernel scale.

    The kernel scale is 1 whatever the training used, so that values of different runs compare.

    Args:
        embeddings: Unit-norm response embeddings, shape `(prompts, n, d)`.

    Returns:
        Shape `(prompts,)`, in `[log(1 + n), n log 2]`.

    Raises:
        ValueError: If the shape is another or a norm is not 1.
    """
    return determinant.log_volume(_unit_vectors(embeddings)).cpu().numpy()


def vendi_score(embeddings: Tensor) -> PerPrompt:
    """Effective number of different responses: exp of the entropy of the eigenvalues of `L / n`.

    Args:
        embeddings: Unit-norm response embeddings, shape `(prompts, n, d)`.

    Returns:
        Shape `(prompts,)`, in [1, n].

    Raises:
        ValueError: If the shape is another or a norm is not 1.

    Source: Friedman and Dieng, 2023 (arXiv 2210.02410), of order 1.
    """
    vectors = _unit_vectors(embeddings)
    eigenvalues = torch.linalg.eigvalsh(vectors @ vectors.mT / vectors.shape[1])
    # Rounding leaves eigenvalues of a singular matrix just below zero, where the entropy is not defined.
    return torch.special.entr(eigenvalues.clamp(min=0.0)).sum(dim=-1).exp().cpu().numpy()


def semantic_clusters(embeddings: Tensor, threshold: float = CLUSTER_THRESHOLD) -> PerPrompt:
    """Number of clusters of each group under single linkage: "distinct@k" with an encoder as the judge of sameness.

    Two responses share a cluster when a chain of responses links them, each similar to the next by at least the
    threshold: `scipy.cluster.hierarchy.fcluster(linkage(x, "single", "cosine"), 1 - threshold, "distance")`. The result
    does not depend on the order of the responses.

    Args:
        embeddings: Unit-norm response embeddings, shape `(prompts, n, d)`.
        threshold: Cosine similarity from which two responses mean the same, in (-1, 1]; met within 1e-6.

    Returns:
        Shape `(prompts,)`, whole numbers in [1, n].

    Raises:
        ValueError: If the shape is another, a norm is not 1 or the threshold is out of range.
    """
    vectors = _unit_vectors(embeddings)
    together = same_meaning(vectors @ vectors.mT, threshold)
    # Every member stands for one part of its cluster.
    return (1.0 / together.sum(dim=-1)).sum(dim=-1).round().double().cpu().numpy()


def _scores(qualities: Sequence[Sequence[float | None]]) -> list[PerPrompt]:
    """Scorable qualities of each prompt."""
    rows = [np.asarray(row, dtype=np.float64) for row in qualities]  # None becomes nan
    return [row[~np.isnan(row)] for row in rows]


def quality(qualities: Sequence[Sequence[float | None]]) -> PerPrompt:
    """Mean quality of each group's scorable responses.

    Args:
        qualities: Reward of each response, prompts x n; None or nan where it could not be scored.

    Returns:
        Shape `(prompts,)`; nan for a group without a scorable response.
    """
    return np.array([row.mean() if row.size else math.nan for row in _scores(qualities)], dtype=np.float64)


def best_of_n(qualities: Sequence[Sequence[float | None]]) -> PerPrompt:
    """Highest quality among each group's scorable responses.

    An unscorable response is one try fewer, not a zero.

    Args:
        qualities: Reward of each response, prompts x n; None or nan where it could not be scored.

    Returns:
        Shape `(prompts,)`; nan for a group without a scorable response.
    """
    return np.array([row.max() if row.size else math.nan for row in _scores(qualities)], dtype=np.float64)


def group_metrics(
    groups: Groups,
    embeddings: Tensor,
    qualities: Sequence[Sequence[float | None]],
    truncated: Sequence[Sequence[bool]],
    token_counts: Sequence[Sequence[int]],
) -> dict[str, PerPrompt]:
    """Every metric of `METRICS` for every prompt.

    Args:
        groups: Responses, prompts x n, the same n >= 1 for every prompt.
        embeddings: Their unit-norm embeddings, shape `(prompts, n, d)`.
        qualities: Their rewards; None or nan where one could not be scored.
        truncated: Whether each reached the token limit before it ended.
        token_counts: Tokens of each.

    Returns:
        Metric name -> array of shape `(prompts,)`, in the order of `METRICS`.

    Raises:
        ValueError: If the inputs do not all hold the same prompts x n, or the embeddings are not of unit norm.
    """
    prompts, n = embeddings.shape[:2]
    for name, rows in (
        ("groups", groups),
        ("qualities", qualities),
        ("truncated", truncated),
        ("token_counts", token_counts),
    ):
        if [len(row) for row in rows] != [n] * prompts:
            sizes = sorted({len(row) for row in rows})
            raise ValueError(
                f"{name} must hold {prompts} prompts x {n} as the embeddings do, got {len(rows)} with rows of {sizes}"
            )
    return {
        "quality": quality(qualities),
        "best_of_n": best_of_n(qualities),
        "distinct_1": distinct_n(groups, 1),
        "distinct_2": distinct_n(groups, 2),
        "distinct_4": distinct_n(groups, 4),
        "self_bleu_diversity": self_bleu_diversity(groups),
        "self_rouge_diversity": self_rouge_diversity(groups),
        "cosine_distance": cosine_distance(embeddings),
        "log_volume": log_volume(embeddings),
        "vendi_score": vendi_score(embeddings),
        "semantic_clusters": semantic_clusters(embeddings),
        "duplicate_rate": duplicate_rate(groups),
        "truncation_rate": np.array([np.mean(row) for row in truncated], dtype=np.float64),
        "mean_tokens": np.array([np.mean(row) for row in token_counts], dtype=np.float64),
    }
