"""The whole pipeline through Kubeflow's local runner and the command line, on tiny random models."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pandas
import pytest
import yaml

from dqo.recipe import load

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden" / "quickstart.yaml"
STORES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
STAGES = ["prepare", "sft", "rl-reward_only", "rl-dqo", "evaluate", "register"]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    # A test that has read a store in this process has named it there for every process that comes after.
    inherited = {name: value for name, value in os.environ.items() if name not in STORES}
    return {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(recipe: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("run", recipe, "--out", out, *options), capture_output=True, text=True, timeout=450, env=environment()
    )


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


def started(happened: list[dict]) -> list[str]:
    return [event["stage"] for event in happened if event["event"] == "start"]


def runs_of(out: Path) -> dict[str, mlflow.entities.Run]:
    """The runs of the store by their names."""
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "dqo"]
    return {run.data.tags["mlflow.runName"]: run for run in client.search_runs([experiment.experiment_id])}


def registered_model(out: Path) -> mlflow.pyfunc.PyFuncModel:
    mlflow.set_tracking_uri(f"sqlite:///{out}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{out}/mlflow.db")
    return mlflow.pyfunc.load_model("models:/tiny-stories@challenger")


@pytest.fixture(scope="module")
def finished(tiny_policy, tiny_encoder, tmp_path_factory):
    """One run of the pipeline: its output folder, recipe and the ended process."""
    folder = tmp_path_factory.mktemp("pipeline")
    recipe = write_recipe(folder / "tiny.yaml", tiny_policy, tiny_encoder)
    done = subprocess.run(
        command("run", recipe, "--out", folder / "runs"),
        capture_output=True, text=True, timeout=600, cwd=folder, env=environment(),
    )  # fmt: skip
    log = next((folder / "runs").glob("tiny-*/run.log"), None)
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-4000:] if log else "")
    return folder / "runs", recipe, done


def test_every_stage_ran_once_and_in_order(finished):
    out, _, _ = finished
    assert [event["stage"] for event in events(out) if event["event"] == "done"] == STAGES


def test_what_the_user_sees(finished):
    out, _, done = finished
    printed = done.stdout
    assert done.stderr == ""
    assert "Traceback" not in printed and "Warning" not in printed
    for expected in ("Prepare data", "DQO-SFT", "RL reward-only", "DQO-RL", "Evaluate", "Register", "gate", "Report:"):
        assert expected in printed
    for model in ("Base", "SFT", "Reward-only RL", "DQO-RL"):
        assert model in printed
    (how,) = [line.removeprefix("MLflow: ") for line in printed.splitlines() if line.startswith("MLflow: ")]
    program, *words = shlex.split(how)
    assert Path(program).name == "dqo" and words == ["ui", "--out", str(out)]
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
    out, recipe, _ = finished
    client, runs = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db"), runs_of(out)
    parent = runs.pop("tiny")
    assert parent.info.status == "FINISHED"
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith("Registered as `tiny-stories` version 1 (`challenger`") and "\n- quality " in note
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
    trained = {item.path: item.is_dir for item in client.list_artifacts(runs["rl-dqo"].info.run_id)}
    assert trained["completions.json"] is False and trained["checkpoint"] is True
    version = client.get_model_version_by_alias("tiny-stories", "challenger")
    assert version.run_id == runs["rl-dqo"].info.run_id
    assert version.tags["dqo.pipeline_mlflow_run"] == parent.info.run_id
    (card,) = out.glob("tiny-*/artifacts/*/prepare/data/card.json")
    assert version.tags["dqo.data_digest"] == json.loads(card.read_text())["digest"]
    assert version.tags["dqo.recipe_digest"] == load(recipe).digest
    assert version.tags["dqo.base_model"] == load(recipe).policy.model
    assert version.tags["dqo.pipeline_run"] == card.parents[2].name  # Kubeflow names the folder of a run after it
    means = runs["rl-dqo"].data.metrics
    for metric in ("quality", "log_volume", "self_bleu_diversity"):
        assert float(version.tags[f"eval.{metric}"]) == pytest.approx(means[f"eval/{metric}"], abs=5e-5)


def test_the_registered_model_generates(finished):
    out, _, _ = finished
    model = registered_model(out)
    settings = {"n": 3, "max_new_tokens": 5, "seed": 1}
    prompts = pandas.DataFrame({"prompt": ["Write about a boat.", "And a dog."]})
    groups = model.predict(prompts, params=settings)
    assert [len(group) for group in groups] == [3, 3]
    assert groups == model.predict(prompts, params=settings)


@pytest.fixture(scope="module")
def repeated(finished):
    """What the stages report when the same command is repeated."""
    out, recipe, _ = finished
    before = len(events(out))
    done = run(recipe, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return events(out)[before:]


def test_a_repeat_reuses_everything(repeated):
    assert not started(repeated), repeated


def test_a_repeat_runs_no_task(repeated):
    """Kubeflow's cache holds every one of them."""
    assert repeated == []


