"""Open the config file and the weights file of an adapter folder.

A save replaces the weights file first and the config file second. If the process is killed between
the two steps, the folder contains new weights and an old config. For this reason, the metadata of
the weights file contains a copy of the config that was saved with the weights, and a hash of the
config file that the save replaces. `_select_config_matching_weights` compares both with the
config file, and selects the config that matches the weights.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastlora.model.tensor_file import MAX_HEADER_BYTES, SafetensorsFile
from fastlora.user_warnings import warn
from fastlora.validation import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 4 << 20

# Keys in the metadata of the weights file: the config as text, and the SHA-256 of the config file
# that the save replaces. The second key is missing if the folder had no config file, or if its
# config file was identical to the new one.
_CONFIG, _REPLACES = "fastlora.config", "fastlora.replaces"
_TRIES = 10


@dataclass(frozen=True)
class ConfigAndHeaderSizeLimits:
    """Size limits for an adapter's config and the header of its weights file.

    The sizes are in bytes.

    Attributes:
        config: The maximum size of the config, both in the config file and in the metadata of the
            weights file.
        header: The maximum size of the header of the weights file, including the metadata.
    """

    config: int = MAX_CONFIG_BYTES
    header: int = MAX_HEADER_BYTES


@dataclass(frozen=True)
class ConfigAndOpenWeightsFile:
    """The config of an adapter folder, and its weights file, opened for reading.

    Attributes:
        config: The fields of the config that matches the weights. The values are not checked.
        weights: The weights file, opened for reading. Its header has been read.
    """

    config: dict[str, Any]
    weights: SafetensorsFile


@contextlib.contextmanager
def open_adapter_files(
    folder: Path, root: Path | None = None, limits: ConfigAndHeaderSizeLimits | None = None
) -> Iterator[ConfigAndOpenWeightsFile]:
    """Open the config and the weights file of an adapter folder.

    The config is read and parsed. The weights file is open for the duration of the ``with`` block,
    for reading only.

    Args:
        folder: The adapter folder.
        root: A folder that must contain both files after symbolic links are resolved. With None,
            the files may be anywhere.
        limits: Size limits for the config and the header. With None, the default limits apply.

    Raises:
        CheckpointError: If a file is not a regular file, is outside ``root``, is too large, or is
            damaged, or if the files keep changing while they are read.
        OSError: If a file is missing or cannot be opened.
    """
    path = folder / CONFIG_NAME
    limits = limits or ConfigAndHeaderSizeLimits()
    for _ in range(_TRIES):
        text = _read_config(path, root, limits.config)
        file = open_regular_file(folder / WEIGHTS_NAME, root)
        with SafetensorsFile(file, folder / WEIGHTS_NAME, limits.header) as weights:
            own = _select_config_matching_weights(text, weights.metadata, path, limits.config)
            # A concurrent save may have replaced both files since the config was read.
            if own is None and _read_config(path, root, limits.config) != text:
                continue
            yield ConfigAndOpenWeightsFile(_fields(text if own is None else own, path), weights)
            return
    raise CheckpointError(
        f"{folder}: the files kept changing while they were being read; try again"
    )


def read_config_matching_weights(folder: Path) -> dict[str, Any]:
    """Read the config that matches the weights in a folder, and return it as a dict.

    As in `open_adapter_files`, the config is read from the config file or from the metadata of the
    weights file. If the weights file is missing or damaged, the config file is used. The values of
    the dict are not checked.

    Raises:
        CheckpointError: If the config file is needed and is missing, too large, or not a JSON
            object.
    """
    with contextlib.suppress(OSError, CheckpointError), open_adapter_files(folder) as files:
        return files.config
    return read_config_file(folder / CONFIG_NAME)


def read_config_file(path: Path) -> dict[str, Any]:
    """Read the config file of an adapter into a dict.

    The file is an ``adapter_config.json`` and must contain a JSON object. The dict contains the
    object's fields, whose values are not checked.

    Raises:
        CheckpointError: If the file is missing, too large, or not a JSON object.
    """
    try:
        return _fields(_read_config(path), path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path}: no such file; expected the {CONFIG_NAME} of an adapter"
        ) from error


def make_weights_file_metadata(folder: Path, new_config: bytes) -> dict[str, str]:
    """Create the metadata that ties the weights in a weights file to their config.

    The metadata contains the entire config that is saved with the weights. If the folder already
    contains a different config file, the metadata also contains a hash of that file.

    Args:
        folder: The folder that the weights are saved into.
        new_config: The new content of the config file.
    """
    metadata = {_CONFIG: new_config.decode("utf-8")}
    with contextlib.suppress(OSError, CheckpointError):
        replaced = _read_config(folder / CONFIG_NAME)
        if replaced != new_config:
            metadata[_REPLACES] = hashlib.sha256(replaced).hexdigest()
    return metadata


def config_file_bytes_for_config_only_save(folder: Path, new_config: bytes) -> bytes:
    """Return the bytes to write to the config file of a folder when only the config is saved.

    The bytes are ``new_config``, with a newline appended if readers of the folder would otherwise
    ignore the config file and use the config in the existing weights file. The weights file may
    contain a hash of the config file that was replaced when the weights were saved. If
    ``new_config`` had this hash, readers would conclude that saving the weights was interrupted.

    Args:
        folder: The folder that the config is saved into.
        new_config: The new content of the config file.
    """
    path = folder / WEIGHTS_NAME
    with (
        contextlib.suppress(OSError, CheckpointError),
        SafetensorsFile(open_regular_file(path), path) as weights,
    ):
        if hashlib.sha256(new_config).hexdigest() == weights.metadata.get(_REPLACES):
            return new_config + b"\n"
    return new_config


def open_regular_file(path: Path, root: Path | None = None) -> BinaryIO:
    """Open a regular file for reading.

    The function checks that the file is a regular file. The check uses the descriptor of the opened
    file, so replacing the file during the check has no effect. Symbolic links are followed. With
    ``root``, the resolved path must be inside that folder, and links that are created after the
    path was resolved are not followed. (On Windows, links that are created after the path was
    resolved cannot be detected and are followed.)

    Raises:
        CheckpointError: If the file is not a regular file, or is outside ``root``.
        OSError: If the file is missing or cannot be opened.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags) if root is None else _open_in(root, path, flags)
    except OSError as error:
        if error.errno == errno.ENXIO:  # the path is a socket
            raise CheckpointError(f"{path}: not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb")


