"""How near a response comes to a reference, as the recipe's frozen encoder sees them.

    reward = max over references of max(0, cos(response, reference)) x (1 - copied) x restated          [ours]

The cosine is that of the encoder's unit-norm embeddings. Below 0 it is cut off: "opposite" has no use as a quality, and
rewards are in [0, 1] like a rule's. The maximum lets each right answer be a right answer.

- copied: share of the response's words inside a run of five words (or the whole prompt, where it is shorter) that the
  prompt holds too. Runs that a reference of the row takes from the prompt itself do not count.
- restated: min(1, cos(response, nearest reference) / cos(response, prompt)). Below 1 for what is nearer to the question
  than to every answer.

Both are there because a question is close to its answers: under the cosine alone, saying the prompt again earns more
than most right answers. With all-MiniLM-L6-v2 on the 300 bundled instructions, mean reward, and how often a right
answer that is not among the references (a reference judged by the others, mean 0.42 by the cosine and 0.38 here) earns
more:

| response | cosine alone | this reward | a right answer earns more |
|---|---|---|---|
| the prompt | 0.52 | 0.00 | 1.00 (cosine alone: 0.43) |
| "That is a good question." and the instruction | 0.49 | 0.11 | 0.98 (0.49) |
| the prompt with every fourth word left out | 0.47 | 0.28 | 0.85 (0.55) |
| the prompt's words, shuffled | 0.47 | 0.29 | 0.84 (0.57) |
| the prompt and a reference after it | 0.72 | 0.31 | 0.74 (0.23) |
| an answer to another instruction | 0.12 | 0.11 | 0.90 (0.94) |

How it can be gamed still: a reference cut in half earns 0.74, one whose words are shuffled 0.86, and one with another
row's answer behind it 0.73 (the last by the cosine alone). An embedding judges what a text is about, not whether it is
true, complete or grammatical. Keep `max_new_tokens` near the length of the references, look at `truncation_rate` and at
the responses, and take a reward model or a judge where that matters. A single reference makes one answer the right one;
give several.

Training and reward look through the same encoder: a response that fools it fools both.
"""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dqo.embedding import ResponseEncoder
from dqo.tasks.base import Row

RUN = 5

_WORD = re.compile(r"\w+")


class ReferenceSimilarity:
    """Cosine similarity to the nearest reference, less what was copied from the prompt.

    References and prompts are embedded once and kept.

    Args:
        encoder: Embeds responses, references and prompts.

    Attributes:
        cut_shares: Share of the last call's `prompts` and `references` that the encoder has read in part only: their
            ends are in no similarity. Empty where nothing was embedded.
    """

    name = "reference_similarity"

    def __init__(self, encoder: ResponseEncoder) -> None:
        self._encoder = encoder
        self._known: dict[str, Tensor] = {}
        self._cut: set[str] = set()
        self.cut_shares: dict[str, float] = {}

    def __call__(self, responses: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
        """See `dqo.rewards.Reward`; rows hold `references` and `prompt`. A response without words is worth 0."""
        values: list[float | None] = [0.0] * len(responses)
        judged = [index for index, text in enumerate(responses) if _WORD.search(text)]
        self.cut_shares = {}
        if not judged:
            return values
        prompts = [_text(row["prompt"]) for row in rows]
        self._embed(text for index in judged for text in (prompts[index], *rows[index]["references"]))
        compared = {
            "prompts": [prompts[index] for index in judged],
            "references": [text for index in judged for text in rows[index]["references"]],
        }
        self.cut_shares = {
            name: sum(text in self._cut for text in texts) / len(texts) for name, texts in compared.items()
        }
        vectors = self._encoder([responses[index] for index in judged]).vectors
        for index, vector in zip(judged, vectors, strict=True):
            references = rows[index]["references"]
            nearest = (torch.stack([self._known[text] for text in references]) @ vector).max().item()
            asked = (self._known[prompts[index]] @ vector).item()
            # Rounding can leave the cosine of equal texts a little above 1.
            similarity = min(max(nearest, 0.0), 1.0)
            restated = similarity / asked if asked > similarity else 1.0
            values[index] = similarity * restated * (1.0 - copied(responses[index], prompts[index], references))
        return values

    def _embed(self, texts: Iterable[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            embedded = self._encoder(new)
            self._known |= dict(zip(new, embedded.vectors, strict=True))
            self._cut |= {text for text, cut in zip(new, embedded.cut, strict=True) if cut}


def copied(response: str, prompt: str, references: Sequence[str]) -> float:
    """Share of a response's words that stand in a run of words copied from the prompt, in [0, 1].

    Args:
        response: Text with at least one word.
        prompt: Text of the prompt.
        references: What they copy from the prompt may be copied.
    """
    words, asked = _words(response), _words(prompt)
    size = min(RUN, len(asked))
    if size == 0:
        return 0.0
    allowed = {run for reference in references for run in _runs(_words(reference), size)}
    runs = set(_runs(asked, size)) - allowed
    inside = {
        place for start, run in enumerate(_runs(words, size)) if run in runs for place in range(start, start + size)
    }
    return len(inside) / len(words)


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]


def _runs(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def _text(prompt: str | Sequence[dict[str, str]]) -> str:
    """What was asked: the user's messages, without a system message that all prompts share."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt if message["role"] != "system")
