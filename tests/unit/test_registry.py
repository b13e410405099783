"""Versions, aliases and loading on a real sqlite MLflow with a tiny checkpoint."""

import json
from pathlib import Path

import mlflow
import pandas
import pytest
import torch

from dqo import registry, tracking
from dqo.checkpoint import CheckpointCard
from dqo.gate import GateResult
from dqo.policy import trainable
from dqo.recipe import Lora, Policy, parse

PASSED, FAILED = GateResult(True, ["all rules hold"]), GateResult(False, ["less diverse"])


def test_the_gate_of_an_evaluation_folder_is_read_back(tmp_path: Path):
    result = GateResult(False, ["one rule holds", "another does not"])
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"gate": {"passed": result.passed, "reasons": result.reasons}, "models": {}})
    )
    assert registry.read_gate(tmp_path / "evaluation.json") == result


# --- versions and aliases ---


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of its own for this file: making its tables takes seconds."""
    store = tmp_path_factory.mktemp("store")
    return tracking.connect(parse("name: a\ntracking: {experiment: registry}"), tracking.default_uri(store))


@pytest.fixture
def client(experiment: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient()


@pytest.fixture
def new_run(client: mlflow.MlflowClient, experiment: str):
    return lambda: client.create_run(experiment).info.run_id


def register(name: str, run_id: str, key: str, result: GateResult, quality: float = 0.5) -> tuple[str, list[str]]:
    tags = {"dqo.stage_key": key, "dqo.alpha": 1.0}
    return registry.register(name, run_id, f"runs:/{run_id}/{name}", tags, {"quality": quality}, result)


def test_a_passed_gate_makes_a_challenger_and_a_champion(client: mlflow.MlflowClient, new_run):
    run = new_run()
    assert register("passed", run, "k1", PASSED, 0.51239) == ("1", ["challenger", "champion"])
    version = client.get_model_version_by_alias("passed", "champion")
    assert (str(version.version), version.run_id) == ("1", run)
    assert version.tags["eval.quality"] == "0.5124"
    assert version.tags["gate.passed"] == "true"
    assert version.tags["gate.reasons"] == "all rules hold"
    assert version.tags["dqo.alpha"] == "1.0"
    assert "promoted_at" in version.tags and "previous_champion" not in version.tags


def test_a_failed_gate_makes_a_challenger_only(client: mlflow.MlflowClient, new_run):
    assert register("failed", new_run(), "k1", FAILED) == ("1", ["challenger"])
    assert client.get_registered_model("failed").aliases.keys() == {"challenger"}
    tags = client.get_model_version("failed", "1").tags
    assert tags["gate.passed"] == "false" and "promoted_at" not in tags


def test_a_failed_gate_leaves_the_champion_where_it_is(client: mlflow.MlflowClient, new_run):
    register("kept", new_run(), "k1", PASSED)
    assert register("kept", new_run(), "k2", FAILED) == ("2", ["challenger"])
    aliases = {alias: str(version) for alias, version in client.get_registered_model("kept").aliases.items()}
    assert aliases == {"champion": "1", "challenger": "2"}


def test_a_new_champion_remembers_the_one_before(client: mlflow.MlflowClient, new_run):
    register("succession", new_run(), "k1", PASSED)
    run = new_run()
    assert register("succession", run, "k2", PASSED) == ("2", ["challenger", "champion"])
    assert client.get_model_version("succession", "2").tags["previous_champion"] == "1"
    # A repeated call must not name the champion as its own predecessor.
    assert register("succession", run, "k2", PASSED) == ("2", ["challenger", "champion"])
    assert client.get_model_version("succession", "2").tags["previous_champion"] == "1"


def test_a_second_call_reuses_the_version_of_the_same_checkpoint_and_run(client: mlflow.MlflowClient, new_run):
    run = new_run()
    first = register("again", run, "k1", FAILED, 0.4)
    assert register("again", run, "k1", FAILED, 0.6) == first
    assert len(client.search_model_versions("name = 'again'")) == 1
    assert client.get_model_version("again", "1").tags["eval.quality"] == "0.6000"
    assert register("again", run, "k2", FAILED)[0] == "2"
    assert register("again", new_run(), "k1", FAILED)[0] == "3"


# --- loading ---


@pytest.mark.slow
def test_a_registered_checkpoint_generates_groups(
    client: mlflow.MlflowClient, new_run, tiny_policy: Path, tmp_path: Path
):
    run, checkpoint = new_run(), tmp_path / "checkpoint"
    policy = Policy(model=str(tiny_policy), lora=Lora(r=2, alpha=4))
    torch.manual_seed(0)
    adapted = trainable(policy, torch.device("cpu"), None)
    adapted.save_pretrained(checkpoint)
    CheckpointCard("dqo", "adapter", str(tiny_policy), None, "key", "data", "recipe", None, 1, run).write(checkpoint)
    uri = registry.log_model(run, checkpoint, "tiny")
    registry.register("tiny", run, uri, {"dqo.stage_key": "key"}, {}, FAILED)

    model = registry.load("tiny@challenger")
    assert model.metadata.run_id == run
    assert model.metadata.metadata["base_model"] == str(tiny_policy)
    prompts = pandas.DataFrame({"prompt": ["Write about rain.", "Write about a dog."]})
    params = {"n": 3, "max_new_tokens": 8, "seed": 5}
    groups = model.predict(prompts, params=params)
    assert [len(group) for group in groups] == [3, 3]
    assert all(isinstance(response, str) for group in groups for response in group)
    assert len({response for group in groups for response in group}) > 1
    assert model.predict(prompts, params=params) == groups
    assert model.predict(prompts, params=params | {"seed": 6}) != groups
    assert registry.load("tiny/1").predict(prompts, params=params) == groups
    assert registry.load("models:/tiny@challenger").predict(prompts, params=params) == groups
    assert len(model.predict(prompts[:1])[0]) == 8  # the signature's default
