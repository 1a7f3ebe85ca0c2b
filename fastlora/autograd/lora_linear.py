"""The autograd function of a linear layer with adapters.

`run_adapters` receives a base weight, or the output of the base layer. It receives one adapter for
all rows, or many adapters with `fastlora.ops.rows.Rows`. It also receives an s that another layer
of the shared-input group has computed, or None. The function saves x itself, s, the seeds, and the
parameters. It never saves a cast or dropped copy of x, or a mask. It saves and computes nothing for
inputs that need no gradient.

On kernels, `fastlora.autograd.shared_input` provides nodes for layers that receive the same tensor.
One node computes several plain layers. For layers that share only their pass over x, the graph has
two kinds of nodes. `GroupedLoraShrink` computes every layer's s, and its backward computes every
layer's d_lora_a and nothing else. Each layer's `LoraLinear` takes its s, and its backward returns
dx including the LoRA term, ds (the gradient of s), and d_lora_b.

Shapes: ``x [..., K]``, ``weight [N, K]``, ``y [..., N]``; for each adapter ``lora_a [R, K]``,
``lora_b [N, R]``, and ``lora_bias [N]`` or None, not scaled; s as in
`fastlora.ops.backend.Backend`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch.autograd import forward_ad

import fastlora.ops.operator_backend  # noqa: F401  # registers backends
import fastlora.ops.torch.backend  # noqa: F401  # registers a backend
from fastlora.ops.backend import BACKENDS, BackwardArguments
from fastlora.ops.execution_mode import (
    is_being_compiled,
    raise_for_second_derivative,
    raise_if_gradients_are_batched,
)
from fastlora.ops.factors import Base, LayerAdapterOperands
from fastlora.ops.rows import Rows
from fastlora.ops.torch import products
from fastlora.ops.torch.reference import column_sums


def run_adapters(
    x: torch.Tensor,
    base: Base,
    operands: LayerAdapterOperands,
    impl: str,
    plan: str = "auto",
    rows: Rows | None = None,
    s: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a base layer with its adapters, and return the output.

    The output is ``[..., N]``. Each row of it is the base layer's output plus the update of the
    row's adapter. If autograd records operations on the inputs, the autograd function `LoraLinear`
    computes the output. If autograd records nothing, only the forward pass runs.

    Args:
        x: The input, in the dtype of the products.
        base: The base layer.
        operands: The adapters, with scalings in fp32 (fp64 for an fp64 x).
        impl: Name of the backend.
        plan: As in `fastlora.functional.lora_linear`.
        rows: The adapter of each row, or None if one adapter applies to all rows.
        s: The result of `fastlora.autograd.shared_input.grouped_shrink`, if another layer of the
            shared-input group has computed it.
    """
    if s is not None:  # lora_a gets its gradient through s.
        operands = operands._replace(lora_a=[a.detach() for a in operands.lora_a])
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        lora_a, lora_b, lora_bias, *others = operands
        given = *base[:3], s
        if records_gradients(x, *given, *lora_a, *lora_b, *lora_bias):
            factors = chain.from_iterable(zip(lora_a, lora_b, lora_bias, strict=True))
            return LoraLinear.apply(x, *given, *others, rows, impl, plan, *factors)
    return _forward_without_graph(x, base, operands, rows, s, impl, plan)[0]


def records_gradients(*tensors: torch.Tensor | None) -> bool:
    """Return whether autograd records operations on any of the given tensors.

    The result is True if gradient mode is enabled and at least one of the tensors requires a
    gradient. The result is also True if `torch.compile` traces derivatives in forward mode.
    Compiled graphs contain operators without a forward-mode formula, whereas autograd functions
    raise an error.
    """
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0 and is_being_compiled()


