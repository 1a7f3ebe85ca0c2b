"""Read and write safetensors files.

A file consists of the length of the header (8 bytes, little-endian), the header as JSON
``{name: {dtype, shape, data_offsets}}``, and the data. Files are not trusted: the header is checked
before any data is read.
"""

from __future__ import annotations

import collections
import json
import math
import os
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastlora.validation import CheckpointError, error_prefix

# At about 200 bytes per tensor, this is enough for adapters with more than 100,000 tensors.
MAX_HEADER_BYTES = 32 << 20
# The time to parse a name grows with the square of its length.
MAX_NAME_LENGTH = 1024
_METADATA = "__metadata__"
_METADATA_START = f'{{"{_METADATA}":'

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """The description of a tensor in the header of a safetensors file.

    Attributes:
        dtype: The tensor's dtype.
        shape: The tensor's shape.
        start, stop: The first byte of the tensor's data in the file, and the byte after the last.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """The size of the tensor in the file, in bytes."""
        return self.stop - self.start


class SafetensorsFile:
    """An open safetensors file, from which tensors are read.

    The header and the tensors are read from the same file descriptor, so that they are consistent
    even if the file is replaced. Use the object as a context manager, which closes the file.

    Args:
        file: The open file.
        path: The path of the file, used only in messages.
        max_header_bytes: The maximum size of the header in bytes.

    Attributes:
        path: The path of the file.
        metadata: The metadata in the header. It is empty if the metadata is not at the beginning of
            the header, where safetensors writes it.

    Raises:
        CheckpointError: If the file is truncated, or if its header is too long or is not valid
            UTF-8.
    """

    def __init__(
        self, file: BinaryIO, path: Path, max_header_bytes: int = MAX_HEADER_BYTES
    ) -> None:
        self.path = path
        self._file = file
        self._state = self._stat()
        try:
            with error_prefix(path):
                self._header, self._start = _read_header_and_data_start(file, max_header_bytes)
        except BaseException:
            file.close()
            raise
        self.metadata = _parse_leading_metadata(self._header)[0]

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def file_size(self) -> int:
        """The size of the file in bytes.

        The value is the size on disk at the time when the file was opened.
        """
        return self._state[0]

    @cached_property
    def tensor_infos(self) -> dict[str, TensorInfo]:
        """A dict that maps the name of each tensor in the file to information about the tensor.

        Each `TensorInfo` contains the dtype, shape, and position of a tensor, as stated in the
        header of the file.

        Raises:
            CheckpointError: If the header is not a JSON object, or if the tensors that it describes
                do not cover the data in the file exactly.
        """
        with error_prefix(self.path):
            try:
                entries = json.loads(self._header, object_pairs_hook=_no_duplicates)
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"the header is not valid JSON ({error})") from error
            if not isinstance(entries, dict):
                raise CheckpointError(
                    f"the header is a {type(entries).__name__}; expected a JSON object"
                )
            entries.pop(_METADATA, None)
            found = {n: _tensor_info(n, entry, self._start) for n, entry in entries.items()}
            _check_coverage(found, self._start, self.file_size)
        return found

    def read(self, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """Read all or some tensors from the file into a dict.

        The tensors are in CPU memory.

        Args:
            names: The names of the tensors to read. With None, all tensors are read.

        Returns:
            A dict that maps names to tensors. The tensors do not share storage.

        Raises:
            CheckpointError: If the file was changed since it was opened, or ends early.
        """
        tensors = {}
        with error_prefix(self.path):
            for name in self.tensor_infos if names is None else names:
                info = self.tensor_infos[name]
                nbytes = info.nbytes
                # The file is not memory-mapped, because the process would be killed if another
                # process truncated the file.
                data = bytearray(nbytes)
                self._file.seek(info.start)
                if self._file.readinto(data) != nbytes:  # type: ignore[attr-defined]
                    raise CheckpointError(f"tensor {name!r} is truncated")
                tensors[name] = torch.frombuffer(data, dtype=info.dtype).reshape(info.shape)
            if self._stat() != self._state:
                raise CheckpointError("the file changed while it was being read")
        return tensors

    def _stat(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file into a dict that maps names to tensors.

    Raises:
        CheckpointError: See `SafetensorsFile`.
    """
    with SafetensorsFile(path.open("rb"), path) as file:
        return file.read()


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file.

    Equal arguments produce files with equal bytes.

    Args:
        path: The file to write.
        tensors: A mapping from names to tensors.
        metadata: Metadata to write into the header in addition to ``{"format": "pt"}``.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    stored: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        stored[name] = own.clone() if storage in seen else own  # the format forbids aliases
        seen.add(storage)
    texts = {"format": "pt", **(metadata or {})}
    try:
        save_file(stored, path, metadata=texts)
        _reorder_metadata(path, texts)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} could not be written ({error})") from error


