"""What every stage shares: where it works, what identifies its inputs, and how it tells the outside."""

import errno
import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from dqo import __version__, rewards
from dqo.bundled import identity
from dqo.errors import DQOError
from dqo.files import write_text
from dqo.progress import Progress
from dqo.recipe import Encoder, Policy, Recipe
from dqo.tasks import Task

_DONE = "done.json"
PIPELINE_FILE = "pipeline.json"
# How `torch.save` fails: `[enforce fail at inline_container.cc:672] . unexpected pos 3949312 vs 3949200`, or
# `PytorchStreamWriter failed writing file data/1: file write failed`, or `basic_ios::clear: iostream error`.
_TORCH_WRITER = ("inline_container.cc", "PytorchStreamWriter", "iostream error")


@dataclass(frozen=True)
class NodesJob:
    """Training processes to be started on several nodes that share the workspace.

    Attributes:
        recipe: The recipe: nodes, processes of each, resources.
        name: The stage's name, e.g. `rl-dqo`.
        key: The stage's key.
        workspace: The workspace, under the same path on each node.
        module: Python module that torchrun starts in each process.
        arguments: The module's.
        environment: Variables of each process.
        output: File that the first process writes last.
    """

    recipe: Recipe
    name: str
    key: str
    workspace: Path
    module: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    output: Path


