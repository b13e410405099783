"""The summarization task: a short text in one sentence (longer where a row's references are longer).

    reward = content x form

Content is ROUGE-L (the F-measure with stemming, by the library rouge-score) with the nearest of the references, over
`FULL_ROUGE` and at most 1. Form is the product of the parts of `Form`, each in [0, 1] and 1 for an ordinary sentence of
the summary's own words, so that every fault costs a factor and every repair pays at once. Both are rules: no model, no
download. Full marks begin below ROUGE-L 1 because two people who summarise a text well choose different words: what
counts is to say what a reference says, not to guess its wording. [ours]

How a policy may try to hack it, and what happens:

- the first sentence of the text, or any other, copied: `own`. News are written so that the first sentence is a summary,
  and ROUGE alone would reward it as one. Here it earns at most half: the copy is the one response that is open to every
  member of a group, so a policy that finds it has nothing left to vary, and the point of this library is that it
  varies. Up to half of a response may be quoted at no cost, names and figures with it.
- the copy with a word exchanged here and there: `own` looks for runs of five words, so one in five has to be changed.
- keywords in the order of the text ("Bakery, flour, gas, phone shop."): no function words, so `prose` is 0.
- several sentences, lines, bullets, a remark around the summary ("Here is a summary:"): `single`, `length`, `plain`;
  every word that no reference has lowers ROUGE's precision.
- a good summary padded with anything, to look different from the others: `length`, and precision while the content
  earns less than full marks.
- running on until the token limit: `ending`, `length`.
- saying one thing again and again: a longest common subsequence counts it once, so precision falls; `variety`.
- text in another script, emoji, markup, which ROUGE does not see at all: `plain`.

Over the bundled texts, a reference earns 0.53 on average where only the other one is known, the first sentence copied
0.36, a reference of another text 0.21.

Not stopped: a summary that turns the facts round ("The bakery closed the customers") or adds one, a good summary in
words that no reference has (a low ROUGE-L; more references help), and common words in the usual order, which are worth
a ROUGE-L of about 0.1 with any reference, a fifth of full marks. Rules cannot judge truth: read the responses in the
report.
"""

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache, lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqo.tasks.base import Message, PublicSet, Row, Task
from dqo.tasks.prose import WORD, ending, opening, plain, prose, sentences

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

SHORTEST, LONGEST = 0.5, 1.5
"""Lengths that cost nothing, in lengths of the shortest and of the longest reference."""
FULL_ROUGE = 0.5
"""ROUGE-L from which the content earns full marks."""
RUN = 5
"""Words in a row that count as copied from the text."""

# Latin letters with accents are plain, as are the signs of money and measures; other scripts and markup are not.
_PLAIN = re.compile(
    r"[A-Za-z0-9 \u00c0-\u024f.,;:!?'\"()$%&/+\u00a3\u00b0\u20ac\u2018\u2019\u201c\u201d\u2013\u2014\u2026-]"
)


class _Tokenizer:
    """rouge-score's own tokenizer with its results kept: every response of a group meets the same references."""

    def tokenize(self, text: str) -> tuple[str, ...]:
        return _tokens(text)


@cache
def _scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer  # imports NLTK, which takes seconds

    return RougeScorer(["rougeL"], tokenizer=_Tokenizer())


@cache
def _stemming() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)


@lru_cache(maxsize=4096)
def _tokens(text: str) -> tuple[str, ...]:
    """Stems of the words and numbers of a text, as ROUGE counts them: only letters a to z and digits are seen."""
    return tuple(_stemming().tokenize(text))


@lru_cache(maxsize=256)
def _runs(article: str) -> frozenset[tuple[str, ...]]:
    """Every `RUN` words in a row of a text."""
    words = tuple(_stemming().tokenize(article))
    return frozenset(words[start : start + RUN] for start in range(len(words) - RUN + 1))


def rouge_l(response: str, references: Sequence[str]) -> float:
    """ROUGE-L of a response with the nearest reference: F-measure, stemmed, in [0, 1].

    From C.-Y. Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, as the library rouge-score has it.
    """
    return max(_scorer().score(reference, response)["rougeL"].fmeasure for reference in references)


def copied(response: str, article: str) -> float:
    """Share of a response's words that stand in a run of `RUN` or more which the article has too, in [0, 1]."""
    words, runs = _tokens(response), _runs(article)
    marked: set[int] = set()
    for start in range(len(words) - RUN + 1):
        if words[start : start + RUN] in runs:
            marked.update(range(start, start + RUN))
    return len(marked) / len(words) if words else 0.0


