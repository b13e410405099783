"""Evaluations with known values, as the stage `evaluate` writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np

from dqo import tracking
from dqo.evaluation.catalogue import METRICS

RECIPE = """\
task: story
reward: {model: null}
encoder: {model: an-encoder}
evaluation: {sampling: {temperature: 1.0}}
"""


def evaluation(
    models: Mapping[str, float], prompts: Sequence[str], n: int = 4, seed: int = 0, **shared: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An evaluation whose diversity metrics are all shifted by a number a model, over shared noise of the prompts.

    Returns:
        The contents of `evaluation.json`, and the rows of `responses.jsonl`.
    """
    document: dict[str, Any] = {
        "models": {}, "n": n, "prompts": len(prompts), "confidence": 0.95, "data_digest": "d" * 64,
        "recipe_digest": "r" * 12, "gate": {"passed": True, "reasons": []},
    } | shared  # fmt: skip
    rows = []
    for name, shift in models.items():
        noise = np.random.default_rng(seed)
        own = np.random.default_rng(seed + len(name))
        per_prompt = {
            metric: (noise.normal(0.5, 0.2, len(prompts)) + shift + own.normal(0, 0.02, len(prompts))).tolist()
            for metric in METRICS
        }
        qualities = own.uniform(0.0, 1.0, (len(prompts), n)).round(2)
        per_prompt["quality"] = qualities.mean(axis=1).tolist()
        per_prompt["log_volume"] = [1.6 + value for value in per_prompt["log_volume"]]  # within its bounds for n = 4
        per_prompt["best_of_n"] = qualities.max(axis=1).tolist()
        document["models"][name] = {"metrics": {}, "per_prompt": per_prompt}
        rows += [
            {
                "id": key, "prompt": f"Write about {key}.", "model": name,
                "responses": [f"{name} says {'very ' * count}much of {key}" for count in own.integers(0, 5, n)],
                "qualities": quality.tolist(), "truncated": [False] * n, "tokens": [5] * n,
            }
            for key, quality in zip(prompts, qualities, strict=True)
        ]  # fmt: skip
    return document, rows


def write(
    folder: Path, document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], recipe: str | None = RECIPE
) -> Path:
    """Write the files of an evaluation; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return folder


class Store:
    """MLflow as `dqo run` leaves it, with two evaluated pipeline runs and one that has not been evaluated.

    Args:
        out: Folder for the evaluations, and for MLflow where no server is named.
        prompts: Ids of the prompts of the first run; the second one answered all but the first five.
        uri: A server.
        models: Name of the registered model whose versions 1 and 2 are the two runs'; version 3 is nobody's.
    """

    def __init__(self, out: Path, prompts: Sequence[str], uri: str | None = None, models: str = "stories") -> None:
        self.out, self.uri, self.models = out, uri or tracking.default_uri(out), models
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        self.client = mlflow.MlflowClient()
        location = None if uri else (out / "mlflow-artifacts").as_uri()
        self.experiment = self.client.create_experiment(f"{models} tests", artifact_location=location)
        self.runs: dict[str, str] = {}
        self.pipeline("first", {"base": -0.3, "sft": -0.1, "reward_only": 0.0, "dqo": 0.3}, prompts)
        self.pipeline("second", {"base": -0.3, "sft": -0.1, "dqo": 0.5}, prompts[5:])
        self.run("unfinished", "pipeline", None, name="unfinished")
        self.run("unfinished sft", "sft", self.runs["unfinished"], name="sft")
        self.run("grid", "experiment", None, name="a grid")
        self.client.create_registered_model(models)
        self.version(self.runs["first rl-dqo"], {})
        self.version(None, {"dqo.pipeline_mlflow_run": self.runs["second"]})
        self.version(None, {})
        self.client.set_registered_model_alias(models, "champion", "1")

    def run(self, key: str, stage: str, parent: str | None, name: str) -> str:
        tags = {tracking.STAGE_TAG: stage, "dqo.name": name} | ({tracking.PARENT_TAG: parent} if parent else {})
        run_id = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        self.client.set_terminated(run_id)
        self.runs[key] = run_id
        return run_id

    def pipeline(self, name: str, shifts: dict[str, float], prompts: Sequence[str]) -> None:
        parent = self.run(name, "pipeline", None, name=name)
        self.client.log_text(parent, RECIPE, "recipe.yaml")
        self.run(f"{name} sft", "sft", parent, name="sft")
        for variant in set(shifts) - {"base", "sft"}:
            self.run(f"{name} rl-{variant}", "rl", parent, name=f"rl-{variant}")
        self.run(f"{name} base", "model", parent, name="base")
        evaluate = self.run(f"{name} evaluate", "evaluate", parent, name="evaluate")
        folder = write(self.out / f"{name}-0123", *evaluation(shifts, prompts))
        result = {"mlflow_uri": self.uri, "mlflow_experiment": self.experiment, "mlflow_run": parent}
        (folder / "result.json").write_text(json.dumps(result))
        for file in ("evaluation.json", "responses.jsonl"):
            self.client.log_artifact(evaluate, str(folder / file), "evaluation")

    def version(self, run_id: str | None, tags: dict[str, str]) -> None:
        self.client.create_model_version(self.models, "s3://nowhere/model", run_id, tags=tags)

    def comparisons(self) -> list[mlflow.entities.Run]:
        return self.client.search_runs([self.experiment], "tags.`dqo.stage` = 'compare'")
