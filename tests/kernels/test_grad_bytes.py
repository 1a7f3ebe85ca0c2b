"""Bytes of a backward, counted: equal to the closed forms, and a step near the design's floor."""

from __future__ import annotations

import csv
from typing import Any

import pytest
import torch

from fastlora.env import triton_interpreted

pytest.importorskip("triton", reason="triton is not installed")
if not triton_interpreted():
    pytest.skip("bytes are counted with TRITON_INTERPRET=1", allow_module_level=True)

from fastlora.kernels.configs import KernelConfig, cdiv, choose
from fastlora.kernels.lora_grad_a import launch_lora_grad_a
from fastlora.kernels.lora_grad_b import launch_lora_grad_b
from fastlora.kernels.lora_linear import launch_lora_linear
from fastlora.kernels.plane_sums import launch_plane_sums
from tests.support.bytes import byte_forms
from tests.support.bytes.byte_counter import ByteCounter, KernelCount
from tests.support.bytes.byte_forms import Form
from tests.support.bytes.count_bytes import (
    FULL_STEPS,
    H100,
    STEPS,
    TABLE,
    count_others,
    count_step,
    floor,
    forms_of_others,
    forms_of_step,
    rows_of_table,
)

# M, N, K, R: on the tile and off it in every dimension.
SHAPES = [(1, 64, 64, 16), (33, 70, 100, 24), (64, 128, 160, 8), (130, 40, 72, 3)]


def check(count: KernelCount, form: Form) -> None:
    """Each tensor's (distinct, issued) bytes are exactly these, and no other memory is touched."""
    assert count.loads == form.loads
    assert count.stores == form.stores
    assert count.flops == form.flops
    assert (count.distinct, count.issued) == (form.distinct, form.issued)


@pytest.mark.parametrize("rank_rows_first", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("m", "n", "k", "r"), SHAPES)
def test_lora_grad_b(
    lab: Any, m: int, n: int, k: int, r: int, splits: int, rank_rows_first: bool
) -> None:
    """Splits come with the sums of columns and a scaling per rank row; one split with neither."""
    half, f = torch.float16, 4
    config = KernelConfig(
        block_m=16, block_n=32, block_r=16, num_warps=4, splits=splits,
        rank_rows_first=rank_rows_first,
    )  # fmt: skip
    dy, s, lora_b = lab.rand(m, n, dtype=half), lab.rand(m, r, dtype=half), lab.rand(n, r)
    ds = lab.rand(cdiv(n, config.block_n), m, r)
    d_lora_b = lab.rand(n, r) if splits == 1 else lab.rand(splits, n, r)
    d_bias = None if splits == 1 else lab.rand(splits, n)
    scaling = torch.ones(r if splits > 1 else 1)
    counter = ByteCounter(
        dy=[dy], s=[s], lora_b=[lora_b], scaling=[scaling], ds=[ds], d_lora_b=[d_lora_b]
    )
    if d_bias is not None:
        counter.register("d_bias", d_bias)
    with counter:
        launch_lora_grad_b(ds, d_lora_b, d_bias, dy, s, lora_b, scaling, config=config)
    form = byte_forms.grad_b(m, n, r, 2, f, scaling.numel(), d_bias is not None, config)
    check(counter.kernels["_lora_grad_b_kernel"], form)


@pytest.mark.parametrize(
    ("m", "k", "r", "splits", "rank_rows_first"),
    [(1, 64, 16, 1, True), (33, 100, 24, 3, False), (64, 160, 8, 1, False), (40, 72, 3, 3, True)],
)
def test_lora_grad_a(lab: Any, m: int, k: int, r: int, splits: int, rank_rows_first: bool) -> None:
    """Splits come with three siblings and their dropouts; one split with one, without dropout."""
    half = torch.float16
    ranks = [r] if splits == 1 else [r, 5, 16]
    config = KernelConfig(
        block_m=16, block_k=32, block_r=16, siblings=len(ranks), num_warps=4, splits=splits,
        rank_rows_first=rank_rows_first,
    )  # fmt: skip
    x, ds = lab.rand(m, k, dtype=half), [lab.rand(m, rank, dtype=half) for rank in ranks]
    shapes = [(rank, k) if splits == 1 else (splits, rank, k) for rank in ranks]
    outs = [lab.rand(*shape) for shape in shapes]
    seeds = None if splits == 1 else torch.arange(len(ranks))
    counter = ByteCounter(x=[x])
    for i, (rows, out) in enumerate(zip(ds, outs, strict=True)):
        counter.register(f"ds_{i}", rows)
        counter.register(f"d_lora_a_{i}", out)
    if seeds is not None:
        counter.register("seeds", seeds)
    with counter:
        launch_lora_grad_a(outs, x, ds, seeds=seeds, dropout_p=[0.1] * len(ranks), config=config)
    form = byte_forms.grad_a(m, k, ranks, 2, 4, seeds is not None, config)
    check(counter.kernels["_lora_grad_a_kernel"], form)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize(("m", "n", "k", "r"), SHAPES)
