"""Numbers that a pool reports."""

from __future__ import annotations

from dataclasses import dataclass


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
