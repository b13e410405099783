"""What went wrong between us and MLflow, in words: its address, what was tried, why it failed and what to do.

MLflow lets errors of many libraries through: its own, requests', SQLAlchemy's, boto3's, the file system's. Some of them
name addresses with the password inside.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlparse

from dqo.errors import DQOError

USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
SECRETS = (PASSWORD, "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
LIBRARIES = {"mlflow", "requests", "urllib3", "sqlalchemy", "botocore", "boto3"}
REASON_LENGTH = 300
STATUS = re.compile(r"error code (\d{3})\b|^(\d{3}) (?:Client|Server) Error|too many (\d{3}) error responses")
PROXIED = re.compile(r"/mlflow-artifacts/(?:artifacts|mpu/\w+)(/[^\s'\"?)]*)")

PRESIGNED = re.compile(r"(https?://\S+)\?X-Amz-")


def public(uri: str) -> str:
    """An address without the user name and password it may hold, for files and messages that others read."""
    parsed = urlparse(uri)
    return uri if "@" not in parsed.netloc else parsed._replace(netloc=parsed.netloc.rpartition("@")[2]).geturl()


def reason(error: BaseException, uri: str) -> str:
    """The first line of an error's message, cut to a readable length, without passwords."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    known = [urlparse(uri).password, *(os.environ.get(name) for name in SECRETS)]
    for secret in filter(None, known):
        for form in {secret, unquote(secret)}:
            text = text.replace(form, "***")
    text = text.rstrip(".")
    return re.sub(r"\?X-Amz-\S+", "", text)[:REASON_LENGTH]  # a presigned address is a password too


def status_of(error: BaseException) -> int | None:
    """The HTTP status that a server has answered, `None` if none did."""
    response = getattr(error, "response", None)
    if (code := getattr(response, "status_code", None)) is not None:
        return int(code)
    found = STATUS.search(str(error))
    if found:
        return int(next(filter(None, found.groups())))
    if getattr(error, "error_code", None) == "PERMISSION_DENIED":
        return 403
    return None


def refused(error: BaseException, uri: str) -> str | None:
    """In words, that the server knows or allows the user not; `None` for an error of another kind."""
    user = urlparse(uri).username or os.environ.get(USER)
    match status_of(error):
        case 401 if user is None:
            return f"it asks for a user name and a password; set {USER} and {PASSWORD}"
        case 401:
            return f"it does not know the user {user!r} with this password; correct {USER} and {PASSWORD}"
        case 403:
            whom = "who sends no user name" if user is None else repr(user)
            return f"it does not allow this to the user {whom} ({reason(error, uri)}); ask its administrator"
    return None


def explain(error: BaseException, uri: str, action: str, run_id: str | None = None) -> DQOError | None:
    """An error of MLflow or of what is behind it as one for the user; `None` if it is of another origin.

    Args:
        error: What was raised.
        uri: MLflow's address.
        action: What was tried, e.g. `log metrics`.
        run_id: The run, to tell an error of its artifact folder from any other of the file system.
    """
    where = f"MLflow at {public(uri)!r}: could not {action}"
    again = "The same command continues from here once that is mended."
    store = _artifact_store(error, run_id)
    families = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if store is None and not families & LIBRARIES:
        return None
    presigned = PRESIGNED.search(str(error)) is not None  # S3's answer, not MLflow's
    if not presigned and (words := refused(error, uri)) is not None:
        return DQOError(f"{where}: {words}. {again}")
    if store is not None and not _no_answer(error):
        return DQOError(
            f"{where}: the artifact store {store} does not take the files ({reason(error, uri)}); look at its "
            "permissions and free space, and at the log of the MLflow server if there is one (with S3 it needs "
            f"s3:PutObject on the bucket). {again}"
        )
    if _no_answer(error):
        return DQOError(f"{where}: it does not answer ({reason(error, uri)}). {again}")
    return DQOError(f"{where}: {reason(error, uri)}. {again}")


def _no_answer(error: BaseException) -> bool:
    """Whether no server has answered at all."""
    text = str(error)
    lost = ("Max retries exceeded", "Connection aborted", "NewConnectionError", "Could not connect", "timed out")
    return status_of(error) is None and any(sign in text for sign in lost)


def _artifact_store(error: BaseException, run_id: str | None) -> str | None:
    """Address of the artifact store that an error is about; `None` if it is about something else."""
    if (found := PROXIED.search(str(error))) is not None:
        return f"'mlflow-artifacts:{found[1]}'"
    if (found := PRESIGNED.search(str(error))) is not None:
        return repr(found[1])
    families = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    file = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if families & {"botocore", "boto3"} or (isinstance(error, OSError) and file and run_id):
        root = ""
        with suppress(Exception):  # only to say more; the error itself is what counts
            import mlflow

            root = mlflow.MlflowClient().get_run(run_id).info.artifact_uri if run_id else ""
        if families & {"botocore", "boto3"}:
            return repr(public(root)) if root else "(S3)"
        folder = Path(unquote(urlparse(root).path)) if root.startswith(("file:", "/")) else None
        path = Path(os.fsdecode(file or ""))
        if folder is not None and folder.parent.parent in (path, *path.parents):
            return repr(str(folder))
    return None


@contextmanager
def in_words(action: str, run_id: str | None = None) -> Iterator[None]:
    """Turn errors of MLflow, its database and its artifact store into a `DQOError`; others pass.

    Args:
        action: What is tried, to complete "could not ...".
        run_id: The run whose artifacts are written.

    Raises:
        DQOError: Naming the address, what was tried, and why it failed.
    """
    try:
        yield
    except Exception as error:
        import mlflow

        explained = explain(error, mlflow.get_tracking_uri(), action, run_id)
        if explained is None:
            raise
        raise explained from None
