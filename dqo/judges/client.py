"""Asking an OpenAI-compatible server many questions: bounded, repeated where it failed, and kept on disk.

What is sent is counted and limited (`max_requests`, `max_concurrency`); what was answered is kept in a file of its own,
so that a call that was interrupted, ran out of its budget or lost its server asks only for the rest the next time.
"""

import email.utils
import hashlib
import json
import math
import os
import random
import string
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import httpx2
import tenacity

from dqo.errors import DQOError
from dqo.files import write_text
from dqo.recipe import Judge

_PATIENCE = 300.0
"""Seconds: a server that asks for a longer pause (Retry-After) counts as down."""
_LONGEST_WAIT = 60.0
"""Seconds: bound of the exponential backoff."""
_SPREAD = 0.1
"""Share of a pause that the server asked for, up to which the threads spread their return."""
_REFUSALS = 3
"""Requests refused in a row, before any was answered, that are taken to mean all of them."""
_FAILURES = 3
"""Requests given up in a row that are taken to mean that the server is down."""
_AGAIN = (408, 425, 429)
_REFUSED = (400, 413, 422, 501)


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        messages: Chat messages.
        schema: JSON schema of the answer, for servers that can hold to one.
        repeat: Another number is another question, though it is worded the same.
    """

    messages: list[dict[str, str]]
    schema: dict[str, Any]
    repeat: int = 0


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: `answered`; `refused`: the server does not take this question (too long, say); `missing`: no answer,
            because the server was down or the budget was spent.
        text: The answer; what went wrong for the other statuses.
    """

    status: Literal["answered", "refused", "missing"]
    text: str


