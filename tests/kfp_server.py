"""A Kubeflow Pipelines server for tests: the REST paths of v2beta1 that the commands use, with its state in memory.

Answers are written by the models of `kfp_server_api`, and what is sent is read by them: an unknown field is an error.
Names are unique where Kubeflow's database wants them so, and cron lines are those that its parser takes. What it can't
show is how a real server runs anything.
"""

import json
import re
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import kfp_server_api as api
import yaml

_CLIENT = api.ApiClient()


class _Response:
    def __init__(self, data: bytes) -> None:
        self.data = data.decode()


def read(body: bytes, kind: str) -> Any:
    """A model from JSON, refusing fields that the model does not have, as the real server does."""

    def check(content: Any, name: str) -> None:
        model = getattr(api, name, None)
        if not isinstance(content, dict) or not hasattr(model, "openapi_types"):
            return
        known = {model.attribute_map[key]: kind for key, kind in model.openapi_types.items()}
        assert set(content) <= set(known), f"unknown fields {set(content) - set(known)} of {name}"
        for key, value in content.items():
            check(value, known[key])

    check(json.loads(body), kind)
    return _CLIENT.deserialize(_Response(body), kind)


def write(model: Any) -> bytes:
    """A model as JSON."""
    return json.dumps(_CLIENT.sanitize_for_serialization(model)).encode()


