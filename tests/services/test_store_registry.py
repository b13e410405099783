"""A tiny model on its way through MLflow's registry: logged, registered, aliases, loaded again, on both stores."""

from pathlib import Path

import mlflow
import pandas
import pytest
import torch

from dqo import registry, tracking
from dqo.checkpoint import CheckpointCard
from dqo.policy import trainable
from dqo.recipe import Lora, Policy, parse

PASSED = registry.GateResult(True, ["quality is within the allowed loss", "log volume: higher, intervals apart"])
FAILED = registry.GateResult(False, ["quality is below the allowed loss"])
PARAMS = {"n": 3, "max_new_tokens": 8, "seed": 5}


@pytest.fixture
def run_id(mlflow_uri: str) -> str:
    experiment = tracking.connect(parse("name: a\ntracking: {experiment: registry}"), mlflow_uri)
    return mlflow.MlflowClient().create_run(experiment).info.run_id


def write_checkpoint(folder: Path, base: Path, run_id: str) -> Path:
    """An adapter whose weights are not zero, so that a lost adapter shows in what the model says."""
    torch.manual_seed(0)
    adapted = trainable(Policy(model=str(base), lora=Lora(r=2, alpha=64)), torch.device("cpu"), None)
    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(weights, std=0.5)
    adapted.save_pretrained(folder)
    CheckpointCard("dqo", "adapter", str(base), None, "key", "data", "recipe", None, 1, run_id).write(folder)
    return folder


def register(name: str, run_id: str, uri: str, key: str, gate: registry.GateResult) -> tuple[str, list[str]]:
    return registry.register(name, run_id, uri, {"dqo.stage_key": key}, {"log_volume": -4.25}, gate)


def test_a_model_is_registered_found_by_its_aliases_and_speaks_as_before(
    run_id: str, tiny_policy: Path, tmp_path: Path
):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_policy, run_id)
    uri = registry.log_model(run_id, checkpoint, "spoken")
    assert register("spoken", run_id, uri, "k1", PASSED) == ("1", ["challenger", "champion"])
    assert register("spoken", run_id, uri, "k1", PASSED) == ("1", ["challenger", "champion"])  # a repeated stage
    assert register("spoken", run_id, uri, "k2", FAILED) == ("2", ["challenger"])

    client = mlflow.MlflowClient()
    aliases = {alias: str(version) for alias, version in client.get_registered_model("spoken").aliases.items()}
    assert aliases == {"challenger": "2", "champion": "1"}
    tags = client.get_model_version("spoken", "1").tags
    assert tags["eval.log_volume"] == "-4.2500"
    assert tags["gate.passed"] == "true" and tags["gate.reasons"].splitlines() == PASSED.reasons

    # What the checkpoint says without MLflow between is what the registered model has to say.
    from types import SimpleNamespace

    prompts = pandas.DataFrame({"prompt": ["Write about rain.", "Write about a dog."]})
    loaded = registry.load("spoken@champion")
    spoken = loaded.predict(prompts, params=PARAMS)
    assert [len(group) for group in spoken] == [3, 3]
    from dqo.serving import ResponseGroups

    direct = ResponseGroups()
    direct.load_context(SimpleNamespace(artifacts={"checkpoint": str(checkpoint)}))
    assert direct.predict(None, prompts, PARAMS) == spoken
