"""The launcher of training over several nodes against an HTTP server with the paths of Kubernetes that it uses."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
from chart import crds
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubernetes import client

from components.trainjob import CALLS, TrainJobLauncher, job_name, manifest
from dqo.errors import DQOError
from dqo.recipe import Recipe, parse
from dqo.stages import processes
from dqo.stages.context import NodesJob
from dqo.tracking import KUBEFLOW_VARIABLE

RECIPE = {
    "name": "wide",
    "distributed": {"nodes": 2},
    "resources": {
        "image": "registry.example/dqo-trainer@sha256:" + "0" * 64,
        "cpu": "16",
        "memory": "64Gi",
        "accelerator": "nvidia.com/gpu",
        "accelerator_count": 2,
        "workspace_claim": "checkpoints",
    },
}
OWNER = {"name": "task-pod", "uid": "1234"}
PATH = re.compile(r"/apis/trainer\.kubeflow\.org/v1alpha1/namespaces/ml/trainjobs(?:/([\w-]+))?")
PODS = re.compile(r"/api/v1/namespaces/ml/pods(?:/([\w-]+))?(/log)?")


def recipe(**resources: Any) -> Recipe:
    return parse(json.dumps(RECIPE | {"resources": RECIPE["resources"] | resources}))


def nodes_job(of: Recipe | None = None, name: str = "rl-reward_only", **changes: Any) -> NodesJob:
    given = {
        "recipe": of or recipe(),
        "name": name,
        "key": "0123456789ab",
        "workspace": Path("/workspace"),
        "module": "dqo.stages.worker",
        "arguments": ("/workspace/stages/x/processes/job.json",),
        "environment": {"MLFLOW_TRACKING_URI": "http://mlflow:5000"},
        "output": Path("/workspace/stages/x/output/history.jsonl"),
    }
    return NodesJob(**(given | changes))


# --- the manifest ---


def read_back(document: dict[str, Any]) -> dict[str, Any]:
    """What Trainer's own model of the API keeps of a manifest; it drops what it does not know."""
    return TrainerV1alpha1TrainJob.from_dict(document).to_dict()


@pytest.fixture
def bare_environment(monkeypatch):
    for name in ("HOME", "HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "MLFLOW_DISABLE_TELEMETRY", "PYTHONUNBUFFERED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/tmp")


def test_everything_that_a_recipe_can_ask_of_its_nodes(bare_environment):
    """Expected by hand from the fields of TrainJob."""
    full = recipe(
        queue="research",
        models_claim="models",
        shared_memory="16Gi",
        node_selector={"gpu": "a100"},
        tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        node_affinity=[
            {"expressions": [{"key": "zone", "values": ["a", "b"]}]},
            {"expressions": [{"key": "spot", "operator": "DoesNotExist"}], "weight": 10},
        ],
        secrets={"tracking": "mlflow-user", "hub": "hub"},
        environment={"NCCL_DEBUG": "WARN"},
        image_pull_secrets=["registry"],
        run_as_user=2000,
        run_as_group=None,
        timeouts={"rl": 1.5, "sft": 3},
    )
    made = manifest(nodes_job(full), OWNER)
    assert read_back(made) == made and crds.errors(made) == []
    assert made["metadata"]["labels"] == {
        "app.kubernetes.io/part-of": "dqo",
        "dqo/stage": "rl-reward_only",
        "dqo/stage-key": "0123456789ab",
        "kueue.x-k8s.io/queue-name": "research",
    }
    assert made["metadata"]["ownerReferences"] == [
        {"apiVersion": "v1", "kind": "Pod", "name": "task-pod", "uid": "1234"}
    ]
    spec = made["spec"]
    assert spec["activeDeadlineSeconds"] == 5400
    assert spec["runtimeRef"] == {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "dqo-torch"}
    assert spec["trainer"] == {
        "image": "registry.example/dqo-trainer@sha256:" + "0" * 64,
        "command": ["torchrun", "--max-restarts=0", "-m", "dqo.stages.worker"],
        "args": ["/workspace/stages/x/processes/job.json"],
        "numNodes": 2,
        "numProcPerNode": 2,
        "resourcesPerNode": {
            "requests": {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "2"},
            "limits": {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "2"},
        },
        "env": [
            {"name": "HOME", "value": "/tmp"},
            {"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow:5000"},
            {"name": "NCCL_DEBUG", "value": "WARN"},
            *(
                {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
                for variable, secret, key in (
                    ("MLFLOW_TRACKING_USERNAME", "mlflow-user", "username"),
                    ("MLFLOW_TRACKING_PASSWORD", "mlflow-user", "password"),
                    ("HF_TOKEN", "hub", "token"),
                )
            ),
        ],
    }
    (patch,) = spec["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    assert replicated["template"]["spec"]["template"]["spec"] == {
        "nodeSelector": {"gpu": "a100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]}
                    ]
                },
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 10,
                        "preference": {"matchExpressions": [{"key": "spot", "operator": "DoesNotExist"}]},
                    }
                ],
            }
        },
        "imagePullSecrets": [{"name": "registry"}],
        "securityContext": {"runAsUser": 2000, "runAsNonRoot": True},
        "volumes": [
            {"name": "dqo-workspace", "persistentVolumeClaim": {"claimName": "checkpoints"}},
            {"name": "dqo-models", "persistentVolumeClaim": {"claimName": "models"}},
            {"name": "dqo-shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
        ],
        "containers": [
            {
                "name": "node",
                "volumeMounts": [
                    {"name": "dqo-workspace", "mountPath": "/workspace"},
                    {"name": "dqo-models", "mountPath": "/models"},
                    {"name": "dqo-shm", "mountPath": "/dev/shm"},
                ],
            }
        ],
    }


