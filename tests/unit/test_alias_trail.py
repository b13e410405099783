"""The trail of an alias: what it replays to, how much a tag holds, who waits for whom, what is repaired."""

import json
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from dqo import alias_trail, tracking
from dqo.alias_trail import Event
from dqo.errors import DQOError
from dqo.recipe import parse


def done(number: int, origin: str | None, version: str, action: str = "promote", **further) -> Event:
    return Event(f"id{number}", "champion", action, "me", "2026-01-01T00:00:00Z", version, origin,
                 state="done", number=number, **further)  # fmt: skip


# --- replaying ---


@pytest.mark.parametrize(
    ("moves", "current", "before"),
    [
        ([], None, []),
        ([], "3", []),
        ([(None, "1")], "1", []),
        ([(None, "1"), ("1", "2"), ("2", "3")], "3", ["2", "1"]),
        ([(None, "1"), ("1", "2"), ("2", "1", "rollback")], "1", []),
        ([(None, "1"), ("1", "2"), ("2", "3"), ("3", "2", "rollback")], "2", ["1"]),
        ([(None, "1"), ("1", "2"), ("2", "1", "rollback"), ("1", "3")], "3", ["1"]),  # not 2, which was gone back from
        ([(None, "1"), ("1", "2"), ("2", "1")], "1", ["2"]),  # promoted again: its predecessor is 2
        ([(None, "1"), ("7", "2")], "2", ["7", "1"]),  # 7 got the alias on MLflow's page
        ([(None, "1"), ("1", "2")], "9", ["2", "1"]),  # 9 has it from there now
        ([(None, "1"), ("1", "2")], None, ["2", "1"]),  # and here it was removed
    ],
)
def test_a_rollback_goes_through_those_who_held_the_alias_before(moves, current, before):
    events = [done(number, *move) for number, move in enumerate(moves, start=1)]
    assert alias_trail.held_before(events, "champion", current) == before


def test_other_aliases_and_unfinished_moves_do_not_count():
    events = [done(1, None, "1"), replace(done(2, "1", "2"), alias="challenger"),
              replace(done(3, "1", "4"), state="interrupted"), replace(done(4, "1", "5"), state="moving"),
              done(5, "1", "3")]  # fmt: skip
    assert alias_trail.held_before(events, "champion", "3") == ["1"]


# --- what a tag holds ---


def test_an_event_fits_into_a_tag_and_says_what_it_leaves_out():
    short = done(1, None, "1", gate={"passed": True, "reasons": ["all hold"], "report": "runs:/r/promotion/1.json"})
    assert json.loads(short.to_json())["gate"] == short.gate
    reasons = [f"rule {index}: " + "ä" * 1000 for index in range(40)]
    long = replace(short, why="w" * 500, gate={"passed": False, "reasons": reasons, "report": "runs:/r/1.json"})
    text = long.to_json()
    assert 4000 < len(text) <= 4500  # MLflow's column of registered_model_tags.value is String(5000)
    gate = json.loads(text)["gate"]
    assert gate["left_out"] + len(gate["reasons"]) == 40
    assert gate["report"] == "runs:/r/1.json" and gate["passed"] is False
    assert gate["reasons"][0].startswith("rule 0: ää") and gate["reasons"][0].endswith(" ...")
    assert json.loads(text)["why"] == long.why
    with pytest.raises(DQOError, match="the reason has 501 characters; expected at most 500"):
        alias_trail.new("champion", "promote", "w" * 501)


# --- on a store ---


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracking.default_uri(tmp_path_factory.mktemp("store"))


@pytest.fixture
def client(uri: str) -> mlflow.MlflowClient:
    tracking.connect(parse("name: a\ntracking: {experiment: trail}"), uri)
    return mlflow.MlflowClient()


def model_with(client: mlflow.MlflowClient, name: str, versions: int) -> str:
    client.create_registered_model(name)
    for _ in range(versions):
        client.create_model_version(name, "file:///nowhere")
    return name


