"""Mixed batches, counted: adapters add their own factors' bytes; the base GEMM stays the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from fastlora.env import triton_interpreted

pytest.importorskip("triton", reason="triton is not installed")
if not triton_interpreted():
    pytest.skip("bytes are counted with TRITON_INTERPRET=1", allow_module_level=True)

from fastlora.kernels.chips import chip_of
from fastlora.kernels.configs import cdiv, choose
from fastlora.ops import schema  # noqa: F401 - registers operators
from tests.support.bytes.byte_counter import ELSEWHERE, ByteCounter, KernelCount, Traffic
from tests.support.kernels.mixed_problem import MixedProblem

RANKS = (8, 16, 64)
SLOTS = 64
# Off the tiles, so that a tile is counted whole and its bytes are not.
K, N = 72, 88
# Of each adapter that has rows: addresses of A, B and the bias, rank and scaling.
TABLE_BYTES = 8 + 8 + 8 + 4 + 4
NOTHING = Traffic(0, 0)


def rank_of(slot: int) -> int:
    """The rank of a slot's adapter; 0 for rows without one."""
    return RANKS[slot % 3] if slot >= 0 else 0


def batch(active: int, m: int) -> list[int]:
    """Rows in turn to no adapter and to each of the first ``active`` slots."""
    return [row % (active + 1) - 1 for row in range(m)]


class Counted(NamedTuple):
    """What one linear did: by kernel, and distinct bytes of each adapter's factors in all."""

    kernels: dict[str, KernelCount]
    images: list[int]

    def kernel(self, word: str) -> KernelCount:
        """The count of the kernel whose name has the word."""
        (found,) = (kernel for name, kernel in self.kernels.items() if word in name)
        return found


def count(lab: Any, active: int, m: int, dtype: torch.dtype, plan: str) -> Counted:
    """Runs one linear over 64 adapters of ranks 8, 16 and 64, of which ``active`` have rows."""
    torch.manual_seed(0)
    ranks = [[rank_of(slot) for slot in range(SLOTS)]]
    problem = MixedProblem(lab, batch(active, m), ranks, K, [N], dtype)
    order, segment_of, segment_slot, _, pieces = rows = problem.rows()
    tables = problem.all_tables
    images = {f"image{slot}": [image] for slot, image in enumerate(problem.images)}
    with ByteCounter(
        x=[problem.x],
        weight=[problem.weights[0]],
        bias=[problem.biases[0]],
        tables=tables,
        routing=[order, segment_of, segment_slot, pieces],
        **images,
    ) as counter:
        y = torch.ops.fastlora.lora_linear_at(
            *(problem.x, problem.weights[0], problem.biases[0], rows, None, tables),
            *(0, problem.max_rank, dtype, plan),
        )
    counter.register("y", y)
    problem.check(y)
    kernels = counter.kernels
    found = [
        sum(kernel.loads.get(f"image{slot}", NOTHING).distinct for kernel in kernels.values())
        for slot in range(SLOTS)
    ]
    return Counted(kernels, found)


def factors_issued(kernel: KernelCount) -> int:
    """Bytes of factors that a kernel issued."""
    return sum(traffic.issued for name, traffic in kernel.loads.items() if "image" in name)


def tiles(ids: list[int], block_m: int) -> Iterator[list[int]]:
    """The slots of each tile of sorted positions, each slot once."""
    positions = sorted(ids)
    for start in range(0, len(ids), block_m):
        yield sorted(set(positions[start : start + block_m]))


class Shrink:
    """What a shrink must do for these rows, in closed form."""

    def __init__(self, ids: list[int], dtype: torch.dtype) -> None:
        config = choose(
            chip_of(torch.device("cpu")), "mixed_lora_shrink", dtype, m=len(ids), r=max(RANKS)
        )
        held = [slot for slot in ids if slot >= 0]
        # A piece holds rows of one adapter and lies in one tile.
        pieces = [slot for tile in tiles(ids, config.block_m) for slot in tile if slot >= 0]
        turns = {
            r: 1 if r <= config.narrow_r else cdiv(r, config.block_r) for r in RANKS
        }  # blocks of columns, each of which reads x once
        width = {r: config.narrow_r if r <= config.narrow_r else config.block_r for r in RANKS}
        whole_k = cdiv(K, config.block_k) * config.block_k
        self.flops = sum(
            2 * config.block_m * turns[r] * width[r] * whole_k for r in map(rank_of, pieces)
        )
        size = dtype.itemsize
        self.x = Traffic(
            len(held) * K * size, sum(turns[rank_of(slot)] for slot in held) * K * size
        )
        self.factors = sum(map(rank_of, pieces)) * K * size
        self.s = sum(map(rank_of, held)) * 4


