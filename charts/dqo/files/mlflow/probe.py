"""Write to MLflow and read it back: the check of `helm test`.

Uses Python's own library only. Leaves one experiment, `dqo-helm-test`, whose tag it changes each time.
Environment: MLFLOW_TRACKING_URI, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where MLflow asks for them.
"""

import base64
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import Any

URI = os.environ["MLFLOW_TRACKING_URI"].rstrip("/")
NAME = "dqo-helm-test"
# Network rules reach the nodes some seconds after the pod has started, and a busy node takes its time for the first
# request to the database, at which MLflow imports what it needs.
WAIT_SECONDS = float(os.environ.get("DQO_PROBE_WAIT_SECONDS", "90"))
REQUEST_SECONDS = 60
UNREACHED = (502, 503, 504)  # what a proxy or a service mesh answers for a server that it cannot reach


def call(method: str, path: str, body: bytes | None = None, signed: bool = True) -> bytes:
    """Return the answer's body; an answer of 400 or more raises `urllib.error.HTTPError`."""
    request = urllib.request.Request(URI + path, data=body, method=method)
    if body is not None:
        request.add_header("Content-Type", "application/json")
    if signed and (user := os.environ.get("MLFLOW_TRACKING_USERNAME")):
        secret = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}".encode()
        request.add_header("Authorization", f"Basic {base64.b64encode(secret).decode()}")
    with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
        return answer.read()


def reach(method: str, path: str, body: bytes | None = None, signed: bool = True) -> bytes:
    """As `call`, repeated until a server answers or the time is over; for requests that change nothing."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return call(method, path, body, signed)
        except OSError as error:
            answered = isinstance(error, urllib.error.HTTPError) and error.code not in UNREACHED
            if answered or time.monotonic() > end:
                raise
            print(f"probe: {URI}{path}: {error}; trying again", flush=True)
            time.sleep(2)


def api(method: str, path: str, **fields: Any) -> dict[str, Any]:
    """Call MLflow's REST interface with a JSON body."""
    return json.loads(call(method, f"/api/2.0/mlflow/{path}", json.dumps(fields).encode() if fields else None) or "{}")


def experiment() -> str:
    """Id of the experiment that the check writes to."""
    path = f"experiments/get-by-name?experiment_name={urllib.parse.quote(NAME)}"
    try:
        return json.loads(reach("GET", f"/api/2.0/mlflow/{path}"))["experiment"]["experiment_id"]
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
    return api("POST", "experiments/create", name=NAME)["experiment_id"]


def main() -> None:
    """Check health, the database, the artifact store and, where there are users, that a stranger is refused."""
    reach("GET", "/health", signed=False)
    print("probe: /health answers; MLflow", reach("GET", "/version").decode(), flush=True)
    if os.environ.get("MLFLOW_TRACKING_USERNAME"):
        try:
            reach("POST", "/api/2.0/mlflow/experiments/search", b'{"max_results": 1}', signed=False)
            sys.exit("probe: a request without a password was answered")
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
        print("probe: a request without a password is refused")
    mark, number = uuid.uuid4().hex, experiment()
    api("POST", "experiments/set-experiment-tag", experiment_id=number, key="dqo.helm_test", value=mark)
    tags = api("GET", f"experiments/get?experiment_id={number}")["experiment"].get("tags", [])
    if {"key": "dqo.helm_test", "value": mark} not in tags:
        sys.exit(f"probe: wrote a tag with the value {mark}, read {tags}")
    print("probe: the database keeps what is written")
    path = f"/api/2.0/mlflow-artifacts/artifacts/{number}/{NAME}/{mark}.txt"
    call("PUT", path, mark.encode())
    got = call("GET", path).decode()
    call("DELETE", path)
    if got != mark:
        sys.exit(f"probe: wrote the artifact {mark}, read {got[:100]}")
    print("probe: the artifact store keeps what is written")


if __name__ == "__main__":
    try:
        main()
    except urllib.error.HTTPError as error:
        sys.exit(f"probe: {error.url}: {error.code} {error.reason}: {error.read()[:500].decode(errors='replace')}")
    except OSError as error:
        sys.exit(f"probe: {URI}: {error}")
