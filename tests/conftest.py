"""Fixtures that several rooms share."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.pop("MLFLOW_TRACKING_URI", None)
sys.path.insert(0, str(Path(__file__).parent))

import pytest

ROOT = Path(__file__).parents[1]

# Started by `nohup` or as a background job, Python ignores Ctrl-C, and so would the commands that tests send it to.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_store_left_in_the_environment() -> Iterator[None]:
    """mlflow.set_tracking_uri exports the address, which every later process would then take."""
    yield
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import write_policy

    return write_policy(tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import write_encoder

    return write_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(autouse=True, scope="module")
def environment_of_its_own() -> Iterator[None]:
    """Libraries leave variables behind, accelerate its settings, which the child processes of a later module read."""
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)
