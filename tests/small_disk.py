"""A small file system in memory, for what happens when a disk is full."""

import os
import shutil
import subprocess
from pathlib import Path


def mount_small(folder: Path, size: str) -> str:
    """Mount a file system of this size, such as `6m`; returns "", or the words with which this machine forbids it.

    Only what speaks of rights is an answer; that `mount` fails for another reason is a mistake of the test.
    """
    if shutil.which("mount") is None:
        return "there is no command `mount`"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
        capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"},
    )  # fmt: skip
    if done.returncode == 0:
        return ""
    said = done.stderr.partition("\n")[0]
    assert "must be superuser" in said or "permission denied" in said, done.stderr
    return said