def put(client: mlflow.MlflowClient, name: str, event: Event) -> Event:
    client.set_registered_model_tag(name, alias_trail.PREFIX + event.id, event.to_json())
    return event


def to(version: str):
    return lambda *_: version


def trail(client: mlflow.MlflowClient, name: str) -> list[Event]:
    return alias_trail.read(client.get_registered_model(name))


def test_a_move_leaves_who_when_from_where_and_why(client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch):
    name = model_with(client, "told", 2)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    before = time.time()
    first = alias_trail.move(client, name, alias_trail.new("champion", "promote", "it is better"), to("1"))
    second = alias_trail.move(client, name, alias_trail.new("champion", "promote"), to("2"))
    assert trail(client, name) == [first.event, second.event]
    assert [(e.number, e.origin, e.version, e.state, e.by) for e in trail(client, name)] == [
        (1, None, "1", "done", "ada"), (2, "1", "2", "done", "ada"),
    ]  # fmt: skip
    assert first.event.why == "it is better"
    assert abs(time.mktime(time.strptime(first.event.at, "%Y-%m-%dT%H:%M:%SZ")) - time.timezone - before) < 60
    tags = client.get_model_version(name, "2").tags
    assert tags == {"promoted_at": second.event.at, "promoted_by": "ada", "promoted_how": "promote",
                    "previous_champion": "1"}  # fmt: skip
    # A version that comes back says how it did this time, with nothing of the time before.
    back = alias_trail.move(client, name, alias_trail.new("champion", "rollback"), to("1"))
    assert client.get_model_version(name, "1").tags == {
        "promoted_at": back.event.at, "promoted_by": "ada", "promoted_how": "rollback", "previous_champion": "2",
    }  # fmt: skip
    report = {"passed": False, "report": "runs:/r/promotion/e.json"}
    forced = alias_trail.new("champion", "promote", "to be sure", True, report)
    forced = alias_trail.move(client, name, forced, to("2")).event
    assert client.get_model_version(name, "2").tags == {
        "promoted_at": forced.at, "promoted_by": "ada", "promoted_how": "promote", "promoted_by_force": "true",
        "promoted_why": "to be sure", "promoted_report": "runs:/r/promotion/e.json", "previous_champion": "1",
    }  # fmt: skip
    # Where the alias is already there is nothing to tell.
    assert alias_trail.move(client, name, alias_trail.new("champion", "promote"), to("2")).event is None
    assert len(trail(client, name)) == 4


def test_what_cannot_be_decided_leaves_nothing(client: mlflow.MlflowClient):
    name = model_with(client, "undecided", 1)

    def refuse(*_: object) -> str:
        raise DQOError("no")

    with pytest.raises(DQOError, match=r"^no$"):
        alias_trail.move(client, name, alias_trail.new("champion", "promote"), refuse)
    with pytest.raises(DQOError, match=r"could not move the alias 'champion' of 'undecided': .*version=7\) not found"):
        alias_trail.move(client, name, alias_trail.new("champion", "promote"), to("7"))
    assert client.get_registered_model(name).aliases == {}
    (left,) = trail(client, name)  # it had said that it was about to
    assert (left.state, left.version) == ("moving", "7")
    (ended,) = alias_trail.repair(client, name, patience=0.1)
    assert (ended.state, trail(client, name)) == ("interrupted", [ended])


def test_tags_edited_by_hand_do_not_stand_in_the_way(client: mlflow.MlflowClient):
    name = model_with(client, "edited", 1)
    for key, value in {"dqo.alias.x": "{", "dqo.alias.y": "[]", "dqo.alias.z": '{"id": "z"}', "owner": "me"}.items():
        client.set_registered_model_tag(name, key, value)
    assert alias_trail.move(client, name, alias_trail.new("champion", "promote"), to("1")).event.number == 1
    assert len(trail(client, name)) == 1


