"""Promotion, force, rollback, repair and several at once, on MLflow with sqlite and on a server with passwords."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from registry_store import BAD, GOOD, Registry
from services.servers import SECRET, Server, act_as

from dqo import alias_trail, promotion, registry, tracking
from dqo.errors import DQOError
from dqo.recipe import Recipe

ROOT = Path(__file__).parents[2]
MOVES = """\
import sys
import mlflow
from dqo import alias_trail, tracking
uri, name, *versions = sys.argv[1:]
client = tracking.client_of(uri, "moved")
for version in versions:
    event = alias_trail.new("champion", "promote", f"version {version}")
    alias_trail.move(client, name, event, lambda *_: version)
"""


@pytest.fixture
def models(mlflow_uri: str, recipe: Recipe, request: pytest.FixtureRequest) -> Registry:
    return Registry(mlflow_uri, tracking.connect(recipe, mlflow_uri), f"model-{request.node.originalname}"[:200])


def test_a_version_is_promoted_refused_forced_and_rolled_back(models: Registry):
    for evaluation in (GOOD, BAD, GOOD, None):
        models.version(evaluation)
    client, name = models.client, models.name
    assert promotion.promote(client, name, "1").moved.event.origin is None
    refused = promotion.promote(client, name, "2")
    assert not refused.gate.passed and refused.moved is None and models.aliases == {"champion": "1"}
    assert promotion.promote(client, name, "3").moved.event.origin == "1"
    assert promotion.promote(client, name, "2", force="asked for").moved.event.forced
    with pytest.raises(DQOError, match="it has not been evaluated"):
        promotion.promote(client, name, "4")
    with pytest.raises(DQOError, match=f"{name} has no version '9'; its versions are: 1, 2, 3, 4"):
        promotion.promote(client, name, "9")
    with pytest.raises(DQOError, match="MLflow knows no registered model 'no-such'"):
        promotion.promote(client, "no-such", "1")
    assert models.aliases == {"champion": "2"}
    assert promotion.rollback(client, name, "a mistake").event.version == "3"
    assert promotion.rollback(client, name).event.version == "1"
    assert models.aliases == {"champion": "1"}
    trail = models.trail
    assert [(e["action"], e["origin"], e["version"], e["forced"]) for e in trail] == [
        ("promote", None, "1", False), ("promote", "1", "3", False), ("promote", "3", "2", True),
        ("rollback", "2", "3", False), ("rollback", "3", "1", False),
    ]  # fmt: skip
    assert [e["number"] for e in trail] == [1, 2, 3, 4, 5] and {e["state"] for e in trail} == {"done"}
    who = os.environ.get("MLFLOW_TRACKING_USERNAME", "@")
    assert all(who in e["by"] for e in trail)
    assert models.report(trail[2])["gate"]["reasons"] == trail[2]["gate"]["reasons"]
    assert client.get_model_version(name, "2").tags["promoted_why"] == "asked for"


def test_the_longest_report_fits_and_is_whole_in_its_artifact(models: Registry, monkeypatch: pytest.MonkeyPatch):
    """A tag that is too long fails on PostgreSQL alone: sqlite does not look at the length of a column."""
    version = models.version(GOOD)
    long = registry.GateResult(True, [f"rule {index}: {'ä' * 2000}" for index in range(30)])
    monkeypatch.setattr(promotion, "decide", lambda *_: long)  # no gate of today says as much
    promotion.promote(models.client, models.name, version, force="w" * 500)
    (event,) = models.trail
    assert event["state"] == "done" and event["gate"]["left_out"] > 0 and event["why"] == "w" * 500
    assert models.report(event)["gate"]["reasons"] == long.reasons


def test_a_promotion_that_died_after_the_alias_was_moved_is_confirmed(models: Registry):
    for _ in range(2):
        models.version(GOOD)
    dead = replace(alias_trail.new("champion", "promote"), state="moving", version="1", number=1)
    models.client.set_registered_model_tag(models.name, alias_trail.PREFIX + dead.id, dead.to_json())
    models.client.set_registered_model_alias(models.name, "champion", "1")
    done = promotion.promote(models.client, models.name, "2", patience=1.0)
    assert [event.id for event in done.moved.repaired] == [dead.id]
    assert [(e["origin"], e["version"], e["state"]) for e in models.trail] == [(None, "1", "done"), ("1", "2", "done")]
    assert promotion.rollback(models.client, models.name).event.version == "1"


def test_processes_that_promote_at_once_lose_nothing(models: Registry, mlflow_uri: str):
    for _ in range(6):
        models.client.create_model_version(models.name, "s3://nowhere/model")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([sys.executable, "-c", MOVES, mlflow_uri, models.name, *versions], env=environment,
                         stderr=subprocess.PIPE, text=True)
        for versions in (("1", "2"), ("3", "4"), ("5", "6"))
    ]  # fmt: skip
    errors = [process.communicate(timeout=600)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], errors
    trail = models.trail
    assert sorted(event["why"] for event in trail) == [f"version {version}" for version in range(1, 7)]
    assert [event["number"] for event in trail] == sorted(event["number"] for event in trail)
    ordered = alias_trail.read(models.client.get_registered_model(models.name))
    assert [event.origin for event in ordered] == [None, *(event.version for event in ordered[:-1])]
    assert {event.state for event in ordered} == {"done"} and models.aliases == {"champion": ordered[-1].version}


def test_figures_of_an_evaluation_stand_on_the_logged_model_with_their_data(models: Registry):
    run = models.run("evaluate")
    logged = models.client.create_logged_model(models.experiment, "figures", run)
    figures = {
        "quality": {"mean": 0.9, "low": 0.88, "high": 0.92},
        "best_of_n": {"mean": None, "low": None, "high": None},
    }
    registry.attach_metrics(f"models:/{logged.model_id}", run, figures, "story", "d" * 64)
    found = {metric.key: metric for metric in models.client.get_logged_model(logged.model_id).metrics}
    assert {key: metric.value for key, metric in found.items()} == {
        "eval/quality": 0.9, "eval/quality_low": 0.88, "eval/quality_high": 0.92,
    }  # fmt: skip
    assert {(m.dataset_name, m.dataset_digest, m.run_id) for m in found.values()} == {("story", "d" * 36, run)}


def test_a_name_that_another_program_or_a_prompt_has_is_refused(models: Registry):
    models.client.create_model_version(models.name, "s3://elsewhere/model")
    with pytest.raises(DQOError, match="taken in MLflow by models of another program"):
        registry.claim(models.client, models.name)
    mlflow.genai.register_prompt(name=f"{models.name}-prompt", template="Hello {{name}}")
    with pytest.raises(DQOError, match="taken in MLflow by a prompt"):
        registry.claim(models.client, f"{models.name}-prompt")


# --- what the server refuses ---


def test_an_artifact_store_that_takes_no_files_promotes_nothing(
    administrator: Server, recipe: Recipe, request: pytest.FixtureRequest
):
    models = Registry(administrator.uri, tracking.connect(recipe, administrator.uri), "read-only-store")
    version = models.version(GOOD)
    request.getfixturevalue("read_only_s3")
    with pytest.raises(DQOError, match=r"could not write 'promotion/.*\.json': the artifact store"):
        promotion.promote(models.client, models.name, version)
    assert models.aliases == {} and models.trail == []
    # Nothing has to be written where there is no report.
    assert promotion.promote(models.client, models.name, models_without_evaluation(models), force="by hand").moved


def models_without_evaluation(models: Registry) -> str:
    return str(models.client.create_model_version(models.name, "s3://elsewhere/model").version)


def test_a_user_who_may_only_read_is_told_so(
    administrator: Server, user: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
):
    models = Registry(administrator.uri, tracking.connect(recipe, administrator.uri), "read-only-user")
    version = models.version(GOOD)
    act_as(monkeypatch, user, SECRET)
    with pytest.raises(DQOError, match=f"it does not allow this to the user '{user}'") as caught:
        promotion.promote(models.client, models.name, version)
    assert SECRET not in str(caught.value)
    with pytest.raises(DQOError, match=f"move the alias 'champion' .* does not allow this to the user '{user}'"):
        promotion.rollback(models.client, models.name)
    act_as(monkeypatch, *administrator.credentials.values())
    assert models.aliases == {} and models.trail == []
