"""The commands of the cluster tests, with the real kubectl and Helm against a server with Kubernetes' paths."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import ApiServer, serving
from helm import MAJORS, ToolMissing, helm, kubectl
from release import BY_ITSELF, Cluster, image, namespace

HERE = str(Path(__file__).parent)
DIGEST = "sha256:" + "a" * 64


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    try:
        kubectl()
        for major in MAJORS:
            helm(major)
    except ToolMissing as reason:
        pytest.skip(str(reason))
    with serving(tmp_path) as (server, config):
        monkeypatch.setenv("KUBECONFIG", str(config))
        monkeypatch.setenv("KUBECACHEDIR", str(tmp_path / "cache"))
        yield server


def add_release(server: ApiServer) -> None:
    labels = {"app.kubernetes.io/instance": "dqo"}
    container = {"name": "mlflow", "image": "dqo-mlflow:0.1.0"}
    server.add(
        "pods", "dqo-mlflow-0", "ml", metadata={"labels": labels}, spec={"containers": [container]},
        status={"phase": "Pending"},
    )  # fmt: skip
    server.logs["dqo-mlflow-0"] = "migrate: waiting for the database\n"
    server.add(
        "events", "late", "ml", metadata={"creationTimestamp": "2026-01-01T00:00:09Z"}, message="Back-off pulling",
        reason="BackOff", type="Warning", involvedObject={"kind": "Pod", "name": "dqo-mlflow-0", "namespace": "ml"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "values"),
    [
        ("", []),
        ("dqo-mlflow:next", ["repository=dqo-mlflow", "tag=next"]),
        ("localhost/dqo-mlflow", ["repository=localhost/dqo-mlflow"]),
        ("registry.example:5000/dqo-mlflow", ["repository=registry.example:5000/dqo-mlflow"]),
        ("registry.example:5000/dqo-mlflow:1", ["repository=registry.example:5000/dqo-mlflow", "tag=1"]),
        (f"r.example/dqo-mlflow@{DIGEST}", ["repository=r.example/dqo-mlflow", f"digest={DIGEST}"]),
        (f"r:5000/m:1@{DIGEST}", ["repository=r:5000/m", "tag=1", f"digest={DIGEST}"]),
    ],
)
def test_an_image_reference_becomes_values(reference: str, values: list[str]):
    assert image(reference)[1::2] == [f"mlflow.image.{value}" for value in values]
    assert set(image(reference)[::2]) <= {"--set-string"}


def test_rights_are_asked_for_by_group_also_where_the_cluster_lacks_the_kind(server: ApiServer):
    server.allows = lambda spec: spec["resourceAttributes"]["group"] == "trainer.kubeflow.org"
    cluster = Cluster("ml", 4)
    assert cluster.may("dqo-runner", "create", "trainjobs", "trainer.kubeflow.org")
    assert not cluster.may("dqo-runner", "get", "pods", subresource="log")
    first, second = server.reviews
    assert first == {
        "user": "system:serviceaccount:ml:dqo-runner",
        "groups": ["system:serviceaccounts", "system:serviceaccounts:ml", "system:authenticated"],
        "resourceAttributes": {
            "namespace": "ml", "verb": "create", "group": "trainer.kubeflow.org", "resource": "trainjobs",
            "subresource": "",
        },
    }  # fmt: skip
    assert second["resourceAttributes"] == {
        "namespace": "ml", "verb": "get", "group": "", "resource": "pods", "subresource": "log",
    }  # fmt: skip


def test_objects_are_listed_where_an_aggregated_api_is_down(server: ApiServer):
    add_release(server)
    server.add("secrets", "elsewhere", "other")
    done = subprocess.run([kubectl(), "api-resources"], capture_output=True, text=True)
    assert done.returncode == 1 and "metrics.k8s.io" in done.stderr  # it is down indeed
    assert Cluster("ml", 4).objects() == {"pod/dqo-mlflow-0"}  # an event is no object of the release


def test_a_cluster_that_does_not_answer_is_no_empty_namespace(server: ApiServer):
    server.refuses = lambda method, path: True
    with pytest.raises(AssertionError, match=r"(?i)forbidden"):
        Cluster("ml", 4).objects()


KUBEFLOW = {
    "pipelines.kubeflow.org/v2beta1": {"pipelines": "Pipeline", "pipelineversions": "PipelineVersion"},
    "trainer.kubeflow.org/v1alpha1": {"trainingruntimes": "TrainingRuntime", "trainjobs": "TrainJob"},
}
NOTES = {"pipelines": "No pipelines were installed (", "trainer": "No TrainingRuntime was installed: "}


def test_a_cluster_without_kubeflow_has_no_objects_of_it_and_the_notes_say_so(server: ApiServer):
    cluster = Cluster("ml", 4)
    assert cluster.custom_objects() == {"pipelines": None, "pipelineversions": None, "trainingruntimes": None}
    cluster.holds_what_the_cluster_knows("\n".join(NOTES.values()))
    for words in NOTES.values():
        with pytest.raises(AssertionError, match="No "):
            cluster.holds_what_the_cluster_knows(words)


def test_a_cluster_with_kubeflow_has_the_pipeline_its_version_and_the_runtime(server: ApiServer):
    server.kinds |= KUBEFLOW
    cluster = Cluster("ml", 4)
    with pytest.raises(AssertionError, match=r"pipelines.*\[\]"):
        cluster.holds_what_the_cluster_knows("")
    server.add("pipelines", "dqo-quickstart", "ml")
    server.add("pipelineversions", "dqo-quickstart-0123456789ab", "ml")
    with pytest.raises(AssertionError, match=r"trainingruntimes.*\[\]"):
        cluster.holds_what_the_cluster_knows("")
    server.add("trainingruntimes", "dqo-torch", "ml")
    cluster.holds_what_the_cluster_knows("")
    with pytest.raises(AssertionError, match="No pipelines"):
        cluster.holds_what_the_cluster_knows(NOTES["pipelines"])
    server.add("pipelineversions", "dqo-quickstart-aaaaaaaaaaaa", "ml")  # of an earlier revision
    with pytest.raises(AssertionError, match="pipelineversions"):
        cluster.holds_what_the_cluster_knows("")


def test_another_version_of_a_kind_is_another_kind(server: ApiServer):
    """The chart asks for the version that it writes."""
    server.kinds["trainer.kubeflow.org/v1"] = {"trainingruntimes": "TrainingRuntime"}
    assert Cluster("ml", 4).custom_objects()["trainingruntimes"] is None


def test_a_kind_that_cannot_be_asked_for_is_no_missing_kind(server: ApiServer):
    server.refuses = lambda method, path: path.startswith("/apis/pipelines")
    with pytest.raises(AssertionError, match=r"(?i)forbidden"):
        Cluster("ml", 4).custom_objects()


def test_a_pod_may_go_with_a_delay(server: ApiServer):
    add_release(server)
    cluster = Cluster("ml", 4)
    assert not cluster.goes("pod/dqo-mlflow-0", 0)
    later = threading.Timer(1.5, lambda: server.objects.pop(("ml", "pods", "dqo-mlflow-0")))
    later.start()
    assert cluster.goes("pod/dqo-mlflow-0", 60)
    later.join()


def test_a_namespace_is_restricted_and_goes(server: ApiServer):
    with namespace("mine"):
        labels = server.objects["", "namespaces", "mine"]["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == labels["pod-security.kubernetes.io/warn"] == "restricted"
        assert Cluster("mine", 4).settled(BY_ITSELF, 0) == BY_ITSELF
    assert server.objects == {}


def test_a_namespace_that_stays_is_a_warning_that_names_it(server: ApiServer):
    server.refuses = lambda method, path: method == "DELETE"
    with pytest.warns(RuntimeWarning, match=r"(?s)namespace mine is not deleted.*Forbidden"), namespace("mine"):
        pass
    assert server.named("namespaces") == ["mine"]


def test_the_evidence_holds_pods_events_and_logs(server: ApiServer):
    add_release(server)
    server.add("events", "early", "ml", message="Scheduled it", reason="Scheduled", type="Normal",
               involvedObject={"kind": "Pod", "name": "dqo-mlflow-0", "namespace": "ml"})  # fmt: skip
    text = Cluster("ml", 4).evidence()
    assert "[pod/dqo-mlflow-0/mlflow] migrate: waiting for the database" in text
    assert "dqo-mlflow:0.1.0" in text  # from the description
    events = text.partition("get events")[2].partition("$ kubectl")[0]
    assert 0 < events.index("early") < events.index("late")


def test_evidence_that_cannot_be_had_is_no_error(server: ApiServer):
    server.refuses = lambda method, path: True
    text = Cluster("ml", 4).evidence()
    assert text.count("$ kubectl") == 4 and "forbidden" in text.lower()


# --- the tests that install, as pytest runs them ---


def run_tests(name: str) -> subprocess.CompletedProcess[str]:
    """Run one of the cluster tests."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-m", "cluster", "-k", name, HERE],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        timeout=600,
    )


