"""Properties of chips: limits, and the rows of the tables that `fastlora.kernels.configs` reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastlora.env import triton_interpreted

_INTERPRETED = triton_interpreted()
_KIB = 1024
# Shared memory (LDS) that one program may use.
_SHARED_LIMITS = {
    "sm_80": 163 * _KIB,
    "sm_86": 99 * _KIB,
    "sm_90": 227 * _KIB,
    "sm_100": 227 * _KIB,
    "gfx942": 64 * _KIB,
    "gfx950": 160 * _KIB,
}
# Bytes in flight that each processor needs to keep the memory busy: the bandwidth, times about 800
# ns (an assumption), divided by the number of processors of the largest chip.
_IN_FLIGHT = {
    "sm_80": 14_000,
    "sm_86": 8_500,
    "sm_90": 20_400,
    "sm_100": 43_000,
    "gfx942": 14_000,
    "gfx950": 25_000,
}
# Bytes per second of memory, of the L2 cache, and of the L2 cache to one program; the card's number
# of processors. This project has measured none of these figures. "gpu-benches" stands for the
# measurements in github.com/te42kyfo/gpu-benches (gpu-l2-cache/*.txt). One program is assumed to
# read 90 % of the 64 bytes per clock that a processor reads (NVIDIA's white paper on the A100).
# No figure was found for sm_86, sm_100, and sm_120. On gfx942 and gfx950, each die has its own L2
# cache.
_BANDWIDTHS = {
    # A100 SXM 80 GB at 1.41 GHz. gpu-benches: 1.7 to 1.9 and 5.4 TB/s. NVIDIA: 2.0 and 7.2 TB/s.
    "sm_80": (1.8e12, 5.4e12, 81e9, 108),
    # L40 at 2.5 GHz. gpu-benches: 0.80 to 0.85 and 5.2 TB/s.
    "sm_89": (0.8e12, 5.2e12, 144e9, 142),
    # H100 SXM: the assumptions of bench/ceilings.py. gpu-benches: 2.0 and 6.9 TB/s on the PCIe card
    # with 114 processors, 3.9 and 9.7 TB/s on an H200.
    "sm_90": (3.0e12, 5.5e12, 98e9, 132),
}
# Assumed overhead in seconds: of a launch that waits for the one before it, of a programmatic
# dependent, and of a sum of partial sums inside a kernel, in addition to its loads. The first two
# are those of bench/ceilings.py. None has been measured.
LAUNCH_S = 2.0e-6
_DEPENDENT_LAUNCH_S = 1.7e-6
INNER_SUM_S = 1.0e-6
_FAMILIES = {
    "interpreter": "gfx942",  # widest fp32 tiles: few operations for the interpreter
    "sm_80": "sm_80",
    "sm_86": "sm_86",
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_103": "sm_100",
    "sm_120": "sm_86",
    "sm_121": "sm_86",
    "gfx942": "gfx942",
    "gfx950": "gfx950",
}
_PDL_ARCHS = ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121")


class Chip(NamedTuple):
    """Properties that a config depends on: arch ("sm_90", "gfx942") and number of processors."""

    arch: str
    num_sms: int

    @property
    def is_supported(self) -> bool:
        """Whether the tables cover this chip."""
        return self.arch in _FAMILIES

    @property
    def family(self) -> str:
        """The arch with the table that this chip uses; raise `ValueError` if there is none."""
        if not self.is_supported:
            raise ValueError(f"no configs for {self.arch!r}, expected one of {sorted(_FAMILIES)}")
        return _FAMILIES[self.arch]

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that one program may use."""
        return _SHARED_LIMITS[self.family]

    @property
    def bytes_in_flight(self) -> int:
        """Bytes in flight that keep the memory busy."""
        return _IN_FLIGHT[self.family] * self.num_sms

    @property
    def bandwidths(self) -> tuple[float, float, float] | None:
        """Assumed bytes per second of memory, of the L2 cache, and of the L2 cache to one program.

        The first two are in proportion to the number of processors. None if they are unknown.
        """
        if self.arch not in _BANDWIDTHS:
            return None
        memory, l2, program, processors = _BANDWIDTHS[self.arch]
        return memory * self.num_sms / processors, l2 * self.num_sms / processors, program

    @property
    def rates(self) -> tuple[float, float]:
        """Assumed bytes per second of memory and of the L2 cache.

        A chip without figures is assumed to have an H100's rates per processor.
        """
        known = self.bandwidths or Chip("sm_90", self.num_sms).bandwidths
        if known is None:
            raise ValueError("there are no bandwidths of sm_90")
        return known[:2]

    @property
    def sum_launch_s(self) -> float:
        """Assumed overhead in seconds of a launch that adds the partial sums of the one before."""
        return _DEPENDENT_LAUNCH_S if self.has_pdl else LAUNCH_S

    @property
    def max_registers(self) -> int | None:
        """Limit of registers per thread, or None on AMD, where the compiler has no such option.

        Without the limit, ptxas spills a register or two to reach the next step of occupancy
        (Triton 3.9: 8 or 16 bytes in 12 of 580 kernels). With the limit, it spills in none.
        """
        return None if self.family.startswith("gfx") else 255

    @property
    def has_pdl(self) -> bool:
        """Whether a kernel can be launched as a programmatic dependent of the previous one."""
        return self.arch in _PDL_ARCHS

    @property
    def has_wide_mma(self) -> bool:
        """Whether the chip's tensor cores take at least 64 rows, rather than 16."""
        return self.family in ("sm_90", "sm_100")