@dataclass(frozen=True)
class Form:
    """How well a response is formed as a summary: parts in [0, 1], each 1 when there is nothing to object to."""

    opening: float
    """1 if the first character, an opening quote aside, is a capital letter, else 0.5."""
    ending: float
    """1 if the last character, a closing quote aside, is . ! or ?, else 0.5."""
    single: float
    """1 for one sentence, or as many as the longest reference has; beyond, that number / sentences and fragments."""
    length: float
    """1 from half the words of the shortest reference to 1.5 times those of the longest; outside, the smaller of words
    and limit over the larger."""
    prose: float
    """Share of English function words (the, of, was ...) over one seventh, at most 1: 0 for a bare list."""
    own: float
    """1 while at most half of the words are copied from the article in runs of five, falling to 0.5 where all are."""
    variety: float
    """min(1, share of distinct words / 0.7)."""
    plain: float
    """1 - 5 x share of characters beyond Latin letters, digits, spaces, common punctuation and signs, at least 0."""

    @property
    def score(self) -> float:
        """Product of the parts, in [0, 1]."""
        return prod(astuple(self))


def _most_sentences(references: Sequence[str]) -> int:
    return max(1, *(len(sentences(reference)) for reference in references))


def form(response: str, row: Row) -> Form | None:
    """Judge the form of a response; `None` when it holds no word at all."""
    text = response.strip()
    words, count = [word.lower() for word in WORD.findall(text)], len(_tokens(text))
    if not words or not count:
        return None
    sizes = [len(_tokens(reference)) for reference in row["references"]]
    return Form(
        opening=opening(text),
        ending=ending(text),
        single=min(1.0, _most_sentences(row["references"]) / len(sentences(text))),
        length=min(1.0, count / (SHORTEST * min(sizes)), LONGEST * max(sizes) / count),
        prose=prose(words),
        own=min(1.0, 1.5 - copied(text, row["article"])),
        variety=min(1.0, len(set(words)) / len(words) / 0.7),
        plain=plain(text, _PLAIN),
    )


def reward(response: str, row: Row) -> float:
    """Quality of a response: content times the score of its form.

    Args:
        response: The text of one response.
        row: A row that passes `check`.

    Returns:
        In [0, 1]; 0 for a response without words. [ours]
    """
    judged = form(response, row)
    return 0.0 if judged is None else min(1.0, rouge_l(response, row["references"]) / FULL_ROUGE) * judged.score


def prompt(row: Row) -> list[Message]:
    """Ask for a summary of the row's article: one sentence, or a few where a reference has several.

    Equal articles with a reference of each kind are two prompts.

    Of four wordings tried on SmolLM2-135M-Instruct (12 bundled texts, 8 samples each, an earlier form of the reward)
    this one had the highest mean, 0.23; the request before the text had 0.19, "Say in one short sentence what this text
    is about." 0.16 and "Summarize this text briefly:" 0.11, for its several sentences. On 12 texts that the choice had
    not seen, with today's reward: mean 0.18, standard deviation within a group 0.13, no ties.
    """
    size = "one sentence" if _most_sentences(row["references"]) == 1 else "a few sentences"
    return [{"role": "user", "content": f"{row['article'].strip()}\n\nSummarize this text in {size}."}]


def check(row: Row) -> str | None:
    """Say why a row is unusable, naming field and value; `None` when it is usable."""
    article, references = row.get("article"), row.get("references")
    if not isinstance(article, str) or not article.strip():
        return f"article: got {article!r}; expected a text"
    if not isinstance(references, list) or not references:
        return f"references: got {references!r}; expected a list of one or more summaries"
    for item in references:
        if not isinstance(item, str) or not _tokens(item):
            return f"references: got the item {item!r}; expected a summary with English words"
    return None


def _from_cnn_dailymail(row: Row) -> dict[str, Any]:
    """Turn an article and its highlights, a sentence a line, into ours: the lines become one reference."""
    highlights = row["highlights"]
    if not isinstance(highlights, str):
        return {"article": row["article"], "references": highlights}  # for `check` to name
    # The set's text was tokenised once: " ." stands where a sentence ends.
    lines = [re.sub(r"\s+([.,;:!?])", r"\1", line.strip()) for line in highlights.splitlines() if line.strip()]
    joined = " ".join(line if ending(line) == 1.0 else f"{line}." for line in lines)
    return {"article": row["article"], "references": [joined]}


SUMMARIZATION = Task(
    name="summarization",
    fields=("article",),
    bundled=Path(__file__).with_name("summarization_texts.jsonl"),
    licence="CC0-1.0",
    prompt=prompt,
    check=check,
    reward=reward,
    public=PublicSet(
        dataset="abisee/cnn_dailymail",
        subset="3.0.0",
        split="train",
        licence="Apache-2.0",
        columns=("article", "highlights"),
        convert=_from_cnn_dailymail,
    ),
)
