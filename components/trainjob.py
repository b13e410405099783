"""Training over several nodes: a stage's processes as a TrainJob of Kubeflow Trainer (trainer.kubeflow.org/v1alpha1).

The stage's task starts the job, copies its log, waits for its end and removes it. Imported inside the bodies of
components only: it needs the library and the client of Kubernetes, which the image holds.

A TrainJob names the chart's TrainingRuntime and changes of it what `spec.trainer` and `spec.runtimePatches` allow:
image, command, variables, numbers and resources of the nodes; labels, affinity, node selector, tolerations, volumes
and mounts, user and registry credentials of the pods. Pull policy, back-off limit and all else are the runtime's.
The fields are those of Kubeflow Trainer 2.2 and 2.3; before, `runtimePatches` was called `podTemplateOverrides`.
"""

import calendar
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from dqo.errors import DQOError
from dqo.recipe import NodeTerm, Recipe
from dqo.stages.context import NodesJob
from dqo.stages.preflight import secret_variables
from dqo.tracking import KUBEFLOW_VARIABLE

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
CALLS = (
    ("create", GROUP, "trainjobs"),
    ("get", GROUP, "trainjobs"),
    ("list", GROUP, "trainjobs"),
    ("delete", GROUP, "trainjobs"),
    ("get", "", "pods"),
    ("list", "", "pods"),
    ("get", "", "pods/log"),
)
"""Verb, API group and resource of everything that is asked of Kubernetes; the chart's Role allows these."""
CONTAINER = "node"
"""Trainer's name of the container that trains, and of its job among those of the runtime."""
_WORKSPACE, _MODELS = "/workspace", "/models"
_QUEUE = "kueue.x-k8s.io/queue-name"
_DIGEST, _RUN = "dqo/manifest-digest", "dqo/run"
_INDEX = "batch.kubernetes.io/job-completion-index"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# Variables of the task that hold for its training pods too, see `pipelines.placement`.
_PASSED_ON = (
    "HOME",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "XDG_CACHE_HOME",
    "MLFLOW_DISABLE_TELEMETRY",
    "PYTHONUNBUFFERED",
)
_CONNECT_SECONDS, _READ_SECONDS = 10, 60  # of a request
_LOG_SECONDS = 300  # without a line; then the log is asked for again
_TRANSIENT = (401, 408, 429)  # and 5xx; 401 while a token is renewed


def job_name(job: NodesJob) -> str:
    """A name that every attempt at the same stage in the same workspace gives, at most 42 characters.

    Trainer forms host names of it (`<name>-node-0-0`), so it begins with a letter and has no dots.
    """
    place = json.dumps([job.key, job.recipe.resources.workspace_claim, str(job.workspace)])
    stage = re.sub(r"[^a-z0-9]+", "-", job.name.lower())[:24].strip("-")
    return f"dqo-{stage}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"


def manifest(job: NodesJob, owner: dict[str, str] | None = None) -> dict[str, Any]:
    """The TrainJob of a stage.

    Args:
        job: What to start.
        owner: `name` and `uid` of the task's pod, whose end is the job's; None leaves it without an owner.

    Raises:
        DQOError: If the workspace does not lie where the training pods mount it.
    """
    recipe, resources = job.recipe, job.recipe.resources
    if not job.workspace.is_relative_to(_WORKSPACE):
        raise DQOError(
            f"workspace: got {job.workspace}; with distributed.nodes {recipe.distributed.nodes} it has to lie below "
            f"{_WORKSPACE}, where training pods mount resources.workspace_claim"
        )
    trainer: dict[str, Any] = {
        "image": resources.image,
        # torchrun reads nodes, node rank, processes and rendezvous from the PET_ variables that Trainer sets.
        "command": ["torchrun", "--max-restarts=0", "-m", job.module],
        "args": list(job.arguments),
        "env": _variables(job),
        "numNodes": recipe.distributed.nodes,
        "numProcPerNode": recipe.processes_per_node,
        "resourcesPerNode": _amounts(recipe),
    }
    patch = {
        "manager": "dqo.pipelines/stage",
        "trainingRuntimeSpec": {
            "template": {
                "spec": {"replicatedJobs": [{"name": CONTAINER, "template": {"spec": {"template": _pod(recipe)}}}]}
            }
        },
    }
    spec: dict[str, Any] = {
        "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": recipe.distributed.runtime},
        "trainer": trainer,
        "runtimePatches": [patch],
    }
    hours = resources.timeouts.get("sft" if job.name == "sft" else "rl")
    if hours is not None:
        spec["activeDeadlineSeconds"] = round(hours * 3600)
    labels = {"app.kubernetes.io/part-of": "dqo", "dqo/stage": job.name, "dqo/stage-key": job.key}
    if run := os.environ.get(KUBEFLOW_VARIABLE):
        labels[_RUN] = run
    if resources.queue is not None:
        labels[_QUEUE] = resources.queue
    metadata: dict[str, Any] = {
        "name": job_name(job),
        "labels": labels,
        "annotations": {_DIGEST: hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]},
    }
    if owner is not None:
        metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", **owner}]
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": "TrainJob", "metadata": metadata, "spec": spec}


