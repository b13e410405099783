"""The command line `dqo` as the reader of a message can type it."""

import os
import shlex
import sys
from pathlib import Path


def dqo_command(*words: str | Path) -> str:
    """Return `dqo WORDS...` for a shell, with the path to `dqo` where the virtual environment is not activated.

    Args:
        words: Subcommand, options and arguments; quoted where the shell needs it.
    """
    folder = Path(sys.prefix) / "bin"
    program = "dqo"
    if str(folder) not in os.environ.get("PATH", "").split(os.pathsep):
        program = short(folder / "dqo")
        if os.sep not in program:
            program = os.path.join(os.curdir, program)  # noqa: PTH118  (pathlib drops the dot that the shell needs)
    return shlex.join([program, *map(str, words)])


def short(path: Path) -> str:
    """A path relative to here where it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
