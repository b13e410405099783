"""Stages that a recipe gives two processes: real models, real sampling, real MLflow, as `dqo run` starts them."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))
from test_pipeline import write_recipe

from dqo import tracking
from dqo.checkpoint import CheckpointCard
from dqo.errors import DQOError
from dqo.recipe import load
from dqo.stages import prepare, rl, sft
from dqo.stages.context import Context

pytestmark = pytest.mark.slow
STEPS = 6


def prepared(folder: Path, policy: Path, encoder: Path, processes: int) -> Context:
    """A pipeline run whose data are prepared in `folder/data`."""
    folder.mkdir()
    recipe = write_recipe(
        folder / "r.yaml", policy, encoder, distributed={"processes": processes},
        sft={"steps": STEPS, "prompts_per_step": 3, "micro_batch": 3, "save_every": 1},
        rl={"steps": 2, "prompts_per_step": 3, "micro_batch": 2, "log_completions_every": 1},
    )  # fmt: skip
    context = Context(load(recipe), folder / "workspace", tracking.default_uri(folder))
    prepare.run(context, folder / "data")
    return Context.after_prepare(context.recipe, context.workspace, context.mlflow_uri, folder / "data")


def history(checkpoint: Path) -> list[dict]:
    return [json.loads(line) for line in (checkpoint / "history.jsonl").read_text().splitlines()]


def events(context: Context, stage: str) -> list[dict]:
    found = map(json.loads, context.progress_file.read_text().splitlines())
    return [event for event in found if event["stage"] == stage]


def run_of(context: Context, name: str) -> mlflow.entities.Run:
    client = mlflow.MlflowClient(context.mlflow_uri)
    experiment = client.get_experiment_by_name("dqo").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`mlflow.runName` = '{name}'")
    return run


def kill_the_second_process_after(context: Context, step: int) -> None:
    while not any(event.get("step", 0) >= step for event in events(context, "sft")):
        time.sleep(0.02)
    for child in psutil.Process().children():
        if child.environ().get("RANK") == "1":
            os.kill(child.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def two(tiny_policy, tiny_encoder, tmp_path_factory):
    """SFT on two processes, one of which is killed on the way, and repeated; then RL."""
    folder = tmp_path_factory.mktemp("stages") / "two"
    context = prepared(folder, tiny_policy, tiny_encoder, 2)
    killer = threading.Thread(target=kill_the_second_process_after, args=(context, 2), daemon=True)
    killer.start()
    with pytest.raises(DQOError) as killed:
        sft.run(context, folder / "data", folder / "sft")
    killer.join()
    status = run_of(context, "sft").info.status
    sft.run(context, folder / "data", folder / "sft")
    rl.run(context, "dqo", folder / "data", folder / "sft", folder / "rl")
    return folder, context, str(killed.value), status


def test_a_killed_process_fails_the_stage_and_a_second_call_continues(two):
    folder, context, message, status = two
    assert "process 1 of 2 was ended by SIGKILL" in message
    assert status == "FAILED"
    happened = events(context, "sft")
    (failed,) = [event for event in happened if event["event"] == "error"]
    assert failed["message"] == message
    (resumed,) = [event for event in happened if "continuing from checkpoint-" in event.get("message", "")]
    assert message.endswith(f"continues from checkpoint-{resumed['step']}") and 1 <= resumed["step"] < STEPS
    assert happened[-1]["event"] == "done"
    assert [row["step"] for row in history(folder / "sft")] == list(range(1, STEPS + 1))
    run = run_of(context, "sft")
    assert run.info.status == "FINISHED"
    assert run.data.params["distributed.processes"] == "2"
    logged = mlflow.MlflowClient(context.mlflow_uri).get_metric_history(run.info.run_id, "train/loss")
    assert sorted(entry.step for entry in logged) == list(range(1, STEPS + 1))
    assert not list(context.workspace.glob("stages/*/processes")) + list(context.workspace.glob("stages/*/checkpoints"))


def test_sft_without_rollouts_is_that_of_one_process(two, tiny_policy, tiny_encoder, tmp_path):
    """Nothing is drawn, so the interrupted run on two processes equals an uninterrupted one on one."""
    context = prepared(tmp_path / "one", tiny_policy, tiny_encoder, 1)
    sft.run(context, tmp_path / "one/data", tmp_path / "one/sft")
    alone, together = history(tmp_path / "one/sft"), history(two[0] / "sft")
    for one, other in zip(alone, together, strict=True):
        for name in ("loss", "demonstration_nll", "grad_norm", "learning_rate"):
            assert other[name] == pytest.approx(one[name], rel=1e-4)
    one, other = (load_file(path / "sft/adapter_model.safetensors") for path in (tmp_path / "one", two[0]))
    assert one.keys() == other.keys()
    assert max(value.abs().max() for name, value in one.items() if "lora_B" in name) > 5e-4
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=2e-5)


def test_rl_reports_each_step_once_and_its_processes_draw_different_responses(two):
    folder, context, _, _ = two
    rows = history(folder / "rl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["log_volume"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert [event["step"] for event in events(context, "rl-dqo") if event.get("metrics")] == [1, 2]
    run = run_of(context, "rl-dqo")
    path = mlflow.MlflowClient(context.mlflow_uri).download_artifacts(run.info.run_id, "completions.json")
    table = json.loads(Path(path).read_text())
    rows = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
    first = [row["response"] for row in rows if row["step"] == 1]
    assert len(first) == 12  # three groups of four, from both processes
    assert len(set(first)) > 6  # equal seeds would draw everything twice


def test_a_rule_stops_both_processes_at_the_same_step(two, tiny_policy, tiny_encoder, tmp_path):
    """The first process alone knows of the rule; the random policy hardly ever ends a response."""
    folder, earlier, _, _ = two
    rules = {"truncation": {"max": 0.1, "patience": 2, "action": "stop"}}
    recipe = write_recipe(
        tmp_path / "r.yaml", tiny_policy, tiny_encoder, distributed={"processes": 2},
        sft={"steps": STEPS, "prompts_per_step": 3, "micro_batch": 3, "save_every": 1},
        rl={"steps": 6, "prompts_per_step": 3, "micro_batch": 2, "save_every": 6, "health": rules},
    )  # fmt: skip
    context = Context.after_prepare(load(recipe), earlier.workspace, earlier.mlflow_uri, folder / "data")
    rl.run(context, "reward_only", folder / "data", folder / "sft", tmp_path / "rl")
    rows = history(tmp_path / "rl")
    assert [row["step"] for row in rows] == [1, 2] and min(row["truncation_rate"] for row in rows) > 0.1
    stopped = CheckpointCard.read(tmp_path / "rl").stopped
    assert stopped is not None and stopped["step"] == 2 and stopped["reason"].startswith("truncation: ")
    run = run_of(context, "rl-reward_only")
    assert run.info.status == "FINISHED" and run.data.tags["dqo.stopped"] == stopped["reason"]