class KubeflowServer:
    """State and behaviour.

    Attributes:
        token: Token that requests have to carry; None asks for none.
        namespaces: Namespaces that the account may use; None asks for none.
        states: What `GET run` answers, one after another, the last one for ever.
        fail: Path prefix -> status and message to answer with.
        requests: Method and path of each request.
        before: Called with the method and path of each request before it is answered.
    """

    def __init__(self) -> None:
        self.token: str | None = None
        self.namespaces: list[str] | None = None
        self.old = False
        self.page: bytes | None = None
        self.states: list[api.V2beta1Run] = []
        self.fail: dict[str, tuple[int, str]] = {}
        self.requests: list[str] = []
        self.before: Callable[[str], None] = lambda where: None
        self.experiments = [self._experiment("Default", None)]
        self.pipelines: list[Any] = []
        self.versions: list[Any] = []
        self.runs: list[Any] = []
        self.schedules: list[Any] = []
        self.meet: threading.Barrier | None = None  # where two that list the same wait for each other
        self.meeting = "/versions"
        self.lock = threading.RLock()
        self._clock = 1_800_000_000.0

    def now(self) -> datetime:
        """A time of its own for each thing."""
        self._clock += 1
        return datetime.fromtimestamp(self._clock, UTC)

    def _experiment(self, name: str, namespace: str | None) -> Any:
        return api.V2beta1Experiment(experiment_id=str(uuid.uuid4()), display_name=name, namespace=namespace)

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, headers: Any) -> tuple[int, bytes]:
        """Status and body."""
        if self.old or not path.startswith("/apis/v2beta1/"):
            return 404, b'{"code": 5, "message": "Not Found"}'
        if self.token is not None and headers.get("authorization") != f"Bearer {self.token}":
            return error(401, "Request header error: there is no user identity header.")
        path = path.removeprefix("/apis/v2beta1")
        for prefix, (status, message) in self.fail.items():
            if f"{method} {path}".startswith(prefix):
                return error(status, message)
        asked = query.get("namespace")
        if self.namespaces is not None and asked is not None and asked not in self.namespaces:
            return error(403, f"User is not authorized with reason: namespace {asked}")
        with self.lock:
            answer = self._answer(method, path, query, body, headers)
        if self.meet is not None and method == "GET" and path.endswith(self.meeting) and not self.meet.broken:
            with suppress(threading.BrokenBarrierError):
                self.meet.wait(5)
        return answer

    def _answer(self, method: str, path: str, query: dict[str, str], body: bytes, headers: Any) -> tuple[int, bytes]:
        where = f"{method} {path}"
        if where == "GET /healthz":
            return 200, write(api.V2beta1GetHealthzResponse(multi_user=self.namespaces is not None))
        if where == "GET /experiments":
            return 200, self._list(self.experiments, query, "experiments", api.V2beta1ListExperimentsResponse)
        if where == "POST /experiments":
            made = read(body, "V2beta1Experiment")
            self.experiments.append(self._experiment(made.display_name, made.namespace))
            return 200, write(self.experiments[-1])
        if where == "GET /pipelines":
            return 200, self._list(self.pipelines, query, "pipelines", api.V2beta1ListPipelinesResponse)
        if where == "POST /pipelines":
            made = read(body, "V2beta1Pipeline")
            if any(made.display_name == other.display_name for other in self.pipelines):
                return error(409, "Already exist error: The name of the pipeline already exists")
            made.pipeline_id, made.created_at = str(uuid.uuid4()), self.now()
            self.pipelines.append(made)
            return 200, write(made)
        if match := re.fullmatch(r"GET /pipelines/([^/]+)/versions", where):
            mine = [version for version in self.versions if version.pipeline_id == match[1]]
            return 200, self._list(mine, query, "pipeline_versions", api.V2beta1ListPipelineVersionsResponse)
        if where == "POST /pipelines/upload_version":
            return self._upload(query, body, headers)
        if where == "POST /runs":
            run = read(body, "V2beta1Run")
            if not self._known(run):
                return error(404, "Failed to fetch the pipeline version or experiment")
            run.run_id, run.state, run.created_at = str(uuid.uuid4()), "PENDING", self.now()
            self.runs.append(run)
            return 200, write(run)
        if match := re.fullmatch(r"GET /runs/([^/]+)", where):
            if not any(run.run_id == match[1] for run in self.runs):
                return error(404, f"Run {match[1]} not found")
            return 200, write(self.states.pop(0) if len(self.states) > 1 else self.states[0])
        if where == "GET /recurringruns":
            return 200, self._list(self.schedules, query, "recurring_runs", api.V2beta1ListRecurringRunsResponse)
        if where == "POST /recurringruns":
            return self._schedule(read(body, "V2beta1RecurringRun"))
        if match := re.fullmatch(r"(DELETE|POST) /recurringruns/([^/:]+)(:enable|:disable)?", where):
            (found,) = [entry for entry in self.schedules if entry.recurring_run_id == match[2]] or [None]
            if found is None:
                return error(404, f"Recurring run {match[2]} not found")
            if match[1] == "DELETE":
                self.schedules.remove(found)
            else:
                found.status = "ENABLED" if match[3] == ":enable" else "DISABLED"
            return 200, b"{}"
        return 404, b'{"code": 5, "message": "Not Found"}'

    def _upload(self, query: dict[str, str], body: bytes, headers: Any) -> tuple[int, bytes]:
        message = BytesParser().parsebytes(f"Content-Type: {headers['content-type']}\r\n\r\n".encode() + body)
        (file,) = [part.get_payload(decode=True) for part in message.get_payload() if part.get_filename()]
        spec, *platform = yaml.safe_load_all(file)
        if any((query["pipelineid"], query["name"]) == (other.pipeline_id, other.name) for other in self.versions):
            return error(409, "Already exist error: The name of the pipeline version already exists")
        made = api.V2beta1PipelineVersion(
            pipeline_id=query["pipelineid"],
            pipeline_version_id=str(uuid.uuid4()),
            name=query["name"],
            display_name=query["display_name"],
            pipeline_spec={"pipeline_spec": spec, "platform_spec": platform[0] if platform else {}},
            created_at=self.now(),
        )
        self.versions.append(made)
        return 200, write(made)

    def _schedule(self, made: Any) -> tuple[int, bytes]:
        if not self._known(made):
            return error(404, "Failed to fetch the pipeline version or experiment")
        if wrong := wrong_cron(made.trigger.cron_schedule.cron):
            return error(400, f"Schedule cron is not supported: {wrong}")
        made.recurring_run_id, made.created_at = str(uuid.uuid4()), self.now()
        made.status = "ENABLED" if made.mode == "ENABLE" else "DISABLED"
        self.schedules.append(made)
        return 200, write(made)

    def _known(self, thing: Any) -> bool:
        """Whether version, parameters and experiment exist."""
        reference = thing.pipeline_version_reference
        for version in self.versions:
            ids = (version.pipeline_id, version.pipeline_version_id)
            if ids == (reference.pipeline_id, reference.pipeline_version_id):
                inputs = version.pipeline_spec["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
                assert set(thing.runtime_config.parameters) <= set(inputs)
                return any(thing.experiment_id == other.experiment_id for other in self.experiments)
        return False

    def _list(self, things: list[Any], query: dict[str, str], field: str, kind: Any) -> bytes:
        """One page; two things a page, so that every list has several."""
        if query.get("filter"):
            for predicate in json.loads(query["filter"])["predicates"]:
                assert predicate["operation"] == "EQUALS"
                things = [thing for thing in things if getattr(thing, predicate["key"]) == predicate["stringValue"]]
        begin = int(query.get("page_token") or 0)
        more = str(begin + 2) if begin + 2 < len(things) else ""
        return write(kind(**{field: things[begin : begin + 2], "next_page_token": more}))


def error(status: int, message: str) -> tuple[int, bytes]:
    """As grpc-gateway writes errors."""
    return status, json.dumps({"error": message, "code": status, "message": message, "details": []}).encode()


_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_BOUNDS = {"second": (0, 59), "minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "weekday": (0, 6)}


def wrong_cron(line: str) -> str:
    """Why robfig/cron, with which Kubeflow reads cron lines, does not take one; empty where it does."""
    fields = line.split()
    if len(fields) != len(_BOUNDS):
        return f"Expected exactly 6 fields, found {len(fields)}: {line}"
    for (name, (low, high)), field in zip(_BOUNDS.items(), fields, strict=True):
        for at, word in enumerate({"month": _MONTHS, "weekday": _DAYS}.get(name, ())):
            field = re.sub(rf"(?i)\b{word}\b", str(at + low), field)
        for item in field.split(","):
            match = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/(\d+))?", item)
            if match is None or (match[3] is not None and int(match[3]) == 0):
                return f"Failed to parse {item} in {field}"
            first = low if match[1] is None else int(match[1])
            last = first if match[2] is None else int(match[2])
            if not low <= first <= last <= high:
                return f"{name} {item} is not between {low} and {high}"
    return ""


def task(name: str, state: str, number: int = 0, parent: str | None = None, message: str | None = None) -> Any:
    """A task of a run."""
    moment = datetime.fromtimestamp(1_800_000_000 + number, UTC)
    ended = state in ("SUCCEEDED", "FAILED", "SKIPPED")
    return api.V2beta1PipelineTaskDetail(
        task_id=f"{name}-{number}",
        parent_task_id=parent,
        display_name=name,
        state=state,
        create_time=moment,
        start_time=moment,
        end_time=datetime.fromtimestamp(1_800_000_000 + number + 75, UTC) if ended else None,
        error=api.GoogleRpcStatus(code=2, message=message) if message else None,
    )


def run_of(state: str, *tasks: Any) -> Any:
    """A run in a state."""
    return api.V2beta1Run(run_id="r", state=state, run_details=api.V2beta1RunDetails(task_details=list(tasks)))


@contextmanager
def serve(certificate: Path | None = None) -> Iterator[tuple[KubeflowServer, str]]:
    """A server on loopback with its address; with a PEM file of key and certificate, over TLS."""
    state = KubeflowServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            parsed = urlparse(self.path)
            state.requests.append(f"{self.command} {parsed.path}")
            state.before(state.requests[-1])
            query = {key: values[-1] for key, values in parse_qs(parsed.query).items()}
            if state.page is not None:
                status, answer, kind = 200, state.page, "text/html"
            else:
                kind = "application/json"
                try:
                    status, answer = state.answer(self.command, parsed.path, query, body, self.headers)
                except AssertionError as problem:
                    status, answer = error(400, f"proto: {problem}")
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_DELETE = _handle

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    scheme = "http"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state, f"{scheme}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
