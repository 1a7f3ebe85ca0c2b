"""Operators for mixed batches, and what they take, of a `MixedProblem`."""

from __future__ import annotations

from typing import Any

import torch

from fastlora.ops import mixed_ops
from tests.support.kernels.mixed_problem import MixedProblem

OPS = torch.ops.fastlora


def linear(
    problem: MixedProblem, g: int = 0, s: torch.Tensor | None = None, plan: str = "auto"
) -> torch.Tensor:
    """One module's y."""
    return OPS.mixed_lora_linear(*linear_arguments(problem, g, s, plan))


def linear_arguments(
    problem: MixedProblem, g: int, s: torch.Tensor | None, plan: str
) -> tuple[Any, ...]:
    return (
        problem.x,
        problem.weights[g],
        problem.biases[g],
        *problem.route,
        mixed_ops.pieces_of(problem.groups),
        s,
        problem.lora_a_address,
        *tables(problem),
        g,
        problem.max_rank,
        problem.factor_dtype,
        plan,
    )


def shrink_arguments(problem: MixedProblem) -> tuple[Any, ...]:
    return (
        problem.x,
        *problem.route,
        mixed_ops.pieces_of(problem.groups),
        problem.lora_a_address,
        problem.rank,
        problem.max_rank,
        problem.factor_dtype,
    )


def add_arguments(problem: MixedProblem, y: torch.Tensor) -> tuple[Any, ...]:
    return (
        y,
        problem.x,
        *problem.route,
        mixed_ops.pieces_of(problem.groups),
        problem.lora_a_address,
        *tables(problem),
        0,
        problem.max_rank,
        problem.factor_dtype,
    )


def tables(problem: MixedProblem) -> tuple[torch.Tensor | None, ...]:
    """The tables past lora_a's, of all modules."""
    return (
        problem.lora_b_address,
        problem.lora_bias_address,
        problem.rank,
        problem.scaling,
    )
