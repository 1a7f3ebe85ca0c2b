"""The autograd function of adapters on a stack of E weights.

Keys and shapes are as in `fastlora.ops.stacks`.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

import fastlora.ops.torch.backend  # noqa: F401  # registers a backend
from fastlora.autograd.lora_linear import once_differentiable_without_autocast, records_gradients
from fastlora.ops.backend import BACKENDS
from fastlora.ops.rows import Rows
from fastlora.ops.stacks import StackedOperands


def add_stacked_updates_(
    y: torch.Tensor, x: torch.Tensor, operands: StackedOperands, rows: Rows, impl: str
) -> torch.Tensor:
    """Add the LoRA update of each row to ``y [P, N]`` in place, and return y.

    Args:
        y: The base product, which nothing else reads.
        x: ``[P, K]``, sorted by key, in the dtype of y.
        operands: The adapters.
        rows: The sorted rows.
        impl: Name of the backend.
    """
    factors = list(chain.from_iterable(zip(operands.lora_a, operands.lora_b, strict=True)))
    if records_gradients(x, y, *factors):
        made: torch.Tensor = StackedLora.apply(y, x, *operands[2:], rows, impl, *factors)
        return made
    BACKENDS[impl].add_stacked_updates_(y, x, operands, rows)
    return y


class StackedLora(torch.autograd.Function):
    """Add LoRA updates on a stack of weights to y in place.

    Saves x, s, and the factors. Dropout masks are computed again from the seeds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        scaling: torch.Tensor,
        dropout_p: tuple[float, ...],
        seeds: torch.Tensor | None,
        rows: Rows,
        impl: str,
        *factors: Any,  # lora_a and lora_b of each adapter in turn
    ) -> torch.Tensor:
        operands = StackedOperands(
            list(factors[::2]), list(factors[1::2]), scaling, dropout_p, seeds
        )
        s = BACKENDS[impl].add_stacked_updates_(y, x, operands, rows)
        ctx.mark_dirty(y)
        ctx.dropout_p, ctx.rows, ctx.impl = dropout_p, rows, impl
        saves_x = any(ctx.needs_input_grad[7::2])
        ctx.save_for_backward(x if saves_x else None, s, scaling, seeds, *factors)
        return y

    @staticmethod
    @once_differentiable_without_autocast
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, s, scaling, seeds, *factors = ctx.saved_tensors
        operands = StackedOperands(factors[::2], factors[1::2], scaling, ctx.dropout_p, seeds)
        needs_y, needs_x = ctx.needs_input_grad[:2]
        dx, found = BACKENDS[ctx.impl].stacked_gradients(
            dy, x, s, operands, ctx.rows, needs_x, ctx.needs_input_grad[7:]
        )
        return dy if needs_y else None, dx, *([None] * 5), *found
