"""Mixed batches, counted: adapters add their own factors' bytes; the base GEMM stays the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastlora.env import triton_interpreted

pytest.importorskip("triton", reason="triton is not installed")
if not triton_interpreted():
    pytest.skip("bytes are counted with TRITON_INTERPRET=1", allow_module_level=True)

from fastlora import mixed_ops  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from byte_counter import ELSEWHERE, ByteCounter, KernelCount, Traffic  # noqa: E402
from mixed_problem import MixedProblem  # noqa: E402

RANKS = (8, 16, 64)
K, N = 64, 96
# Addresses of A, B and the bias, rank and scaling, read for the adapters that have rows.
TABLE_BYTES = 8 + 8 + 8 + 4 + 4


class Counted(NamedTuple):
    """What one linear touched: ``distinct`` and ``issued`` bytes by tensor, FLOPs, grids."""

    kernels: dict[str, KernelCount]
    images: list[int]
    distinct: dict[str, int]


def batch(active: int, m: int) -> list[int]:
    """Rows in turn to the first ``active`` slots, every rank as many; base rows where it is 0."""
    return [row % active if active else -1 for row in range(m)]


def count(lab: Any, active: int, m: int, dtype: torch.dtype, plan: str) -> Counted:
    """Runs one linear over 48 adapters of ranks 8, 16 and 64, of which ``active`` have rows."""
    torch.manual_seed(0)
    slots = 48
    problem = MixedProblem(
        lab, batch(active, m), [[RANKS[slot % 3] for slot in range(slots)]], K, [N], dtype
    )
    pieces = mixed_ops.pieces_of(problem.groups)
    tables = (problem.lora_a_address, problem.lora_b_address, problem.rank, problem.scaling)
    images = {f"image{slot}": [image] for slot, image in enumerate(problem.images)}
    with ByteCounter(
        x=[problem.x],
        weight=[problem.weights[0]],
        bias=[problem.biases[0]],
        tables=list(tables),
        routing=[*problem.route, pieces],
        **images,
    ) as counter:
        y = torch.ops.fastlora.mixed_lora_linear(
            problem.x,
            problem.weights[0],
            problem.biases[0],
            *problem.route,
            pieces,
            None,
            *tables[:2],
            None,
            *tables[2:],
            0,
            problem.max_rank,
            dtype,
            plan,
        )
    counter.register("y", y)
    problem.check(y)
    kernels = counter.kernels
    distinct: dict[str, int] = {}
    for kernel in kernels.values():
        for side in (kernel.loads, kernel.stores):
            for name, traffic in side.items():
                distinct[name] = distinct.get(name, 0) + traffic.distinct
    found = [distinct.pop(f"image{slot}", 0) for slot in range(slots)]
    return Counted(kernels, found, distinct)


@pytest.mark.parametrize(("m", "plan"), [(48, "fused"), (192, "fused"), (192, "split")])
def test_bytes_grow_by_the_adapters_own_factors(
    lab: Any, dtype: torch.dtype, m: int, plan: str
) -> None:
    """Decode and prefill, ranks 8, 16 and 64 in one batch: 3, 12 and 48 adapters."""
    counted = {active: count(lab, active, m, dtype, plan) for active in (3, 12, 48)}
    few = counted[3]
    for active, many in counted.items():
        for slot, touched in enumerate(many.images):
            own = RANKS[slot % 3] * (K + N) * dtype.itemsize if slot < active else 0
            assert touched == own, f"adapter {slot} of {active}"
        # Beside factors, only what says where they are: tables by adapter, routing by segment.
        launches = sum(kernel.launches for kernel in many.kernels.values())
        more = active - 3
        assert many.distinct["tables"] - few.distinct["tables"] <= more * TABLE_BYTES
        assert many.distinct["routing"] - few.distinct["routing"] <= 8 * more * launches
        for name in set(many.distinct) - {"tables", "routing"}:
            assert many.distinct[name] == few.distinct[name], name
        assert set(many.distinct) == set(few.distinct)


def base(kernel: KernelCount) -> tuple[Any, ...]:
    """What a linear kernel does for its base GEMM."""
    nothing = Traffic(0, 0)
    loads = (kernel.loads.get(name, nothing) for name in ("x", "weight", "bias"))
    return (*loads, kernel.stores.get("y", nothing), kernel.grids)


@pytest.mark.parametrize("m", [48, 192])
def test_the_base_gemm_does_not_depend_on_the_adapters(
    lab: Any, dtype: torch.dtype, m: int
) -> None:
    """FLOPs and issued bytes of x and W: the same at 1 and 48 adapters, and with base rows only."""
    found = {active: count(lab, active, m, dtype, "fused") for active in (0, 1, 48)}
    (name,) = (name for name in found[0].kernels if "linear" in name)
    none, one, many = (found[active].kernels[name] for active in (0, 1, 48))
    assert base(none) == base(one) == base(many)
    # Without adapters all FLOPs are the base's: whole tiles, each x row once for every tile of N.
    tiles_n = none.loads["x"].issued // none.loads["x"].distinct
    assert none.flops % (2 * K) == 0
    assert none.flops >= 2 * m * N * K
    assert tiles_n * none.loads["x"].distinct == none.loads["x"].issued
    assert none.flops < one.flops <= many.flops
    grids = {active: {n: k.grids for n, k in c.kernels.items()} for active, c in found.items()}
    assert grids[0] == grids[1] == grids[48]
    assert ELSEWHERE in one.loads  # the planes of s, which the operator made
