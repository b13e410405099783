"""Moving an alias of a registered model, one at a time, with a trail of who moved it, when, from where and why.

MLflow keeps no history of aliases and has no operation that reads and changes one at once. What is true is MLflow's
alias; beside it every move is an event of its own, a tag `dqo.alias.<time>-<id>` of the registered model whose value is
JSON (docs/registry.md). No two moves share a tag, so none can overwrite another one's.

Moves queue up by Lamport's bakery algorithm (doi:10.1145/361082.361093), which needs nothing but reading and writing
one's own entry: a move enters the queue without a number, takes the next number, and waits for those before it. Numbers
order the trail, so nothing depends on the clocks of different machines. An entry that has not changed for `PATIENCE`
seconds while another one waited for it has been abandoned; whoever waits then repairs it: the move is confirmed where
the alias was moved, and marked as interrupted where it was not.
"""

import calendar
import getpass
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlparse

from dqo.errors import DQOError
from dqo.mlflow_errors import USER, in_words

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

CHALLENGER, CHAMPION = "challenger", "champion"
PREFIX = "dqo.alias."
"""What the keys of the trail's tags begin with."""
PATIENCE = 30.0
"""Seconds without a change after which an unfinished move is taken to be abandoned; a move takes less than one."""
WHY_LENGTH = 500
"""Longest reason, in characters."""
TAG_LENGTH = 4500
"""Longest value of a tag, in characters. MLflow's client allows 100,000, but its database has 5,000 for a tag of a
registered model, and PostgreSQL and MySQL refuse more."""
_POLL = 0.2
_POLL_SHARE = 4
"""Those who wait leave a slow server at least three quarters of its time: one that checks passwords takes half a second
for an answer, and the one they wait for needs some ten."""
_REASON_LENGTH = 300

State = Literal["waiting", "moving", "done", "interrupted"]


@dataclass(frozen=True)
class Event:
    """One move of an alias.

    Attributes:
        id: Unique; the end of the tag's key.
        alias: The alias.
        action: What moved it: `register`, `promote`, `rollback`; `repair` never stays in the trail.
        version: Where it was moved to; `None` before that is decided.
        origin: Where it was before; `None` if nowhere.
        by: Who: the user at the MLflow server, else `user@host`.
        at: When it began, UTC.
        why: The reason that was given; empty where none has to be.
        forced: Whether it was moved although a gate had not passed.
        gate: The gate's report: `passed` (`None` where there was none), `reasons`, `left_out` where the tag has no room
            for all of them, and `report`, the artifact that holds the whole.
        state: `waiting` for its turn, `moving` from before the alias is moved until after, `done`, or `interrupted`:
            begun and ended without moving the alias.
        number: Place in the order of moves; 0 before it has one.
        beat: Counts up while it waits, so that those behind see that it is alive.
        repaired: Who has ended it in the place of the one who began, and when; empty where nobody had to.
    """

    id: str
    alias: str
    action: str
    by: str
    at: str
    version: str | None = None
    origin: str | None = None
    why: str = ""
    forced: bool = False
    gate: dict[str, Any] = field(default_factory=dict)
    state: State = "waiting"
    number: int = 0
    beat: int = 0
    repaired: str = ""

    @property
    def order(self) -> tuple[int, str]:
        """Two that took a number at the same moment share it, and are told apart by their ids."""
        return self.number, self.id

    @property
    def pending(self) -> bool:
        """Whether it has not ended."""
        return self.state in ("waiting", "moving")

    def to_json(self) -> str:
        """The tag's value: at most `TAG_LENGTH` characters, a gate's reasons being cut or left out where they must."""
        text = _dump(self)
        reasons = list(self.gate.get("reasons", ()))
        while len(text) > TAG_LENGTH and reasons:
            if any(len(reason) > _REASON_LENGTH for reason in reasons):
                reasons = [reason if len(reason) <= _REASON_LENGTH else f"{reason[: _REASON_LENGTH - 4]} ..."
                           for reason in reasons]  # fmt: skip
            else:
                reasons.pop()
            left_out = len(self.gate["reasons"]) - len(reasons)
            text = _dump(replace(self, gate={**self.gate, "reasons": reasons, "left_out": left_out}))
        return text


