"""The cases: what each launches, by fastlora's own launchers, and compares with float64.

A case is a function of a `Lab`. It launches, raises unless every result is within the project's
budget, and returns the results, so that runs in other orders can be compared bit for bit. Configs
are what `choose` returns for the emulated chip, but for the fields that a case names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from fastlora.functional import lora_linear
from fastlora.kernels.chips import chip_of
from fastlora.kernels.configs import choose
from fastlora.kernels.lora_expand import launch_lora_expand, launch_summed_lora_expand
from fastlora.kernels.lora_linear import launch_lora_linear
from fastlora.kernels.lora_shrink import launch_lora_shrink
from fastlora.kernels.plane_sums import launch_plane_sums
from fastlora.ops import execution_mode
from fastlora.ops.rows import piece_starts_length, sort_rows
from fastlora.ops.triton.sorting import sort_rows_into
from fastlora.testing import assert_within_budget
from tests.support.kernels.lab import Lab
from tests.support.kernels.layers import Layers
from tests.support.kernels.mixed_grad_problem import GradProblem, mix
from tests.support.kernels.mixed_problem import OPS, RANKS, THREE, MixedProblem, Results, draw_ids
from tests.support.kernels.one_adapter import Problem
from tests.support.kernels.quantized_linear import at, check_linear, of_tables
from tests.support.kernels.quantized_weights import make_quantized_weight
from tests.support.kernels.scale_problem import ScaleProblem

Case = Callable[[Lab], Results]
Shape = tuple[int, int, int, int]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# -------------------------------------------------------------------------------- one adapter


def one(
    kernel: str,
    shape: Shape,
    dtype: torch.dtype = BF16,
    *,
    p: float = 0.0,
    further_ranks: Sequence[int] = (),
    fp32_factors: bool = False,
    expanded: bool = False,
    **fields: Any,
) -> Case:
    """A kernel of one adapter.

    Args:
        kernel: A method of `Problem`.
        shape: Rows, outputs, inputs, rank.
        dtype: Of all operands.
        p: Dropout's probability.
        further_ranks: Ranks of further layers, for d_lora_a.
        fp32_factors: Whether factors and bias are fp32, with a scaling for each rank row.
        expanded: Whether one row is all rows of x.
        fields: Of the config.
    """

    def run(lab: Lab) -> Results:
        m, n, k, r = shape
        problem = Problem(lab, m, n, k, r, dtype, p, further_ranks)
        if fp32_factors:
            problem.lora_a, problem.lora_b = lab.rand(r, k), lab.rand(n, r)
            problem.bias, problem.scaling = lab.rand(n), torch.linspace(0.1, 2.0, r)
        if expanded:
            problem.x = lab.rand(1, k, dtype=dtype).expand(m, k)
        config = replace(problem.config(f"lora_{kernel}"), **fields)
        found: Results = getattr(problem, kernel)(config)
        problem.check(found)
        return found

    return run


def together(
    kernel: str,
    m: int,
    k: int,
    dtype: torch.dtype = BF16,
    *,
    ranks: Sequence[int] = (8, 3, 40),
) -> Case:
    """Three layers that share x or s, in one grid of "shrink", "linear" or "expand"."""

    def run(lab: Lab) -> Results:
        columns = 70, 33, 128
        layers = Layers(lab, m, columns, ranks, dtype, k=k)
        sizes = {"m": m, "n": max(columns), "k": k, "r": max(ranks)}
        config = choose(chip_of(lab.device), f"lora_{kernel}", dtype, **sizes)
        config = replace(config, splits=1)
        if kernel == "shrink":
            s = lab.poisoned(*layers.s.shape, dtype=dtype)
            launch_lora_shrink(s, layers.x, layers.lora_a, seed=None, dropout_p=0.0, config=config)
            truth = torch.cat([layers.x.double() @ a.double().t() for a in layers.lora_a], 1)
            assert_within_budget(s, layers.s, truth, "s")
            return {"s": s}
        modules = layers.modules(weights=kernel == "linear")
        planes = torch.stack([layers.s.float() * share for share in (0.25, 0.75)])
        if kernel == "linear":
            launch_lora_linear(modules, layers.x, planes, s_out=None, config=config, pdl=False)
        else:
            launch_lora_expand(modules, planes, reads_y=False, config=config)
        ys = [module.y for module in modules]
        layers.check(ys, product=kernel == "linear")
        return {f"y {number}": y for number, y in enumerate(ys)}

    return run


def terms(m: int, k: int, ranks: Sequence[int], dtype: torch.dtype = BF16) -> Case:
    """The part of dx that comes from the adapters of layers that share x."""

    def run(lab: Lab) -> Results:
        ds = [lab.rand(m, r, dtype=dtype) for r in ranks]
        lora_a = [lab.rand(r, k, dtype=dtype) for r in ranks]
        dx = lab.poisoned(m, k, dtype=dtype)
        config = choose(chip_of(lab.device), "lora_grad_x_add", dtype, m=m, k=k, r=max(ranks))
        launch_summed_lora_expand(dx, [a.t() for a in lora_a], ds, config=config)
        near, exact = (
            torch.cat(ds, 1).to(kind) @ torch.cat(lora_a).to(kind)
            for kind in (dtype, torch.float64)
        )
        assert_within_budget(dx, near, exact, "dx")
        return {"dx": dx}

    return run


def invariant(shape: Shape, dtype: torch.dtype = BF16) -> Case:
    """A linear in the batch-invariant mode: rows alone have the bits that they have in a batch."""

    def run(lab: Lab) -> Results:
        m, n, k, r = shape
        x, weight = lab.rand(m, k, dtype=dtype), lab.rand(n, k, dtype=dtype).div_(k**0.5)
        lora_a, lora_b = lab.rand(r, k, dtype=dtype).div_(k**0.5), lab.rand(n, r, dtype=dtype)
        bias = lab.rand(n, dtype=dtype)
        given = {"scaling": 1.7, "bias": bias, "impl": "triton", "plan": "invariant"}
        y = lora_linear(x, weight, lora_a, lora_b, **given)
        for rows in (slice(0, 1), slice(m // 2, None)):
            assert torch.equal(
                lora_linear(x[rows].clone(), weight, lora_a, lora_b, **given), y[rows]
            )
        near, exact = (
            F.linear(x.to(kind), weight.to(kind), bias.to(kind))
            + 1.7 * (x.to(kind) @ lora_a.to(kind).t() @ lora_b.to(kind).t())
            for kind in (dtype, torch.float64)
        )
        assert_within_budget(y, near, exact, "y")
        return {"y": y}

    return run


def quantized(
    kind: str, shape: Shape, dtype: torch.dtype = BF16, plan: str = "auto", p: float = 0.3
) -> Case:
    """y and every gradient of a linear over codes; of the plan "invariant" y alone."""

    def run(lab: Lab) -> Results:
        m, n, k, r = shape
        weight = make_quantized_weight(kind, lab.rand(n, k, dtype=dtype))
        return check_linear(lab, weight, m, r, 0.0 if plan == "invariant" else p, plan)

    return run


# ------------------------------------------------------------------------------ mixed batches


def mixed(
    kernel: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype = BF16,
    *,
    ranks: Sequence[int] = RANKS,
    planes: int = 3,
    **given: Any,
) -> Case:
    """A kernel of a mixed batch over tables; ids are drawn, rows without an adapter among them.

    What is not finite in an adapter's lora_b must reach its own rows alone.

    Args:
        kernel: "shrink", "linear" or "expand".
        shape: Rows, outputs, inputs.
        dtype: Of x and the base.
        ranks: Of the adapters.
        planes: Of s.
        given: Of `MixedProblem`.
    """

    def run(lab: Lab) -> Results:
        m, n, k = shape
        problem = MixedProblem(lab, draw_ids(m, len(ranks)), [ranks], k, [n], dtype, **given)
        if kernel == "shrink":
            s = lab.poisoned(planes, 1, m, -(-problem.max_rank // 16) * 16, dtype=FP32)
            problem.shrink_into(s)
            problem.check_shrunk(s)
            return {"s": s}
        y = problem.run(kernel, splits=planes)
        problem.check(y)

        def again() -> torch.Tensor:
            torch.manual_seed(1)  # of the planes
            return problem.run(kernel, splits=planes)

        slot = next(slot for slot in problem.ids if slot >= 0 and ranks[slot])
        problem.check_apart(again, problem.factors[0][slot].lora_b[0, 5:6])
        return {"y": y}

    return run


def mixed_together(kernel: str, m: int, k: int, dtype: torch.dtype = BF16, planes: int = 3) -> Case:
    """Three modules of a mixed batch that share x, in one grid of "linear" or "expand"."""

    def run(lab: Lab) -> Results:
        problem = MixedProblem(lab, draw_ids(m, 8), THREE, k, [70, 33, 128], dtype, biased=(1, 3))
        sizes = {"m": m, "n": 128, "k": k, "r": problem.max_rank}
        config = choose(chip_of(lab.device), f"mixed_lora_{kernel}", dtype, **sizes)
        ys = problem.run_group(kernel, config, planes)
        for number, y in enumerate(ys):
            problem.check(y, number)
        return {f"y {number}": y for number, y in enumerate(ys)}

    return run


def mixed_invariant(shape: tuple[int, int, int], dtype: torch.dtype = BF16) -> Case:
    """A mixed linear in the batch-invariant mode, as a layer asks for it, for siblings too."""

    def run(lab: Lab) -> Results:
        m, n, k = shape
        problem = MixedProblem(lab, draw_ids(m, 8), THREE, k, [n, 24, 33], dtype, biased=(1, 3, 7))
        alone = *problem.linear_arguments(0, None, "invariant")[:5], problem.all_tables
        alone = (*alone[:3], problem.rows(True), *alone[4:])
        rest = (0, problem.max_rank, problem.factor_dtype, "invariant")
        found = {"y": OPS.lora_linear_at(*alone, *rest, None)[0]}
        found["y with siblings"] = OPS.lora_linear_at(*alone, *rest, [0, 3])[0]
        for y in found.values():
            problem.check(y)
        assert torch.equal(*found.values())
        return found

    return run


def mixed_quantized(
    kind: str,
    m: int,
    adapters: int,
    dtype: torch.dtype = BF16,
    plan: str = "auto",
    cycle: Sequence[int] = (8, 40, 0, 3, 16),
) -> Case:
    """A linear over codes of a mixed batch, ranks in a cycle; many adapters go by pieces."""

    def run(lab: Lab) -> Results:
        ids = [(5 * row) % (adapters + 1) - 1 for row in range(m)]
        ranks = [[cycle[slot % len(cycle)] for slot in range(adapters)]]
        problem = of_tables(lab, kind, ids, ranks, dtype)
        y = at(problem, plan)
        problem.check(y)
        return {"y": y}

    return run


def step(
    shape: tuple[int, int, int],
    dtype: torch.dtype = BF16,
    plan: str = "fused",
    *,
    most: int = 3,
    run_rows: int = 16,
    **given: Any,
) -> Case:
    """Forward and every gradient of a mixed batch that trains, one adapter with rows in many runs.

    Args:
        shape: Rows, outputs, inputs.
        dtype: Of x, the base and the gradients that flow.
        plan: Of the forward and of dx.
        most: The slot of all rows behind the first 40.
        run_rows: Positions of a run in the backward.
        given: Of `GradProblem`.
    """

    def run(lab: Lab) -> Results:
        m, n, k = shape
        ids = mix(min(m, 40)) + [most] * (m - 40)
        problem = GradProblem(lab, ids, n, k, dtype, run_rows=run_rows, **given)
        found = problem.run(plan)
        problem.check(found)
        return found

    return run


def sums(
    dtype: torch.dtype = BF16,
    *,
    planes: Sequence[int],
    sizes: Sequence[int] = (1024, 3000, 77, 1030),
) -> Case:
    """Planes of four outputs, some of which end within a block."""

    def run(lab: Lab) -> Results:
        stacks = [lab.rand(count, size) for count, size in zip(planes, sizes, strict=True)]
        outs = [lab.poisoned(size, dtype=dtype) for size in sizes]
        config = choose(chip_of(lab.device), "plane_sums", dtype)
        launch_plane_sums(outs, stacks, config=config)
        for number, (out, stack) in enumerate(zip(outs, stacks, strict=True)):
            exact = stack.double().sum(0)
            assert_within_budget(out, stack.sum(0).to(dtype), exact, f"sum {number}")
        return {str(number): out for number, out in enumerate(outs)}

    return run


def scale(m: int, n: int, dtype: torch.dtype = BF16, **given: Any) -> Case:
    """DoRA's scales of a mixed batch, one of them yet to be made."""

    def run(lab: Lab) -> Results:
        problem = ScaleProblem(lab, draw_ids(m, 8), 8, n, dtype, pending=(1,), **given)
        y = problem.run()
        problem.check(y)
        return {"y": y}

    return run


