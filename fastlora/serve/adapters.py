"""The adapters that a server has: subfolders of one folder, found, loaded and let go by name."""

from __future__ import annotations

import itertools
import logging
import os
import re
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from fastlora.model.adapter_files import CONFIG_NAME
from fastlora.pool import AdapterPool
from fastlora.pool.resident import Entry
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    CheckpointError,
    ConfigError,
    near_names,
)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_FILES = (CONFIG_NAME, "adapter_model.safetensors", "adapter_model.bin")
# Argument of the pool -> the option that sets it.
_OPTIONS = {"max_rank": "--max-rank", "max_adapter_bytes": "--max-adapter-mib"}
_MOST_LETTERS = 1000  # of a message
_log = logging.getLogger("fastlora.serve")


@dataclass(eq=False, kw_only=True)
class Version(Entry):
    """An adapter as it was at one time; a change of its folder makes another one.

    It is the pool's record of the adapter, too. Its ``name`` there is its own, so that old and new
    can run side by side.

    Attributes:
        served_as: What clients call it.
        mark: Changes with the files.
        ready: It has been read.
        error: Why it cannot be used.
        users: Requests that have it.
        waiting: What to call once it is ready or damaged; not empty while it is being read.
    """

    served_as: str
    mark: tuple[object, ...]
    ready: bool = False
    error: str | None = None
    users: int = 0
    waiting: list[Callable[[], None]] = field(default_factory=list)


