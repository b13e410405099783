"""A full disk is told from other errors: by its exceptions, by its texts, and on a real small file system."""

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_disk import mount_small, unmount

from dqo.stages.context import full_disk_message

FULL = {
    "no space": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "no quota": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "safetensors": RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "sqlite": sqlite3.OperationalError("database or disk is full"),
}
OTHER = {
    "no permission": OSError(errno.EACCES, os.strerror(errno.EACCES)),
    "read error": OSError(errno.EIO, os.strerror(errno.EIO)),
    "plain": ValueError("k must be at least 2"),
    "wordless": RuntimeError(),
    "sqlite, locked": sqlite3.OperationalError("database is locked"),
}


def wrapped(error: Exception, how: str) -> BaseException:
    """The error as the cause of another one, or as what another one was raised in the middle of."""
    try:
        try:
            raise error
        except Exception as caught:
            if how == "cause":
                raise RuntimeError("the checkpoint could not be written") from caught
            raise RuntimeError("the checkpoint could not be written")  # noqa: B904
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_an_error_that_means_a_full_disk_says_what_to_do(error: Exception, tmp_path: Path):
    message = full_disk_message(error, tmp_path)
    assert message is not None
    assert message.startswith(f"{tmp_path}: the disk is full (")
    assert "while writing a checkpoint or result; free some space and repeat the same command" in message


@pytest.mark.parametrize("how", ["cause", "context"])
@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_it_is_found_behind_another_error(error: Exception, how: str, tmp_path: Path):
    assert full_disk_message(wrapped(error, how), tmp_path) == full_disk_message(error, tmp_path)
    assert full_disk_message(wrapped(wrapped(error, how), "cause"), tmp_path) is not None


@pytest.mark.parametrize("error", OTHER.values(), ids=OTHER)
def test_any_other_error_is_not_taken_for_it(error: Exception, tmp_path: Path):
    assert full_disk_message(error, tmp_path) is None
    assert full_disk_message(wrapped(error, "cause"), tmp_path) is None
    assert full_disk_message(wrapped(error, "context"), tmp_path) is None


# --- a real file system of 4 MiB ---


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    if no_mount := mount_small(mount, "4m"):
        pytest.skip(no_mount)
    try:
        yield mount
    finally:
        # An error of torch's keeps its half-written file open, so the file system goes when the last of them does.
        unmount(mount)


def test_every_way_in_which_torch_fails_on_a_full_disk_is_recognised(small: Path, tmp_path: Path):
    """Around the free space torch fails in different ways: in a tensor, in the zip's directory, in the last flush."""
    path, free = small / "optimizer.pt", shutil.disk_usage(small).free
    failures: dict[str, str | None] = {}
    for size in range(free - 1800, free + 200, 100):
        tensor = torch.zeros(size, dtype=torch.uint8)
        try:
            torch.save(tensor, path)
        except Exception as error:
            failures.setdefault(str(error), full_disk_message(error, small))
        else:
            assert torch.equal(torch.load(path), tensor)  # what torch does not complain about is whole
        path.unlink()
    assert failures
    # With room on the disk, the same words are another error.
    assert [text for text in failures if full_disk_message(RuntimeError(text), tmp_path) is not None] == []
    assert [text for text, message in failures.items() if message is None or "the disk is full" not in message] == []


def test_a_state_of_many_tensors_that_does_not_fit_is_recognised(small: Path):
    free = shutil.disk_usage(small).free
    for count in (2, 3, 7, 20):
        state = {index: torch.zeros(free // count // 4) for index in range(count)}  # as large as the free space
        with pytest.raises(RuntimeError) as caught:
            torch.save(state, small / "optimizer.pt")
        message = full_disk_message(caught.value, small)
        assert message is not None and "(0 MiB free)" in message, str(caught.value)
        (small / "optimizer.pt").unlink()


def test_safetensors_sqlite_and_python_on_a_full_disk_are_recognised(small: Path):
    def weights() -> None:
        save_file({"w": torch.zeros(2**21)}, small / "model.safetensors")

    def database() -> None:
        with closing(sqlite3.connect(small / "mlflow.db")) as store:
            store.execute("create table t (value blob)")
            store.execute("insert into t values (zeroblob(8000000))")

    def text() -> None:
        (small / "history.jsonl").write_text("x" * 8_000_000)

    for write in (weights, database, text):
        with pytest.raises(Exception) as caught:
            write()
        assert full_disk_message(caught.value, small) is not None, repr(caught.value)
        for path in small.iterdir():
            path.unlink()
