"""`lora_grad_b`: ds, d_lora_b and column sums against float64; splits, strides, and repeats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastlora.testing import assert_within_budget
from tests.support.kernels.gradients import grad_b

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.chips import chip_of
from fastlora.kernels.configs import KernelConfig, cdiv, choose
from fastlora.kernels.lora_grad_b import launch_lora_grad_b
from fastlora.kernels.plane_sums import launch_plane_sums

# Taken pairwise: rows, outputs off the tile, ranks.
SHAPES = [
    (1, 128, 8),
    (15, 33, 3),
    (16, 64, 16),
    (17, 130, 24),
    (127, 300, 64),
    (2000, 80, 1),
    (16, 20, 128),
    (257, 257, 4),
]
SMALL = KernelConfig(block_m=16, block_n=32, block_r=16, num_warps=4, num_stages=2)


class Problem:
    """The operands of one backward, in dy's dtype unless a test replaces one."""

    def __init__(self, lab: Any, m: int, n: int, r: int, dtype: torch.dtype) -> None:
        self.lab = lab
        self.dy, self.s = lab.rand(m, n, dtype=dtype), lab.rand(m, r, dtype=dtype)
        self.lora_b = lab.rand(n, r, dtype=dtype)
        self.scaling = torch.tensor([0.75], device=lab.device)

    def run(self, config: KernelConfig | None = None) -> tuple[torch.Tensor, ...]:
        """Returns ds, d_lora_b and d_bias, through planes and their sums where there are any."""
        (m, n), r = self.dy.shape, self.lora_b.shape[1]
        config = config or choose(
            chip_of(self.dy.device), "lora_grad_b", self.dy.dtype, m=m, n=n, r=r
        )
        columns, splits = cdiv(n, config.block_n), config.splits
        outs = [
            self.lab.poisoned(m, r, dtype=self.dy.dtype),
            self.lab.poisoned(n, r, dtype=self.lora_b.dtype),
            self.lab.poisoned(n, dtype=torch.float32),
        ]
        written = [
            out if parts == 1 else self.lab.poisoned(parts, *out.shape, dtype=torch.float32)
            for out, parts in zip(outs, (columns, splits, splits), strict=True)
        ]
        launch_lora_grad_b(*written, self.dy, self.s, self.lora_b, self.scaling, config=config)
        pairs = [(out, w) for out, w in zip(outs, written, strict=True) if out is not w]
        if pairs:
            launch_plane_sums(
                *zip(*pairs, strict=True),
                config=choose(chip_of(self.dy.device), "plane_sums", self.dy.dtype),
            )
        return tuple(outs)

    def check(self, ds: torch.Tensor, d_lora_b: torch.Tensor, d_bias: torch.Tensor) -> None:
        """Compares with float64 of the operands as the kernel rounds them."""
        dtype = self.dy.dtype
        dy, s, lora_b = self.dy.double(), self.s.double(), self.lora_b.to(dtype)
        same = grad_b(self.dy, self.s, lora_b, self.scaling)
        scaling = self.scaling.double()
        assert_within_budget(ds, same[0], dy @ lora_b.double() * scaling, "ds")
        assert_within_budget(d_lora_b, same[1], dy.t() @ s * scaling, "d_lora_b")
        assert_within_budget(d_bias, same[2], dy.sum(0), "d_bias")


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_values(lab: Any, dtype: torch.dtype, m: int, n: int, r: int) -> None:
    problem = Problem(lab, m, n, r, dtype)
    problem.check(*problem.run())


@pytest.mark.parametrize("rank_rows_first", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_every_split_and_rank_block(lab: Any, splits: int, rank_rows_first: bool) -> None:
    # 5 steps down the rows: of 8 parts some are empty; 3 blocks of columns, 4 of rank rows.
    problem = Problem(lab, 75, 70, 50, torch.float32)
    config = replace(SMALL, splits=splits, rank_rows_first=rank_rows_first)
    problem.check(*problem.run(config))


@pytest.mark.parametrize("rank_rows_first", [False, True])
def test_one_block_of_columns_writes_ds_itself(lab: Any, rank_rows_first: bool) -> None:
    problem = Problem(lab, 40, 30, 5, torch.float16)
    config = replace(SMALL, rank_rows_first=rank_rows_first)
    assert cdiv(30, config.block_n) == 1
    problem.check(*problem.run(config))


def test_scaling_per_rank_row_and_fp32_factor(lab: Any, dtype: torch.dtype) -> None:
    problem = Problem(lab, 33, 48, 24, dtype)
    problem.lora_b = lab.rand(48, 24)
    problem.scaling = torch.linspace(0.1, 2.0, 24, device=lab.device)
    _, d_lora_b, _ = result = problem.run()
    assert d_lora_b.dtype == torch.float32
    problem.check(*result)


def test_masters_get_a_gradient_that_is_not_rounded_to_16_bits(lab: Any) -> None:
    problem = Problem(lab, 33, 48, 8, torch.float16)
    problem.lora_b = problem.lora_b.float()
    _, d_lora_b, _ = problem.run()
    truth = problem.dy.double().t() @ problem.s.double() * 0.75
    # Products of fp16 are exact in fp32: only the sums of 33 round.
    assert (d_lora_b.double() - truth).abs().max() <= 33 * 2**-23 * truth.abs().max()


@pytest.mark.parametrize("layout", ["rows", "transposed", "both"])
def test_strided_inputs(lab: Any, layout: str) -> None:
    problem = Problem(lab, 35, 45, 6, torch.float32)
    for name in ("dy", "s", "lora_b"):
        setattr(problem, name, lab.strided(getattr(problem, name), layout))
    problem.check(*problem.run(replace(SMALL, splits=2)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 45), (35, 1)])
def test_expanded_gradient(lab: Any, shape: tuple[int, int]) -> None:
    """`y.sum().backward()` gives strides of 0 in both directions."""
    problem = Problem(lab, 35, 45, 6, torch.float32)
    problem.dy = lab.rand(*shape).expand(35, 45)
    problem.check(*problem.run())


def test_runs_repeat_bit_for_bit(lab: Any, dtype: torch.dtype) -> None:
    problem = Problem(lab, 75, 70, 10, dtype)
    config = replace(SMALL, splits=4)
    first, second = problem.run(config), problem.run(config)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows_give_zeros(lab: Any) -> None:
    ds, d_lora_b, d_bias = Problem(lab, 0, 48, 8, torch.float32).run()
    assert ds.shape == (0, 8)
    assert not d_lora_b.any() and not d_bias.any()


def test_nan_in_a_row_stays_in_its_row_of_ds(lab: Any) -> None:
    problem = Problem(lab, 20, 40, 5, torch.float32)
    problem.dy[3, 7] = float("nan")
    ds, d_lora_b, _ = problem.run()
    assert ds.isnan().any(1).nonzero().flatten().tolist() == [3]
    assert d_lora_b.isnan().any(1).nonzero().flatten().tolist() == [7]
