"""Find, load, and unload the adapters of a server, which are subfolders of one folder."""

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
from fastlora.pool.records import RegisteredAdapter
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    CheckpointError,
    ConfigError,
    near_names,
)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_FILES = (CONFIG_NAME, "adapter_model.safetensors", "adapter_model.bin")
# Argument of the pool -> command-line option that sets it.
_OPTIONS = {"max_rank": "--max-rank", "max_adapter_bytes": "--max-adapter-mib"}
_MAX_MESSAGE_CHARS = 1000  # maximum number of characters in a message
_log = logging.getLogger("fastlora.serve")


@dataclass(eq=False, kw_only=True)
class AdapterVersion(RegisteredAdapter):
    """One version of a served adapter.

    Each change to the adapter's files creates a new version. A request keeps its version from
    beginning to end. A version is also the adapter's entry in the pool. Each version has a unique
    ``name`` in the pool, so old and new versions can run side by side.

    Attributes:
        served_as: The name that clients use.
        fingerprint: Names, modification times, sizes, and inodes of the adapter's files.
        ready: Whether the adapter has been read. A new version is not ready until its files have
            been read.
        error: The error that prevents requests from using the adapter, without its name; None if
            the adapter can be used.
        users: Number of requests that use the version.
        waiting: Functions to call once the adapter has been read or found damaged. The list is not
            empty while the adapter is being read.
    """

    served_as: str
    fingerprint: tuple[object, ...]
    ready: bool = False
    error: CheckpointError | None = None
    users: int = 0
    waiting: list[Callable[[], None]] = field(default_factory=list)

    def check_usable(self) -> None:
        """Raise an error if requests cannot use the adapter.

        The error has the class of ``error``, which is `CheckpointError` or a subclass.
        """
        if self.error is not None:
            raise type(self.error)(f"adapter {self.served_as!r} cannot be used: {self.error}")


