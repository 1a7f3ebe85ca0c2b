"""Counts what the kernels of a step move, one by one, in Triton's interpreter.

Of one adapter, those of a fused training step of one linear, and beside them the in-place expand,
dropout, and the sum of a split shrink that stands alone. Of a mixed batch, those of a forward, as
plan "fused" and as plan "split", with DoRA's scales, and of a backward. And decode over NF4
(`count_quantized.py`). The expands of prefill at full size, one adapter and mixed, are in closed
form (`rows_of_prefills`).

``TRITON_INTERPRET=1 python -m tests.support.bytes.count_bytes --write`` writes
`docs/kernel_bytes.csv`; without ``--write`` it prints the rows. ``touched`` bytes must come from
memory, ``issued`` ones are what the L2 cache must serve.
"""

from __future__ import annotations

import contextlib
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton.language as tl

from fastlora.bench import byte_forms
from fastlora.bench.byte_forms import ELSEWHERE, Batch, Form, Sizes
from fastlora.bench.launch_forms import together
from fastlora.kernels import chips
from fastlora.kernels.chips import Chip
from fastlora.kernels.config_tables import cdiv
from fastlora.kernels.configs import choose, reads_twice, run_rows, sums_s_once
from fastlora.ops.factors import address_tables_from_tensors
from fastlora.ops.layout import shrink_partials_shape
from fastlora.ops.triton.shrink import mixed_shrink_partials
from tests.support.bytes.byte_counter import ByteCounter, KernelCount
from tests.support.kernels.lab import Lab
from tests.support.kernels.mixed_grad_problem import GradProblem
from tests.support.kernels.mixed_problem import OPS, MixedProblem

