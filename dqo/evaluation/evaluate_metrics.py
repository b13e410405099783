"""The diversity metrics as `evaluate.Metric`, for use without a pipeline: in a notebook, on anybody's responses.

    from dqo.evaluation.evaluate_metrics import Diversity, SelfBleu

    groups = [["first response to prompt 1", "second response"], ["first response to prompt 2", "second one"]]
    SelfBleu().compute(predictions=groups)  # {"self_bleu_diversity": 0.93, "self_bleu": 0.07}
    Diversity().compute(predictions=groups, confidence=0.95)  # every metric with its interval

The numbers are those of `dqo.evaluation.metrics`, which hold the formulas; docs/metrics.md says what each is blind to.
Nothing is downloaded: `evaluate.load` would ask the hub, these classes are made directly. The default encoder is the
bundled all-MiniLM-L6-v2. What `add` and `add_batch` collect stays in memory unless `keep_in_memory=False` asks for
files, so a read-only home is no obstacle.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import evaluate
import numpy as np
import torch
from datasets import Features, List, Value
from torch import Tensor

from dqo.embedding import ResponseEncoder
from dqo.errors import DQOError
from dqo.evaluation import metrics
from dqo.evaluation.catalogue import CLUSTER_THRESHOLD, METRICS
from dqo.evaluation.metrics import Groups, PerPrompt
from dqo.evaluation.statistics import bootstrap_interval
from dqo.recipe import Encoder

Encode = Callable[[Sequence[str]], Any]
"""Texts to one vector each: an array or tensor of shape `(texts, d)`."""

_INPUTS = """
Args:
    predictions (list of list of str): Groups: for each prompt the responses sampled for it.
    per_prompt (bool): Also return the value of each prompt, as `<name>_per_prompt`; nan where it is not defined.
    confidence (float): Also return the bounds of a bootstrap interval over prompts, as `<name>_low` and `<name>_high`.
    draws (int), seed (int): Of the bootstrap.

Returns:
    dict: The mean over the prompts for which the metric is defined, by the metric's name; nan if there is none.
"""
_EMBEDDINGS = """
Further args:
    embeddings: Ready embeddings instead of an encoder: shape (prompts, n, d), or one array (n, d) a prompt where n
        differs. Their length does not matter. `predictions` may then be left out.
