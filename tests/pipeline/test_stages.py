"""Stages by themselves: interrupted where a whole pipeline can hardly be stopped on purpose, and each on its own."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import write_recipe

from dqo import tracking
from dqo.recipe import load
from dqo.stages import evaluate, prepare, register, rl, sft
from dqo.stages.context import Context


def test_an_upload_that_failed_after_the_last_step_trains_no_further(tiny_policy, tiny_encoder, tmp_path, monkeypatch):
    """The repeat takes the weights of the newest checkpoint, which is that of the last step, as they are."""
    recipe = load(write_recipe(tmp_path / "r.yaml", tiny_policy, tiny_encoder, sft={"steps": 3, "prompts_per_step": 4}))
    context = Context(recipe, tmp_path / "workspace", tracking.default_uri(tmp_path))
    prepare.run(context, tmp_path / "data")
    context = Context.after_prepare(recipe, context.workspace, context.mlflow_uri, tmp_path / "data")

    def refuse(self, path: Path, artifact_path: str) -> None:
        raise ConnectionError("the artifact store does not answer")

    with monkeypatch.context() as patched, pytest.raises(ConnectionError):
        patched.setattr(tracking.Run, "folder", refuse)
        sft.run(context, tmp_path / "data", tmp_path / "sft")
    (checkpoint,) = context.workspace.glob("stages/sft-*/checkpoints/checkpoint-3")
    trained = load_file(checkpoint / "adapter_model.safetensors")
    sft.run(context, tmp_path / "data", tmp_path / "sft")
    got = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert got.keys() == trained.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in trained.items())
    history = [json.loads(line) for line in (tmp_path / "sft" / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [1, 2, 3]


def test_stages_need_nothing_of_each_others_workspace(tiny_policy, tiny_encoder, tmp_path):
    """Tasks of a cluster without a claim: each pod has a folder of its own, which goes with it."""
    recipe = load(write_recipe(tmp_path / "r.yaml", tiny_policy, tiny_encoder, sft={"steps": 1}, rl={"steps": 2}))
    data, trained, evaluation = tmp_path / "data", tmp_path / "sft", tmp_path / "evaluation"
    variants = [tmp_path / variant for variant in recipe.variants]
    workspace = tmp_path / "workspace"

    def context() -> Context:
        shutil.rmtree(workspace, ignore_errors=True)
        return Context.after_prepare(recipe, workspace, tracking.default_uri(tmp_path), data)

    prepare.run(Context(recipe, workspace, tracking.default_uri(tmp_path)), data)
    sft.run(context(), data, trained)
    for variant, folder in zip(recipe.variants, variants, strict=True):
        rl.run(context(), variant, data, trained, folder)
    evaluate.run(context(), data, [trained, *variants], evaluation)
    register.run(context(), variants, evaluation, tmp_path / "registration.json")
    assert [path.name.rpartition("-")[0] for path in (workspace / "stages").iterdir()] == ["register"]
    assert json.loads((tmp_path / "registration.json").read_text())["version"] == "1"
    # One run of MLflow holds them all, and is over.
    client = mlflow.MlflowClient(tracking.default_uri(tmp_path))
    run_id = json.loads((data / "pipeline.json").read_text())["mlflow_run_id"]
    parent = client.get_run(run_id)
    assert parent.info.status == "FINISHED"
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert {child.data.tags["mlflow.runName"] for child in children} >= {"sft", "rl-reward_only", "rl-dqo", "evaluate"}
    assert {child.info.status for child in children} == {"FINISHED"}


def test_a_context_without_an_address_takes_the_environments(monkeypatch, tmp_path):
    recipe = load(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert Context(recipe, tmp_path, "").mlflow_uri == "http://mlflow:5000"
    assert Context(recipe, tmp_path, "http://other:5000").mlflow_uri == "http://other:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert Context(recipe, tmp_path, "").mlflow_uri == ""
