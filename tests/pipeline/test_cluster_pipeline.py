"""The pipeline as it is compiled for clusters: its golden files, what they ask Kubernetes for, and its exit handler."""

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import mlflow
import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler, dsl, local
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2
from pipeline.tiny_runs import GOLDEN, ROOT

from components.finish.component import finish
from components.preflight.component import preflight
from dqo.recipe import Judge, JudgingModel, load, parse
from dqo.tracking import default_uri
from pipelines.pipeline import build, compile_recipe

PROFILES = {path.stem: path for path in (Path(__file__).parent / "profiles").glob("*.yaml")}
RECIPES = {"quickstart": ROOT / "recipes" / "quickstart.yaml", **PROFILES}
LIGHT = {"exec-preflight", "exec-prepare", "exec-register", "exec-finish"}
HEAVY = {"exec-dqo-sft", "exec-dqo-rl", "exec-evaluate"}


def documents(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The golden file's pipeline, and the settings of each executor for Kubernetes."""
    spec, platform = yaml.safe_load_all((GOLDEN.parent / f"{name}.yaml").read_text(encoding="utf-8"))
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_golden_file_is_what_its_recipe_compiles_to(name: str, tmp_path: Path):
    """`make docs` writes it anew when a change is meant."""
    for file in ("one.yaml", "two.yaml"):
        compile_recipe(load(RECIPES[name]), tmp_path / file)
    text = (tmp_path / "one.yaml").read_text(encoding="utf-8")
    assert text == (tmp_path / "two.yaml").read_text(encoding="utf-8")
    masked = re.sub(r"(?m)^sdkVersion: .*$", "sdkVersion: kfp", text)
    assert masked == (GOLDEN.parent / f"{name}.yaml").read_text(encoding="utf-8")


def pod(spec: dict[str, Any], executor: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The pod that Kubeflow's driver makes of an executor, as far as its settings go.

    The settings pass through Kubeflow's own message first, which refuses what it does not know.
    """
    config = json_format.ParseDict(settings, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    container = spec["deploymentSpec"]["executors"][executor]["container"]
    volumes, mounts = [], []
    for number, claim in enumerate(config.pvc_mount):
        name = claim.pvc_name_parameter.runtime_value.constant.string_value
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": name}})
        mounts.append({"name": f"claim-{number}", "mountPath": claim.mount_path})
    for empty in config.empty_dir_mounts:
        volumes.append({"name": empty.volume_name, "emptyDir": {"medium": empty.medium, "sizeLimit": empty.size_limit}})
        mounts.append({"name": empty.volume_name, "mountPath": empty.mount_path})
    env = [
        {"name": pair.env_var, "valueFrom": {"secretKeyRef": {
            "name": secret.secret_name, "key": pair.secret_key, "optional": secret.optional}}}
        for secret in config.secret_as_env for pair in secret.key_to_env
    ]  # fmt: skip
    env += [
        {"name": field.name, "valueFrom": {"fieldRef": {"fieldPath": field.field_path}}}
        for field in config.field_path_as_env
    ]
    resources = container["resources"]
    limits = {"memory": resources["resourceMemoryLimit"]}
    if "accelerator" in resources:
        limits[resources["accelerator"]["resourceType"]] = resources["accelerator"]["resourceCount"]
    security = config.security_context
    identity = {"runAsUser": security.run_as_user} if security.HasField("run_as_user") else {}
    identity |= {"runAsGroup": security.run_as_group} if security.HasField("run_as_group") else {}
    terms = [
        {"matchExpressions": [
            {"key": e.key, "operator": e.operator} | ({"values": list(e.values)} if e.values else {})
            for e in term.match_expressions]}
        for term in config.node_affinity
    ]  # fmt: skip
    weights = [term.weight if term.HasField("weight") else None for term in config.node_affinity]
    affinity = {}
    if None in weights:
        demanded = [term for term, weight in zip(terms, weights, strict=True) if weight is None]
        affinity["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": demanded}
    preferred = [{"weight": w, "preference": t} for t, w in zip(terms, weights, strict=True) if w is not None]
    if preferred:
        affinity["preferredDuringSchedulingIgnoredDuringExecution"] = preferred
    body: dict[str, Any] = {
        "containers": [{
            "name": "main", "image": container["image"], "command": container["command"], "volumeMounts": mounts,
            "env": [*container.get("env", []), *env],
            "resources": {"requests": {"cpu": resources["resourceCpuRequest"]}, "limits": limits},
            "securityContext": identity | {"runAsNonRoot": security.run_as_non_root},
        }],
        "volumes": volumes,
        "nodeSelector": dict(config.node_selector.labels),
        "tolerations": [json_format.MessageToDict(toleration) for toleration in config.tolerations],
        "affinity": {"nodeAffinity": affinity} if affinity else {},
        "imagePullSecrets": [{"name": secret.secret_name} for secret in config.image_pull_secret],
    }  # fmt: skip
    if config.image_pull_policy:
        body["containers"][0]["imagePullPolicy"] = config.image_pull_policy
    if config.active_deadline_seconds:
        body["activeDeadlineSeconds"] = config.active_deadline_seconds
    labels = {"labels": dict(config.pod_metadata.labels)} if config.pod_metadata.labels else {}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "task"} | labels, "spec": body}


def pods(name: str) -> dict[str, dict[str, Any]]:
    spec, settings = documents(name)
    return {executor: pod(spec, executor, settings[executor]) for executor in spec["deploymentSpec"]["executors"]}


@pytest.mark.parametrize("name", RECIPES)
def test_a_golden_file_holds_what_kubeflow_and_kubernetes_take(name: str):
    spec, settings = documents(name)
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    assert set(settings) == set(spec["deploymentSpec"]["executors"]) == LIGHT | HEAVY
    for task in pods(name).values():
        for version in ("1.30", "1.33", "1.36"):
            kubernetes_validate.validate(task, version, strict=True)


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_tasks_that_compute_go_to_the_accelerators(name: str):
    recipe = load(RECIPES[name])
    for executor, task in pods(name).items():
        (container,) = task["spec"]["containers"]
        count = container["resources"]["limits"].get("nvidia.com/gpu")
        shm = [mount["mountPath"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        # Training over several nodes takes place in a TrainJob, for which its task waits.
        heavy = executor in HEAVY if recipe.distributed.nodes == 1 else executor == "exec-evaluate"
        on_gpus = heavy and recipe.resources.accelerator is not None
        assert count == (str(recipe.resources.accelerator_count) if on_gpus else None), executor
        assert bool(task["spec"]["tolerations"]) == on_gpus
        assert bool(shm) == on_gpus
        queue = task["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
        assert queue == (recipe.resources.queue if heavy else None)
        assert container["resources"]["limits"]["memory"] == (recipe.resources.memory if heavy else "8Gi")
        assert container["securityContext"]["runAsNonRoot"] is True
        claims = [v["persistentVolumeClaim"]["claimName"] for v in task["spec"]["volumes"] if "emptyDir" not in v]
        assert claims == [c for c in (recipe.resources.workspace_claim, recipe.resources.models_claim) if c]


def test_everything_that_a_task_can_be_told():
    """Expected by hand from profiles/gpu-large.yaml."""
    tasks = pods("gpu-large")
    task = tasks["exec-dqo-rl"]["spec"]
    (container,) = task["containers"]
    assert container["image"].startswith("registry.example/dqo-trainer@sha256:")
    assert container["imagePullPolicy"] == "IfNotPresent" and task["imagePullSecrets"] == [{"name": "registry"}]
    assert container["resources"] == {
        "requests": {"cpu": "32"}, "limits": {"memory": "384Gi", "nvidia.com/gpu": "4"}
    }  # fmt: skip
    assert container["securityContext"] == {"runAsUser": 2000, "runAsNonRoot": True}
    assert task["nodeSelector"] == {"accelerator": "a100-80gb"}
    assert task["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "research"},
    ]
    assert task["affinity"]["nodeAffinity"] == {
        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [
            {"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["a", "b"]},
            {"key": "spot", "operator": "DoesNotExist"},
        ]}]},
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 50, "preference": {"matchExpressions": [{"key": "disk", "operator": "In", "values": ["nvme"]}]}}
        ],
    }  # fmt: skip
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/workspace", "/models", "/dev/shm"}
    assert [v["emptyDir"] for v in task["volumes"] if "emptyDir" in v] == [{"medium": "Memory", "sizeLimit": "32Gi"}]
    plain = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    assert plain == {
        "HOME": "/tmp", "HF_HOME": "/models/huggingface", "XDG_CACHE_HOME": "/workspace/cache", "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONUNBUFFERED": "1",
        "MLFLOW_S3_ENDPOINT_URL": "http://s3:8333", "NCCL_DEBUG": "WARN",
    }  # fmt: skip
    secret = {
        entry["name"]: entry["valueFrom"]["secretKeyRef"]
        for entry in container["env"]
        if "secretKeyRef" in entry.get("valueFrom", {})
    }
    assert {name: (ref["name"], ref["key"]) for name, ref in secret.items()} == {
        "MLFLOW_TRACKING_USERNAME": ("mlflow-user", "username"),
        "MLFLOW_TRACKING_PASSWORD": ("mlflow-user", "password"),
        "AWS_ACCESS_KEY_ID": ("s3-keys", "access-key-id"),
        "AWS_SECRET_ACCESS_KEY": ("s3-keys", "secret-access-key"),
        "HF_TOKEN": ("hub", "token"),
        "JUDGE_API_KEY": ("judge-key", "api-key"),
    }
    # Else a pod would wait for ever for a Secret that is missing, where preflight should name it.
    assert all(ref["optional"] for ref in secret.values())
    deadlines = {name: task["spec"].get("activeDeadlineSeconds") for name, task in tasks.items()}
    assert deadlines == dict.fromkeys(tasks) | {
        "exec-prepare": 1800, "exec-dqo-sft": 21600, "exec-dqo-rl": 86400
    }  # fmt: skip


def tasks_of(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every task by name, those of inner graphs included."""
    graphs = [spec["root"], *spec["components"].values()]
    return {name: task for graph in graphs for name, task in graph.get("dag", {}).get("tasks", {}).items()}


def test_retries_and_caching():
    spec, _ = documents("gpu-large")
    tasks = tasks_of(spec)
    steps = {"prepare", "dqo-sft", "dqo-rl", "evaluate", "register"}
    cached = {name for name, task in tasks.items() if task.get("cachingOptions", {}).get("enableCache")}
    assert cached == steps - {"evaluate", "prepare"}  # one by the recipe, one since data change unseen
    policy = {"maxRetryCount": 4, "backoffDuration": "30s", "backoffFactor": 3.0, "backoffMaxDuration": "172800s"}
    assert {name for name, task in tasks.items() if task.get("retryPolicy") == policy} == steps
    assert "retryPolicy" not in tasks["preflight"]


@pytest.mark.parametrize("cluster", [True, False])
@pytest.mark.parametrize(("caching", "cached"), [({}, False), ({"evaluate": True}, True)])
def test_an_evaluation_with_a_judge_is_not_cached_unless_the_recipe_says_so(
    cluster: bool, caching: dict[str, bool], cached: bool, tmp_path: Path
):
    recipe = load(PROFILES["gpu-large"])
    resources = recipe.resources.model_copy(update={"caching": caching})
    judge = Judge(endpoint="http://judge:8000/v1", model="m")
    judged = recipe.model_copy(update={"judge": judge, "resources": resources})
    compiler.Compiler().compile(build(judged, cluster=cluster), str(tmp_path / "judged.yaml"))
    tasks = tasks_of(next(yaml.safe_load_all((tmp_path / "judged.yaml").read_text())))
    assert tasks["evaluate"].get("cachingOptions", {}).get("enableCache", False) is cached
    assert tasks["register"]["cachingOptions"]["enableCache"]


def test_an_evaluation_by_a_reward_model_is_cached_like_any_other(tmp_path: Path):
    """It cannot have been away."""
    judge = Judge(reward=JudgingModel(model="org/reward-model"))
    judged = load(PROFILES["gpu-large"]).model_copy(update={"judge": judge})
    caching = judged.resources.model_copy(update={"caching": {}})
    judged = judged.model_copy(update={"resources": caching})
    compiler.Compiler().compile(build(judged, cluster=True), str(tmp_path / "judged.yaml"))
    tasks = tasks_of(next(yaml.safe_load_all((tmp_path / "judged.yaml").read_text())))
    assert tasks["evaluate"]["cachingOptions"]["enableCache"]


@pytest.mark.parametrize("name", RECIPES)
def test_preflight_comes_first_and_the_exit_handler_whatever_happens(name: str):
    spec, _ = documents(name)
    tasks = tasks_of(spec)
    assert set(spec["root"]["dag"]["tasks"]) == {"exit-handler-1", "finish"}
    assert tasks["finish"]["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert tasks["finish"]["inputs"]["parameters"]["status"] == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}
    inner = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert [task for task in inner if not inner[task].get("dependentTasks")] == ["preflight"]
    assert inner["prepare"]["dependentTasks"] == ["preflight"]


def test_the_local_run_has_the_five_steps_and_nothing_for_kubernetes(tmp_path: Path):
    compiler.Compiler().compile(build(load(PROFILES["gpu-large"]), cluster=False), str(tmp_path / "local.yaml"))
    (spec,) = yaml.safe_load_all((tmp_path / "local.yaml").read_text())
    assert set(spec["deploymentSpec"]["executors"]) == (LIGHT | HEAVY) - {"exec-preflight", "exec-finish"}
    assert all("resources" not in e["container"] for e in spec["deploymentSpec"]["executors"].values())
    assert set(spec["root"]["dag"]["tasks"]) == {"prepare", "dqo-sft", "for-loop-2", "evaluate", "register"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_failing_preflight_reaches_mlflow_through_the_exit_handler(tiny_policy, tiny_encoder, tmp_path, monkeypatch):
    """Both real components in Kubeflow's runner: preflight names two problems, the exit handler writes the end."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DQO_KUBEFLOW_RUN", "run-1")
    recipe = parse(
        json.dumps(
            {
                "name": "broken",
                "policy": {"model": str(tiny_policy)},
                "encoder": {"model": str(tmp_path / "nothing")},
                "resources": {"secrets": {"hub": "hub-token"}},
            }
        )
    )
    where = {"recipe": recipe.to_json(), "workspace": str(tmp_path / "work"), "mlflow_uri": default_uri(tmp_path)}

    @dsl.pipeline
    def pipeline():
        with dsl.ExitHandler(finish(**where)):
            preflight(**where)

    monkeypatch.delenv("HF_TOKEN", raising=False)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "root"), raise_on_error=True)
    with pytest.raises(RuntimeError, match="preflight"):
        pipeline()
    client = mlflow.MlflowClient(where["mlflow_uri"])
    experiment = client.get_experiment_by_name("dqo")
    runs = {run.data.tags["mlflow.runName"]: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"preflight", "broken"}
    assert runs["broken"].info.status == "FAILED"
    assert runs["broken"].data.tags["dqo.state"] == "FAILED"
    assert runs["broken"].data.tags["dqo.kubeflow_run_id"] == "run-1"
