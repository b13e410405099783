"""The Kubeflow Pipelines API (v2beta1) as `submit` and `schedule` use it, with its errors in words.

Requests go through `kfp_server_api`, the client that comes with kfp. `kfp.Client` itself prints, waits half a minute
for a server that is not there, and keeps settings in the user's home.
"""

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import kfp_server_api as api
import urllib3

from dqo.errors import DQOError
from dqo.recipe import Recipe, holds_credentials

TOKEN_VARIABLE = "KFP_TOKEN"
_DEFAULT_EXPERIMENT = "Default"  # the one that Kubeflow makes at its installation
_TIMEOUT = (10.0, 60.0)  # seconds to connect, to answer
_PAGE = 100
_HEADER = "authorization"
_COMPILER = threading.Lock()  # kfp's compiler keeps its pipeline in a global


@dataclass(frozen=True)
class Access:
    """What a user says about the server.

    Attributes:
        host: Address of Kubeflow Pipelines' page or API.
        token_file: File with a bearer token; without one, the variable KFP_TOKEN.
        namespace: Namespace of the runs, where Kubeflow serves several users.
        experiment: Kubeflow experiment, which has to exist; None takes Kubeflow's default.
        ca_file: Certificate authority of the server, in PEM.
    """

    host: str
    token_file: Path | None = None
    namespace: str | None = None
    experiment: str | None = None
    ca_file: Path | None = None


class Unreachable(DQOError):
    """The server does not answer, or says that it cannot at the moment."""


class _LoginNeeded(DQOError):
    """The server takes no request with this token."""


