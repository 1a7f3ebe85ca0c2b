"""Counts what a mixed batch's kernels move, one by one, in Triton's interpreter.

Those of a forward, as plan "fused" and as plan "split" and at decode in place, with DoRA's scales,
and of a backward.

``TRITON_INTERPRET=1 python -m tests.support.bytes.count_mixed_bytes --write`` writes
`docs/mixed_kernel_bytes.csv`; without ``--write`` it prints the rows. ``touched`` bytes must come
from memory, ``issued`` ones are what the L2 cache must serve.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
import triton.language as tl

from fastlora.kernels import chips
from fastlora.kernels.chips import Chip
from fastlora.kernels.configs import cdiv, choose, run_rows
from fastlora.ops import schema  # noqa: F401 - registers operators
from fastlora.ops.layout import planes_shape
from tests.support.bytes import mixed_byte_forms
from tests.support.bytes.byte_counter import ByteCounter, KernelCount
from tests.support.bytes.byte_forms import Form
from tests.support.kernels.mixed_grad_problem import OPS, GradProblem
from tests.support.kernels.mixed_problem import MixedProblem

TABLE = Path(__file__).parents[3] / "docs" / "mixed_kernel_bytes.csv"
COLUMNS = ("m", "k", "n", "r", "adapters", "kernel", "launches", "touched", "issued",
           "issued_over_touched")  # fmt: skip
# Linears of 2048, 1024 and 4096 at a quarter of each size, on a sixteenth of an H100: as many tiles
# for each processor, and as many bytes of planes for each of an activation, as at full size.
H100 = Chip("sm_90", 132)
QUARTER = Chip("sm_90", 132 // 16)
# M, K, N, R
STEPS = [(512, 512, 512, 16), (256, 1024, 256, 16), (256, 256, 1024, 64)]
ADAPTERS = (1, 4)
DECODE = 64  # rows of `mixed_lora_add`, which is one launch at decode only
E, F = 2, 4  # bytes of fp16 activations, and of the fp32 masters of the factors


class _Cpu:
    """Where the problem's tensors are made."""

    device = torch.device("cpu")

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    def poisoned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)


def count_forward(m: int, k: int, n: int, r: int, adapters: int) -> dict[str, KernelCount]:
    """Counts each kernel of a forward once, rows in turn to each adapter, fp32 factors.

    `mixed_lora_add` for `DECODE` rows, the others for ``m``. All adapters use DoRA.
    """
    torch.manual_seed(0)
    many, few = (_forward_problem(rows, k, n, r, adapters) for rows in (m, DECODE))
    counted: dict[str, KernelCount] = {}
    for problem, decode in ((many, False), (few, True)):
        order, segment_of, segment_slot, _, pieces = rows = problem.rows()
        tables, y = problem.all_tables, torch.zeros(problem.m, n).half()
        factors, kind = problem.factors[0], torch.float32
        scales = [torch.ones(n) for _ in factors]
        scale_address = torch.tensor([[scale.data_ptr() for scale in scales]])
        counter = ByteCounter(
            x=[problem.x],
            weight=problem.weights,
            lora_a=[own.lora_a for own in factors],
            lora_b=[own.lora_b for own in factors],
            scales=scales,
            bias=problem.biases,
            routing=[
                *(order, segment_of, segment_slot, pieces, *tables),
                scale_address,
            ],
        )
        with (
            mock.patch.object(chips, "chip_of", lambda device: QUARTER),
            # Programmatic dependent launch: the interpreter has no order of launches to relax.
            mock.patch.object(tl.extra.cuda, "gdc_wait", lambda: None),
            mock.patch.object(tl.extra.cuda, "gdc_launch_dependents", lambda: None),
            counter,
        ):
            if decode:
                OPS.lora_add_at_(y, problem.x, rows, tables, 0, r, kind, "triton")
                made = [y]
            else:
                s = OPS.lora_shrink_at(problem.x, rows, tables, r, kind, False)
                counter.register("s", s)
                made = [
                    OPS.lora_linear_at(
                        problem.x, problem.weights[0], None, rows, s, tables, 0, r, kind, plan
                    )
                    for plan in ("fused", "split")
                ]
                OPS.lora_scale_(made[1], problem.biases[0], rows, scale_address, 0, "triton")
        counter.register("y", *made)
        counted |= counter.kernels
    return {stem_of(name): count for name, count in counted.items()}


