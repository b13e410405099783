"""MLflow in the two forms that teams have: a sqlite file, and a server with passwords on PostgreSQL and S3."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from services.servers import PASSWORD, SECRET, USER, Server, serving

from dqo import tracking
from dqo.recipe import Recipe, parse


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.services)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """MLflow with passwords on PostgreSQL and SeaweedFS; skips, saying why, where the machine lacks one."""
    with serving() as server:
        yield server


@pytest.fixture(scope="session", params=["sqlite", "server"])
def mlflow_store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, str]]:
    """Address and credentials of each kind of MLflow."""
    if request.param == "sqlite":
        return tracking.default_uri(tmp_path_factory.mktemp("mlflow")), {}
    server: Server = request.getfixturevalue("server")
    return server.uri, server.credentials


@pytest.fixture(autouse=True)
def nobodys_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """No user, run or S3 key of the machine that the tests run on."""
    for name in (
        USER,
        PASSWORD,
        "MLFLOW_TRACKING_TOKEN",
        "MLFLOW_RUN_ID",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def mlflow_uri(
    mlflow_store: tuple[str, dict[str, str]], nobodys_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Address of an MLflow, once a sqlite file and once a server whose credentials stand in the environment.

    All tests of a session share the two stores: names of experiments and registered models have to be a test's own.
    """
    uri, credentials = mlflow_store
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    return uri


@pytest.fixture
def administrator(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, with the administrator's credentials in the environment."""
    for name, value in server.credentials.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def recipe(request: pytest.FixtureRequest) -> Recipe:
    """A recipe whose experiment is named after the test, so that tests share a store."""
    return parse(f"name: a\ntracking: {{experiment: {request.node.originalname}}}")


@pytest.fixture
def parent(mlflow_uri: str, recipe: Recipe, tmp_path: Path) -> str:
    """A pipeline's run in each kind of store."""
    return tracking.open_parent(recipe, tracking.connect(recipe, mlflow_uri), tmp_path / "workspace")


@pytest.fixture
def user(administrator: Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user who may read what others have made, and nothing else."""
    from mlflow.server.auth.client import AuthServiceClient

    name = request.node.originalname[:40]
    AuthServiceClient(administrator.uri).create_user(name, SECRET)
    return name


@pytest.fixture
def read_only_s3(administrator: Server) -> Iterator[Server]:
    client = administrator.s3_client()
    denied = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:PutObject",
        "Resource": f"arn:aws:s3:::{administrator.bucket}/*",
    }
    client.put_bucket_policy(
        Bucket=administrator.bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [denied]})
    )
    yield administrator
    client.delete_bucket_policy(Bucket=administrator.bucket)
