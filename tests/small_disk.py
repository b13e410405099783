"""A small file system in memory, for what happens when a disk is full."""

import ctypes
import os
import sys
from pathlib import Path

_REMOUNT, _DETACH = 32, 2  # MS_REMOUNT and MNT_DETACH of linux/mount.h


def mount_small(folder: Path, size: str) -> str:
    """Mount a file system of this size, such as `6m`; returns "", or why this machine does not allow it.

    Only the kernel's word on rights is a reason. The system call says it in a number, the command `mount` in words that
    differ from version to version.

    Raises:
        OSError: If it fails for any other reason, which is a mistake of the test.
    """
    if sys.platform != "linux":
        return f"no small file system is mounted on {sys.platform}: tmpfs is Linux's"
    try:
        _mount(folder, size, 0)
    except PermissionError as error:  # EPERM and EACCES alone
        return f"no file system of its own may be mounted here ({error.strerror})"
    return ""


def resize(folder: Path, size: str) -> None:
    """Give a mounted file system another size."""
    _mount(folder, size, _REMOUNT)


def unmount(folder: Path) -> None:
    """Take a file system away as soon as nobody has a file on it open."""
    _check(_libc().umount2(os.fsencode(folder), _DETACH), folder)


def _mount(folder: Path, size: str, flags: int) -> None:
    options = f"size={size}".encode()
    _check(_libc().mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(flags), options), folder)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(status: int, folder: Path) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(folder))
