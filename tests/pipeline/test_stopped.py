"""A training that a health rule stops, from the rollouts to the gate: real stages on tiny models."""

import json
from pathlib import Path
from typing import ClassVar

import mlflow
import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import write_recipe

import dqo.stages.training as training
from dqo import promotion, tracking
from dqo.checkpoint import CheckpointCard
from dqo.errors import DQOError
from dqo.files import read_jsonl
from dqo.recipe import Recipe, load
from dqo.stages import evaluate, prepare, register, rl, sft
from dqo.stages.context import Context
from dqo.trainer import DQOTrainer

WORDS = "river boat storm lantern violin bakery mountain winter garden letter".split()
COLLAPSES_AT = 4


class Collapsing(DQOTrainer):
    """Responses of four different words a group until step 3; from step 4 on, one and the same."""

    steps: ClassVar[list[int]] = []

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        step = self.state.global_step + 1
        self.steps.append(step)
        words = [WORDS[0 if step >= COLLAPSES_AT else (index + step) % len(WORDS)] for index in range(len(prompt_ids))]
        ends = [self.eos_token_ids[0]]
        return [self._tokenizer(word, add_special_tokens=False)["input_ids"] + ends for word in words], None


# Repeats are 3/4 of a group of four from step 4 on: two such steps in a row are over at step 5.
# The random policy's story reward is 0 for all, which a default warns of.
RULES = {"duplicates": {"max": 0.5, "patience": 2, "action": "stop"}, "zero_variance": {"max": None}}
STOP = "duplicates: share of repeated responses 0.75 above 0.5, at steps 4 to 5"


def rl_section(**rules: object) -> dict:
    return {"steps": 8, "prompts_per_step": 2, "save_every": 3, "health": rules or RULES}


