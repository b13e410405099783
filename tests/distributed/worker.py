"""A process without torch, for tests of what `dqo.stages.processes` does when one ends: `worker.py FOLDER WHAT`."""

import json
import os
import signal
import sys
import time
from pathlib import Path

folder, what = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])
(folder / f"pid-{rank}").write_text(str(os.getpid()))


def fail(kind: str, message: str) -> None:
    failure = {"time": time.time(), "type": kind, "message": message, "traceback": f"Traceback of rank {rank}"}
    (folder / f"failure-{rank}.json").write_text(json.dumps(failure))
    sys.exit(1)


def after(name: str) -> None:
    """Wait for a file of the other process, then a moment."""
    while not (folder / name).is_file():
        time.sleep(0.005)
    time.sleep(0.02)


match what:
    case "done":
        pass
    case "environment":
        (folder / f"environment-{rank}.json").write_text(json.dumps(dict(os.environ)))
    case "mistake" | "bug" if rank == 1:
        fail("DQOError", "data: line 3") if what == "mistake" else fail("ZeroDivisionError", "division by zero")
    case "mistake" | "bug":  # loses its connection
        after("failure-1.json")
        fail("RuntimeError", "connection closed by peer")
    case "killed" if rank == 1:  # as by the kernel when memory runs out
        (folder / "dying").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    case "killed":  # may notice before the agent does
        after("dying")
        fail("RuntimeError", "connection closed by peer")
    case "exit":
        sys.exit(3) if rank == 1 else time.sleep(600)
    case "wait":
        time.sleep(600)
    case "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / f"ready-{rank}").touch()
        time.sleep(600)
