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
from fastlora.ops.execution_mode import is_traced
from fastlora.ops.layout import rank_to_multiple_of_16
from fastlora.ops.library import (
    define_operator,
    register_composite,
    register_fake,
    register_kernel,
)
from fastlora.ops.rows import Rows, rows_from_tensors
from fastlora.ops.stacks import StackedOperands
from fastlora.ops.torch.stacks import grouped_linear


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
    if records_gradients(x, y, *factors) or is_traced(x):
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
        if is_traced(x):
            arguments = (*operands, rows.operator_arguments(), impl)
            y, s = torch.ops.fastlora.stacked_updates(y, x, *arguments)
        else:
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
        (needs_y, needs_x), wants = ctx.needs_input_grad[:2], ctx.needs_input_grad[7:]
        if is_traced(dy):
            arguments = (*operands, ctx.rows.operator_arguments(), ctx.impl, needs_x, wants)
            made = iter(torch.ops.fastlora.stacked_gradients(dy, x, s, *arguments))
            dx, *found = (next(made) if wanted else None for wanted in (needs_x, *wants))
        else:
            dx, found = BACKENDS[ctx.impl].stacked_gradients(
                dy, x, s, operands, ctx.rows, needs_x, wants
            )
        return dy if needs_y else None, dx, *([None] * 5), *found


# ------------------------------------------------------------------------- in a compiled graph

_OPERANDS = (
    "Tensor[] lora_a, Tensor[] lora_b, Tensor scaling, float[] dropout_p, Tensor? seeds,"
    " Tensor[] rows, str impl"
)
define_operator(
    f"stacked_linear(Tensor x, Tensor? stack, Tensor? y, int slots, {_OPERANDS}) -> Tensor"
)
define_operator(f"stacked_updates(Tensor y, Tensor x, {_OPERANDS}) -> (Tensor, Tensor)")
define_operator(
    f"stacked_gradients(Tensor dy, Tensor? x, Tensor s, {_OPERANDS}, bool wants_x, bool[] wants)"
    " -> Tensor[]"
)


@register_composite("stacked_linear")
def _stacked_linear(
    x: torch.Tensor, stack: torch.Tensor | None, y: torch.Tensor | None, slots: int, *given: Any
) -> torch.Tensor:
    """Return the sum of y, the product of sorted rows with a stack, and the updates of adapters.

    The operator decomposes when autograd is traced. y ``[P, N]`` or the stack may be None, and
    there may be no adapters.
    """
    *operands, tensors, impl = given
    rows, adapters = rows_from_tensors(tensors), StackedOperands(*operands)
    if stack is not None:
        product = grouped_linear(x, stack, rows, slots)
        y = product if y is None else product + y
    if y is None:
        raise ValueError("neither a stack nor y is given")
    return add_stacked_updates_(y, x, adapters, rows, impl) if adapters.lora_a else y.clone()


@register_kernel("stacked_updates")
def _stacked_updates(y: torch.Tensor, x: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
    *operands, tensors, impl = given
    y, rows = y.clone(), rows_from_tensors(tensors)
    s = BACKENDS[impl].add_stacked_updates_(y, x, StackedOperands(*operands), rows)
    return y, s


@register_fake("stacked_updates")
def _(
    y: torch.Tensor, x: torch.Tensor, lora_a: list[torch.Tensor], *given: Any
) -> tuple[torch.Tensor, ...]:
    largest = max(a.shape[1] for a in lora_a)
    columns = rank_to_multiple_of_16(largest) if given[-1] == "triton" else largest
    return torch.empty_like(y), x.new_empty(x.shape[0], columns)


@register_kernel("stacked_gradients")
def _stacked_gradients(
    dy: torch.Tensor, x: torch.Tensor | None, s: torch.Tensor, *given: Any
) -> list[torch.Tensor]:
    *operands, tensors, impl, wants_x, wants = given
    rows, adapters = rows_from_tensors(tensors), StackedOperands(*operands)
    dx, found = BACKENDS[impl].stacked_gradients(dy, x, s, adapters, rows, wants_x, wants)
    return [gradient.contiguous() for gradient in (dx, *found) if gradient is not None]


@register_fake("stacked_gradients")
def _(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    s: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    *given: Any,
) -> list[torch.Tensor]:
    wants_x, wants = given[-2:]
    factors = chain.from_iterable(zip(lora_a, lora_b, strict=True))
    made = [dy.new_empty(dy.shape[0], lora_a[0].shape[2])] if wants_x else []
    return made + [f.new_empty(f.shape) for f, wanted in zip(factors, wants, strict=True) if wanted]
