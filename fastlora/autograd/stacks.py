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
from fastlora.ops.execution_mode import has_unknown_values
from fastlora.ops.layout import rank_to_multiple_of_16
from fastlora.ops.library import (
    define_operator,
    register_composite_implicit_autograd,
    register_fake,
    register_implementation,
)
from fastlora.ops.rows import Rows, rows_from_tensors
from fastlora.ops.stacks import StackedWeightAdapterOperands
from fastlora.ops.torch.stacks import (
    dtype_of_s,
    grouped_gradients,
    grouped_linear,
    grouped_products_or_operator,
)


def stacked_lora_linear(
    x: torch.Tensor,
    weight_stack: torch.Tensor | None,
    y: torch.Tensor | None,
    num_adapter_slots: int,
    operands: StackedWeightAdapterOperands,
    rows: Rows,
    impl: str,
) -> torch.Tensor:
    """Compute the output of LoRA linear layers whose base weights are stacked in one tensor.

    The output is the product of each row and its weight in the stack, plus the LoRA update of the
    row's adapter. The key of a row identifies both its weight and its adapter. The rows are sorted
    by key. The result is a tensor ``[P, N]``.

    Args:
        x: ``[P, K]``, sorted by key, in the dtype of the stack.
        weight_stack: ``[E, N, K]``, any strides; None if y is the base product.
        y: None, or the base product in the dtype of x, to which the updates are added in place.
        num_adapter_slots: Number of adapters S, with which the keys were computed.
        operands: The adapters. The list of factors may be empty if there is a stack.
        rows: The sorted rows.
        impl: Name of the backend.
    """
    if weight_stack is not None and not operands.lora_a:
        return grouped_linear(x, weight_stack, rows, num_adapter_slots)
    factors = list(chain.from_iterable(zip(operands.lora_a, operands.lora_b, strict=True)))
    given = [tensor for tensor in (x, weight_stack, y, *factors) if tensor is not None]
    if records_gradients(*given) or has_unknown_values(x):
        made: torch.Tensor = StackedWeightLoraLinear.apply(
            x, weight_stack, y, num_adapter_slots, *operands[2:], rows, impl, *factors
        )
        return made
    if y is None:
        y = grouped_linear(x, weight_stack, rows, num_adapter_slots)  # type: ignore[arg-type]  # y or the stack is given
    BACKENDS[impl].add_stacked_updates_(y, x, operands, rows)
    return y


