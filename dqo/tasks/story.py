"""The story task: one sentence of a story from a few given words (the form of CommonGen).

    reward = coverage x form

Coverage is the share of the concepts that occur in the response, each counted once. Form is the product of the parts
of `Form`, each in [0, 1] and 1 for an ordinary English sentence, so that every fault costs a factor and every repair
pays at once. Both are rules: no model, no download.

How a policy may try to hack it, and what happens:

- bare list ("Dog, ball, park."): no function words, so `prose` is 0.
- list inside a sentence, or the prompt repeated ("... uses the words dog, ball, park."): `woven`.
- many attempts, chatter or an explanation around the sentence, lines, bullets: `single`, `length`, `plain`.
- running on until the token limit: `ending`, `length`.
- saying one thing again and again: `variety`; a concept is counted once, so nothing is gained either.
- English words set in another language: `plain` for other scripts, `prose` for Latin ones.
- word salad: `prose` where it lacks function words.

Not stopped: fluent nonsense ("The dog is the park of a ball."), and one safe pattern for every prompt ("The dog saw a
ball and ran to the park."). Rules cannot judge sense, so look at the responses in the report; sameness is what the
diversity term is for.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from nltk.stem import SnowballStemmer

from dqo.tasks.base import Message, PublicSet, Row, Task
from dqo.tasks.prose import WORD, ending, opening, plain, prose, sentences

MIN_WORDS, MAX_WORDS = 5, 25

# Latin letters with accents (naive with a diaeresis, cafe with an accent) are plain; other scripts and markup are not.
_PLAIN = re.compile(r"[A-Za-z0-9 \u00c0-\u024f.,;:!?'\"()\u2018\u2019\u201c\u201d\u2013\u2014\u2026-]")

# The stemmer only strips endings; these are the everyday forms that change inside. Both meanings of a form count: "saw"
# is a tool and the past of "see".
_IRREGULAR = {
    form: base
    for base, *forms in (
        line.split()
        for line in """
        beat beaten; become became; begin began begun; bend bent; bite bit bitten; blow blew blown;
        break broke broken; bring brought; build built; burn burnt; buy bought; catch caught; choose chose chosen;
        come came; creep crept; dig dug; draw drew drawn; dream dreamt; drink drank drunk; drive drove driven;
        eat ate eaten; fall fell fallen; feed fed; feel felt; fight fought; find found; fly flew flown;
        freeze froze frozen; get got gotten; give gave given; go went gone; grow grew grown; hang hung; hear heard;
        hide hid hidden; hold held; keep kept; know knew known; lead led; leap leapt; leave left; lend lent;
        light lit; lose lost; make made; meet met; pay paid; ride rode ridden; ring rang rung; rise rose risen;
        run ran; say said; see saw seen; sell sold; send sent; shake shook shaken; shine shone; shoot shot;
        sing sang sung; sink sank sunk; sit sat; sleep slept; slide slid; speak spoke spoken; spend spent;
        spill spilt; spin spun; stand stood; steal stole stolen; stick stuck; sting stung; strike struck;
        sweep swept; swim swam swum; swing swung; take took taken; teach taught; tear tore torn; tell told;
        think thought; throw threw thrown; wake woke woken; wear wore worn; weep wept; win won; wind wound;
        write wrote written; calf calves; child children; foot feet; goose geese; half halves; knife knives;
        leaf leaves; life lives; loaf loaves; man men; mouse mice; ox oxen; scarf scarves; shelf shelves;
        thief thieves; tooth teeth; wife wives; wolf wolves; woman women
        """.split(";")
    )
    for form in forms
}

_STEMMER = SnowballStemmer("english")


@lru_cache(maxsize=65536)
def _stems(word: str) -> frozenset[str]:
    """Stems a word may stand for, letter case and possessive removed."""
    word = word.lower().replace("\u2019", "'").removesuffix("'s")
    return frozenset(_STEMMER.stem(form) for form in (word, _IRREGULAR.get(word, word)))


def _mentions(text: str, concepts: Sequence[str]) -> list[tuple[str, int, int]]:
    """Every word that stands for a concept: the concept, where the word starts and where it ends."""
    by_stem = {_STEMMER.stem(concept.lower()): concept for concept in concepts}
    return [
        (by_stem[stem], match.start(), match.end())
        for match in WORD.finditer(text)
        for stem in _stems(match[0])
        if stem in by_stem
    ]


def _enumerates(gap: str) -> bool:
    """Whether the text between two words only joins them into a list: a comma, "and" or the like, an article."""
    words = {word.lower() for word in WORD.findall(gap)}
    return words <= {"and", "or", "a", "an", "the"} and (
        not words.isdisjoint({"and", "or"}) or not set(",;:/&|+*\n").isdisjoint(gap)
    )


def _longest_list(text: str, concepts: Sequence[str]) -> int:
    """Most different concepts enumerated in a row, as in "a dog, a ball and the park"."""
    longest, row, previous_end = 0, set[str](), 0
    for concept, start, end in _mentions(text, concepts):
        if not _enumerates(text[previous_end:start]):
            row.clear()
        row.add(concept)
        longest = max(longest, len(row))
        previous_end = end
    return longest


@dataclass(frozen=True)
class Form:
    """How well a response is formed as one sentence: parts in [0, 1], each 1 when there is nothing to object to."""

    opening: float
    """1 if the first character, an opening quote aside, is a capital letter, else 0.5."""
    ending: float
    """1 if the last character, a closing quote aside, is . ! or ?, else 0.5."""
    single: float
    """1 / number of sentences and trailing fragments."""
    length: float
    """1 from 5 to 25 words; below words / 5, above 25 / words."""
    prose: float
    """Share of English function words (the, of, was ...) over one seventh, at most 1: 0 for a bare list."""
    woven: float
    """0.3 if all concepts, three or more, are enumerated in a row ("a dog, a ball and the park"), else 1."""
    variety: float
    """min(1, share of distinct words / 0.7), halved for every word that directly repeats the one before."""
    plain: float
    """1 - 5 x share of characters beyond Latin letters, digits, spaces and common punctuation, at least 0."""

    @property
    def score(self) -> float:
        """Product of the parts, in [0, 1]."""
        return prod(astuple(self))


def coverage(response: str, concepts: Sequence[str]) -> float:
    """Share of the concepts that occur in the response as whole words, any inflection, in [0, 1]."""
    found = {concept for concept, _, _ in _mentions(response, concepts)}
    return len(found) / len(concepts)


def form(response: str, concepts: Sequence[str]) -> Form | None:
    """Judge the form of a response; `None` when it holds no word at all."""
    text = response.strip()
    words = [word.lower() for word in WORD.findall(text)]
    if not words:
        return None
    count = len(words)
    listed = len(concepts) >= 3 and _longest_list(text, concepts) == len(concepts)
    repeats = sum(first == second for first, second in pairwise(words))
    return Form(
        opening=opening(text),
        ending=ending(text),
        single=1.0 / len(sentences(text)),
        length=min(1.0, count / MIN_WORDS, MAX_WORDS / count),
        prose=prose(words),
        woven=0.3 if listed else 1.0,
        variety=min(1.0, len(Counter(words)) / count / 0.7) * 0.5**repeats,
        plain=plain(text, _PLAIN),
    )


def reward(response: str, row: Row) -> float:
    """Quality of a response: coverage of the row's concepts times the score of its form.

    Args:
        response: The text of one response.
        row: A row that passes `check`.

    Returns:
        In [0, 1]; 0 for a response without words. [ours]
    """
    judged = form(response, row["concepts"])
    return 0.0 if judged is None else coverage(response, row["concepts"]) * judged.score


def prompt(row: Row) -> list[Message]:
    """Ask for one sentence that uses the row's concepts, in their order.

    Of ten wordings tried on SmolLM2-135M-Instruct (96 samples each) this one had the highest mean reward, 0.26, with
    two close variants within noise; on 24 prompts the choice had not seen it reached 0.31, three others 0.18-0.25.
    """
    content = f"Write one short sentence that uses the words {', '.join(row['concepts'])}."
    return [{"role": "user", "content": content}]


def check(row: Row) -> str | None:
    """Say why a row is unusable, naming field and value; `None` when it is usable."""
    for field in ("concepts", "references"):
        value = row.get(field)
        if not isinstance(value, list) or not value:
            return f"{field}: got {value!r}; expected a list of one or more strings"
        for item in value:
            if not isinstance(item, str) or not item.strip():
                return f"{field}: got the item {item!r}; expected a non-empty string"
    stems: dict[str, str] = {}
    for concept in row["concepts"]:
        if not WORD.fullmatch(concept):
            return f"concepts: got {concept!r}; expected a single word of letters"
        stem = _STEMMER.stem(concept.lower())
        if stem in stems:
            return (
                f"concepts: got {stems[stem]!r} and {concept!r}, which count as the same word; expected different ones"
            )
        stems[stem] = concept
    return None


def _from_common_gen(row: Row) -> dict[str, Any]:
    """Turn CommonGen's form, one sentence a row, into ours; equal concepts are merged by the preparation."""
    return {"concepts": row["concepts"], "references": [row["target"]]}


STORY = Task(
    name="story",
    fields=("concepts",),
    bundled=Path(__file__).with_name("story_concepts.jsonl"),
    licence="CC0-1.0",
    prompt=prompt,
    check=check,
    reward=reward,
    public=PublicSet(
        dataset="allenai/common_gen",
        split="train",
        licence="MIT",
        columns=("concepts", "target"),
        convert=_from_common_gen,
    ),
)
