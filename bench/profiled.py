"""Runs three kernels of Llama-3.1-8B once, for use under a profiler such as Nsight Compute.

    ncu --kernel-name "regex:lora_grad_b|mixed_lora_expand|lora_linear" python bench/profiled.py

They are `lora_linear` of q, k, and v at 64 rows, `mixed_lora_expand` of gate and up with 64
adapters, and `lora_grad_b` of gate and up in a training step of 8,192 rows.
"""

from __future__ import annotations

import argparse
import sys

import torch

from fastlora.bench.shapes import SHARED_INPUTS, TINY, Point, grouped_point
from fastlora.bench.shared_input import MODES


def problems(dry: bool) -> list[Point]:
    """Return the problems, or tiny ones."""
    if dry:
        return [
            Point("forward", TINY, "a", 20, 32, 48, 4, outputs="32+16"),
            Point("mixed", TINY, "a", 20, 32, 48, 4, 5, "4", "32+16"),
            Point("train", TINY, "a", 20, 32, 48, 4, outputs="32+16"),
        ]
    qkv, gate_up = SHARED_INPUTS[0], SHARED_INPUTS[2]
    return [
        grouped_point("forward", qkv, 64, 16),
        grouped_point("mixed", gate_up, 64, 16, 64),
        grouped_point("train", gate_up, 8192, 16),
    ]


def main() -> int:
    """Solve each problem once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for point in problems(args.dry_run):
        results = MODES[point.mode].solve(MODES[point.mode].draw(point, dtype, device))
        print(f"{point}: {len(results)} results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
