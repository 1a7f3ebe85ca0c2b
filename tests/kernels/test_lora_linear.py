"""`lora_linear`: values against float64, planes, chunks of ranks, biases, scalings, strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastlora.ops.torch import reference
from fastlora.testing import assert_within_budget

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.chips import chip_of
from fastlora.kernels.configs import KernelConfig, choose
from fastlora.kernels.lora_linear import launch_lora_linear

# Taken pairwise: rows, outputs and inputs off the tile, ranks.
SHAPES = [
    (1, 128, 256, 8),
    (15, 33, 100, 3),
    (16, 64, 576, 16),
    (17, 130, 72, 24),
    (127, 96, 200, 64),
    (2000, 80, 65, 1),
    (16, 20, 264, 128),
    (33, 257, 31, 4),
    (5, 40, 96, 300),
]
SMALL = KernelConfig(block_m=16, block_n=32, block_k=32, block_r=16, num_warps=4, num_stages=2)


class Problem:
    """The operands of one linear, in x's dtype unless a test replaces one."""

    def __init__(self, lab: Any, m: int, n: int, k: int, r: int, dtype: torch.dtype) -> None:
        self.lab = lab
        self.x, self.weight = lab.rand(m, k, dtype=dtype), lab.rand(n, k, dtype=dtype)
        self.s, self.lora_b = lab.rand(m, r, dtype=dtype), lab.rand(n, r, dtype=dtype)
        self.bias: torch.Tensor | None = lab.rand(n, dtype=dtype)
        self.scaling = torch.tensor([0.75], device=lab.device)

    def run(
        self, config: KernelConfig | None = None, s_out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Launches and returns y."""
        (m, k), (n, r) = self.x.shape, self.lora_b.shape
        y = self.lab.poisoned(m, n, dtype=self.x.dtype)
        launch_lora_linear(
            y,
            self.x,
            self.weight,
            self.s,
            self.lora_b,
            self.scaling,
            bias=self.bias,
            s_out=s_out,
            config=config or choose(chip_of(y.device), "lora_linear", y.dtype, m=m, n=n, k=k, r=r),
            pdl=False,
        )
        return y

    def check(self, y: torch.Tensor) -> None:
        """Compares y with float64 of the operands as the kernel rounds them."""
        dtype = self.x.dtype
        s = (self.s.sum(0) if self.s.dim() == 3 else self.s).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        same_dtype = reference.lora_linear(
            self.x, self.weight, bias, s, self.lora_b.to(dtype), self.scaling
        )
        truth = self.x.double() @ self.weight.double().t()
        truth += (s.double() * self.scaling.double()) @ self.lora_b.to(dtype).double().t()
        if self.bias is not None:
            truth += self.bias.double()
        assert_within_budget(y, same_dtype, truth, "y")


@pytest.mark.parametrize(("m", "n", "k", "r"), SHAPES)
def test_values(lab: Any, dtype: torch.dtype, m: int, n: int, k: int, r: int) -> None:
    problem = Problem(lab, m, n, k, r, dtype)
    problem.check(problem.run())


@pytest.mark.parametrize("planes", [2, 8])
def test_planes_are_summed_and_stored(lab: Any, dtype: torch.dtype, planes: int) -> None:
    problem = Problem(lab, 37, 70, 64, 24, dtype)
    problem.s = lab.rand(planes, 37, 24)
    s_out = lab.poisoned(37, 24, dtype=dtype)
    problem.check(problem.run(SMALL, s_out))
    expected = problem.s[0].clone()
    for plane in problem.s[1:]:
        expected += plane
    assert torch.equal(s_out, expected.to(dtype))


def test_every_chunk_of_ranks(lab: Any) -> None:
    problem = Problem(lab, 20, 40, 32, 50, torch.float32)  # chunks of 16, 16, 16 and 2
    problem.s = lab.rand(2, 20, 50)
    s_out = lab.poisoned(20, 50, dtype=torch.float32)
    problem.check(problem.run(SMALL, s_out))
    assert torch.equal(s_out, problem.s[0] + problem.s[1])


@pytest.mark.parametrize("group_m", [1, 3, 8])
def test_program_order_covers_every_tile(lab: Any, group_m: int) -> None:
    problem = Problem(lab, 75, 100, 16, 4, torch.float32)
    config = KernelConfig(
        block_m=16, block_n=32, block_k=16, block_r=16, num_warps=4, num_stages=2, group_m=group_m
    )
    problem.check(problem.run(config))


def test_scaling_per_rank_row(lab: Any, dtype: torch.dtype) -> None:
    problem = Problem(lab, 17, 48, 64, 24, dtype)
    problem.scaling = torch.linspace(0.1, 2.0, 24, device=lab.device)
    problem.check(problem.run())


def test_fp32_factor_and_bias(lab: Any, dtype: torch.dtype) -> None:
    problem = Problem(lab, 17, 48, 64, 8, dtype)
    problem.lora_b, problem.bias = lab.rand(48, 8), lab.rand(48)
    problem.check(problem.run())


def test_without_bias(lab: Any, dtype: torch.dtype) -> None:
    problem = Problem(lab, 17, 48, 64, 8, dtype)
    problem.bias = None
    problem.check(problem.run())


@pytest.mark.parametrize("layout", ["rows", "transposed", "both"])
def test_strided_inputs(lab: Any, layout: str) -> None:
    problem = Problem(lab, 19, 45, 70, 6, torch.float32)
    for name in ("x", "weight", "s", "lora_b"):
        setattr(problem, name, lab.strided(getattr(problem, name), layout))
    problem.bias = lab.rand(90)[::2]
    problem.check(problem.run())


def test_expanded_inputs(lab: Any) -> None:
    problem = Problem(lab, 20, 45, 70, 6, torch.float32)
    problem.x, problem.s = problem.x[:1].expand(20, 70), problem.s[:1].expand(20, 6)
    problem.bias = lab.rand(1).expand(45)
    problem.check(problem.run())


def test_one_rounding(lab: Any) -> None:
    """base + delta is rounded once: half an ulp of each would vanish if either were rounded first.

    In fp16, 2048 + 1 rounds to 2048, and 2048 + (1 + 1) is 2050.
    """
    problem = Problem(lab, 16, 16, 16, 16, torch.float16)
    problem.x, problem.weight = torch.zeros_like(problem.x), torch.zeros_like(problem.weight)
    problem.s, problem.lora_b = torch.zeros_like(problem.s), torch.zeros_like(problem.lora_b)
    problem.x[:, :2] = torch.tensor([2048.0, 1.0])
    problem.weight[:, :2] = 1.0
    problem.s[:, 0], problem.lora_b[:, 0] = 1.0, 1.0
    problem.bias, problem.scaling = None, torch.ones_like(problem.scaling)
    assert (problem.run() == 2050).all()


def test_no_rows(lab: Any) -> None:
    assert Problem(lab, 0, 48, 64, 8, torch.float32).run().shape == (0, 48)