class ServedAdapters:
    """The adapters that a server offers.

    Each adapter has a current version. A request keeps its version from beginning to end. If the
    version is replaced or unloaded meanwhile, it is removed from the pool when its last request has
    ended. Any thread may call any method.

    Args:
        pool: The pool that loads the adapters.
        root: The folder of adapters, or None for a server without adapters.
        reserved: Names of the base model, which no adapter may have.
    """

    def __init__(self, pool: AdapterPool, root: Path | None, reserved: Collection[str]) -> None:
        self.pool = pool
        self.root = None if root is None else root.resolve()
        self._reserved = frozenset(reserved)
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._versions: dict[str, AdapterVersion] = {}
        # `sync_with_folder` does not change adapters that `load` has added. It does not add an
        # unloaded adapter again until its files change.
        self._loaded_by_client: set[str] = set()
        self._unloaded: dict[str, tuple[object, ...]] = {}
        self._rejected: set[tuple[object, ...]] = set()  # rejected in the last scan; logged once

    @property
    def usable_names(self) -> list[str]:
        """Names of the adapters that requests can use.

        These are the adapters without a known error. The names are sorted.
        """
        with self._lock:
            return sorted(name for name, own in self._versions.items() if own.error is None)

    def acquire_version(self, name: str) -> AdapterVersion:
        """Acquire the current version of an adapter, and return it.

        The version stays loaded until it is released.

        Raises:
            AdapterNotFoundError: There is no adapter of this name.
            CheckpointError: The folder of the adapter is damaged or does not fit the model, or the
                server does not support the adapter.
        """
        with self._lock:
            version = self._versions.get(name)
            if version is None:
                raise AdapterNotFoundError(f"the model {name!r} does not exist")
            version.check_usable()
            version.users += 1
            return version

    def release_version(self, version: AdapterVersion) -> None:
        """Release a version that `acquire_version` returned.

        The version is unloaded from the pool if no other request uses it and it is no longer the
        current version of its adapter.
        """
        with self._lock:
            version.users -= 1
            self._unload_if_outdated_and_unused(version)

    def read_in_background(self, version: AdapterVersion, on_done: Callable[[], None]) -> None:
        """Read a version's files in the background, and then call ``on_done``.

        The function is called even if reading fails.
        """
        future = None
        with self._lock:
            waits = not version.ready and version.error is None
            if waits:
                if not version.waiting:
                    future = self.pool.prefetch([version.name])
                version.waiting.append(on_done)
        # Release the lock first: both branches may call `on_done` immediately, and it takes other
        # locks.
        if future is not None:
            future.add_done_callback(lambda done: self._on_read(version, done))
        elif not waits:
            on_done()

    def _on_read(self, version: AdapterVersion, done: Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        with self._lock:
            if error is None:
                version.ready = True
            else:
                version.error = self._client_error(error)
                _log.warning("adapter %r cannot be used: %s", version.served_as, error)
                if not isinstance(error, CheckpointError):  # the next scan tries again
                    version.fingerprint = ()
            waiting, version.waiting = version.waiting, []
        for on_done in waiting:
            on_done()

    def sync_with_folder(self) -> None:
        """Update the adapters to match the contents of the folder.

        The folder is scanned: new and changed adapters are added, and deleted adapters are removed.
        If the folder of an adapter is damaged, the adapter keeps its name, but requests for it
        fail.
        """
        if self.root is None:
            return
        found: dict[str, tuple[Path, tuple[object, ...]]] = {}
        rejected: set[tuple[object, ...]] = set()
        for entry in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            fingerprint = None if entry.name.startswith(".") else _adapter_folder_fingerprint(entry)
            if fingerprint is None:
                continue
            try:
                self._check_name(entry.name)
                self._resolve_below_root(entry)
            except ConfigError as error:
                rejected.add((entry.name, *fingerprint))
                if (entry.name, *fingerprint) not in self._rejected:
                    _log.warning("%r is ignored: %s", str(entry), error)
                continue
            found[entry.name] = entry, fingerprint
        self._rejected = rejected
        with self._lock:
            for name in [
                n for n in self._versions if n not in found and n not in self._loaded_by_client
            ]:
                self._remove_current(name)
            for name in [n for n in self._unloaded if n not in found]:
                del self._unloaded[name]
            due = [
                name
                for name, (_, fingerprint) in found.items()
                if self._needs_new_version(name, fingerprint)
            ]
        for name in due:
            self._register_as_current(self._version(name, *found[name]))

    def load(self, name: str, path: str, *, replace: bool = False) -> None:
        """Load an adapter from a path, and serve it as ``name``.

        Args:
            name: Name of letters, digits, ``.``, ``_``, and ``-``.
            path: The adapter's folder, inside the server's folder: absolute, or relative to the
                server's folder.
            replace: Whether to replace an adapter of the same name. Running requests continue to
                use the old adapter.

        Raises:
            ConfigError: The name is invalid, the path leads out of the server's folder, or there is
                no adapter at the path.
            AdapterStateError: There is already an adapter of this name.
            CheckpointError: The adapter is damaged or too large, or was created for a different
                base model.
        """
        self._check_name(name)
        folder = self._resolve_below_root(Path(path) if self.root is None else self.root / path)
        fingerprint = _adapter_folder_fingerprint(folder)
        if fingerprint is None:
            raise ConfigError(
                f"{path!r}: not an adapter folder; expected it to contain {CONFIG_NAME}"
            )
        with self._lock:
            known = self._versions.get(name)
            if known is not None and known.error is None and not replace:
                raise AdapterStateError(
                    f"adapter {name!r} is already loaded; unload it first, or set load_inplace"
                )
        version = self._version(name, folder, fingerprint)
        try:
            self.pool.load_registered(version)  # reads all files, so a damaged adapter fails here
        except (CheckpointError, OSError) as error:
            raise self._client_error(error) from error
        version.ready = True
        with self._lock:
            self._remove_current(name)
            self._loaded_by_client.add(name)
            self._unloaded.pop(name, None)
            self._versions[name] = version

    def unload(self, name: str) -> None:
        """Unload an adapter.

        Running requests continue to use it until they end. `sync_with_folder` adds the adapter
        again when its files change; `load` adds it at any time.

        Raises:
            AdapterNotFoundError: There is no adapter of this name.
        """
        with self._lock:
            if name not in self._versions:
                raise AdapterNotFoundError(
                    f"adapter {name!r} is not loaded{near_names(name, self._versions)}"
                )
            own = None if self.root is None else _adapter_folder_fingerprint(self.root / name)
            self._remove_current(name)
            if own is not None:
                self._unloaded[name] = own

    def _version(self, name: str, folder: Path, fingerprint: tuple[object, ...]) -> AdapterVersion:
        return AdapterVersion(
            f"{name}\n{next(self._numbers)}", folder, served_as=name, fingerprint=fingerprint
        )

    def _needs_new_version(self, name: str, fingerprint: tuple[object, ...]) -> bool:
        """Return whether an adapter's files are new or changed, and thus need a new version.

        An adapter has changed if ``fingerprint``, which identifies the state of the adapter's
        files, differs from the fingerprint of the adapter's current version. The result is False
        for an adapter that a client has loaded, and for an unloaded adapter whose files have not
        changed since it was unloaded.
        """
        if name in self._loaded_by_client or self._unloaded.get(name) == fingerprint:
            return False
        known = self._versions.get(name)
        return known is None or known.fingerprint != fingerprint

    def _register_as_current(self, version: AdapterVersion) -> None:
        """Register a version as the current version of its adapter.

        The version is also registered in the pool. If the adapter is damaged, the error is stored
        in the version. The files are read without the lock, so requests do not wait. If a client
        loads or unloads the name meanwhile, the version is unloaded again.
        """
        name = version.served_as
        try:
            self.pool.register_adapter(version)
        except (CheckpointError, ConfigError, OSError) as error:
            version.error = self._client_error(error)
        with self._lock:
            if self._needs_new_version(name, version.fingerprint):
                self._remove_current(name)
                self._versions[name] = version
                if version.error is not None:
                    _log.warning("adapter %r cannot be used: %s", name, version.error)
            self._unload_if_outdated_and_unused(version)

    def _remove_current(self, name: str) -> None:
        version = self._versions.pop(name, None)
        self._loaded_by_client.discard(name)
        if version is not None:
            self._unload_if_outdated_and_unused(version)

    def _unload_if_outdated_and_unused(self, version: AdapterVersion) -> None:
        """Unload a version of an adapter if it is outdated and no request uses it.

        The version is unloaded from the pool. The current version of an adapter stays loaded for
        later requests. Every other version is outdated.
        """
        is_current = self._versions.get(version.served_as) is version
        if not is_current and not version.users and version.name in self.pool:
            self.pool.unload(version.name)

    def _check_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is not a valid adapter name; expected up to 128 letters, digits, dots, "
                "underscores, and dashes, starting with a letter, a digit, or an underscore"
            )
        if name in self._reserved:
            raise ConfigError(f"{name!r} is reserved for the base model")

    def _resolve_below_root(self, path: Path) -> Path:
        """Resolve a path that must be inside the server's folder.

        Raises `ConfigError` if the resolved path is not inside the folder.
        """
        if self.root is None:
            raise ConfigError("this server was started without --adapters")
        try:
            real = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null byte
            raise ConfigError(f"no such path: {error}") from error
        if self.root not in real.parents:
            raise ConfigError("the path is outside the server's adapter folder")
        return real

    def _client_error(self, error: BaseException) -> CheckpointError:
        """Return an error for clients.

        Its message does not reveal the server's folder. If the adapter exceeds a limit of the
        server, the message names the option that sets the limit.
        """
        option = _OPTIONS.get(getattr(error, "argument", ""))
        text = str(error).replace(f"{self.root}{os.sep}", "")
        if len(text) > _MAX_MESSAGE_CHARS:  # it may quote a whole field of a config
            text = f"{text[:_MAX_MESSAGE_CHARS]}..."
        if option is not None:
            text = f"{text} (set by the server's {option})"
        return (type(error) if isinstance(error, CheckpointError) else CheckpointError)(text)


def _adapter_folder_fingerprint(folder: Path) -> tuple[object, ...] | None:
    """Return a fingerprint of an adapter folder, which changes when the adapter's files change.

    The fingerprint contains the modification time, the size, and the inode of each of these files.
    Files that are missing or inaccessible are left out. If the config file is missing or
    inaccessible, the folder does not count as an adapter folder, and the result is None.
    """
    found: list[object] = []
    for name in _FILES:
        try:
            state = os.stat(folder / name)
        except (OSError, ValueError):
            continue
        found.append((name, state.st_mtime_ns, state.st_size, state.st_ino))
    has_config = bool(found) and isinstance(found[0], tuple) and found[0][0] == CONFIG_NAME
    return tuple(found) if has_config else None