def sort(count: int, each: int, slots: int, block_m: int) -> Case:
    """Rows of a mixed batch, entry for entry as PyTorch sorts them."""

    def run(lab: Lab) -> Results:
        ids = torch.tensor(draw_ids(count, slots)) * (1 + (torch.arange(count) % 7 == 3))
        m = count * each
        with mock.patch.object(execution_mode, "KERNEL_DEVICES", ()):
            rows = sort_rows(ids, m, slots)
            pieces = rows.piece_starts(block_m) if block_m else torch.empty(0, dtype=torch.int32)
        expected = [*rows.operator_arguments(), rows.invalid, pieces]
        assert not block_m or len(pieces) == piece_starts_length(m, slots, block_m)
        found = sort_rows_into(
            ids, slots, tuple(torch.full_like(t, True) for t in expected), block_m
        )
        assert found is not None
        for number, (entries, wanted) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(entries, wanted), number
        return {str(number): entries for number, entries in enumerate(found)}

    return run


SERVED = (4, 16, 8, 0, 11)
FACTORS = {"p": 0.3, "fp32_factors": True}
BIASED = {"biased": (1, 3, 7)}
# Run each time: every kernel, in bf16.
CORE = {
    "shrink": one("shrink", (40, 1, 600, 16), p=0.3, splits=6),
    "linear": one("linear", (40, 200, 256, 16)),
    "expand": one("expand", (40, 300, 1, 16)),
    "dropout": one("dropout", (17, 1, 200, 1), p=0.3),
    "grad_b": one("grad_b", (40, 300, 1, 16)),
    "grad_a": one("grad_a", (40, 1, 300, 16), p=0.3, further_ranks=(8,)),
    "mixed step": step((130, 600, 70), dropout=True),
    "mixed expand": mixed("expand", (33, 300, 8), **BIASED),
    "mixed scale": scale(33, 300),
    "mixed sort": sort(40, 1, 5, 16),
}
# Those of which the commit draws a part.
FURTHER = {
    "linear, off the tiles": one("linear", (5, 100, 65, 4)),
    "linear, many rows": one("linear", (300, 200, 256, 16), FP16),
    "linear, two planes, fp32 factors": one("linear", (20, 100, 520, 24), splits=2, **FACTORS),
    "linear, fp32": one("linear", (20, 64, 72, 5), FP32),
    "linear, chunks of rank rows": one("linear", (33, 80, 72, 200), FP16),
    "linear, invariant": invariant((70, 72, 530, 24)),
    "linear, three in one grid": together("linear", 37, 72),
    "linear, three in one grid, aligned ranks": together("linear", 37, 72, ranks=(16, 32, 48)),
    "grad_x": one("grad_x", (40, 200, 256, 16), p=0.3),
    "grad_x, fp16, off the tiles": one("grad_x", (33, 75, 100, 5), FP16, p=0.3),
    "grad_x_add of three layers": terms(70, 130, (16, 8, 24)),
    "grad_x_add of two layers, in chunks": terms(130, 65, (64, 40)),
    "grad_x_add": one("grad_x_add", (40, 200, 65, 8), p=0.3),
    "expand, fp16, off the tiles": one("expand", (33, 75, 1, 24), FP16, fp32_factors=True),
    "expand, three in one grid": together("expand", 37, 72),
    "expand, three in one grid, aligned ranks": together("expand", 37, 72, ranks=(16, 32, 48)),
    "shrink, fp16, off the tiles": one("shrink", (33, 1, 333, 5), FP16, splits=5, **FACTORS),
    "shrink, three in one grid": together("shrink", 21, 65),
    "shrink, three in one grid, aligned ranks": together("shrink", 21, 65, ranks=(16, 32, 48)),
    "shrink, fp32": one("shrink", (33, 1, 200, 24), FP32, splits=5),
    "grad_b, fp16, fp32 factors": one("grad_b", (33, 275, 1, 5), FP16, fp32_factors=True),
    "grad_b, fp32, six planes": one("grad_b", (200, 40, 1, 24), FP32, splits=6),
    "grad_a, fp16, fp32 factors": one("grad_a", (33, 1, 275, 5), FP16, **FACTORS),
    "grad_a, six planes": one("grad_a", (390, 1, 128, 16), splits=6, further_ranks=(16, 16)),
    "sums of planes": sums(planes=(5, 6, 7, 9)),
    "sums of planes, multiples of 8": sums(planes=(5, 6, 7, 9), sizes=(1024, 3000, 72, 1032)),
    "sums of planes, fp32": sums(FP32, planes=(6, 5, 10, 7)),
    "mixed linear": mixed("linear", (33, 300, 200), **BIASED),
    "mixed linear, one row": mixed("linear", (1, 128, 256), ranks=SERVED),
    "mixed linear, two planes": mixed("linear", (40, 200, 256), ranks=SERVED, planes=2),
    "mixed linear, fp32": mixed("linear", (20, 64, 72), FP32, ranks=SERVED),
    "mixed linear, fp32 factors": mixed("linear", (33, 75, 100), FP16, factor_dtype=FP32),
    "mixed linear, invariant": mixed_invariant((37, 50, 300)),
    "mixed linear, three in one grid": mixed_together("linear", 37, 72),
    "mixed expand, three in one grid": mixed_together("expand", 37, 72),
    "mixed shrink": mixed("shrink", (33, 1, 200)),
    "mixed shrink, fp16": mixed("shrink", (17, 1, 256), FP16, ranks=(4, 16, 8, 0, 40)),
    "mixed shrink, ranks up to 16": mixed("shrink", (9, 1, 256), FP16, ranks=SERVED),
    "mixed step, fp16, split": step((130, 600, 64), FP16, "split"),
    "mixed step, fp32 factors": step((130, 300, 64), BF16, factor_dtype=FP32, dropout=True),
    "mixed step, fp32": step((130, 300, 48), FP32),
    "mixed scale, fp16, no bias": scale(130, 64, FP16, bias=False),
    "mixed sort, many slots": sort(5, 300, 1100, 64),
    "codes, nf4": quantized("nf4", (17, 80, 128, 8)),
    "codes, nf4 nested": quantized("nf4 nested", (64, 33, 320, 40)),
    "codes, fp4": quantized("fp4", (1, 45, 192, 8)),
    "codes, int8": quantized("int8", (17, 80, 64, 3), FP16),
    "codes, e4m3": quantized("e4m3", (33, 80, 128, 16)),
    "codes, e5m2": quantized("e5m2", (17, 80, 128, 8), FP16),
    "codes, nf4, invariant": quantized("nf4", (70, 48, 128, 8), plan="invariant"),
    "mixed codes, nf4": mixed_quantized("nf4", 21, 3),
    "mixed codes, nf4 nested, by pieces": mixed_quantized("nf4 nested", 21, 9),
    "mixed codes, fp4": mixed_quantized("fp4", 21, 3, FP16),
    "mixed codes, int8": mixed_quantized("int8", 21, 3),
    "mixed codes, e4m3": mixed_quantized("e4m3", 40, 3, FP16),
    "mixed codes, e5m2": mixed_quantized("e5m2", 21, 3),
    "mixed codes, nf4, invariant": mixed_quantized("nf4", 70, 2, plan="invariant"),
}
CASES: dict[str, Case] = {**CORE, **FURTHER}
