"""The kernels' host path without a GPU: everything but the launch itself, which is counted."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from fastlora.env import triton_interpreted
from fastlora.ops import conditions

if TYPE_CHECKING:
    from fastlora.kernels.chips import Chip

_WARP_SIZE = {"cuda": 32, "hip": 64}
# Triton keeps what it compiled by the number of the device: each block has a device of its own.
_numbers = itertools.count(1_000)


class Launch(NamedTuple):
    """One launch.

    Attributes:
        kernel: Name of the Triton function.
        grid: Programs along each axis.
        num_warps: Of a program.
        num_stages: Of its pipelined loop.
        shared: Bytes of shared memory of a program.
        binary: The compiled code.
        names: Of the kernel's arguments.
        values: What it was called with.
    """

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    shared: int
    binary: bytes
    names: tuple[str, ...]
    values: tuple[Any, ...]

    @property
    def arguments(self) -> dict[str, Any]:
        """What the kernel was called with beside tensors and strides, by name."""
        given = zip(self.names, self.values, strict=True)
        return {
            name: value
            for name, value in given
            if not name.endswith("_ptr") and not name.startswith("stride")
        }


@contextlib.contextmanager
def stubbed_launches(chip: str = "sm_90", processors: int = 132) -> Iterator[list[Launch]]:
    """Within the block, the Triton path runs on CPU tensors up to each launch, which is counted.

    Configs are chosen and kernels compiled for the named chip, arguments are bound and the launcher
    is called, as on a GPU. No kernel computes: what it would have written is whatever the memory
    held. Not thread-safe, and not for Triton's interpreter, which has no launches.

    Args:
        chip: The chip's arch, such as ``"sm_90"`` or ``"gfx942"``; one that there are configs for.
        processors: Its streaming multiprocessors (compute units).

    Yields:
        The launches so far, in order.

    Raises:
        ValueError: There are no configs for the chip.
        RuntimeError: ``TRITON_INTERPRET=1`` is set.
    """
    if triton_interpreted():
        raise RuntimeError("stubbed_launches() needs Triton's compiler; unset TRITON_INTERPRET")
    from triton.compiler import compiler
    from triton.runtime.driver import driver

    from fastlora.kernels import chips

    described = chips.Chip(chip, processors)
    launches: list[Launch] = []
    counting = _CountingDriver(described, launches)  # raises for an unknown chip
    before, status = driver._active, (True, f"stubbed ({chip})")
    driver.set_active(counting)
    compiler.max_shared_mem.cache_clear()
    try:
        with (
            mock.patch.object(chips, "chip_of", lambda _: described),
            mock.patch.object(conditions, "KERNEL_DEVICES", ("cpu",)),
            mock.patch.object(conditions, "triton_status", lambda *_: status),
        ):
            yield launches
    finally:
        driver.set_active(before)
        compiler.max_shared_mem.cache_clear()


class StandInDriver:
    """A driver for Triton's runtime that stands in for a GPU that is not present.

    Subclasses define ``load_binary`` and ``launcher_cls``.
    """

    def __init__(self, chip: Chip) -> None:
        from triton.backends.compiler import GPUTarget

        kind = "hip" if chip.arch.startswith("gfx") else "cuda"
        self._properties = {
            "max_shared_mem": chip.shared_limit,
            "multiprocessor_count": chip.num_sms,
            "warpSize": _WARP_SIZE[kind],
        }
        arch: Any = chip.arch if kind == "hip" else int(chip.arch.removeprefix("sm_"))
        self._target = GPUTarget(kind, arch, _WARP_SIZE[kind])
        self._number = next(_numbers)
        self.utils = self

    def get_current_target(self) -> Any:
        """Returns what kernels are compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """Returns the device's number."""
        return self._number

    def get_current_stream(self, device: int) -> int:
        """Returns the default stream."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Returns the chip's limits."""
        return self._properties

    def unload_module(self, module: Any) -> None:
        """Python frees what was loaded."""


class _CountingDriver(StandInDriver):
    """Notes each launch and runs none."""

    def __init__(self, chip: Chip, launches: list[Launch]) -> None:
        super().__init__(chip)
        self._launches = launches

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Returns module, function, registers, spills and the most threads of a program."""
        return object(), binary, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Returns what launches a kernel: it notes that it was called."""

        own = metadata.num_warps, metadata.num_stages, metadata.shared
        kernel, launches, names = metadata.name, self._launches, tuple(source.fn.arg_names)
        make = tuple.__new__  # as `Launch` does, in no call of Python's

        # After the grid: stream, function, metadata, what the launch is and two hooks. As cheap as
        # a driver is not: what the host pays is measured with it.
        def launch(
            x: int,
            y: int,
            z: int,
            stream: Any,
            binary: bytes,
            packed: Any,
            about: Any,
            enter: Any,
            leave: Any,
            *values: Any,
        ) -> None:
            launches.append(make(Launch, (kernel, (x, y, z), *own, binary, names, values)))

        return launch