"""


class GroupMetric(evaluate.Metric, ABC):
    """What all metrics of groups of responses share.

    Args:
        keep_in_memory: Collect responses in memory; `False` takes files in `cache_dir`, as several processes need.
            `None` is `False` for several processes only.
        options: Of `evaluate.Metric`: `num_process`, `process_id`, `cache_dir`, `experiment_id`.
    """

    reports: ClassVar[tuple[str, ...]] = ()
    """Names in `METRICS` of what `compute` returns."""
    source: ClassVar[str] = ""
    """Reference of the formula."""
    inputs: ClassVar[str] = _INPUTS

    def __init__(self, *, keep_in_memory: bool | None = None, **options: Any) -> None:
        if keep_in_memory is None:
            keep_in_memory = options.get("num_process", 1) == 1
        super().__init__(keep_in_memory=keep_in_memory, **options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.describe(),
            citation=self.source,
            inputs_description=self.inputs,
            features=Features({"predictions": List(Value("string"))}),
        )

    def describe(self) -> str:
        """Definition, range and direction of what `compute` returns."""
        described = [
            f"{name} ({METRICS[name].label}): {METRICS[name].definition} Range: {METRICS[name].range}. "
            f"{METRICS[name].direction.capitalize()} is better."
            for name in self.reports
        ]
        return "\n".join(described)

    def _build_data_dir(self) -> str:
        # The parent makes the folder even where it keeps everything in memory.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def add(self, *, prediction: Sequence[str] | None = None, reference: None = None, **kwargs: Any) -> None:
        """Collect one prompt's group of responses.

        Raises:
            DQOError: If it is not a list of strings.
        """
        super().add(prediction=_checked([prediction], "prediction")[0], **kwargs)

    def add_batch(self, *, predictions: Groups | None = None, references: None = None, **kwargs: Any) -> None:
        """Collect the groups of some prompts.

        Raises:
            DQOError: If they are not lists of strings.
        """
        super().add_batch(predictions=_checked(predictions, "predictions"), **kwargs)

    def compute(
        self, *, predictions: Groups | None = None, references: None = None, **kwargs: Any
    ) -> dict[str, Any] | None:
        """Measure the groups given here and those collected before.

        Raises:
            DQOError: If there is no group, or one is not a list of strings.
        """
        if predictions is None and self.writer is None and self.process_id == 0:
            if kwargs.get("embeddings") is not None and isinstance(self, EmbeddingMetric):
                return self._compute(None, **kwargs)
            raise DQOError("predictions: got none; expected groups of responses, a list of strings for each prompt")
        return super().compute(predictions=predictions, **kwargs)

    def _compute(
        self,
        predictions: Groups | None,
        per_prompt: bool = False,
        confidence: float | None = None,
        draws: int = 2000,
        seed: int = 0,
        embeddings: Any = None,
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, values in self.values(predictions, embeddings).items():
            defined = values[~np.isnan(values)]
            result[name] = float(defined.mean()) if defined.size else float("nan")
            if confidence is not None:
                interval = bootstrap_interval(values, draws, confidence, seed)
                result |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
            if per_prompt:
                result[f"{name}_per_prompt"] = values.tolist()
        return result

    @abstractmethod
    def values(self, groups: Groups | None, embeddings: Any = None) -> dict[str, PerPrompt]:
        """Value of each prompt by name, shape `(prompts,)`; the metrics of words leave `embeddings` unread.

        They take them all the same, so that `evaluate.combine` can hand every metric the same inputs.
        """


class DistinctN(GroupMetric):
    """Distinct-n: share of a group's n-grams that are unique, in (0, 1], higher is more diverse.

    Args:
        orders: The n to report, each as `distinct_<n>`.
        options: See `GroupMetric`.
    """

    reports = ("distinct_1", "distinct_2", "distinct_4")
    source = "Li et al., 2016: A Diversity-Promoting Objective Function (arXiv 1510.03055)"

    def __init__(self, orders: Sequence[int] = (1, 2, 4), **options: Any) -> None:
        if not orders or any(not isinstance(n, int) or n < 1 for n in orders):
            raise DQOError(f"orders: got {orders!r}; expected whole numbers of at least 1")
        self.orders = tuple(orders)
        super().__init__(**options)

    def describe(self) -> str:
        """Definition, range and direction of what `compute` returns."""
        return "\n".join(
            f"distinct_{n} (Distinct-{n}): Share of the group's sequences of {n} word(s) that are unique. "
            "Range: above 0, up to 1. Higher is better."
            for n in self.orders
        )

    def values(self, groups: Groups | None, embeddings: Any = None) -> dict[str, PerPrompt]:
        """See `GroupMetric.values`."""
        return {f"distinct_{n}": metrics.distinct_n(groups or [], n) for n in self.orders}


class SelfBleu(GroupMetric):
    """Self-BLEU of a group, raw and as a diversity.

    `self_bleu_diversity` is one minus the mean BLEU-4 of each response against the others, in [0, 1], higher is more
    diverse. `self_bleu` is the mean BLEU-4 itself, as papers print it: lower is more diverse.
    """

    reports = ("self_bleu_diversity",)
    source = "Zhu et al., 2018: Texygen (arXiv 1802.01886)"

    def describe(self) -> str:
        """Definition, range and direction of what `compute` returns."""
        return super().describe() + "\nself_bleu: one minus that, in [0, 1]. Lower is better."

    def values(self, groups: Groups | None, embeddings: Any = None) -> dict[str, PerPrompt]:
        """See `GroupMetric.values`."""
        diversity = metrics.self_bleu_diversity(groups or [])
        return {"self_bleu_diversity": diversity, "self_bleu": 1.0 - diversity}


class SelfRouge(GroupMetric):
    """Self-ROUGE of a group, raw and as a diversity.

    `self_rouge_diversity` is one minus the mean ROUGE-L F1 over the pairs of responses, in [0, 1], higher is more
    diverse. `self_rouge` is the mean F1 itself: lower is more diverse.
    """

    reports = ("self_rouge_diversity",)
    source = "Lin, 2004: ROUGE: A Package for Automatic Evaluation of Summaries; the mean over pairs is a choice"

    def describe(self) -> str:
        """Definition, range and direction of what `compute` returns."""
        return super().describe() + "\nself_rouge: one minus that, in [0, 1]. Lower is better."

    def values(self, groups: Groups | None, embeddings: Any = None) -> dict[str, PerPrompt]:
        """See `GroupMetric.values`."""
        diversity = metrics.self_rouge_diversity(groups or [])
        return {"self_rouge_diversity": diversity, "self_rouge": 1.0 - diversity}


class DuplicateRate(GroupMetric):
    """Share of responses that repeat an earlier one but for case and white space, in [0, 1 - 1/n], lower is better."""

    reports = ("duplicate_rate",)

    def values(self, groups: Groups | None, embeddings: Any = None) -> dict[str, PerPrompt]:
        """See `GroupMetric.values`."""
        return {"duplicate_rate": metrics.duplicate_rate(groups or [])}


class EmbeddingMetric(GroupMetric):
    """What the metrics of embeddings share.

    Args:
        encoder: What embeds the responses: a model for `dqo.embedding.ResponseEncoder` (its name, a folder, or the
            `encoder` section of a recipe), an object with `encode` such as a `SentenceTransformer`, or a function from
            texts to an array `(texts, d)`. `None` is the bundled all-MiniLM-L6-v2. It is loaded when first needed.
        options: See `GroupMetric`.
    """

    inputs = _INPUTS + _EMBEDDINGS

    def __init__(self, encoder: Encoder | Encode | str | None = None, **options: Any) -> None:
        self.encoder = encoder
        super().__init__(**options)

    def values(self, groups: Groups | None, embeddings: Any = None) -> dict[str, PerPrompt]:
        """See `GroupMetric.values`.

        Raises:
            DQOError: If the embeddings do not fit the groups, or one is zero or not finite.
        """
        vectors = self._embed(groups or []) if embeddings is None else _ready(embeddings, groups)
        columns: dict[str, PerPrompt] = {}
        # Groups of one size are measured together.
        for n in sorted({len(group) for group in vectors}):
            where = [prompt for prompt, group in enumerate(vectors) if len(group) == n]
            if n == 0:
                continue
            for name, values in self.measure(torch.stack([vectors[prompt] for prompt in where])).items():
                columns.setdefault(name, np.full(len(vectors), np.nan))[where] = values
        return columns or {name: np.full(len(vectors), np.nan) for name in self.reports}

    @abstractmethod
    def measure(self, embeddings: Tensor) -> dict[str, PerPrompt]:
        """Value of each prompt by name from unit-norm embeddings `(prompts, n, d)`."""

    def _embed(self, groups: Groups) -> list[Tensor]:
        texts = [text for group in groups for text in group]
        if not texts:
            return [torch.zeros(0, 1) for _ in groups]
        vectors = _tensor(_encode(self.encoder)(texts), "encoder")
        if vectors.dim() != 2 or len(vectors) != len(texts):
            raise DQOError(
                f"encoder: returned shape {tuple(vectors.shape)}; expected ({len(texts)}, d), one row a text"
            )
        return list(_directions(vectors, "encoder").split([len(group) for group in groups]))


class CosineDistance(EmbeddingMetric):
    """Mean of one minus the cosine similarity over the pairs, in [0, n / (n - 1)], higher is more diverse."""

    reports = ("cosine_distance",)

    def measure(self, embeddings: Tensor) -> dict[str, PerPrompt]:
        """See `EmbeddingMetric.measure`."""
        return {"cosine_distance": metrics.cosine_distance(embeddings)}


class LogVolume(EmbeddingMetric):
    """Log det(L + I) of a group's Gram matrix L, in nats, in [log(1 + n), n log 2], higher is more diverse."""

    reports = ("log_volume",)
    source = "Post-training Large Language Models for Diverse High-Quality Responses (arXiv 2509.04784)"

    def measure(self, embeddings: Tensor) -> dict[str, PerPrompt]:
        """See `EmbeddingMetric.measure`."""
        return {"log_volume": metrics.log_volume(embeddings)}