def _variables(job: NodesJob) -> list[dict[str, Any]]:
    recipe = job.recipe
    plain = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    if recipe.resources.accelerator is None:
        # torchrun would give each process one thread.
        processors = int(recipe.resources.cpu.removesuffix("m")) // (1000 if recipe.resources.cpu.endswith("m") else 1)
        plain["OMP_NUM_THREADS"] = str(max(1, processors // recipe.processes_per_node))
    plain |= job.environment | recipe.resources.environment
    found: list[dict[str, Any]] = [{"name": name, "value": plain[name]} for name in sorted(plain) if plain[name]]
    for section, keys in secret_variables(recipe).items():
        secret = getattr(recipe.resources.secrets, section)
        for key, name in keys.items():
            found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return found


def _amounts(recipe: Recipe) -> dict[str, Any]:
    resources = recipe.resources
    limits: dict[str, str] = {"memory": resources.memory}
    requests: dict[str, str] = {"cpu": resources.cpu, "memory": resources.memory}
    if resources.accelerator is not None:
        limits[resources.accelerator] = requests[resources.accelerator] = str(resources.accelerator_count)
    # Trainer lays these over the runtime's own; its limit of processors must not fall below the request.
    limits["cpu"] = resources.cpu
    return {"limits": limits, "requests": requests}


def _pod(recipe: Recipe) -> dict[str, Any]:
    """What a patch may change of the runtime's pod.

    Trainer merges it as Kubernetes merges a strategic patch: volumes by name, mounts by path, tolerations replace the
    runtime's. Volumes have names of their own, since merged into the runtime's volume of the same name they would be of
    two kinds at once; by the path, the runtime's mount is redirected.
    """
    resources = recipe.resources
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []

    def volume(name: str, path: str, source: dict[str, Any]) -> None:
        volumes.append({"name": name, **source})
        mounts.append({"name": name, "mountPath": path})

    volume("dqo-workspace", _WORKSPACE, {"persistentVolumeClaim": {"claimName": resources.workspace_claim}})
    if resources.models_claim is not None:
        volume("dqo-models", _MODELS, {"persistentVolumeClaim": {"claimName": resources.models_claim}})
    if resources.shared_memory is not None:
        volume("dqo-shm", "/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": resources.shared_memory}})
    spec: dict[str, Any] = {"containers": [{"name": CONTAINER, "volumeMounts": mounts}], "volumes": volumes}
    if resources.node_selector:
        spec["nodeSelector"] = dict(resources.node_selector)
    if resources.tolerations:
        spec["tolerations"] = [one.model_dump(exclude_none=True) for one in resources.tolerations]
    if resources.node_affinity:
        spec["affinity"] = {"nodeAffinity": _affinity(resources.node_affinity)}
    if resources.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in resources.image_pull_secrets]
    user = {"runAsUser": resources.run_as_user, "runAsGroup": resources.run_as_group}
    if user := {name: value for name, value in user.items() if value is not None}:
        spec["securityContext"] = user | ({"runAsNonRoot": True} if "runAsUser" in user else {})
    return {"spec": spec}


