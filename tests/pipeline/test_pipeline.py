"""The whole pipeline through Kubeflow's local runner and the command line, on tiny random models."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pandas
import pytest
import yaml

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden" / "quickstart.yaml"
STAGES = ["prepare", "sft", "rl-reward_only", "rl-dqo", "evaluate", "register"]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def write_recipe(path: Path, policy_folder: Path, encoder_folder: Path, **changes) -> Path:
    recipe = {
        "name": "tiny",
        "policy": {"model": str(policy_folder), "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
        "encoder": {"model": str(encoder_folder)},
        "data": {"max_prompts": 60, "eval_fraction": 0.2},
        "method": {"alpha": 1.0, "k": 4},
        "sft": {"steps": 3, "prompts_per_step": 4},
        "rl": {"steps": 4, "prompts_per_step": 2, "save_every": 2, "sampling": {"max_new_tokens": 12}},
        "evaluation": {"prompts": 6, "n": 4, "sampling": {"max_new_tokens": 12}, "bootstrap_draws": 200},
        "registry": {"name": "tiny-stories"},
    }
    for section, values in changes.items():
        recipe[section] = recipe.get(section, {}) | values
    path.write_text(yaml.safe_dump(recipe))
    return path


def events(out: Path) -> list[dict]:
    (path,) = (out / "workspace" / "progress").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_policy, tiny_encoder, tmp_path_factory):
    """One run of the pipeline: its output folder, recipe and what it printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    recipe = write_recipe(folder / "tiny.yaml", tiny_policy, tiny_encoder)
    done = subprocess.run(
        command("run", recipe, "--out", folder / "runs"),
        capture_output=True, text=True, timeout=600, cwd=folder, env=environment(),
    )  # fmt: skip
    log = next((folder / "runs").glob("tiny-*/run.log"), None)
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-4000:] if log else "")
    return folder / "runs", recipe, done.stdout


def test_every_stage_ran_once_and_in_order(finished):
    out, _, _ = finished
    assert [event["stage"] for event in events(out) if event["event"] == "done"] == STAGES


def test_what_the_user_sees(finished):
    out, _, printed = finished
    assert "Traceback" not in printed and "Warning" not in printed
    for expected in ("Prepare data", "DQO-SFT", "RL reward-only", "DQO-RL", "Evaluate", "Register", "gate", "Report:"):
        assert expected in printed
    for model in ("Base", "SFT", "Reward-only RL", "DQO-RL"):
        assert model in printed
    report = next(out.glob("tiny-*/report.html")).read_text()
    assert "<html" in report and "tiny" in report


