"""A launch of grouped layers against float64: each with a size, rank, scaling, and bias."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.config_tables import MAX_GROUP_SIZE, KernelConfig
from fastlora.kernels.lora_expand import launch_lora_expand, launch_summed_lora_expand
from fastlora.kernels.lora_linear import launch_lora_linear
from fastlora.kernels.lora_shrink import launch_lora_shrink
from fastlora.kernels.plane_sums import launch_plane_sums
from fastlora.ops.backend import MAX_LAYERS_PER_LAUNCH
from fastlora.ops.triton import backward, linear
from fastlora.testing import assert_within_budget
from tests.support.kernels.lab import Lab
from tests.support.kernels.layers import Layers
from tests.support.kernels.mixed_problem import RANKS, MixedProblem, draw_ids

# Columns and ranks of each: on and off the tiles, more rank rows than a chunk, four at most.
GROUPS = [
    ((64, 32), (16, 16)),
    ((70, 33, 33), (8, 3, 40)),
    ((32, 96, 5, 64), (4, 16, 1, 20)),
]
SIZES = pytest.mark.parametrize(("columns", "ranks"), GROUPS, ids=str)
CONFIG = {"block_m": 16, "block_n": 32, "block_k": 32, "block_r": 16, "num_warps": 4}


def test_layers_and_kernels_mean_as_many() -> None:
    assert MAX_LAYERS_PER_LAUNCH == MAX_GROUP_SIZE


@SIZES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m", [1, 37])
def test_linear(
    lab: Lab,
    dtype: torch.dtype,
    m: int,
    bias: bool,
    columns: tuple[int, ...],
    ranks: tuple[int, ...],
) -> None:
    layers = Layers(lab, m, columns, ranks, dtype, bias)
    modules, s_out = layers.modules(), lab.poisoned(*layers.s.shape, dtype=dtype)
    launch_lora_linear(
        modules, layers.x, layers.s, s_out=s_out, config=KernelConfig(**CONFIG), pdl=False
    )
    layers.check([module.y for module in modules])
    assert torch.equal(s_out, layers.s)


@SIZES
@pytest.mark.parametrize("splits", [2, 4])
def test_a_linear_that_splits_k(
    lab: Lab, dtype: torch.dtype, splits: int, columns: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    """Of four parts of K one is empty."""
    layers = Layers(lab, 19, columns, ranks, dtype)
    modules, config = layers.modules(splits), KernelConfig(**CONFIG, splits=splits)
    planes = torch.stack([layers.s.float() * share for share in (0.25, 0.75)])
    launch_lora_linear(modules, layers.x, planes, s_out=None, config=config, pdl=False)
    ys = [module.y for module in layers.modules()]
    sums = [module.y for module in modules]
    launch_plane_sums(ys, sums, config=KernelConfig(num_warps=4, input_precision=""))
    layers.check(ys)


@SIZES
@pytest.mark.parametrize("bias", [False, True])
def test_expand_writes_what_a_product_accumulates_on(
    lab: Lab, dtype: torch.dtype, bias: bool, columns: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    layers = Layers(lab, 37, columns, ranks, dtype, bias)
    modules, s_out = layers.modules(weights=False), lab.poisoned(*layers.s.shape, dtype=dtype)
    config = KernelConfig(**CONFIG)
    planes = torch.stack([layers.s.float() * share for share in (0.25, 0.75)])
    launch_lora_expand(modules, planes, reads_y=False, s_out=s_out, config=config)
    layers.check([module.y for module in modules], product=False)
    assert torch.equal(s_out, layers.s)


@pytest.mark.parametrize(("ranks", "k"), [((16, 16), 64), ((8, 3, 40), 72), ((1, 2, 4, 9), 65)])
def test_one_expand_adds_the_terms_of_siblings(
    lab: Lab, dtype: torch.dtype, ranks: tuple[int, ...], k: int
) -> None:
    """The part of dx that comes from their adapters, rounded once, and bit for bit each time."""
    m = 37
    ds = [lab.rand(m, r, dtype=dtype) for r in ranks]
    lora_a = [lab.rand(r, k, dtype=dtype) for r in ranks]
    made = [lab.poisoned(m, k, dtype=dtype) for _ in range(2)]
    for dx in made:
        downs = [a.t() for a in lora_a]
        launch_summed_lora_expand(dx, downs, ds, config=KernelConfig(**CONFIG))
    assert torch.equal(*made)
    products = zip(ds, lora_a, strict=True)
    plain = torch.stack([s @ a for s, a in products]).sum(0)
    truth = sum((s.double() @ a.double() for s, a in zip(ds, lora_a, strict=True)), 0)
    assert isinstance(truth, torch.Tensor)
    assert_within_budget(made[0], plain, truth, "dx")


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("ranks", "k"), [((16, 16), 64), ((8, 3, 21), 72), ((1, 2, 4, 9), 65)])
def test_shrink(lab: Lab, dtype: torch.dtype, ranks: tuple[int, ...], k: int, splits: int) -> None:
    """Side by side in one read of x, whole and in planes."""
    layers = Layers(lab, 21, ranks, ranks, dtype, k=k)
    config = KernelConfig(**CONFIG, splits=splits)
    s = lab.poisoned(*layers.s.shape, dtype=dtype)
    if splits > 1:
        s = lab.poisoned(splits, *layers.s.shape, dtype=torch.float32)
    launch_lora_shrink(s, layers.x, layers.lora_a, seed=None, dropout_p=0.0, config=config)
    found = s.sum(0).to(dtype) if splits > 1 else s
    truth = torch.cat([layers.x.double() @ a.double().t() for a in layers.lora_a], 1)
    assert_within_budget(found, layers.s, truth, "s")


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("kernel", ["linear", "expand"])
@pytest.mark.parametrize("columns", [(64, 32), (70, 5, 33), (33, 64, 16, 48)], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_grouped_layers_of_a_mixed_batch(
    lab: Lab, dtype: torch.dtype, kernel: str, columns: tuple[int, ...], splits: int
) -> None:
    """In one grid each module's rows have its own adapters, weight and bias."""
    ranks = [RANKS, RANKS[::-1], RANKS[3:] + RANKS[:3], RANKS][: len(columns)]
    ids = draw_ids(37, 8)
    problem = MixedProblem(lab, ids, ranks, 40, list(columns), dtype, biased=(1, 3, 7))
    config = KernelConfig(**CONFIG, num_stages=2)
    for g, y in enumerate(problem.run_group(kernel, config, splits)):
        problem.check(y, g)


def test_a_group_with_unusual_strides_shares_no_launch() -> None:
    """A matrix with one row is contiguous whatever its stride, which kernels would use for all."""
    x, weights = torch.randn(5, 16), [torch.randn(8, 16), torch.randn(8, 16)]
    none: list[None] = [None, None]
    lora_a, lora_b = (
        [torch.randn(1, 16), torch.randn(5, 16)],
        [torch.randn(8, 1), torch.randn(8, 5)],
    )
    assert linear._can_share_launch(x, weights, none, lora_a, lora_b, none)
    strided = [torch.randn(16, 1).t(), lora_a[1]]
    assert strided[0].is_contiguous()
    assert not linear._can_share_launch(x, weights, none, strided, lora_b, none)
    assert not backward._can_share_adapter_grad_x(2 * [torch.randn(5, 8)], weights, strided, none)
