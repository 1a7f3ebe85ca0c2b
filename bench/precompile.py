"""Compiles the kernels of every point beforehand, many at a time, by running them once.

The compiled kernels are stored in Triton's disk cache, where the benchmark finds them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from fastlora.bench.modes import MODES
from fastlora.bench.shapes import (
    Point,
    all_points,
    distinct_problems,
    mixed_points,
    tiny_mixed_points,
    tiny_points,
)

MAX_PROCESSES = 16
BYTES_A_PROCESS = 4 * 2**30  # a context, the operands of the largest point, and its results
MAX_SHOWN = 10


def compile_point(point: Point, device: str, impl: str) -> str:
    """Run fastlora's contenders of a point once; return an error message, or ""."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_num_threads(1)
    try:
        mode = MODES[point.mode]
        problem = mode.draw(point, dtype, torch.device(device), impl)
        for contender in mode.contenders(point, impl, device, dtype):
            if contender.ours:
                contender.run(problem)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return ""


def processes(device: str) -> int:
    """Return how many processes may use the device at a time."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if device != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(cores, MAX_PROCESSES, free // BYTES_A_PROCESS))


def main() -> int:
    """Compile the kernels of all points and return 0. The benchmark reports those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--impl", default="triton", choices=("triton", "eager"))
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes")
    args = parser.parse_args()
    start = time.monotonic()
    points = distinct_problems(tiny_points() if args.dry_run else all_points())
    if args.impl == "triton":  # mixed batches have Triton operators only
        points += distinct_problems(tiny_mixed_points() if args.dry_run else mixed_points())
    workers = processes(args.device)
    failures = 0
    # Processes are spawned, because a forked child cannot use a GPU that its parent has used.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(compile_point, p, args.device, args.impl): p for p in points}
        for future in as_completed(futures):
            try:
                fault = future.result()
            except Exception as error:  # the process died and broke the pool
                fault = f"{type(error).__name__}: {error}"
            if fault:
                failures += 1
                if failures <= MAX_SHOWN:
                    print(f"{futures[future]}: {fault}", flush=True)
    seconds = time.monotonic() - start
    print(f"{len(points)} problems in {workers} processes, {seconds:.0f} s, {failures} failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
