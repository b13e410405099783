"""What every scenario must hold: restricted pods, no passwords in sight, doors that are opened and no others."""

import configparser
import re
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import yaml
from helm import CHART, SCENARIOS, Rendered, render

from components.capacity import CALLS as LOOKS
from components.trainjob import CALLS
from pipelines.cli import _parser

each_scenario = pytest.mark.parametrize("scenario", SCENARIOS)
# What these tests know how to judge.
KNOWN = set(
    "ClusterRole ClusterRoleBinding ConfigMap Deployment Ingress Job NetworkPolicy PersistentVolumeClaim "
    "Pipeline PipelineVersion Pod PodDisruptionBudget Role RoleBinding Secret Service ServiceAccount ServiceMonitor "
    "StatefulSet TrainingRuntime".split()
)


class Pod(NamedTuple):
    name: str
    labels: dict[str, str]
    spec: dict[str, Any]
    of_release: bool  # a training pod is made later, by Kubeflow Trainer

    @property
    def containers(self) -> list[dict[str, Any]]:
        return self.spec.get("initContainers", []) + self.spec["containers"]

    @property
    def ports(self) -> list[int]:
        return [port["containerPort"] for container in self.containers for port in container.get("ports", [])]


def pods(rendered: Rendered) -> list[Pod]:
    found = []
    for thing in rendered.objects:
        name = f"{thing['kind']} {thing['metadata']['name']}"
        if thing["kind"] == "Pod":
            found.append(Pod(name, thing["metadata"]["labels"], thing["spec"], True))
        elif thing["kind"] in ("Deployment", "Job", "StatefulSet"):
            template = thing["spec"]["template"]
            found.append(Pod(name, template["metadata"]["labels"], template["spec"], True))
        elif thing["kind"] == "TrainingRuntime":
            for job in thing["spec"]["template"]["spec"]["replicatedJobs"]:
                found.append(Pod(name, {}, job["template"]["spec"]["template"]["spec"], False))
    assert found or not rendered.of("Service")
    return found


@each_scenario
def test_no_kind_is_overlooked(scenario: str):
    assert {thing["kind"] for thing in render(scenario).objects} <= KNOWN


# --- pods ---


@each_scenario
def test_pods_fit_restricted_pod_security(scenario: str):
    """The rules of the Pod Security Standards, profile restricted, and a read-only root file system on top."""
    for pod in pods(render(scenario)):
        spec, context = pod.spec, pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] > 0, pod.name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, pod.name
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC", "ephemeralContainers")), pod.name
        for volume in spec["volumes"]:
            assert set(volume) - {"name"} <= {
                "configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret",
            }, pod.name  # fmt: skip
        for container in pod.containers:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, pod.name
            assert own["readOnlyRootFilesystem"] is True, pod.name
            assert own["capabilities"] == {"drop": ["ALL"]}, pod.name
            assert not own.get("privileged") and own.get("runAsUser", 1) > 0 and own.get("runAsNonRoot", True), pod.name
            assert all("hostPort" not in port for port in container.get("ports", [])), pod.name


@each_scenario
def test_a_read_only_container_can_write_where_programs_do(scenario: str):
    for pod in pods(render(scenario)):
        writable = {volume["name"] for volume in pod.spec["volumes"] if "emptyDir" in volume}
        for container in pod.containers:
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert mounts["/tmp"]["name"] in writable and not mounts["/tmp"].get("readOnly"), pod.name
            names = {volume["name"] for volume in pod.spec["volumes"]}
            assert {mount["name"] for mount in mounts.values()} <= names, pod.name
            home = [entry["value"] for entry in container.get("env", []) if entry["name"] == "HOME"]
            assert home in (["/tmp"], []), pod.name


@each_scenario
def test_every_container_says_what_it_needs(scenario: str):
    for pod in pods(render(scenario)):
        for container in pod.containers:
            for kind in ("requests", "limits"):
                assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"][kind]), pod.name
            assert container["imagePullPolicy"] == "IfNotPresent"
            assert re.search(r"(:[\w.-]+|@sha256:[0-9a-f]{64})$", container["image"]), container["image"]
            assert not container["image"].endswith(":latest")


