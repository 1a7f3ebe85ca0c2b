"""Adapters on the device: what a forward reads, and what the pool knows about it."""

from __future__ import annotations

from typing import Any

import torch

from fastlora.ops.factors import Factors
from fastlora.pool.image import Image


class Scales:
    """A DoRA adapter's scales on the device, one for each output of each of its modules.

    They stay where they are, and are written anew when a base weight has changed.

    Attributes:
        by_module: Number of a module -> g, ``[N]`` in fp32 (fp64 over an fp64 weight).
        blocks: The same as kernels read it, in fp32.
        stamps: What tells whether the base weights are still those that they were made of.
        written: Mark behind their last making.
    """

    __slots__ = ("blocks", "by_module", "stamps", "written")

    def __init__(self) -> None:
        self.by_module: dict[int, torch.Tensor] = {}
        self.blocks: dict[int, torch.Tensor] = {}
        self.stamps: list[Any] = []
        self.written: Any = None


class Resident:
    """An adapter on the device. It never changes: a hot swap makes a new one.

    Its memory is certain to be its own only while a lease holds it.

    Attributes:
        name: The adapter's.
        slot: The number that row ids mean it by.
        column: Its column in the pool's tables.
        image: The packed factors, 1-D.
        version: Differs between any two images that were packed, so it can key caches.
        max_rank: Largest rank on any module.
        dora_modules: Numbers of the modules on which it has a magnitude.
        uses_dora: Whether there are any.
        scales: Of a DoRA adapter, made with the first lease, and gone with the resident.
    """

    def __init__(self, name: str, slot: int, column: int, image: Image) -> None:
        self.name, self.slot, self.column = name, slot, column
        self.image: torch.Tensor = image.data
        self.version = image.version
        self.max_rank = int(image.layout.ranks.max())
        self.dora_modules = image.layout.dora_modules
        self.uses_dora = bool(self.dora_modules)
        self.scales: Scales | None = None
        self._layout, self._scaling = image.layout, image.scaling
        self._views: list[Factors | None | bool] = [False] * len(image.scaling)

    def factors(self, table_row: int) -> Factors | None:
        """Returns the factors of one module, or None where the adapter lacks it.

        Args:
            table_row: The module's number in the pool, its layer's ``table_row``.
        """
        known = self._views[table_row]
        if known is False:
            # Two threads may both make them; either result will do.
            views = self._layout.views(self.image, table_row)
            known = None
            if views:
                scaling = self._scaling[table_row]
                bias, magnitude = views.get("lora_bias"), views.get("magnitude")
                known = Factors(views["lora_a"], views["lora_b"], scaling, bias, 0.0, magnitude)
            self._views[table_row] = known
        return known  # type: ignore[return-value]  # False is replaced above

    def __repr__(self) -> str:
        return f"Resident({self.name!r}, slot={self.slot}, version={self.version})"


class DeviceCopy:
    """The pool's record of a resident; guarded by the pool's lock.

    Attributes:
        resident: What forwards see.
        image: The same memory, with its layout.
        leases: How many leases hold it.
        retired: No longer its name's adapter; it goes when the last lease does.
        written: Mark behind its copy to the device, until that is known to be done.
        reads: Stream -> mark behind the last forward there that read it.
    """

    __slots__ = ("image", "leases", "reads", "resident", "retired", "written")

    def __init__(self, resident: Resident, image: Image, written: Any) -> None:
        self.resident, self.image, self.written = resident, image, written
        self.leases = 0
        self.retired = False
        self.reads: dict[int, Any] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.image.nbytes
