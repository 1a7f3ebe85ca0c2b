"""The autograd function of a linear with adapters: what is saved, and every gradient.

`run` takes a base weight, or what the base layer made; one adapter for all rows, or many with
`fastlora.ops.rows.Rows`; an s that a sibling made, or none. Saved for backward are x itself, s, the
seeds and the parameters; never a cast or dropped copy of x, nor a mask. Whatever needs no gradient
is neither saved nor computed.

On kernels `fastlora.autograd.shared_input` has nodes for layers that are fed by the same tensor.
Plain ones are one node. Where others share their passes over x, the graph has two kinds of node:
`LoraShrink` makes every layer's s, and its backward yields their d_lora_a and nothing else; each
layer's `LoraLinear` takes its s, and its backward returns dx with the LoRA term inside, ds (the
gradient of s) and d_lora_b.

Shapes: ``x [..., K]``, ``weight [N, K]``, ``y [..., N]``; of each adapter ``lora_a [R, K]``,
``lora_b [N, R]``, ``lora_bias [N]`` or None, not scaled; s as in `fastlora.ops.backend.Backend`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch.autograd.function import once_differentiable

import fastlora.ops.operators  # noqa: F401  # registers backends
import fastlora.ops.torch.backend  # noqa: F401  # registers a backend
from fastlora.ops.backend import BACKENDS, Backward
from fastlora.ops.factors import Base, Operands
from fastlora.ops.rows import Rows
from fastlora.ops.torch import products
from fastlora.ops.torch.reference import column_sums


def run(
    x: torch.Tensor,
    base: Base,
    operands: Operands,
    impl: str,
    plan: str = "auto",
    rows: Rows | None = None,
    s: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns ``[..., N]``: a base product, or a given y, with every row's own adapter.

    Args:
        x: The input, in the dtype of the products.
        base: The base layer.
        operands: The adapters, with scalings in fp32 (fp64 beside an fp64 x).
        impl: Name of the backend.
        plan: As in `fastlora.functional.lora_linear`.
        rows: Which adapter each row has; None where one has all.
        s: Of `fastlora.autograd.shared_input.shrink`, where a sibling made it.
    """
    if s is not None:  # the gradient of lora_a comes through it
        operands = operands._replace(lora_a=[a.detach() for a in operands.lora_a])
    if torch.is_grad_enabled():
        lora_a, lora_b, lora_bias, *others = operands
        given = *base[:3], s
        if records_gradients(x, *given, *lora_a, *lora_b, *lora_bias):
            factors = chain.from_iterable(zip(lora_a, lora_b, lora_bias, strict=True))
            return LoraLinear.apply(x, *given, *others, rows, impl, plan, *factors)
    return _forward(x, base, operands, rows, s, impl, plan)[0]


def records_gradients(*tensors: torch.Tensor | None) -> bool:
    """Whether a graph is recorded through one of these."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _forward(
    x: torch.Tensor,
    base: Base,
    operands: Operands,
    rows: Rows | None,
    s: torch.Tensor | None,
    impl: str,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``[..., N]`` and s without recording a graph."""
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
    if len(shape) != 2:  # not a view to autograd, which would refuse to let anyone write into it
        made = torch.ops.aten._unsafe_view.default(made, (*shape[:-1], made.shape[-1]))
    return made, s


def plain_backward(backward: Callable[..., Any]) -> Any:
    """A backward that has no derivative, and the dtypes of its forward whatever surrounds it."""
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor | None) -> Any:
        # Where no second derivative is recorded, nothing has to see to it that it raises.
        compute = once if torch.is_grad_enabled() else backward
        # The only kind of device that the context's tensors can be on is that of a gradient.
        grad = grads[0]
        if grad is None:
            grad = next((g for g in grads if g is not None), None)
        device_type = "cpu" if grad is None or grad.is_cpu else grad.device.type
        if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return compute(ctx, *grads)
        return compute(ctx, *grads)

    return run


class LoraLinear(torch.autograd.Function):
    """`run` where a graph is recorded; y itself is not written.

    Saves x, s, the seeds and the parameters; dropout masks are made again from the seeds. With an
    ``s`` that siblings share, every lora_a comes detached and x is not saved for it.
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
        *factors: Any,  # lora_a, lora_b, lora_bias of each adapter in turn
    ) -> torch.Tensor:
        own = list(factors[::3]), list(factors[1::3]), list(factors[2::3])
        operands = Operands(*own, scaling, dropout_p, seeds, slots)
        made, s = _forward(x, Base(weight, bias, y), operands, rows, s, impl, plan)
        needs = ctx.needs_input_grad
        needs_a, needs_b = any(needs[12::3]), any(needs[13::3])
        saves_x, saves_s = needs_a or needs[1], needs_b or rows is not None
        ctx.dropout_p, ctx.slots, ctx.rows, ctx.impl = dropout_p, slots, rows, impl
        ctx.plan = "auto" if plan == "invariant" else plan  # a backward has no such plan
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(
            x if saves_x else None, weight, s if saves_s else None, scaling, seeds, *factors
        )
        return made

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Once: what checkpoints recompute can be taken a single time.
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
        operands = Operands(*own, scaling, ctx.dropout_p, seeds, ctx.slots)
        needs_own_bias = rows is None and needs[2]
        wants = needs_x, needs_bias or needs_own_bias, needs_s, needs
        given = Backward(dy, weight, flat, operands, rows, s, ctx.plan, *wants)
        dx, d_bias, ds, d_factors = BACKENDS[ctx.impl].gradients(given)
        d_weight = None
        if dx is not None and len(shape) != 2:
            dx = dx.view(shape)
        if needs_own_bias and d_bias is not None:
            sums = d_bias
            if grad.dtype != ctx.x_dtype:  # a y that was given
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
            *(d_factors if rows is None else _those(d_factors, needs)),
        )


def _those(
    gradients: Sequence[torch.Tensor | None], wanted: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Returns the gradients that are wanted; backends make those of several adapters together."""
    return [grad if wants else None for grad, wants in zip(gradients, wanted, strict=True)]
