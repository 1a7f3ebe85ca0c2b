"""A pool's records of its adapters, by name and on the device, and its statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora.ops.factors import Factors
from fastlora.pool.image import Image


class Scales:
    """The scales of a DoRA adapter on the device, one for each output of each of its modules.

    Their memory does not move. They are overwritten when a base weight has changed.

    Attributes:
        by_module: Index of a module -> g, ``[N]`` in fp32 (fp64 for an fp64 weight).
        blocks: The same scales in fp32, as kernels read them.
        stamps: Stamps of the base weights that the scales were computed from.
        written: Event that follows the last write, or None.
    """

    __slots__ = ("blocks", "by_module", "stamps", "written")

    def __init__(self) -> None:
        self.by_module: dict[int, torch.Tensor] = {}
        self.blocks: dict[int, torch.Tensor] = {}
        self.stamps: list[Any] = []
        self.written: Any = None


class Resident:
    """An adapter on the device. Its factors never change: a hot swap creates a new resident.

    Its memory is guaranteed to stay valid only while a lease holds it. The pool's lock guards the
    last four attributes.

    Attributes:
        name: Name of the adapter.
        slot: Number of the adapter in row ids.
        column: Column of the adapter in the pool's tables.
        image: The packed factors, 1-D.
        version: A number that differs between any two packed images, for use in cache keys.
        max_rank: Largest rank of any module.
        dora_modules: Indices of the modules that have a magnitude.
        uses_dora: Whether any module has a magnitude.
        scales: Scales of a DoRA adapter, computed with the first lease, or None.
        packed: The image with its layout.
        leases: Number of leases that hold the adapter.
        written: Event that follows the copy to the device, or None once the copy is known to be
            done.
        reads: Stream -> event that follows the last forward on it that read the adapter.
    """

    def __init__(self, name: str, slot: int, column: int, image: Image) -> None:
        self.name, self.slot, self.column = name, slot, column
        self.image: torch.Tensor = image.data
        self.version = image.version
        self.max_rank = max(rank for rank, _ in image.layout.blocks)
        self.dora_modules = image.layout.dora_modules
        self.uses_dora = bool(self.dora_modules)
        self.scales: Scales | None = None
        self.packed = image
        self.leases = 0
        self.written: Any = None
        self.reads: dict[int, Any] = {}
        self._views: dict[int, Factors | None] = {}

    def factors(self, table_row: int) -> Factors | None:
        """Return the factors of one module, or None if the adapter does not adapt it.

        Args:
            table_row: Index of the module in the pool, which is its layer's ``table_row``.
        """
        if table_row not in self._views:
            # Two threads may both create the factors. Either result can be used.
            views = self.packed.layout.views(self.image, table_row)
            made = None
            if views:
                scaling = self.packed.scaling[table_row]
                bias, magnitude = views.get("lora_bias"), views.get("magnitude")
                made = Factors(views["lora_a"], views["lora_b"], scaling, bias, 0.0, magnitude)
            self._views[table_row] = made
        return self._views[table_row]

    def __repr__(self) -> str:
        return f"Resident({self.name!r}, slot={self.slot}, version={self.version})"


@dataclass(eq=False)
class Entry:
    """The record of a name in the pool. A new adapter with the same name has a new record.

    Attributes:
        name: Name of the adapter.
        folder: Folder from which it can be read again, or None if it came as a state dict.
        pinned: Whether it stays on the device.
        reading: Whether a thread is reading it.
    """

    name: str
    folder: Path | None
    pinned: bool = False
    reading: bool = False


@dataclass(frozen=True)
class PoolStats:
    """Statistics about the contents and the operations of a pool.

    Attributes:
        registered: Number of registered adapters, in any tier.
        on_device, in_cpu: Number of adapters in each tier.
        device_bytes, cpu_bytes: Bytes in each tier. The device includes replaced images that leases
            hold.
        leases: Number of leases that are held.
        hits: Number of adapters that leases found on the device.
        misses: Number of adapters that leases had to bring to the device.
        loads: Number of adapters read and packed.
        evictions: Number of adapters that left the device to make room.
    """

    registered: int
    on_device: int
    in_cpu: int
    device_bytes: int
    cpu_bytes: int
    leases: int
    hits: int
    misses: int
    loads: int
    evictions: int
