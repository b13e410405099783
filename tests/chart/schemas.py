"""Strict checks of rendered objects: Kubernetes' own schemas, and schemas of the custom kinds that the chart uses.

A kind that neither knows is an error.
"""

from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate.utils as kubernetes_schemas
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime
from referencing import Registry, Resource

_TEXT = {"type": "string"}
_NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253}


def _closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


# Written from the custom resource definitions of Kubeflow Pipelines 2.17 and the Prometheus Operator: the fields that
# the chart sets, and no others, since an unknown field is a mistake here.
_SECRET_KEY = _closed(["name", "key"], name=_NAME, key=_TEXT)
_SPECS = {
    ("pipelines.kubeflow.org/v2beta1", "Pipeline"): _closed([], description=_TEXT),
    ("pipelines.kubeflow.org/v2beta1", "PipelineVersion"): _closed(
        ["pipelineName", "pipelineSpec"],
        pipelineName=_NAME,
        description=_TEXT,
        pipelineSpec={"type": "object"},
        platformSpec={"type": "object"},
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _closed(
        ["selector", "endpoints"],
        selector=_closed(["matchLabels"], matchLabels={"type": "object", "additionalProperties": _TEXT}),
        endpoints={
            "type": "array",
            "minItems": 1,
            "items": _closed(
                ["port"],
                port=_TEXT,
                path=_TEXT,
                interval={"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"},
                basicAuth=_closed(["username", "password"], username=_SECRET_KEY, password=_SECRET_KEY),
            ),
        },
    ),
}
_TRAINING_RUNTIME = ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime")


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
    if kind == _TRAINING_RUNTIME:
        return _training_runtime(thing, version)
    if kind in _SPECS:
        found = _messages(jsonschema.Draft202012Validator(_SPECS[kind]), thing["spec"])
        return found + (_pipeline_spec(thing["spec"]) if "pipelineSpec" in thing["spec"] else [])
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


def _training_runtime(thing: dict[str, Any], version: str) -> list[str]:
    """The Trainer's models find wrong types; they drop unknown fields, which reading back shows. Its pods are pods."""
    try:
        read_back = TrainerV1alpha1TrainingRuntime.from_dict(thing).to_dict()
    except ValueError as error:
        return [f"TrainingRuntime: {error}"]
    found = _dropped(thing, read_back, "")
    for job in thing["spec"]["template"]["spec"]["replicatedJobs"]:
        pod = job["template"]["spec"]["template"]["spec"]
        stand_in = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": job["name"]}, "spec": pod}
        found += errors(stand_in, version)
    return found


def _dropped(sent: Any, got: Any, path: str) -> list[str]:
    if isinstance(sent, dict) and isinstance(got, dict):
        return [
            message
            for key, value in sent.items()
            for message in (
                _dropped(value, got[key], f"{path}.{key}") if key in got else [f"{path}.{key}: unknown field"]
            )
        ]
    if isinstance(sent, list) and isinstance(got, list):
        return [m for n, (a, b) in enumerate(zip(sent, got, strict=True)) for m in _dropped(a, b, f"{path}[{n}]")]
    return []
