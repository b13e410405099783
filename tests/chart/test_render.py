"""Every scenario renders with both versions of Helm into objects that Kubernetes takes."""

import copy
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from helm import CHART, KFP, MAJORS, MONITOR, SCENARIOS, TRAINER, render, run
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from schemas import errors
from services.stack import weed
from update_golden import GOLDEN, golden
from yamllint import linter
from yamllint.config import YamlLintConfig

from dqo.recipe import load, parse

ROOT = CHART.parents[1]
KUBERNETES = ("1.30", "1.33", "1.35", "1.36")  # the oldest of Chart.yaml, and later ones
KUBEFLOW = {"Pipeline", "PipelineVersion"}
# Kinds of others without which the scenario's installation fails; by hand, from its values.
NEEDED = {
    "air-gapped": KUBEFLOW | {"TrainingRuntime"},
    "external-services": set(),
    "full": KUBEFLOW | {"TrainingRuntime", "ServiceMonitor"},
    "minimal": set(),
    "multi-node": {"TrainingRuntime"},
    "no-mlflow": set(),
}

each_scenario = pytest.mark.parametrize("scenario", SCENARIOS)
each_helm = pytest.mark.parametrize("major", MAJORS)


def identity(thing: dict[str, Any]) -> tuple[str, str, str]:
    return thing["kind"], thing["metadata"].get("namespace", ""), thing["metadata"]["name"]


def test_there_are_the_scenarios_that_the_documents_name():
    assert set(SCENARIOS) == {"air-gapped", "external-services", "full", "minimal", "multi-node", "no-mlflow"}


