"""One of the several processes of a training stage, started by `dqo.stages.processes` or, on several nodes, torchrun.

By hand, to look into a failure (without the stage's process, which finishes the output):
`torchrun --standalone --nproc-per-node 2 -m dqo.stages.worker STAGE_FOLDER/processes/job.json`.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from dqo.distributed import require_node
from dqo.errors import DQOError
from dqo.progress import Progress
from dqo.recipe import parse
from dqo.stages import rl, sft
from dqo.stages.context import Context, StageFolder
from dqo.stages.processes import STAGE_PROCESS, write_failure
from dqo.tracking import Run


def main(path: Path) -> None:
    """Do the work of a job file as the process that torchrun's variables name."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # at once: nothing here has to be closed
    # The stage may be gone before the imports above are done; by hand, there is none.
    stage = int(os.environ.get(STAGE_PROCESS, os.getppid()))
    threading.Thread(target=_end_with, args=(stage,), daemon=True).start()
    rank = int(os.environ["RANK"])
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        path.with_name(f"failure-{rank}.json").unlink(missing_ok=True)  # of pods that Kubernetes has replaced
        job = _read_job(path)
        # MLflow's address is in the environment, where the stage's process has put it.
        context = Context(parse(job["recipe"]), Path(job["workspace"]), "", job["parent_run_id"])
        require_node(context.recipe)
        works: dict[str, Callable[..., None]] = {"sft": sft.work, "rl": rl.work}
        works[job["work"]](
            context,
            StageFolder(context.workspace, job["name"], job["key"]),
            Progress(context.progress_file, job["name"]),
            Run(job["run_id"]) if rank == 0 else None,
            job["key"],
            **job["inputs"],
        )
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except Exception as error:
        failure = {
            "time": time.time(),
            "type": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
        write_failure(path, rank, failure)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an orderly end might wait for processes that wait for this one


def _read_job(path: Path) -> dict[str, Any]:
    """Read a job file.

    Raises:
        DQOError: If it is not there.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DQOError(
            f"{path}: no such job; expected the file that the stage has written: does this node mount the volume claim "
            "of the workspace (resources.workspace_claim) at the same place?"
        ) from None
    return content


def _end_with(parent: int) -> None:
    """End this process when the stage's is gone, even by SIGKILL: nothing may train on unseen."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
