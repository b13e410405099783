"""The reasoning task: arithmetic word problems of one or two steps (the form of GSM8K).

    reward = form x (0.1 + 0.9 x right)          [ours]

Right is 1 when the number in "The answer is N." equals the row's answer, else 0; the library math-verify compares, so
that 12, 12.0, $12 and 24/2 are equal. Form is the product of the parts of `Form`: 0 where no single answer is stated,
1 for a worked solution that ends in one. The tenth for form alone gives groups without a right response something to
learn from. Every wrong response stays at 0.1 or below and every right one that states a single answer is worth at least
0.125, so the share of rewards above 0.1 is the accuracy.

How a policy may try to hack it, and what happens:

- several answers, so that one of them hits ("The answer is 7. The answer is 8.", "The answer is 7 or 8."): `single`.
- numbers strewn about: only the stated one counts.
- the bare answer, or an equation without a sentence: `working`.
- a working about something else, which would look diverse: `working` asks for a number of the problem.
- an invented calculation ("5 + 3 = 9"): `sound`.
- a right answer followed by random text, which would look diverse: `closing`; and `answer` says where it ends.
- one answer spelled in many ways ("8", "8.0", "16/2"), which look diverse where answers are embedded: `canonical`.
- an expression that is expensive to compute ("The answer is 9**9**9."): only plain numbers are read as an answer.

Not stopped: a right answer after a working that mentions the problem's numbers and makes no sense.
"""

import logging
import re
from dataclasses import astuple, dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from math_verify import parse, verify

from dqo.tasks.base import Message, PublicSet, Row, Task

FORM_SHARE = 0.1
"""What a well-formed response with a wrong answer is worth."""
MIN_WORDS = 3
"""Different words that a working has."""
_PLACES = 6
"""Decimal places in which math-verify compares, its `float_rounding`."""

# It warns that who switches its timeouts off has to stop long calculations; plain numbers take none.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# Every repetition is bounded or atomic, so that no text makes these slow.
_PLAIN = r"(?<![0-9.,])(?>[0-9]{1,3}(?:,[0-9]{3}){1,3}(?![0-9])|[0-9]{1,12}(?![0-9]))(?>\.[0-9]{1,6}(?![0-9]))?"
_NUMBER = rf"-?\$?{_PLAIN}(?:/[1-9][0-9]{{0,5}}(?![0-9]))?"
_GOLD = re.compile(rf"{_NUMBER}%?")
# Up to two words may name a unit: "The answer is 12 red apples."
_STATED = re.compile(
    rf"\bthe\s(?:final\s)?answer\sis:?\s(?P<number>{_NUMBER})%?"
    r"(?:\s(?!or\b|and\b)[a-z]{1,20}){0,2}\s?(?P<end>[.!](?!\w)|\n|\Z)",
    re.IGNORECASE,
)
_STATING = re.compile(r"\banswers?\s?(?:is|are|was|were|:|=)", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]{2,}")

_SIGN = r"(?:[-+*/\u00d7\u00f7\u2212]|\bx\b)"
_TERM = rf"\$?{_PLAIN}(?:\s[a-z]{{1,20}})?"
_EQUATION = re.compile(
    rf"(?P<left>{_TERM}(?:\s?{_SIGN}\s?{_TERM}){{1,20}})\s?=\s?(?P<right>-?\$?{_PLAIN})(?!\s?{_SIGN}\s?\$?[0-9])",
    re.IGNORECASE,
)
# Before an equation: what makes it the end of a longer one, which is not judged.
_CONTINUES = re.compile(r"(?:[-+*/\u00d7\u00f7\u2212=%()]|\bx)\s?\Z", re.IGNORECASE)
_TOKEN = re.compile(rf"{_PLAIN}|{_SIGN}", re.IGNORECASE)