@pytest.mark.parametrize(("alias_moved", "state"), [(True, "done"), (False, "interrupted")])
def test_a_move_that_died_is_repaired_by_the_next_one(client: mlflow.MlflowClient, alias_moved: bool, state: str):
    name = model_with(client, f"died-{state}", 3)
    alias_trail.move(client, name, alias_trail.new("champion", "promote"), to("1"))
    dead = put(client, name, replace(alias_trail.new("champion", "promote", "mine"), state="moving", version="2",
                                     origin="1", number=2))  # fmt: skip
    if alias_moved:
        client.set_registered_model_alias(name, "champion", "2")
    waited: list[Event] = []
    begun = time.monotonic()
    moved = alias_trail.move(client, name, alias_trail.new("champion", "promote"), to("3"), 1.0, waited.append)
    assert time.monotonic() - begun > 1.0 and waited == [dead]
    (ended,) = moved.repaired
    assert (ended.id, ended.state, ended.why) == (dead.id, state, "mine") and ended.repaired
    assert moved.event.origin == ("2" if alias_moved else "1") and moved.event.number == 3
    assert trail(client, name)[1:] == [ended, moved.event]
    assert ("promoted_at" in client.get_model_version(name, "2").tags) is alias_moved


def test_the_dead_in_the_queue_are_passed_and_the_living_are_waited_for(client: mlflow.MlflowClient):
    name = model_with(client, "queue", 2)
    put(client, name, alias_trail.new("champion", "promote"))  # died before it had a number
    put(client, name, replace(alias_trail.new("champion", "promote"), number=1))  # and while it waited
    alive = put(client, name, replace(alias_trail.new("champion", "promote"), number=2))
    stop, beaten = threading.Event(), []

    def beat() -> None:
        for count in range(1, 7):
            time.sleep(0.4)
            put(client, name, replace(alive, beat=count))
        beaten.append(time.monotonic())
        put(client, name, replace(alive, state="interrupted"))
        stop.set()

    thread = threading.Thread(target=beat)
    thread.start()
    moved = alias_trail.move(client, name, alias_trail.new("champion", "promote"), to("1"), patience=1.5)
    thread.join()
    assert stop.is_set() and beaten[0] <= time.monotonic()
    assert len(moved.repaired) == 2 and alive.id not in {event.id for event in moved.repaired}
    assert {event.state for event in trail(client, name)[:-1]} == {"interrupted"}


def test_many_at_once_wait_for_each_other_and_all_are_told(client: mlflow.MlflowClient):
    name = model_with(client, "crowd", 6)
    failures: list[BaseException] = []
    moves = [str(version) for version in (1, 2, 3, 4, 5, 6) for _ in range(2)]
    random.Random(0).shuffle(moves)

    def go(mine: list[str]) -> None:
        try:
            for version in mine:
                event = alias_trail.new("champion", "promote", f"version {version}")
                alias_trail.move(mlflow.MlflowClient(), name, event, to(version))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=go, args=(moves[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    events = trail(client, name)
    assert all(event.state == "done" and event.repaired == "" for event in events)
    # Each began where the one before had ended: no two were inside at once.
    assert [event.origin for event in events] == [None, *(event.version for event in events[:-1])]
    assert str(client.get_registered_model(name).aliases["champion"]) == events[-1].version
    told = [event.why for event in events]
    left_out = len(moves) - len(told)  # a version that was there already moves nothing
    assert set(told) == {f"version {version}" for version in moves} and left_out <= 6


def test_who_it_was_has_a_name_even_where_the_user_has_none(uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    tracking.connect(parse("name: a\ntracking: {experiment: trail}"), uri)
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 10001")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert alias_trail.whoami().startswith("uid ")
    monkeypatch.setattr("getpass.getuser", lambda: "eve")
    assert alias_trail.whoami().startswith("eve@")
