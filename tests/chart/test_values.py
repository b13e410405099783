"""Values are checked at the door: by the schema, and by messages for values that do not fit together."""

import json
from typing import Any

import jsonschema
import pytest
import yaml
from helm import CHART, MAJORS, flags, render, run, template

SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
VALUES = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
EXTERNAL = {"mlflow.database.kind": "external", "mlflow.database.host": "db", "mlflow.database.existingSecret": "s"}
S3 = {"mlflow.artifacts.kind": "s3", "mlflow.artifacts.bucket": "bucket"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mlflow.replicas": 2}, "mlflow.replicas=2 with mlflow.database.kind=sqlite"),
        ({"mlflow.replicas": 3, **EXTERNAL}, "mlflow.replicas=3 with mlflow.artifacts.kind=local"),
        ({"mlflow.database.kind": "external"}, "mlflow.database.host is not set"),
        ({"mlflow.database.kind": "external"}, "mlflow.database.existingSecret is not set"),
        ({**EXTERNAL, "mlflow.database.sslMode": "verify-full"}, "mlflow.database.caSecret is not set"),
        ({"mlflow.database.host": "db"}, "mlflow.database.kind=sqlite with mlflow.database.host or existingSecret"),
        ({"mlflow.artifacts.kind": "s3"}, "mlflow.artifacts.bucket is not set"),
        ({"mlflow.artifacts.bucket": "bucket"}, "mlflow.artifacts.kind=local with mlflow.artifacts.bucket"),
        ({**EXTERNAL, **S3, "mlflow.persistence.enabled": True}, "nothing would be kept there"),
        ({"mlflow.auth.enabled": True}, "mlflow.auth.existingSecret is not set"),
        ({"mlflow.ingress.enabled": True, "mlflow.ingress.host": "m.example.com"}, "anyone who reaches the ingress"),
        ({"mlflow.ingress.enabled": True}, "mlflow.ingress.host is not set"),
        (
            {"mlflow.database.kind": "builtin", "postgresql.persistence.enabled": True},
            "postgresql.existingSecret is not set",
        ),
        (
            {"mlflow.artifacts.kind": "builtin", "seaweedfs.persistence.enabled": True},
            "seaweedfs.existingSecret is not set",
        ),
        ({"mlflow.enabled": False}, "mlflow.enabled=false: tracking.uri is not set"),
        (
            {"mlflow.enabled": False, "tracking.uri": "http://m", "mlflow.persistence.enabled": True},
            "mlflow.enabled=false with mlflow.ingress, persistence, auth or metrics enabled",
        ),
        (
            {"mlflow.persistence.existingClaim": "c"},
            "mlflow.persistence.existingClaim=c with mlflow.persistence.enabled",
        ),
        ({"workspace.existingClaim": "c"}, "workspace.existingClaim=c with workspace.enabled=false"),
        ({"register.enabled": True}, "register.host is not set"),
        (
            {"register.enabled": True, "register.host": "http://k", "register.recipe": "no.yaml"},
            "register.recipe=no.yaml: neither the chart nor recipes.extra",
        ),
        (
            {"register.enabled": True, "register.host": "http://k", "recipes.enabled": False},
            "register.enabled=true with recipes.enabled=false",
        ),
        (
            {"register.enabled": True, "register.host": "http://k", "runner.serviceAccount.create": False},
            "the Job runs as this account",
        ),
        ({"judge.enabled": True}, "judge.model is not set"),
        ({"judge.enabled": True, "judge.model": "org/model", "offline": True}, "nowhere to take its model from"),
        ({"judge.enabled": True, "judge.model": "/models/m"}, "/models is the model cache"),
        ({"serviceMonitor.enabled": True}, "nothing serves metrics"),
        (
            {
                "serviceMonitor.enabled": True,
                "mlflow.metrics.enabled": True,
                "mlflow.auth.enabled": True,
                "mlflow.auth.existingSecret": "s",
            },
            "set serviceMonitor.mlflowSecret",
        ),
        ({"runner.serviceAccount.create": False}, "says who runs pipelines"),
        ({"pipelines.names": ["quickstart", "none"]}, 'the chart holds no pipeline "none"'),
        ({"recipes.extra": {"quickstart.yaml": "name: x"}}, "recipes.extra: quickstart.yaml"),
        ({"fullnameOverride": "7b"}, "names that begin with a letter"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(values: dict[str, Any], message: str):
    done = template(4, *flags(values))
    assert done.returncode != 0
    assert message in done.stderr, done.stderr


def test_all_misfits_are_told_at_once_by_both_versions():
    for major in MAJORS:
        done = template(major, *flags({"mlflow.replicas": 2, "mlflow.auth.enabled": True, "judge.enabled": True}))
        for message in ("kind=sqlite", "kind=local", "mlflow.auth.existingSecret", "judge.model"):
            assert message in done.stderr


WRONG = [
    ("mlflow.replicas", "two"),
    ("mlflow.replicas", 0),
    ("mlflow.replica", 1),
    ("mlflow.database.kind", "mysql"),
    ("mlflow.database.port", 70000),
    ("mlflow.image.digest", "sha256:short"),
    ("mlflow.image.pullPolicy", "Sometimes"),
    ("mlflow.image.tag", ""),
    ("mlflow.persistence.enabled", "yes"),
    ("mlflow.persistence.size", "10 GB"),
    ("mlflow.resources.limits", {"cpu": "1"}),
    ("mlflow.extraEnv", [{"name": "A", "valeu": "b"}]),
    ("mlflow.service.type", "ExternalName"),
    ("tracking.uri", "mlflow:5000"),
    ("podSecurity.runAsUser", 0),
    ("postgresql.runAsUser", 0),
    ("commonLabels", {"app.kubernetes.io/name": "other"}),
    ("imagePullSecrets", [{"name": "x"}]),
    ("networkPolicy.storageCidrs", ["10.0.0.1"]),
    ("pipelines.install", True),
    ("trainer.runtime.nodes", 1.5),
    ("judge.maxModelLen", 0),
    ("serviceMonitor.interval", "30"),
    ("runner.subjects", [{"name": "x"}]),
    ("recipes.extra", {"a.txt": "x"}),
    ("unknown", {}),
    ("serviceMonitor.install", "yes"),
    ("mlflow.test.resources.requests", {"cpu": "1", "memory": "1Gi"}),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda part: str(part)[:30])
def test_wrong_types_and_unknown_keys_fit_no_schema(key: str, value: Any):
    values = json.loads(json.dumps(VALUES))
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, SCHEMA)


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("case", [0, 2, 14], ids=str)
def test_helm_asks_the_schema(case: int, major: int):
    key, value = WRONG[case]
    done = template(major, *flags({key: value}))
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr, done.stderr
    assert key.rpartition(".")[2] in done.stderr


def test_defaults_fit_the_schema_and_the_schema_knows_every_key_and_no_other():
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(VALUES, SCHEMA)

    def compare(values: Any, schema: dict[str, Any], path: str) -> None:
        if "$ref" in schema:
            schema = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]]
        if "properties" not in schema:
            return
        assert schema["additionalProperties"] is False, path
        missing = set(schema["properties"]) ^ set(values)
        # `global` is Helm's own; volumes of pods that one server uses have fewer keys than shared ones.
        assert missing <= {"global"}, f"{path}: {missing}"
        for name, value in values.items():
            compare(value, schema["properties"][name], f"{path}.{name}")

    compare(VALUES, SCHEMA, "")