@each_helm
@each_scenario
def test_lint(scenario: str, major: int):
    done = run(major, "lint", "--strict", CHART, "--values", CHART / "ci" / f"{scenario}-values.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@each_scenario
def test_both_versions_of_helm_render_the_same(scenario: str):
    three, four = (render(scenario, major=major).objects for major in MAJORS)
    assert three == four
    assert len(four) >= 4


@each_scenario
def test_objects_fit_kubernetes(scenario: str):
    wrong = [
        f"{version} {identity(thing)}: {message}"
        for thing in render(scenario).objects
        for version in KUBERNETES
        for message in errors(thing, version)
    ]
    assert wrong == []


def test_custom_kinds_are_checked_against_their_own_definitions():
    """Fields that the definitions of these releases have are taken though the chart sets none of them."""
    full = render("full")
    runtime = copy.deepcopy(full.of("TrainingRuntime")[0])
    runtime["spec"]["template"]["spec"]["ttlSecondsAfterFinished"] = 5
    runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["volumes"].append(
        {"name": "x", "emptyDir": {"sizeLimit": 5}}  # a quantity is a number or a text
    )
    version = copy.deepcopy(full.of("PipelineVersion")[0])
    version["spec"] |= {"versionName": "one", "platformSpec": {"anything": [1]}}
    monitor = copy.deepcopy(full.of("ServiceMonitor")[0])
    monitor["spec"]["endpoints"][0]["scheme"] = "https"
    for thing in (runtime, version, monitor):
        assert errors(thing, "1.36") == []
    version["spec"]["versionName"] = "One"  # its pattern
    assert len(errors(version, "1.36")) == 1


def test_the_validation_can_fail():
    """Each kind of check refuses an object with one mistake."""
    full = render("full").objects

    def broken(kind: str, change: Any) -> list[str]:
        thing = copy.deepcopy(next(thing for thing in full if thing["kind"] == kind))
        assert errors(thing, "1.36") == []
        change(thing)
        return errors(thing, "1.36")

    assert broken("Deployment", lambda d: d["spec"].update(replicas="2"))
    assert broken("Deployment", lambda d: d["spec"]["template"]["spec"].update(automountToken=False))
    assert broken("TrainingRuntime", lambda d: d["spec"]["mlPolicy"].update(nodes=2))
    assert broken("TrainingRuntime", lambda d: d["spec"]["mlPolicy"].update(numNodes="two"))
    assert broken("PipelineVersion", lambda d: d["spec"]["pipelineSpec"].update(rooot={}))
    assert broken("PipelineVersion", lambda d: d["spec"].update(pipelineNames="x"))
    assert broken("PipelineVersion", lambda d: d["spec"].pop("pipelineSpec"))
    assert broken("Pipeline", lambda d: d["metadata"].update(label={}))
    assert broken("ServiceMonitor", lambda d: d["spec"]["endpoints"][0].update(every="30s"))
    assert broken("ServiceMonitor", lambda d: d["spec"]["endpoints"][0].update(interval="half a minute"))
    assert broken("ServiceMonitor", lambda d: d["spec"].pop("selector"))
    assert errors({"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "x"}}, "1.36")


@each_scenario
def test_names_are_unique_and_short_enough(scenario: str):
    names = [identity(thing) for thing in render(scenario).objects]
    assert len(names) == len(set(names))
    long = ("--set", f"fullnameOverride={'a' * 60}")
    for thing in render(scenario, *long).objects:
        limit = 253 if thing["kind"] in ("ConfigMap", "PipelineVersion", "Pipeline") else 63
        assert len(thing["metadata"]["name"]) <= limit
        for value in thing["metadata"]["labels"].values():
            assert re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?", value) and len(value) <= 63


@each_scenario
def test_every_object_has_the_standard_labels_and_a_namespace(scenario: str):
    for thing in render(scenario).objects:
        labels = thing["metadata"]["labels"]
        in_none = thing["kind"] in ("ClusterRole", "ClusterRoleBinding")
        assert thing["metadata"].get("namespace") == (None if in_none else "ml"), identity(thing)
        assert labels["app.kubernetes.io/name"] == "dqo"
        assert labels["app.kubernetes.io/instance"] == "dqo"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["app.kubernetes.io/version"] == labels["helm.sh/chart"].removeprefix("dqo-")


def test_common_labels_and_pull_secrets_reach_everything():
    rendered = render("full")
    assert all(thing["metadata"]["labels"]["team"] == "research" for thing in rendered.objects)
    for thing in rendered.of("Deployment", "StatefulSet"):
        assert thing["spec"]["template"]["metadata"]["labels"]["team"] == "research"
        assert thing["spec"]["template"]["spec"]["imagePullSecrets"] == [{"name": "registry"}]


def test_custom_kinds_come_where_the_cluster_knows_them():
    def kinds(*apis: str, arguments: tuple[str, ...] = ()) -> set[str]:
        scrape = ("--set", "serviceMonitor.enabled=true,mlflow.metrics.enabled=true")
        return {thing["kind"] for thing in render("minimal", *scrape, *arguments, apis=apis).objects}

    assert kinds().isdisjoint(KUBEFLOW | {"TrainingRuntime", "ServiceMonitor"})
    assert kinds(KFP) == kinds() | KUBEFLOW
    assert kinds(TRAINER) == kinds() | {"TrainingRuntime"}
    assert kinds(MONITOR) == kinds() | {"ServiceMonitor"}
    sections = ("pipelines", "trainer.runtime", "serviceMonitor")
    never, always = (
        tuple(part for section in sections for part in ("--set", f"{section}.install={word}"))
        for word in ("never", "always")
    )
    assert kinds(KFP, TRAINER, MONITOR, arguments=never) == kinds()
    assert kinds(arguments=always) == kinds(KFP, TRAINER, MONITOR)
    assert "ServiceMonitor" not in {thing["kind"] for thing in render("minimal", apis=(MONITOR,)).objects}


@each_scenario
def test_what_a_scenario_needs_on_the_cluster_is_written_down(scenario: str):
    def custom(**apis: Any) -> set[str]:
        groups = {thing["kind"]: thing["apiVersion"].rpartition("/")[0] for thing in render(scenario, **apis).objects}
        return {kind for kind, group in groups.items() if "." in group and not group.endswith(".k8s.io")}

    assert custom(apis=()) == NEEDED[scenario]
    if scenario == "no-mlflow":
        assert custom() == KUBEFLOW | {"TrainingRuntime"}
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{scenario}-values.yaml`")]
    assert {name for name in KUBEFLOW | {"TrainingRuntime", "ServiceMonitor"} if f"`{name}`" in row} == NEEDED[scenario]


def test_seaweedfs_knows_its_options():
    (container,) = render("full").one("StatefulSet", "dqo-seaweedfs")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["weed", "mini"] and "-master.telemetry=false" in container["args"]
    done = subprocess.run([weed(), "mini", "-h"], capture_output=True, text=True)
    known = set(re.findall(r"(?m)^  -([\w.]+)", done.stdout + done.stderr))
    assert {argument[1:].partition("=")[0] for argument in container["args"]} <= known


def test_the_default_values_are_those_of_the_minimal_scenario():
    assert render("").objects == render("minimal").objects


def test_a_new_version_of_the_chart_restarts_nothing_by_itself(tmp_path: Path):
    """Data in a pod, and hours of loading a judge, hang on it."""
    later = tmp_path / "dqo"
    shutil.copytree(CHART, later)
    chart = yaml.safe_load((later / "Chart.yaml").read_text())
    (later / "Chart.yaml").write_text(yaml.safe_dump(chart | {"version": "0.1.1", "appVersion": "0.1.1"}))
    for scenario in ("minimal", "full"):
        now, then = render(scenario), render(scenario, chart=later)
        workloads = now.of("Deployment", "StatefulSet")
        assert workloads
        for thing in workloads:
            other = then.one(thing["kind"], thing["metadata"]["name"])
            assert other["metadata"]["labels"] != thing["metadata"]["labels"]
            assert other["spec"] == thing["spec"]


def test_a_changed_configuration_restarts_mlflow():
    def pod(*arguments: str) -> Any:
        return render("external-services", *arguments).one("Deployment", "dqo-mlflow")["spec"]["template"]

    assert pod("--set", "mlflow.auth.defaultPermission=EDIT") != pod()
    assert pod("--set", "mlflow.service.type=NodePort") == pod()


# --- pipelines and recipes ---


@pytest.mark.parametrize("recipe", ["quickstart", "gpu-7b"])
def test_a_pipeline_is_the_compiled_one_with_this_installation_in_it(recipe: str, tmp_path: Path):
    from pipelines.pipeline import compile_recipe

    compile_recipe(load(ROOT / "recipes" / f"{recipe}.yaml"), tmp_path / "pipeline.yaml")
    expected, platform = yaml.safe_load_all((tmp_path / "pipeline.yaml").read_text())
    executors = expected["deploymentSpec"]["executors"]
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert len(executors) == len(settings) == 7
    here = {"HF_HOME": "/models/huggingface", "XDG_CACHE_HOME": "/workspace/cache"}
    for executor in executors.values():
        container = executor["container"]
        assert container["image"] == "dqo-trainer:0.1.0"
        container["image"] = "mirror/dqo-trainer:next"
        variables = {entry["name"]: entry["value"] for entry in container["env"]} | here
        container["env"] = [{"name": name, "value": value} for name, value in sorted(variables.items())]
    claims = {"/models": "dqo-model-cache", "/workspace": "dqo-workspace"}
    user = {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"}
    for setting in settings.values():
        setting |= {
            "imagePullPolicy": "IfNotPresent",
            "imagePullSecret": [{"secretName": "registry", "secretNameParameter": constant("registry")}],
            "pvcMount": [
                {"constant": name, "mountPath": path, "pvcNameParameter": constant(name)}
                for path, name in claims.items()
            ],
            "secretAsEnv": [
                {
                    "secretName": "mlflow-user",
                    "secretNameParameter": constant("mlflow-user"),
                    "keyToEnv": [{"secretKey": key, "envVar": variable} for key, variable in user.items()],
                    "optional": True,
                }
            ],
        }
        json_format.ParseDict(setting, KubernetesExecutorConfig())
    uri = expected["root"]["inputDefinitions"]["parameters"]["mlflow_uri"]
    assert uri["defaultValue"] == ""
    uri["defaultValue"] = "http://dqo-mlflow.ml.svc:5000"
    image = ("--set", "imageRegistry=mirror,trainer.image.tag=next")
    versions = {v["spec"]["pipelineName"]: v["spec"] for v in render("full", *image).of("PipelineVersion")}
    assert versions[f"dqo-{recipe}"]["pipelineSpec"] == expected
    assert versions[f"dqo-{recipe}"]["platformSpec"] == platform
    assert versions[f"dqo-{recipe}"]["description"] == expected["pipelineInfo"]["description"]


def constant(name: str) -> dict[str, Any]:
    return {"runtimeValue": {"constant": name}}


def test_pipelines_of_another_namespace_name_nothing_that_is_only_here():
    """A claim or Secret of this namespace does not exist there; a pod would wait for it."""
    there = render("full", "--set", "pipelines.namespace=kubeflow").of("PipelineVersion")
    for version in there:
        for setting in version["spec"]["platformSpec"]["platforms"]["kubernetes"]["deploymentSpec"][
            "executors"
        ].values():
            assert not setting.keys() & {"pvcMount", "secretAsEnv"}
            assert setting["imagePullPolicy"] == "IfNotPresent"


def test_a_changed_pipeline_is_a_new_version():
    """Kubeflow refuses to change one."""

    def version(*arguments: str) -> str:
        return render("no-mlflow", *arguments).of("PipelineVersion")[0]["metadata"]["name"]

    assert version("--set", "trainer.image.tag=next") != version()
    assert version("--set", "kueue.queueName=q") == version()


def test_pipelines_may_live_in_kubeflows_namespace():
    rendered = render("no-mlflow", "--set", "pipelines.namespace=kubeflow")
    places = {thing["kind"]: thing["metadata"]["namespace"] for thing in rendered.objects}
    assert places["Pipeline"] == places["PipelineVersion"] == "kubeflow"
    assert places["Role"] == places["TrainingRuntime"] == "ml"


def test_the_recipes_are_recipes():
    data = render("full").one("ConfigMap", "dqo-recipes")["data"]
    assert set(data) == {path.name for path in (ROOT / "recipes").glob("*.yaml")} | {"ours.yaml"}
    for name, text in data.items():
        recipe = parse(text, name)
        source = ROOT / "recipes" / name
        assert recipe.name == name.removesuffix(".yaml")
        if source.exists():
            assert recipe == load(source)


def test_generated_files_are_up_to_date():
    """`make docs` writes them: compiled pipelines, copies of the recipes, the README's table."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    files = generate.chart_files()
    folders = [CHART / "files" / name for name in ("pipelines", "recipes")]
    assert {path for folder in folders for path in folder.iterdir()} == set(files) - {CHART / "README.md"}
    for path, text in files.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.relative_to(ROOT)}: run `make docs`"


# --- text ---


def test_the_minimal_scenario_is_the_one_that_was_reviewed():
    """After a change that is wanted: `python tests/chart/update_golden.py`, and look at its diff."""
    assert GOLDEN.read_text(encoding="utf-8") == golden()


LINT = YamlLintConfig(
    """
extends: default
rules:
  line-length: {max: 140, allow-non-breakable-words: true}
  document-start: disable
  comments: {min-spaces-from-content: 1}
  braces: {max-spaces-inside: 0}
  comments-indentation: disable
"""
)
# The compiled pipelines hold long lines, which are Kubeflow's.
LINT_RENDERED = YamlLintConfig(
    """
extends: default
rules:
  line-length: disable
  document-start: disable
  indentation: {spaces: consistent, indent-sequences: whatever}
  comments-indentation: disable
  trailing-spaces: disable
"""
)


@pytest.mark.parametrize("path", ["values.yaml", *(f"ci/{name}-values.yaml" for name in SCENARIOS)])
def test_values_are_tidy(path: str):
    assert list(linter.run((CHART / path).read_text(encoding="utf-8"), LINT)) == []


def test_rendered_text_is_tidy():
    without_pipelines = ("--set", "pipelines.install=never")  # 2,000 lines that Helm's toYaml wrote
    for scenario in ("minimal", "full"):
        text = render(scenario, *without_pipelines).text
        assert list(linter.run(text, LINT_RENDERED)) == [], scenario