@pytest.fixture(scope="module")
def prepared(tiny_policy, tiny_encoder, tmp_path_factory) -> tuple[Recipe, Path, Context]:
    """Data and an SFT checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    registry = {"name": "stopped", "baselines": True}
    recipe = load(
        write_recipe(folder / "r.yaml", tiny_policy, tiny_encoder, sft={"steps": 1}, rl=rl_section(), registry=registry)
    )
    context = Context(recipe, folder / "workspace", tracking.default_uri(folder))
    prepare.run(context, folder / "data")
    context = Context.after_prepare(recipe, context.workspace, context.mlflow_uri, folder / "data")
    sft.run(context, folder / "data", folder / "sft")
    return recipe, folder, context


@pytest.fixture
def collapsing(monkeypatch) -> list[int]:
    """Rollouts that collapse; the steps that were sampled."""
    monkeypatch.setattr(training, "DQOTrainer", Collapsing)
    monkeypatch.setattr(Collapsing, "steps", [])
    return Collapsing.steps


def train(prepared: tuple[Recipe, Path, Context], variant: str, name: str, **rules: object) -> Path:
    recipe, folder, context = prepared
    if rules:
        recipe = recipe.model_copy(
            update={"rl": type(recipe.rl).model_validate(recipe.rl.model_dump() | rl_section(**rules))}
        )
        context = Context(recipe, context.workspace, context.mlflow_uri, context.parent_run_id)
    rl.run(context, variant, folder / "data", folder / "sft", folder / name)
    return folder / name


def progress(context: Context) -> list[dict]:
    return read_jsonl(context.progress_file)


def test_a_collapse_stops_training_and_the_pipeline_goes_on(prepared, collapsing):
    _, folder, context = prepared
    checkpoints = [folder / "sft"]
    for variant in ("reward_only", "dqo"):
        checkpoints.append(train(prepared, variant, variant))
        assert collapsing == [1, 2, 3, 4, 5]
        collapsing.clear()
    card = CheckpointCard.read(folder / "dqo")
    assert card.steps == 5 and card.stopped is not None
    assert {name: card.stopped[name] for name in ("rule", "step", "since", "value", "threshold", "reason")} == {
        "rule": "duplicates", "step": 5, "since": 4, "value": 0.75, "threshold": 0.5, "reason": STOP
    }  # fmt: skip
    assert [row["step"] for row in read_jsonl(folder / "dqo" / "history.jsonl")] == [1, 2, 3, 4, 5]
    warned = [event for event in progress(context) if event["stage"] == "rl-dqo" and event["event"] == "warning"]
    assert [event["message"] for event in warned] == [f"training stopped, {STOP}"]
    client = mlflow.MlflowClient(context.mlflow_uri)
    run = client.get_run(card.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["dqo.stopped"] == run.data.tags["dqo.health.duplicates"] == STOP
    (entry,) = client.get_metric_history(run.info.run_id, "health/duplicates")
    assert (entry.step, entry.value) == (5, 0.75)

    # A repeat finds it finished: not a step more, and it says again why.
    again = train(prepared, "dqo", "again")
    assert collapsing == []
    assert CheckpointCard.read(again).stopped == card.stopped
    assert len([e for e in progress(context) if e["stage"] == "rl-dqo" and e["event"] == "warning"]) == 2

    evaluate.run(context, folder / "data", checkpoints, folder / "evaluation")
    result = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert not result["gate"]["passed"]
    assert result["gate"]["reasons"][0] == f"training was stopped by a health rule: {STOP}"
    assert [finding["reason"] for finding in result["health"]["dqo"]] == [STOP]
    page = (folder / "evaluation" / "report.html").read_text()
    assert "was stopped at step 5 of 8 by a health rule" in page and STOP in page
    assert "5 of 8 steps on quality + 1" in page

    register.run(context, checkpoints[1:], folder / "evaluation", folder / "registration.json")
    registration = json.loads((folder / "registration.json").read_text())
    assert registration["aliases"] == ["challenger"]
    version = client.get_model_version(registration["name"], registration["version"])
    assert version.tags["dqo.stopped"] == STOP and version.tags["gate.passed"] == "false"
    assert STOP in client.get_run(context.parent_run_id).data.tags["mlflow.note.content"]

    # The baseline is there to compare with, and no gate lets it pass.
    assert registration["version"] == "2" and registration["baselines"] == {"reward_only": "1"}
    baseline = client.get_model_version(registration["name"], "1")
    assert baseline.tags["dqo.model"] == "reward_only" and not baseline.aliases
    assert baseline.run_id == CheckpointCard.read(folder / "reward_only").mlflow_run_id
    refused = promotion.promote(client, registration["name"], "1")
    assert refused.moved is None and refused.gate is not None and not refused.gate.passed
    assert refused.gate.reasons[0].startswith("reward_only is the model that the gate compares with")
    place = mlflow.artifacts.download_artifacts(f"models:/{registration['name']}/1", dst_path=str(folder / "one"))
    card_text = (Path(place) / "artifacts" / "checkpoint" / "README.md").read_text()
    assert "no reward for diversity" in card_text and "| alpha (nats to quality), k | 0, 4 |" in card_text


def plug(*_: object) -> None:
    raise DQOError("pulled the plug")


def test_a_run_resumed_before_the_decision_stops_where_an_uninterrupted_one_does(prepared, collapsing, monkeypatch):
    """Interrupted at step 5, whose streak began at step 4: both are trained again from the checkpoint of step 3."""
    _, folder, context = prepared
    rules = {"duplicates": {"max": 0.51, "patience": 2, "action": "stop"}}
    collapses = Collapsing._generate_single_turn

    def interrupted(self, *args, **kwargs):
        if self.state.global_step + 1 == 5:
            plug()
        return collapses(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(DQOError, match="pulled the plug"):
        patched.setattr(Collapsing, "_generate_single_turn", interrupted)
        train(prepared, "dqo", "resumed", **rules)
    (kept,) = context.workspace.glob("stages/rl-dqo-*/checkpoints/checkpoint-*")
    assert kept.name == "checkpoint-3" and collapsing == [1, 2, 3, 4]
    collapsing.clear()
    card = CheckpointCard.read(train(prepared, "dqo", "resumed", **rules))
    assert collapsing == [4, 5]
    assert card.steps == 5 and card.stopped is not None and card.stopped["since"] == 4
    assert [row["step"] for row in read_jsonl(folder / "resumed" / "history.jsonl")] == [1, 2, 3, 4, 5]


def test_a_run_resumed_after_the_decision_trains_no_further(prepared, collapsing, monkeypatch):
    """Interrupted when the stopped model was handed over: the weights are those of the checkpoint of step 5."""
    _, folder, context = prepared
    rules = {"duplicates": {"max": 0.52, "patience": 2, "action": "stop"}}
    with monkeypatch.context() as patched, pytest.raises(DQOError, match="pulled the plug"):
        patched.setattr(tracking.Run, "folder", plug)
        train(prepared, "dqo", "handed-over", **rules)
    (kept,) = context.workspace.glob("stages/rl-dqo-*/checkpoints/checkpoint-5")
    trained = load_file(kept / "adapter_model.safetensors")
    collapsing.clear()
    card = CheckpointCard.read(train(prepared, "dqo", "handed-over", **rules))
    assert collapsing == []
    assert card.steps == 5 and card.stopped is not None and card.stopped["step"] == 5
    weights = load_file(folder / "handed-over" / "adapter_model.safetensors")
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained.items())


def test_a_warning_changes_neither_the_training_nor_its_key(prepared, collapsing):
    _, _, context = prepared
    first = train(prepared, "dqo", "warned", duplicates={"max": 0.5, "patience": 2})
    assert collapsing == [1, 2, 3, 4, 5, 6, 7, 8]
    card = CheckpointCard.read(first)
    assert card.stopped is None and card.steps == 8
    tags = mlflow.MlflowClient(context.mlflow_uri).get_run(card.mlflow_run_id).data.tags
    assert tags["dqo.health.duplicates"] == STOP and "dqo.stopped" not in tags
    collapsing.clear()
    second = train(prepared, "dqo", "warned-differently", duplicates={"max": 0.6, "patience": 3})
    assert collapsing == [] and CheckpointCard.read(second).stage_key == card.stage_key
    stopping = train(prepared, "dqo", "stopping", duplicates={"max": 0.6, "patience": 3, "action": "stop"})
    assert CheckpointCard.read(stopping).stage_key != card.stage_key
    assert CheckpointCard.read(stopping).steps == 6
