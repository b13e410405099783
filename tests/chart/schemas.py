"""Strict checks of rendered objects: Kubernetes' own schemas, and those of the custom kinds' definitions (`crds`).

A kind that neither knows is an error.
"""

from functools import cache
from typing import Any

import crds
import jsonschema
import kubernetes_validate.utils as kubernetes_schemas
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from referencing import Registry, Resource


@cache
def _file(name: str, version: str) -> Any:
    return kubernetes_schemas.schema_contents(f"kubernetes-json-schema/{name}", version)


@cache
def _validator(version: str, kind: str, api: str) -> jsonschema.Draft202012Validator:
    """The strict validator of a kind; `kubernetes_validate.validate` would read the definitions anew at every call."""
    exact = [known for known in kubernetes_schemas.all_versions() if known.startswith(f"{version}.")][-1]
    folder = f"v{exact}-local-strict"
    group, _, rest = api.partition("/")
    short = f"{group.partition('.')[0]}-{rest}" if rest else group
    schema = _file(f"{folder}/{kind.lower()}-{short}.json", version)
    registry = Resource.from_contents(schema) @ (
        Resource.from_contents(_file(f"{folder}/_definitions.json", version)) @ Registry()
    )
    return jsonschema.Draft202012Validator(schema, registry=registry)


def errors(thing: dict[str, Any], version: str) -> list[str]:
    """What is wrong with an object for a minor version of Kubernetes, as `path: message`."""
    kind = (thing["apiVersion"], thing["kind"])
    if kind in crds.kinds():
        # What such a definition does not say: which metadata any object may have, and what pipelines and pods are.
        stand_in = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": thing["metadata"]}
        found = crds.errors(thing) + errors(stand_in, version)
        if "pipelineSpec" in thing.get("spec", {}):
            found += _pipeline_spec(thing["spec"])
        return found + (_pods_of_runtime(thing, version) if kind[1] == "TrainingRuntime" else [])
    try:
        validator = _validator(version, thing["kind"], thing["apiVersion"])
    except FileNotFoundError:
        return [f"no schema for {kind[0]} {kind[1]}"]
    return _messages(validator, thing)


def _messages(validator: Any, thing: Any) -> list[str]:
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}"[:400] for e in validator.iter_errors(thing)]


def _pipeline_spec(spec: dict[str, Any]) -> list[str]:
    """Kubeflow's own message type refuses unknown fields and wrong types."""
    try:
        json_format.ParseDict(spec["pipelineSpec"], pipeline_spec_pb2.PipelineSpec())
    except json_format.ParseError as error:
        return [f"pipelineSpec: {error}"]
    return []


def _pods_of_runtime(thing: dict[str, Any], version: str) -> list[str]:
    """Its pods are pods of this version of Kubernetes."""
    found = []
    for job in thing["spec"]["template"]["spec"]["replicatedJobs"]:
        pod = job["template"]["spec"]["template"]["spec"]
        stand_in = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": job["name"]}, "spec": pod}
        found += errors(stand_in, version)
    return found