def test_what_a_recipe_leaves_out_stays_the_runtimes(bare_environment):
    small = parse(
        json.dumps(
            {
                "name": "a",
                "distributed": {"nodes": 2, "processes": 2, "runtime": "other-torch"},
                "resources": {"workspace_claim": "w", "cpu": "5", "run_as_user": None, "run_as_group": None},
            }
        )
    )
    made = manifest(nodes_job(small))
    assert read_back(made) == made and crds.errors(made) == []
    assert "ownerReferences" not in made["metadata"] and "activeDeadlineSeconds" not in made["spec"]
    assert "kueue.x-k8s.io/queue-name" not in made["metadata"]["labels"]
    assert made["spec"]["runtimeRef"]["name"] == "other-torch"
    pod = made["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    assert set(pod["template"]["spec"]["template"]["spec"]) == {"containers", "volumes"}
    assert made["spec"]["trainer"]["numProcPerNode"] == 2
    # Two processes share five processors; torchrun would give each one thread.
    assert {"name": "OMP_NUM_THREADS", "value": "2"} in made["spec"]["trainer"]["env"]


def test_no_variable_is_one_that_trainer_sets_itself():
    """Trainer's webhook refuses them."""
    names = {one["name"] for one in manifest(nodes_job())["spec"]["trainer"]["env"]}
    assert not any(name.startswith("PET_") for name in names)


def test_the_name_follows_from_stage_and_workspace_and_fits_kubernetes():
    name = job_name(nodes_job())
    assert re.fullmatch(r"dqo-rl-reward-only-[0-9a-f]{12}", name)
    assert name == job_name(nodes_job(recipe(image="another:1", memory="1Ti")))
    others = [
        nodes_job(key="0123456789ac"),
        nodes_job(recipe(workspace_claim="elsewhere")),
        nodes_job(workspace=Path("/workspace/team")),
    ]
    assert len({name, *map(job_name, others)}) == 4
    # Pods are called <name>-node-0-0-xxxxx, hosts <name>-node-0-0: 63 characters at most.
    long = job_name(nodes_job(name="rl-" + "x" * 60))
    assert len(long + "-node-0-999-xxxxx") <= 63 and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])", long)


def test_the_workspace_has_to_lie_on_the_claim():
    with pytest.raises(DQOError, match=r"workspace: got /data; .* has to lie below /workspace"):
        manifest(nodes_job(workspace=Path("/data")))