def _affinity(terms: list[NodeTerm]) -> dict[str, Any]:
    demanded: list[dict[str, Any]] = []
    preferred: list[dict[str, Any]] = []
    for term in terms:
        expressions = []
        for one in term.expressions:
            values = {"values": list(one.values)} if one.values else {}
            expressions.append({"key": one.key, "operator": one.operator, **values})
        if term.weight is None:
            demanded.append({"matchExpressions": expressions})
        else:
            preferred.append({"weight": term.weight, "preference": {"matchExpressions": expressions}})
    found: dict[str, Any] = {}
    if demanded:
        found["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": demanded}
    if preferred:
        found["preferredDuringSchedulingIgnoredDuringExecution"] = preferred
    return found


def try_out(recipe: Recipe, workspace: Path) -> str:
    """`TrainJobLauncher.try_out` with the account of this task's pod, in some seconds.

    Raises:
        DQOError: As the launcher does, or if this is no pod that may talk to its cluster.
    """
    return TrainJobLauncher._of_account(pause=1.0, patience=5.0).try_out(recipe, workspace)


def remove_leftovers() -> list[str]:
    """Remove the training jobs that a Kubeflow run has left behind, with the account of this task's pod.

    A task removes its job at its end; one that was killed before it could has left it to train on unseen.

    Returns:
        Names of the jobs that were there.

    Raises:
        DQOError: As the launcher does, or if this is no pod that may talk to its cluster.
    """
    run = os.environ.get(KUBEFLOW_VARIABLE)
    return TrainJobLauncher._of_account(pause=1.0, patience=60.0).remove_of(run) if run else []