class Server:
    """A Kubeflow Pipelines server that has answered.

    Attributes:
        host: Its address, without a slash at the end.
    """

    def __init__(self, access: Access) -> None:
        """Connect and ask for the server's health.

        Raises:
            DQOError: If the address, the token or the certificate file cannot be used, or the server does not answer
                as one of version 2 does.
        """
        self.host = _address(access.host)
        self._access = access
        configuration = api.Configuration()
        configuration.host = self.host
        configuration.retries = urllib3.Retry(2, backoff_factor=0.2, status=0)
        if access.ca_file is not None:
            if not access.ca_file.is_file():
                raise DQOError(f"--ca-file {access.ca_file}: no such file; expected the authority's certificate in PEM")
            configuration.ssl_ca_cert = str(access.ca_file)
        token = _token(access.token_file)
        if token:
            configuration.api_key[_HEADER] = token
            configuration.api_key_prefix[_HEADER] = "Bearer"
        self._client = api.ApiClient(configuration)
        self.pipelines = api.PipelineServiceApi(self._client)
        self.uploads = api.PipelineUploadServiceApi(self._client)
        self.runs = api.RunServiceApi(self._client)
        self.recurring = api.RecurringRunServiceApi(self._client)
        self.experiments = api.ExperimentServiceApi(self._client)
        self._check()

    def call(self, what: str, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """One request, its failure in words.

        Args:
            what: What is asked for, as in "cannot <what>".
            method: Of `kfp_server_api`.
            arguments: Of the method.
            options: Of the method.

        Raises:
            DQOError: If it fails.
        """
        try:
            try:
                return self._ask(what, method, *arguments, **options)
            except _LoginNeeded:
                # A token that somebody renews in its file, as Kubernetes does, outlives a run only there.
                if not self._renewed():
                    raise
                try:
                    return self._ask(what, method, *arguments, **options)
                except _LoginNeeded as error:
                    raise DQOError(
                        f"{error}; {self._access.token_file} held a new one, which was refused too"
                    ) from None
        except api.ApiException as error:
            raise self._refused(what, error) from None
        except urllib3.exceptions.HTTPError as error:
            raise self._silent(error) from None
        except OSError as error:  # an authority's file that is no certificate
            raise DQOError(f"--ca-file {self._access.ca_file}: not a certificate in PEM ({error})") from None
        except (ValueError, TypeError, AttributeError) as error:  # not the JSON that was expected
            raise DQOError(
                f"--host {self.host}: the answer to the request to {what} is not one of Kubeflow Pipelines ({error})"
            ) from None

    def _ask(self, what: str, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """One request, as it is.

        Raises:
            _LoginNeeded: If the server wants another token, in words or by its page to log in.
            Exception: As the client fails.
        """
        self._client.last_response = None
        try:
            answer = method(*arguments, _request_timeout=_TIMEOUT, **options)
        except api.ApiException as error:
            if error.status == 401:
                raise self._unknown(what, error) from None
            raise
        except (ValueError, TypeError, AttributeError):
            if self._client.last_response is not None and not self._is_object():
                raise self.page() from None
            raise
        # The client makes an empty model of whatever is no JSON.
        if not self._is_object():
            raise self.page()
        return answer

    def _is_object(self) -> bool:
        """Whether the last answer is a JSON object, as all of the API's are."""
        try:
            return isinstance(json.loads(self._client.last_response.data), dict)
        except ValueError:
            return False

    def _renewed(self) -> bool:
        """Take the token from its file again; whether it is another one."""
        if self._access.token_file is None:
            return False
        try:
            token = _token(self._access.token_file)
        except DQOError:  # what the server said of the old one tells more
            return False
        keys = self._client.configuration.api_key
        if token == keys[_HEADER]:
            return False
        keys[_HEADER] = token
        return True

    def page(self) -> DQOError:
        """What is said of an answer that is none of the API's."""
        return _LoginNeeded(
            f"--host {self.host}: answers with a page instead of the API, often a page to log in; give a token "
            f"(--token-file or {TOKEN_VARIABLE}), or the address under which Kubeflow Pipelines itself is served"
        )

    def _unknown(self, what: str, error: Any) -> DQOError:
        given = "was refused; it may have expired" if self._client.configuration.api_key else "is missing"
        return _LoginNeeded(
            f"--host {self.host}: cannot {what}: the token {given} (401{_reason(error)}); give a new one with "
            f"--token-file or {TOKEN_VARIABLE}"
        )

    def everything(self, what: str, method: Callable[..., Any], field: str, **options: Any) -> Iterator[Any]:
        """All pages of a list.

        Raises:
            DQOError: As `call`.
        """
        page = ""
        while True:
            answer = self.call(what, method, page_token=page, page_size=_PAGE, **options)
            yield from getattr(answer, field) or []
            page = answer.next_page_token or ""
            if not page:
                return

    @property
    def namespace(self) -> dict[str, str]:
        """The namespace as an option of requests; none where none is given."""
        return {"namespace": self._access.namespace} if self._access.namespace else {}

    def experiment_id(self) -> str:
        """The experiment of new runs.

        Raises:
            DQOError: If it does not exist; it names those that do.
        """
        name = self._access.experiment or _DEFAULT_EXPERIMENT
        found = {
            experiment.display_name: experiment.experiment_id
            for experiment in self.everything(
                "list experiments",
                self.experiments.experiment_service_list_experiments,
                "experiments",
                **self.namespace,
            )
        }
        if name in found:
            return found[name]
        if self._access.experiment is not None:
            known = ", ".join(sorted(found)) or "none"
            raise DQOError(f"--experiment {name!r}: no such experiment in Kubeflow; there are: {known}")
        body = api.V2beta1Experiment(display_name=name, **self.namespace)
        made = self.call("make an experiment", self.experiments.experiment_service_create_experiment, body)
        return made.experiment_id

    def upload(self, recipe: Recipe) -> "Uploaded":
        """Make sure that the server has a recipe's pipeline as a version named by its content's digest.

        Where another process uploads the same version at the same time, one of the two is refused and takes what the
        other has made.

        Raises:
            DQOError: If the pipeline cannot be compiled or the server refuses it.
        """
        from pipelines.pipeline import compile_recipe

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{recipe.name}.yaml"
            with _COMPILER:
                compile_recipe(recipe, path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            pipeline, _ = self._find_or_make(
                lambda: self._pipeline(recipe.name),
                lambda: self.call(
                    "make a pipeline",
                    self.pipelines.pipeline_service_create_pipeline,
                    api.V2beta1Pipeline(display_name=recipe.name, name=recipe.name, **self.namespace),
                ),
            )
            name = f"{recipe.name}-{digest}"
            version, new = self._find_or_make(
                lambda: self._version(pipeline.pipeline_id, name),
                lambda: self.call(
                    "upload a pipeline version",
                    self.uploads.upload_pipeline_version,
                    str(path),
                    name=name,
                    display_name=name,
                    pipelineid=pipeline.pipeline_id,
                    description=f"Recipe {recipe.digest}",
                ),
            )
        return Uploaded(name, pipeline.pipeline_id, version.pipeline_version_id, new)

    @staticmethod
    def _find_or_make(find: Callable[[], Any], make: Callable[[], Any]) -> tuple[Any, bool]:
        """What `find` returns, else what `make` does, with whether it is new."""
        found = find()
        if found is not None:
            return found, False
        try:
            return make(), True
        except DQOError:
            found = find()  # two at once: the other was faster
            if found is None:
                raise
            return found, False

    def _pipeline(self, name: str) -> Any:
        found = self.everything(
            "list pipelines",
            self.pipelines.pipeline_service_list_pipelines,
            "pipelines",
            filter=named(name),
            **self.namespace,
        )
        return next((pipeline for pipeline in found if name in (pipeline.name, pipeline.display_name)), None)

    def _version(self, pipeline_id: str, name: str) -> Any:
        found = self.everything(
            "list pipeline versions",
            self.pipelines.pipeline_service_list_pipeline_versions,
            "pipeline_versions",
            pipeline_id=pipeline_id,
            filter=named(name),
        )
        return next((version for version in found if name in (version.name, version.display_name)), None)

    def _check(self) -> None:
        health = api.HealthzServiceApi(self._client)
        answer = self.call("ask for its health", health.healthz_service_get_healthz)
        if answer.multi_user and not self._access.namespace:
            raise DQOError(f"--host {self.host}: serves several users; expected --namespace with the one of the runs")

    def _refused(self, what: str, error: Any) -> DQOError:
        reason = _reason(error)
        if error.status == 403:
            where = f" in namespace {self._access.namespace!r}" if self._access.namespace else ""
            return DQOError(
                f"--host {self.host}: cannot {what}{where}: not allowed (403{reason}); check --namespace, and that the "
                "token is one of an account with rights there and has not expired"
            )
        if error.status == 404 and what == "ask for its health":
            return DQOError(
                f"--host {self.host}: answers, but has no API v2beta1 (404{reason}); expected Kubeflow Pipelines 2.0 "
                "or later, at the address under which its page is served"
            )
        if error.status in (429, 502, 503, 504):
            return Unreachable(f"--host {self.host}: cannot {what} at the moment ({error.status}{reason}); try again")
        return DQOError(f"--host {self.host}: cannot {what} ({error.status}{reason})")

    def _silent(self, error: Exception) -> DQOError:
        cause = getattr(error, "reason", None) or error
        if "NO_CERTIFICATE" in str(cause):
            return DQOError(f"--ca-file {self._access.ca_file}: not a certificate in PEM; expected the authority's")
        if isinstance(cause, urllib3.exceptions.SSLError):
            return DQOError(
                f"--host {self.host}: its certificate is not trusted ({cause}); give the authority that signed it, or "
                "a self-signed certificate itself, with --ca-file"
            )
        return Unreachable(
            f"--host {self.host}: Kubeflow Pipelines does not answer ({cause}); check the address, or open a way to "
            "it: kubectl -n kubeflow port-forward svc/ml-pipeline-ui 8080:80, then --host http://localhost:8080"
        )

    def run_link(self, run_id: str) -> str:
        """Address of a run in Kubeflow's page."""
        return f"{self.host}/#/runs/details/{run_id}"


@dataclass(frozen=True)
class Uploaded:
    """A pipeline version on the server.

    Attributes:
        name: `<recipe>-<digest of the compiled pipeline>`.
        pipeline_id: Kubeflow's id of the pipeline.
        version_id: Kubeflow's id of the version.
        new: Whether this call has uploaded it.
    """

    name: str
    pipeline_id: str
    version_id: str
    new: bool

    @property
    def reference(self) -> Any:
        """As requests take it."""
        return api.V2beta1PipelineVersionReference(pipeline_id=self.pipeline_id, pipeline_version_id=self.version_id)


def parameters(recipe: Recipe, mlflow_uri: str | None, skip_unchanged: bool = False) -> Any:
    """Parameters of a run; what a cluster's tasks know better (data source, library) stays at its default.

    Args:
        recipe: The recipe.
        mlflow_uri: MLflow's address as the tasks see it; None leaves the recipe's, or that of their environment.
        skip_unchanged: Stop after preparation where an earlier run has finished with this recipe and the same data.
    """
    values: dict[str, Any] = {"recipe_json": recipe.to_json()}
    if mlflow_uri is not None:
        values["mlflow_uri"] = mlflow_uri
    if skip_unchanged:
        values["skip_unchanged"] = True
    return api.V2beta1RuntimeConfig(parameters=values)


def named(name: str) -> str:
    """Kubeflow's filter for one name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


@contextmanager
def connected(access: Access) -> Iterator[Server]:
    """A server whose connections are closed at the end.

    Raises:
        DQOError: As `Server`.
    """
    server = Server(access)
    try:
        yield server
    finally:
        server._client.close()
        server._client.rest_client.pool_manager.clear()


def require_no_password(uri: str | None, where: str) -> None:
    """Refuse an address with a user name or password: a run's parameters are shown to all who see the run.

    Args:
        uri: The address, of any scheme; None is none.
        where: The option or field that it comes from, for the message, which does not repeat the address.

    Raises:
        DQOError: If it holds credentials, or can't be read as an address.
    """
    try:
        urlparse(uri or "")
    except ValueError as error:
        raise DQOError(f"{where}: not an address ({error}); expected http(s)://host:port") from None
    if holds_credentials(uri or ""):
        raise DQOError(
            f"{where}: holds a user name or password, which would be written into reports and compiled pipelines; "
            "expected http(s)://host:port, with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD set where it runs"
        )


def _address(host: str) -> str:
    parsed = urlparse(host)
    try:
        fits = parsed.scheme in ("http", "https") and bool(parsed.hostname) and (parsed.port or 1) > 0
    except ValueError:
        fits = False
    if not fits:
        raise DQOError(f"--host {host}: expected an address such as https://kubeflow.example.com/pipeline")
    if "@" in parsed.netloc:
        raise DQOError(f"--host: holds a user name or password; give a token with --token-file or {TOKEN_VARIABLE}")
    return host.partition("#")[0].rstrip("/")


def _token(path: Path | None) -> str:
    if path is None:
        token, where = os.environ.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
    else:
        where = f"--token-file {path}"
        try:
            token = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DQOError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or 'not text'})") from None
        if not token:
            raise DQOError(f"{where}: is empty; expected a bearer token")
    if len(token.split()) > 1 or not token.isascii():
        raise DQOError(f"{where}: expected one token, without spaces and without the word Bearer")
    return token


def _reason(error: Any) -> str:
    """The server's own words, short."""
    try:
        body = json.loads(error.body)
        text = body.get("message") or body.get("error") or ""
    except (TypeError, ValueError, AttributeError):
        text = ""
    text = " ".join(str(text).split())
    return f": {text[:300]}" if text else ""
