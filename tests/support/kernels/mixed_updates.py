"""The two kernels that add a LoRA term into y, each launched on a `MixedProblem`."""

from __future__ import annotations

import torch

from fastlora.kernels.chips import chip_of
from fastlora.kernels.configs import KernelConfig, choose
from fastlora.kernels.mixed_lora_add import launch_mixed_lora_add
from fastlora.kernels.mixed_lora_expand import launch_mixed_lora_expand
from tests.support.kernels.mixed_problem import MixedProblem


def add(
    problem: MixedProblem, config: KernelConfig | None = None, y: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns module 0's y, from a base product that is right."""
    if y is None:
        y = torch.nn.functional.linear(problem.x, problem.weights[0], problem.biases[0])
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
        y = torch.nn.functional.linear(problem.x, problem.weights[0], problem.biases[0])
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
