"""Registered models as the stages leave them, without training anything: for tests of the registry on both stores."""

import json
import tempfile
from pathlib import Path
from typing import Any

import mlflow

from dqo import tracking

GATED = "name: gated\ngate: {against: reward_only, max_quality_loss: 0.05, more_diverse_on: [log_volume]}\n"


def interval(mean: float, width: float = 0.02) -> dict[str, float]:
    return {"mean": mean, "low": mean - width, "high": mean + width}


def gated_evaluation(quality: float, log_volume: float, **shared: Any) -> dict[str, Any]:
    """An evaluation whose baseline has quality 0.9 and log-volume 4, all intervals being 0.02 wide either way."""
    models = {"reward_only": (0.9, 4.0), "dqo": (quality, log_volume)}
    return {
        "models": {
            name: {"metrics": {"quality": interval(values[0]), "log_volume": interval(values[1])}, "per_prompt": {}}
            for name, values in models.items()
        },
        "n": 8, "prompts": 48, "confidence": 0.95, "data_digest": "d" * 64, "recipe_digest": "r" * 12,
        "gate": {"passed": True, "reasons": []},
    } | shared  # fmt: skip


GOOD, BAD = gated_evaluation(0.88, 5.0), gated_evaluation(0.7, 5.0)


class Registry:
    """Pipelines' runs with an evaluation each, and the versions made of them, of one registered model."""

    def __init__(self, uri: str, experiment: str, name: str) -> None:
        self.client, self.experiment, self.name = mlflow.MlflowClient(uri, uri), experiment, name
        self.client.create_registered_model(name)

    def run(self, stage: str, parent: str | None = None, name: str = "") -> str:
        tags = {tracking.STAGE_TAG: stage, "dqo.name": name} | ({tracking.PARENT_TAG: parent} if parent else {})
        run_id: str = self.client.create_run(self.experiment, run_name=name or stage, tags=tags).info.run_id
        self.client.set_terminated(run_id)
        return run_id

    def version(self, evaluation: dict[str, Any] | None, recipe: str = GATED, **tags: str) -> str:
        """Make a version of a pipeline of its own; `None` leaves it without an evaluation. Returns its number."""
        parent = self.run("pipeline", name="pipeline")
        self.client.log_text(parent, recipe, "recipe.yaml")
        trained = self.run("rl", parent, "rl-dqo")
        if evaluation is not None:
            self.evaluation_run = self.run("evaluate", parent, "evaluate")
            self.client.log_text(self.evaluation_run, json.dumps(evaluation), "evaluation/evaluation.json")
        made = self.client.create_model_version(
            self.name, "s3://nowhere/model", trained, tags={tracking.KEY_TAG: trained, **tags}
        )
        return str(made.version)

    @property
    def aliases(self) -> dict[str, str]:
        held = self.client.get_registered_model(self.name).aliases
        return {alias: str(version) for alias, version in held.items()}

    @property
    def trail(self) -> list[dict[str, Any]]:
        """The tags of the trail, as anyone may read them."""
        tags = self.client.get_registered_model(self.name).tags
        events = [json.loads(value) for key, value in tags.items() if key.startswith("dqo.alias.")]
        return sorted(events, key=lambda event: event["number"])

    def report(self, event: dict[str, Any]) -> dict[str, Any]:
        """The gate's whole report that an event names."""
        with tempfile.TemporaryDirectory() as folder:
            path = mlflow.artifacts.download_artifacts(event["gate"]["report"], dst_path=folder)
            return json.loads(Path(path).read_text(encoding="utf-8"))