def _forward_problem(rows: int, k: int, n: int, r: int, adapters: int) -> MixedProblem:
    ids = [row % adapters for row in range(rows)]
    return MixedProblem(_Cpu(), ids, [[r] * adapters], k, [n], torch.float16, torch.float32)


def forms_of_forward(m: int, k: int, n: int, r: int, adapters: int) -> dict[str, Form]:
    """Returns what `count_forward` must find, all but the tables' and the routing's bytes."""
    half = torch.float16
    splits = planes_shape(m, k, 1, r)[0]
    shrink = choose(QUARTER, "mixed_lora_shrink", half, m=m, r=r)
    linear = choose(QUARTER, "mixed_lora_linear", half, m=m, n=n)
    expand, add = (
        choose(QUARTER, "mixed_lora_expand", half, m=m, n=n),
        choose(QUARTER, "mixed_lora_add", half),
    )
    scale = choose(QUARTER, "mixed_dora_scale", half, m=m, n=n)
    return {
        "mixed_lora_shrink": mixed_byte_forms.shrink(m, k, r, adapters, E, F, splits, shrink),
        "mixed_lora_linear": mixed_byte_forms.linear(m, n, k, r, adapters, E, F, splits, linear),
        "mixed_lora_expand": mixed_byte_forms.expand(m, n, r, adapters, E, F, splits, expand),
        "mixed_dora_scale": mixed_byte_forms.scale(m, n, adapters, E, scale),
        "mixed_lora_add": mixed_byte_forms.add(DECODE, n, k, r, adapters, E, F, add),
    }


def stem_of(kernel: str) -> str:
    """Returns an operation's name without what its kernel adds."""
    return kernel.removeprefix("_").removesuffix("_kernel")


def count_backward(m: int, k: int, n: int, r: int, adapters: int) -> ByteCounter:
    """Counts one backward of a fused step, rows in turn to each adapter, fp32 masters."""
    torch.manual_seed(0)
    problem = GradProblem(
        _Cpu(),
        [row % adapters for row in range(m)],
        n,
        k,
        torch.float16,
        torch.float32,
        ranks=(r,) * adapters,
        biased=(),
    )
    groups, s = problem.groups, torch.randn(m, max(r, 16)).half()
    with mock.patch.object(chips, "chip_of", lambda device: QUARTER):
        b, a = problem.grad_b_arguments(s), problem.grad_a_arguments(s)
    counter = ByteCounter(
        x=[problem.x],
        dy=[problem.dy],
        weight=[problem.weight],
        s=[s],
        lora_a=problem.lora_a,
        lora_b=problem.lora_b,
        routing=[groups.order, groups.segment_of, groups.segment_slot, groups.slot_start],
    )
    with (
        mock.patch.object(chips, "chip_of", lambda device: QUARTER),
        # Programmatic dependent launch: the interpreter has no order of launches to relax.
        mock.patch.object(tl.extra.cuda, "gdc_wait", lambda: None),
        mock.patch.object(tl.extra.cuda, "gdc_launch_dependents", lambda: None),
        counter,
    ):
        ds, packed_b, _ = OPS.lora_grad_b(*b)
        dx = OPS.lora_grad_x(*problem.grad_x_arguments(ds, "fused"))
        (packed_a,) = OPS.lora_grad_a(a[0], [ds], *a[2:])
    for name, tensor in (("ds", ds), ("d_lora_b", packed_b), ("dx", dx), ("d_lora_a", packed_a)):
        counter.register(name, tensor)
    return counter


def planes_floor(m: int, k: int, n: int, adapters: int, chip: Chip) -> int:
    """Elements a rank row of the fewest planes that give three of four processors a program.

    Grids know sizes and not the mix, so parts are those of one adapter: for `mixed_lora_grad_b`,
    whose every program reduces over rows and columns, parts of both; for `mixed_lora_grad_a` of the
    rows, beside columns of 128. And every adapter has a plane of its own.
    """
    programs = cdiv(3 * chip.num_sms, 4)

    def parts(columns: int) -> tuple[int, int]:
        rows = cdiv(programs, columns)
        return (columns * m if columns > 1 else 0) + rows * n, rows

    grad_b, rows_b = min(parts(columns) for columns in range(1, programs + 1))
    rows_a = cdiv(programs, cdiv(k, 128))
    return grad_b + max(adapters - rows_b, 0) * n + max(rows_a, adapters) * k


