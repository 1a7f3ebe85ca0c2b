"""What a pool knows about its adapters: by name, and on the device; and the numbers it reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
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
    """An adapter on the device. What forwards read never changes: a hot swap makes a new one.

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

    The pool's own, guarded by its lock:
        packed: The image with its layout.
        leases: How many leases hold it.
        written: Mark behind its copy to the device, until that is known to be done.
        reads: Stream -> mark behind the last forward there that read it.
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
        """Return the factors of one module, or None where the adapter lacks it.

        Args:
            table_row: The module's number in the pool, its layer's ``table_row``.
        """
        if table_row not in self._views:
            # Two threads may both make them; either result will do.
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
    """What the pool knows about a name; another adapter of that name has an entry of its own.

    Attributes:
        name: The adapter's name.
        folder: Where it can be read again; None for one that came as a state dict.
        pinned: Never evicted from the device.
        reading: A thread is reading it.
    """

    name: str
    folder: Path | None
    pinned: bool = False
    reading: bool = False


@dataclass(frozen=True)
class PoolStats:
    """What a pool holds and has done.

    Attributes:
        registered: Adapters by name, wherever they are.
        on_device, in_cpu: Adapters in each tier.
        device_bytes, cpu_bytes: Bytes in each; replaced images that leases keep count.
        leases: Leases that are held.
        hits, misses: Adapters that leases found on the device, or had to bring there.
        loads: Adapters read and packed.
        evictions: Adapters that left the device for others.
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