class RankRows:
    """What adding the rank rows to tiles of y must do, in closed form."""

    def __init__(self, ids: list[int], dtype: torch.dtype, config: Any) -> None:
        self.tiles_n = cdiv(N, config.block_n)
        shown = [[rank_of(slot) for slot in tile] for tile in tiles(ids, config.block_m)]
        self.tiles_m = len(shown)
        # An adapter's columns come in blocks of 16, those of a tile's adapters side by side.
        blocks = [sum(cdiv(r, 16) for r in tile) for tile in shown]
        chunks = sum(cdiv(16 * many, config.block_r) for many in blocks)
        one = 2 * config.block_m * config.block_n * config.block_r
        self.flops = chunks * self.tiles_n * one
        self.factors = sum(map(sum, shown)) * N * dtype.itemsize
        s = sum(map(rank_of, ids)) * 4
        self.s = Traffic(s, s * self.tiles_n)


def check_shrink(kernel: KernelCount, ids: list[int], dtype: torch.dtype) -> None:
    """x of the rows with an adapter, each factor once a piece, and s."""
    expected = Shrink(ids, dtype)
    assert kernel.flops == expected.flops
    assert kernel.loads.get("x", NOTHING) == expected.x
    assert factors_issued(kernel) == expected.factors
    assert kernel.stores.get(ELSEWHERE, NOTHING) == Traffic(expected.s, expected.s)


def check_linear(kernel: KernelCount, ids: list[int], dtype: torch.dtype) -> None:
    """The base GEMM as it is without adapters, then each factor once a tile of rows."""
    config = choose(chip_of(torch.device("cpu")), "mixed_lora_linear", dtype, m=len(ids), n=N)
    added, size, m = RankRows(ids, dtype, config), dtype.itemsize, len(ids)
    tile = config.block_m * config.block_n * cdiv(K, config.block_k) * config.block_k
    base_flops = 2 * added.tiles_m * added.tiles_n * tile
    assert kernel.flops - base_flops == added.flops
    assert kernel.loads["x"] == Traffic(m * K * size, m * K * size * added.tiles_n)
    assert kernel.loads["weight"] == Traffic(N * K * size, N * K * size * added.tiles_m)
    assert kernel.loads["bias"] == Traffic(N * size, N * size * added.tiles_m)
    assert kernel.stores == {"y": Traffic(m * N * size, m * N * size)}
    assert factors_issued(kernel) == added.factors
    assert kernel.loads.get(ELSEWHERE, NOTHING) == added.s


def check_expand(kernel: KernelCount, ids: list[int], dtype: torch.dtype) -> None:
    """y of the rows with an adapter, read and written, and each factor once a tile of rows."""
    config = choose(chip_of(torch.device("cpu")), "mixed_lora_expand", dtype, m=len(ids), n=N)
    added = RankRows(ids, dtype, config)
    assert kernel.flops == added.flops
    y = sum(slot >= 0 for slot in ids) * N * dtype.itemsize
    assert kernel.loads.get("y", NOTHING) == Traffic(y, y)
    assert kernel.stores.get("y", NOTHING) == Traffic(y, y)
    assert factors_issued(kernel) == added.factors
    assert kernel.loads.get(ELSEWHERE, NOTHING) == added.s


@pytest.mark.parametrize(("m", "plan"), [(72, "fused"), (200, "fused"), (200, "split")])
def test_adapters_add_their_own_bytes_and_flops(
    lab: Any, dtype: torch.dtype, m: int, plan: str
) -> None:
    """Decode and prefill; no adapter, 1, 3 and 64 of ranks 8, 16 and 64; base rows in each batch.

    Every count in closed form. So FLOPs, and issued bytes of x, W and y, of the base GEMM are the
    same at 1 and at 64 adapters, and without any.
    """
    counted = {active: count(lab, active, m, dtype, plan) for active in (0, 1, 3, 64)}
    for active, many in counted.items():
        ids = batch(active, m)
        for slot, touched in enumerate(many.images):
            own = rank_of(slot) * (K + N) * dtype.itemsize if slot < active else 0
            assert touched == own, f"adapter {slot} of {active}"
        check_shrink(many.kernel("shrink"), ids, dtype)
        if plan == "fused":
            check_linear(many.kernel("linear"), ids, dtype)
        else:
            check_expand(many.kernel("expand"), ids, dtype)
    grids = [{name: k.grids for name, k in many.kernels.items()} for many in counted.values()]
    assert all(len(shown) == 2 and shown == grids[0] for shown in grids)
    # Beside factors, only what says where they are: tables by adapter, routing by segment, and in
    # the shrink by row.
    for few, many in itertools.pairwise(counted):
        more = many - few
        rows = sum(slot >= 0 for slot in batch(many, m)) - sum(s >= 0 for s in batch(few, m))
        for name, most in (("tables", TABLE_BYTES * more), ("routing", 8 * more * 2 + 4 * rows)):
            before, after = (
                sum(k.loads.get(name, NOTHING).distinct for k in counted[n].kernels.values())
                for n in (few, many)
            )
            assert after - before <= most, name
