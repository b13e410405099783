"""What the stages write to MLflow arrives, on sqlite and on a server with PostgreSQL and S3 alike."""

import random
from pathlib import Path

import mlflow
import pytest
from services.servers import Server

from dqo import tracking
from dqo.errors import DQOError
from dqo.recipe import Recipe, parse

MEGABYTE = 1 << 20


def run_of(run_id: str) -> mlflow.entities.Run:
    return mlflow.MlflowClient().get_run(run_id)


def test_a_pipeline_and_its_stages_are_continued(mlflow_uri: str, parent: str, recipe: Recipe, tmp_path: Path):
    with pytest.raises(RuntimeError), tracking.child_run(parent, "rl-dqo", "rl", "key") as first:
        first.params({"alpha": 1.0, "text": "naïve 雪"})
        first.metrics({"train/loss": 3.0}, step=1)
        raise RuntimeError("a node is lost")
    assert run_of(first.id).info.status == run_of(parent).info.status == "FAILED"

    experiment = tracking.connect(recipe, mlflow_uri)
    assert tracking.open_parent(recipe, experiment, tmp_path / "workspace") == parent
    with tracking.child_run(parent, "rl-dqo", "rl", "key") as again:
        assert (again.id, again.new) == (first.id, False)
        assert again.last_step("train/loss") == 1
        again.params({"alpha": 2.0, "k": 8})
        again.metrics({"train/loss": 2.0, "eval/log_volume": -4.25}, step=2)
        again.tags({"dqo.note": "x" * 4000})
    with tracking.child_run(parent, "rl-dqo", "rl", "another key") as other:
        assert other.new and other.id != first.id

    run = run_of(first.id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"alpha": "1.0", "text": "naïve 雪", "k": "8"}
    assert run.data.metrics == {"train/loss": 2.0, "eval/log_volume": -4.25}
    assert run.data.tags["dqo.note"] == "x" * 4000
    history = mlflow.MlflowClient().get_metric_history(first.id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 3.0), (2, 2.0)]
    stored = mlflow.artifacts.load_text(f"{run_of(parent).info.artifact_uri}/recipe.yaml")
    assert parse(stored) == recipe


def test_a_data_set_is_an_input(parent: str):
    rows = [{"prompt": [{"role": "user", "content": "Schreib über Schnee."}], "references": ["Eins.", "Zwei."]}]
    with tracking.child_run(parent, "sft", "sft", "key") as run:
        run.dataset(rows, "stories", "d" * 40, "stories.jsonl", "training")
        run.dataset(rows, "stories", "d" * 40, "stories.jsonl", "training")  # a repeated stage
    (entry,) = run_of(run.id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("stories", "d" * 36)
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]


def test_tables_and_figures(parent: str, tmp_path: Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([1, 2], [3, 4])
    with tracking.child_run(parent, "evaluate", "evaluate", "key") as run:
        for value in ("eins", "zwei"):
            run.table({"prompt": [value], "quality": [0.5]}, "completions.json", append=True)
            run.table({"prompt": [value]}, "metrics.json")  # the second is a repeated stage's
        run.figure(figure, "plots/front.png")
    base = run_of(run.id).info.artifact_uri
    table = mlflow.artifacts.load_dict(f"{base}/completions.json")
    assert table == {"columns": ["prompt", "quality"], "data": [["eins", 0.5], ["zwei", 0.5]]}
    assert mlflow.artifacts.load_dict(f"{base}/metrics.json")["data"] == [["eins"]]
    assert mlflow.artifacts.load_image(f"{base}/plots/front.png").size == (100, 50)


def write_files(folder: Path) -> dict[str, bytes]:
    """Small, empty, nested, oddly named, and one over boto3's threshold of 8 MB for an upload in parts."""
    files = {
        "card.md": b"# Card\n",
        "empty.txt": b"",
        "nested/with space & ümlaut.json": b"{}",
        "adapter.safetensors": random.Random(0).randbytes(20 * MEGABYTE + 3),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return files


def test_folders_come_back_as_they_were(parent: str, tmp_path: Path):
    files = write_files(tmp_path / "checkpoint")
    with tracking.child_run(parent, "sft", "sft", "key") as run:
        for _ in range(2):  # a repeated stage writes over what it has written
            run.folder(tmp_path / "checkpoint", "model")
    back = Path(
        mlflow.artifacts.download_artifacts(run_id=run.id, artifact_path="model", dst_path=str(tmp_path / "back"))
    )
    assert {str(path.relative_to(back)): path.read_bytes() for path in back.rglob("*") if path.is_file()} == files


def test_a_large_file_reaches_s3_in_parts_and_nothing_else_holds_artifacts(
    administrator: Server, recipe: Recipe, tmp_path: Path
):
    experiment = tracking.connect(recipe, administrator.uri)
    write_files(tmp_path / "checkpoint")
    parent = tracking.open_parent(recipe, experiment, tmp_path)
    with tracking.child_run(parent, "sft", "sft", "key") as run:
        run.folder(tmp_path / "checkpoint", "model")
    listed = administrator.s3_client().list_objects_v2(
        Bucket=administrator.bucket, Prefix=f"artifacts/{experiment}/{run.id}/"
    )
    found = {entry["Key"].partition("/artifacts/")[2]: entry for entry in listed["Contents"]}
    assert len(found) == 4
    large = found["model/adapter.safetensors"]
    assert large["Size"] == 20 * MEGABYTE + 3
    assert large["ETag"].strip('"').endswith("-3")  # S3's mark of an object in three parts, of 8 MB at most


def test_processes_that_start_together_share_the_experiment(mlflow_uri: str, recipe: Recipe):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: tracking.connect(recipe, mlflow_uri), range(4)))
    assert len(set(found)) == 1


def test_a_deleted_experiment_is_refused_by_name(mlflow_uri: str, recipe: Recipe):
    mlflow.MlflowClient(mlflow_uri).delete_experiment(tracking.connect(recipe, mlflow_uri))
    with pytest.raises(DQOError, match=rf"tracking.experiment '{recipe.tracking.experiment}': deleted"):
        tracking.connect(recipe, mlflow_uri)


def test_a_deleted_pipeline_run_is_replaced(mlflow_uri: str, parent: str, recipe: Recipe, tmp_path: Path):
    mlflow.MlflowClient().delete_run(parent)
    experiment = tracking.connect(recipe, mlflow_uri)
    second = tracking.open_parent(recipe, experiment, tmp_path / "workspace")
    assert second != parent
    assert tracking.open_parent(recipe, experiment, tmp_path / "workspace") == second
