"""Operators for mixed batches, and what they take, of a `MixedProblem`."""

from __future__ import annotations

from typing import Any

import torch

from fastlora.ops import schema  # noqa: F401 - registers operators
from tests.support.kernels.mixed_problem import MixedProblem

OPS = torch.ops.fastlora


def linear(
    problem: MixedProblem, g: int = 0, s: torch.Tensor | None = None, plan: str = "auto"
) -> torch.Tensor:
    """One module's y."""
    return OPS.lora_linear_at(*linear_arguments(problem, g, s, plan))


def linear_arguments(
    problem: MixedProblem, g: int, s: torch.Tensor | None, plan: str
) -> tuple[Any, ...]:
    return (
        *(problem.x, problem.weights[g], problem.biases[g], problem.rows(), s),
        *(problem.all_tables, g, problem.max_rank, problem.factor_dtype, plan),
    )


def shrink_arguments(problem: MixedProblem) -> tuple[Any, ...]:
    given = problem.x, problem.rows(), problem.all_tables
    return (*given, problem.max_rank, problem.factor_dtype, False)


def add_arguments(problem: MixedProblem, y: torch.Tensor) -> tuple[Any, ...]:
    given = y, problem.x, problem.rows(), problem.all_tables
    return (*given, 0, problem.max_rank, problem.factor_dtype, "triton")
