"""What a chip can do at most, for predictions: numbers, each with where it comes from.

Nothing here was measured by this project. Measured numbers (`copy_gb_s` and `matmul_tflop_s` of
`bench/linear.py`) replace them as soon as there are any.
"""

from __future__ import annotations

from typing import NamedTuple


class Ceilings(NamedTuple):
    """Of one card.

    Attributes:
        card: Its name.
        processors: Streaming multiprocessors.
        bytes_per_s: Read from memory, or written.
        l2_bytes_per_s: Read from the L2 cache, by all processors.
        l2_bytes_per_cycle: The same, by one processor.
        flop_per_s: Of a large GEMM in 16 bits.
        clock_hz: Under such load.
        issues_per_cycle: Instructions of warps that a processor starts in a cycle.
        cycles_per_instruction: Of a program that waits for its own results.
        launch_us: What a kernel in a graph costs that waits for the one before it, beside its work.
        dependent_us: The same for a programmatic dependent: of it and of what it depends on, less
            the ``launch_us`` of the latter.
        registers, shared, warps, programs: What one processor has room for.
    """

    card: str
    processors: int
    bytes_per_s: float
    l2_bytes_per_s: float
    l2_bytes_per_cycle: int
    flop_per_s: float
    clock_hz: float
    issues_per_cycle: int
    cycles_per_instruction: float
    launch_us: float
    dependent_us: float
    registers: int
    shared: int
    warps: int
    programs: int


CEILINGS = {
    "sm_90": Ceilings(
        card="H100 SXM",
        processors=132,  # NVIDIA's data sheet
        bytes_per_s=3.0e12,  # assumed: 90 % of the data sheet's 3.35 TB/s
        l2_bytes_per_s=5.5e12,  # assumed: what published microbenchmarks of the PCIe card say
        l2_bytes_per_cycle=64,  # assumed: as of the A100, by NVIDIA's white paper
        flop_per_s=700e12,  # assumed: cuBLAS in bf16 reaches 650 to 790 of the data sheet's 989
        clock_hz=1.7e9,  # assumed: below the data sheet's 1.98 GHz under load
        issues_per_cycle=4,  # four schedulers: NVIDIA's white paper
        cycles_per_instruction=3.0,  # assumed: code with barriers, two warps a scheduler
        launch_us=2.0,  # assumed: start, drain, and the first and last loads and stores
        dependent_us=1.7,  # assumed: 1.2 of a shrink's start, and 0.5 of an epilogue
        registers=65536,  # CUDA's programming guide, compute capability 9.0; the next three too
        shared=228 * 1024,
        warps=64,
        programs=32,
    ),
}
