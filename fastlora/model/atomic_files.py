"""Replace files and folders atomically: after a crash, either the old or the new version exists.

The new content is first written into a temporary folder in the same parent folder. The name of the
temporary folder is ``.NAME.HOST-PID-ID.tmp``. The content is then flushed to disk and renamed. The
writer holds an ``flock`` on a file in its temporary folder, so that other writers can recognize and
remove the temporary folders of writers that were killed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # every use checks for None

_LOCK = "lock"  # the file in a temporary folder that the writer locks
_TEMPORARY = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,10})-[0-9a-f]{8}\.tmp")
# Errors from file systems that cannot flush a folder.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@contextlib.contextmanager
def atomic_replace_file(path: Path) -> Iterator[Path]:
    """Replace a file atomically.

    The file is replaced when the ``with`` block ends. The block gets the path of a temporary file
    and must write the file, which then replaces ``path``. If the block raises an error, ``path`` is
    unchanged.
    """
    with atomic_replace_each_file(path) as (partial,):
        yield partial


@contextlib.contextmanager
def atomic_replace_each_file(first: Path, *others: Path) -> Iterator[tuple[Path, ...]]:
    """Replace each of the given files atomically.

    The files are replaced when the ``with`` block ends. The block gets the paths of temporary files
    and must write all of them. The temporary files then replace the given files. The temporary
    files are renamed in the order of the arguments. All paths must be in the same folder. All files
    are flushed to disk before the first file is renamed, and each rename is flushed to disk before
    the next rename. If the block or the flush of a file raises an error, none of the given files
    has been changed.
    """
    paths = (first, *others)
    with _locked_temp_folder(first) as work:
        partials = tuple(work / f"new-{path.name}" for path in paths)
        yield partials
        for partial in partials:
            fsync_path(partial)
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
            fsync_path(path.parent)


@contextlib.contextmanager
def atomic_new_folder(path: Path) -> Iterator[Path]:
    """Create a folder atomically.

    The folder is created when the ``with`` block ends. The block gets a temporary folder, which is
    then renamed to ``path``. The block must write the content of the folder. If the block raises an
    error, the temporary folder is removed. When the block ends, ``path`` must not exist or must be
    an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked_temp_folder(path) as work:
        partial = work / "new"
        partial.mkdir()
        yield partial
        for folder, _, files in os.walk(partial):
            for name in files:
                fsync_path(Path(folder, name))
            fsync_path(Path(folder))
        if path.exists():
            path.rmdir()
        partial.rename(path)
        fsync_path(path.parent)


def atomic_remove_folder(path: Path) -> None:
    """Remove a folder atomically.

    The folder is renamed before it is removed, so that no reader sees it partly removed.
    """
    with _locked_temp_folder(path) as work:
        path.rename(work / "old")


def remove_abandoned_temp_folders(folder: Path) -> None:
    """Remove abandoned temporary folders from a folder.

    Processes that were killed have left them behind.
    """
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):  # removed by another writer, or no permission
                _remove_if_owner_ended(path)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder for the duration of a ``with`` block.

    The lock is exclusive: the block starts when no other process holds the lock. The lock is an
    ``flock`` on the folder itself, which needs no lock file and is released if the process ends. If
    the platform or the file system does not support ``flock``, the block runs without a lock. On a
    network file system, the lock usually excludes only other processes on the same host.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        held = acquire_flock(descriptor, wait=True)
        try:
            yield
        finally:
            if held:  # closing is not enough: a process forked in the meantime shares the lock
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def acquire_flock(descriptor: int, *, wait: bool = False) -> bool | None:
    """Acquire an ``flock`` on a file descriptor.

    The lock is exclusive.

    Args:
        descriptor: The descriptor of an open file or folder.
        wait: Whether to wait until the lock is free.

    Returns:
        True if the lock was acquired, False if it is already held elsewhere, or None if the
        platform or the file system does not support ``flock``.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def fsync_path(path: Path) -> None:
    """Flush a file or folder to disk.

    The content of a file or the directory entries of a folder are flushed.
    """
    is_folder = path.is_dir()
    if is_folder and fcntl is None:  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDWR if fcntl is None else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked_temp_folder(path: Path) -> Iterator[Path]:
    """Create a locked temporary folder for the duration of a ``with`` block.

    The folder is created next to ``path`` and is removed when the block ends.
    """
    remove_abandoned_temp_folders(path.parent)
    folder, descriptor = _create_locked_temp_folder(path)
    try:
        yield folder
    finally:
        os.close(descriptor)
        _remove_temp_folder(folder)


def _create_locked_temp_folder(path: Path) -> tuple[Path, int]:
    """Create a locked temporary folder next to ``path``.

    The folder is for the new content of ``path``.

    Returns:
        A tuple of the folder and the file descriptor of its locked lock file.
    """
    while True:
        name = f".{path.name}.{_host_name_digest()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
        folder = path.with_name(name)
        folder.mkdir()
        try:
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:  # another writer removed the empty folder as abandoned
            continue
        except OSError:
            _remove_temp_folder(folder)
            raise
        acquire_flock(descriptor, wait=True)
        if (folder / _LOCK).exists():
            return folder, descriptor
        os.close(descriptor)  # another writer acquired the lock first and removed the folder


def _remove_if_owner_ended(folder: Path) -> None:
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        # The folder is empty: its writer was killed before it created the lock file. If the writer
        # is still running, it creates another folder.
        folder.rmdir()
        return
    try:
        held = acquire_flock(descriptor)
        if _owner_process_ended(folder) if held is None else held:
            _remove_temp_folder(folder)
    finally:
        os.close(descriptor)


def _owner_process_ended(folder: Path) -> bool:
    """Return whether the process that created a temporary folder has ended.

    The process is identified by the host and the process id in the folder's name. The result is
    False if it is not known whether the process has ended, as for a process on another host.
    """
    owner = _TEMPORARY.fullmatch(folder.name)
    if owner is None or owner["host"] != _host_name_digest():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's process
        return False
    return False


def _remove_temp_folder(folder: Path) -> None:
    """Remove a temporary folder.

    The folder was created by the current process or left behind by another process. The lock file
    is removed last. If the process is killed before that, the folder still contains its lock file,
    and another writer can remove the folder.
    """
    for entry in folder.glob("*"):
        if entry.name == _LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _host_name_digest() -> str:
    """Return a digest of the host name.

    The digest is hexadecimal. It is used in file names.
    """
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()
