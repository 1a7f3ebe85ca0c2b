"""Run the host code of the Triton kernels without a GPU, and record each kernel launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from fastlora.env import triton_interpreted
from fastlora.kernels.stand_in_driver import StandInDriver
from fastlora.ops import execution_mode

if TYPE_CHECKING:
    from fastlora.kernels.chips import Chip


class Launch(NamedTuple):
    """A recorded kernel launch.

    Attributes:
        kernel: The name of the Triton function.
        grid: The number of programs along each axis.
        num_warps: The number of warps per program.
        num_stages: The number of pipeline stages of the program's loop.
        shared: The shared memory per program, in bytes.
        binary: The compiled code.
        names: The names of the kernel's arguments.
        values: The values of the kernel's arguments.
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
        """The arguments of the launch by name.

        The dict maps the name of each argument to its value. Tensors and strides are left out.
        """
        given = zip(self.names, self.values, strict=True)
        return {
            name: value
            for name, value in given
            if not name.endswith("_ptr") and not name.startswith("stride")
        }


@contextlib.contextmanager
def stubbed_launches(chip: str = "sm_90", processors: int = 132) -> Iterator[list[Launch]]:
    """Record kernel launches in a ``with`` block instead of executing the kernels.

    The Triton implementation then also accepts CPU tensors. As on a GPU, configs are chosen and
    kernels are compiled for the given chip, arguments are bound, and the launcher is called. No
    kernel is executed, so outputs are uninitialized. This context manager is not thread-safe. It
    does not support Triton's interpreter, which launches no kernels.

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
    counting = _RecordOnlyDriver(described, launches)  # raises for an unknown chip
    before, status = driver._active, (True, f"stubbed ({chip})")
    driver.set_active(counting)
    compiler.max_shared_mem.cache_clear()
    try:
        with (
            mock.patch.object(chips, "chip_of", lambda _: described),
            mock.patch.object(execution_mode, "KERNEL_DEVICES", ("cpu",)),
            mock.patch.object(execution_mode, "triton_status", lambda *_: status),
        ):
            yield launches
    finally:
        driver.set_active(before)
        compiler.max_shared_mem.cache_clear()


class _RecordOnlyDriver(StandInDriver):
    """A stand-in for Triton's driver that only records kernel launches.

    The kernels are not executed.
    """

    def __init__(self, chip: Chip, launches: list[Launch]) -> None:
        super().__init__(chip)
        self._launches = launches

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Return placeholders in place of a loaded kernel, without loading the kernel's binary.

        As with a real driver, the returned tuple consists of a module handle, a function handle
        (here, the binary), the numbers of registers and spills, and the maximum number of threads
        per program.
        """
        return object(), binary, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return a launcher that records the launches of a kernel.

        The method stands in for Triton's launcher class, and the launcher stands in for an instance
        of that class. Each launch of the kernel is recorded as a `Launch`, and the kernel is not
        executed.
        """

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
