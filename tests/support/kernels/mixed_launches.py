"""Kernels of a mixed batch, each launched on a `MixedProblem`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlora.kernels.chips import chip_of
from fastlora.kernels.configs import KernelConfig, choose
from fastlora.kernels.mixed_lora_add import launch_mixed_lora_add
from fastlora.kernels.mixed_lora_expand import launch_mixed_lora_expand
from fastlora.kernels.mixed_lora_linear import launch_mixed_lora_linear
from fastlora.kernels.mixed_lora_shrink import launch_mixed_lora_shrink
from fastlora.testing import assert_within_budget
from tests.support.kernels.mixed_problem import MixedProblem


def add(
    problem: MixedProblem, config: KernelConfig | None = None, y: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns module 0's y, from a base product that is right."""
    if y is None:
        y = F.linear(problem.x, problem.weights[0], problem.biases[0])
    config = config or choose(chip_of(y.device), "mixed_lora_add", y.dtype)
    launch_mixed_lora_add(
        y,
        problem.x,
        *problem.route,
        problem.groups.pieces(config.block_m),
        problem.lora_a_address[0],
        *problem.tables(),
        factor_dtype=problem.factor_dtype,
        config=config,
    )
    return y


def expand(
    problem: MixedProblem,
    config: KernelConfig | None = None,
    splits: int = 1,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns module 0's y, from a base product and an s that are right."""
    if y is None:
        y = F.linear(problem.x, problem.weights[0], problem.biases[0])
    launch_mixed_lora_expand(
        y,
        problem.shrunk(splits)[:, 0],
        *problem.route,
        *problem.tables(),
        factor_dtype=problem.factor_dtype,
        config=config
        or choose(chip_of(y.device), "mixed_lora_expand", y.dtype, m=y.shape[0], n=y.shape[1]),
    )
    return y


def linear(
    problem: MixedProblem,
    config: KernelConfig | None = None,
    g: int = 0,
    splits: int = 1,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns module g's y, over NaN, from an s that is right."""
    n = problem.ns[g]
    y = problem.lab.poisoned(problem.m, n, dtype=problem.dtype) if y is None else y
    launch_mixed_lora_linear(
        y,
        problem.x,
        problem.weights[g],
        problem.biases[g],
        problem.shrunk(splits)[:, g],
        *problem.route,
        *problem.tables(g),
        factor_dtype=problem.factor_dtype,
        config=config
        or choose(chip_of(y.device), "mixed_lora_linear", problem.dtype, m=problem.m, n=n),
        pdl=False,
    )
    return y


def shrink_into(problem: MixedProblem, s: torch.Tensor, config: KernelConfig | None = None) -> None:
    """Writes s ``[splits, G, M, R]``."""
    config = config or choose(
        chip_of(problem.x.device),
        "mixed_lora_shrink",
        problem.dtype,
        m=problem.m,
        r=len(problem.ns) * problem.max_rank,
    )
    launch_mixed_lora_shrink(
        s,
        problem.x,
        *problem.route,
        problem.groups.pieces(config.block_m),
        problem.lora_a_address,
        problem.rank,
        factor_dtype=problem.factor_dtype,
        config=config,
    )


def check_shrunk(problem: MixedProblem, s: torch.Tensor) -> None:
    """Compares every row's sum of planes, in fours, and that nothing else was written."""
    for g, factors in enumerate(problem.factors):
        actual, same_dtype, truth = [], [], []
        for slot, (lora_a, _, _) in enumerate(factors):
            at, r = problem.positions_of(slot), lora_a.shape[0]
            filled = -(-r // 4) * 4
            x, lora_a = problem.x[problem.rows_of(slot)], lora_a.to(problem.dtype)
            actual.append(s[:, g, at, :r].sum(0).flatten())
            same_dtype.append(F.linear(x, lora_a).flatten())
            truth.append((x.double() @ lora_a.double().t()).flatten())
            assert (s[:, g, at, r:filled] == 0).all()
            assert s[:, g, at, filled:].isnan().all()
        assert_within_budget(torch.cat(actual), torch.cat(same_dtype), torch.cat(truth), "s")
        assert s[:, g, problem.positions_of(-1)].isnan().all()