class StackedWeightLoraLinear(torch.autograd.Function):
    """Autograd function for LoRA linear layers whose base weights are stacked in one tensor.

    The stack holds, for example, the weights of all experts of a layer. Each row of x uses one of
    the weights in the stack. The forward pass computes the output of `stacked_lora_linear`, and
    saves x, the stack, s, and the factors. The backward pass computes the dropout masks again from
    the seeds. The gradient of x is one tensor, to which the backend adds the gradient of the
    updates.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        stack: torch.Tensor | None,
        y: torch.Tensor | None,
        slots: int,
        scaling: torch.Tensor,
        dropout_p: tuple[float, ...],
        seeds: torch.Tensor | None,
        rows: Rows,
        impl: str,
        *factors: Any,  # lora_a and lora_b of each adapter in turn
    ) -> torch.Tensor:
        operands = StackedWeightAdapterOperands(
            list(factors[::2]), list(factors[1::2]), scaling, dropout_p, seeds
        )
        adds_to_y = y is not None
        if stack is not None:
            y = grouped_products_or_operator(x)(x, stack, rows.slot_start[::slots])
        if has_unknown_values(x):
            arguments = (*operands, rows.operator_arguments(), impl)
            y, s = torch.ops.fastlora.stacked_updates(y, x, *arguments)
        else:
            s = BACKENDS[impl].add_stacked_updates_(y, x, operands, rows)  # type: ignore[arg-type]
            if adds_to_y:
                ctx.mark_dirty(y)
        ctx.slots, ctx.dropout_p, ctx.rows, ctx.impl = slots, dropout_p, rows, impl
        saves_x = ctx.needs_input_grad[1] or any(ctx.needs_input_grad[9::2])
        ctx.save_for_backward(x if saves_x else None, stack, s, scaling, seeds, *factors)
        return y  # type: ignore[return-value]

    @staticmethod
    @once_differentiable_without_autocast
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, stack, s, scaling, seeds, *factors = ctx.saved_tensors
        operands = StackedWeightAdapterOperands(
            factors[::2], factors[1::2], scaling, ctx.dropout_p, seeds
        )
        (needs_x, needs_stack, needs_y), wants = ctx.needs_input_grad[:3], ctx.needs_input_grad[9:]
        dx = d_stack = None
        if stack is not None:
            starts = ctx.rows.slot_start[:: ctx.slots]
            dx, d_stack = grouped_gradients(dy, x, stack, starts, needs_x, needs_stack)
        if has_unknown_values(dy):
            arguments = (*operands, ctx.rows.operator_arguments(), ctx.impl, needs_x, wants, dx)
            made = iter(torch.ops.fastlora.stacked_gradients(dy, x, s, *arguments))
            dx, *found = (next(made) if wanted else None for wanted in (needs_x, *wants))
        else:
            dx, found = BACKENDS[ctx.impl].stacked_gradients(
                dy, x, s, operands, ctx.rows, needs_x, wants, dx
            )
        return dx, d_stack, dy if needs_y else None, *([None] * 6), *found


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
    f"stacked_gradients(Tensor dy, Tensor? x, Tensor s, {_OPERANDS}, bool wants_x, bool[] wants,"
    " Tensor? dx) -> Tensor[]"
)


@register_composite_implicit_autograd("stacked_linear")
def _lora_linear_with_stacked_weights(
    x: torch.Tensor,
    weight_stack: torch.Tensor | None,
    y: torch.Tensor | None,
    num_adapter_slots: int,
    *given: Any,
) -> torch.Tensor:
    """Compute the output of LoRA linear layers with stacked base weights.

    This function implements the operator ``fastlora::stacked_linear``, which decomposes when
    autograd is traced. The rows of x are sorted. Each row is multiplied by its weight in the stack,
    and the LoRA update of its adapter is added. If y ``[P, N]`` is given, y is also added. Without
    a weight stack, y is the base output, to which the LoRA updates are added. ``given`` contains
    the fields of a `StackedWeightAdapterOperands`, the tensors that describe the rows, and the
    implementation. The lists of factors may be empty if a weight stack is given.
    """
    *operands, tensors, impl = given
    rows, adapters = rows_from_tensors(tensors), StackedWeightAdapterOperands(*operands)
    if weight_stack is not None:
        product = stacked_lora_linear(
            x, weight_stack, None, num_adapter_slots, adapters, rows, impl
        )
        return product if y is None else product + y
    if y is None:
        raise ValueError("neither a stack nor y is given")
    return stacked_lora_linear(x, None, y, num_adapter_slots, adapters, rows, impl)


@register_implementation("stacked_updates")
def _stacked_updates(y: torch.Tensor, x: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
    *operands, tensors, impl = given
    y, rows = y.clone(), rows_from_tensors(tensors)
    s = BACKENDS[impl].add_stacked_updates_(y, x, StackedWeightAdapterOperands(*operands), rows)
    return y, s


@register_fake("stacked_updates")
def _(y: torch.Tensor, x: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
    *operands, _, impl = given
    adapters = StackedWeightAdapterOperands(*operands)
    columns, dtype = max(a.shape[1] for a in adapters.lora_a), dtype_of_s(x, adapters)
    if impl == "triton":
        columns, dtype = rank_to_multiple_of_16(columns), x.dtype
    return torch.empty_like(y), x.new_empty(x.shape[0], columns, dtype=dtype)


@register_implementation("stacked_gradients")
def _stacked_gradients(
    dy: torch.Tensor, x: torch.Tensor | None, s: torch.Tensor, *given: Any
) -> list[torch.Tensor]:
    *operands, tensors, impl, wants_x, wants, dx = given
    rows, adapters = rows_from_tensors(tensors), StackedWeightAdapterOperands(*operands)
    dx = None if dx is None else dx.clone()
    dx, found = BACKENDS[impl].stacked_gradients(dy, x, s, adapters, rows, wants_x, wants, dx)
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
    wants_x, wants = given[-3:-1]
    factors = chain.from_iterable(zip(lora_a, lora_b, strict=True))
    made = [dy.new_empty(dy.shape[0], lora_a[0].shape[2])] if wants_x else []
    return made + [f.new_empty(f.shape) for f, wanted in zip(factors, wants, strict=True) if wanted]
