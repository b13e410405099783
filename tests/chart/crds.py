"""Strict checks of custom objects against the schemas of the custom resource definitions themselves, in `crd/`.

`python tests/chart/crds.py take CRD.yaml...` writes the files anew from definitions of a release (see crd/README.md).
"""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

FOLDER = Path(__file__).parent / "crd"
_OPEN = "x-kubernetes-preserve-unknown-fields"
Kind = tuple[str, str]
"""`apiVersion` and `kind`."""


def take(definition: Path) -> Path:
    """Write a definition's schema without its descriptions, which are nine tenths of it.

    Raises:
        ValueError: If the definition has more than one version that is served: which one is meant?
    """
    document = yaml.load(definition.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    spec = document["spec"]
    served = [version for version in spec["versions"] if version["served"]]
    if len(served) != 1:
        raise ValueError(f"{definition}: expected one served version, got {[version['name'] for version in served]}")
    kept = {
        "apiVersion": f"{spec['group']}/{served[0]['name']}",
        "kind": spec["names"]["kind"],
        "schema": _without_descriptions(served[0]["schema"]["openAPIV3Schema"]),
    }
    path = FOLDER / f"{spec['group']}_{spec['names']['plural']}.json"
    path.write_text(json.dumps(kept, separators=(",", ":")) + "\n", encoding="utf-8")
    return path


def _without_descriptions(schema: Any, names: bool = False) -> Any:
    """A schema without descriptions; `names` where the keys are those of fields, one of which may be `description`."""
    if isinstance(schema, dict):
        return {
            key: _without_descriptions(value, key == "properties" and not names)
            for key, value in schema.items()
            if names or key != "description"
        }
    return [_without_descriptions(value) for value in schema] if isinstance(schema, list) else schema


@cache
def _schemas() -> dict[Kind, Any]:
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]
    return {(file["apiVersion"], file["kind"]): file["schema"] for file in files}


def kinds() -> set[Kind]:
    """The kinds that can be checked."""
    return set(_schemas())


@cache
def _validator(kind: Kind) -> jsonschema.Draft202012Validator:
    schema = _strict(_schemas()[kind])
    schema["properties"]["metadata"] = {"type": "object"}  # that of every object, whose schema is Kubernetes' own
    schema["required"] = sorted({*schema.get("required", []), "metadata"})
    return jsonschema.Draft202012Validator(schema)


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema as JSON schema that refuses the fields which Kubernetes drops unless it is told to be strict.

    Rules in CEL (`x-kubernetes-validations`) are not looked at.
    """
    found = dict(schema)
    if "properties" in found:
        found["properties"] = {name: _strict(field) for name, field in found["properties"].items()}
    if isinstance(found.get("items"), dict):
        found["items"] = _strict(found["items"])
    if isinstance(found.get("additionalProperties"), dict):
        found["additionalProperties"] = _strict(found["additionalProperties"])
    elif found.get("type") == "object" and not found.get(_OPEN):
        found["additionalProperties"] = False
    if found.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if found.pop("nullable", False) and "type" in found:
        found["type"] = ["null", *([found["type"]] if isinstance(found["type"], str) else found["type"])]
    return found


def errors(thing: dict[str, Any]) -> list[str]:
    """What its definition finds wrong with an object of one of `kinds`, as `path: message`."""
    found = _validator((thing["apiVersion"], thing["kind"])).iter_errors(thing)
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}"[:400] for e in found]


if __name__ == "__main__":
    if sys.argv[1:2] != ["take"] or len(sys.argv) < 3:
        sys.exit("usage: python tests/chart/crds.py take CRD.yaml...")
    for name in sys.argv[2:]:
        sys.stdout.write(f"{take(Path(name))}\n")
