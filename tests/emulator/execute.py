"""Executes a decoded kernel on the memory of this process."""

from __future__ import annotations

import ctypes
import gc
import re
import struct
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.emulator.build import library, names
from tests.emulator.decode import Program

FORWARD, SHUFFLED, BACKWARD = ORDERS = (0, 1, 2)
# Reports after which results mean nothing.
FATAL = ("UNSUPPORTED", "TRAP", "LIMIT")
_REPORT_BYTES = 1 << 16
# Accesses out of bounds after which a launch looks for no further storages: a search is slow.
_MOST_MISSES = 3
_FIND_RANGE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint32)
# By id. The garbage collector takes 0.1 s to name all objects of a process.
_met: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
# The C++ part has one launch at a time, and keeps the last one for a programmatic dependent.
_lock = threading.Lock()
_storages_of_last_launch: list[torch.UntypedStorage] = []


class _Launch(ctypes.Structure):
    """``Launch`` of ``machine/machine.h``."""

    _fields_ = (
        ("code", ctypes.c_void_p),
        ("code_size", ctypes.c_int64),
        ("operands", ctypes.c_void_p),
        ("register_count", ctypes.c_int64),
        ("initial_registers", ctypes.c_void_p),
        ("warp_count", ctypes.c_int64),
        ("shared_bytes", ctypes.c_int64),
        ("grid", ctypes.c_int64 * 3),
        ("ranges", ctypes.c_void_p),
        ("range_count", ctypes.c_int64),
        ("find_range", _FIND_RANGE),
        ("parameters", ctypes.c_char_p),
        ("reached", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("order", "seed", "limit", "dependent")),
        ("name", ctypes.c_char_p),
        ("reports", ctypes.c_char_p),
        ("report_bytes", ctypes.c_int64),
        ("counts", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Outcome:
    """What one launch did.

    Attributes:
        kernel: Its name.
        grid: Programs along each axis; ``warps`` and ``shared`` bytes are those of a program.
        dependent: Whether it was launched as a programmatic dependent.
        instructions: Executed, by all warps.
        counts: Executed, by opcode.
        reports: What the checks found; one of each kind for each instruction.
        report_count: How often they found something.
    """

    kernel: str
    grid: tuple[int, int, int]
    warps: int
    shared: int
    dependent: bool
    instructions: int
    counts: dict[str, int]
    reports: list[str]
    report_count: int = field(compare=False)

    @property
    def fatal(self) -> list[str]:
        """Reports after which the results mean nothing."""
        return [report for report in self.reports if report.startswith(FATAL)]


def execute(
    program: Program,
    grid: tuple[int, int, int],
    values: Sequence[Any],
    storages: Sequence[torch.UntypedStorage] = (),
    *,
    dependent: bool = False,
    order: int = FORWARD,
    seed: int = 1,
    limit: int = 0,
) -> Outcome:
    """Executes a launch.

    Args:
        program: The decoded kernel.
        grid: Programs along each axis.
        values: Of the parameters, in order; addresses are numbers.
        storages: That addresses among them mean. Those of addresses in tables are looked for among
            all tensors that live.
        dependent: Whether it is a programmatic dependent of the launch before.
        order: Of warps and programs: `FORWARD`, `SHUFFLED` (in slices of up to 200 instructions) or
            `BACKWARD`.
        seed: Of the shuffled order.
        limit: Instructions after which the launch is given up; 0 for none.
    """
    initial = np.zeros((program.register_count, 32), dtype=np.uint64)
    for register, value in program.constants.items():
        initial[register] = value
    used = {storage.data_ptr(): storage for storage in storages if storage.nbytes()}
    ranges = np.array([(p, p + s.nbytes()) for p, s in used.items()], dtype=np.uint64).reshape(-1)
    counts = np.zeros(1 + len(names("opcode")), dtype=np.uint64)
    reports = ctypes.create_string_buffer(_REPORT_BYTES)
    finder = _Finder(used, values)
    launch = _Launch(
        code=program.code.ctypes.data,
        code_size=len(program.code),
        operands=program.operands.ctypes.data,
        register_count=program.register_count,
        initial_registers=initial.ctypes.data,
        warp_count=program.threads // 32,
        shared_bytes=program.shared,
        grid=grid,
        ranges=ranges.ctypes.data,
        range_count=len(ranges) // 2,
        find_range=_FIND_RANGE(finder.find),
        parameters=_pack(program, values),
        reached=program.reached.ctypes.data,
        order=order,
        seed=seed,
        limit=limit,
        dependent=dependent,
        name=program.name.encode(),
        reports=ctypes.cast(reports, ctypes.c_char_p),
        report_bytes=_REPORT_BYTES,
        counts=counts.ctypes.data,
    )
    with _lock:
        found = library().run(ctypes.byref(launch))
        # A dependent's launch accesses this memory again.
        _storages_of_last_launch[:] = used.values()
    return Outcome(
        kernel=program.name,
        grid=grid,
        warps=program.threads // 32,
        shared=program.shared,
        dependent=dependent,
        instructions=int(counts[0]),
        counts={name: int(counts[1 + i]) for name, i in names("opcode").items() if counts[1 + i]},
        reports=[_describe(line, program) for line in reports.value.decode().splitlines()],
        report_count=found,
    )


def clear_last_launch() -> None:
    """Makes the next launch depend on no earlier one."""
    with _lock:
        library().clear_last_launch()
        _storages_of_last_launch.clear()


class _Finder:
    """Finds the storages of addresses that are no arguments, as those in tables."""

    def __init__(self, used: dict[int, torch.UntypedStorage], values: Sequence[Any]) -> None:
        self.used, self.misses = used, 0
        self.numbers = [value for value in values if isinstance(value, int)]

    def find(self, address: int, size: int) -> int:
        """Adds the storage that has an address, and returns whether there is one."""
        if self.misses == _MOST_MISSES or self.reaches_past(address, size):
            return 0
        for tensor in _living_tensors():
            storage = tensor.untyped_storage()
            try:
                low = storage.data_ptr()
            except RuntimeError:  # a tracer's, which has no memory
                continue
            high = low + storage.nbytes()
            inside = low <= address and address + size <= high
            if inside and low not in self.used and self.is_meant(low, high):
                self.used[low] = storage
                library().add_range(ctypes.c_uint64(low), ctypes.c_uint64(high))
                return 1
        self.misses += 1
        return 0

    def reaches_past(self, address: int, size: int) -> bool:
        """Whether an access is in part within a storage that is known."""
        return any(
            low < address + size and address < low + storage.nbytes()
            for low, storage in self.used.items()
        )

    def is_meant(self, low: int, high: int) -> bool:
        """Whether an argument, or memory that the launch may read, has an address of a storage."""
        if any(low <= number < high for number in self.numbers):
            return True
        for storage in self.used.values():
            words = torch.empty(0, dtype=torch.int64).set_(storage, 0, (storage.nbytes() // 8,))
            if ((words >= low) & (words < high)).any():
                return True
        return False


def _living_tensors() -> Iterator[torch.Tensor]:
    """Yields CPU tensors: first those that a search met before, then young objects, then all."""
    yield from list(_met.values())
    for generation in range(3):
        for found in gc.get_objects(generation):
            kind = type(found)
            if kind is not torch.Tensor and not issubclass(kind, torch.nn.Parameter):
                continue  # other subclasses have no memory of their own
            if not torch.nn.parameter.is_lazy(found) and found.is_cpu and not found.is_sparse:
                _met[id(found)] = found
                yield found


def _pack(program: Program, values: Sequence[Any]) -> bytes:
    """Returns the bytes of the parameters; those without a value are zero."""
    packed = bytearray(program.parameter_bytes + 16)
    for (kind, name), value in zip(program.parameters, values, strict=False):
        if kind in ("f32", "f64"):
            data = struct.pack("<f" if kind == "f32" else "<d", value)
        else:
            bits = int(re.sub(r"\D", "", kind))
            data = (int(value) & ((1 << bits) - 1)).to_bytes(bits // 8, "little")
        offset = program.parameter_offsets[name]
        packed[offset : offset + len(data)] = data
    return bytes(packed)


def _describe(line: str, program: Program) -> str:
    """Returns a report of the C++ part with the kernel, its source line and its PTX line."""
    kind, place, record, where = line.split("|")
    file, _, number = place.partition(":")
    text_line = program.text_lines[int(record)]
    text = " ".join(program.text.split("\n")[text_line].split("//")[0].split())
    source = f"{program.files.get(int(file), file)}:{number}"
    return f"{kind} in {program.name} at {source}, PTX line {text_line + 1} ({text}), {where}"