@dataclass(frozen=True)
class Form:
    """How well a response is formed as a worked solution: parts in [0, 1], each 1 when nothing is to object to."""

    single: float
    """1 if one answer is stated in the asked-for form, and only one in any form, else 0."""
    closing: float
    """1 if the response ends with the full stop after its answer, else 0.5."""
    working: float
    """1 if three different words and a number of the problem stand before the answer, else 0.5."""
    sound: float
    """0.5 if an equation before the answer is false ("5 + 3 = 9"), else 1."""

    @property
    def score(self) -> float:
        """Product of the parts, in [0, 1]."""
        return prod(astuple(self))


def form(response: str, question: str) -> Form:
    """Judge the form of a response to a question."""
    text = response.strip()
    stated = _STATED.search(text)
    if stated is None or len(_STATING.findall(text)) != 1:
        return Form(single=0.0, closing=0.5, working=0.5, sound=1.0)
    working = text[: stated.start()]
    numbers = _numbers(question)
    words = {word.lower() for word in _WORD.findall(working)}
    grounded = not numbers or not numbers.isdisjoint(_numbers(working))
    return Form(
        single=1.0,
        closing=1.0 if stated["end"] in {".", "!"} and stated.end() == len(text) else 0.5,
        working=1.0 if grounded and len(words) >= MIN_WORDS else 0.5,
        sound=1.0 if all(_holds(left, right) for left, right in _equations(working)) else 0.5,
    )


def _numbers(text: str) -> set[str]:
    return {number.replace(",", "") for number in re.findall(_PLAIN, text)}


def _equations(text: str) -> list[tuple[str, str]]:
    """Calculations with their results, such as `("5 + 3", "8")`; those that go on before or after are left out."""
    return [
        (match["left"], match["right"])
        for match in _EQUATION.finditer(text)
        if not _CONTINUES.search(text, max(0, match.start() - 3), match.start())
    ]


def _holds(left: str, right: str) -> bool:
    """Whether a calculation gives the result, which may be rounded to the decimals that it is written with."""
    total, product, signs = Fraction(0), Fraction(1), "+*"
    for token in _TOKEN.findall(left):
        if token[0].isdigit():
            value = _fraction(token)
            if signs[1] != "/":
                product *= value
            elif value:
                product /= value
            else:
                return False
        elif token in {"+", "-", "\u2212"}:
            total, product = total + product * (1 if signs[0] == "+" else -1), Fraction(1)
            signs = ("+" if token == "+" else "-") + "*"
        else:
            signs = signs[0] + ("/" if token in {"/", "\u00f7"} else "*")
    total += product * (1 if signs[0] == "+" else -1)
    decimals = len(right.partition(".")[2])
    return abs(total - _fraction(right)) <= (Fraction(1, 2 * 10**decimals) if decimals else 0)


def _fraction(number: str) -> Fraction:
    return Fraction(number.replace(",", "").replace("$", ""))


@lru_cache(maxsize=65536)
def _parsed(number: str) -> tuple[Any, ...]:
    """A number as math-verify reads it; empty where it is none. Threads allow no timeouts (they are signals)."""
    text = number.strip()
    return tuple(parse(text.removesuffix("%"), parsing_timeout=None)) if _GOLD.fullmatch(text) else ()


def answer(response: str) -> tuple[int, int] | None:
    """Where the number of the first "The answer is N." stands, as start and end; `None` when there is none."""
    stated = _STATED.search(response)
    return stated.span("number") if stated else None


@lru_cache(maxsize=65536)
def canonical(number: str) -> str:
    """One spelling for all numbers that the reward takes for equal: 8 for 8.0, $8 and 16/2.

    Args:
        number: The words at `answer`.

    Returns:
        A decimal number of at most six places, without a sign of money, separators and trailing zeros: math-verify
        compares decimals rounded to as many, so that 1/3 is 0.333333. What math-verify cannot read, as it is written.
    """
    parsed = _parsed(number)
    if not parsed:
        return number
    # Its own rounding, for the ties; text, since its floats have digits enough for the longest number that is read.
    rounded = Decimal(str(parsed[0].doit().round(_PLACES)))
    return format(rounded.quantize(Decimal(1).scaleb(-_PLACES)).normalize() + 0, "f")  # + 0: without the sign of -0


