"""dx by the forward's kernels on transposed operands: values, the mask exactly, strides.

`launch_lora_linear` makes all of it, `launch_lora_expand` adds the LoRA term to a product that is
there already.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastlora.ops.philox_reference import philox_keep_mask
from fastlora.testing import assert_within_budget

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.chips import chip_of
from fastlora.kernels.configs import KernelConfig, choose
from fastlora.kernels.lora_expand import launch_lora_expand
from fastlora.kernels.lora_linear import launch_lora_linear

SEED, P = -8_765_432_109_876_543, 0.3
# Taken pairwise: rows, outputs and inputs off the tile, ranks, with and without dropout.
SHAPES = [
    (1, 128, 256, 8, P),
    (15, 33, 100, 3, 0.0),
    (16, 64, 576, 16, P),
    (17, 130, 72, 24, 0.0),
    (127, 96, 200, 64, P),
    (2000, 40, 65, 1, 0.0),
    (16, 20, 264, 128, 0.0),
    (33, 257, 31, 4, P),
    (5, 40, 96, 300, P),
]


class Problem:
    """The operands of one dx, in dy's dtype unless a test replaces one."""

    def __init__(self, lab: Any, m: int, n: int, k: int, r: int, dtype: torch.dtype) -> None:
        self.lab = lab
        self.dy, self.weight = lab.rand(m, n, dtype=dtype), lab.rand(n, k, dtype=dtype)
        self.ds, self.lora_a = lab.rand(m, r, dtype=dtype), lab.rand(r, k, dtype=dtype)

    def options(self, p: float) -> dict[str, Any]:
        return {"seed": torch.tensor([SEED], device=self.lab.device), "dropout_p": p}

    def fused(self, p: float, config: KernelConfig | None = None) -> torch.Tensor:
        """Returns dx by one launch."""
        m, (r, k) = self.dy.shape[0], self.lora_a.shape
        dx = self.lab.poisoned(m, k, dtype=self.dy.dtype)
        launch_lora_linear(
            dx,
            self.dy,
            self.weight.t(),
            self.ds,
            self.lora_a.t(),
            None,
            bias=None,
            s_out=None,
            config=config or choose(chip_of(dx.device), "lora_grad_x", dx.dtype, m=m, k=k, r=r),
            pdl=False,
            **self.options(p),
        )
        return dx

    def added(self, p: float, config: KernelConfig | None = None) -> torch.Tensor:
        """Returns dx by an update of ``dy @ weight``."""
        dx = self.dy @ self.weight
        (m, k), r = dx.shape, self.ds.shape[1]
        config = config or choose(chip_of(dx.device), "lora_grad_x_add", dx.dtype, m=m, k=k, r=r)
        launch_lora_expand(dx, self.ds, self.lora_a.t(), None, config=config, **self.options(p))
        return dx

    def check(self, dx: torch.Tensor, p: float) -> None:
        """Compares with float64 of the operands as the kernel rounds them."""
        (m, k), lora_a = dx.shape, self.lora_a.to(self.dy.dtype)
        keep = philox_keep_mask(SEED, m, k, p).to(dx.device)
        same = self.dy @ self.weight + torch.where(keep, (self.ds @ lora_a) / (1 - p), 0)
        term = self.ds.double() @ lora_a.double() / (1 - p)
        truth = self.dy.double() @ self.weight.double() + torch.where(keep, term, 0)
        assert_within_budget(dx, same, truth, "dx")


@pytest.mark.parametrize(("m", "n", "k", "r", "p"), SHAPES)
def test_values(lab: Any, dtype: torch.dtype, m: int, n: int, k: int, r: int, p: float) -> None:
    problem = Problem(lab, m, n, k, r, dtype)
    problem.check(problem.fused(p), p)
    problem.check(problem.added(p), p)


@pytest.mark.parametrize("p", [0.0, P])
def test_every_chunk_of_ranks(lab: Any, p: float) -> None:
    problem = Problem(lab, 20, 40, 70, 50, torch.float32)  # chunks of 16, 16, 16 and 2
    config = KernelConfig(block_m=16, block_n=32, block_k=32, block_r=16, num_warps=4, num_stages=2)
    problem.check(problem.fused(p, config), p)
    problem.check(
        problem.added(p, KernelConfig(block_m=16, block_n=32, block_r=16, num_warps=4)), p
    )


def test_fp32_factor(lab: Any, dtype: torch.dtype) -> None:
    problem = Problem(lab, 17, 48, 64, 8, dtype)
    problem.lora_a = lab.rand(8, 64)
    problem.check(problem.fused(P), P)
    problem.check(problem.added(P), P)


@pytest.mark.parametrize("layout", ["rows", "transposed", "both"])
def test_strided_inputs(lab: Any, layout: str) -> None:
    problem = Problem(lab, 19, 45, 70, 6, torch.float32)
    for name in ("dy", "weight", "ds", "lora_a"):
        setattr(problem, name, lab.strided(getattr(problem, name), layout))
    problem.check(problem.fused(P), P)
    problem.check(problem.added(P), P)


@pytest.mark.parametrize("shape", [(1, 1), (1, 45), (20, 1)])
def test_expanded_gradient(lab: Any, shape: tuple[int, int]) -> None:
    problem = Problem(lab, 20, 45, 70, 6, torch.float32)
    problem.dy = lab.rand(*shape).expand(20, 45)
    problem.check(problem.fused(P), P)


@pytest.mark.parametrize("blocks", [(16, 16), (64, 32), (32, 64)])
def test_the_mask_is_the_written_one_whatever_the_tile(lab: Any, blocks: tuple[int, int]) -> None:
    """With no base gradient and ``ds @ lora_a = 1``, dx is the mask itself."""
    block_m, block_n = blocks
    problem = Problem(lab, 35, 8, 70, 4, torch.float32)
    problem.weight = torch.zeros_like(problem.weight)
    problem.ds, problem.lora_a = torch.ones_like(problem.ds), torch.ones_like(problem.lora_a) / 4
    expected = 2.0 * philox_keep_mask(SEED, 35, 70, 0.5).to(lab.device)
    linear = KernelConfig(
        block_m=block_m, block_n=block_n, block_k=16, block_r=16, num_warps=4, num_stages=2
    )
    expand = KernelConfig(block_m=block_m, block_n=block_n, block_r=16, num_warps=4)
    assert torch.equal(problem.fused(0.5, linear), expected)
    assert torch.equal(problem.added(0.5, expand), expected)


def test_a_dropped_term_that_is_not_finite_does_not_pass(lab: Any) -> None:
    problem = Problem(lab, 16, 20, 32, 4, torch.float32)
    problem.lora_a[:, 5] = float("inf")
    dropped = ~philox_keep_mask(SEED, 16, 32, P).to(lab.device)[:, 5]
    assert dropped.any() and not dropped.all()
    for dx in (problem.fused(P), problem.added(P)):
        assert torch.equal(dx[:, 5].isfinite(), dropped)
        assert dx[:, :5].isfinite().all() and dx[:, 6:].isfinite().all()


def test_no_rows(lab: Any) -> None:
    assert Problem(lab, 0, 48, 64, 8, torch.float32).fused(P).shape == (0, 64)
