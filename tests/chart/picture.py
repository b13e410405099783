"""The picture of the cluster in docs/operations.md, drawn from the chart's fullest scenario.

Boxes are what the chart installs and whom its NetworkPolicies let in or out, arrows are what these allow; nothing else
is drawn but the volumes of each. `update_golden.py` writes it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
BEGIN, END = "<!-- picture: begin (tests/chart/picture.py) -->\n", "<!-- picture: end -->\n"
SCENARIO = "full"
WORKLOADS = ("Deployment", "StatefulSet", "Job", "TrainingRuntime")
COMPONENT = "app.kubernetes.io/component"
TASKS, TRAINING = "tasks", "training"
PEERS = {"pipelines.kubeflow.org/v2_component": TASKS, "jobset.sigs.k8s.io/jobset-name": TRAINING}
"""Label of pods that others make -> their box."""
DNS = 53


def text(objects: list[dict[str, Any]]) -> str:
    """The picture in Mermaid's language."""
    inside = {TASKS: "tasks of pipeline runs", TRAINING: "pods of training jobs"}
    volumes: set[str] = set()
    mounts: list[str] = []
    for thing in sorted(objects, key=lambda one: (one["kind"], one["metadata"]["name"])):
        if thing["kind"] not in WORKLOADS:
            continue
        name = thing["metadata"]["labels"][COMPONENT]
        replicas = thing["spec"].get("replicas", 1)
        title = f"{thing['kind']} {thing['metadata']['name']}" + (f" x {replicas}" if replicas > 1 else "")
        inside[name] = f"{inside[name]}<br>{title}" if name in inside else title
        for claim in _claims(thing):
            volumes.add(claim)
            mounts.append(f"  {name} --- {_id(claim)}")
    outside: dict[str, str] = {}
    flows = []
    for policy in sorted(
        (one for one in objects if one["kind"] == "NetworkPolicy"), key=lambda one: str(one["metadata"])
    ):
        here = policy["spec"]["podSelector"]["matchLabels"].get(COMPONENT)
        for rule in policy["spec"].get("ingress", []):
            for peer, title in _peers(rule["from"]):
                outside.setdefault(peer, title)
                flows.append((peer, here, _ports(rule)))
        for rule in policy["spec"].get("egress", []):
            if {port["port"] for port in rule["ports"]} != {DNS}:
                for peer, title in _peers(rule.get("to", [])) or [("anywhere", "anywhere")]:
                    outside.setdefault(peer, title)
                    flows.append((here, peer, _ports(rule)))
    inside |= {name: f"Pod of <code>helm {name}</code>" for name in ("test",) if any(name in flow for flow in flows)}
    lines = ["flowchart LR", '  subgraph release["namespace of the release"]']
    lines += [f'    {name}["{title}"]' for name, title in inside.items()]
    lines += [f'    {_id(claim)}[("{claim}")]' for claim in sorted(volumes)]
    lines += ["  end"]
    lines += [f'  {_id(peer)}(["{title}"])' for peer, title in outside.items() if peer not in inside]
    # A flow that both ends' rules allow is one arrow.
    lines += [f"  {_id(one)} -- {ports} --> {_id(other)}" for one, other, ports in dict.fromkeys(flows)]
    return "\n".join([*lines, *mounts]) + "\n"


def _peers(rules: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Box and title of those whom a rule names."""
    found = []
    for rule in rules:
        if "namespaceSelector" in rule:
            name = rule["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
            found.append((name, f"namespace {name}"))
        else:
            selector = rule["podSelector"]
            keys = [*selector.get("matchLabels", {}), *(one["key"] for one in selector.get("matchExpressions", []))]
            name = next((PEERS[key] for key in keys if key in PEERS), None) or selector["matchLabels"][COMPONENT]
            found.append((name, name))
    return found


def _ports(rule: dict[str, Any]) -> str:
    return ", ".join(str(port["port"]) for port in rule["ports"])


def _claims(thing: Any) -> Iterator[str]:
    """Names of the volume claims anywhere in an object."""
    if isinstance(thing, dict):
        if "claimName" in thing:
            yield thing["claimName"]
        for value in thing.values():
            yield from _claims(value)
    elif isinstance(thing, list):
        for value in thing:
            yield from _claims(value)


def _id(name: str) -> str:
    return name.replace("-", "_")


def page(old: str, objects: list[dict[str, Any]]) -> str:
    """The page with its picture drawn anew."""
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n```mermaid\n{text(objects)}```\n\n{END}{after}"
