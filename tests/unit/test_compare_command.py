"""The command `compare` on a real MLflow store: what names a model, what is refused, what is shown and logged."""

import json
import re
import shutil
import sys
from pathlib import Path

import mlflow
import pytest
from evaluations import RECIPE, Store, evaluation, write
from html_page import Page

from dqo.errors import DQOError
from dqo.evaluation import comparison_sources
from pipelines import cli, compare

PROMPTS = [f"p{i:02d}" for i in range(20)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("runs"), PROMPTS)


def keys(store: Store, *given: str) -> list[tuple[str, str, str | None]]:
    """What the names lead to: label, model and the evaluation's run."""
    filled = [store.runs.get(name.partition(":")[0], name.partition(":")[0]) + "".join(name.partition(":")[1:])
              for name in given]  # fmt: skip
    models, experiment = comparison_sources.load(filled, store.uri)
    assert experiment == store.experiment
    return [(model.label, model.model, model.run_id) for model in models]


# --- names ---


def test_runs_name_the_model_that_they_trained_or_their_dqo_model(store: Store):
    evaluate = store.runs["first evaluate"]
    assert keys(store, "first rl-reward_only", "first", "first:sft", "first base") == [
        ("Reward-only RL", "reward_only", evaluate),
        ("DQO-RL", "dqo", evaluate),
        ("SFT", "sft", evaluate),
        ("Base", "base", evaluate),
    ]
    assert keys(store, "first evaluate", "first sft") == [("DQO-RL", "dqo", evaluate), ("SFT", "sft", evaluate)]


def test_labels_are_as_short_as_they_can_be(store: Store):
    assert [label for label, *_ in keys(store, "first", "second")] == ["first", "second"]
    assert [label for label, *_ in keys(store, "first", "second", "second:base")] == [
        "DQO-RL of first", "DQO-RL of second", "Base of second",
    ]  # fmt: skip


def test_versions_and_aliases_lead_to_the_evaluation_of_their_pipeline(store: Store):
    first, second = store.runs["first evaluate"], store.runs["second evaluate"]
    assert keys(store, "stories@champion", "stories/2", "models:/stories/1:reward_only") == [
        ("stories/1", "dqo", first),
        ("stories/2", "dqo", second),
        ("stories/1:reward_only", "reward_only", first),
    ]


def test_folders_need_no_store_and_lead_to_their_experiment(store: Store):
    folder = str(store.out / "first-0123")
    models, experiment = comparison_sources.load([folder, f"{folder}:sft"], None)
    assert [model.label for model in models] == ["DQO-RL", "SFT"]
    assert experiment is None
    assert models[0].conditions == models[1].conditions is not None
    assert comparison_sources.load([folder, f"{folder}:sft"], store.uri)[1] == store.experiment


def test_the_folder_of_a_local_run_is_read_where_kubeflow_put_its_newest_evaluation(tmp_path: Path, store: Store):
    for time, shift in (("20260101", 0.0), ("20260102", 0.5)):
        write(tmp_path / f"artifacts/run-{time}/evaluate/evaluation", *evaluation({"dqo": shift}, PROMPTS))
    (model,), _ = comparison_sources.load([str(tmp_path)], None)
    _, (expected, *_rest) = [], evaluation({"dqo": 0.5}, PROMPTS)
    assert model.per_prompt["log_volume"] == expected["models"]["dqo"]["per_prompt"]["log_volume"]
    assert model.conditions is None


# --- refusals ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nosuch", r"^nosuch: MLflow knows no run of this id.*newest pipeline runs are .*\(unfinished\), .*\(first\)"),
        ("unfinished", r": it has not been evaluated; stages of the pipeline's run 'unfinished': sft \(FINISHED\)"),
        ("unfinished sft", "it has not been evaluated"),
        ("grid", r"the run 'a grid' \(experiment\) is not one of a pipeline and has no evaluation"),
        ("first:nosuch", "holds no model 'nosuch'; it holds base, sft, reward_only, dqo"),
        ("nosuch@champion", "knows no registered model 'nosuch'; registered are: stories"),
        ("nosuch/1", "knows no registered model 'nosuch'; registered are: stories"),
        ("stories@nosuch", r"^stories@nosuch: stories has no alias 'nosuch'; its aliases are: champion \(version 1\)"),
        ("stories/9", "stories has no version '9'; its versions are: 1, 2, 3"),
        ("stories/x", "stories has no version 'x'"),
        ("stories/3", "version 3 of stories names no run of a pipeline"),
    ],
)
def test_what_cannot_be_found_is_named_with_what_there_is(store: Store, given: str, message: str):
    with pytest.raises(DQOError, match=message):
        keys(store, "first", given)


def test_an_evaluation_without_its_files_is_refused(store: Store):
    parent = store.run("empty", "pipeline", None, name="empty")
    evaluate = store.run("empty evaluate", "evaluate", parent, name="evaluate")
    with pytest.raises(DQOError, match=f"the run {evaluate} holds no artifact `evaluation/evaluation.json`"):
        keys(store, "empty")
    store.client.delete_run(parent)
    with pytest.raises(DQOError, match="this run is deleted in MLflow"):
        keys(store, "empty")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"models": 3}'])