class VendiScore(EmbeddingMetric):
    """Effective number of different responses, in [1, n], higher is more diverse."""

    reports = ("vendi_score",)
    source = "Friedman and Dieng, 2023: The Vendi Score (arXiv 2210.02410)"

    def measure(self, embeddings: Tensor) -> dict[str, PerPrompt]:
        """See `EmbeddingMetric.measure`."""
        return {"vendi_score": metrics.vendi_score(embeddings)}


class SemanticClusters(EmbeddingMetric):
    """Number of clusters of a group under single linkage, in [1, n], higher is more diverse.

    Args:
        encoder: See `EmbeddingMetric`.
        threshold: Cosine similarity from which two responses mean the same, in (-1, 1]; read it with the encoder.
        options: See `GroupMetric`.
    """

    reports = ("semantic_clusters",)

    def __init__(
        self,
        encoder: Encoder | Encode | str | None = None,
        threshold: float = CLUSTER_THRESHOLD,
        **options: Any,
    ) -> None:
        if not -1.0 < threshold <= 1.0:
            raise DQOError(f"threshold: got {threshold}; expected a cosine similarity in (-1, 1]")
        self.threshold = threshold
        super().__init__(encoder, **options)

    def describe(self) -> str:
        """Definition, range and direction of what `compute` returns."""
        return super().describe() + f"\nThreshold here: {self.threshold:g}."

    def measure(self, embeddings: Tensor) -> dict[str, PerPrompt]:
        """See `EmbeddingMetric.measure`."""
        return {"semantic_clusters": metrics.semantic_clusters(embeddings, self.threshold)}


