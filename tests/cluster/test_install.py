"""Install the chart on the cluster that KUBECONFIG names: install, test, upgrade, roll back, uninstall.

Makes a namespace of its own that enforces restricted Pod Security, and deletes it in the end. The images have to be on
the nodes or to be had from a registry: `DQO_MLFLOW_IMAGE`, by default the chart's `dqo-mlflow:0.1.0`. Needs neither
cluster DNS nor a storage class nor Kubeflow. Run: `KUBECONFIG=... python -m pytest -m cluster tests/cluster`.
"""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "chart"))

from helm import CHART, MAJORS, ToolMissing, helm, kubectl

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG is not set: there is no cluster"),
]
MINIMAL = CHART / "ci" / "minimal-values.yaml"
WAIT = ("--wait", "--timeout", os.environ.get("DQO_CLUSTER_TIMEOUT", "10m"))
BESIDE = ("events", "events.events.k8s.io", "pods.metrics.k8s.io")  # what is written about objects, not objects


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


class Cluster:
    """Commands in one namespace."""

    def __init__(self, namespace: str, major: int):
        self.namespace = namespace
        self.major = major

    def kubectl(self, *arguments: str | Path) -> str:
        return run(kubectl(), "--namespace", self.namespace, *arguments)

    def get(self, *what: str) -> Any:
        return json.loads(self.kubectl("get", *what, "--output", "json"))

    def helm(self, *arguments: str | Path) -> str:
        return run(helm(self.major), "--namespace", self.namespace, *arguments)

    def objects(self) -> set[str]:
        """Every object of the namespace, as `kind/name`."""
        kinds = self.kubectl("api-resources", "--namespaced", "--verbs=list", "--output=name").split()
        found = self.kubectl(
            "get", ",".join(sorted(set(kinds) - set(BESIDE))), "--ignore-not-found", "--output", "name"
        )
        return set(found.split())

    def settled(self, expected: set[str], seconds: float = 120) -> set[str]:
        """The namespace's objects, once they are the expected ones or the time is over: garbage goes with a delay."""
        end = time.monotonic() + seconds
        while (found := self.objects()) != expected and time.monotonic() < end:
            time.sleep(2)
        return found


@pytest.fixture(params=MAJORS, ids=lambda major: f"helm{major}")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    try:
        helm(request.param)
    except ToolMissing as reason:
        pytest.skip(f"Helm: {reason}")
    name = f"dqo-test-{uuid.uuid4().hex[:8]}"
    run(kubectl(), "create", "namespace", name)
    try:
        for mode in ("enforce", "warn"):
            run(kubectl(), "label", "namespace", name, f"pod-security.kubernetes.io/{mode}=restricted")
        cluster = Cluster(name, request.param)
        cluster.settled({"configmap/kube-root-ca.crt", "serviceaccount/default"}, 20)  # what a namespace has by itself
        yield cluster
    finally:
        run(kubectl(), "delete", "namespace", name, "--wait=true", "--timeout=5m")


def image() -> list[str]:
    reference = os.environ.get("DQO_MLFLOW_IMAGE")
    if not reference:
        return []
    repository, _, tag = reference.rpartition(":")
    return ["--set-string", f"mlflow.image.repository={repository}", "--set-string", f"mlflow.image.tag={tag}"]


def available(cluster: Cluster) -> dict[str, Any]:
    """MLflow's Deployment, which has to be available at its newest generation."""
    deployment = cluster.get("deployment", "dqo-mlflow")
    status = deployment["status"]
    assert status["observedGeneration"] == deployment["metadata"]["generation"]
    assert status["availableReplicas"] == status["updatedReplicas"] == deployment["spec"]["replicas"] == 1
    return deployment


def workers(deployment: dict[str, Any]) -> str:
    (found,) = [a for a in deployment["spec"]["template"]["spec"]["containers"][0]["args"] if "--workers" in a]
    return found


def test_the_life_of_a_release(cluster: Cluster):
    before = cluster.objects()
    notes = cluster.helm("install", "dqo", CHART, "--values", MINIMAL, *image(), *WAIT)
    assert "helm test" in notes
    first = available(cluster)
    assert workers(first) == "--workers=1"
    cluster.helm("test", "dqo", "--timeout", "5m")
    assert "pod/dqo-test" not in cluster.objects()  # it removes itself

    # A change restarts MLflow; the same values again change nothing.
    upgrade = ("upgrade", "dqo", CHART, "--values", MINIMAL, *image(), *WAIT)
    cluster.helm(*upgrade, "--set", "mlflow.workers=2")
    second = available(cluster)
    assert workers(second) == "--workers=2"
    cluster.helm(*upgrade, "--set", "mlflow.workers=2")
    assert available(cluster)["metadata"]["generation"] == second["metadata"]["generation"]
    cluster.helm("test", "dqo", "--timeout", "5m")

    cluster.helm("rollback", "dqo", "1", *WAIT)
    third = available(cluster)
    assert third["spec"]["template"] == first["spec"]["template"]
    cluster.helm("test", "dqo", "--timeout", "5m")

    # The runner may do what training needs, and nothing else.
    account = f"system:serviceaccount:{cluster.namespace}:dqo-runner"
    for expected, *question in (
        ("yes", "create", "trainjobs.trainer.kubeflow.org"),
        ("yes", "get", "pods", "--subresource=log"),
        ("no", "patch", "trainjobs.trainer.kubeflow.org"),
        ("no", "get", "secrets"),
        ("no", "create", "pods"),
    ):
        done = subprocess.run(
            [kubectl(), "--namespace", cluster.namespace, "auth", "can-i", *question, "--as", account],
            capture_output=True,
            text=True,
        )
        assert done.stdout.split()[:1] == [expected], (question, done.stdout, done.stderr)

    cluster.helm("uninstall", "dqo", *WAIT)
    left = cluster.settled(before) - before
    assert {name for name in left if not name.startswith("persistentvolumeclaim/")} == set()


def test_values_that_do_not_fit_are_refused_before_anything_is_made(cluster: Cluster):
    before = cluster.objects()
    done = subprocess.run(
        [helm(cluster.major), "--namespace", cluster.namespace, "install", "dqo", CHART, "--set", "mlflow.replicas=2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "several servers need PostgreSQL" in done.stderr
    assert cluster.objects() == before