def _dump(event: Event) -> str:
    return json.dumps(asdict(event), ensure_ascii=False, separators=(",", ":"))


def new(alias: str, action: str, why: str = "", forced: bool = False, gate: Mapping[str, Any] | None = None) -> Event:
    """An event that begins now; see `Event`.

    Raises:
        DQOError: If the reason is longer than `WHY_LENGTH`.
    """
    if len(why) > WHY_LENGTH:
        raise DQOError(
            f"the reason has {len(why)} characters; expected at most {WHY_LENGTH}, which is what a tag has room for"
        )
    key = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:8]}"
    return Event(key, alias, action, whoami(), now(), why=why, forced=forced, gate=dict(gate or {}))


def now() -> str:
    """The time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def whoami() -> str:
    """The user at the MLflow server, else the user of this machine and its name."""
    import mlflow

    named = urlparse(mlflow.get_tracking_uri()).username or os.environ.get(USER)
    if named:
        return named
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's numbered user has no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"[:200]


# --- reading ---


def read(model: "RegisteredModel") -> list[Event]:
    """The trail of a registered model, in order; tags that are none of ours or were edited by hand are left out."""
    found = []
    for key, value in model.tags.items():
        if key.startswith(PREFIX):
            with suppress(ValueError, TypeError):
                event = Event(**json.loads(value))
                if f"{PREFIX}{event.id}" == key and isinstance(event.number, int):
                    found.append(event)
    return sorted(found, key=lambda event: event.order)


def holder(model: "RegisteredModel", alias: str) -> str | None:
    """The version that an alias is on now, by MLflow; `None` if it is on none."""
    version = model.aliases.get(alias)
    return None if version is None else str(version)


def held_before(events: Sequence[Event], alias: str, current: str | None) -> list[str]:
    """Versions that a rollback of the alias goes through, the nearest first.

    Replays the trail: a move puts its version on top of those before it, a rollback takes away what it went back from.
    A version that got the alias without us (by MLflow's page, say) counts from where the next event met it.

    Args:
        events: The trail.
        alias: The alias.
        current: Where MLflow says that it is.
    """
    held: list[str] = []
    for event in events:
        if event.alias != alias or event.state != "done" or event.version is None:
            continue
        if event.origin is not None and held[-1:] != [event.origin]:
            held.append(event.origin)
        if event.action == "rollback" and event.version in held:
            while held[-1] != event.version:
                held.pop()
        elif held[-1:] != [event.version]:
            held.append(event.version)
    if current is not None and held[-1:] != [current]:
        held.append(current)
    before = reversed(held if current is None else held[:-1])
    return [version for version in dict.fromkeys(before) if version != current]


def interrupted(events: Sequence[Event]) -> list[Event]:
    """Moves that began more than `PATIENCE` seconds ago, by this machine's clock, and have not ended."""
    return [event for event in events if event.pending and _age(event) > PATIENCE]


def _age(event: Event) -> float:
    try:
        began = time.strptime(event.at, "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        return float("inf")
    return time.time() - calendar.timegm(began)


# --- moving ---


@dataclass(frozen=True)
class Moved:
    """What came of a move.

    Attributes:
        event: The event; `None` if the alias was there already.
        repaired: Moves of others that had been abandoned, as they now stand in the trail.
    """

    event: Event | None
    repaired: list[Event]


def move(
    client: "MlflowClient",
    name: str,
    event: Event,
    decide: Callable[["RegisteredModel", list[Event]], str | None],
    patience: float = PATIENCE,
    waiting: Callable[[Event], None] | None = None,
) -> Moved:
    """Move an alias when its turn has come; the one way in which this library moves one.

    An error or a kill leaves either nothing, or an event that says how far it came, for the next move to repair.

    Args:
        client: MLflow.
        name: Registered model; it has to exist.
        event: What `new` returned.
        decide: Given the registered model and its trail when the turn has come, the version to move to; where the alias
            is already, or `None`, nothing is moved. May raise.
        patience: See `PATIENCE`.
        waiting: Called once with the move that has to be waited for, if there is one.

    Raises:
        DQOError: If MLflow refuses or does not answer; what `decide` raises.
    """
    with in_words(f"move the alias {event.alias!r} of {name!r}"):
        entry = _Entry(client, name, event)
        try:
            model = entry.queue(patience, waiting)
            repaired = _repair(client, model, entry.event)
            if repaired:
                model = client.get_registered_model(name)
            current = holder(model, event.alias)
            version = decide(model, read(model))
        except BaseException:
            entry.withdraw()
            raise
        if version is None or version == current:
            entry.withdraw()
            return Moved(None, repaired)
        entry.write(state="moving", version=version, origin=current)
        client.set_registered_model_alias(name, event.alias, version)
        _mark(client, name, entry.event)
        entry.write(state="done")
        return Moved(entry.event, repaired)


def repair(client: "MlflowClient", name: str, patience: float = PATIENCE) -> list[Event]:
    """End every abandoned move of a registered model; returns them as they now stand in the trail.

    Raises:
        DQOError: If MLflow refuses or does not answer.
    """
    return move(client, name, new(CHAMPION, "repair"), lambda *_: None, patience).repaired


class _Entry:
    """A move's own tag."""

    def __init__(self, client: "MlflowClient", name: str, event: Event) -> None:
        self._client, self._name, self.event = client, name, event

    def write(self, **changes: Any) -> None:
        self.event = replace(self.event, **changes)
        self._client.set_registered_model_tag(self._name, PREFIX + self.event.id, self.event.to_json())

    def withdraw(self) -> None:
        """Take back what has moved nothing; where that fails too, the next move marks it as interrupted."""
        with suppress(Exception):
            self._client.delete_registered_model_tag(self._name, PREFIX + self.event.id)

    def queue(self, patience: float, waiting: Callable[[Event], None] | None) -> "RegisteredModel":
        """Take a number and wait for those before; returns the registered model as it is when the turn has come."""
        self.write(number=0)
        events = read(self._client.get_registered_model(self._name))
        self.write(number=1 + max(event.number for event in events))
        seen: dict[str, tuple[Event, float]] = {}
        written = time.monotonic()
        while True:
            asked = time.monotonic()
            model = self._client.get_registered_model(self._name)
            took = time.monotonic() - asked
            before = []
            for event in read(model):
                # One without a number has yet to take it, and may take a smaller one than ours.
                first = event.number == 0 or event.order < self.event.order
                if event.pending and event.id != self.event.id and first:
                    unchanged = seen.get(event.id)
                    if unchanged is None or unchanged[0] != event:
                        seen[event.id] = (event, time.monotonic())
                    if time.monotonic() - seen[event.id][1] <= patience:
                        before.append(event)
            if not before:
                return model
            if waiting is not None:
                waiting(before[0])
                waiting = None
            if time.monotonic() - written > patience / 4:
                self.write(beat=self.event.beat + 1)
                written = time.monotonic()
            time.sleep(max(_POLL, (_POLL_SHARE - 1) * took))


def _repair(client: "MlflowClient", model: "RegisteredModel", mine: Event) -> list[Event]:
    """End the moves before one's own turn that have not ended: whoever began them is gone."""
    repaired = []
    for event in read(model):
        if not event.pending or event.id == mine.id or (event.number and event.order > mine.order):
            continue
        moved = event.state == "moving" and holder(model, event.alias) == event.version
        ended = replace(event, state="done" if moved else "interrupted", repaired=f"{mine.by} {now()}")
        if moved:
            _mark(client, model.name, ended)
        client.set_registered_model_tag(model.name, PREFIX + ended.id, ended.to_json())
        repaired.append(ended)
    return repaired


def _mark(client: "MlflowClient", name: str, event: Event) -> None:
    """Say on the version's own page how it became champion; writing it twice changes nothing."""
    if event.alias != CHAMPION or event.version is None:
        return
    tags = {
        "promoted_at": event.at,
        "promoted_by": event.by,
        "promoted_how": event.action,
        "promoted_by_force": "true" if event.forced else None,
        "promoted_why": event.why or None,
        "promoted_report": event.gate.get("report"),
        "previous_champion": event.origin,
    }
    held = client.get_model_version(name, event.version).tags
    for key, value in tags.items():
        if value is not None:
            client.set_model_version_tag(name, event.version, key, value)
        elif key in held:  # of an earlier move, whose reason is not this one's
            client.delete_model_version_tag(name, event.version, key)