def _open_in(root: Path, path: Path, flags: int) -> int:
    root, real = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    if root not in real.parents:
        raise CheckpointError(f"{path}: this path points to a file outside the folder of adapters")
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
            raise CheckpointError(
                f"{path}: this file was replaced with a symbolic link while it was being opened"
            ) from error
        raise
    finally:
        os.close(at)


def _read_config(path: Path, root: Path | None = None, max_bytes: int = MAX_CONFIG_BYTES) -> bytes:
    with open_regular_file(path, root) as file:
        text = file.read(max_bytes + 1)
        if len(text) > max_bytes:
            size = os.fstat(file.fileno()).st_size
            raise CheckpointError(
                f"{path}: the file is {size} bytes long, expected at most {max_bytes}"
            )
        return text


def _select_config_matching_weights(
    config_file_text: bytes, metadata: Mapping[str, str], path: Path, max_bytes: int
) -> bytes | None:
    """Select the config that matches the weights.

    The candidates are the config file and the config stored in the metadata of the weights file.
    The config in the metadata is selected if the save was interrupted or is still running. In this
    case, the config file is the one that the save was about to replace. If both configs are the
    same, the content of the config file is returned. Returns None if the config was edited after
    the save, or if the weights were not written by fastlora.

    Args:
        config_file_text: The content of the config file.
        metadata: The metadata of the weights file.
        path: The config file, for messages.
        max_bytes: The maximum size of the stored config, in bytes.

    Raises:
        CheckpointError: If the stored config is needed and is longer than ``max_bytes`` bytes.
    """
    saved = metadata.get(_CONFIG, "").encode("utf-8", "surrogatepass")
    if not saved:
        return None
    if saved == config_file_text:
        return config_file_text
    if hashlib.sha256(config_file_text).hexdigest() != metadata.get(_REPLACES):
        return None
    if len(saved) > max_bytes:
        raise CheckpointError(
            f"{path.with_name(WEIGHTS_NAME)}: the stored config is {len(saved)} bytes long, "
            f"expected at most {max_bytes}"
        )
    warn(
        f"{path}: is older than {WEIGHTS_NAME}, because a save was interrupted or is still "
        "running. The config stored in the weights file is used instead. Save the adapter again to "
        "replace the outdated file",
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