class Diversity(EmbeddingMetric):
    """Every metric above at once, each response embedded once, under the names that an evaluation uses.

    Without `predictions`, from ready embeddings, only the metrics of embeddings are returned.

    Args:
        encoder: See `EmbeddingMetric`.
        options: See `GroupMetric`.
    """

    reports = (
        "distinct_1",
        "distinct_2",
        "distinct_4",
        "self_bleu_diversity",
        "self_rouge_diversity",
        "cosine_distance",
        "log_volume",
        "vendi_score",
        "semantic_clusters",
        "duplicate_rate",
    )

    def values(self, groups: Groups | None, embeddings: Any = None) -> dict[str, PerPrompt]:
        """See `GroupMetric.values`."""
        found = super().values(groups, embeddings)
        if groups is not None:
            found |= {f"distinct_{n}": metrics.distinct_n(groups, n) for n in (1, 2, 4)}
            for measure in (metrics.self_bleu_diversity, metrics.self_rouge_diversity, metrics.duplicate_rate):
                found[measure.__name__] = measure(groups)
        return {name: found[name] for name in self.reports if name in found}

    def measure(self, embeddings: Tensor) -> dict[str, PerPrompt]:
        """See `EmbeddingMetric.measure`."""
        return {
            "cosine_distance": metrics.cosine_distance(embeddings),
            "log_volume": metrics.log_volume(embeddings),
            "vendi_score": metrics.vendi_score(embeddings),
            "semantic_clusters": metrics.semantic_clusters(embeddings),
        }


def _checked(groups: Any, name: str) -> list[list[str]]:
    """Groups of responses as lists.

    `evaluate` by itself would let `None` pass as a response, and keep its writer open after most other mistakes.
    """
    groups = _listed(groups)
    if not isinstance(groups, list) or not groups:
        raise DQOError(f"{name}: got {_short(groups)}; expected groups of responses, a list of strings for each prompt")
    groups = [_listed(group) for group in groups]
    for prompt, group in enumerate(groups):
        where = name if name == "prediction" else f"{name}[{prompt}]"
        if not isinstance(group, list):
            raise DQOError(f"{where}: got {_short(group)}; expected a list of strings, the responses to one prompt")
        for position, response in enumerate(group):
            if not isinstance(response, str):
                raise DQOError(f"{where}[{position}]: got {_short(response)}; expected a string")
            try:
                response.encode()
            except UnicodeEncodeError as error:
                raise DQOError(f"{where}[{position}]: {error.reason}; expected text that has a UTF-8 form") from error
    return groups


def _listed(value: Any) -> Any:
    """A list from any sequence but a string, a column of pandas, numpy or datasets included."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@lru_cache(maxsize=1)
def _response_encoder(spec: Encoder) -> ResponseEncoder:
    """The encoder in use: metrics made one after another share it."""
    return ResponseEncoder(spec)


def _encode(encoder: Any) -> Encode:
    if encoder is None:
        encoder = Encoder()
    elif isinstance(encoder, str):
        encoder = Encoder(model=encoder)
    if isinstance(encoder, Encoder):
        encoder = _response_encoder(encoder)
    if isinstance(encoder, ResponseEncoder):
        return lambda texts: encoder(texts).vectors
    encode = getattr(encoder, "encode", encoder)  # a SentenceTransformer is callable too, but not on texts
    if not callable(encode):
        raise DQOError(f"encoder: got {_short(encoder)}; expected a model's name or a function from texts to vectors")
    return encode


def _tensor(values: Any, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values if isinstance(values, Tensor) else np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise DQOError(f"{name}: not an array of numbers ({error}); expected vectors of one length") from error
    return tensor.detach().cpu().double()


def _directions(vectors: Tensor, name: str) -> Tensor:
    """Unit-norm vectors, shape `(..., d)`."""
    norms = vectors.norm(dim=-1, keepdim=True)
    bad = ~(torch.isfinite(norms) & (norms > 0))
    if bad.any():
        raise DQOError(f"{name}: holds a vector of norm {norms[bad][0].item():.3g}; expected finite vectors, not zero")
    return vectors / norms


def _ready(embeddings: Any, groups: Groups | None) -> list[Tensor]:
    """Given embeddings as one tensor `(n, d)` a prompt, checked against the groups."""
    vectors = [_tensor(group, f"embeddings[{prompt}]") for prompt, group in enumerate(embeddings)]
    if not vectors:
        raise DQOError("embeddings: got none; expected shape (prompts, n, d)")
    for prompt, group in enumerate(vectors):
        expected = "(n, d)" if groups is None or prompt >= len(groups) else f"({len(groups[prompt])}, d)"
        if group.dim() != 2 or (groups is not None and prompt < len(groups) and len(group) != len(groups[prompt])):
            raise DQOError(f"embeddings[{prompt}]: got shape {tuple(group.shape)}; expected {expected}")
    if groups is not None and len(vectors) != len(groups):
        raise DQOError(f"embeddings: got those of {len(vectors)} prompts; expected {len(groups)}, as predictions")
    return [_directions(group, f"embeddings[{prompt}]") for prompt, group in enumerate(vectors)]
