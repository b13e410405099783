"""A training stage's processes: the stage's own, or several that torchrun's agents start, watch and end.

The stage's process holds the lock and the MLflow run. With several processes it computes nothing: it writes the job to
a file, and each process (`dqo.stages.worker`) reads it and does the stage's work. The first one reports. On one machine
the agent runs in the stage's process; with several nodes each has an agent, which the context's launcher starts.
"""

import json
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import patch_environment
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dqo.distributed import environment, require_machine
from dqo.errors import DQOError
from dqo.files import write_text
from dqo.progress import Progress
from dqo.stages.context import Context, NodesJob, StageFolder
from dqo.stages.training import newest_checkpoint
from dqo.tracking import Run

_WORKER = "dqo.stages.worker"
_FOLDERS = {"data", "parent"}  # inputs that a task finds on its own disk

STAGE_PROCESS = "DQO_STAGE_PROCESS"
"""Variable with the id of the stage's process, whose end is that of the processes it has started."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# What is left of a stage's patience when it is told to end: `dqo run` insists after 20 seconds, Kubernetes after 30.
_SHUTDOWN_SECONDS = 10


def carry_out(
    work: Callable[..., None],
    context: Context,
    folder: StageFolder,
    progress: Progress,
    run: Run,
    name: str,
    key: str,
    **inputs: str,
) -> None:
    """Do a training stage's work in the recipe's processes and finish its output.

    Args:
        work: The stage's `work`, called as `work(context, folder, progress, run, key, **inputs)` in each process.
        context: The pipeline run.
        folder: The stage's folder.
        progress: Reports steps.
        run: The stage's MLflow run.
        name: The stage's name, e.g. `rl-dqo`.
        key: The stage's key.
        inputs: Further arguments of `work`: names and paths.

    Raises:
        DQOError: If the processes cannot be run here, if one was killed, or as one of them or the launcher raised it.
        RuntimeError: If a process failed otherwise, with its own traceback as a note.
        KeyboardInterrupt: If a signal ended the stage; its processes have ended then.
    """
    place = folder.path / "processes"

    def write_job(inputs: dict[str, str]) -> Path:
        job = {
            "work": work.__module__.rpartition(".")[2],
            "recipe": context.recipe.to_json(),
            "workspace": str(context.workspace),
            "parent_run_id": context.parent_run_id,
            "run_id": run.id,
            "name": name,
            "key": key,
            "inputs": inputs,
        }
        write_text(place / "job.json", json.dumps(job))
        return place / "job.json"

    strategy = context.recipe.distributed.strategy
    if context.recipe.distributed.nodes > 1 and context.launcher is not None:
        # Nothing is cleared away before: processes that an earlier, killed call has started may still be at work.
        inputs = inputs | {each: _share(Path(inputs[each]), place / "inputs" / each) for each in _FOLDERS & set(inputs)}
        job = NodesJob(
            context.recipe,
            name,
            key,
            context.workspace,
            _WORKER,
            (str(write_job(inputs)),),
            {"MLFLOW_TRACKING_URI": context.mlflow_uri, **environment(strategy)},
            folder.output / "history.jsonl",
        )
        _launch_on_nodes(context.launcher, job, place)
    else:
        require_machine(context.recipe)
        newest_checkpoint(folder.path)  # removes incomplete ones before several processes look
        if context.recipe.processes == 1:
            work(context, folder, progress, run, key, **inputs)
        else:
            shutil.rmtree(place, ignore_errors=True)
            path = write_job(inputs)
            with patch_environment(**environment(strategy)):
                launch(["-m", _WORKER, str(path)], place, context.recipe.processes)
    shutil.rmtree(place, ignore_errors=True)
    run.folder(folder.output, "checkpoint")
    folder.finish()
    shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)


def _share(source: Path, destination: Path) -> str:
    """Copy a folder into the workspace, where the other nodes find it; what is there already is the same."""
    if not destination.exists():  # the stage's key holds the digests of its inputs
        unfinished = destination.with_name(f".{destination.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished)
        unfinished.rename(destination)
    return str(destination)


def _launch_on_nodes(launcher: Callable[[NodesJob], None], job: NodesJob, place: Path) -> None:
    """Have the launcher start the job, and tell a failure by what the processes have left.

    Raises:
        DQOError: As the first process to fail raised it, or else as the launcher raised it.
    """
    try:
        launcher(job)
    except DQOError as error:
        count = job.recipe.processes
        told = _told(place, range(count))
        order = sorted(told, key=lambda rank: told[rank]["time"])
        for rank in order:
            if told[rank]["type"] == DQOError.__name__:
                raise DQOError(f"{told[rank]['message']} (process {rank} of {count})") from None
        if not order:
            raise
        # It may be the cause, or have lost its connection to a process that was killed, which the launcher tells.
        first = told[order[0]]
        words = f"{first['type']}: {first['message']}"
        complete = DQOError(f"{error}\nThe first process to complain was {order[0]} of {count}: {words}")
        complete.add_note(first["traceback"])
        raise complete from None


def _told(place: Path, ranks: Iterable[int]) -> dict[int, dict[str, Any]]:
    """What processes have left by `write_failure`."""
    paths = {rank: place / f"failure-{rank}.json" for rank in ranks}
    return {rank: json.loads(path.read_text(encoding="utf-8")) for rank, path in paths.items() if path.is_file()}


def launch(arguments: Sequence[str], place: Path, processes: int) -> None:
    """Start processes with torchrun's agent and wait for them; a signal to this process ends them all.

    Args:
        arguments: Python's, of each process.
        place: Folder inside the stage's where a process leaves its failure (`write_failure`).
        processes: How many.

    Raises:
        DQOError: If one raised it or was ended by a signal.
        RuntimeError: If one failed otherwise, with its own traceback as a note.
        KeyboardInterrupt: If a signal ended this process; the others have ended then.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        # What `torchrun --standalone` chooses: a store on a free port of this machine.
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,  # a stage that is repeated continues from its checkpoint
        shutdown_timeout=_SHUTDOWN_SECONDS,
    )
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        with patch_environment(OMP_NUM_THREADS=threads, **{STAGE_PROCESS: os.getpid()}):
            # The agent turns each of the signals into an exception, having passed it on to the processes.
            elastic_launch(config, sys.executable)(*arguments)
    except SignalException as error:
        raise KeyboardInterrupt(str(error)) from None
    except ChildFailedError as error:
        raise _cause(place, error.failures, processes) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_failure(job: Path, rank: int, failure: dict[str, Any]) -> None:
    """Leave what a process failed with beside its job, for the stage: `time`, `type`, `message`, `traceback`."""
    write_text(job.with_name(f"failure-{rank}.json"), json.dumps(failure))


