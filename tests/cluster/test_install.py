"""Install the chart on the cluster that KUBECONFIG names: install, test, upgrade, roll back, uninstall.

Makes a namespace of its own that enforces restricted Pod Security, and deletes it in the end. The images have to be on
the nodes or to be had from a registry: `DQO_MLFLOW_IMAGE`, by default the chart's `dqo-mlflow:0.1.0`. Needs neither
cluster DNS nor a storage class nor Kubeflow; where the cluster knows Kubeflow's kinds, their objects have to be there.
Run: `KUBECONFIG=... python -m pytest -m cluster tests/cluster`.
"""

import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from helm import CHART, MAJORS, ToolMissing, helm, kubectl
from release import BY_ITSELF, RELEASE, Cluster, image, namespace

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG is not set: there is no cluster"),
    pytest.mark.timeout(3600),  # each of Helm's commands may wait ten minutes
]
MINIMAL = ("--values", CHART / "ci" / "minimal-values.yaml", *image(os.environ.get("DQO_MLFLOW_IMAGE", "")))
WAIT = ("--wait", "--timeout", os.environ.get("DQO_CLUSTER_TIMEOUT", "10m"))
TRAINER = "trainer.kubeflow.org"


@pytest.fixture(params=MAJORS, ids=lambda major: f"helm{major}")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    try:
        helm(request.param)
        kubectl()
    except ToolMissing as reason:
        pytest.skip(str(reason))
    name = f"dqo-test-{uuid.uuid4().hex[:8]}"
    with namespace(name):
        cluster = Cluster(name, request.param)
        cluster.settled(BY_ITSELF, 20)
        yield cluster


def available(cluster: Cluster) -> dict[str, Any]:
    """MLflow's Deployment, which has to be available at its newest generation."""
    # Helm 3 may have returned a moment before the status says so.
    cluster.kubectl("rollout", "status", "deployment/dqo-mlflow", "--timeout=120s")
    deployment = cluster.get("deployment", "dqo-mlflow")
    status = deployment["status"]
    assert status["observedGeneration"] == deployment["metadata"]["generation"]
    assert status["availableReplicas"] == status["updatedReplicas"] == deployment["spec"]["replicas"] == 1
    return deployment


def workers(deployment: dict[str, Any]) -> str:
    (found,) = [a for a in deployment["spec"]["template"]["spec"]["containers"][0]["args"] if "--workers" in a]
    return found


def left_behind(cluster: Cluster, before: set[str]) -> set[str]:
    """What is there beside claims and what was there before, once Kubernetes has cleaned up."""
    left = cluster.settled(before) - before
    return {name for name in left if not name.startswith("persistentvolumeclaim/")}


def test_the_life_of_a_release(cluster: Cluster):
    before = cluster.objects()
    notes = cluster.helm("install", RELEASE, CHART, *MINIMAL, *WAIT)
    assert "helm test" in notes
    cluster.holds_what_the_cluster_knows(notes)
    first = available(cluster)
    assert workers(first) == "--workers=1"
    cluster.helm("test", RELEASE, "--timeout", "5m")
    assert cluster.goes("pod/dqo-test")  # it removes itself

    # A change restarts MLflow; the same values again change nothing.
    upgrade = ("upgrade", RELEASE, CHART, *MINIMAL, *WAIT)
    cluster.holds_what_the_cluster_knows(cluster.helm(*upgrade, "--set", "mlflow.workers=2"))
    second = available(cluster)
    assert workers(second) == "--workers=2"
    cluster.helm(*upgrade, "--set", "mlflow.workers=2")
    assert available(cluster)["metadata"]["generation"] == second["metadata"]["generation"]
    cluster.helm("test", RELEASE, "--timeout", "5m")

    cluster.helm("rollback", RELEASE, "1", *WAIT)
    third = available(cluster)
    assert third["spec"]["template"] == first["spec"]["template"]
    cluster.helm("test", RELEASE, "--timeout", "5m")

    cluster.helm("uninstall", RELEASE, *WAIT)
    assert left_behind(cluster, before) == set()


@contextmanager
def roles(cluster: Cluster) -> Iterator[None]:
    """The scenario without a server, so that there is nothing to wait for; and nothing is left of it."""
    before = cluster.objects()
    cluster.helm("install", RELEASE, CHART, "--values", CHART / "ci" / "no-mlflow-values.yaml")
    yield
    cluster.helm("uninstall", RELEASE, *WAIT)
    assert left_behind(cluster, before) == set()


def test_the_runner_may_do_what_training_needs(cluster: Cluster):
    with roles(cluster):
        for verb in ("create", "get", "list", "watch", "delete"):
            assert cluster.may("dqo-runner", verb, "trainjobs", TRAINER), verb
        for verb in ("get", "list"):
            assert cluster.may("dqo-runner", verb, "pods"), verb
        assert cluster.may("dqo-runner", "get", "pods", subresource="log")


def test_the_runner_may_do_nothing_else(cluster: Cluster):
    # Asked before the chart is there: what it gives away must not be taken for the cluster's way.
    if cluster.may("nobody-in-particular", "get", "secrets"):
        pytest.skip("every account of this cluster may read Secrets, with or without the chart: refusals can't be seen")
    with roles(cluster):
        for verb, resource, group in (
            ("patch", "trainjobs", TRAINER),
            ("update", "trainjobs", TRAINER),
            ("create", "trainingruntimes", TRAINER),
            ("get", "secrets", ""),
            ("create", "pods", ""),
            ("delete", "pods", ""),
            ("create", "deployments", "apps"),
        ):
            assert not cluster.may("dqo-runner", verb, resource, group), (verb, resource)
        assert not cluster.may("dqo-runner", "create", "pods", subresource="exec")
        for verb, resource, group in (("create", "trainjobs", TRAINER), ("get", "pods", ""), ("get", "secrets", "")):
            assert not cluster.may("nobody-in-particular", verb, resource, group), (verb, resource)


def test_values_that_do_not_fit_are_refused_before_anything_is_made(cluster: Cluster):
    before = cluster.objects()
    done = subprocess.run(
        [
            helm(cluster.major),
            "--namespace",
            cluster.namespace,
            "install",
            RELEASE,
            CHART,
            "--set",
            "mlflow.replicas=2",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "several servers need PostgreSQL" in done.stderr
    assert cluster.objects() == before
