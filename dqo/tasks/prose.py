"""What rules can say about the form of English prose: words, sentences, how a text opens and ends.

The rules and their numbers are choices of this project [ours].
"""

import re
from collections.abc import Sequence

WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
"""A word: letters, with apostrophes inside."""

# A sentence ends at . ! ? (and closing quotes or brackets) before a space, or at a line break.
_SENTENCE_END = re.compile(r"(?P<mark>[.!?])(?P<close>[\"')\]\u2019\u201d]*)\s+|\n\s*")
_TITLE = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St)$")
_OPENING = "\"'(\u2018\u201c"
_CLOSING = "\"')\u2019\u201d"

_FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some any no every each all both another other one two what which who whose whom
    i me my mine you your yours he him his she her hers it its we us our ours they them their theirs
    himself herself itself themselves nobody somebody someone something nothing everyone everything there here
    am is are was were be been being do does did done has have had having will would can could may might must shall
    should not never only just so too very than then when while where why how if because since until till unless
    although though as and or but nor yet for of in on at by to from with without into onto off out up down over under
    above below behind beside between through across along around against among after before during near toward towards
    past inside outside upon about like once again always still
    """.split()
)


def sentences(text: str) -> list[str]:
    """Split a response into its sentences; what follows the last mark counts as one."""
    found, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        after_title = match["mark"] == "." and _TITLE.search(text, start, match.start())
        # In '"Stop!" cried the dog.' the sentence goes on after the quotation.
        goes_on = match["close"] and text[match.end() : match.end() + 1].islower()
        if not (after_title or goes_on):
            found.append(text[start : match.end()])
            start = match.end()
    found.append(text[start:])
    return [sentence for sentence in found if WORD.search(sentence)]


def opening(text: str) -> float:
    """1 if the first character, an opening quote aside, is a capital letter, else 0.5; `text` is stripped."""
    return 1.0 if text.lstrip(_OPENING)[:1].isupper() else 0.5


def ending(text: str) -> float:
    """1 if the last character, a closing quote aside, is . ! or ?, else 0.5; `text` is stripped."""
    return 1.0 if text.rstrip(_CLOSING)[-1:] in {".", "!", "?"} else 0.5


def prose(words: Sequence[str]) -> float:
    """Share of English function words (the, of, was ...) over one seventh, at most 1: 0 for a bare list.

    Args:
        words: One or more words in lower case.
    """
    return min(1.0, 7.0 * sum(word in _FUNCTION_WORDS for word in words) / len(words))


def plain(text: str, allowed: re.Pattern[str]) -> float:
    """1 - 5 x share of characters that do not match `allowed`, at least 0; `text` is not empty."""
    return max(0.0, 1.0 - 5.0 * sum(not allowed.match(character) for character in text) / len(text))