@pytest.mark.slow
def test_a_registration_that_is_repeated_alone_ends_with_the_table(tiny_policy, tiny_encoder, tmp_path):
    """As after a failed registration: Kubeflow's cache holds every task but that one, whose run evaluates nothing."""
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_policy, tiny_encoder, rl={"steps": 1})
    out = tmp_path / "runs"
    first = run(recipe, out)
    assert first.returncode == 0, first.stdout + first.stderr
    before = len(events(out))
    (folder,) = out.glob("tiny-*")
    (entry,) = [path for path in folder.glob("cache/*.json") if "registration" in json.loads(path.read_text())]
    entry.unlink()
    (stage,) = out.glob("workspace/stages/register-*")
    shutil.rmtree(stage)
    done = run(recipe, out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert started(events(out)[before:]) == ["register"]
    assert [path.name for path in max(folder.glob("artifacts/*")).iterdir()] == ["register"]
    begin = "Means over the evaluation prompts"
    table, expected = (text[text.index(begin) : text.index("Report:")] for text in (done.stdout, first.stdout))
    assert table == expected and "registered tiny-stories version 1 as challenger" in table


@pytest.mark.slow
def test_full_fine_tuning_registers_a_model_that_generates(tiny_policy, tiny_encoder, tmp_path):
    out = tmp_path / "runs"
    done = run(write_recipe(tmp_path / "full.yaml", tiny_policy, tiny_encoder, policy={"lora": None}), out)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert runs_of(out)["rl-dqo"].data.params["policy.lora"] == "full fine-tuning"
    (group,) = registered_model(out).predict(
        pandas.DataFrame({"prompt": ["Write about a boat."]}), params={"n": 3, "max_new_tokens": 5, "seed": 1}
    )
    assert len(group) == 3 and all(isinstance(response, str) for response in group)


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
        stops = [(e["stage"], e["message"]) for e in events(out) if e["event"] == "error"]
        assert stops == [("rl-reward_only", "interrupted")]
        ended = {name: run.info.status for name, run in runs_of(out).items()}
        assert ended == {"prepare": "FINISHED", "sft": "FINISHED", "rl-reward_only": "KILLED", "tiny": "KILLED"}
    before = len(events(out))
    (path,) = (out / "workspace" / "stages").glob("rl-reward_only-*")
    # The runner ends by itself when the command line is gone; a half-written checkpoint must not be taken.
    (path / "checkpoints" / "checkpoint-119").mkdir()
    done = subprocess.run(
        command("run", recipe, "--out", out), capture_output=True, text=True, timeout=400, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    again = events(out)[before:]
    assert started(again) == ["rl-reward_only", "rl-dqo", "evaluate", "register"]
    first = next(e for e in again if e["stage"] == "rl-reward_only" and "total" in e and e["step"] > 0)
    assert 10 <= first["step"] < 120
    assert any("continuing from checkpoint-" in e.get("message", "") for e in again)
    history = next(out.glob("workspace/stages/rl-reward_only-*/output/history.jsonl")).read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == list(range(1, 121))


@pytest.fixture
def bad_rows(tiny_policy, tiny_encoder, tmp_path) -> Path:
    """A recipe whose data cannot be used."""
    rows = ['{"concepts": ["dog"], "references": ["A dog ran."]}', "{broken", '{"concepts": [], "references": ["x"]}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return write_recipe(tmp_path / "bad.yaml", tiny_policy, tiny_encoder, data={"source": str(tmp_path / "rows.jsonl")})


def test_a_bad_row_share_stops_with_the_reason(bad_rows, tmp_path):
    done = run(bad_rows, tmp_path / "runs")
    assert done.returncode == 2
    assert "rows.jsonl" in done.stderr and "Traceback" not in done.stderr
    assert str(bad_rows) in done.stderr  # how to continue


@pytest.mark.slow
def test_a_fresh_run_shows_its_stages_and_reason_too(bad_rows, tmp_path):
    """What an earlier run of the recipe reported is deleted while the new one is already being followed."""
    old = tmp_path / "runs" / "workspace" / "progress" / f"tiny-{load(bad_rows).digest}.jsonl"
    old.parent.mkdir(parents=True)
    old.write_text(json.dumps({"time": 1.0, "stage": "sft", "event": "step", "step": 1, "total": 2}) + "\n")
    old.write_text(old.read_text() * 100)
    done = run(bad_rows, tmp_path / "runs", "--fresh")
    assert done.returncode == 2
    assert done.stdout.splitlines()[1:] == ["Prepare data", "  Prepare data: failed"]
    assert "rows.jsonl" in done.stderr.splitlines()[0] and "Traceback" not in done.stderr


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


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_at_a_checkpoint(tiny_policy, tiny_encoder, tmp_path):
    """A real file system of 6 MiB: the run stops with a clear message that says how to continue, and that works."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        recipe = write_recipe(
            tmp_path / "full.yaml", tiny_policy, tiny_encoder, policy={"lora": {"r": 512, "alpha": 8}}
        )
        done = run(recipe, mount / "runs")
        assert done.returncode == 2, done.stdout + done.stderr
        assert "disk is full" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert "while writing a checkpoint or result" in done.stderr
        assert f"dqo run {recipe}" in done.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
        done = run(recipe, mount / "runs")
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        subprocess.run(["umount", mount], check=True)
