"""The frozen sentence encoder: texts in, unit-norm embeddings out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dqo.bundled import locate
from dqo.errors import DQOError
from dqo.recipe import Encoder


@dataclass(frozen=True)
class Embedded:
    """Embeddings of some texts.

    Attributes:
        vectors: Unit-norm, float32, shape `(texts, d)`.
        cut: For each text, whether it was longer than the encoder reads.
    """

    vectors: Tensor
    cut: list[bool]

    @property
    def cut_share(self) -> float:
        """Share of the texts that were cut."""
        return sum(self.cut) / len(self.cut)


class ResponseEncoder:
    """A frozen sentence-transformers model in eval mode, kept out of every optimiser and autocast.

    Args:
        spec: The recipe's encoder section.
        device: Where it runs; `None` takes the library's choice.

    Raises:
        DQOError: If the model cannot be found or loaded.
    """

    def __init__(self, spec: Encoder, device: str | torch.device | None = None) -> None:
        from sentence_transformers import SentenceTransformer

        location = locate(spec.model, spec.revision)
        try:
            model = SentenceTransformer(
                location.load, revision=location.hub_revision, device=None if device is None else str(device)
            )
        except (OSError, ValueError) as error:
            raise DQOError(f"encoder {spec.model!r}: cannot be loaded ({error})") from error
        self._model = model.eval().requires_grad_(False)
        self._max_tokens = min(spec.max_tokens, model.max_seq_length or spec.max_tokens)
        self._model.max_seq_length = self._max_tokens
        self._batch_size = spec.batch_size
        self.name = spec.model

    def __call__(self, texts: Sequence[str]) -> Embedded:
        """Embed texts; equal texts are embedded once.

        Raises:
            DQOError: If the encoder returns a zero or non-finite vector, which has no direction.
        """
        if not texts:
            raise ValueError("no texts to embed")
        # Batches of texts of one length in tokens: sorted by characters alone, padding was a fifth of what is computed.
        # Ties in a fixed order: the order of a set differs between processes, and with it the last bits of a batch.
        unique = sorted(set(texts), key=lambda text: (len(text), text))
        lengths = self._lengths(unique)
        unique.sort(key=lambda text: lengths[text])
        position = {text: index for index, text in enumerate(unique)}
        vectors = []
        with torch.no_grad(), torch.autocast(self._model.device.type, enabled=False):
            for start in range(0, len(unique), self._batch_size):
                features = {
                    key: value.to(self._model.device) if isinstance(value, Tensor) else value
                    for key, value in self._model.preprocess(unique[start : start + self._batch_size]).items()
                }
                vectors.append(self._model(features)["sentence_embedding"].float())
        stacked = torch.cat(vectors)
        norms = stacked.norm(dim=-1, keepdim=True)
        bad = ~(torch.isfinite(norms) & (norms > 1e-6)).squeeze(-1)
        if bad.any():
            text = unique[int(bad.nonzero()[0])]
            raise DQOError(
                f"encoder {self.name!r}: returned a vector of norm {norms[bad][0].item():.3g} for the response "
                f"{text[:80]!r}; expected a finite vector that is not zero (is this a sentence encoder?)"
            )
        rows = torch.tensor([position[text] for text in texts])
        cut = [lengths[text] >= self._max_tokens for text in texts]
        return Embedded((stacked / norms)[rows.to(stacked.device)], cut)

    def _lengths(self, texts: Sequence[str]) -> dict[str, int]:
        """Tokens of each text as the encoder reads it, cut at its limit."""
        counts: list[int] = []
        for start in range(0, len(texts), self._batch_size):
            counts += self._model.preprocess(texts[start : start + self._batch_size])["attention_mask"].sum(-1).tolist()
        return dict(zip(texts, counts, strict=True))
