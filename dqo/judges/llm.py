"""Language models as judges: a rubric for one response, or two responses in both orders."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from dqo.errors import DQOError
from dqo.judges import Comparison, Identity, Pair, Score, Verdict, request_of
from dqo.judges.client import Answer, ChatClient, Question
from dqo.judges.prompt import Prompt
from dqo.recipe import Judge
from dqo.tasks.base import Row

Progress = Callable[[int, int], None]

_BRACES = 100
"""Braces that begin no object, after which an answer counts as unreadable: each of them costs a pass over the text."""


def read_answer(text: str, prompt: Prompt) -> tuple[str | int, str] | None:
    """Read a judge's answer strictly.

    The answer holds exactly one JSON object with the prompt's field, of exactly an allowed value, and with reasons.
    Text around it is allowed, and so is thinking that ends in `</think>`; a second such object is not: it may be a
    quotation, and which of them counts would be a guess.

    Args:
        text: The answer.
        prompt: What was asked.

    Returns:
        The verdict or score and the reasons; None where the answer cannot be read.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_each_once)
    rest = text.rpartition("</think>")[2]
    found: list[dict[str, Any]] = []
    position, unreadable = rest.find("{"), 0
    while position >= 0 and unreadable < _BRACES:
        try:
            value, end = decoder.raw_decode(rest, position)
        except (ValueError, RecursionError):
            end, unreadable = position + 1, unreadable + 1
        else:
            if prompt.field in value:
                found.append(value)
        position = rest.find("{", end)
    if len(found) != 1 or unreadable == _BRACES:
        return None
    result, reasons = found[0][prompt.field], found[0].get("reasons")
    # True == 1 in Python, and 4.0 == 4: the type has to be the choice's own.
    known = any(type(result) is type(choice) and result == choice for choice in prompt.choices)
    if not known or not isinstance(reasons, str):
        return None
    return result, reasons.encode("utf-8", "replace").decode()  # half a surrogate pair, escaped, cannot be written


def _each_once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, which must not name a key twice."""
    if len(dict(items)) < len(items):
        raise ValueError("a key stands twice")
    return dict(items)


class _LanguageModel:
    """What both kinds share: the client, the prompt and asking a second time."""

    def __init__(self, settings: Judge, prompt: Prompt, first_wait: float = 0.5) -> None:
        self._client = ChatClient(settings, first_wait)
        self._prompt = prompt
        self.progress: Progress | None = None
        """Called with how many questions of the current round are answered, and how many there are."""
        self.identity: Identity = {
            "kind": prompt.mode,
            "model": settings.model,
            "endpoint": settings.endpoint,
            "prompt": prompt.name,
            "prompt_version": prompt.version,
            "prompt_digest": prompt.digest,
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            "structured_output": settings.structured_output,
        }

    @property
    def requests(self) -> int:
        """Requests sent so far."""
        return self._client.sent

    @property
    def stopped(self) -> str | None:
        """See `PairwiseJudge`."""
        return self._client.stopped

    def _judge(self, texts: Sequence[tuple[str, ...]], repeat: int) -> list[tuple[str | int, str] | Answer]:
        """Ask about each request with its responses; what cannot be read is asked once more.

        Returns:
            Result and reasons, or the answer that holds none.
        """
        answers = self._ask(texts, repeat, again=False)
        results = [self._read(answer) for answer in answers]
        unread = [index for index, result in enumerate(results) if _unreadable(result)]
        if unread:
            for index, answer in zip(unread, self._ask([texts[i] for i in unread], repeat, again=True), strict=True):
                results[index] = self._read(answer)
            # An answer that nobody can read may be a server's bad hour: it is no judgement to be kept.
            lost = [texts[index] for index in unread if _unreadable(results[index])]
            self._client.forget([one for again in (False, True) for one in self._questions(lost, repeat, again)])
        return results

    def _ask(self, texts: Sequence[tuple[str, ...]], repeat: int, again: bool) -> list[Answer]:
        return self._client.ask(self._questions(texts, repeat, again), self.progress)

    def _questions(self, texts: Sequence[tuple[str, ...]], repeat: int, again: bool) -> list[Question]:
        return [Question(self._prompt.messages(*one, again=again), self._prompt.schema, repeat) for one in texts]

    def _read(self, answer: Answer) -> tuple[str | int, str] | Answer:
        read = read_answer(answer.text, self._prompt) if answer.status == "answered" else None
        return answer if read is None else read


def _unreadable(result: tuple[str | int, str] | Answer) -> bool:
    return isinstance(result, Answer) and result.status == "answered"


class PairwiseLLM(_LanguageModel):
    """A language model that compares two responses; each pair is asked in both orders.

    Args:
        settings: The recipe's section.
        prompt: A prompt of mode `pairwise`.
        first_wait: See `ChatClient`.

    Raises:
        DQOError: If the prompt is of the other mode, or the key's variable is not set.
    """

    shows_both = True

    def __init__(self, settings: Judge, prompt: Prompt, first_wait: float = 0.5) -> None:
        if prompt.mode != "pairwise":
            raise DQOError(f"judge.prompt {prompt.name!r}: is of mode {prompt.mode!r}; expected 'pairwise'")
        super().__init__(settings, prompt, first_wait)

    def compare(self, pairs: Sequence[Pair], repeat: int = 0) -> list[Comparison]:
        """See `PairwiseJudge`.

        Raises:
            DQOError: See `ChatClient.ask`.
        """
        texts = []
        for pair in pairs:
            question = request_of(pair.row)
            texts += [(question, pair.a, pair.b), (question, pair.b, pair.a)]
        results = self._judge(texts, repeat)
        swapped: dict[Verdict, Verdict] = {"A": "B", "B": "A"}
        comparisons = []
        for first, second in zip(results[::2], results[1::2], strict=True):
            (one, why), (other, why_other) = _verdict(first), _verdict(second)
            comparisons.append(Comparison((one, swapped.get(other, other)), (why, why_other)))
        return comparisons


def _verdict(result: tuple[str | int, str] | Answer) -> tuple[Verdict, str]:
    if isinstance(result, Answer):
        return ("missing" if result.status == "missing" else "invalid"), result.text
    return result[0], result[1]  # type: ignore[return-value]  # one of the prompt's choices


class PointwiseLLM(_LanguageModel):
    """A language model that scores one response on the prompt's anchors.

    Args:
        settings: The recipe's section.
        prompt: A prompt of mode `pointwise`.
        first_wait: See `ChatClient`.

    Raises:
        DQOError: If the prompt is of the other mode, or the key's variable is not set.
    """

    def __init__(self, settings: Judge, prompt: Prompt, first_wait: float = 0.5) -> None:
        if prompt.mode != "pointwise":
            raise DQOError(f"judge.prompt {prompt.name!r}: is of mode {prompt.mode!r}; expected 'pointwise'")
        super().__init__(settings, prompt, first_wait)

    def score(self, responses: Sequence[str], rows: Sequence[Row], repeat: int = 0) -> list[Score]:
        """See `PointwiseJudge`.

        Raises:
            DQOError: See `ChatClient.ask`.
        """
        texts = [(request_of(row), response) for response, row in zip(responses, rows, strict=True)]
        scores = []
        for result in self._judge(texts, repeat):
            if isinstance(result, Answer):
                scores.append(Score(None, "missing" if result.status == "missing" else "invalid", result.text))
            else:
                scores.append(Score(float(result[0]), "valid", result[1]))
        return scores