# --- what the user reads ---


def notes(*values: Any, major: int = 4) -> str:
    """The notes as `helm install --dry-run` shows them without a cluster."""
    done = run(major, "install", "dqo", CHART, "--namespace", "ml", "--dry-run=client", *values)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("NOTES:")[2]


def test_notes_say_what_to_do_next_and_what_will_be_lost():
    text = notes()
    assert "kubectl -n ml port-forward service/dqo-mlflow 5000:5000" in text
    assert "helm test -n ml dqo" in text
    assert "WARNING: runs and the registry, models and reports are in the pod and go with it" in text
    assert "WARNING: MLflow asks for no password" in text
    assert "no NetworkPolicy limits" not in text


def test_notes_warn_of_what_is_lost_and_of_nothing_else():
    text = notes(*flags(EXTERNAL), "--set", "networkPolicy.enabled=false")
    assert "WARNING: models and reports are in the pod" in text
    assert "no NetworkPolicy limits that" in text
    assert "are in the pod" not in notes("--set", "mlflow.persistence.enabled=true")


def test_notes_of_a_production_installation_warn_of_nothing():
    text = notes("--values", CHART / "ci" / "external-services-values.yaml")
    assert "WARNING" not in text
    assert (
        notes("--values", CHART / "ci" / "no-mlflow-values.yaml")
        .strip()
        .startswith("Runs go to https://mlflow.example.com")
    )


def test_notes_say_whose_pods_are_let_in():
    words = "MLflow lets in pipeline pods of namespace ml alone"
    text = notes()
    assert words in text and "networkPolicy.clientNamespaces={kubeflow}" in text
    assert words not in notes("--set", "networkPolicy.clientNamespaces={kubeflow}")
    assert words not in notes("--set", "networkPolicy.enabled=false")
    assert "lets in" not in notes("--namespace", "kubeflow")
    assert "lets in" not in notes("--values", CHART / "ci" / "no-mlflow-values.yaml")


def test_notes_name_the_page_and_a_missing_password_of_training_pods():
    full = CHART / "ci" / "full-values.yaml"
    assert "MLflow is at https://mlflow.example.com" in notes("--values", full)
    assert "set tracking.existingSecret" in notes("--values", full, "--set", "tracking.existingSecret=")


def test_notes_say_which_kinds_the_cluster_lacks():
    scraped = flags({"serviceMonitor.enabled": True, "mlflow.metrics.enabled": True})
    lacking = "No ServiceMonitor was installed: the cluster does not know the kind"
    assert lacking in notes(*scraped)
    assert lacking not in notes(*scraped, "--set", "serviceMonitor.install=never")
    assert "ServiceMonitor" not in notes()


def test_extra_environment_and_placement_reach_the_pod():
    extra = {"mlflow.extraEnv": [{"name": "A", "value": "1"}], "mlflow.nodeSelector": {"disk": "ssd"}}
    pod = render("minimal", *flags(extra)).one("Deployment", "dqo-mlflow")["spec"]["template"]["spec"]
    assert pod["containers"][0]["env"][-1] == {"name": "A", "value": "1"}
    assert pod["nodeSelector"] == {"disk": "ssd"}
