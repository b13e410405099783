"""The whole pipeline through Kubeflow's local runner and the command line, on tiny random models."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import mlflow
import pandas
import pytest
from huggingface_hub import ModelCard
from pipeline.tiny_runs import (
    GOLDEN,
    ROOT,
    STAGES,
    command,
    environment,
    events,
    registered_model,
    run,
    runs_of,
    started,
    write_recipe,
)

from dqo.recipe import Defences, load


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
    store = f"sqlite:///{out}/mlflow.db"
    client, runs = mlflow.MlflowClient(store, store), runs_of(out)
    parent = runs.pop("tiny")
    assert parent.info.status == "FINISHED"
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith("Registered as `tiny-stories` version 1 (`challenger`") and "\n- quality " in note
    assert set(runs) == {*STAGES, "base"}
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in runs.values())
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert len(client.get_metric_history(runs["rl-dqo"].info.run_id, "train/log_volume")) == 4
    assert runs["rl-dqo"].data.params["alpha"] == "1.0" and runs["rl-reward_only"].data.params["alpha"] == "0.0"
    shown = runs["rl-dqo"].data.params
    assert {f"defences.{name}" for name in Defences.model_fields} < shown.keys()
    assert {name for name in runs["sft"].data.params if name.startswith("defences.")} == {
        "defences.embed", "defences.strip_reasoning"
    }  # fmt: skip
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


def test_the_registered_model_carries_its_card_and_figures(finished):
    out, recipe, _ = finished
    store = f"sqlite:///{out}/mlflow.db"
    client, runs = mlflow.MlflowClient(store, store), runs_of(out)
    version = client.get_model_version_by_alias("tiny-stories", "challenger")
    assert version.tags["dqo.evaluation_mlflow_run"] == runs["evaluate"].info.run_id
    digest = version.tags["dqo.data_digest"]
    assert version.tags["dqo.evaluated_on"] == f"story {digest[:8]}, 6 prompts x 4"
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    figures = {metric.key: metric for metric in logged.metrics if metric.dataset_digest}
    assert {(metric.dataset_name, metric.dataset_digest) for metric in figures.values()} == {("story", digest[:36])}
    means = runs["rl-dqo"].data.metrics
    for name in ("eval/log_volume", "eval/log_volume_low", "eval/log_volume_high"):
        assert figures[name].value == pytest.approx(means[name])
    mlflow.set_tracking_uri(store)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/tiny-stories/{version.version}"))
    card = ModelCard.load(folder / "artifacts" / "checkpoint" / "README.md")
    assert card.data.model_name == "tiny-stories" and load(recipe).digest in card.text
    (trained,) = out.glob("workspace/stages/rl-dqo-*/output")
    assert not (trained / "README.md").is_file() or "tiny-stories" not in (trained / "README.md").read_text()


@pytest.mark.slow
def test_a_registration_that_is_repeated_alone_ends_with_the_table(finished):
    """As after a failed registration: Kubeflow's cache holds every task but that one, whose run evaluates nothing."""
    out, recipe, first = finished
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


def test_the_version_is_promoted_by_force_used_and_shown(finished, tmp_path):
    """After training, the commands a team would type."""
    out, _, _ = finished

    def dqo(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*words, "--out", out), capture_output=True, text=True, timeout=300, env=environment()
        )

    refused = dqo("promote", "tiny-stories", "challenger")
    assert refused.returncode == 1 and "Gate not passed: no version is champion." in refused.stdout, refused.stderr
    forced = dqo("promote", "tiny-stories", "1", "--force", "the only one there is")
    assert forced.returncode == 0 and "tiny-stories version 1 is champion by force." in forced.stdout, forced.stderr
    file = tmp_path / "group.json"
    spoken = dqo("generate", "tiny-stories", "--row", '{"concepts": ["dog", "ball"]}', "-n", "3", "--json", str(file))
    assert spoken.returncode == 0 and spoken.stderr == "", spoken.stderr
    group = json.loads(file.read_text())
    assert group["model"] == "tiny-stories/1" and len(group["responses"]) == 3 and group["quality"] is not None
    shown = dqo("models", "tiny-stories").stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("1 ")]
    assert "challenger, champion" in line and line.count("[") == 3 and "6 prompts x 4" in line
    assert "the only one there is" in shown


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
