"""Safetensors files, read without trust: the header is checked before any data is read.

Format: the header's length (8 bytes, little-endian), the header as JSON ``{name: {dtype, shape,
data_offsets}}``, the data.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastlora.validation import CheckpointError, error_prefix

# Two hundred bytes a tensor: enough for an adapter of 100,000 tensors.
MAX_HEADER_BYTES = 32 << 20
_METADATA = "__metadata__"

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
    """What a header says about one tensor; ``start`` and ``stop`` are positions in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Returns every tensor's dtype, shape and place, after checking them against the file's size.

    Raises:
        CheckpointError: The file is truncated, or its header is too long, no JSON, or does not
            describe the data exactly.
    """
    with path.open("rb") as file, error_prefix(path):
        return _parse_header(file)


def read_tensors(path: Path, expected: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file, on the CPU, in memory of their own.

    Raises `CheckpointError` where the file ends early, or its header is not ``expected``, which
    `read_header` returned and the caller has checked.
    """
    tensors = {}
    with path.open("rb") as file, error_prefix(path):
        if _parse_header(file) != expected:
            raise CheckpointError("changed while it was read")
        for name, info in expected.items():
            # Not mapped: a mapped file that somebody truncates kills the process.
            data = bytearray(info.nbytes)
            file.seek(info.start)
            if file.readinto(data) != info.nbytes:
                raise CheckpointError(f"tensor {name!r} ends early")
            tensors[name] = torch.frombuffer(data, dtype=info.dtype).reshape(info.shape)
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file that says ``{"format": "pt"}``, and waits until it is on disk.

    Raises `CheckpointError` where it could not be written.
    """
    stored: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        stored[name] = own.clone() if storage in seen else own  # the format forbids aliases
        seen.add(storage)
    try:
        save_file(stored, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: could not be written ({error})") from error
    flush_to_disk(path)


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content is on disk, so that a rename cannot overtake it."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name beside ``path`` to write to; the file takes its place when the block ends."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder beside ``path`` to fill; it takes that name when the block ends.

    It is gone where the block fails. What has the name by then must be an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _parse_header(file: BinaryIO) -> dict[str, TensorInfo]:
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise CheckpointError(f"truncated, found {size} bytes, expected at least 8")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"the header claims {length} bytes, expected at most {MAX_HEADER_BYTES}; "
            "this is no safetensors file of an adapter"
        )
    if length > size - 8:
        raise CheckpointError(f"truncated, the header claims {length} bytes and {size - 8} follow")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header is {type(header).__name__}, expected an object")
    header.pop(_METADATA, None)
    infos = {name: _tensor_info(name, entry, 8 + length) for name, entry in header.items()}
    _check_coverage(infos, 8 + length, size)
    return infos


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate name {next(n for n in names if names.count(n) > 1)!r}")
    return entries


def _tensor_info(name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise CheckpointError(f"tensor {name!r} is described by {entry!r}")
    dtype = _DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        raise CheckpointError(
            f"tensor {name!r} has dtype {entry.get('dtype')!r}, "
            f"expected one of {', '.join(_DTYPES)}"
        )
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not _is_sizes(shape) or len(shape) > 16:
        raise CheckpointError(f"tensor {name!r} has shape {shape!r}, expected sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"tensor {name!r} has data_offsets {offsets!r}")
    count = math.prod(shape)
    if count == 0:
        raise CheckpointError(
            f"tensor {name!r} has shape {tuple(shape)}, which holds nothing; expected "
            "values (a sharded model must be gathered before it is saved)"
        )
    needed = count * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"tensor {name!r} of shape {tuple(shape)} and dtype {entry['dtype']} needs "
            f"{needed} bytes, its data_offsets {offsets} give {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value
    )


def _check_coverage(infos: dict[str, TensorInfo], start: int, size: int) -> None:
    position = start
    for name, info in sorted(infos.items(), key=lambda item: item[1].start):
        if info.stop > size:
            raise CheckpointError(
                f"truncated, tensor {name!r} ends at byte {info.stop}, the file at {size}"
            )
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a gap"
            raise CheckpointError(
                f"tensor {name!r} starts at byte {info.start} and {what}; expected byte {position}"
            )
        position = info.stop
    if position != size:
        raise CheckpointError(f"the tensors end at byte {position}, the file at {size}")
