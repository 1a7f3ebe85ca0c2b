"""`StandInDriver`, with which Triton compiles kernels for a chip that the machine does not have."""

from __future__ import annotations

import itertools
from typing import Any

from fastlora.kernels.chips import Chip

_WARP_SIZE = {"cuda": 32, "hip": 64}
# Triton caches compiled kernels by device number, so each driver has a number of its own.
_numbers = itertools.count(1_000)


class StandInDriver:
    """A Triton driver that stands in for a GPU driver.

    Subclasses that launch kernels define ``load_binary`` and ``launcher_cls``.

    Args:
        chip: The chip that kernels are compiled for.
        target: Triton's description of the chip, or None to derive it from ``chip``.
    """

    def __init__(self, chip: Chip, target: Any = None) -> None:
        from triton.backends.compiler import GPUTarget

        kind = "hip" if chip.arch.startswith("gfx") else "cuda"
        self._properties = {
            "max_shared_mem": chip.shared_limit,
            "multiprocessor_count": chip.num_sms,
            "warpSize": _WARP_SIZE[kind],
        }
        arch: Any = chip.arch if kind == "hip" else int(chip.arch.removeprefix("sm_"))
        self._target = target or GPUTarget(kind, arch, _WARP_SIZE[kind])
        self._number = next(_numbers)
        self.utils = self

    def get_current_target(self) -> Any:
        """Return the target that kernels are compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """Return the index of the current device.

        The index is unique to this driver.
        """
        return self._number

    def get_current_stream(self, device: int) -> int:
        """Return 0, the handle of the default stream."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return a dict with the chip's shared memory size, multiprocessor count, and warp size."""
        return self._properties

    def unload_module(self, module: Any) -> None:
        """Do nothing, because the module to unload is an ordinary Python object."""
