"""Lock the output folder of a training run, so that only one run writes to it at a time.

The lock is an `flock` on a file. The operating system releases it when the process exits, even if
the process is killed. A forked process inherits the file descriptor and therefore the lock. It
closes its copy after the fork, so a worker process that outlives a killed run does not keep the
folder locked.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fastlora.model.atomic_files import acquire_flock
from fastlora.train.processes import TrainError
from fastlora.train.run_log import os_error_as_train_error
from fastlora.user_warnings import warn

LOCK = ".run.lock"
# File descriptors of the locks that this process holds.
_held: set[int] = set()


def _close_in_child() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock the output folder of a training run for the duration of a ``with`` block.

    The folder is created if it is missing. On exit, the lock file is removed.
    Each folder that was created on entry is removed too if it is still empty. If the file system
    does not support `flock`, the function warns and takes no lock.

    Args:
        folder: The output folder of the run.

    Raises:
        TrainError: Another run holds the lock, or the lock file cannot be written. If another run
            holds the lock, nothing has changed, and the message names its process.
    """
    path = folder / LOCK
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        descriptor = _acquire_lock_if_supported(path)
        try:
            if descriptor is not None:
                with os_error_as_train_error(path):
                    _write_holder(descriptor)
            yield
        finally:
            if descriptor in _held:  # False in a forked process
                path.unlink(missing_ok=True)  # still locked, so no other run uses this file
                _held.discard(descriptor)
                os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):
            for parent in created:
                parent.rmdir()


def _acquire_lock_if_supported(path: Path) -> int | None:
    """Lock the file ``path``, and return its file descriptor.

    The file is in the output folder of a run, and its lock protects this folder. If the file system
    does not support locks, the function warns and returns None.

    Raises `TrainError` if another run holds the lock or if the file cannot be written.
    """
    while True:
        with os_error_as_train_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # another run has just removed its empty folder
                continue
        _held.add(descriptor)
        locked = False
        try:
            free = acquire_flock(descriptor)
            if free is None:
                path.unlink(missing_ok=True)
                warn(
                    f"{path.parent}: the file system does not support locks; make sure that no "
                    "other run writes to this folder",
                )
                return None
            if not free:
                raise TrainError(
                    f"{path.parent}: another training run ({_describe_lock_holder(descriptor)}) is "
                    "writing to this folder; wait until it ends, or choose another output folder"
                )
            # Another run may have removed the lock file on exit, before this run locked it.
            locked = _is_file_at(descriptor, path)
            if locked:
                return descriptor
        finally:
            if not locked:
                _held.discard(descriptor)
                os.close(descriptor)


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.orig_argv),
    }
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(holder).encode())


def _describe_lock_holder(descriptor: int) -> str:
    """Return a description of the process that holds the lock.

    The description is read from the lock file, whose descriptor is ``descriptor``.
    """
    try:
        found = json.loads(os.pread(descriptor, 1 << 16, 0))
        return (
            f"pid {found['pid']} on host {found['host']}, started {found['started']}, "
            f"command {found['command']}"
        )
    except (ValueError, KeyError, TypeError):  # the process has not described itself yet
        return "its process is unknown"
