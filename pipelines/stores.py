"""What the commands on a store of runs share: where it is, what a run in it is called, files that are to be written."""

import os
from pathlib import Path

from dqo import tracking
from dqo.errors import DQOError
from dqo.shell import dqo_command


def find(out: Path, uri: str | None) -> str | None:
    """MLflow's address; `None` where there is no store.

    Args:
        out: Folder given to `dqo run`, whose store is read where no address is given.
        uri: What `--uri` says; `None` for MLFLOW_TRACKING_URI, else the store in `out`.

    Raises:
        DQOError: If the address is that of an sqlite file which does not exist, and which MLflow would make.
    """
    named = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if named is None:
        return tracking.default_uri(out) if (out / "mlflow.db").is_file() else None
    if named.startswith("sqlite:///") and not Path(named.removeprefix("sqlite:///")).is_file():
        raise DQOError(f"--uri {named}: there is no such file; expected an MLflow store that holds the runs")
    return named


def require(out: Path, uri: str | None) -> str:
    """As `find`, for a command that does nothing without a store.

    Raises:
        DQOError: If there is none.
    """
    store = find(out, uri)
    if store is None:
        raise DQOError(
            f"{out / 'mlflow.db'}: no MLflow store; run a recipe first, give its folder with --out, or MLflow's "
            "address with --uri or MLFLOW_TRACKING_URI"
        )
    return store


def where(store: str, experiment: str, run_id: str, out: Path) -> str:
    """The address of a run, or the command that opens a local store."""
    if store == tracking.default_uri(out):
        return dqo_command("ui", *(() if out == Path("runs") else ("--out", out))) + f"  (run {run_id})"
    return tracking.run_link(store, experiment, run_id) or f"run {run_id} in {tracking.public(store)}"


def check_file(option: str, path: Path | None, suffix: str) -> None:
    """Say what is wrong with the name of a file to be written, before anything is computed.

    Raises:
        DQOError: If it has another suffix, is a folder, or is to be in one that does not exist.
    """
    if path is None:
        return
    if path.suffix != suffix or path.is_dir():
        raise DQOError(f"{option} {path}: expected the name of a file that ends in {suffix}")
    if not path.parent.is_dir():
        raise DQOError(f"{option} {path}: the folder {path.parent} does not exist")