class _Again(Exception):
    """A failure that may pass. `pause`: seconds the server asked for, None where it named none."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class _Refused(Exception):
    """The server does not take this question."""


class _Stopped(Exception):
    """Nothing more is sent."""


class ChatClient:
    """Asks one server, one call of `ask` at a time. Several processes may share its cache.

    Args:
        settings: The recipe's section.
        first_wait: Seconds before a failed request is sent the second time; doubled each time, plus a random part of
            up to this size. After a pause that the server asked for, the random part is up to this and a tenth of the
            pause, so that the threads do not come back all at once.
        draw: Gives numbers from 0 to 1, of which the random parts are made.

    Raises:
        DQOError: If the variable that should hold the key is not set or holds what cannot be one, or the cache cannot
            be written.
    """

    def __init__(self, settings: Judge, first_wait: float = 0.5, draw: Callable[[], float] = random.random) -> None:
        self._settings = settings
        self._url = f"{settings.endpoint}/chat/completions"
        self._first_wait = first_wait
        self._draw = draw
        self._key = read_key(settings)
        self._cache = Path(settings.cache).expanduser() if settings.cache else cache_folder()
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        self._lock = threading.Lock()
        self._halt = threading.Event()
        self._stop_reason = ""
        self._sent = 0
        self._failures = 0
        self._structured: bool | None = None if settings.structured_output else False
        self._answers_at_all = False
        self._resume_at = 0.0

    @property
    def sent(self) -> int:
        """Requests sent so far, those that failed and were sent again included."""
        return self._sent

    @property
    def stopped(self) -> str | None:
        """Why the last call of `ask` did not ask everything: the server is down, or the budget is spent; else None."""
        return self._stop_reason or None

    @property
    def host(self) -> str:
        """Host and port of the server."""
        return urlparse(self._url).netloc

    def ask(self, questions: Sequence[Question], progress: Callable[[int, int], None] | None = None) -> list[Answer]:
        """Answer every question, from the cache where it is known.

        Equal questions are asked once. Until the server has answered a first time, they are asked one after another:
        a wrong key or a refused setting then costs one request, not one for each question.

        Args:
            questions: What to ask.
            progress: Called with how many different questions are answered and how many there are.

        Returns:
            An answer for each question, in order. Missing ones are asked by the next call.

        Raises:
            DQOError: If the server says that no request of this kind can succeed: unknown model or path, wrong key.
        """
        keys = [self._digest(question) for question in questions]
        different = dict(zip(keys, questions, strict=True))
        answers = {key: kept for key in different if (kept := self._kept(key)) is not None}
        waiting = [key for key in different if key not in answers]
        total, refusals = len(different), 0
        # A new call tries again what an earlier one gave up, within the same budget.
        self._halt.clear()
        self._stop_reason, self._failures = "", 0

        def settle(key: str, answer: Answer) -> None:
            answers[key] = answer
            if progress is not None:
                progress(len(answers), total)

        limits = httpx2.Limits(max_connections=self._settings.max_concurrency)
        with httpx2.Client(timeout=self._settings.timeout, limits=limits) as http:
            while waiting and not self._answers_at_all:
                key = waiting.pop(0)
                answer = self._answer(http, key, different[key])
                settle(key, answer)
                refusals += answer.status == "refused"
                if refusals == _REFUSALS:
                    raise DQOError(f"judge {self._url}: refused the first {refusals} requests: {answer.text}")
            pool = ThreadPoolExecutor(self._settings.max_concurrency, thread_name_prefix="judge")
            try:
                running = {pool.submit(self._answer, http, key, different[key]): key for key in waiting}
                for future in as_completed(running):
                    settle(running[future], future.result())
            finally:  # an error or an interrupt ends the waits, too
                self._halt.set()
                pool.shutdown(cancel_futures=True)
        return [answers[key] for key in keys]

    def forget(self, questions: Sequence[Question]) -> None:
        """Take the answers to these questions out of the cache, so that another call asks them anew.

        Raises:
            DQOError: If the cache cannot be written.
        """
        for question in questions:
            try:
                self._path(self._digest(question)).unlink(missing_ok=True)
            except OSError as error:
                raise self._unwritable(error) from None

    def _answer(self, http: httpx2.Client, key: str, question: Question) -> Answer:
        """Send one question until it is answered, refused or given up."""
        retrying = tenacity.Retrying(
            stop=self._gives_up,
            wait=self._wait,
            retry=tenacity.retry_if_exception_type(_Again),
            sleep=tenacity.sleep_using_event(self._halt),
            reraise=True,
        )
        try:
            answer = retrying(self._negotiated, http, key, question)
        except _Refused as refusal:
            return Answer("refused", str(refusal))
        except _Stopped as stop:
            return Answer("missing", str(stop))
        except _Again as failure:
            with self._lock:
                self._failures += 1
                down = self._failures >= _FAILURES or not self._answers_at_all
            if down:
                self._stop(f"the judge at {self.host} is down: {failure}")
            return Answer("missing", str(failure))
        return answer

    def _negotiated(self, http: httpx2.Client, key: str, question: Question) -> Answer:
        """Send a question, without the schema if the server refuses that."""
        structured = self._structured is not False
        try:
            answer = self._send(http, key, question, structured)
        except _Refused:
            if not structured or self._structured:
                raise  # it has taken a schema before: the question is what it refuses
            answer = self._send(http, key, question, structured=False)
            structured = False
        with self._lock:
            self._failures = 0
            self._answers_at_all = True
            if self._structured is None:
                self._structured = structured
        return answer

    def _send(self, http: httpx2.Client, key: str, question: Question, structured: bool) -> Answer:
        """One HTTP request."""
        self._take_turn()
        body = self._body(question)
        if structured:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "judgement", "strict": True, "schema": question.schema},
            }
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        try:
            response = http.post(self._url, json=body, headers=headers)
        except httpx2.RequestError as error:  # timeout, refused or cut connection, broken encoding
            raise _Again(self._redacted(f"{type(error).__name__}: {error}".rstrip(": "))) from None
        except httpx2.InvalidURL as error:
            raise DQOError(f"judge.endpoint {self._settings.endpoint!r}: is no address ({error})") from None
        if response.status_code != 200:
            raise self._failure(response)
        try:
            document = response.json()
            choice = document["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _Again(f"answered 200 without a chat completion: {self._shown(response)}") from None
        if text is not None and not isinstance(text, str):
            raise _Again(f"answered 200 with a content that is no text: {self._shown(response)}")
        # JSON can carry half a surrogate pair, which no file of results can hold.
        answer = Answer("answered", self._redacted(text or "").encode("utf-8", "replace").decode())
        record = {
            "endpoint": self._settings.endpoint,
            "model": self._settings.model,
            "text": answer.text,
            "finish_reason": choice.get("finish_reason"),
            "structured": structured,
        }
        try:
            write_text(self._path(key), json.dumps(record) + "\n")
        except OSError as error:
            raise self._unwritable(error) from None
        return answer

    def _failure(self, response: httpx2.Response) -> Exception:
        """What a status other than 200 means."""
        status = response.status_code
        said = f"{status}: {self._shown(response)}"
        if status in _AGAIN or (status >= 500 and status not in _REFUSED):
            pause = retry_after(response.headers.get("Retry-After"), time.time())
            if pause is not None and pause <= _PATIENCE:
                with self._lock:  # for all threads
                    self._resume_at = max(self._resume_at, time.monotonic() + pause)
            return _Again(said, pause)
        if status in _REFUSED:
            return _Refused(said)
        advice = {
            401: f"the key in {self._settings.api_key_env} is not accepted"
            if self._settings.api_key_env
            else "it wants a key; name its variable in judge.api_key_env",
            403: "the key may not use this model",
            404: f"expected a server that serves /chat/completions there and knows the model {self._settings.model!r}",
        }.get(status, "expected a chat completion")
        self._stop(f"the judge at {self.host} answered {status}")
        return DQOError(f"judge {self._url}: answered {said}; {advice}")

    def _take_turn(self) -> None:
        """Wait while the server asked for a pause, then count the request.

        Raises:
            _Stopped: If nothing more is to be sent.
        """
        while not self._halt.is_set() and (pause := self._resume_at - time.monotonic()) > 0:
            self._halt.wait(self._after(pause))
        with self._lock:
            if not self._halt.is_set() and self._sent >= self._settings.max_requests:
                self._stop_reason = (
                    f"the budget of {self._settings.max_requests} requests (judge.max_requests) is spent"
                )
                self._halt.set()
            if self._halt.is_set():
                raise _Stopped(self._stop_reason or "interrupted")
            self._sent += 1

    def _stop(self, reason: str) -> None:
        with self._lock:
            self._stop_reason = self._stop_reason or reason
            self._halt.set()

    def _gives_up(self, state: tenacity.RetryCallState) -> bool:
        pause = _pause(state)
        return (
            state.attempt_number >= self._settings.max_attempts
            or (pause is not None and pause > _PATIENCE)
            or self._halt.is_set()
        )

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Seconds until the next attempt: exponential with jitter, and never before the server allows it."""
        backoff = tenacity.wait_exponential(self._first_wait, _LONGEST_WAIT)(state) + self._first_wait * self._draw()
        pause = _pause(state)
        return backoff if pause is None else max(backoff, self._after(pause))

    def _after(self, pause: float) -> float:
        """A moment of a thread's own, in seconds, after a pause that all of them keep."""
        return pause + (self._first_wait + _SPREAD * pause) * self._draw()

    def _body(self, question: Question) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": question.messages,
            self._settings.max_tokens_field: self._settings.max_tokens,
        }
        if self._settings.temperature is not None:
            body["temperature"] = self._settings.temperature
        return body

    def _digest(self, question: Question) -> str:
        """Key of the cache: server, model, prompt and parameters."""
        key = {
            "endpoint": self._settings.endpoint,
            "structured_output": self._settings.structured_output,
            **self._body(question),
            **asdict(question),
        }
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def _path(self, key: str) -> Path:
        return self._cache / key[:2] / f"{key}.json"

    def _unwritable(self, error: OSError) -> DQOError:
        return DQOError(f"judge.cache {self._cache}: cannot be written ({error.strerror})")

    def _kept(self, key: str) -> Answer | None:
        """The answer of an earlier call. A file that cannot be read is one that is asked for again."""
        try:
            text = json.loads(self._path(key).read_text(encoding="utf-8"))["text"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return Answer("answered", text) if isinstance(text, str) else None

    def _shown(self, response: httpx2.Response) -> str:
        """The start of what a server said, in one line and without the key."""
        said = " ".join(self._redacted(response.text).split())
        return f"{said[:200]}..." if len(said) > 200 else said or "(nothing)"

    def _redacted(self, text: str) -> str:
        """A server may repeat the key it was sent."""
        # Servers on one's own machine get keys like "x" or "EMPTY": no secrets, and maybe words of an answer.
        return text if self._key is None or len(self._key) < 8 else text.replace(self._key, "[key]")


def _pause(state: tenacity.RetryCallState) -> float | None:
    error = state.outcome.exception() if state.outcome is not None else None
    return error.pause if isinstance(error, _Again) else None


def retry_after(header: str | None, now: float) -> float | None:
    """Seconds that a `Retry-After` header asks for: a number, or a date (RFC 9110, section 10.2.3).

    Args:
        header: Its value.
        now: Seconds since the epoch.

    Returns:
        0 or more; None where the header is missing or neither.
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - now
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def cache_folder() -> Path:
    """Folder of answers: `$XDG_CACHE_HOME/dqo/judge`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dqo" / "judge"


def read_key(settings: Judge) -> str | None:
    """The server's key, None where it needs none.

    Raises:
        DQOError: If the variable that should hold the key is not set or holds what cannot be one.
    """
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise DQOError(f"judge.api_key_env: the environment variable {settings.api_key_env} is not set")
    if set(key) - set(string.digits + string.ascii_letters + string.punctuation):
        raise DQOError(
            f"judge.api_key_env: the value of {settings.api_key_env} holds white space or characters that no header "
            "can carry"
        )
    return key
