"""A stage by itself, interrupted where a whole pipeline can hardly be stopped on purpose."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import write_recipe

from dqo import tracking
from dqo.recipe import load
from dqo.stages import prepare, sft
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


def test_a_context_without_an_address_takes_the_environments(monkeypatch, tmp_path):
    recipe = load(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert Context(recipe, tmp_path, "").mlflow_uri == "http://mlflow:5000"
    assert Context(recipe, tmp_path, "http://other:5000").mlflow_uri == "http://other:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert Context(recipe, tmp_path, "").mlflow_uri == ""
