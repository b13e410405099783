"""A pipeline that may end after preparation: what counts as unchanged, and that nothing runs after it then."""

import json
from pathlib import Path

import mlflow
import pytest
import yaml
from kfp import compiler, dsl, local
from pipeline.tiny_runs import write_recipe

from components.prepare.component import prepare as prepare_component
from dqo import tracking
from dqo.recipe import Recipe, load
from dqo.stages import finish, prepare
from dqo.stages.context import PIPELINE_FILE, Context
from dqo.tasks import get_task
from pipelines.pipeline import build


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Rows of our own, which may change."""
    lines = get_task("story").bundled.read_text(encoding="utf-8").splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:40]) + "\n", encoding="utf-8")
    return tmp_path / "rows.jsonl"


@pytest.fixture
def context(tiny_policy, tiny_encoder, source, tmp_path) -> Context:
    data = {"source": str(source)}
    recipe = load(write_recipe(tmp_path / "tiny.yaml", tiny_policy, tiny_encoder, data=data))
    return Context(recipe, tmp_path / "workspace", tracking.default_uri(tmp_path))


def run_of(data: Path) -> str:
    return json.loads((data / PIPELINE_FILE).read_text())["mlflow_run_id"]


@pytest.mark.slow
def test_unchanged_is_a_finished_run_of_the_same_recipe_and_data(context, source, tmp_path, monkeypatch):
    client = mlflow.MlflowClient(context.mlflow_uri)
    assert prepare.run(context, tmp_path / "a", True) == "changed"
    first = run_of(tmp_path / "a")
    # An earlier run that has not finished does not count.
    client.set_terminated(first, "FAILED")
    assert prepare.run(context, tmp_path / "b", True) == "changed"
    assert run_of(tmp_path / "b") == first
    client.set_terminated(first, "FINISHED")
    # Nobody asked.
    assert prepare.run(context, tmp_path / "c") == "changed"
    client.set_terminated(first, "FINISHED")
    monkeypatch.setenv(tracking.KUBEFLOW_VARIABLE, "kubeflow-run-2")
    assert prepare.run(context, tmp_path / "d", True) == "unchanged"
    assert client.get_run(first).info.status == "FINISHED"
    # The exit handler neither ends another run nor makes a failed one.
    for state in ("SUCCEEDED", "RUNNING"):
        assert finish.run(context, state) == []
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (parent,) = client.search_runs(experiments, "tags.`dqo.stage` = 'pipeline'")
    assert parent.info.status == "FINISHED" and parent.data.tags["dqo.unchanged"] == "kubeflow-run-2"
    # A judge that was away has left something to do.
    client.set_tag(first, tracking.JUDGE_TAG, "incomplete")
    assert prepare.run(context, tmp_path / "judge", True) == "changed"
    client.set_tag(first, tracking.JUDGE_TAG, "complete")
    client.set_terminated(first, "FINISHED")
    assert prepare.run(context, tmp_path / "judged", True) == "unchanged"
    # Another row is other data: a new run, beside the finished one.
    monkeypatch.delenv(tracking.KUBEFLOW_VARIABLE)
    lines = get_task("story").bundled.read_text(encoding="utf-8").splitlines()
    with source.open("a", encoding="utf-8") as stream:
        stream.write(lines[40] + "\n")
    assert prepare.run(context, tmp_path / "e", True) == "changed"
    assert run_of(tmp_path / "e") != first and client.get_run(first).info.status == "FINISHED"
    # Another recipe is another run as well.
    other = Context(Recipe(**{**context.recipe.model_dump(), "seed": 9}), context.workspace, context.mlflow_uri)
    assert prepare.run(other, tmp_path / "f", True) == "changed"


@dsl.component(packages_to_install=[], install_kfp_package=False)
def train(data: dsl.Input[dsl.Dataset], model: dsl.Output[dsl.Model]):
    from pathlib import Path

    Path(model.path).write_text(data.name)


@dsl.component(packages_to_install=[], install_kfp_package=False)
def vary(variant: str, data: dsl.Input[dsl.Dataset], parent: dsl.Input[dsl.Model], model: dsl.Output[dsl.Model]):
    from pathlib import Path

    Path(model.path).write_text(variant)


@dsl.component(packages_to_install=[], install_kfp_package=False)
def gather(models: dsl.Input[list[dsl.Model]], data: dsl.Input[dsl.Dataset], marker: str):
    from pathlib import Path

    with Path(marker).open("a") as stream:
        stream.write(",".join(Path(model.path).read_text() for model in models) + "\n")


@pytest.mark.slow
def test_the_condition_decides_by_what_prepare_returns(context, tmp_path):
    """Kubeflow's local runner with the real component, and behind the condition tasks of the pipeline's shape."""
    marker = tmp_path / "marker"

    @dsl.pipeline(name="conditional")
    def pipeline(skip_unchanged: bool):
        prepared = prepare_component(
            recipe=context.recipe.to_json(),
            workspace=str(context.workspace),
            mlflow_uri=context.mlflow_uri,
            library="",
            source="",
            skip_unchanged=skip_unchanged,
        )
        data = prepared.outputs["data"]
        with dsl.If(prepared.outputs["Output"] == "changed"):
            sft = train(data=data)
            with dsl.ParallelFor(items=["x", "y"]) as variant:
                rl = vary(variant=variant, data=data, parent=sft.outputs["model"])
            gather(models=dsl.Collected(rl.outputs["model"]), data=data, marker=str(marker))

    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "root"), raise_on_error=True)
    pipeline(skip_unchanged=True)
    assert marker.read_text() == "x,y\n"
    client = mlflow.MlflowClient(context.mlflow_uri)
    (parent,) = [
        run
        for run in client.search_runs([e.experiment_id for e in client.search_experiments()])
        if run.data.tags.get("dqo.stage") == "pipeline"
    ]
    client.set_terminated(parent.info.run_id, "FINISHED")
    pipeline(skip_unchanged=True)
    assert marker.read_text() == "x,y\n"
    pipeline(skip_unchanged=False)
    assert marker.read_text() == "x,y\nx,y\n"


@pytest.mark.slow
def test_on_a_cluster_all_that_comes_after_preparation_stands_behind_the_condition(context, tmp_path):
    compiler.Compiler().compile(build(context.recipe), str(tmp_path / "p.yaml"))
    spec, *_ = yaml.safe_load_all((tmp_path / "p.yaml").read_text())
    (name,) = [name for name in spec["components"] if name.startswith("comp-condition") or "changed" in name]
    inside = set(spec["components"][name]["dag"]["tasks"])
    assert {"dqo-sft", "evaluate", "register"} <= inside and "prepare" not in inside
    (outside,) = [
        component["dag"]["tasks"]
        for component in spec["components"].values()
        if "prepare" in component.get("dag", {}).get("tasks", {})
    ]
    (branch,) = [task for task in outside.values() if task["componentRef"]["name"] == name]
    assert branch["triggerPolicy"]["condition"].endswith("== 'changed'")
    assert "cachingOptions" not in outside["prepare"] or not outside["prepare"]["cachingOptions"].get("enableCache")
    assert spec["root"]["inputDefinitions"]["parameters"]["skip_unchanged"]["defaultValue"] is False