def _forward_without_graph(
    x: torch.Tensor,
    base: Base,
    operands: LayerAdapterOperands,
    rows: Rows | None,
    s: torch.Tensor | None,
    impl: str,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward pass without an autograd graph.

    Returns a tuple (output, s). The output is ``[..., N]``, and s is the shrink output, which is
    the product of x with lora_a.
    """
    dtype, shape, (weight, bias, y, inplace) = x.dtype, x.shape, base
    flat, given = x if len(shape) == 2 else x.reshape(-1, shape[-1]), y
    if weight is not None and weight.dtype != dtype:
        weight = weight.to(dtype)
    if y is not None:
        if not y.is_contiguous():
            y, inplace = y.contiguous(), True
        y = y.view(-1, y.shape[-1])
    own_bias = None if rows is not None else operands.lora_bias[0]
    if own_bias is not None:
        own_bias = own_bias * operands.scaling
        if weight is not None:
            bias = own_bias if bias is None else bias + own_bias
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if weight is not base.weight or bias is not base.bias or y is not None:
        base = Base(weight, bias, y, inplace)
    made, s = BACKENDS[impl].forward(flat, base, operands, rows, s, plan)
    if own_bias is not None and weight is None:
        made += own_bias.to(made.dtype)
    if made is y and given is not None and given.is_contiguous():
        return given, s
    # Not a view for autograd, which would not allow in-place writes to it.
    if len(shape) != 2:
        made = torch.ops.aten._unsafe_view.default(made, (*shape[:-1], made.shape[-1]))
    return made, s


def once_differentiable_without_autocast(backward: Callable[..., Any]) -> Any:
    """Decorate a backward method so that it runs without autocast and rejects double backward.

    See `raise_for_second_derivative` and, for its errors, `raise_if_gradients_are_batched`.
    """

    @functools.wraps(backward)
    def call_backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise_for_second_derivative()
        # The context's tensors are on the same type of device as the gradient.
        grad = grads[0]
        if grad is None:
            grad = next((g for g in grads if g is not None), None)
        device_type = "cpu" if grad is None or grad.is_cpu else grad.device.type
        try:
            if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
                with torch.autocast(device_type, enabled=False):
                    return backward(ctx, *grads)
            return backward(ctx, *grads)
        except RuntimeError as error:
            raise_if_gradients_are_batched(grads, error)
            raise

    return call_backward


class LoraLinear(torch.autograd.Function):
    """Autograd function for a linear layer with LoRA.

    The base layer and the updates of one or more adapters are computed as one autograd node. A
    given y is not overwritten. The function saves x, s, the seeds, and the parameters. Dropout
    masks are computed again from the seeds. If ``s`` is shared with other layers, every lora_a is
    detached, and x is not saved for the gradient of lora_a.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        y: torch.Tensor | None,
        s: torch.Tensor | None,
        scaling: torch.Tensor,
        dropout_p: tuple[float, ...],
        seeds: torch.Tensor | None,
        slots: tuple[int, ...] | None,
        rows: Rows | None,
        impl: str,
        plan: str,
        *factors: Any,  # lora_a, lora_b, and lora_bias of each adapter in turn
    ) -> torch.Tensor:
        own = list(factors[::3]), list(factors[1::3]), list(factors[2::3])
        operands = LayerAdapterOperands(*own, scaling, dropout_p, seeds, slots)
        made, s = _forward_without_graph(x, Base(weight, bias, y), operands, rows, s, impl, plan)
        needs = ctx.needs_input_grad
        needs_a, needs_b = any(needs[12::3]), any(needs[13::3])
        saves_x, saves_s = needs_a or needs[1], needs_b or rows is not None
        ctx.dropout_p, ctx.slots, ctx.rows, ctx.impl = dropout_p, slots, rows, impl
        # There is no such plan for a backward.
        ctx.plan = "auto" if plan == "invariant" else plan
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(
            x if saves_x else None, weight, s if saves_s else None, scaling, seeds, *factors
        )
        if x.dim() == 2:
            # Compiled code in torch 2.11 loses the gradient of a result that was written in place.
            made = torch.ops.aten._unsafe_view.default(made, made.shape)
        return made

    @staticmethod
    @once_differentiable_without_autocast
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Access `saved_tensors` once: a checkpoint lets its tensors be unpacked a single time.
        x, weight, s, scaling, seeds, *factors = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_y, needs_s = ctx.needs_input_grad[:5]
        needs, rows, shape = ctx.needs_input_grad[12:], ctx.rows, ctx.x_shape
        dy, flat = grad, x
        if len(shape) != 2:
            dy = grad.reshape(-1, grad.shape[-1])
            flat = None if x is None else x.reshape(-1, shape[-1])
        if dy.dtype != ctx.x_dtype:
            dy = dy.to(ctx.x_dtype)
        own = factors[::3], factors[1::3], factors[2::3]
        operands = LayerAdapterOperands(*own, scaling, ctx.dropout_p, seeds, ctx.slots)
        needs_own_bias = rows is None and needs[2]
        wants = needs_x, needs_bias or needs_own_bias, needs_s, needs
        given = BackwardArguments(dy, weight, flat, operands, rows, s, ctx.plan, *wants)
        dx, d_bias, ds, d_factors = BACKENDS[ctx.impl].gradients(given)
        d_weight = None
        if dx is not None and len(shape) != 2:
            dx = dx.view(shape)
        if needs_own_bias and d_bias is not None:
            sums = d_bias
            if grad.dtype != ctx.x_dtype:  # The given y has another dtype.
                sums = column_sums(grad.reshape(-1, grad.shape[-1]))
            d_factors[2] = (sums * scaling).to(factors[2].dtype)
        if needs_weight and flat is not None:
            d_weight = products.mm(dy.t(), flat).to(weight.dtype)
        return (
            dx,
            d_weight,
            d_bias.to(ctx.bias_dtype) if needs_bias and d_bias is not None else None,
            grad if needs_y else None,
            ds if needs_s else None,
            *([None] * 7),
            *(d_factors if rows is None else _mask_unwanted(d_factors, needs)),
        )


def _mask_unwanted(
    gradients: Sequence[torch.Tensor | None], wanted: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Return the gradients, with None for each gradient that is not needed.

    Backends compute the gradients of several adapters together, including those that are not
    needed.
    """
    return [grad if wants else None for grad, wants in zip(gradients, wanted, strict=True)]