# --- the launcher ---


class Cluster:
    """As much of Kubernetes as the launcher asks for: TrainJobs, their pods, and the pods' logs.

    Attributes:
        asked: Verb, API group and resource of each request.
        story: What happens to the job, one entry each time that it is looked at.
        refusals: Status and message of the next answers to a verb on a resource.
        denied: Verb, API group and resource of the rights that the account does not have.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.created: list[dict[str, Any]] = []
        self.tried: list[dict[str, Any]] = []
        self.story: list[Callable[[dict[str, Any]], None]] = []
        self.refusals: dict[tuple[str, str], list[tuple[int, str]]] = {}
        self.selectors: set[str] = set()
        self.denied: set[tuple[str, str, str]] = set()
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                cluster.answer(self, "GET")

            def do_POST(self) -> None:
                cluster.answer(self, "POST")

            def do_DELETE(self) -> None:
                cluster.answer(self, "DELETE")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, method: str) -> None:
        url = urlparse(request.path)
        query = parse_qs(url.query)
        body = json.loads(request.rfile.read(int(request.headers.get("Content-Length") or 0)) or b"{}")
        if match := PATH.fullmatch(url.path):
            resource, group, name = "trainjobs", "trainer.kubeflow.org", match[1]
        elif match := PODS.fullmatch(url.path):
            resource, group, name = "pods/log" if match[2] else "pods", "", match[1]
        elif url.path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
            asked = body["spec"]["resourceAttributes"]
            assert method == "POST" and asked["namespace"] == "ml"
            of = f"{asked['resource']}/{asked['subresource']}" if "subresource" in asked else asked["resource"]
            allowed = (asked["verb"], asked["group"], of) not in self.denied
            return self.send(request, 201, body | {"status": {"allowed": allowed}})
        else:
            return self.send(request, 404, status(404, f"no such path {url.path}"))
        verb = {"POST": "create", "DELETE": "delete"}.get(method, "get" if name else "list")
        self.asked.append((verb, group, resource))
        if refusals := self.refusals.get((verb, resource)):
            code, message = refusals.pop(0)
            return self.send(request, code, status(code, message))
        if resource == "pods/log":
            assert query["timestamps"] == ["True"] and query["container"] == ["node"]
            return self.send(request, 200, "".join(self.logs[name]), "text/plain")
        if resource == "pods":
            if name:
                return self.send(request, 200, self.pods[name])
            self.selectors.update(query["labelSelector"])
            return self.send(request, 200, {"kind": "PodList", "apiVersion": "v1", "items": list(self.pods.values())})
        if verb == "list":
            ((label, value),) = (selector.split("=") for selector in query["labelSelector"])
            items = [job for job in self.jobs.values() if job["metadata"]["labels"].get(label) == value]
            return self.send(request, 200, {"kind": "TrainJobList", "items": items})
        if verb == "create":
            name = body["metadata"]["name"]
            if read_back(body) != body or crds.errors(body):
                return self.send(request, 422, status(422, "unknown fields"))
            if name in self.jobs:
                return self.send(request, 409, status(409, f'trainjobs "{name}" already exists'))
            if query.get("dryRun") == ["All"]:
                self.tried.append(body)
                return self.send(request, 201, body)
            self.created.append(body)
            self.jobs[name] = body | {"metadata": body["metadata"] | {"uid": f"uid-{len(self.created)}"}}
            return self.send(request, 201, self.jobs[name])
        if name not in self.jobs:
            return self.send(request, 404, status(404, f'trainjobs "{name}" not found'))
        if verb == "delete":
            assert query["propagationPolicy"] == ["Foreground"]
            del self.jobs[name]
            return self.send(request, 200, {"kind": "Status", "status": "Success"})
        if self.story:
            self.story.pop(0)(self.jobs[name])
        if name not in self.jobs:
            return self.send(request, 404, status(404, "gone"))
        return self.send(request, 200, self.jobs[name])

    def send(self, request: BaseHTTPRequestHandler, code: int, content: Any, kind: str = "application/json") -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        request.send_response(code)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def add_pod(self, index: int, phase: str, lines: list[str], **more: Any) -> None:
        name = f"job-node-0-{index}-abcde"
        self.pods[name] = {
            "metadata": {"name": name, "uid": name, "labels": {"batch.kubernetes.io/job-completion-index": str(index)}},
            "status": {"phase": phase, **more},
        }
        self.logs[name] = [f"2026-01-01T00:00:{second:02}.000000000Z {line}\n" for second, line in enumerate(lines)]


def status(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


def becomes(kind: str, reason: str = "Because", message: str = "of the test") -> Callable[[dict[str, Any]], None]:
    """An entry of the story: the condition holds from now on, and no other."""

    def change(job: dict[str, Any]) -> None:
        job["status"] = {"conditions": [{"type": kind, "status": "True", "reason": reason, "message": message}]}

    return change


def nothing(job: dict[str, Any]) -> None:
    job.pop("status", None)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.server.shutdown()
    made.server.server_close()


def launcher(url: str, patience: float = 5.0) -> TrainJobLauncher:
    settings = client.Configuration(host=url)
    settings.retries = False
    return TrainJobLauncher(client.ApiClient(settings), "ml", OWNER, pause=0.02, patience=patience)


def test_a_job_is_created_followed_and_removed(cluster, capsys):
    def begin(job: dict[str, Any]) -> None:
        cluster.add_pod(0, "Running", ["step 1"])
        cluster.add_pod(1, "Running", ["hello"])

    def end(job: dict[str, Any]) -> None:
        cluster.add_pod(0, "Succeeded", ["step 1", "step 2 ü", "done"])
        cluster.add_pod(1, "Succeeded", ["hello"])
        becomes("Complete")(job)

    cluster.story = [nothing, begin, nothing, nothing, end]
    launcher(cluster.url)(nodes_job())
    name = job_name(nodes_job())
    (created,) = cluster.created
    assert created == manifest(nodes_job(), OWNER)
    assert cluster.jobs == {} and cluster.selectors == {f"jobset.sigs.k8s.io/jobset-name={name}"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"training job {name}: 2 nodes, 2 processes each"
    # Each line once, though the log was asked for again and again.
    assert [line for line in printed if "node 0" in line] == ["[node 0] step 1", "[node 0] step 2 ü", "[node 0] done"]
    assert printed.count("[node 1] hello") == 1


def test_a_repeated_task_goes_on_with_the_job_that_is_there(cluster, capsys):
    job = nodes_job()
    cluster.jobs[job_name(job)] = manifest(job, {"name": "earlier", "uid": "0"})
    cluster.jobs[job_name(job)]["metadata"]["uid"] = "first"
    cluster.story = [nothing, nothing, becomes("Complete")]
    launcher(cluster.url)(job)
    assert cluster.created == [] and cluster.jobs == {}
    assert "is there already, from an earlier attempt; going on with it" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["failed", "differs", "complete without output"])
def test_what_cannot_be_gone_on_with_is_replaced(cluster, kind):
    job = nodes_job()
    earlier = manifest(nodes_job(recipe(image="older:1")) if kind == "differs" else job)
    earlier["metadata"]["uid"] = "first"
    if kind != "differs":
        becomes("Failed" if kind == "failed" else "Complete")(earlier)
    cluster.jobs[job_name(job)] = earlier
    cluster.story = [lambda job: None, becomes("Complete")]
    launcher(cluster.url)(job)
    assert [one["spec"]["trainer"]["image"] for one in cluster.created] == [job.recipe.resources.image]
    assert cluster.asked.count(("delete", "trainer.kubeflow.org", "trainjobs")) == 2 and cluster.jobs == {}


def test_a_job_that_completed_while_its_task_was_away_is_not_repeated(cluster, tmp_path):
    job = nodes_job(output=tmp_path / "history.jsonl")
    job.output.touch()
    cluster.jobs[job_name(job)] = manifest(job)
    cluster.jobs[job_name(job)]["metadata"]["uid"] = "first"
    becomes("Complete")(cluster.jobs[job_name(job)])
    launcher(cluster.url)(job)
    assert cluster.created == [] and cluster.jobs == {}


def test_waiting_is_told_in_words_and_once(cluster, capsys):
    queued = becomes("Suspended", "Suspended", "TrainJob is suspended")

    def unschedulable(job: dict[str, Any]) -> None:
        nothing(job)
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
        cluster.add_pod(0, "Pending", [], conditions=[condition])

    def image(job: dict[str, Any]) -> None:
        waiting = {"waiting": {"reason": "ErrImagePull", "message": "not found"}}
        named = {"name": "node", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
        cluster.add_pod(0, "Pending", [], containerStatuses=[named | {"state": waiting}])

    def run(job: dict[str, Any]) -> None:
        cluster.add_pod(0, "Running", ["here"])

    cluster.story = [queued, queued, queued, unschedulable, nothing, image, run, nothing, becomes("Complete")]
    launcher(cluster.url)(nodes_job(recipe(queue="research")))
    told = [line for line in capsys.readouterr().out.splitlines() if " job " in line][1:]
    name = job_name(nodes_job())
    assert told == [
        f"training job {name} waits in queue research of Kueue for its resources: TrainJob is suspended",
        f"training job {name} waits: job-node-0-0-abcde: Unschedulable: 0/3 nodes",
        f"training job {name} waits: job-node-0-0-abcde: ErrImagePull: not found",
        f"training job {name} goes on",
    ]


def test_a_failed_job_is_told_in_words_and_removed(cluster, capsys):
    def fail(job: dict[str, Any]) -> None:
        ended = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
        named = {"name": "node", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
        cluster.add_pod(0, "Failed", ["last words"], containerStatuses=[named | {"state": ended}])
        cluster.add_pod(1, "Failed", [], reason="Evicted", message="low on disk")
        becomes("Failed", "JobsFailed", "jobset failed")(job)

    cluster.story = [nothing, fail]
    with pytest.raises(DQOError) as caught:
        launcher(cluster.url)(nodes_job())
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("failed: JobsFailed: jobset failed")
    assert "OOMKilled, exit code 137; the memory of resources.memory (64Gi) did not suffice" in lines[1]
    assert lines[2].endswith("Evicted: low on disk")
    assert cluster.jobs == {} and "[node 0] last words" in capsys.readouterr().out


def test_a_deadline_is_told_with_its_field(cluster):
    cluster.story = [becomes("Failed", "DeadlineExceeded")]
    with pytest.raises(DQOError, match=r"at its deadline: resources.timeouts, \{'rl': 1.0\} hours"):
        launcher(cluster.url)(nodes_job(recipe(timeouts={"rl": 1})))


def test_a_job_that_somebody_else_removes(cluster):
    cluster.story = [nothing, lambda job: cluster.jobs.clear()]
    with pytest.raises(DQOError, match="was removed by somebody else; repeat the task"):
        launcher(cluster.url)(nodes_job())


def test_sigterm_removes_the_job(cluster):
    """Stages turn it into an interrupt, see `dqo.stages.context.running`."""
    cluster.story = [nothing, nothing, lambda job: os.kill(os.getpid(), signal.SIGTERM)]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            launcher(cluster.url)(nodes_job())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cluster.jobs == {} and len(cluster.created) == 1


@pytest.mark.parametrize(("verb", "resource"), [(verb, resource) for verb, _, resource in CALLS if resource == "pods"])
def test_a_missing_right_on_pods_is_named(cluster, verb, resource):
    cluster.refusals[verb, resource] = [(403, "pods is forbidden")]
    with pytest.raises(DQOError, match=rf"may not {verb} {resource} in namespace ml \(403: .*Role <fullname>-runner"):
        if verb == "get":
            launcher(cluster.url)._own_pod("task-pod")
        else:
            launcher(cluster.url)(nodes_job())


@pytest.mark.parametrize("verb", ["create", "get", "delete"])
def test_a_missing_right_on_jobs_is_named_with_the_role(cluster, verb):
    cluster.story = [becomes("Complete")]
    cluster.refusals[verb, "trainjobs"] = [(403, 'User "system:serviceaccount:ml:default" cannot do that')]
    with pytest.raises(DQOError) as caught:
        launcher(cluster.url)(nodes_job())
    message = str(caught.value)
    assert f"may not {verb} trainjobs.trainer.kubeflow.org in namespace ml (403" in message
    assert "serviceaccount:ml:default" in message and "runner.subjects" in message


def test_training_goes_on_where_logs_may_not_be_read(cluster, capsys):
    cluster.add_pod(0, "Succeeded", ["secret"])
    cluster.refusals["get", "pods/log"] = [(403, "no")] * 9
    cluster.story = [nothing, becomes("Complete")]
    launcher(cluster.url)(nodes_job())
    printed = capsys.readouterr().out
    assert printed.count("may not get pods/log in namespace ml") == 1 and "secret" not in printed


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (404, "the server could not find the requested resource", "expected Kubeflow Trainer 2.2 or later"),
        (
            403,
            'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: spec.runtimeRef: Invalid '
            'value: specified trainingRuntime must be created before the TrainJob is created',
            r"distributed.runtime: got 'dqo-torch', and namespace ml has no TrainingRuntime of that name",
        ),
        (422, "spec.trainer.numNodes: Invalid value", r"was refused \(422\): spec.trainer.numNodes: Invalid value"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tried", [False, True], ids=["started", "tried"])
def test_a_job_that_is_refused(cluster, code, message, words, tried):
    cluster.refusals["create", "trainjobs"] = [(code, message)]
    with pytest.raises(DQOError, match=words):
        if tried:
            launcher(cluster.url).try_out(recipe(), Path("/workspace"))
        else:
            launcher(cluster.url)(nodes_job())


def test_a_job_is_tried_without_being_started(cluster):
    said = launcher(cluster.url).try_out(recipe(), Path("/workspace"))
    assert "2 nodes, 2 processes each, by the runtime dqo-torch" in said
    (tried,) = cluster.tried
    assert cluster.created == [] and cluster.jobs == {} and "ownerReferences" not in tried["metadata"]
    started = manifest(nodes_job())
    assert tried["metadata"]["name"] != started["metadata"]["name"]
    assert tried["spec"]["runtimePatches"] == started["spec"]["runtimePatches"]
    assert tried["spec"]["runtimeRef"] == started["spec"]["runtimeRef"]


def test_every_right_that_is_missing_is_named_before_a_job_is_tried(cluster):
    cluster.denied = {("create", "trainer.kubeflow.org", "trainjobs"), ("get", "", "pods/log")}
    with pytest.raises(
        DQOError, match=r"may not create trainjobs\.trainer\.kubeflow\.org, get pods/log in namespace ml;"
    ):
        launcher(cluster.url).try_out(recipe(), Path("/workspace"))
    assert cluster.tried == []


def test_trying_where_nothing_answers_ends_soon():
    with pytest.raises(DQOError, match=r"Kubernetes' API at http://127\.0\.0\.1:9 does not answer"):
        launcher("http://127.0.0.1:9", patience=0.1).try_out(recipe(), Path("/workspace"))


def test_a_server_that_is_away_for_a_moment_is_asked_again(cluster):
    cluster.refusals["create", "trainjobs"] = [(503, "starting"), (429, "slowly")]
    cluster.refusals["get", "trainjobs"] = [(500, "etcd"), (401, "Unauthorized")]
    cluster.story = [nothing, becomes("Complete")]
    launcher(cluster.url)(nodes_job())
    assert len(cluster.created) == 1 and cluster.jobs == {}


def test_a_server_out_of_reach_is_told_with_its_address():
    began = time.monotonic()
    with pytest.raises(DQOError, match=r"API at http://127.0.0.1:9 did not create trainjobs for 0 s: .*refused"):
        launcher("http://127.0.0.1:9", patience=0.1)(nodes_job())
    assert time.monotonic() - began < 5


def test_outside_of_a_cluster_it_says_so(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(DQOError, match="several nodes train on a cluster only"):
        TrainJobLauncher.in_cluster()


def test_a_pod_owns_what_it_starts(cluster):
    cluster.pods["task-pod"] = {"metadata": {"name": "task-pod", "uid": "abc"}, "status": {"phase": "Running"}}
    assert launcher(cluster.url)._own_pod("task-pod") == {"name": "task-pod", "uid": "abc"}


def test_the_launcher_asks_for_what_the_role_allows_and_for_all_of_it(cluster):
    """`tests/chart/test_policy.py` compares the list with the chart's Role."""
    cluster.pods["task-pod"] = {"metadata": {"name": "task-pod", "uid": "abc"}, "status": {"phase": "Running"}}
    cluster.logs["task-pod"] = []
    cluster.story = [nothing, becomes("Complete")]
    start = launcher(cluster.url)
    start._own_pod("task-pod")
    cluster.pods.clear()
    cluster.add_pod(0, "Succeeded", ["a"])
    start(nodes_job())
    start.remove_of("run-1")
    assert set(cluster.asked) == set(CALLS)


