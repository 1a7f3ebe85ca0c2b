"""Replaces files and folders: after a crash at any moment, the old one or the new one is there.

The new content is written into a temporary folder beside the old one, ``.NAME.HOST-PID-ID.tmp``, is
flushed to disk, and is then renamed. The writer holds an ``flock`` on a file in its temporary
folder, so a later writer recognizes and removes the folders that killed writers left.
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

_LOCK = "lock"  # the file in a temporary folder that its writer has locked
_TEMPORARY = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,10})-[0-9a-f]{8}\.tmp")
# What a file system answers that cannot flush a folder.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write; the file is renamed to ``path`` when the block ends.

    If the block raises, ``path`` is unchanged.
    """
    with replacing_together(path) as (partial,):
        yield partial


@contextlib.contextmanager
def replacing_together(first: Path, *others: Path) -> Iterator[tuple[Path, ...]]:
    """Yields a temporary path for each path; the files are renamed, in order, when the block ends.

    All paths are in one folder. Every file is on disk before the first is renamed, and each rename
    is on disk before the next. If the block or a flush of a file raises, no path has changed.
    """
    paths = (first, *others)
    with _temporary(first) as work:
        partials = tuple(work / f"new-{path.name}" for path in paths)
        yield partials
        for partial in partials:
            flush_to_disk(partial)
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
            flush_to_disk(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill; it is renamed to ``path`` when the block ends.

    If the block raises, the folder is removed. At the end, ``path`` must not exist or must be an
    empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path) as work:
        partial = work / "new"
        partial.mkdir()
        yield partial
        for folder, _, files in os.walk(partial):
            for name in files:
                flush_to_disk(Path(folder, name))
            flush_to_disk(Path(folder))
        if path.exists():
            path.rmdir()
        partial.rename(path)
        flush_to_disk(path.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder; it loses its name first, so it is never seen incomplete."""
    with _temporary(path) as work:
        path.rename(work / "old")


def remove_abandoned(folder: Path) -> None:
    """Removes the temporary folders in a folder that belong to no living writer."""
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):  # another writer removes it, or may not be touched
                _remove_if_abandoned(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits for the exclusive lock on a folder, and holds it during the block.

    The lock is an ``flock`` on the folder itself, so it leaves no file, and it ends with the
    process. If the platform or the file system has no such lock, the block runs without it. On a
    network file system, the lock usually excludes the processes of one host only.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        held = try_lock(descriptor, wait=True)
        try:
            yield
        finally:
            if held:  # closing is not enough: a process that was forked meanwhile shares the lock
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, *, wait: bool = False) -> bool | None:
    """Takes the exclusive ``flock`` on an open file or folder.

    Returns:
        True if the lock is held now, False if someone else holds it, None if the platform or the
        file system has no such lock.
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


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on disk."""
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
def _temporary(path: Path) -> Iterator[Path]:
    """Makes a temporary folder beside ``path``, owns it during the block, and then removes it."""
    remove_abandoned(path.parent)
    folder, descriptor = _make_owned(path)
    try:
        yield folder
    finally:
        os.close(descriptor)
        _remove(folder)


def _make_owned(path: Path) -> tuple[Path, int]:
    """Makes a temporary folder; returns it with the descriptor that holds its lock."""
    while True:
        name = f".{path.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
        folder = path.with_name(name)
        folder.mkdir()
        try:
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:  # another writer took the empty folder for an abandoned one
            continue
        except OSError:
            _remove(folder)
            raise
        try_lock(descriptor, wait=True)
        if (folder / _LOCK).exists():
            return folder, descriptor
        os.close(descriptor)  # another writer locked it first, and removed the folder


def _remove_if_abandoned(folder: Path) -> None:
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        folder.rmdir()  # killed before it had a lock: empty; a living writer makes another folder
        return
    try:
        held = try_lock(descriptor)
        if _owner_has_ended(folder) if held is None else held:
            _remove(folder)
    finally:
        os.close(descriptor)


def _owner_has_ended(folder: Path) -> bool:
    """Whether the process in a temporary folder's name ran on this host and exists no more."""
    owner = _TEMPORARY.fullmatch(folder.name)
    if owner is None or owner["host"] != _host():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's process
        return False
    return False


def _remove(folder: Path) -> None:
    """Removes a temporary folder, its lock file last: after a kill the rest is still locked."""
    for entry in folder.glob("*"):
        if entry.name == _LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _host() -> str:
    """Returns a digest of the host's name, which a file's name can hold."""
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()