def _reorder_metadata(path: Path, ordered_metadata: Mapping[str, str]) -> None:
    """Rewrite the metadata in a safetensors file's header in the order of ``ordered_metadata``.

    safetensors writes the metadata in a random order.
    """
    ordered = json.dumps(ordered_metadata, ensure_ascii=False, separators=(",", ":"))
    with path.open("r+b") as file:
        written, end = _parse_leading_metadata(_read_header_and_data_start(file)[0])
        if written == ordered_metadata and len(_METADATA_START) + len(ordered) == end:
            file.seek(8)
            file.write((_METADATA_START + ordered).encode())


def _parse_leading_metadata(header: str) -> tuple[dict[str, str], int]:
    """Parse the metadata at the beginning of a header.

    Returns:
        A tuple of the metadata and the index in the header at which the metadata ends. If the
        header does not begin with valid metadata, these are an empty dict and 0.
    """
    if not header.startswith(_METADATA_START):
        return {}, 0
    try:
        found, end = json.JSONDecoder().raw_decode(header, len(_METADATA_START))
    except (ValueError, RecursionError):
        return {}, 0
    pairs = found.items() if isinstance(found, dict) else ()
    return {key: text for key, text in pairs if isinstance(text, str)}, end


def _read_header_and_data_start(
    file: BinaryIO, max_bytes: int = MAX_HEADER_BYTES
) -> tuple[str, int]:
    """Read the header of a safetensors file, and return it with the position of the tensor data.

    Args:
        file: The open file, positioned at its start.
        max_bytes: The maximum size of the header in bytes.

    Returns:
        A tuple of the header as text and the position of the tensor data in the file, in bytes. The
        position is the length of the header plus the 8 bytes that store this length.

    Raises:
        CheckpointError: If the file is truncated, or if the header is too long or is not valid
            UTF-8.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise CheckpointError(f"truncated: found {size} bytes; expected at least 8")
    length = int.from_bytes(file.read(8), "little")
    if length > max_bytes:
        raise CheckpointError(
            f"the file declares a header of {length} bytes; expected at most {max_bytes}. The file "
            "is not a valid safetensors file of an adapter"
        )
    if length > size - 8:
        raise CheckpointError(
            f"truncated: the file declares a header of {length} bytes, but only {size - 8} follow"
        )
    try:
        return file.read(length).decode("utf-8"), 8 + length
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the header is not valid JSON ({error})") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(
            f"the key {counts.most_common(1)[0][0]!r} appears more than once in a JSON object"
        )
    return entries


def _tensor_info(name: str, entry: Any, data_start: int) -> TensorInfo:
    if len(name) > MAX_NAME_LENGTH:
        raise CheckpointError(
            f"a tensor's name has {len(name)} characters; expected at most {MAX_NAME_LENGTH}"
        )
    if not isinstance(entry, dict):
        raise CheckpointError(
            f"tensor {name!r} has the header entry {entry!r}; expected a JSON object"
        )
    dtype = _DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        raise CheckpointError(
            f"tensor {name!r} has dtype {entry.get('dtype')!r}; "
            f"expected one of {', '.join(_DTYPES)}"
        )
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not _is_sizes(shape) or len(shape) > 16:
        raise CheckpointError(
            f"tensor {name!r} has shape {shape!r}; expected a list of at most 16 sizes"
        )
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"tensor {name!r} has data_offsets {offsets!r}; expected [start, end]"
        )
    count = math.prod(shape)
    if count == 0:
        raise CheckpointError(
            f"tensor {name!r} of shape {tuple(shape)} has no elements; expected at least one "
            "(a sharded model must be gathered before it is saved)"
        )
    needed = count * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"tensor {name!r} of shape {tuple(shape)} and dtype {entry['dtype']} needs "
            f"{needed} bytes, but its data_offsets {offsets} span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_sizes(value: Any) -> bool:
    # Compare exact types, because `True` is an instance of int.
    return isinstance(value, list) and set(map(type, value)) <= {int} and min(value, default=0) >= 0


def _check_coverage(tensor_infos: dict[str, TensorInfo], start: int, size: int) -> None:
    position = start
    starts = {name: info.start for name, info in tensor_infos.items()}
    for name in sorted(starts, key=starts.__getitem__):
        info = tensor_infos[name]
        if info.stop > size:
            raise CheckpointError(
                f"truncated: tensor {name!r} ends at byte {info.stop}, but the file ends at {size}"
            )
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a gap"
            raise CheckpointError(
                f"tensor {name!r}, which starts at byte {info.start}, {what}; expected it to start "
                f"at byte {position}"
            )
        position = info.stop
    if position != size:
        raise CheckpointError(f"the tensors end at byte {position}, but the file ends at {size}")