def test_what_a_killed_task_has_left_is_removed_with_the_run(cluster, monkeypatch):
    start = launcher(cluster.url)
    for run, stage in (("run-1", "sft"), ("run-1", "rl-dqo"), ("run-2", "sft2")):
        monkeypatch.setenv(KUBEFLOW_VARIABLE, run)
        start._create(manifest(nodes_job(name=stage)))
    monkeypatch.delenv(KUBEFLOW_VARIABLE)
    start._create(manifest(nodes_job(name="rl-other")))
    assert {job["metadata"]["labels"].get("dqo/run") for job in cluster.created} == {"run-1", "run-2", None}
    assert sorted(start.remove_of("run-1")) == sorted(job_name(nodes_job(name=name)) for name in ("sft", "rl-dqo"))
    assert set(cluster.jobs) == {job_name(nodes_job(name=name)) for name in ("sft2", "rl-other")}
    assert start.remove_of("run-1") == []


def test_a_job_left_behind_that_may_not_be_listed_is_told(cluster):
    cluster.refusals["list", "trainjobs"] = [(403, "forbidden")]
    with pytest.raises(DQOError, match="may not list trainjobs"):
        launcher(cluster.url).remove_of("run-1")


# --- what the stage makes of a failure ---


def failing(message: str) -> Callable[[NodesJob], None]:
    def start(job: NodesJob) -> None:
        raise DQOError(message)

    return start