def test_evaluation_holds_every_model_and_prompt(finished):
    out, _, _ = finished
    (path,) = out.glob("tiny-*/artifacts/*/evaluate/evaluation/evaluation.json")
    result = json.loads(path.read_text())
    assert list(result["models"]) == ["base", "sft", "reward_only", "dqo"]
    for model in result["models"].values():
        assert len(model["per_prompt"]["quality"]) == result["prompts"] == 6
        interval = model["metrics"]["log_volume"]
        mean = sum(model["per_prompt"]["log_volume"]) / 6
        assert interval["mean"] == pytest.approx(mean)
        assert interval["low"] <= interval["mean"] <= interval["high"]
    rows = [json.loads(line) for line in (path.parent / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 6 and all(len(row["responses"]) == 4 for row in rows)


def test_mlflow_holds_the_lineage(finished):
    out, _, _ = finished
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "dqo"]
    runs = {run.data.tags["mlflow.runName"]: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("tiny")
    assert parent.info.status == "FINISHED"
    assert set(runs) == {*STAGES, "base"}
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in runs.values())
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert len(client.get_metric_history(runs["rl-dqo"].info.run_id, "train/log_volume")) == 4
    assert runs["rl-dqo"].data.params["alpha"] == "1.0" and runs["rl-reward_only"].data.params["alpha"] == "0.0"
    assert runs["rl-dqo"].inputs.dataset_inputs
    for name in ("base", "sft", "rl-reward_only", "rl-dqo"):
        assert {"eval/quality", "eval/log_volume", "eval/self_bleu_diversity"} <= runs[name].data.metrics.keys()
    artifacts = {item.path for item in client.list_artifacts(runs["evaluate"].info.run_id)}
    assert {"evaluation", "plane.png", "learning_curves.png", "responses_side_by_side.json"} <= artifacts
    version = client.get_model_version_by_alias("tiny-stories", "challenger")
    assert version.run_id == runs["rl-dqo"].info.run_id
    assert version.tags["dqo.pipeline_mlflow_run"] == parent.info.run_id
    (card,) = out.glob("tiny-*/artifacts/*/prepare/data/card.json")
    assert version.tags["dqo.data_digest"] == json.loads(card.read_text())["digest"]


def test_the_registered_model_generates(finished):
    out, _, _ = finished
    mlflow.set_tracking_uri(f"sqlite:///{out}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{out}/mlflow.db")
    model = mlflow.pyfunc.load_model("models:/tiny-stories@challenger")
    settings = {"n": 3, "max_new_tokens": 5, "seed": 1}
    prompts = pandas.DataFrame({"prompt": ["Write about a boat.", "And a dog."]})
    groups = model.predict(prompts, params=settings)
    assert [len(group) for group in groups] == [3, 3]
    assert groups == model.predict(prompts, params=settings)


def test_a_repeat_reuses_everything(finished):
    out, recipe, _ = finished
    before = len(events(out))
    done = subprocess.run(
        command("run", recipe, "--out", out), capture_output=True, text=True, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    again = events(out)[before:]
    assert not [event for event in again if event["event"] == "start"], again


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_killed_during_rl_it_continues(tiny_policy, tiny_encoder, tmp_path, how):
    """Killed behind a checkpoint, the same command repeats no finished stage and starts at the checkpoint."""
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_policy, tiny_encoder, rl={"steps": 120, "save_every": 10})
    out = tmp_path / "runs"
    process = subprocess.Popen(
        command("run", recipe, "--out", out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(),
    )  # fmt: skip
    deadline = time.time() + 300
    while time.time() < deadline:
        time.sleep(0.2)
        marks = list(out.glob("workspace/stages/rl-reward_only-*/checkpoints/*/complete"))
        if marks or process.poll() is not None:
            break
    assert process.poll() is None, process.stdout.read()
    process.send_signal(how)
    printed, _ = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert f"dqo run {recipe} --out {out}" in printed and "Traceback" not in printed
    before = len(events(out))
    (path,) = (out / "workspace" / "stages").glob("rl-reward_only-*")
    # The runner ends by itself when the command line is gone; a half-written checkpoint must not be taken.
    (path / "checkpoints" / "checkpoint-119").mkdir()
    done = subprocess.run(
        command("run", recipe, "--out", out), capture_output=True, text=True, timeout=400, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    again = events(out)[before:]
    assert [e["stage"] for e in again if e["event"] == "start"] == ["rl-reward_only", "rl-dqo", "evaluate", "register"]
    first = next(e for e in again if e["stage"] == "rl-reward_only" and "total" in e and e["step"] > 0)
    assert 10 <= first["step"] < 120
    assert any("continuing from checkpoint-" in e.get("message", "") for e in again)
    history = next(out.glob("workspace/stages/rl-reward_only-*/output/history.jsonl")).read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == list(range(1, 121))


def test_a_bad_row_share_stops_with_the_reason(tiny_policy, tiny_encoder, tmp_path):
    rows = ['{"concepts": ["dog"], "references": ["A dog ran."]}', "{broken", '{"concepts": [], "references": ["x"]}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    recipe = write_recipe(
        tmp_path / "bad.yaml", tiny_policy, tiny_encoder, data={"source": str(tmp_path / "rows.jsonl")}
    )
    done = subprocess.run(
        command("run", recipe, "--out", tmp_path / "runs"),
        capture_output=True, text=True, timeout=200, env=environment(),
    )  # fmt: skip
    assert done.returncode == 2
    assert "rows.jsonl" in done.stderr and "Traceback" not in done.stderr
    assert str(recipe) in done.stderr  # how to continue


def test_golden_intermediate_representation(tmp_path):
    """The compiled quickstart is the committed one; `make docs` writes it anew when a change is meant."""
    produced = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.yaml"
        done = subprocess.run(
            command("compile", ROOT / "recipes/quickstart.yaml", "-o", path), capture_output=True, env=environment()
        )
        assert done.returncode == 0, done.stderr
        produced.append(path.read_bytes())
    assert produced[0] == produced[1]
    masked = [
        "sdkVersion: kfp" if line.startswith("sdkVersion:") else line for line in produced[0].decode().splitlines()
    ]
    assert masked == GOLDEN.read_text().splitlines()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_at_a_checkpoint(tiny_policy, tiny_encoder, tmp_path):
    """A real file system of 6 MiB: the run stops with a clear message that says how to continue."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        recipe = write_recipe(
            tmp_path / "full.yaml", tiny_policy, tiny_encoder, policy={"lora": {"r": 512, "alpha": 8}}
        )
        done = subprocess.run(
            command("run", recipe, "--out", mount / "runs"),
            capture_output=True, text=True, timeout=200, env=environment(),
        )  # fmt: skip
        assert done.returncode == 2, done.stdout + done.stderr
        assert "disk is full" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert f"dqo run {recipe}" in done.stderr
    finally:
        subprocess.run(["umount", mount], check=True)
