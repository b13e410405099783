"""Commands on one namespace of the cluster that KUBECONFIG names, and what can be said when one of them fails."""

import json
import re
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helm import helm, kubectl

RELEASE = "dqo"
BESIDE = ("events", "events.events.k8s.io", "pods.metrics.k8s.io")  # what is written about objects, not objects
BY_ITSELF = {"configmap/kube-root-ca.crt", "serviceaccount/default"}  # what a namespace has


CUSTOM = {
    ("pipelines.kubeflow.org", "v2beta1", "pipelines"): r"dqo-quickstart",
    ("pipelines.kubeflow.org", "v2beta1", "pipelineversions"): r"dqo-quickstart-[0-9a-f]{8,}",
    ("trainer.kubeflow.org", "v1alpha1", "trainingruntimes"): r"dqo-torch",
}
"""Group, version and plural of kinds of others -> what the chart's defaults add where the cluster knows them."""


def run(*command: str | Path, text: str | None = None) -> str:
    """What a command prints.

    Args:
        command: Its words.
        text: What it reads from its standard input.

    Raises:
        AssertionError: With the command's own words, if it fails.
    """
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, input=text)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def create(document: dict[str, Any]) -> Any:
    """What Kubernetes makes of an object."""
    return json.loads(
        run(kubectl(), "create", "--validate=false", "--output=json", "--filename=-", text=json.dumps(document))
    )


def image(reference: str) -> list[str]:
    """Helm's arguments for an image of MLflow: `name`, `name:tag`, `name@sha256:...` or all three; nothing for none."""
    name, _, digest = reference.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:  # the colon of a registry's port
        repository, tag = name, ""
    given = {"repository": repository, "tag": tag, "digest": digest}
    return [word for key, value in given.items() if value for word in ("--set-string", f"mlflow.image.{key}={value}")]


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
        # It ends with 1 and lists all others where one of the cluster's aggregated APIs is down.
        asked = [kubectl(), "api-resources", "--namespaced", "--verbs=list", "--output=name"]
        done = subprocess.run(asked, capture_output=True, text=True)
        kinds = set(done.stdout.split())
        assert "pods" in kinds, done.stdout + done.stderr
        wanted = ",".join(sorted(kinds - set(BESIDE)))
        return set(self.kubectl("get", wanted, "--ignore-not-found", "--output=name").split())

    def knows(self, group: str, version: str, plural: str) -> bool:
        """Whether the cluster serves a kind in this version, which is what the chart asks for."""
        asked = [kubectl(), "get", "--raw", f"/apis/{group}/{version}"]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode != 0:
            assert "NotFound" in done.stderr or "could not find the requested resource" in done.stderr, done.stderr
            return False
        return plural in {resource["name"] for resource in json.loads(done.stdout)["resources"]}

    def custom_objects(self) -> dict[str, list[str] | None]:
        """Plural of each kind of `CUSTOM` -> names of the namespace's objects; None where there is no such kind."""
        return {
            plural: [thing["metadata"]["name"] for thing in self.get(f"{plural}.{version}.{group}")["items"]]
            if self.knows(group, version, plural)
            else None
            for group, version, plural in CUSTOM
        }

    def holds_what_the_cluster_knows(self, notes: str) -> None:
        """Check that the release has added its objects of others' kinds where there are such, and else has said so.

        Args:
            notes: What Helm has printed at the end of an installation or upgrade.

        Raises:
            AssertionError: If an object is missing, is there twice or has another name, or the notes do not fit.
        """
        found = self.custom_objects()
        for (_, _, plural), name in CUSTOM.items():
            names = found[plural]
            assert names is None or (len(names) == 1 and re.fullmatch(name, names[0])), (plural, names)
        assert ("No pipelines were installed" in notes) == (found["pipelineversions"] is None), notes
        assert ("No TrainingRuntime was installed" in notes) == (found["trainingruntimes"] is None), notes

    def goes(self, name: str, seconds: float = 60) -> bool:
        """Whether an object, as `kind/name`, is gone before the time is over.

        Helm 4 takes one whose state it can't tell for gone, and Kubernetes deletes a pod with a delay.
        """
        end = time.monotonic() + seconds
        while there := name in self.objects():
            if time.monotonic() >= end:
                break
            time.sleep(1)
        return not there

    def settled(self, expected: set[str], seconds: float = 120) -> set[str]:
        """The namespace's objects, once they are the expected ones or the time is over: garbage goes with a delay."""
        end = time.monotonic() + seconds
        while (found := self.objects()) != expected and time.monotonic() < end:
            time.sleep(2)
        return found

    def may(self, account: str, verb: str, resource: str, group: str = "", subresource: str = "") -> bool:
        """Whether a service account of the namespace has a right there, also where the cluster lacks the kind.

        `kubectl auth can-i` would look the kind up, and ask about another one where it is not found.
        """
        attributes = {"verb": verb, "group": group, "resource": resource, "subresource": subresource}
        accounts = "system:serviceaccounts"
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": f"system:serviceaccount:{self.namespace}:{account}",
                "groups": [accounts, f"{accounts}:{self.namespace}", "system:authenticated"],
                "resourceAttributes": {"namespace": self.namespace, **attributes},
            },
        }
        return create(review)["status"]["allowed"]

    def evidence(self) -> str:
        """What the cluster tells about the release; an error of a command takes the place of what it would print."""
        told = []
        for command in (
            ("get", "pods", "--output=wide"),
            ("get", "events", "--sort-by=.metadata.creationTimestamp"),
            ("describe", "pods"),
            (
                "logs", f"--selector=app.kubernetes.io/instance={RELEASE}", "--all-containers", "--prefix",
                "--ignore-errors", "--tail=100",
            ),
        ):  # fmt: skip
            asked = [kubectl(), "--namespace", self.namespace, "--request-timeout=30s", *command]
            done = subprocess.run(asked, capture_output=True, text=True)
            told.append(f"$ kubectl {' '.join(command)}\n{done.stdout[-20000:]}{done.stderr[-2000:]}")
        return "\n".join(told)


@contextmanager
def namespace(name: str) -> Iterator[None]:
    """A namespace that enforces restricted Pod Security, and that is deleted in the end."""
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    try:
        yield
    finally:
        # No failure of the chart's: a namespace hangs where an aggregated API is down.
        asked = [kubectl(), "delete", "namespace", name, "--wait=true", "--timeout=5m"]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode != 0:
            words = f"namespace {name} is not deleted, look after it yourself: {done.stderr.strip()[-500:]}"
            warnings.warn(words, RuntimeWarning, stacklevel=2)