class ServedAdapters:
    """Names of adapters, and which version of its folder each one is.

    A request keeps its version from beginning to end. One that was replaced or unloaded meanwhile
    leaves the pool when its last request has ended. Every method may be called from any thread.
    Without ``root`` the server has no adapters; ``reserved`` are the base model's names.
    """

    def __init__(self, pool: AdapterPool, root: Path | None, reserved: Collection[str]) -> None:
        self.pool = pool
        self.root = None if root is None else root.resolve()
        self._reserved = frozenset(reserved)
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._versions: dict[str, Version] = {}
        # Came by `load`: the watch leaves them alone. Unloaded: it leaves these out.
        self._by_hand: set[str] = set()
        self._left_out: dict[str, tuple[object, ...]] = {}
        self._refused: set[tuple[object, ...]] = set()  # at the last look; each is said once

    # ------------------------------------------------------------------------------ for requests

    @property
    def names(self) -> list[str]:
        """Names of the adapters that nothing is known to be wrong with, sorted."""
        with self._lock:
            return sorted(name for name, own in self._versions.items() if own.error is None)

    def take(self, name: str) -> Version:
        """Returns the current version for one request, which gives it back by `give_back`.

        Raises:
            AdapterNotFoundError: There is none of that name.
            CheckpointError: Its folder is damaged, or does not fit the model.
        """
        with self._lock:
            version = self._versions.get(name)
            if version is None:
                raise AdapterNotFoundError(f"the model {name!r} does not exist")
            if version.error is not None:
                raise CheckpointError(f"adapter {name!r} cannot be used: {version.error}")
            version.users += 1
            return version

    def give_back(self, version: Version) -> None:
        """Ends a request's use of a version."""
        with self._lock:
            version.users -= 1
            self._forget_unused(version)

    def prepare(self, version: Version, then: Callable[[], None]) -> None:
        """Has a version read in the background, and calls ``then`` once it is ready or damaged."""
        future = None
        with self._lock:
            waits = not version.ready and version.error is None
            if waits:
                if not version.waiting:
                    future = self.pool.prefetch([version.name])
                version.waiting.append(then)
        # Without the lock, since both may call `then` here and now, which takes locks of its own.
        if future is not None:
            future.add_done_callback(lambda done: self._was_read(version, done))
        elif not waits:
            then()

    def _was_read(self, version: Version, done: Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        with self._lock:
            if error is None:
                version.ready = True
            else:
                version.error = self._without_root(error)
                _log.warning("adapter %r cannot be used: %s", version.served_as, error)
                if not isinstance(error, CheckpointError):  # the next look may find it well
                    version.mark = ()
            waiting, version.waiting = version.waiting, []
        for then in waiting:
            then()

    # ---------------------------------------------------------------------------- for the folder

    def scan(self) -> None:
        """Looks into the folder: new and changed adapters come, removed ones go.

        A folder that is damaged is known by its name and fails the requests for it.
        """
        if self.root is None:
            return
        found: dict[str, tuple[Path, tuple[object, ...]]] = {}
        refused: set[tuple[object, ...]] = set()
        for entry in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            mark = None if entry.name.startswith(".") else _mark(entry)
            if mark is None:
                continue
            try:
                self._check_name(entry.name)
                self._inside(entry)
            except ConfigError as error:
                refused.add((entry.name, *mark))
                if (entry.name, *mark) not in self._refused:
                    _log.warning("%r is left out: %s", str(entry), error)
                continue
            found[entry.name] = entry, mark
        self._refused = refused
        with self._lock:
            for name in [n for n in self._versions if n not in found and n not in self._by_hand]:
                self._drop(name)
            for name in [n for n in self._left_out if n not in found]:
                del self._left_out[name]
            due = [name for name, (_, mark) in found.items() if self._is_due(name, mark)]
        for name in due:
            self._put(self._version(name, *found[name]))

    def load(self, name: str, path: str, *, replace: bool = False) -> None:
        """Gives an adapter of the folder a name.

        Args:
            name: Letters, digits, ``.``, ``_`` and ``-``.
            path: Its folder, below the server's: absolute, or relative to that.
            replace: Take the place of an adapter of that name; requests that run keep the old one.

        Raises:
            ConfigError: The name cannot be an adapter's, the path leads out of the folder, or there
                is no adapter.
            AdapterStateError: The name exists.
            CheckpointError: The adapter is damaged, too large, or made for another model.
        """
        self._check_name(name)
        folder = self._inside(Path(path) if self.root is None else self.root / path)
        mark = _mark(folder)
        if mark is None:
            raise ConfigError(f"{path!r}: no adapter there; expected {CONFIG_NAME} in it")
        with self._lock:
            known = self._versions.get(name)
            if known is not None and known.error is None and not replace:
                raise AdapterStateError(
                    f"adapter {name!r} is loaded; unload it first, or set load_inplace"
                )
        version = self._version(name, folder, mark)
        try:
            self.pool.load_entry(version)  # reads all of it, so what is damaged is refused here
        except (CheckpointError, OSError) as error:
            raise CheckpointError(self._without_root(error)) from error
        version.ready = True
        with self._lock:
            self._drop(name)
            self._by_hand.add(name)
            self._left_out.pop(name, None)
            self._versions[name] = version

    def unload(self, name: str) -> None:
        """Forgets an adapter; requests that run go on to their end.

        The watch brings it again when its files change, or `load` does.

        Raises:
            AdapterNotFoundError: There is none of that name.
        """
        with self._lock:
            if name not in self._versions:
                raise AdapterNotFoundError(
                    f"no adapter {name!r} is loaded{near_names(name, self._versions)}"
                )
            own = None if self.root is None else _mark(self.root / name)
            self._drop(name)
            if own is not None:
                self._left_out[name] = own

    # ------------------------------------------------------------------------------------- inside

    def _version(self, name: str, folder: Path, mark: tuple[object, ...]) -> Version:
        return Version(f"{name}\n{next(self._numbers)}", folder, served_as=name, mark=mark)

    def _is_due(self, name: str, mark: tuple[object, ...]) -> bool:
        """Whether the watch is to bring a folder's adapter in, as its files are."""
        if name in self._by_hand or self._left_out.get(name) == mark:
            return False
        known = self._versions.get(name)
        return known is None or known.mark != mark

    def _put(self, version: Version) -> None:
        """Registers a version and makes it the name's, with its error where it is damaged.

        Requests do not wait for the files: they are read without the lock. If a client loads or
        unloads the name meanwhile, the pool forgets the version.
        """
        name = version.served_as
        try:
            self.pool.register_entry(version)
        except (CheckpointError, ConfigError, OSError) as error:
            version.error = self._without_root(error)
        with self._lock:
            if self._is_due(name, version.mark):
                self._drop(name)
                self._versions[name] = version
                if version.error is not None:
                    _log.warning("adapter %r cannot be used: %s", name, version.error)
            self._forget_unused(version)

    def _drop(self, name: str) -> None:
        version = self._versions.pop(name, None)
        self._by_hand.discard(name)
        if version is not None:
            self._forget_unused(version)

    def _forget_unused(self, version: Version) -> None:
        """Unloads a replaced version from the pool once no request uses it."""
        is_current = self._versions.get(version.served_as) is version
        if not is_current and not version.users and version.name in self.pool:
            self.pool.unload(version.name)

    def _check_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot be an adapter's name; expected up to 128 letters, digits, dots, "
                "underscores and dashes, not beginning with a dot or a dash"
            )
        if name in self._reserved:
            raise ConfigError(f"{name!r} is the base model's name")

    def _inside(self, path: Path) -> Path:
        """Returns a path without links, which must lie below the server's folder."""
        if self.root is None:
            raise ConfigError("this server was started without --adapters")
        try:
            real = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a zero byte
            raise ConfigError(f"no such path ({error})") from error
        if self.root not in real.parents:
            raise ConfigError("the path leads out of the server's folder of adapters")
        return real

    def _without_root(self, error: BaseException) -> str:
        """Returns a message for clients: without the server's own path, with its option's name."""
        option = _OPTIONS.get(getattr(error, "argument", ""))
        text = str(error).replace(f"{self.root}{os.sep}", "")
        if len(text) > _MOST_LETTERS:  # it may quote a whole field of a config
            text = f"{text[:_MOST_LETTERS]}..."
        return text if option is None else f"{text} (the server's {option})"


def _mark(folder: Path) -> tuple[object, ...] | None:
    """Returns what changes with an adapter's files; None where there is no adapter."""
    found: list[object] = []
    for name in _FILES:
        try:
            state = os.stat(folder / name)
        except (OSError, ValueError):
            continue
        found.append((name, state.st_mtime_ns, state.st_size, state.st_ino))
    has_config = bool(found) and isinstance(found[0], tuple) and found[0][0] == CONFIG_NAME
    return tuple(found) if has_config else None
