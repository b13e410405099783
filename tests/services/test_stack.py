"""The servers that the tests of this folder start: they are what they claim to be, and none outlives its owner."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from services import stack
from services.servers import STACK, Server, processes_of


def gone(folder: str, sweep: bool, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if sweep:
            stack.sweep()
        if not processes_of(f"{stack.MARK}={folder}") and not Path(folder).exists():
            return True
        time.sleep(0.2)
    return False


def test_what_the_machine_lacks_is_told_from_what_was_not_installed(monkeypatch: pytest.MonkeyPatch):
    """The first skips tests; the second has to fail them, or a package that is dropped would switch them off."""
    with pytest.raises(stack.Missing, match=r"no-such-program .*apt-get install postgresql"):
        stack.postgresql("no-such-program")
    monkeypatch.setattr(stack, "postgresql", lambda program: program)
    monkeypatch.setattr(stack, "PACKAGES", {"no_such_module": "no-such-package"})
    with pytest.raises(RuntimeError, match=r"no-such-package is not installed.*make install"):
        stack.check_parts()
    monkeypatch.setattr(stack.shutil, "which", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match=r"weed is not installed.*make install"):
        stack.check_parts()


def test_the_server_asks_for_a_password(server: Server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server.uri}/api/2.0/mlflow/experiments/get?experiment_id=0")
    assert refused.value.code == 401


@pytest.mark.slow
@pytest.mark.parametrize("killed_too", [False, True], ids=["owner killed", "owner and the stack's program killed"])
def test_no_server_outlives_its_owner(server: Server, killed_too: bool):
    # An owner: a process that starts a stack as the fixture does, says where it is, and waits.
    program = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, {str(STACK)!r}], stdin=subprocess.PIPE, start_new_session=True)\n"
        "print(p.pid, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert owner.stdout
    supervisor, folder = int(owner.stdout.readline()), json.loads(owner.stdout.readline())["folder"]
    assert len(processes_of(f"{stack.MARK}={folder}")) >= 3
    if killed_too:
        os.kill(supervisor, signal.SIGKILL)
    os.killpg(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert gone(folder, sweep=killed_too), processes_of(f"{stack.MARK}={folder}")
    assert Path(server.folder).is_dir()  # another owner's servers go on