def floor(m: int, k: int, n: int, r: int, adapters: int, chip: Chip = QUARTER) -> int:
    """The design's floor of a backward: its GEMM's bytes, and what nobody can avoid.

    That is every adapter's factors and gradients, s read, ds written and read twice, and the
    fewest planes, written and read.
    """
    gemm = E * (2 * m * n + 2 * m * k + n * k)
    factors = 2 * F * adapters * r * (k + n)
    planes = planes_floor(m, k, n, adapters, chip)
    return gemm + factors + E * m * r * (1 + 3) + 2 * 4 * r * planes


def closed_form(m: int, k: int, n: int, r: int, adapters: int, chip: Chip) -> tuple[int, int]:
    """Bytes that the five launches touch and issue, all but the tables' and the routing's.

    From shapes and tiles alone, for adapters with as many rows each.
    """
    half = torch.float16
    config_b, config_a = (
        choose(chip, "mixed_lora_grad_b", half, r=r),
        choose(chip, "mixed_lora_grad_a", half, r=r),
    )
    config_x = choose(chip, "mixed_lora_grad_x", half, m=m, k=k)
    tiles_n, tiles_k = cdiv(n, config_b.block_n), cdiv(k, config_a.block_k)
    # An adapter's rows and a run's meet in as many pieces as there are planes.
    share = m // adapters
    pieces = [
        len({(row // rows, row // share) for row in range(m)})
        for rows in (
            run_rows(chip, m, tiles_n, config_b.block_m),
            run_rows(chip, m, tiles_k, config_a.block_m),
        )
    ]
    ds_planes, b_planes = 4 * tiles_n * m * r, 4 * pieces[0] * n * r
    a_planes, own_b, own_a = 4 * pieces[1] * r * k, F * adapters * r * n, F * adapters * r * k
    s, dy, x, weight = E * m * r, E * m * n, E * m * k, E * n * k
    # Written and read, planes twice: by the first stage and by the second.
    touched = dy + s + own_b + ds_planes + b_planes + (ds_planes + b_planes + s + own_b)
    touched += dy + weight + s + own_a + x + (x + s + a_planes) + (a_planes + own_a)
    issued = dy + s * tiles_n + F * r * n * pieces[0] + ds_planes + b_planes
    issued += ds_planes + b_planes + s + own_b
    tiles_m, tiles_x = cdiv(m, config_x.block_m), cdiv(k, config_x.block_n)
    held = len({(row // config_x.block_m, row // share) for row in range(m)})
    issued += dy * tiles_x + weight * tiles_m + s * tiles_x + F * r * k * held + x
    issued += x + s * tiles_k + a_planes + a_planes + own_a
    return touched, issued


def count_all(m: int, k: int, n: int, r: int, adapters: int) -> dict[str, KernelCount]:
    """Counts of the forward's kernels, and of the backward's."""
    backward = backward_by_stem(count_backward(m, k, n, r, adapters))
    return {**count_forward(m, k, n, r, adapters), **backward}


def backward_by_stem(counter: ByteCounter) -> dict[str, KernelCount]:
    """A backward's counts by operation; the linear kernel makes dx there."""
    renamed = {"mixed_lora_linear": "mixed_lora_grad_x"}
    stems = {stem_of(name): count for name, count in counter.kernels.items()}
    return {renamed.get(stem, stem): count for stem, count in stems.items()}


def rows_of_table(
    sizes: tuple[int, ...], adapters: int, counted: dict[str, KernelCount]
) -> list[dict[str, str]]:
    """Returns one row for each kernel: how often a touched byte is asked for."""
    rows = []
    for stem, count in counted.items():
        m = DECODE if stem == "mixed_lora_add" else sizes[0]
        ratio = f"{count.issued / count.distinct:.2f}"
        values = (m, *sizes[1:], adapters, stem, count.launches, count.distinct, count.issued)
        rows.append(dict(zip(COLUMNS, map(str, (*values, ratio)), strict=True)))
    return rows


def main(arguments: Sequence[str]) -> int:
    """Counts, and prints the rows or writes the table."""
    rows = [
        row
        for sizes in STEPS
        for adapters in ADAPTERS
        for row in rows_of_table(sizes, adapters, count_all(*sizes, adapters))
    ]
    with TABLE.open("w", newline="") if "--write" in arguments else sys.stdout as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