@dataclass(frozen=True)
class Context:
    """One pipeline run as a stage sees it.

    Attributes:
        recipe: The validated recipe.
        workspace: Folder that outlives tasks and runs: checkpoints, finished stages, progress.
        mlflow_uri: Tracking URI; empty takes MLFLOW_TRACKING_URI.
        parent_run_id: The pipeline's MLflow run; empty only in `prepare`, which opens it.
        launcher: Starts training processes on several nodes and returns when all have ended well, raising a DQOError
            otherwise; None where there is this machine only.
    """

    recipe: Recipe
    workspace: Path
    mlflow_uri: str
    parent_run_id: str = ""
    launcher: Callable[[NodesJob], None] | None = None

    def __post_init__(self) -> None:
        # A compiled pipeline whose recipe names no server leaves it to the place where its tasks run.
        object.__setattr__(self, "mlflow_uri", self.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI", ""))

    @classmethod
    def after_prepare(
        cls,
        recipe: Recipe,
        workspace: Path,
        mlflow_uri: str,
        data: Path,
        launcher: Callable[[NodesJob], None] | None = None,
    ) -> "Context":
        """The context of a later stage: the pipeline's MLflow run is named in the prepared data.

        Raises:
            DQOError: If `data` was not written by the prepare stage.
        """
        path = data / PIPELINE_FILE
        try:
            run_id = json.loads(path.read_text(encoding="utf-8"))["mlflow_run_id"]
        except (OSError, ValueError, KeyError):
            raise DQOError(f"{path}: missing or unreadable; expected the folder written by the prepare stage") from None
        return cls(recipe, workspace, mlflow_uri, run_id, launcher)

    @property
    def progress_file(self) -> Path:
        """Where the stages of this recipe report to."""
        return self.workspace / "progress" / f"{self.recipe.name}-{self.recipe.digest}.jsonl"


def stage_key(**inputs: Any) -> str:
    """Digest of everything a stage's output depends on, the library's version included; 12 hex digits."""
    text = json.dumps({"version": __version__, **inputs}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def with_identity(section: Policy | Encoder) -> dict[str, Any]:
    """A model's section of the recipe with what its name stands for now, for `stage_key`."""
    return section.model_dump() | {"identity": identity(section.model, section.revision)}


def reward_identity(recipe: Recipe, task: Task) -> dict[str, Any]:
    """What decides about a reward, with what its model's name stands for now, for `stage_key`.

    Raises:
        DQOError: As `dqo.rewards.kind`, or if the model cannot be found.
    """
    kind = rewards.kind(recipe, task)
    section = recipe.reward.model_dump() | {"kind": kind}
    if kind == "reference_similarity":
        section["encoder"] = with_identity(recipe.encoder)
    if recipe.reward.model is not None:
        section["identity"] = identity(recipe.reward.model, recipe.reward.revision)
    return section


class StageFolder:
    """A stage's place in the workspace: `stages/<name>-<key>/`, with `output/` once it is finished.

    Attributes:
        path: The folder; checkpoints and partial work go here.
        output: What `publish` hands on.
    """

    def __init__(self, workspace: Path, name: str, key: str) -> None:
        self.path = workspace / "stages" / f"{name}-{key}"
        self.path.mkdir(parents=True, exist_ok=True)
        self.output = self.path / "output"

    @property
    def finished(self) -> bool:
        """Whether an earlier call has finished this stage."""
        return (self.path / _DONE).is_file() and self.output.is_dir()

    def finish(self) -> None:
        """Mark the output as complete; nothing may be written to it afterwards."""
        write_text(self.path / _DONE, json.dumps({"version": __version__}) + "\n")

    def fresh_output(self) -> Path:
        """Return an empty output folder, dropping what an interrupted call left in it."""
        (self.path / _DONE).unlink(missing_ok=True)
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        return self.output

    def publish(self, destination: Path) -> None:
        """Copy the finished output to a component's artifact path, which must not hold anything else."""
        destination.parent.mkdir(parents=True, exist_ok=True)
        unfinished = destination.with_name(f".{destination.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(self.output, unfinished)
        if destination.exists():
            shutil.rmtree(destination)
        unfinished.rename(destination)


@contextmanager
def running(context: Context, name: str, key: str) -> Iterator[tuple[StageFolder, Progress]]:
    """Hold a stage's folder for one call and report its start, end or error.

    Only one process works on a key at a time; a second one waits and then finds the output finished.

    Args:
        context: The pipeline run.
        name: Stage name, e.g. `rl-dqo`.
        key: See `stage_key`.

    Raises:
        DQOError: As the stage raises it; a full disk is turned into one. If torchrun has started the stage.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # All of its processes but one would wait for the stage's lock.
        raise DQOError(
            f"a stage starts its training processes itself; got WORLD_SIZE {os.environ['WORLD_SIZE']} in the "
            "environment, as torchrun or a job operator sets it; expected one process: start it without torchrun, with "
            "distributed.processes in the recipe"
        )
    progress = Progress(context.progress_file, name)
    # Kubernetes and `dqo run` end a task with SIGTERM; as an interrupt it still closes the MLflow run.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        folder = StageFolder(context.workspace, name, key)
        with FileLock(folder.path / ".lock"):
            progress("cached" if folder.finished else "start")
            yield folder, progress
        progress("done")
    except KeyboardInterrupt:
        progress("error", message="interrupted")
        raise
    except DQOError as error:
        progress("error", message=str(error))
        raise
    except Exception as error:
        message = full_disk_message(error, context.workspace)
        progress("error", message=message or f"{type(error).__name__}: {error}")
        if message:
            raise DQOError(message) from error
        raise


def full_disk_message(error: BaseException, folder: Path) -> str | None:
    """Say what to do if an exception, or what caused it, means that the disk is full; else None.

    safetensors, sqlite and torch report a full disk in exceptions of their own, without an errno. torch's zip writer
    does not even say that the disk was the reason (its bookkeeping stumbles over the short write, or the write fails
    in a destructor), so for it the disk is asked.
    """
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        full = isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)
        full = full or any(
            words in text for words in ("No space left on device", "os error 28", "os error 122", "disk is full")
        )
        if full or (any(words in text for words in _TORCH_WRITER) and not _accepts(folder, 2**20)):
            free = shutil.disk_usage(folder).free
            return (
                f"{folder}: the disk is full ({free / 2**20:.0f} MiB free) while writing a checkpoint or result; "
                "free some space and repeat the same command: it continues from the newest complete checkpoint"
            )
        seen = seen.__cause__ or seen.__context__
    return None


def _accepts(folder: Path, size: int) -> bool:
    """Whether a file of `size` bytes can be written below a folder now, by writing one."""
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"\0" * size)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        return False
    return True
