"""What a stage does when its processes end: by themselves, by a mistake, by a bug, by the kernel, by a signal."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from dqo.errors import DQOError
from dqo.stages import processes
from dqo.stages.processes import launch

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
WORKER = str(Path(__file__).with_name("worker.py"))


def start(place: Path, what: str) -> None:
    launch([WORKER, str(place), what], place, 2)


def pids(place: Path) -> list[int]:
    return [int((place / f"pid-{rank}").read_text()) for rank in (0, 1)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "processes").mkdir()
    return tmp_path / "processes"


def test_processes_share_the_processors_and_know_their_place(place, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processes, "_cores", lambda: 7)
    start(place, "environment")
    seen = [json.loads((place / f"environment-{rank}.json").read_text()) for rank in (0, 1)]
    assert [(one["RANK"], one["WORLD_SIZE"], one["LOCAL_RANK"]) for one in seen] == [("0", "2", "0"), ("1", "2", "1")]
    assert [one["OMP_NUM_THREADS"] for one in seen] == ["3", "3"]
    assert [one[processes.STAGE_PROCESS] for one in seen] == [str(os.getpid())] * 2
    assert "OMP_NUM_THREADS" not in os.environ and "RANK" not in os.environ


def test_a_mistake_is_told_in_its_own_words_with_the_process(place):
    with pytest.raises(DQOError) as caught:
        start(place, "mistake")
    assert str(caught.value) == "data: line 3 (process 1 of 2)"


def test_a_bug_keeps_its_traceback(place):
    with pytest.raises(RuntimeError, match=r"^ZeroDivisionError: division by zero \(process 1 of 2\)") as caught:
        start(place, "bug")
    assert caught.value.__notes__ == ["Traceback of rank 1"]


def test_a_killed_process_is_called_so_although_the_other_one_complains(place):
    for step, complete in ((4, True), (8, True), (12, False)):
        folder = place.parent / f"checkpoints/checkpoint-{step}"
        folder.mkdir(parents=True)
        if complete:
            (folder / "complete").touch()
    with pytest.raises(DQOError) as caught:
        start(place, "killed")
    message = str(caught.value)
    assert message.startswith("process 1 of 2 was ended by SIGKILL: most likely the machine or the container ran out")
    assert message.endswith("The same command continues from checkpoint-8")


def test_an_exit_code_is_told(place):
    with pytest.raises(RuntimeError, match=r"process 1 of 2 ended with exit code 3"):
        start(place, "exit")


@pytest.mark.parametrize(
    ("what", "number"), [("wait", signal.SIGTERM), ("wait", signal.SIGINT), ("stubborn", signal.SIGTERM)]
)
def test_a_signal_ends_all_processes_and_is_an_interrupt(place, monkeypatch, what, number):
    monkeypatch.setattr(processes, "_SHUTDOWN_SECONDS", 2)
    before = signal.signal(number, signal.default_int_handler)

    def send() -> None:
        names = [place / f"{'ready' if what == 'stubborn' else 'pid'}-{rank}" for rank in (0, 1)]
        while not all(name.is_file() for name in names):
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            start(place, what)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert not any(psutil.pid_exists(pid) for pid in pids(place))


def test_a_process_ends_when_its_stage_is_gone(place):
    """Killed with SIGKILL, a stage can pass nothing on; its processes look for it themselves."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    os.mkfifo(place / "job.json")  # reading it waits forever
    environment = os.environ | {processes.STAGE_PROCESS: str(gone.pid), "RANK": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dqo.stages.worker", str(place / "job.json")]
    assert subprocess.run(command, env=environment, timeout=600).returncode == 1
    assert not list(place.glob("failure-*"))
