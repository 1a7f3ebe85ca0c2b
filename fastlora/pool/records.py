"""Classes that describe the adapters of a pool, and statistics about the pool."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora.ops.factors import Factors
from fastlora.pool.packed_adapter import PackedAdapter


class AdapterDoraScales:
    """The DoRA scales of one adapter in a pool.

    The scales cover all modules for which the adapter uses DoRA. The scales have one value per
    output feature of each of these modules. The scales belong to a `LoadedAdapter`, and are stored
    on the device. Scales in fp32 are updated in place when a base weight changes, so their
    addresses do not change.

    Attributes:
        by_module: Maps each module index to the module's scales g, ``[N]``, in fp32 (fp64 for an
            fp64 weight).
        blocks: Maps each module index to the same scales in fp32, which kernels read.
        stamps: Records of the state of each module's base weight when its scales were computed.
        written: CUDA event after the last write to the scales, or None on a CPU.
    """

    __slots__ = ("blocks", "by_module", "stamps", "written")

    def __init__(self) -> None:
        self.by_module: dict[int, torch.Tensor] = {}
        self.blocks: dict[int, torch.Tensor] = {}
        self.stamps: list[Any] = []
        self.written: Any = None


class LoadedAdapter:
    """An adapter that is loaded in a pool.

    A loaded adapter is on the device. The object is the pool's record of the adapter. A hot swap
    creates a new `LoadedAdapter` with the new factors. The factors never change. Their memory is
    guaranteed to stay valid only while a lease on the adapter is active. The pool's lock protects
    the last four attributes.

    Attributes:
        name: Name of the adapter.
        slot: Slot of the adapter, its integer id in row ids.
        column: Column of the adapter in the pool's tables.
        image: The packed factors, a 1-D tensor.
        version: Version of the image, unique among the pool's images, for use in cache keys.
        max_rank: Largest rank of the adapter over all targets except stacks, for the address
            tables. Stacks do not use the tables.
        dora_modules: Indices of the modules for which the adapter has a DoRA magnitude.
        uses_dora: Whether the adapter has a DoRA magnitude for any module.
        scales: Scales of a DoRA adapter, or None until its first lease computes them.
        packed: The image, with its layout.
        leases: Number of active leases on the adapter.
        written: CUDA event after the copy to the device, or None if no wait is needed.
        reads: Maps each CUDA stream to the event after the last forward pass on that stream that
            read the adapter.
    """

    def __init__(self, name: str, slot: int, column: int, image: PackedAdapter) -> None:
        self.name, self.slot, self.column = name, slot, column
        self.image: torch.Tensor = image.data
        self.version = image.version
        of_targets = zip(image.layout.targets, image.layout.blocks, strict=True)
        ranks = [rank for target, (rank, _) in of_targets if target.num_matrices == 1]
        self.max_rank = max(ranks, default=0)
        self.dora_modules = image.layout.dora_modules
        self.uses_dora = bool(self.dora_modules)
        self.scales: AdapterDoraScales | None = None
        self.packed = image
        self.leases = 0
        self.written: Any = None
        self.reads: dict[int, Any] = {}
        self._views: dict[int, Factors | None] = {}

    def factors(self, table_row: int) -> Factors | None:
        """Return the adapter's LoRA factors for the given row of the pool's tables.

        Each row of the tables represents one module. The result is None if the adapter has no
        factors for the module.

        Args:
            table_row: Index of the module in the pool, which is the ``table_row`` of its layer.
        """
        if table_row not in self._views:
            # Two threads may both create the factors. Either result can be used.
            views = self.packed.layout.module_tensor_views(self.image, table_row)
            made = None
            if views:
                scaling = self.packed.scaling[table_row]
                bias, magnitude = views.get("lora_bias"), views.get("magnitude")
                made = Factors(views["lora_a"], views["lora_b"], scaling, bias, 0.0, magnitude)
            self._views[table_row] = made
        return self._views[table_row]

    def __repr__(self) -> str:
        return f"LoadedAdapter({self.name!r}, slot={self.slot}, version={self.version})"


@dataclass(eq=False)
class RegisteredAdapter:
    """The pool's record of a registered adapter.

    The record states the adapter's name and source, whether the adapter is pinned, and whether a
    thread is reading the adapter's files. The source is the adapter's folder, if there is one. The
    adapter may be in any storage tier. An adapter that replaces another adapter gets its own
    record.

    Attributes:
        name: Name of the adapter.
        folder: Folder from which the adapter can be read again, or None if it was loaded from a
            state dict.
        pinned: Whether the adapter must stay on the device.
        reading: Whether a thread is reading the adapter's files.
    """

    name: str
    folder: Path | None
    pinned: bool = False
    reading: bool = False


@dataclass(frozen=True)
class PoolStats:
    """Statistics about an adapter pool.

    The statistics describe the pool's current contents and count its operations so far.

    Attributes:
        registered: Number of registered adapters, in any tier.
        on_device, in_cpu: Number of adapters on the device and in CPU memory.
        device_bytes, cpu_bytes: Bytes of factors on the device and in CPU memory. ``device_bytes``
            includes adapters that were replaced or removed but are still leased.
        leases: Number of active leases.
        hits: Number of requested adapters that were on the device when their lease was granted.
        misses: Number of requested adapters that had to be brought to the device for a lease.
        loads: Number of times that an adapter was read and packed.
        evictions: Number of times that an adapter was evicted from the device.
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
