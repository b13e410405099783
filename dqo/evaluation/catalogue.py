"""What a reader needs to know about each metric: its words, its direction and its range.

`dqo.evaluation.metrics` computes them. The gate, the registry and the tables need the words alone, and with them in a
module of their own a command that shows figures does not wait for torch.
"""

from dataclasses import dataclass
from typing import Literal

CLUSTER_THRESHOLD = 0.8
"""Cosine similarity from which two responses mean the same, whatever the training used, so that runs compare."""


@dataclass(frozen=True)
class Metric:
    """What a reader of the report needs to know about a metric."""

    label: str
    direction: Literal["higher", "lower", "neutral"]
    """Which way is better; `neutral` describes without judging."""
    range: str
    definition: str


METRICS: dict[str, Metric] = {
    "quality": Metric(
        "Quality", "higher", "that of the task's reward", "Mean reward of the group's scorable responses."
    ),
    "best_of_n": Metric(
        "Best of n", "higher", "that of the task's reward", "Highest reward among the group's scorable responses."
    ),
    "distinct_1": Metric("Distinct-1", "higher", "above 0, up to 1", "Share of the group's words that are unique."),
    "distinct_2": Metric(
        "Distinct-2", "higher", "above 0, up to 1", "Share of the group's word pairs that are unique."
    ),
    "distinct_4": Metric(
        "Distinct-4", "higher", "above 0, up to 1", "Share of the group's sequences of four words that are unique."
    ),
    "self_bleu_diversity": Metric(
        "1 - self-BLEU",
        "higher",
        "0 (every response repeats another one) to 1 (no word in common)",
        "One minus the mean BLEU-4 of each response against the others of its group.",
    ),
    "self_rouge_diversity": Metric(
        "1 - self-ROUGE",
        "higher",
        "0 (every response repeats the others) to 1 (no word in common)",
        "One minus the mean ROUGE-L F1 over the pairs of the group's responses.",
    ),
    "cosine_distance": Metric(
        "Cosine distance",
        "higher",
        "0 (all mean the same) to n / (n - 1), in practice below 1",
        "Mean of one minus the cosine similarity, over the pairs of the group's embeddings.",
    ),
    "log_volume": Metric(
        "Log-volume",
        "higher",
        "log(1 + n) (all mean the same) to n log 2 (nothing in common)",
        "log det(L + I) of the Gram matrix L of the group's embeddings: the diversity that DQO optimises.",
    ),
    "vendi_score": Metric(
        "Vendi score",
        "higher",
        "1 (all mean the same) to n (nothing in common)",
        "Effective number of different responses: exp of the entropy of the eigenvalues of L / n.",
    ),
    "semantic_clusters": Metric(
        "Semantic clusters",
        "higher",
        "1 (all mean the same) to n (all mean something else)",
        f"Clusters of the group's embeddings: a chain of cosine similarities of {CLUSTER_THRESHOLD} or more links a "
        "cluster (single linkage).",
    ),
    "duplicate_rate": Metric(
        "Duplicates",
        "lower",
        "0 to 1 - 1 / n",
        "Share of responses that equal an earlier one of their group but for case and white space.",
    ),
    "truncation_rate": Metric(
        "Truncated", "lower", "0 to 1", "Share of responses that reached the token limit before they ended."
    ),
    "mean_tokens": Metric(
        "Tokens", "neutral", "0 to the token limit", "Mean length of the group's responses in tokens."
    ),
}
"""Every metric of a run by its name in `evaluation.json`, in display order."""