def reward(response: str, row: Row) -> float | None:
    """Quality of a response: form x (0.1 + 0.9 x right).

    Args:
        response: The text of one response.
        row: A row that passes `check`.

    Returns:
        In [0, 1]; `None` where the row's answer is no number, so that nothing can be right or wrong. [ours]
    """
    gold = _parsed(row["answer"])
    if not gold:
        return None
    right = (span := answer(response)) is not None and _same(gold, response[slice(*span)])
    return form(response, row["question"]).score * (FORM_SHARE + (1 - FORM_SHARE) * right)


def _same(gold: tuple[Any, ...], number: str) -> bool:
    return verify(list(gold), list(_parsed(number)), float_rounding=_PLACES, timeout_seconds=None)


_ASKED = 'Show the calculation briefly and end with "The answer is" and the number.'


def prompt(row: Row) -> list[Message]:
    """Ask for a short worked solution that ends in the form the reward reads.

    Of five wordings tried on SmolLM2-135M-Instruct (16 problems, 6 responses each, temperature 1, 48 tokens) none made
    much of a difference: an answer was stated in 5 to 18 % of the responses, and 3 of all 480 were right. This one had
    the highest mean reward, 0.024, and the fewest responses that were cut, 26 %; it then said "in one short sentence"
    where "briefly" stands now, since GSM8K takes several. The form is learned from demonstrations, not from the prompt.
    """
    return [{"role": "user", "content": f"{row['question']} {_ASKED}"}]


def check(row: Row) -> str | None:
    """Say why a row is unusable, naming field and value; `None` when it is usable."""
    for field in ("question", "answer"):
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            return f"{field}: got {value!r}; expected a non-empty string"
    gold = _parsed(row["answer"])
    if not gold:
        return f"answer: got {row['answer']!r}; expected a number in digits such as '12', '-3', '1,250', '2.5' or '3/4'"
    references = row.get("references")
    if not isinstance(references, list) or not references:
        return f"references: got {references!r}; expected a list of one or more strings"
    for item in references:
        if not isinstance(item, str) or not item.strip():
            return f"references: got the item {item!r}; expected a non-empty string"
        span = answer(item)
        if span is None or not _same(gold, item[slice(*span)]):
            return (
                f"references: got the item {item!r}; expected a worked solution that ends in 'The answer is "
                f"{row['answer'].strip()}.'"
            )
    return None


_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


def _from_gsm8k(row: Row) -> dict[str, Any]:
    """Turn GSM8K's form into ours: a solution with `<<48/2=24>>` in each calculation, and `#### 24` as its last line.

    The lines become sentences of one paragraph.
    """
    solution, mark, gold = row["answer"].rpartition("####") if isinstance(row["answer"], str) else ("", "", "")
    if not mark:
        raise ValueError(f"answer: got {row['answer']!r}; expected a solution whose last line is '#### <number>'")
    lines = (line.strip() for line in _ANNOTATION.sub("", solution).splitlines())
    sentences = [line if line[-1] in ".!?:" else f"{line}." for line in lines if line]
    return {
        "question": row["question"],
        "answer": gold.strip(),
        "references": [" ".join([*sentences, f"The answer is {gold.strip()}."])],
    }


REASONING = Task(
    name="reasoning",
    fields=("question", "answer"),
    bundled=Path(__file__).with_name("reasoning_problems.jsonl"),
    licence="CC0-1.0",
    prompt=prompt,
    check=check,
    reward=reward,
    public=PublicSet(
        dataset="openai/gsm8k",
        subset="main",
        split="train",
        licence="MIT",
        columns=("question", "answer"),
        convert=_from_gsm8k,
    ),
    answer=answer,
    canonical=canonical,
    passing=FORM_SHARE,
)