def _cause(place: Path, failures: dict[int, ProcessFailure], count: int) -> Exception:
    """The error that the others followed from: when one process fails, the others lose their connection to it."""
    told = _told(place, failures)
    order = sorted(told, key=lambda rank: told[rank]["time"])
    for rank in order:
        if told[rank]["type"] == DQOError.__name__:
            return DQOError(f"{told[rank]['message']} (process {rank} of {count})")
    # The agent ends those that are left with SIGTERM; any other signal came from outside or from a crash.
    silent = [rank for rank in failures if rank not in told]
    silent.sort(key=lambda rank: failures[rank].exitcode == -signal.SIGTERM)
    if silent and failures[silent[0]].exitcode < 0 and failures[silent[0]].exitcode != -signal.SIGTERM:
        failure = failures[silent[0]]
        reason = f"process {silent[0]} of {count} was ended by {failure.signal_name()}"
        if failure.exitcode == -signal.SIGKILL:
            reason += (
                ": most likely the machine or the container ran out of memory, which all processes share; lower "
                "micro_batch or distributed.processes, or give it more memory"
            )
        checkpoint = newest_checkpoint(place.parent)
        again = "starts from the first step" if checkpoint is None else f"continues from {checkpoint.name}"
        return DQOError(f"{reason}. The same command {again}")
    if order:
        first = told[order[0]]
        error = RuntimeError(f"{first['type']}: {first['message']} (process {order[0]} of {count})")
        error.add_note(first["traceback"])
        return error
    rank = silent[0]
    return RuntimeError(f"process {rank} of {count} ended with exit code {failures[rank].exitcode}; see its output")
