"""`lora_grad_a`: d_lora_a of siblings against float64, the mask of each exactly, splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastlora.ops.philox_reference import philox_keep_mask
from fastlora.testing import assert_within_budget

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.chips import chip_of
from fastlora.kernels.configs import KernelConfig, choose
from fastlora.kernels.lora_grad_a import launch_lora_grad_a
from fastlora.kernels.plane_sums import launch_plane_sums

# Taken pairwise: rows, inputs off the tile, ranks of one to four siblings.
SHAPES = [
    (1, 256, (8,)),
    (15, 100, (3, 16, 1)),
    (16, 576, (16, 16)),
    (17, 72, (24, 4, 24)),
    (127, 200, (64,)),
    (2000, 65, (1, 8, 3, 16)),
    (16, 40, (128, 64)),
    (257, 31, (4, 4, 4, 4)),
]
SMALL = KernelConfig(block_m=16, block_k=32, block_r=16, siblings=1, num_warps=4, num_stages=2)


def gradients(
    lab: Any,
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    seeds: Sequence[int] | None = None,
    dropout_p: Sequence[float] = (),
    config: KernelConfig | None = None,
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Returns each sibling's gradient, through planes and their sums where the rows are split."""
    (m, k), ranks = x.shape, [rows.shape[1] for rows in ds]
    config = config or choose(
        chip_of(x.device), "lora_grad_a", x.dtype, m=m, k=k, r=max(ranks), siblings=len(ds)
    )
    outs = [lab.poisoned(r, k, dtype=dtype or x.dtype) for r in ranks]
    written = outs
    if config.splits > 1:
        written = [lab.poisoned(config.splits, r, k, dtype=torch.float32) for r in ranks]
    launch_lora_grad_a(
        written,
        x,
        ds,
        seeds=None if seeds is None else torch.tensor(seeds, device=x.device),
        dropout_p=dropout_p,
        config=config,
    )
    if written is not outs:
        launch_plane_sums(outs, written, config=choose(chip_of(x.device), "plane_sums", x.dtype))
    return outs


def check(
    results: Sequence[torch.Tensor], x: torch.Tensor, ds: Sequence[torch.Tensor], p: float = 0.0
) -> None:
    """Compares with float64; x is what the forward's product saw, before the rescaling."""
    for result, rows in zip(results, ds, strict=True):
        truth = rows.double().t() @ (x.double() / (1 - p))
        assert_within_budget(result, rows.t() @ (x / (1 - p)), truth, "d_lora_a")


@pytest.mark.parametrize(("m", "k", "ranks"), SHAPES)
def test_values(lab: Any, dtype: torch.dtype, m: int, k: int, ranks: tuple[int, ...]) -> None:
    x, ds = lab.rand(m, k, dtype=dtype), [lab.rand(m, r, dtype=dtype) for r in ranks]
    check(gradients(lab, x, ds), x, ds)


@pytest.mark.parametrize("rank_rows_first", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_every_split_and_rank_block(lab: Any, splits: int, rank_rows_first: bool) -> None:
    # 5 steps down the rows: of 8 parts some are empty; ranks in 4 blocks, and in 1 of those 4.
    x, ds = lab.rand(75, 70), [lab.rand(75, 50), lab.rand(75, 5)]
    config = replace(SMALL, siblings=2, splits=splits, rank_rows_first=rank_rows_first)
    check(gradients(lab, x, ds, config=config), x, ds)


@pytest.mark.parametrize(("splits", "rank_rows_first"), [(1, True), (4, False)])
def test_each_sibling_drops_by_its_own_seed(
    lab: Any, dtype: torch.dtype, splits: int, rank_rows_first: bool
) -> None:
    m, k = 40, 40
    seeds, dropout_p = (-8_765_432_109_876_543, 7, 7, 2**63 - 1), (0.3, 0.0, 0.5, 0.1)
    x = lab.rand(m, k, dtype=dtype)
    ds = [lab.rand(m, r, dtype=dtype) for r in (5, 8, 16, 1)]
    config = replace(SMALL, siblings=4, splits=splits, rank_rows_first=rank_rows_first)
    results = gradients(lab, x, ds, seeds, dropout_p, config)
    for result, rows, seed, p in zip(results, ds, seeds, dropout_p, strict=True):
        keep = philox_keep_mask(seed, m, k, p).to(x.device)
        check([result], torch.where(keep, x, 0), [rows], p)


@pytest.mark.parametrize("blocks", [(16, 16, 1), (64, 32, 2), (32, 64, 1)])
def test_mask_does_not_depend_on_the_tile(lab: Any, blocks: tuple[int, int, int]) -> None:
    # ds = I: d_lora_a is the dropped x itself, in which one wrong mask bit shows.
    m, k, p, seed = 64, 70, 0.5, 2**63 - 5
    block_m, block_k, splits = blocks
    config = replace(SMALL, block_m=block_m, block_k=block_k, block_r=64, splits=splits)
    x = lab.rand(m, k).abs() + 1
    (result,) = gradients(lab, x, [torch.eye(m, device=x.device)], (seed,), (p,), config)
    keep = philox_keep_mask(seed, m, k, p).to(x.device)
    assert torch.equal(result, torch.where(keep, 2 * x, 0))


def test_nan_of_a_dropped_element_does_not_pass(lab: Any) -> None:
    m, k, p, seed = 16, 32, 0.5, 7
    keep = philox_keep_mask(seed, m, k, p).to(lab.device)
    x = torch.where(keep, lab.rand(m, k), float("nan"))
    (result,) = gradients(lab, x, [lab.rand(m, 4)], (seed,), (p,))
    assert result.isfinite().all()


def test_masters_get_a_gradient_that_is_not_rounded_to_16_bits(lab: Any) -> None:
    x, ds = lab.rand(33, 48, dtype=torch.float16), lab.rand(33, 8, dtype=torch.float16)
    (result,) = gradients(lab, x, [ds], dtype=torch.float32)
    truth = ds.double().t() @ x.double()
    # Products of fp16 are exact in fp32: only the sums of 33 round.
    assert (result.double() - truth).abs().max() <= 33 * 2**-23 * truth.abs().max()


@pytest.mark.parametrize("layout", ["rows", "transposed", "both"])
def test_strided_input(lab: Any, layout: str) -> None:
    x, ds = lab.rand(35, 45), [lab.rand(35, 6)]
    check(gradients(lab, lab.strided(x, layout), ds, config=replace(SMALL, splits=2)), x, ds)


def test_expanded_row(lab: Any) -> None:
    x, ds = lab.rand(1, 70).expand(40, 70), [lab.rand(40, 6)]
    check(gradients(lab, x, ds), x, ds)


def test_runs_repeat_bit_for_bit(lab: Any, dtype: torch.dtype) -> None:
    x, ds = lab.rand(75, 70, dtype=dtype), [lab.rand(75, 10, dtype=dtype)]
    first, second = (
        gradients(lab, x, ds, (5,), (0.3,), replace(SMALL, splits=4)) for _ in range(2)
    )
    assert torch.equal(first[0], second[0])


def test_no_rows_give_zeros(lab: Any) -> None:
    (result,) = gradients(lab, lab.rand(0, 48), [lab.rand(0, 8)])
    assert result.shape == (8, 48) and not result.any()
