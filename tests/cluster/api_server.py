"""A small HTTP server with those paths of Kubernetes' API that creating, listing and deleting use.

It keeps objects in memory, knows a few kinds and no controllers: for tests of the commands in `release.py` with the
real kubectl and Helm, not of the chart.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

KINDS = {
    "v1": {
        "namespaces": "Namespace", "configmaps": "ConfigMap", "events": "Event", "pods": "Pod", "secrets": "Secret",
        "serviceaccounts": "ServiceAccount",
    },
    "apps/v1": {"deployments": "Deployment"},
    "authorization.k8s.io/v1": {"subjectaccessreviews": "SubjectAccessReview"},
}  # fmt: skip
DOWN = "metrics.k8s.io/v1beta1"
"""An aggregated API whose server does not answer."""
CLUSTER_WIDE = ("namespaces", "subjectaccessreviews")
PATH = re.compile(
    r"/(?:api|apis(?=/[^/]+/v))/(?P<api>v1|[^/]+/v\d\w*)(?:/namespaces/(?P<namespace>[^/]+)(?=/))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>\w+))?"
)


class ApiServer(ThreadingHTTPServer):
    """The server; `allows` decides about a SubjectAccessReview's spec, `refuses` about requests to be answered 403.

    `kinds` are those that it serves: API group and version -> plural -> kind.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.kinds: dict[str, dict[str, str]] = dict(KINDS)
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}  # namespace, plural, name
        self.reviews: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.logs: dict[str, str] = {}
        self.allows: Callable[[dict[str, Any]], bool] = lambda spec: False
        self.refuses: Callable[[str, str], bool] = lambda method, path: False

    def add(self, plural: str, name: str, namespace: str = "", **fields: Any) -> None:
        metadata = {"name": name, "uid": f"{plural}-{name}", "creationTimestamp": "2026-01-01T00:00:00Z"}
        if namespace:
            metadata["namespace"] = namespace
        metadata |= fields.pop("metadata", {})
        self.objects[namespace, plural, name] = {"metadata": metadata, **fields}

    def named(self, plural: str) -> list[str]:
        return sorted(name for _, kind, name in self.objects if kind == plural)


class Handler(BaseHTTPRequestHandler):
    server: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlparse(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        if self.server.refuses(self.command, path):
            self.fail(403, "Forbidden")
        elif path == "/version":
            self.reply({"major": "1", "minor": "36", "gitVersion": "v1.36.0"})
        elif path == "/api":
            self.reply({"kind": "APIVersions", "versions": ["v1"]})
        elif path == "/apis":
            self.reply({"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(a) for a in self.groups()]})
        elif (api := path.removeprefix("/apis/").removeprefix("/api/")) in self.server.kinds:
            self.reply(_resources(api, self.server.kinds[api]))
        elif path == f"/apis/{DOWN}":
            self.fail(503, "ServiceUnavailable")
        elif match := PATH.fullmatch(path):
            self.resource(match["api"], match["namespace"] or "", match["plural"], match["name"], match["sub"], sent)
        else:
            self.fail(404, "NotFound")

    do_GET = do_POST = do_DELETE = answer

    def resource(self, api: str, namespace: str, plural: str, name: str | None, sub: str | None, sent: bytes) -> None:
        kind = {"apiVersion": api, "kind": self.server.kinds.get(api, {}).get(plural, "")}
        objects = self.server.objects
        if not kind["kind"]:
            self.fail(404, "NotFound")
        elif plural == "subjectaccessreviews":
            review = json.loads(sent)
            self.server.reviews.append(review["spec"])
            self.reply(review | {"status": {"allowed": self.server.allows(review["spec"])}}, 201)
        elif self.command == "POST":
            document = json.loads(sent)
            name = document["metadata"]["name"]
            self.server.add(plural, name, namespace, **{k: v for k, v in document.items() if k not in kind})
            if plural == "namespaces":
                self.server.add("configmaps", "kube-root-ca.crt", name)
                self.server.add("serviceaccounts", "default", name)
            self.reply(kind | objects[namespace, plural, name], 201)
        elif name is None:
            items = [kind | value for key, value in sorted(objects.items()) if key[:2] == (namespace, plural)]
            self.reply({"kind": f"{kind['kind']}List", "apiVersion": api, "metadata": {}, "items": items})
        elif (namespace, plural, name) not in objects:
            self.fail(404, "NotFound")
        elif sub == "log":
            self.send(200, self.server.logs.get(name, "").encode(), "text/plain")
        else:
            found = objects[namespace, plural, name]
            if self.command == "DELETE":
                inside = name if plural == "namespaces" else None
                for key in [key for key in objects if key == (namespace, plural, name) or key[0] == inside]:
                    del objects[key]
            self.reply(kind | found)

    def groups(self) -> list[str]:
        return [api for api in (*self.server.kinds, DOWN) if "/" in api]

    def fail(self, code: int, reason: str) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code}
        self.reply(status | {"message": f"{self.command} {self.path}: {reason}"}, code)

    def reply(self, document: Any, code: int = 200) -> None:
        self.send(code, json.dumps(document).encode(), "application/json")

    def send(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _group(api: str) -> dict[str, Any]:
    name, _, version = api.partition("/")
    only = {"groupVersion": api, "version": version}
    return {"name": name, "versions": [only], "preferredVersion": only}


def _resources(api: str, kinds: dict[str, str]) -> dict[str, Any]:
    verbs = ["create", "delete", "get", "list"]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": api,
        "resources": [
            {
                "name": plural,
                "singularName": kind.lower(),
                "namespaced": plural not in CLUSTER_WIDE,
                "kind": kind,
                "verbs": ["create"] if plural == "subjectaccessreviews" else verbs,
            }
            for plural, kind in kinds.items()
        ],
    }


@contextmanager
def serving(folder: Path) -> Iterator[tuple[ApiServer, Path]]:
    """A running server, and a KUBECONFIG in a folder that names it."""
    with ApiServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = {"name": "here"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [here | {"cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "contexts": [here | {"context": {"cluster": "here", "user": "here"}}],
            "users": [here | {"user": {}}],
        }
        path = folder / "kubeconfig"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        yield server, path
        server.shutdown()