def leave(place: Path, rank: int, kind: str, message: str, at: float) -> None:
    failure = {"time": at, "type": kind, "message": message, "traceback": f"Traceback of rank {rank}"}
    processes.write_failure(place / "job.json", rank, failure)


def test_a_mistake_that_a_process_has_found_is_told_in_its_words(tmp_path):
    leave(tmp_path, 0, "RuntimeError", "connection closed by peer", 1.0)
    leave(tmp_path, 3, "DQOError", "data: line 3", 2.0)
    with pytest.raises(DQOError, match=r"^data: line 3 \(process 3 of 4\)$"):
        processes._launch_on_nodes(failing("job failed"), nodes_job(), tmp_path)


def test_what_the_first_process_complains_of_stands_beside_what_kubernetes_says(tmp_path):
    leave(tmp_path, 2, "RuntimeError", "connection closed by peer", 2.0)
    leave(tmp_path, 1, "ValueError", "nan", 1.0)
    with pytest.raises(DQOError) as caught:
        processes._launch_on_nodes(failing("job failed: OOMKilled"), nodes_job(), tmp_path)
    assert str(caught.value) == "job failed: OOMKilled\nThe first process to complain was 1 of 4: ValueError: nan"
    assert caught.value.__notes__ == ["Traceback of rank 1"]


def test_without_a_word_of_the_processes_the_job_is_told(tmp_path):
    with pytest.raises(DQOError, match=r"^job failed$"):
        processes._launch_on_nodes(failing("job failed"), nodes_job(), tmp_path)