@pytest.mark.slow
def test_each_test_leaves_no_namespace(server: ApiServer):
    done = run_tests("refused")
    assert done.returncode == 0 and f"{len(MAJORS)} passed" in done.stdout, done.stdout
    assert server.requests.count("POST /api/v1/namespaces") == len(MAJORS)
    assert server.objects == {}


@pytest.mark.slow
def test_a_cluster_that_refuses_nobody_is_told_before_anything_is_installed(server: ApiServer):
    server.allows = lambda spec: True
    done = run_tests("nothing_else")
    assert done.returncode == 0 and f"{len(MAJORS)} skipped" in done.stdout, done.stdout
    assert "every account of this cluster may read Secrets" in done.stdout
    assert {review["user"].rpartition(":")[2] for review in server.reviews} == {"nobody-in-particular"}
    assert server.objects == {}


@pytest.mark.slow
def test_a_failed_installation_is_told_with_what_the_cluster_says(server: ApiServer):
    def installing(method: str, path: str) -> bool:
        """Refuse Helm the schemas that it checks its objects with; from then on there is an event to be told."""
        if not path.startswith("/openapi"):
            return False
        (name,) = server.named("namespaces")
        server.add("events", "exceeded-quota", name)
        return True

    server.refuses = installing
    done = run_tests("life and helm4")
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout
    assert "INSTALLATION FAILED" in done.stdout and "what the cluster says" in done.stdout, done.stdout
    assert "exceeded-quota" in done.stdout.partition("what the cluster says")[2]
    assert server.objects == {}


def test_without_a_cluster_the_reason_is_printed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KUBECONFIG", raising=False)
    done = run_tests("refused")
    assert done.returncode == 0 and "KUBECONFIG is not set: there is no cluster" in done.stdout