def test_a_broken_file_is_refused(tmp_path: Path, text: str):
    write(tmp_path, *evaluation({"dqo": 0.0}, PROMPTS))
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(DQOError, match="cannot be read"):
        comparison_sources.load([str(tmp_path)], None)
    (tmp_path / "responses.jsonl").unlink()
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(DQOError, match="lacks responses"):
        comparison_sources.load([str(tmp_path)], None)


def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(DQOError, match=r"holds no evaluation \(recipe.yaml\)"):
        comparison_sources.load([str(tmp_path)], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--html", "x.txt"], "--html x.txt: expected the name of a file that ends in .html"),
        (["--json", "no/such/x.json"], "--json no/such/x.json: the folder no/such does not exist"),
        (["--uri", "sqlite:///no/such.db"], "--uri sqlite:///no/such.db: there is no such file"),
        ([], "first: no such folder, and no MLflow store to look in"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dqo", "compare", "first", "second", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- what comes out ---


def test_the_comparison_is_shown_written_and_logged(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    before = len(store.comparisons())
    html, json_ = tmp_path / "c.html", tmp_path / "c.json"
    given = ["stories/1:reward_only", "stories/1", "stories/2"]
    monkeypatch.setenv("COLUMNS", "60")
    assert compare.run(given, store.out, None, html, json_) == 0
    shown = capsys.readouterr().out
    assert "! compared on the 15 prompts that all answered" in shown
    assert "stories/1 is more diverse than stories/1:reward_only on all 9 measures" in shown
    line = next(line for line in shown.splitlines() if line.startswith("Log-volume"))
    assert line.count("[") == 3  # not cut, however narrow the terminal
    document = json.loads(json_.read_text())
    assert document["prompts"] == 15
    assert f"{document['means']['log_volume'][0]['mean']:.2f} [" in line
    words = Page(html.read_text(encoding="utf-8")).words
    assert document["findings"][0][0] in words and document["findings"][1][0] in words

    run, *_ = store.comparisons()
    assert len(store.comparisons()) == before + 1
    assert run.info.run_name == "compare stories/1:reward_only, stories/1, stories/2"
    assert run.info.status == "FINISHED"
    assert run.data.params["model_3"] == run.data.params["label_3"] == "stories/2"
    expected = document["differences"]["log_volume"][2]
    assert run.data.metrics["compare/3/log_volume_difference"] == pytest.approx(expected["interval"]["mean"])
    assert run.data.metrics["compare/3/log_volume_p"] == pytest.approx(expected["adjusted"])
    assert run.data.metrics["compare/prompts"] == 15
    assert document["findings"][0][0] in run.data.tags["mlflow.note.content"]
    assert {item.path for item in store.client.list_artifacts(run.info.run_id)} == {
        "comparison.html", "comparison.json", "comparison_metrics.json", "win_rates.json",
        "responses_by_disagreement.json", "differences.png", "plane.png", "win_rates.png",
    }  # fmt: skip
    table = store.client.load_table(store.experiment, "comparison_metrics.json", [run.info.run_id])
    rows = table[(table.metric == "log_volume") & (table.model == "stories/2")]
    assert rows.difference.item() == pytest.approx(expected["interval"]["mean"])


def test_folders_alone_are_compared_without_a_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "copy"
    shutil.copytree(store.out / "first-0123", folder)
    assert compare.run([f"{folder}:reward_only", str(folder)], tmp_path, None, None, None) == 0
    assert "Not logged to MLflow" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("log_figure", mlflow.exceptions.MlflowException("Permission denied")),  # `tracking.Run` puts it into words
        ("log_text", PermissionError(13, "Permission denied", "/artifacts")),
    ],
)
def test_an_artifact_store_that_cannot_be_written_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(mlflow.MlflowClient, call, refuse)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(DQOError, match=r"does not take the comparison .*Permission denied"):
        compare.run([store.runs["first"], store.runs["second"]], store.out, None, None, None)
    assert store.comparisons()[0].info.status == "FAILED"


def test_a_server_that_is_away_is_said_in_the_terms_of_this_command(tmp_path: Path):
    with pytest.raises(DQOError) as error:
        compare.run(["a", "b"], tmp_path, "http://127.0.0.1:1", None, None)
    assert str(error.value).startswith("--uri 'http://127.0.0.1:1': MLflow does not answer")
    assert "correct --uri" in str(error.value) and str(error.value).endswith("Nothing was compared.")


def test_the_judge_has_one_row(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    judge = {
        "complete": True, "identity": {"model": "a"}, "against": "reward_only", "responses": 2,
        "audit": {"passed": False}, "models": {"dqo": {"per_prompt": [1.0] * 15 + [0.0] * 5}},
    }  # fmt: skip
    folder = write(tmp_path / "one", *evaluation({"reward_only": 0.0, "dqo": 0.3}, PROMPTS, judge=judge))
    assert compare.run([f"{folder}:reward_only", f"{folder}:dqo"], tmp_path, None, None, None) == 0
    said = capsys.readouterr().out
    (row,) = [line for line in said.splitlines() if "Judge's win rate against reward_only" in line]
    assert re.search(r"the opponent +75% \[\d+%, \d+%\]", row)
    assert "! the judge has not passed its audit in the evaluation of DQO-RL: its verdicts must not decide" in said
