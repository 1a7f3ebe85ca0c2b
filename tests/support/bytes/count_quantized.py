"""Counts what a linear over NF4 moves where few rows decode it, and the floor of that.

The rows of `docs/kernel_bytes.csv` that end in "of nf4" are `STEPS`.
"""

from __future__ import annotations

import torch

from fastlora.kernels.chips import Chip
from fastlora.ops.backend import BACKENDS
from fastlora.ops.factors import Base, LayerAdapterOperands
from fastlora.ops.operator_backend import weight_for_kernels
from fastlora.ops.triton import forward
from tests.support.bytes.byte_counter import ByteCounter
from tests.support.bytes.count_bytes import HALF, Counts, Step, on, stems
from tests.support.kernels.lab import Lab
from tests.support.kernels.mixed_problem import MixedProblem
from tests.support.kernels.quantized_weights import make_quantized_weight

# A quarter or a half of a linear of 4096, on as much of an H100: as many tiles a processor.
_SMS_OF_4096 = 132
STEPS = [
    *(Step(1, 1024, 1024, 16, 1), Step(16, 1024, 1024, 16, 1), Step(64, 2048, 2048, 16, 1)),
    *(Step(m, 1024, 1024, 16, 64) for m in (1, 16, 64)),
]
# What every column of tiles, or every scale, asks the caches for once more.
AGAIN = ("x", "s", "tables", "elsewhere")


def count_decode(step: Step, kind: str = "nf4") -> Counts:
    """Runs a decode step over a quantized weight; returns what each kernel moved."""
    torch.manual_seed(0)
    m, k, n, r, adapters = step
    chip = Chip("sm_90", _SMS_OF_4096 * n // 4096)
    weight = make_quantized_weight(kind, torch.randn(n, k).half())
    codes, absmax, *tables = weight.data_tensors
    named = {"codes": [codes], "absmax": [absmax], "tables": [*tables, weight.quantized_data.parts]}
    with torch.no_grad():
        if adapters == 1:
            x, lora_a, lora_b = (torch.randn(size).half() for size in ((m, k), (r, k), (n, r)))
            operands = LayerAdapterOperands([lora_a], [lora_b], [None], torch.tensor([0.5]), (0.0,))
            counter = ByteCounter(x=[x], lora_a=[lora_a], lora_b=[lora_b], **named)
            with on(chip), counter:
                y, s = BACKENDS["triton"].forward(x, Base(weight), operands, None, None, "auto")
            counter.register("s", s)
        else:
            ids, ranks = [row % adapters for row in range(m)], [[r] * adapters]
            problem = MixedProblem(Lab(), ids, ranks, k, [n], HALF)
            factors, rows = problem.factors[0], problem.rows()
            counter = ByteCounter(
                x=[problem.x],
                lora_a=[own.lora_a for own in factors],
                lora_b=[own.lora_b for own in factors],
                bias=problem.biases,
                **named,
            )
            with on(chip), counter:
                read = weight_for_kernels(weight, problem.x, r, "auto")
                (y,) = forward.linear_at(
                    *(problem.x, read, problem.biases[0], rows, None, problem.all_tables),
                    *(0, r, HALF, "auto"),
                )
    counter.register("y", y)
    return {f"{stem} of {kind}": found for stem, found in stems(counter).items()}


def moved(counted: Counts) -> int:
    """Bytes of every load and store, but of `AGAIN`'s those of its first one in each kernel."""
    return sum(
        traffic.distinct if name in AGAIN else traffic.issued
        for found in counted.values()
        for side in (found.loads, found.stores)
        for name, traffic in side.items()
    )


def floor_of_decode(step: Step, scales: int) -> int:
    """Returns what cannot be avoided: codes, scales, factors of adapters with rows, x and y.

    Args:
        step: Its sizes.
        scales: Bytes of all scales.
    """
    m, k, n, r, adapters = step
    return n * k // 2 + scales + 2 * min(m, adapters) * r * (k + n) + 2 * m * (k + n)