TABLE = Path(__file__).parents[3] / "docs" / "kernel_bytes.csv"
COLUMNS = ("m", "k", "n", "r", "adapters", "kernel", "touched", "issued", "issued_over_touched")
HALF = torch.float16
# Linears of 2048, 1024 and 4096 at a quarter of each size, on a sixteenth of an H100: as many tiles
# for each processor, and as many bytes of planes for each of an activation, as at full size.
H100 = Chip("sm_90", 132)
QUARTER = Chip("sm_90", 132 // 16)
Counts = dict[str, KernelCount]
Forms = dict[str, Form]


class Step(NamedTuple):
    """A step of one linear: fp16 activations, fp32 masters of the factors.

    Attributes:
        m, k, n, r: Rows, columns of x, outputs, rank.
        adapters: How many a mixed batch has, to each of which rows go in turn; 0 for no mixed one.
    """

    m: int
    k: int
    n: int
    r: int
    adapters: int

    @property
    def sizes(self) -> Sizes:
        """As closed forms take them."""
        return Sizes(self.m, self.n, self.k, self.r)

    def batch(self) -> Batch:
        """Of a mixed batch."""
        ids = [row % self.adapters for row in range(self.m)]
        return Batch(ids, [self.r] * self.adapters, self.n, self.k)

    @property
    def quarter(self) -> Step:
        """A quarter of each size."""
        return Step(self.m // 4, self.k // 4, self.n // 4, self.r, self.adapters)


FULL_STEPS = [
    Step(*sizes, adapters)
    for sizes in ((2048, 2048, 2048, 16), (1024, 4096, 1024, 16), (1024, 1024, 4096, 64))
    for adapters in (0, 1, 4)
]
STEPS = [step.quarter for step in FULL_STEPS]


@contextlib.contextmanager
def on(chip: Chip) -> Iterator[None]:
    """Kernels are launched as on that chip."""
    with (
        mock.patch.object(chips, "chip_of", lambda device: chip),
        # Programmatic dependent launch: the interpreter has no order of launches to relax.
        mock.patch.object(tl.extra.cuda, "gdc_wait", lambda: None),
        mock.patch.object(tl.extra.cuda, "gdc_launch_dependents", lambda: None),
    ):
        yield


def stems(counter: ByteCounter, **renamed: str) -> Counts:
    """The counts by operation: names without what kernels add, some of them renamed."""
    found = {name[1 : -len("_kernel")]: count for name, count in counter.kernels.items()}
    return {renamed.get(stem, stem): count for stem, count in found.items()}


def count_one(step: Step) -> Counts:
    """Runs every kernel of one adapter."""
    m, k, n, r, _ = step
    x, weight, y = (torch.randn(shape).half() for shape in ((m, k), (n, k), (m, n)))
    lora_a, lora_b, dy = torch.randn(r, k), torch.randn(n, r), torch.randn(m, n).half()
    scaling, seed = torch.tensor(0.5), torch.tensor([7])
    with on(QUARTER):
        with ByteCounter() as forward:
            factors = [lora_a, lora_b, None]
            _, s = OPS.lora_linear(
                x, weight, None, [], None, factors, scaling, None, [0.0], "triton", "fused"
            )
        with ByteCounter() as backward:
            ds, _, _ = OPS.lora_grad_b(dy, s, [], 0, [lora_b], [False], scaling, True, "triton")
        with ByteCounter() as d_input:
            OPS.lora_grad_x(dy, weight, ds, [], [lora_a], None, [0.0], "triton", "fused")
        with ByteCounter() as d_factor:
            OPS.lora_grad_a(x, [ds], [], 0, [lora_a], None, [0.0], "triton")
        with ByteCounter() as others:
            OPS.lora_expand_(y, s, [], [lora_b], [None], scaling, "triton")
            OPS.lora_dropout(x, seed, 0.5)
            OPS.lora_shrink(x, [], [lora_a], 1, None, [0.0], "triton")
    return {
        **stems(others, plane_sums="plane_sums of lora_shrink"),
        **stems(forward),
        **stems(backward, plane_sums="plane_sums of lora_grad_b"),
        **stems(d_input, lora_linear="lora_grad_x"),
        **stems(d_factor, plane_sums="plane_sums of lora_grad_a"),
    }


def forms_of_one(step: Step, chip: Chip) -> Forms:
    """Returns what `count_one` must find, from the shapes and the tiles of the chosen configs."""
    m, k, n, r, _ = step
    sizes = step.sizes
    shrink = choose(chip, "lora_shrink", HALF, m=m, k=k, r=r)
    linear = choose(chip, "lora_linear", HALF, m=m, n=n, k=k, r=r)
    grad_b = choose(chip, "lora_grad_b", HALF, m=m, n=n, r=r)
    grad_x = choose(chip, "lora_grad_x", HALF, m=m, k=k, r=r)
    grad_a = choose(chip, "lora_grad_a", HALF, m=m, k=k, r=r, group_size=1)
    expand = choose(chip, "lora_expand", HALF, m=m, n=n, r=r)
    twice = reads_twice(grad_b, m, n, r, sizes.e)
    forms = {
        "lora_expand": byte_forms.expand(sizes, expand),
        "lora_dropout": byte_forms.dropout(sizes, choose(chip, "lora_dropout", HALF, m=m, k=k)),
        "lora_shrink": byte_forms.shrink(sizes, shrink),
        "lora_linear": byte_forms.linear(sizes, linear, shrink.splits),
        "lora_grad_b": byte_forms.grad_b(sizes, grad_b, with_ds=not twice),
        "lora_grad_x": byte_forms.grad_x(sizes, grad_x),
        "lora_grad_a": byte_forms.grad_a(sizes, grad_a),
    }
    planes = {
        "lora_shrink": [(m * r, shrink.splits, sizes.e)],
        "lora_grad_b": [
            (m * r, 1 if twice else cdiv(n, grad_b.block_n), sizes.e),
            (n * r, grad_b.splits, sizes.f),
        ],
        "lora_grad_a": [(r * k, grad_a.splits, sizes.f)],
    }
    for stem, outs in planes.items():
        if summed := [out for out in outs if out[1] > 1]:
            forms[f"plane_sums of {stem}"] = byte_forms.plane_sums(summed)
    return forms


def count_forward(problem: MixedProblem, chip: Chip) -> Counts:
    """Runs every kernel of a mixed batch's forward once; all adapters use DoRA."""
    order, segment_of, segment_slot, _, pieces = rows = problem.rows()
    tables = problem.all_tables
    factors, kind, r = problem.factors[0], problem.factor_dtype, problem.max_rank
    scales = [torch.ones(problem.ns[0]) for _ in factors]
    address = torch.tensor([[scale.data_ptr() for scale in scales]])
    counter = ByteCounter(
        x=[problem.x],
        weight=problem.weights,
        lora_a=[own.lora_a for own in factors],
        lora_b=[own.lora_b for own in factors],
        scales=scales,
        bias=problem.biases,
        tables=[*tables, address],
        routing=[order, segment_of, segment_slot, pieces],
    )
    with on(chip), counter:
        s = mixed_shrink_partials(
            problem.x, rows, address_tables_from_tensors(tables, r, kind), slice(0, 1)
        )
        counter.register("s", s)
        base = problem.x, problem.weights[0], problem.biases[0], rows, s, tables, 0, r, kind
        made = [OPS.lora_linear_at(*base, plan, [0, 1])[0] for plan in ("fused", "split")]
        for found in made:
            problem.check(found)
        OPS.lora_scale_(made[1], problem.biases[0], rows, address, 0, "triton")
    counter.register("y", *made)
    return stems(counter, plane_sums="plane_sums of mixed_lora_shrink")


def forms_of_forward(batch: Batch, chip: Chip, dtype: torch.dtype = HALF) -> Forms:
    """Returns what `count_forward` must find, all but the tables' and the routing's bytes."""
    m, n, r = batch.m, batch.n, max(batch.ranks)
    splits = shrink_partials_shape(m, batch.k, 1, r)[0]
    shrink = choose(chip, "mixed_lora_shrink", dtype, m=m, r=r)
    linear, expand, scale = (
        choose(chip, f"mixed_{stem}", dtype, m=m, n=n, r=r)
        for stem in ("lora_linear", "lora_expand", "dora_scale")
    )
    forms = {
        "mixed_lora_shrink": byte_forms.mixed_shrink(batch, shrink, splits),
        "mixed_lora_linear": byte_forms.mixed_linear(batch, linear, splits, with_bias=True),
        "mixed_lora_expand": byte_forms.mixed_expand(batch, expand, splits),
        "mixed_dora_scale": byte_forms.mixed_scale(batch, scale),
    }
    columns = cdiv(r, 16) * 16
    if sums_s_once(chip, m, columns, splits, cdiv(n, expand.block_n), batch.e * m * n):
        # The counter knows the partial sums as s. What the operator makes of them lies elsewhere.
        form = byte_forms.mixed_expand(batch, expand, 1, batch.e)
        form.loads[ELSEWHERE] = form.loads.pop("s")
        forms["mixed_lora_expand"] = form
        summed = byte_forms.plane_sums([(m * columns, splits, batch.e)])
        loads, stores = {"s": summed.loads["partials"]}, {ELSEWHERE: summed.stores["outs"]}
        forms["plane_sums of mixed_lora_shrink"] = Form(loads, stores)
    return forms


def count_backward(step: Step) -> Counts:
    """Runs every kernel of a mixed batch's backward."""
    m, k, n, r, adapters = step
    problem = GradProblem(
        Lab(), step.batch().ids, n, k, HALF, torch.float32, ranks=(r,) * adapters, biased=()
    )
    groups, s = problem.groups, torch.randn(m, max(r, 16)).half()
    named = {
        "x": [problem.x],
        "dy": [problem.dy],
        "weight": [problem.weight],
        "s": [s],
        "lora_a": problem.lora_a,
        "lora_b": problem.lora_b,
        "routing": [groups.order, groups.segment_of, groups.segment_slot, groups.slot_start],
    }
    # One each: the planes of one may lie where results of the next will.
    of_b, of_x, of_a = (ByteCounter(**named) for _ in range(3))
    with on(QUARTER):
        with of_b:
            ds, packed_b, _ = OPS.lora_grad_b(*problem.grad_b_arguments(s))
        of_b.register("ds", ds)
        of_b.register("d_lora_b", packed_b)
        of_x.register("ds", ds)
        with of_x:
            dx = OPS.lora_grad_x(*problem.grad_x_arguments(ds, "fused"))
        of_x.register("dx", dx)
        of_a.register("ds", ds)
        with of_a:
            (packed_a,) = OPS.lora_grad_a(*problem.grad_a_arguments(ds))
        of_a.register("d_lora_a", packed_a)
    return {
        **stems(of_b, mixed_lora_grad_reduce="mixed_lora_grad_reduce of lora_grad_b"),
        **stems(of_x, mixed_lora_linear="mixed_lora_grad_x"),
        **stems(of_a, mixed_lora_grad_reduce="mixed_lora_grad_reduce of lora_grad_a"),
    }


def forms_of_backward(batch: Batch, chip: Chip) -> Forms:
    """Returns what `count_backward` must find, all but the tables' and the routing's bytes."""
    m, n, k, r = batch.m, batch.n, batch.k, max(batch.ranks)
    b, a = (choose(chip, f"mixed_lora_grad_{end}", HALF, r=r) for end in "ba")
    x = choose(chip, "mixed_lora_grad_x", HALF, m=m, k=k)
    run_b = run_rows(chip, m, cdiv(n, b.block_n), b.block_m)
    run_a = run_rows(chip, m, cdiv(k, a.block_k), a.block_m)
    return {
        "mixed_lora_grad_b": byte_forms.mixed_grad_b(batch, b, run_b),
        "mixed_lora_grad_reduce of lora_grad_b": byte_forms.mixed_grad_b_reduce(batch, b, run_b),
        "mixed_lora_grad_x": byte_forms.mixed_grad_x(batch, x),
        "mixed_lora_grad_a": byte_forms.mixed_grad_a(batch, a, run_a),
        "mixed_lora_grad_reduce of lora_grad_a": byte_forms.mixed_grad_a_reduce(batch, run_a),
    }


def count(step: Step) -> Counts:
    """Runs every kernel of a step, on `QUARTER`; returns the count of each."""
    torch.manual_seed(0)
    if not step.adapters:
        return count_one(step)
    batch = step.batch()
    problem = MixedProblem(
        Lab(), batch.ids, [batch.ranks], batch.k, [batch.n], HALF, factor_dtype=torch.float32
    )
    return {**count_forward(problem, QUARTER), **count_backward(step)}


def forms(step: Step, chip: Chip = QUARTER) -> Forms:
    """Returns what `count` must find, on a chip."""
    if not step.adapters:
        return forms_of_one(step, chip)
    return {**forms_of_forward(step.batch(), chip), **forms_of_backward(step.batch(), chip)}


def is_bounded(kernel: str, step: Step) -> bool:
    """Whether `floor` covers a kernel: those of a mixed batch's backward, or of a fused step."""
    if step.adapters:
        return "grad" in kernel
    return kernel not in ("lora_expand", "lora_dropout", "plane_sums of lora_shrink")


def floor(step: Step, chip: Chip = QUARTER) -> int:
    """Returns the design's floor: GEMMs' bytes, and what no one can avoid.

    That is: the factors where they are used, s and ds written and read, the gradients, and the
    fewest planes, written and read, that give three of four processors a program. Of one adapter's
    step: parts of K beside 64 rows for the shrink, the fewest that Hopper's instructions take; of
    rows and of columns for `lora_grad_b`, which reduces over both; of rows beside 64 columns, a
    line of 128 bytes in 16 bits, for `lora_grad_a`. Of a mixed batch's backward: parts of one
    adapter, since grids know sizes and not the mix; for `mixed_lora_grad_b` of both, for
    `mixed_lora_grad_a` of rows beside columns of 128, and a plane of its own for every adapter.
    """
    m, k, n, r, adapters = step
    e, f = step.sizes.e, step.sizes.f
    programs = cdiv(3 * chip.num_sms, 4)
    gemm = e * (2 * m * n + 2 * m * k + n * k)

    def planes_b(columns: int) -> tuple[int, int]:
        """Elements a rank row of `lora_grad_b`'s planes, and how many of them there are."""
        rows = cdiv(programs, columns)
        elements = (columns * m if columns > 1 else 0) + (rows * n if rows > 1 or adapters else 0)
        return elements, rows

    def split(size: int) -> int:
        parts = cdiv(programs, cdiv(size, 64))
        return parts * size if parts > 1 else 0

    grad_b, rows_b = min(planes_b(columns) for columns in range(1, programs + 1))
    if adapters:
        planes = grad_b + max(adapters - rows_b, 0) * n
        planes += max(cdiv(programs, cdiv(k, 128)), adapters) * k
        factors, shares = 2 * f * adapters * r * (k + n), e * m * r * (1 + 3)
    else:
        planes = grad_b + split(m) + split(k)
        gemm += e * (2 * m * k + m * n + k * n)
        factors, shares = 3 * f * r * (k + n), e * m * r * 6
    return gemm + factors + shares + 2 * 4 * r * planes


# Rows, ranks, and adapters of the prefills in the table; 1 is one adapter for all rows.
PREFILLS = tuple(
    (m, r, adapters)
    for adapters in (1, 4, 64)
    for m in (128, 512, 2048, 8192)
    for r in (16, 64, 128)
)
# Outputs and K of the layers of Llama-3.1-8B that share an input.
GROUPS = {
    "q|k|v": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate|up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}
SEQUENCES = 64


def forms_of_prefill(m: int, r: int, adapters: int, ns: Sequence[int], k: int) -> Forms:
    """Returns the expand of a prefill on an H100, all in 16 bits, and the sum of s before it.

    In a mixed batch, adapters take turns among 64 sequences.
    """
    n, count = sum(ns), len(ns)
    if adapters > 1:
        ids = sorted(row // (m // SEQUENCES) % adapters for row in range(m))
        config = choose(H100, "mixed_lora_expand", HALF, m=m, n=n, k=k, r=r)
        splits = shrink_partials_shape(m, k, count, r)[0]
    else:
        config = choose(H100, "lora_expand", HALF, m=m, n=n, k=k, r=r)
        splits = choose(H100, "lora_shrink", HALF, m=m, k=k, r=count * r).splits
    y_bytes = 2 * m * n if adapters > 1 else 0
    tiles = sum(cdiv(own, config.block_n) for own in ns)
    once = sums_s_once(H100, m, r, splits, tiles, y_bytes)
    partials = 1 if once else splits
    expands = []
    for own in ns:
        if adapters > 1:
            batch = Batch(ids, [r] * adapters, own, k, 2, 2)
            expands.append(byte_forms.mixed_expand(batch, config, partials, 2 if once else 4))
        else:
            sizes = Sizes(m, own, k, r, 2, 2)
            expands.append(byte_forms.expand(sizes, config, 1, partials, reads_y=False))
    name = "mixed_lora_expand" if adapters > 1 else "lora_expand"
    forms = {name: together(expands)}
    if once:
        forms["plane_sums"] = byte_forms.plane_sums([(m * r * count, splits, 2)])
    return forms


def rows_of_prefills() -> list[dict[str, str]]:
    """Returns the rows of the table that closed forms give: a layer of full size on an H100."""
    rows = []
    for m, r, adapters in PREFILLS:
        for group, (ns, k) in GROUPS.items():
            for kernel, form in forms_of_prefill(m, r, adapters, ns, k).items():
                values = [m, k, sum(ns), r, adapters, f"{kernel} of {group}"]
                values += [form.distinct, form.issued, f"{form.issued / form.distinct:.2f}"]
                rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
    return rows


def rows_of_table(step: Step, counted: Counts) -> list[dict[str, str]]:
    """Returns one row for each kernel: how often a touched byte is asked for."""
    rows = []
    for kernel, found in counted.items():
        values = [*step[:-1], step.adapters or 1, kernel]
        values += [found.distinct, found.issued]
        values.append(f"{found.issued / found.distinct:.2f}")
        rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
    return rows


def main(arguments: Sequence[str]) -> int:
    """Counts, and prints the rows or writes the table."""
    from tests.support.bytes import count_quantized

    rows = [row for step in STEPS for row in rows_of_table(step, count(step))]
    for step in count_quantized.STEPS:
        rows += rows_of_table(step, count_quantized.count_decode(step))
    rows += rows_of_prefills()
    with TABLE.open("w", newline="") if "--write" in arguments else sys.stdout as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