def test_lora_grad_x(lab: Any, m: int, n: int, k: int, r: int, dropout_p: float) -> None:
    half = torch.float16
    config = KernelConfig(block_m=32, block_n=64, block_k=32, block_r=16, num_warps=4)
    dy, weight = lab.rand(m, n, dtype=half), lab.rand(n, k, dtype=half)
    ds, lora_a, dx = lab.rand(m, r, dtype=half), lab.rand(r, k), lab.rand(m, k, dtype=half)
    seed = torch.tensor([7])
    with ByteCounter(
        dy=[dy], weight=[weight], ds=[ds], lora_a=[lora_a], dx=[dx], seed=[seed]
    ) as counter:
        launch_lora_linear(
            dx,
            dy,
            weight.t(),
            ds,
            lora_a.t(),
            None,
            bias=None,
            s_out=None,
            config=config,
            pdl=False,
            seed=seed,
            dropout_p=dropout_p,
        )
    form = byte_forms.grad_x(m, n, k, r, 2, 4, dropout_p > 0, config)
    check(counter.kernels["_lora_linear_kernel"], form)


def test_plane_sums(lab: Any) -> None:
    planes = [lab.rand(3, 40, 7), lab.rand(1, 2000), lab.rand(5, 9)]
    outs = [lab.rand(40, 7, dtype=torch.float16), lab.rand(2000), lab.rand(9)]
    with ByteCounter(planes=planes, outs=outs) as counter:
        launch_plane_sums(outs, planes, config=choose(H100, "plane_sums", torch.float32))
    form = byte_forms.plane_sums([280, 2000, 9], [3, 1, 5], [2, 4, 4])
    check(counter.total, form)


@pytest.fixture(scope="module")
def steps() -> dict[tuple[int, ...], dict[str, KernelCount]]:
    """What each kernel of a training step did, by the step's sizes."""
    return {sizes: count_step(*sizes) for sizes in STEPS}


@pytest.mark.parametrize("sizes", STEPS, ids=str)
def test_a_step_moves_at_most_a_tenth_above_the_floor(steps: Any, sizes: tuple[int, ...]) -> None:
    """Forward and backward of one linear with fp32 masters; issued bytes as the tiles say."""
    counted, forms = steps[sizes], forms_of_step(*sizes)
    assert {name: (c.distinct, c.issued, c.flops) for name, c in counted.items()} == {
        name: (form.distinct, form.issued, form.flops) for name, form in forms.items()
    }
    assert all(count.launches == 1 for count in counted.values())
    moved = sum(count.distinct for count in counted.values())
    assert moved <= 1.1 * floor(*sizes), (moved, floor(*sizes))


@pytest.mark.parametrize("sizes", FULL_STEPS, ids=str)
def test_so_does_a_step_of_full_size_on_an_h100(sizes: tuple[int, ...]) -> None:
    """By the closed forms, which the counts of the smaller steps confirm."""
    moved = sum(form.distinct for form in forms_of_step(*sizes, chip=H100).values())
    assert moved <= 1.1 * floor(*sizes, chip=H100), (moved, floor(*sizes, chip=H100))


@pytest.fixture(scope="module")
def others() -> dict[tuple[int, ...], dict[str, KernelCount]]:
    """What expand and dropout did, which a fused step does not take."""
    return {sizes: count_others(*sizes) for sizes in STEPS}


@pytest.mark.parametrize("sizes", STEPS, ids=str)
def test_other_kernels_issue_what_their_tiles_say(others: Any, sizes: tuple[int, ...]) -> None:
    """In place, y is read and written; a dropped copy is one read and one write."""
    assert {name: (c.distinct, c.issued, c.flops) for name, c in others[sizes].items()} == {
        name: (form.distinct, form.issued, form.flops)
        for name, form in forms_of_others(*sizes).items()
    }


def test_the_table_holds_what_is_counted(steps: Any, others: Any) -> None:
    """`docs/kernel_bytes.csv` is what `tests.support.bytes.count_bytes` writes."""
    with TABLE.open() as file:
        written = list(csv.DictReader(file))
    counted = {sizes: {**steps[sizes], **others[sizes]} for sizes in STEPS}
    assert written == [row for sizes in STEPS for row in rows_of_table(*sizes, counted[sizes])]
