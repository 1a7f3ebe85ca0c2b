"""Upper limits of a chip's performance, for predictions. Each number names its source.

This project has measured none of these numbers. They are to be replaced by measurements
(`copy_gb_s` and `matmul_tflop_s` of `bench/linear.py`) once there are any.
"""

from __future__ import annotations

from typing import NamedTuple


class Ceilings(NamedTuple):
    """The limits of one card.

    Attributes:
        card: Name of the card.
        processors: Number of streaming multiprocessors.
        bytes_per_s: Bytes per second that are read from or written to memory.
        l2_bytes_per_s: Bytes per second that all processors read from the L2 cache.
        l2_bytes_per_cycle: Bytes per cycle that one processor reads from the L2 cache.
        flop_per_s: FLOP per second of a large 16-bit GEMM.
        clock_hz: Clock rate during a large GEMM.
        issues_per_cycle: Warp instructions that a processor issues per cycle.
        cycles_per_instruction: Cycles per instruction of a program that waits for its own results.
        launch_us: Overhead of a kernel in a graph that waits for the kernel before it, in addition
            to its work.
        dependent_us: Overhead of a programmatic dependent and of the kernel that it depends on,
            minus the ``launch_us`` of that kernel.
        registers, shared, warps, programs: Capacity of one processor.
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
        l2_bytes_per_s=5.5e12,  # assumed: from published microbenchmarks of the PCIe card
        l2_bytes_per_cycle=64,  # assumed: the A100's value, from NVIDIA's white paper
        flop_per_s=700e12,  # assumed: cuBLAS in bf16 reaches 650 to 790 of the data sheet's 989
        clock_hz=1.7e9,  # assumed: below the data sheet's 1.98 GHz under load
        issues_per_cycle=4,  # NVIDIA's white paper: four schedulers
        cycles_per_instruction=3.0,  # assumed: code with barriers, two warps per scheduler
        launch_us=2.0,  # assumed: start, drain, and the first and last loads and stores
        dependent_us=1.7,  # assumed: 1.2 for the start of a shrink, and 0.5 for an epilogue
        registers=65536,  # CUDA programming guide, compute capability 9.0, as the next three
        shared=228 * 1024,
        warps=64,
        programs=32,
    ),
}