def test_a_node_that_reports_no_ephemeral_storage_is_served():
    """A pod that asks for none of it is scheduled there. Its limits stay, which no scheduler looks at."""
    containers = [container for pod in pods(render("minimal")) for container in pod.containers]
    assert [container["name"] for container in containers] == ["migrate", "mlflow", "probe"]
    for container in containers:
        assert container["resources"]["requests"]["ephemeral-storage"] == 0
        assert container["resources"]["limits"]["ephemeral-storage"].endswith("i")


@each_scenario
def test_servers_are_probed(scenario: str):
    for thing in render(scenario).of("Deployment", "StatefulSet"):
        for container in thing["spec"]["template"]["spec"]["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), thing["metadata"]["name"]


@each_scenario
def test_only_the_runner_gets_a_token(scenario: str):
    rendered = render(scenario)
    accounts = {account["metadata"]["name"]: account for account in rendered.of("ServiceAccount")}
    with_token = [name for name, account in accounts.items() if account["automountServiceAccountToken"]]
    assert with_token == ["dqo-runner"]
    for pod in pods(rendered):
        assert pod.spec["automountServiceAccountToken"] is False, pod.name
        registers = pod.labels.get("app.kubernetes.io/component") == "register"  # with a token for Kubeflow alone
        if pod.of_release and not registers:
            assert accounts[pod.spec["serviceAccountName"]]["automountServiceAccountToken"] is False, pod.name


def reads_capacity(scenario: str) -> bool:
    values = yaml.safe_load((CHART / "ci" / f"{scenario}-values.yaml").read_text(encoding="utf-8"))
    return values.get("runner", {}).get("readCapacity", False)


@each_scenario
def test_the_runners_rights_are_the_least(scenario: str):
    rendered = render(scenario)
    role = rendered.one("Role", "dqo-runner")
    assert role["rules"] == [
        {
            "apiGroups": ["trainer.kubeflow.org"],
            "resources": ["trainjobs"],
            "verbs": ["create", "delete", "get", "list", "watch"],
        },
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    ]
    allowed = {
        (verb, group, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert set(CALLS) <= allowed  # tests/unit/test_trainjob.py sees the launcher make exactly these
    binding = rendered.one("RoleBinding", "dqo-runner")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    subjects = {(subject["namespace"], subject["name"]) for subject in binding["subjects"]}
    assert subjects == {("ml", "dqo-runner")} | ({("kubeflow", "pipeline-runner")} if scenario == "full" else set())
    if not reads_capacity(scenario):
        assert len(rendered.of("Role", "RoleBinding")) == 2
        assert rendered.of("ClusterRole", "ClusterRoleBinding") == []


def test_preflight_may_look_at_quotas_and_nodes_where_a_value_says_so():
    rendered = render("full")
    role, cluster_role = rendered.one("Role", "dqo-capacity"), rendered.one("ClusterRole", "dqo:ml:dqo:capacity")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["resourcequotas"], "verbs": ["list"]}]
    assert cluster_role["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}]
    # Those that components/capacity.py asks, and no others.
    assert set(LOOKS) == {
        (verb, group, resource)
        for rule in role["rules"] + cluster_role["rules"]
        for verb, group, resource in product(rule["verbs"], rule["apiGroups"], rule["resources"])
    }
    runner = rendered.one("RoleBinding", "dqo-runner")["subjects"]
    for kind, named in (("RoleBinding", role), ("ClusterRoleBinding", cluster_role)):
        binding = rendered.one(kind, named["metadata"]["name"])
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == (named["kind"], named["metadata"]["name"])
        assert binding["subjects"] == runner and len(runner) == 2
        assert "namespace" not in rendered.one("ClusterRole", "dqo:ml:dqo:capacity")["metadata"]


# --- passwords ---


def texts(thing: Any) -> Iterator[str]:
    if isinstance(thing, dict):
        for value in thing.values():
            yield from texts(value)
    elif isinstance(thing, list):
        for value in thing:
            yield from texts(value)
    elif isinstance(thing, str):
        yield thing


@each_scenario
def test_no_password_stands_in_the_open(scenario: str):
    rendered = render(scenario)
    assert rendered.of("Secret") == []  # only a built-in service without a Secret of yours has a generated one
    for pod in pods(rendered):
        for container in pod.containers:
            for entry in container.get("env", []):
                if re.search(r"PASSWORD|SECRET|TOKEN|_KEY|PGUSER|USERNAME$", entry["name"]):
                    secret = "secretKeyRef" in entry.get("valueFrom", {})
                    assert secret or entry["name"] == "MLFLOW_AUTH_ADMIN_USERNAME" or "test" in pod.name, entry
    for thing in rendered.objects:
        for text in texts(thing):
            assert not re.search(r"\w+://[^\s/\"']*:[^\s/\"']*@", text), identity_of(thing)  # user:password@host
            assert not re.search(r"(?m)^\s*(admin_)?password\s*[=:]\s*\S", text), identity_of(thing)


def identity_of(thing: dict[str, Any]) -> str:
    return f"{thing['kind']} {thing['metadata']['name']}"


def test_a_generated_password_is_long_and_its_own():
    builtin = ("--set", "mlflow.database.kind=builtin,mlflow.artifacts.kind=builtin")
    first, second = render("", *builtin), render("", *builtin, major=3)
    for name, keys in {
        "dqo-postgresql": {"username", "password"},
        "dqo-seaweedfs": {"access-key-id", "secret-access-key"},
    }.items():
        data = [rendered.one("Secret", name)["data"] for rendered in (first, second)]
        assert all(set(one) == keys for one in data)
        secret = "password" if "password" in keys else "secret-access-key"
        assert data[0][secret] != data[1][secret]
        assert all(len(one[secret]) >= 40 for one in data)


# --- network ---


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "Exists"
        if rule["key"] not in labels:
            return False
    return True


class Place(NamedTuple):
    """One end of a connection: a pod's labels and namespace, or an address outside (no labels)."""

    labels: dict[str, str] | None
    namespace: str = "ml"


def admits(peers: list[dict[str, Any]] | None, other: Place) -> bool:
    """Whether peers of a rule hold the other end; no peers are everyone."""
    if not peers:
        return True
    for peer in peers:
        if "ipBlock" in peer:
            if other.labels is None:
                return True
            continue
        if other.labels is None:
            continue
        namespace = {"kubernetes.io/metadata.name": other.namespace}
        here = selects(peer["namespaceSelector"], namespace) if "namespaceSelector" in peer else other.namespace == "ml"
        if here and selects(peer.get("podSelector", {}), other.labels):
            return True
    return False


def allowed(rendered: Rendered, source: Place, target: Place, port: int) -> bool:
    """Whether all policies of the release together let a TCP connection through, as Kubernetes defines it."""
    for direction, rules, end, peers, other in (
        ("Egress", "egress", source, "to", target),
        ("Ingress", "ingress", target, "from", source),
    ):
        if end.labels is None or end.namespace != "ml":
            continue
        policies = [
            policy["spec"]
            for policy in rendered.of("NetworkPolicy")
            if selects(policy["spec"]["podSelector"], end.labels) and direction in policy["spec"]["policyTypes"]
        ]
        if policies and not any(
            admits(rule.get(peers), other) and any(p["port"] == port for p in rule["ports"] if p["protocol"] == "TCP")
            for policy in policies
            for rule in policy.get(rules, [])
        ):
            return False
    return True


def component(name: str) -> Place:
    return Place(
        {
            "app.kubernetes.io/name": "dqo",
            "app.kubernetes.io/instance": "dqo",
            "app.kubernetes.io/component": name,
        }
    )


TASK = Place({"pipelines.kubeflow.org/v2_component": "true"})
TRAINING = Place({"jobset.sigs.k8s.io/jobset-name": "job"})
STRANGER = Place({"app": "other"})
NOTEBOOK = Place({"app": "jupyter"}, "notebooks")
INGRESS = Place({"app": "nginx"}, "ingress-nginx")
PROMETHEUS = Place({"app": "prometheus"}, "monitoring")
DNS = Place({"k8s-app": "kube-dns"}, "kube-system")
OUTSIDE = Place(None)
MLFLOW, JUDGE, TEST = component("mlflow"), component("judge"), component("test")
POSTGRESQL, SEAWEEDFS, REGISTER = component("postgresql"), component("seaweedfs"), component("register")
KUBEFLOW = Place({"app": "ml-pipeline"}, "kubeflow")


@pytest.mark.parametrize(
    ("scenario", "source", "target", "port", "expected"),
    [
        ("minimal", TASK, MLFLOW, 5000, True),
        ("minimal", TRAINING, MLFLOW, 5000, True),
        ("minimal", TEST, MLFLOW, 5000, True),
        ("minimal", STRANGER, MLFLOW, 5000, False),
        ("minimal", NOTEBOOK, MLFLOW, 5000, False),
        ("minimal", INGRESS, MLFLOW, 5000, False),
        ("minimal", OUTSIDE, MLFLOW, 5000, False),
        ("minimal", TASK, MLFLOW, 22, False),
        ("minimal", MLFLOW, DNS, 53, True),
        ("minimal", MLFLOW, OUTSIDE, 443, False),
        ("minimal", MLFLOW, STRANGER, 5432, False),
        ("minimal", TEST, OUTSIDE, 443, False),
        ("full", NOTEBOOK, MLFLOW, 5000, True),
        ("full", INGRESS, MLFLOW, 5000, True),
        ("full", PROMETHEUS, MLFLOW, 5000, True),
        ("full", MLFLOW, POSTGRESQL, 5432, True),
        ("full", MLFLOW, SEAWEEDFS, 8333, True),
        ("full", MLFLOW, SEAWEEDFS, 8888, False),
        ("full", TASK, POSTGRESQL, 5432, False),
        ("full", JUDGE, POSTGRESQL, 5432, False),
        ("full", JUDGE, MLFLOW, 5000, False),
        ("full", POSTGRESQL, OUTSIDE, 443, False),
        ("full", POSTGRESQL, DNS, 53, False),
        ("full", TASK, JUDGE, 8000, True),
        ("full", PROMETHEUS, JUDGE, 8000, True),
        ("full", INGRESS, JUDGE, 8000, False),
        ("full", STRANGER, JUDGE, 8000, False),
        ("full", JUDGE, OUTSIDE, 443, True),
        ("full", REGISTER, KUBEFLOW, 8888, True),
        ("full", REGISTER, KUBEFLOW, 443, False),
        ("full", REGISTER, DNS, 53, True),
        ("full", REGISTER, OUTSIDE, 8888, False),
        ("full", REGISTER, MLFLOW, 5000, False),
        ("full", STRANGER, REGISTER, 8888, False),
        ("air-gapped", JUDGE, OUTSIDE, 443, False),
        ("air-gapped", JUDGE, DNS, 53, False),
        ("air-gapped", TASK, JUDGE, 8000, True),
        ("external-services", MLFLOW, OUTSIDE, 5432, True),
        ("external-services", MLFLOW, OUTSIDE, 9000, True),
        ("external-services", MLFLOW, OUTSIDE, 443, False),
        ("external-services", MLFLOW, STRANGER, 5432, False),
    ],
)
def test_the_network_lets_through_what_is_needed_and_nothing_else(scenario, source, target, port, expected):
    assert allowed(render(scenario), source, target, port) is expected


@pytest.mark.parametrize(
    ("host", "port"),
    [("http://ml-pipeline.kubeflow.svc:8888", 8888), ("https://kf.example.com/pipeline", 443), ("http://kf", 80)],
)
def test_the_port_of_kubeflow_is_that_of_its_address(host: str, port: int):
    rendered = render("minimal", "--set", f"register.enabled=true,register.host={host}")
    assert {p for p in (80, 443, 3000, 8888) if allowed(rendered, REGISTER, KUBEFLOW, p)} == {port}


def test_the_job_types_what_the_command_line_knows():
    """Its arguments pass the parser, with and without a schedule, and the recipe is where they say."""
    for rendered in (
        render("full"),
        render("minimal", "--set", "register.enabled=true,register.host=http://ml-pipeline.kubeflow.svc:8888"),
    ):
        (job,) = rendered.of("Job")
        spec = job["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        program, *words = container["command"] + container["args"]
        assert program == "dqo"
        typed = _parser().parse_args(words)
        assert str(typed.image) == container["image"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert str(typed.recipe.parent) == mounts["recipes"] and str(typed.token_file.parent) == mounts["token"]
        recipes = rendered.one("ConfigMap", volumes["recipes"]["configMap"]["name"])["data"]
        assert typed.recipe.name in recipes
        (source,) = volumes["token"]["projected"]["sources"]
        assert source["serviceAccountToken"]["audience"] == "pipelines.kubeflow.org"
    assert words[0] == "submit" and typed.no_run
    scheduled = render("full").of("Job")[0]["spec"]["template"]["spec"]["containers"][0]
    typed = _parser().parse_args(scheduled["command"][1:] + scheduled["args"])
    assert (typed.cron, typed.name, typed.namespace, typed.service_account) == (
        "0 2 * * *", "nightly", "ml", "dqo-runner",
    )  # fmt: skip


def test_without_policies_the_network_is_open():
    rendered = render("minimal", "--set", "networkPolicy.enabled=false")
    assert rendered.of("NetworkPolicy") == []
    assert allowed(rendered, STRANGER, MLFLOW, 5000)


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [("", 443), ("https://s3.example.com", 443), ("http://s3.example.com", 80), ("http://10.0.0.7:8333", 8333)],
)
def test_the_port_of_s3_is_that_of_its_address(endpoint: str, port: int):
    s3 = f"mlflow.artifacts.kind=s3,mlflow.artifacts.bucket=b-1,mlflow.artifacts.endpoint={endpoint}"
    rendered = render("minimal", "--set", s3)
    assert {p for p in (80, 443, 8333, 9000) if allowed(rendered, MLFLOW, OUTSIDE, p)} == {port}


@each_scenario
def test_every_open_port_has_a_policy_that_admits_somebody_and_no_policy_admits_more(scenario: str):
    rendered = render(scenario)
    policies = [policy["spec"] for policy in rendered.of("NetworkPolicy")]
    of_release = [pod for pod in pods(rendered) if pod.of_release]
    for pod in of_release:
        mine = [policy for policy in policies if selects(policy["podSelector"], pod.labels)]
        denied = [policy for policy in mine if not policy.get("ingress") and not policy.get("egress")]
        assert any(set(policy["policyTypes"]) == {"Ingress", "Egress"} for policy in denied), pod.name
        admitted = {
            port["port"]
            for policy in mine
            for rule in policy.get("ingress", [])
            if rule.get("from")
            for port in rule["ports"]
        }
        assert admitted == set(pod.ports), pod.name
    for policy in policies:
        assert any(selects(policy["podSelector"], pod.labels) for pod in of_release) or not of_release


@each_scenario
def test_services_budgets_and_monitors_find_their_pods(scenario: str):
    rendered = render(scenario)
    of_release = [pod for pod in pods(rendered) if pod.of_release]
    for service in rendered.of("Service"):
        found = [pod for pod in of_release if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        assert len(found) == 1, identity_of(service)
        named = {port["name"] for container in found[0].containers for port in container.get("ports", [])}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named
    for budget in rendered.of("PodDisruptionBudget"):
        found = [pod for pod in of_release if selects(budget["spec"]["selector"], pod.labels)]
        assert len(found) == 1
        workload = rendered.one("Deployment", budget["metadata"]["name"])
        assert workload["spec"]["replicas"] > budget["spec"]["maxUnavailable"]  # else no drain would ever end
    for monitor in rendered.of("ServiceMonitor"):
        found = [s for s in rendered.of("Service") if selects(monitor["spec"]["selector"], s["metadata"]["labels"])]
        assert len(found) == 1
        ports = {port["name"] for port in found[0]["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports
    for workload in rendered.of("Deployment", "StatefulSet"):
        assert selects(workload["spec"]["selector"], workload["spec"]["template"]["metadata"]["labels"])


# --- volumes, hooks, images ---


@each_scenario
def test_claims_stay_and_every_claim_that_is_used_exists(scenario: str):
    rendered = render(scenario)
    claims = {claim["metadata"]["name"] for claim in rendered.of("PersistentVolumeClaim")}
    for claim in rendered.of("PersistentVolumeClaim"):
        assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods(rendered)
        for volume in pod.spec["volumes"]
        if "persistentVolumeClaim" in volume
    }
    existing = {"mlflow-data", "models"} if scenario == "air-gapped" else set()
    assert used == claims | existing
    if scenario in ("minimal", "external-services", "no-mlflow"):
        assert not used


@each_scenario
def test_all_that_uninstalling_may_leave_are_claims(scenario: str):
    """Helm forgets hooks, so a hook must remove itself; nothing but a claim may be kept."""
    for thing in render(scenario).objects:
        annotations = thing["metadata"].get("annotations", {})
        if "helm.sh/hook" in annotations:
            assert annotations["helm.sh/hook"] == "test"
            policies = set(annotations["helm.sh/hook-delete-policy"].split(","))
            assert policies == {"before-hook-creation", "hook-succeeded"}
        assert ("helm.sh/resource-policy" in annotations) == (thing["kind"] == "PersistentVolumeClaim")
        # What belongs to no namespace is not seen by who deletes the namespace; a ClusterRole takes a value of its own.
        cluster_wide = {"Namespace", "CustomResourceDefinition"}
        if not reads_capacity(scenario):
            cluster_wide |= {"ClusterRole", "ClusterRoleBinding"}
        assert thing["kind"] not in cluster_wide


def test_air_gapped_images_come_from_the_mirror_by_digest_and_no_hub_is_asked():
    rendered = render("air-gapped")
    found = pods(rendered)
    images = {container["image"] for pod in found for container in pod.containers}
    images |= {
        executor["container"]["image"]
        for version in rendered.of("PipelineVersion")
        for executor in version["spec"]["pipelineSpec"]["deploymentSpec"]["executors"].values()
    }
    assert images == {
        f"registry.internal:5000/{name}@sha256:{digit * 64}"
        for name, digit in (("dqo-mlflow", "1"), ("dqo-trainer", "2"), ("vllm/vllm-openai", "3"))
    }
    for pod in found:
        assert pod.spec["imagePullSecrets"] == [{"name": "mirror"}]
        if "judge" in pod.name or "torch" in pod.name:
            environment = {entry["name"]: entry.get("value") for entry in pod.containers[0]["env"]}
            assert environment["HF_HUB_OFFLINE"] == "1"
            assert environment["HF_HOME"] == "/models/huggingface"


# --- MLflow ---


@pytest.mark.parametrize("port", [5000, 80])
def test_mlflow_accepts_each_name_of_its_service_with_and_without_port(port: int):
    """Asked of MLflow's own check, with the variables filled in as Kubernetes does."""
    from mlflow.server.security_utils import is_allowed_host_header

    rendered = render("full", "--set", f"mlflow.service.port={port}", "--set", "mlflow.allowedHosts={lab:8080}")
    container = rendered.one("Deployment", "dqo-mlflow")["spec"]["template"]["spec"]["containers"][0]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    text = environment["MLFLOW_SERVER_ALLOWED_HOSTS"]
    # Kubernetes fills in what stands before it only.
    assert {"POD_IP", "HOST_IP"} <= set(list(environment)[: list(environment).index("MLFLOW_SERVER_ALLOWED_HOSTS")])
    for variable, address in (
        ("DQO_MLFLOW_SERVICE_HOST", "10.96.0.7"), ("POD_IP", "10.0.0.9"), ("HOST_IP", "192.0.2.7"),
    ):  # fmt: skip
        text = text.replace(f"$({variable})", address)
    hosts = text.split(",")
    assert "$" not in text and "*" not in hosts
    for name in ("dqo-mlflow", "dqo-mlflow.ml", "dqo-mlflow.ml.svc", "dqo-mlflow.ml.svc.cluster.local", "10.96.0.7"):
        assert is_allowed_host_header(hosts, name) and is_allowed_host_header(hosts, f"{name}:{port}"), name
    for name in ("192.0.2.7:6443", "192.0.2.7:30500"):  # through the API server's proxy, and a NodePort
        assert is_allowed_host_header(hosts, name), name
    for name in ("10.0.0.9:5000", "localhost:31234", "127.0.0.1:5000", "mlflow.example.com", "lab:8080"):
        assert is_allowed_host_header(hosts, name), name
    for name in (
        "evil.example.com",
        f"evil.example.com:{port}",
        "10.evil.example.com",
        "dqo-mlflow:1",
        "localhost.x.com",
    ):
        assert not is_allowed_host_header(hosts, name), name
    assert environment["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] == "https://mlflow.example.com"


@each_scenario
def test_nothing_inside_the_release_is_looked_up_by_name(scenario: str):
    """A cluster without DNS: addresses come from the variables that Kubernetes sets, for Services that exist."""
    rendered = render(scenario)
    services = {service["metadata"]["name"] for service in rendered.of("Service")}
    for pod in pods(rendered):
        for container in pod.containers:
            for entry in container.get("env", []):
                value = entry.get("value", "")
                for name in re.findall(r"\$\(([A-Z0-9_]+)_SERVICE_HOST\)", value):
                    assert name.lower().replace("_", "-") in services, entry
                    assert pod.spec["enableServiceLinks"] is True
                if pod.of_release and "ALLOWED" not in entry["name"]:
                    assert not any(service in value for service in services), entry


def test_mlflow_runs_as_asked_for():
    rendered = render("external-services")
    spec = rendered.one("Deployment", "dqo-mlflow")["spec"]
    assert spec["strategy"]["type"] == "RollingUpdate" and spec["replicas"] == 2
    container = spec["template"]["spec"]["containers"][0]
    assert "--backend-store-uri=postgresql+psycopg2://" in container["args"]
    assert "--artifacts-destination=s3://experiments/mlflow" in container["args"]
    assert "--app-name=basic-auth" in container["args"]
    environment = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
    assert environment["PGHOST"] == "postgresql.databases.svc"
    assert environment["PGSSLMODE"] == "verify-full"
    assert environment["PGPASSWORD"] == {"secretKeyRef": {"name": "postgresql-user", "key": "password"}}
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert not any("uvicorn" in argument for argument in container["args"])
    settings = configparser.ConfigParser()
    settings.read_string(rendered.one("ConfigMap", "dqo-mlflow")["data"]["basic_auth.ini"])
    assert dict(settings["mlflow"]) == {
        "default_permission": "READ",
        "database_uri": "postgresql+psycopg2://",
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        "auth_cache_ttl_seconds": "60",
    }
    two = render("full").one("Deployment", "dqo-mlflow")["spec"]["template"]["spec"]["containers"][0]
    assert "--workers=2" in two["args"] and "--uvicorn-opts=--timeout-worker-healthcheck=120" in two["args"]
    minimal = render("minimal").one("Deployment", "dqo-mlflow")["spec"]
    assert minimal["strategy"] == {"type": "Recreate"}
    assert "--artifacts-destination=/data/artifacts" in minimal["template"]["spec"]["containers"][0]["args"]


def test_training_pods_get_the_queue_the_nodes_and_the_gpus():
    runtime = render("multi-node").one("TrainingRuntime", "dqo-torch")["spec"]
    assert runtime["template"]["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpu"}
    assert runtime["mlPolicy"] == {"numNodes": 4, "torch": {}}
    pod = runtime["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
