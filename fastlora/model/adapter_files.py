"""The two files of an adapter folder: opened once each, and which config belongs to the weights.

Saving replaces first the weights and then the config, so a kill in between leaves new weights
beside an old config. Therefore the weights' metadata repeat the config that they were saved with,
and name the config that the save replaces. See `_config_of`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastlora.model.tensor_file import MAX_HEADER_BYTES, TensorFile
from fastlora.validation import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 4 << 20

# Keys of the weights' metadata: the config as text, and the SHA-256 of the config that the save
# replaces. Without the second, it replaces none, or the same one.
_CONFIG, _REPLACES = "fastlora.config", "fastlora.replaces"
_TRIES = 10


@dataclass(frozen=True)
class FileLimits:
    """How many bytes of an adapter folder are parsed.

    Attributes:
        config: Largest config, in its file or in the weights' metadata.
        header: Largest header of the file of tensors, with its metadata.
    """

    config: int = MAX_CONFIG_BYTES
    header: int = MAX_HEADER_BYTES


@dataclass(frozen=True)
class AdapterFiles:
    """The opened files of an adapter folder.

    Attributes:
        config: The fields of the config that belongs to the weights, unchecked.
        weights: The file of tensors, with its header read.
    """

    config: dict[str, Any]
    weights: TensorFile


@contextlib.contextmanager
def open_adapter_files(
    folder: Path, root: Path | None = None, limits: FileLimits | None = None
) -> Iterator[AdapterFiles]:
    """Opens an adapter folder's files for the block; nothing is written.

    Args:
        folder: The adapter folder.
        root: Folder that both files must be in after links are resolved; None for anywhere.
        limits: Largest config and header that are parsed; None for those of any adapter.

    Raises:
        CheckpointError: A file is not a regular file, lies outside ``root``, is too large, or is
            damaged; or the files keep changing.
        OSError: A file is missing or cannot be opened.
    """
    path = folder / CONFIG_NAME
    limits = limits or FileLimits()
    for _ in range(_TRIES):
        text = _read_config(path, root, limits.config)
        file = open_regular(folder / WEIGHTS_NAME, root)
        with TensorFile(file, folder / WEIGHTS_NAME, limits.header) as weights:
            own = _config_of(text, weights.metadata, path, limits.config)
            # A save that ran meanwhile may have replaced both files.
            if own is None and _read_config(path, root, limits.config) != text:
                continue
            yield AdapterFiles(_fields(text if own is None else own, path), weights)
            return
    raise CheckpointError(f"{folder}: its files kept changing while they were read")


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the fields of an adapter folder's config, as `open_adapter_files` finds it.

    The file of tensors may be missing or damaged; then the config file counts. Raises
    `CheckpointError` if that is missing, too large, or not a JSON object.
    """
    with contextlib.suppress(OSError, CheckpointError), open_adapter_files(folder) as files:
        return files.config
    return read_config_file(folder / CONFIG_NAME)


def read_config_file(path: Path) -> dict[str, Any]:
    """Returns the fields in an ``adapter_config.json``, unchecked.

    Raises:
        CheckpointError: The file is missing, too large, or not a JSON object.
    """
    try:
        return _fields(_read_config(path), path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path}: no such file; expected an adapter's {CONFIG_NAME}"
        ) from error


def config_metadata(folder: Path, text: bytes) -> dict[str, str]:
    """Returns the metadata of weights that are saved into a folder with the config ``text``."""
    metadata = {_CONFIG: text.decode("utf-8")}
    with contextlib.suppress(OSError, CheckpointError):
        replaced = _read_config(folder / CONFIG_NAME)
        if replaced != text:
            metadata[_REPLACES] = hashlib.sha256(replaced).hexdigest()
    return metadata


def edited_config(folder: Path, text: bytes) -> bytes:
    """Returns what to write for a config that is saved into a folder without weights.

    Readers would take the very bytes that the weights replaced for a save that was cut off, so a
    newline is added to these.
    """
    path = folder / WEIGHTS_NAME
    with (
        contextlib.suppress(OSError, CheckpointError),
        TensorFile(open_regular(path), path) as weights,
    ):
        if hashlib.sha256(text).hexdigest() == weights.metadata.get(_REPLACES):
            return text + b"\n"
    return text


def open_regular(path: Path, root: Path | None = None) -> BinaryIO:
    """Opens a regular file once, for reading, and checks what was opened.

    Links are followed. With ``root``, the resolved path must be in that folder; a link that
    appears after the path was resolved is not followed. (Windows has no way to ensure the latter.)

    Raises:
        CheckpointError: The file is not a regular file, or is outside ``root``.
        OSError: The file is missing or cannot be opened.
    """
    # Opening a FIFO waits for a writer, except without blocking.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags) if root is None else _open_in(root, path, flags)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise CheckpointError(f"{path}: is not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: is not a regular file")
    return os.fdopen(descriptor, "rb")


def _open_in(root: Path, path: Path, flags: int) -> int:
    root, real = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    if root not in real.parents:
        raise CheckpointError(f"{path}: leads out of the folder of adapters")
    if os.open not in os.supports_dir_fd:  # Windows
        return os.open(real, flags)
    *folders, name = real.relative_to(root).parts
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for folder in folders:
            inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inner
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=at)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise CheckpointError(f"{path}: became a link while it was opened") from error
        raise
    finally:
        os.close(at)


def _read_config(path: Path, root: Path | None = None, most: int = MAX_CONFIG_BYTES) -> bytes:
    with open_regular(path, root) as file:
        text = file.read(most + 1)
        if len(text) > most:
            size = os.fstat(file.fileno()).st_size
            raise CheckpointError(f"{path}: {size} bytes, expected at most {most}")
        return text


def _config_of(text: bytes, metadata: Mapping[str, str], path: Path, most: int) -> bytes | None:
    """Returns the config that belongs to weights, or None for the config file's ``text``.

    The config file counts if it is the one that the weights were saved with. It does not count if
    it is the one that their save was about to replace: that save was cut off, or still runs.
    Otherwise somebody has edited the config since, or the weights are not fastlora's: None.

    Raises `CheckpointError` if the config that belongs to the weights has more than ``most`` bytes.
    """
    saved = metadata.get(_CONFIG, "").encode("utf-8", "surrogatepass")
    if not saved:
        return None
    if saved == text:
        return text
    if hashlib.sha256(text).hexdigest() != metadata.get(_REPLACES):
        return None
    if len(saved) > most:
        raise CheckpointError(
            f"{path.with_name(WEIGHTS_NAME)}: stores a config of {len(saved)} bytes, expected at "
            f"most {most}"
        )
    warnings.warn(
        f"{path}: is older than {WEIGHTS_NAME}, because a save was interrupted or is running; the "
        "config that is stored in the weights is used. Saving the adapter again replaces the file",
        stacklevel=2,
    )
    return saved


def _fields(text: bytes, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
