"""The kernels' host path without a GPU: every step except the launch, which is recorded."""

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
# Triton caches compiled kernels by device number, so each block uses a new number.
_numbers = itertools.count(1_000)


class Launch(NamedTuple):
    """A recorded kernel launch.

    Attributes:
        kernel: Name of the Triton function.
        grid: Number of programs along each axis.
        num_warps: Warps per program.
        num_stages: Pipeline stages of the program's loop.
        shared: Shared memory per program, in bytes.
        binary: Compiled code.
        names: Names of the kernel's arguments.
        values: Values of the kernel's arguments.
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
        """The kernel's arguments by name, without tensors and strides."""
        given = zip(self.names, self.values, strict=True)
        return {
            name: value
            for name, value in given
            if not name.endswith("_ptr") and not name.startswith("stride")
        }


@contextlib.contextmanager
def stubbed_launches(chip: str = "sm_90", processors: int = 132) -> Iterator[list[Launch]]:
    """Run the Triton path on CPU tensors in the block, and record launches instead of running them.

    As on a GPU, configs are chosen and kernels are compiled for the named chip, arguments are
    bound, and the launcher is called. No kernel computes, so an output holds whatever its memory
    contained. Not thread-safe. Triton's interpreter is not supported, because it has no launches.

    Args:
        chip: The chip's architecture, such as ``"sm_90"`` or ``"gfx942"``. fastlora must have
            configs for it.
        processors: The chip's number of streaming multiprocessors (compute units).

    Yields:
        The list of launches so far, in order.

    Raises:
        ValueError: fastlora has no configs for the chip.
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
        """Return the target that kernels are compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """Return the device number."""
        return self._number

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return the chip's limits."""
        return self._properties

    def unload_module(self, module: Any) -> None:
        """Do nothing, because Python frees the module."""


class _CountingDriver(StandInDriver):
    """A driver that records each launch and runs none."""

    def __init__(self, chip: Chip, launches: list[Launch]) -> None:
        super().__init__(chip)
        self._launches = launches

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Return the module, function, registers, spills, and maximum threads per program."""
        return object(), binary, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return a function that records the launch of a kernel."""

        own = metadata.num_warps, metadata.num_stages, metadata.shared
        kernel, launches, names = metadata.name, self._launches, tuple(source.fn.arg_names)
        make = tuple.__new__  # as `Launch` does, without a Python call

        # The arguments after the grid are the stream, the function, the metadata, a description of
        # the launch, and two hooks. The function does less than a real driver does, because
        # benchmarks of the host's overhead use it.
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
