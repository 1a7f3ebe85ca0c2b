"""Bytes of a mixed batch's backward, counted: near the design's floor with 1 and 4 adapters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.env import triton_interpreted

pytest.importorskip("triton", reason="triton is not installed")
if not triton_interpreted():
    pytest.skip("bytes are counted with TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl  # noqa: E402

from fastlora.kernels import configs  # noqa: E402
from fastlora.kernels.configs import Chip, cdiv  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from byte_counter import ByteCounter  # noqa: E402
from mixed_grad_problem import OPS, GradProblem  # noqa: E402

# A step of the linears at a quarter of each size, on a sixteenth of an H100: as many tiles
# for each processor and as many planes for each byte of an activation as at full size.
QUARTER_H100 = Chip("sm_90", 132 // 16)
# M, K, N, R
STEPS = [(512, 512, 512, 16), (256, 1024, 256, 16), (256, 256, 1024, 64)]
E, F = 2, 4  # bytes of fp16 activations, and of the fp32 masters of the factors
LAUNCHES = {
    "_mixed_lora_grad_b_kernel": 1,
    "_mixed_lora_grad_reduce_kernel": 2,
    "_mixed_lora_linear_kernel": 1,
    "_mixed_lora_grad_a_kernel": 1,
}


@pytest.fixture
def quarter_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "chip_of", lambda device: QUARTER_H100)
    # Programmatic dependent launch: the interpreter has no order of launches to relax.
    for name in ("gdc_wait", "gdc_launch_dependents"):
        monkeypatch.setattr(tl.extra.cuda, name, lambda: None)


def counted(lab: Any, m: int, k: int, n: int, r: int, adapters: int) -> ByteCounter:
    """Counts one backward of a fused step, rows in turn to each adapter, fp32 masters."""
    torch.manual_seed(0)
    problem = GradProblem(
        lab,
        [row % adapters for row in range(m)],
        n,
        k,
        torch.float16,
        torch.float32,
        ranks=(r,) * adapters,
        biased=(),
    )
    groups, s = problem.groups, lab.rand(m, max(r, 16), dtype=torch.float16)
    b = problem.grad_b_arguments(s)
    a = problem.grad_a_arguments(s)
    with ByteCounter(
        x=[problem.x],
        dy=[problem.dy],
        weight=[problem.weight],
        s=[s],
        lora_a=problem.lora_a,
        lora_b=problem.lora_b,
        routing=[groups.order, groups.segment_of, groups.segment_slot, groups.slot_start],
    ) as counter:
        ds, packed_b = OPS.mixed_lora_grad_b(*b)
        dx = OPS.mixed_lora_grad_x(*problem.grad_x_arguments(ds, "fused"))
        packed_a = OPS.mixed_lora_grad_a(a[0], ds.unsqueeze(0), *a[2:])
    for name, tensor in (("ds", ds), ("d_lora_b", packed_b), ("dx", dx), ("d_lora_a", packed_a)):
        counter.register(name, tensor)
    return counter


def planes_floor(m: int, k: int, n: int, adapters: int) -> int:
    """Elements a rank row of the fewest planes that give three of four processors a program.

    Grids know sizes and not the mix, so parts are those of one adapter: for `mixed_lora_grad_b`,
    whose every program reduces over rows and columns, parts of both; for `mixed_lora_grad_a` of the
    rows, beside columns of 128. And every adapter has a plane of its own.
    """
    programs = cdiv(3 * QUARTER_H100.num_sms, 4)

    def parts(columns: int) -> tuple[int, int]:
        rows = cdiv(programs, columns)
        return (columns * m if columns > 1 else 0) + rows * n, rows

    grad_b, rows_b = min(parts(columns) for columns in range(1, programs + 1))
    rows_a = cdiv(programs, cdiv(k, 128))
    return grad_b + max(adapters - rows_b, 0) * n + max(rows_a, adapters) * k


def floor(m: int, k: int, n: int, r: int, adapters: int) -> int:
    """The design's floor of a backward: its GEMM's bytes, and what nobody can avoid.

    That is every adapter's factors and gradients, s read, ds written and read twice, and the
    fewest planes, written and read.
    """
    gemm = E * (2 * m * n + 2 * m * k + n * k)
    factors = 2 * F * adapters * r * (k + n)
    return gemm + factors + E * m * r * (1 + 3) + 2 * 4 * r * planes_floor(m, k, n, adapters)


@pytest.mark.parametrize("adapters", [1, 4])
@pytest.mark.parametrize(("m", "k", "n", "r"), STEPS)
def test_a_backward_moves_at_most_a_tenth_above_the_floor(
    lab: Any, quarter_h100: None, m: int, k: int, n: int, r: int, adapters: int
) -> None:
    counter = counted(lab, m, k, n, r, adapters)
    kernels = counter.kernels
    assert {name: kernel.launches for name, kernel in kernels.items()} == LAUNCHES
    least = floor(m, k, n, r, adapters)
    assert counter.total.distinct <= 1.1 * least
    # One read of dy, one of x, and of each factor where it is used.
    first, dx = kernels["_mixed_lora_grad_b_kernel"], kernels["_mixed_lora_linear_kernel"]
    last = kernels["_mixed_lora_grad_a_kernel"]
    assert first.loads["dy"] == (E * m * n, E * m * n)
    assert last.loads["x"] == (E * m * k, E * m * k)
    assert first.loads["lora_b"].distinct == F * adapters * r * n
    assert dx.loads["lora_a"].distinct == F * adapters * r * k
    assert dx.loads["dy"].distinct == E * m * n
    assert dx.loads["weight"].distinct == E * n * k
    # Gradients are written once, ds too.
    reduce = kernels["_mixed_lora_grad_reduce_kernel"]
    assert reduce.stores["d_lora_b"] == (F * adapters * r * n,) * 2
    assert reduce.stores["d_lora_a"] == (F * adapters * r * k,) * 2
    assert reduce.stores["ds"] == (E * m * r, E * m * r)