class TrainJobLauncher:
    """Runs a stage's processes as a TrainJob: `launcher(job)` returns when all have ended well.

    The job's name follows from the stage, so a repeated task finds the job of a killed one and goes on waiting for it.
    The task's pod owns the job: where the task is killed for good, Kubernetes removes the job with the pod.

    Args:
        api: Client of Kubernetes.
        namespace: Where to start jobs.
        owner: `name` and `uid` of the task's pod.
        pause: Seconds between two looks at the job; there is no limit to their number.
        patience: Seconds for which Kubernetes may be out of reach.
    """

    def __init__(
        self,
        api: client.ApiClient,
        namespace: str,
        owner: dict[str, str] | None,
        pause: float = 5.0,
        patience: float = 600.0,
    ) -> None:
        self._jobs = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)
        self._namespace = namespace
        self._owner = owner
        self._pause = pause
        self._patience = patience
        self._where = {"group": GROUP, "version": VERSION, "namespace": namespace, "plural": PLURAL}
        self._waits: str | None = None

    @classmethod
    def in_cluster(cls) -> "TrainJobLauncher":
        """The launcher of a task's pod, with the pod's account.

        Raises:
            DQOError: If this is no pod of a cluster, or the pod has no token.
        """
        launcher = cls._of_account()
        launcher._owner = launcher._own_pod(os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", ""))
        return launcher

    @classmethod
    def _of_account(cls, **settings: float) -> "TrainJobLauncher":
        try:
            config.load_incluster_config()
        except config.ConfigException as error:
            raise DQOError(
                f"distributed.nodes: several nodes train on a cluster only, and this is no pod that may talk to it "
                f"({error}); expected a run on Kubeflow Pipelines whose service account's token is mounted, or "
                "distributed.nodes 1"
            ) from None
        configuration = client.Configuration.get_default_copy()
        configuration.retries = False  # see `_ask`
        return cls(client.ApiClient(configuration), _ACCOUNT.read_text(encoding="utf-8").strip(), None, **settings)

    def try_out(self, recipe: Recipe, workspace: Path) -> str:
        """Have Kubernetes check a recipe's training job, down to Trainer's own webhook, without starting it.

        Returns:
            What was found, in words.

        Raises:
            DQOError: If the account lacks a right, Kubeflow Trainer or the TrainingRuntime is missing, or the job is
                refused otherwise.
        """
        missing = [
            f"{verb} {resource}" + (f".{group}" if group else "")
            for verb, group, resource in CALLS
            if not self._may(verb, group, resource)
        ]
        if missing:
            raise DQOError(
                f"the task's service account may not {', '.join(missing)} in namespace {self._namespace}; expected the "
                "rights of the chart's Role <fullname>-runner: run the pipeline as the chart's account (`dqo submit "
                "--service-account`), or give its own those rights (runner.subjects)"
            )
        job = NodesJob(recipe, "preflight", recipe.digest, workspace, "dqo.stages.worker", (), {}, workspace)
        wanted = manifest(job)
        name = wanted["metadata"]["name"]
        try:
            self._create(wanted, dry_run="All")
        except ApiException as error:
            self._not_started(name, recipe.distributed.runtime, error)
        return (
            f"Kubernetes would take a job of {recipe.distributed.nodes} nodes, {recipe.processes_per_node} processes "
            f"each, by the runtime {recipe.distributed.runtime}"
        )

    def _may(self, verb: str, group: str, resource: str) -> bool:
        """Whether the account has a right; every account may ask this about itself."""
        resource, _, subresource = resource.partition("/")
        attributes = {"namespace": self._namespace, "verb": verb, "group": group, "resource": resource}
        attributes |= {"subresource": subresource} if subresource else {}
        try:
            answer = client.AuthorizationV1Api(self._core.api_client).create_self_subject_access_review(
                {"spec": {"resourceAttributes": attributes}}, _request_timeout=_CONNECT_SECONDS
            )
        except ApiException as error:
            raise DQOError(f"the rights of the task's service account cannot be asked: {_message(error)}") from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            host = self._core.api_client.configuration.host
            raise DQOError(f"Kubernetes' API at {host} does not answer: {error}") from None
        return bool(answer.status.allowed)

    def _own_pod(self, name: str) -> dict[str, str]:
        try:
            pod = self._ask("get", "pods", lambda **options: self._core.read_namespaced_pod(**options), name=name)
        except ApiException as error:
            raise DQOError(f"pod {name!r}, in which this task runs, cannot be read: {_message(error)}") from None
        return {"name": name, "uid": pod.metadata.uid}

    def __call__(self, job: NodesJob) -> None:
        """Start the job or find it, wait for its end, and remove it.

        Raises:
            DQOError: If it cannot be started, has failed or was removed by somebody else, or if Kubernetes is out of
                reach for too long; the job is left alone then, and a repeated task finds it.
            KeyboardInterrupt: If the task was told to end; the job is removed then.
        """
        wanted = manifest(job, self._owner)
        name = wanted["metadata"]["name"]
        logs = _Logs(self._core, self._namespace, self._say)
        try:
            uid = self._obtain(wanted, job.output)
            if uid is not None:
                self._follow(name, uid, job, logs)
        except KeyboardInterrupt:
            self._say(f"the task was told to end; removing training job {name}")
            self._delete(name)
            raise
        self._delete(name)

    def _obtain(self, wanted: dict[str, Any], output: Path) -> str | None:
        """Create the job, or find the one of an earlier attempt; its uid, or None where that one has done all."""
        name = wanted["metadata"]["name"]
        while True:
            try:
                made = self._create(wanted)
            except ApiException as error:
                if error.status != 409:
                    self._not_started(name, wanted["spec"]["runtimeRef"]["name"], error)
            else:
                self._say(
                    f"training job {name}: {wanted['spec']['trainer']['numNodes']} nodes, "
                    f"{wanted['spec']['trainer']['numProcPerNode']} processes each"
                )
                return str(made["metadata"]["uid"])
            found = self._get(name)
            if found is None:
                continue  # it has gone in between
            same = found["metadata"].get("annotations", {}).get(_DIGEST) == wanted["metadata"]["annotations"][_DIGEST]
            ended = _condition(found, "Complete") or _condition(found, "Failed")
            if same and not ended and "deletionTimestamp" not in found["metadata"]:
                self._say(f"training job {name} is there already, from an earlier attempt; going on with it")
                return str(found["metadata"]["uid"])
            if same and _condition(found, "Complete") and output.is_file():
                self._say(f"training job {name} of an earlier attempt has completed")
                return None
            # The stage's lock is held, so nobody waits for it: what it has left is an earlier attempt's.
            self._say(f"removing training job {name} of an earlier attempt" + ("" if ended else ", which differs"))
            self._delete(name)
            while self._get(name) is not None:
                time.sleep(self._pause)

    def _follow(self, name: str, uid: str, job: NodesJob, logs: "_Logs") -> None:
        """Copy the pods' logs and wait for the job's end."""
        while True:
            current = self._get(name)
            if current is None or current["metadata"]["uid"] != uid:
                raise DQOError(
                    f"training job {name} was removed by somebody else; repeat the task: it goes on from the newest "
                    "checkpoint"
                )
            pods = self._pods(name)
            logs.follow(pods)
            if _condition(current, "Complete"):
                logs.finish(self._pods(name))
                return
            if failed := _condition(current, "Failed"):
                pods = self._pods(name)
                logs.finish(pods)
                self._delete(name)
                raise DQOError(_failure(name, failed, pods, job.recipe))
            suspended = _condition(current, "Suspended")
            if suspended is not None:
                queue = job.recipe.resources.queue
                where = f"waits in queue {queue} of Kueue for its resources" if queue else "is suspended"
                self._tell_change(name, f"training job {name} {where}: {suspended.get('message') or 'no reason given'}")
            else:
                waiting = "; ".join(sorted(_waiting(pods)))
                self._tell_change(name, f"training job {name} waits: {waiting}" if waiting else None)
            time.sleep(self._pause)

    def _tell_change(self, name: str, words: str | None) -> None:
        """Say why the job waits, once, and that it goes on."""
        if words != self._waits:
            self._say(words or f"training job {name} goes on")
        self._waits = words

    def _say(self, words: str) -> None:
        sys.stdout.write(words + "\n")
        sys.stdout.flush()

    def _create(self, wanted: dict[str, Any], **settings: str) -> dict[str, Any]:
        def call(**options: Any) -> Any:
            return self._jobs.create_namespaced_custom_object(body=wanted, **settings, **self._where, **options)

        made: dict[str, Any] = self._ask("create", PLURAL, call)
        return made

    def _get(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self._ask(
                "get",
                PLURAL,
                lambda **options: self._jobs.get_namespaced_custom_object(name=name, **self._where, **options),
            )
        except ApiException as error:
            if error.status == 404:
                return None
            raise DQOError(f"training job {name} cannot be read: {_message(error)}") from None
        return found

    def _pods(self, name: str) -> list[Any]:
        try:
            answer = self._ask(
                "list",
                "pods",
                lambda **options: self._core.list_namespaced_pod(**options),
                label_selector=f"jobset.sigs.k8s.io/jobset-name={name}",
            )
        except ApiException as error:
            raise DQOError(f"the pods of training job {name} cannot be listed: {_message(error)}") from None
        found: list[Any] = answer.items
        return found

    def remove_of(self, run: str) -> list[str]:
        """Remove the jobs that a Kubeflow run has started.

        Args:
            run: The run's id, as `manifest` labels the jobs with it.

        Returns:
            Their names.

        Raises:
            DQOError: If the account lacks the right, or Kubernetes stays out of reach.
        """
        try:
            found = self._ask(
                "list",
                PLURAL,
                lambda **options: self._jobs.list_namespaced_custom_object(
                    label_selector=f"{_RUN}={run}", **self._where, **options
                ),
            )
        except ApiException as error:
            raise DQOError(f"the training jobs of run {run} cannot be listed: {_message(error)}") from None
        names = [job["metadata"]["name"] for job in found["items"]]
        for name in names:
            self._delete(name)
        return names

    def _delete(self, name: str) -> None:
        try:
            self._ask(
                "delete",
                PLURAL,
                lambda **options: self._jobs.delete_namespaced_custom_object(
                    name=name, propagation_policy="Foreground", **self._where, **options
                ),
            )
        except ApiException as error:
            if error.status != 404:
                raise DQOError(
                    f"training job {name} cannot be removed: {_message(error)}; remove it by hand: kubectl -n "
                    f"{self._namespace} delete trainjob {name}"
                ) from None

    def _ask(self, verb: str, resource: str, call: Callable[..., Any], **arguments: Any) -> Any:
        """Ask Kubernetes, again and again while it is out of reach, for as long as patience lasts.

        Raises:
            DQOError: If the account lacks the right, or patience has run out.
            ApiException: As Kubernetes has answered otherwise.
        """
        if resource != PLURAL:
            arguments["namespace"] = self._namespace
        began = time.monotonic()
        while True:
            try:
                return call(**arguments, _request_timeout=(_CONNECT_SECONDS, _READ_SECONDS))
            except ApiException as error:
                if error.status == 403 and "admission webhook" not in _message(error):
                    raise DQOError(_forbidden(verb, resource, self._namespace, _message(error))) from None
                if error.status not in _TRANSIENT and error.status < 500:
                    raise
                reason = f"{error.status} {_message(error)}"
            except (urllib3.exceptions.HTTPError, OSError) as error:
                reason = str(error)
            if time.monotonic() - began >= self._patience:
                raise DQOError(
                    f"Kubernetes' API at {self._core.api_client.configuration.host} did not {verb} {resource} for "
                    f"{self._patience:.0f} s: {reason}; a training job that was started goes on, and a repeated task "
                    "finds it"
                )
            time.sleep(min(self._pause, self._patience))

    def _not_started(self, name: str, runtime: str, error: ApiException) -> NoReturn:
        words = _message(error)
        if error.status == 404:
            raise DQOError(
                f"training job {name} cannot be started: this cluster does not know {PLURAL}.{GROUP} (404), or the "
                f"namespace {self._namespace} is gone; expected Kubeflow Trainer 2.2 or later to be installed"
            ) from None
        if "runtimeRef" in words or "specified trainingRuntime" in words:
            raise DQOError(
                f"distributed.runtime: got {runtime!r}, and namespace {self._namespace} has no TrainingRuntime of that "
                f"name; expected the one of charts/dqo, <fullname>-torch (`kubectl -n {self._namespace} get "
                f"trainingruntimes`): {words}"
            ) from None
        raise DQOError(f"training job {name} was refused ({error.status}): {words}") from None


class _Logs:
    """Copies the logs of a job's pods to this task's, each in a thread, with the node's number before each line."""

    def __init__(self, core: client.CoreV1Api, namespace: str, say: Callable[[str], None]) -> None:
        self._core = core
        self._namespace = namespace
        self._say = say
        self._threads: dict[str, threading.Thread] = {}
        self._last: dict[str, str] = {}  # time of the last line of a pod
        self._read: set[str] = set()  # pods whose log has been read after their end

    def follow(self, pods: list[Any]) -> None:
        """Read the logs of pods that have begun and of which none is being read."""
        for pod in pods:
            uid, phase = pod.metadata.uid, pod.status.phase
            thread = self._threads.get(uid)
            if phase not in ("Running", "Succeeded", "Failed") or uid in self._read:
                continue
            if thread is None or not thread.is_alive():
                self._threads[uid] = threading.Thread(target=self._copy, args=(pod, phase != "Running"), daemon=True)
                self._threads[uid].start()

    def finish(self, pods: list[Any], seconds: float = 30.0) -> None:
        """Read what is left of pods that have ended, for some seconds at most."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.follow(pods)
            running = [thread for thread in self._threads.values() if thread.is_alive()]
            if not running:
                if {pod.metadata.uid for pod in pods if pod.status.phase in ("Succeeded", "Failed")} <= self._read:
                    return
                time.sleep(0.05)
            for thread in running:
                thread.join(max(0.0, until - time.monotonic()))

    def _copy(self, pod: Any, ended: bool) -> None:
        uid = pod.metadata.uid
        node = ((pod.metadata.annotations or {}) | (pod.metadata.labels or {})).get(_INDEX, "?")
        try:
            for line in self._lines(pod.metadata.name, uid):
                at, _, text = line.partition(" ")
                if at > self._last.get(uid, ""):
                    self._last[uid] = at
                    self._say(f"[node {node}] {text}")
            if ended:
                self._read.add(uid)
        except ApiException as error:
            if error.status in (403, 404):
                self._read.add(uid)  # asking again would not help
            if error.status == 403:
                self._say(_forbidden("get", "pods/log", self._namespace, _message(error)))
        except (urllib3.exceptions.HTTPError, OSError):
            pass  # cut off, or quiet for long: `follow` asks again, from the last line

    def _lines(self, name: str, uid: str) -> Iterator[str]:
        """Lines of a pod's log, each with its time before it, from the last one that was read."""
        since: dict[str, int] = {}
        if uid in self._last:
            last = calendar.timegm(time.strptime(self._last[uid][:19], "%Y-%m-%dT%H:%M:%S"))
            since = {"since_seconds": max(1, int(time.time() - last) + 60)}  # more than needed: clocks differ
        answer = self._core.read_namespaced_pod_log(
            name,
            self._namespace,
            container=CONTAINER,
            follow=True,
            timestamps=True,
            _preload_content=False,
            _request_timeout=(_CONNECT_SECONDS, _LOG_SECONDS),
            **since,
        )
        try:
            rest = b""
            for chunk in answer.stream(amt=None):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode("utf-8", "replace") for line in lines)
            if rest:
                yield rest.decode("utf-8", "replace")
        finally:
            answer.release_conn()


def _condition(job: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """A condition of a job that holds."""
    conditions: list[dict[str, Any]] = job.get("status", {}).get("conditions") or []
    return next((one for one in conditions if one["type"] == kind and one["status"] == "True"), None)


def _waiting(pods: list[Any]) -> Iterator[str]:
    """Why pods do not run, each reason once."""
    for pod in pods:
        if pod.status.phase != "Pending":
            continue
        for one in pod.status.conditions or []:
            if one.type == "PodScheduled" and one.status == "False":
                yield f"{pod.metadata.name}: {one.reason}: {one.message}"
        for status in pod.status.container_statuses or []:
            waiting = status.state and status.state.waiting
            if waiting and waiting.reason not in (None, "ContainerCreating", "PodInitializing"):
                yield f"{pod.metadata.name}: {waiting.reason}: {waiting.message or 'no message'}"


def _failure(name: str, failed: dict[str, Any], pods: list[Any], recipe: Recipe) -> str:
    """What a failed job and its pods say, and what to do."""
    if failed.get("reason") == "DeadlineExceeded":
        return (
            f"training job {name} was ended at its deadline: resources.timeouts, {recipe.resources.timeouts} hours; "
            "give it more time; a repeated task goes on from the newest checkpoint"
        )
    lines = [f"training job {name} failed: {failed.get('reason', 'Failed')}: {failed.get('message') or 'no message'}"]
    for pod in pods:
        for status in pod.status.container_statuses or []:
            ended = status.state and status.state.terminated
            if ended and ended.exit_code != 0:
                words = f"  pod {pod.metadata.name}: {ended.reason or 'Error'}, exit code {ended.exit_code}"
                if ended.reason == "OOMKilled":
                    words += f"; the memory of resources.memory ({recipe.resources.memory}) did not suffice"
                lines.append(words)
        if pod.status.reason:  # evicted, or its node was lost
            lines.append(f"  pod {pod.metadata.name}: {pod.status.reason}: {pod.status.message or 'no message'}")
    return "\n".join(lines)


def _forbidden(verb: str, resource: str, namespace: str, message: str) -> str:
    group = f".{GROUP}" if resource == PLURAL else ""
    return (
        f"the account of this task may not {verb} {resource}{group} in namespace {namespace} (403: {message}); "
        "expected the rights of the chart's Role <fullname>-runner: start the run as the ServiceAccount "
        "<fullname>-runner, or name the run's account in the chart's runner.subjects"
    )


def _message(error: ApiException) -> str:
    """Kubernetes' own words."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)