def chip_of(device: torch.device) -> Chip:
    """Return the chip of a CUDA or ROCm device, or a stand-in for the interpreter."""
    if _INTERPRETED:
        return Chip("interpreter", 4)
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Chip(arch, properties.multi_processor_count)


@dataclass(frozen=True)
class ConfigRow:
    """A row of a chip's table: a tile that a launch may use, or a tuner's measurement.

    A table maps ``(launch, kind)`` to rows. The launches are those of a chip's file. A kind is
    "half" (fp16 and bf16), or a precision of fp32: "tf32" or "ieee".

    The first seven columns are the tile. A row without the other columns is a candidate for every
    problem. Candidates are ordered from the widest tile to the narrowest, and the rules of
    `configs.choose` select one. A row with a value in the other columns is a measurement, of a tile
    or of a plan. The first measurement that covers the problem takes precedence over all
    candidates, except in the batch-invariant mode. A tuner writes measurements in front of the
    candidates, for the chip that it ran on. If a launch of a mixed batch works on pieces or runs of
    rows, a measurement has the ``block_m`` of the candidates, because the host prepares the pieces
    before the launch.

    Attributes:
        block_m: Rows of x, y, s, or dy. In this and the next two columns, 0 if the kernel has no
            such side.
        block_n: Columns of y or dy, or of dx if the launch computes dx.
        block_k: Columns of x, or a step of the K loop.
        num_warps: Warps of a program; 0 in a row with a plan.
        num_stages: Stages of the pipelined loop.
        blocks_r: Every BLOCK_R with which the tile spills no register, in ascending order. The
            ahead-of-time test compiles each of them.
        splits: In a measurement, the number of programs that share a sum; 0 to leave it to the
            rules.
        max_m: Largest number of rows M that the measurement covers; None for any.
        n: The layer's N that it covers; None for any.
        k: The layer's K that it covers; None for any.
        max_r: Largest rank that it covers; None for any. A shrink or a gradient of lora_a for
            several modules of a mixed batch counts the rank rows of all modules. A plan of a mixed
            batch counts the rank rows of all slots.
        plan: The fastest plan (`configs.plan_of`), in a row without a tile; "" in all others.
        min_m: Smallest number of rows M that the measurement covers; None for any.
        group_size: Number of modules in a `lora_grad_a` that it covers; None for any.
    """

    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 0
    num_stages: int = 1
    blocks_r: tuple[int, ...] = ()
    splits: int = 0
    max_m: int | None = None
    n: int | None = None
    k: int | None = None
    max_r: int | None = None
    plan: str = ""
    min_m: int | None = None
    group_size: int | None = None

    @property
    def is_measured(self) -> bool:
        """Whether the row is a measurement."""
        return self.plan != "" or (self.max_m, self.n, self.k, self.max_r) != (None,) * 4

    def covers(self, m: int, n: int, k: int, r: int, group_size: int = 1) -> bool:
        """Return whether the row applies to M rows, a layer of N by K, rank R, and a group."""
        return (
            (self.max_m is None or m <= self.max_m)
            and (self.min_m is None or m >= self.min_m)
            and (self.group_size is None or group_size == self.group_size)
            and (self.n is None or n == self.n)
            and (self.k is None or k == self.k)
            and (self.max_r is None or r <= self.max_r)
        )


Table = dict[tuple[str, str], tuple[ConfigRow, ...]]
