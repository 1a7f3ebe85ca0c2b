"""The autograd functions above the operators: what is saved, and every gradient.

Saved for backward are x itself, s, the seed and the parameters; never a cast or dropped copy of x.
The backward is PyTorch GEMMs, and whatever needs no gradient is neither saved nor computed.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``s [M, R]``,
``y [M, N]``, ``scaling`` a number or ``[R]``; x and y may have any leading dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastlora import reference

# From here on a CPU forms d_lora_b faster as [R, N], its transposition included: at 512 rows of
# 1536 columns, fp32, one Zen 4 core, 214 us instead of 382.
_MANY_ROWS = 256


def _shrink(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    impl: str,
) -> torch.Tensor:
    if impl == "triton":
        return torch.ops.fastlora.lora_shrink(x, lora_a, seed, dropout_p, impl)
    if seed is not None:
        x = torch.ops.fastlora.lora_dropout(x, seed, dropout_p, impl)
    return reference.lora_shrink(x, lora_a)


def forward_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    impl: str,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(y [..., N], s [M, R])`` without recording a graph; x is ``[..., K]``.

    The eager path calls PyTorch directly: under `torch.compile` its ops are then visible.
    """
    dtype, shape = x.dtype, x.shape
    rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if impl == "triton":
        y, s = torch.ops.fastlora.lora_linear(
            rows, weight, bias, lora_a, lora_b, scaling, seed, dropout_p, impl, plan
        )
    else:
        s = _shrink(rows, lora_a, seed, dropout_p, impl)
        y = reference.lora_linear(rows, weight, bias, s, lora_b, scaling)
    return y if len(shape) == 2 else y.view(*shape[:-1], weight.shape[0]), s


def forward_add(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    impl: str,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(y + LoRA(x), s)`` without recording a graph; in place only if y is contiguous."""
    s = _shrink(x.reshape(-1, x.shape[-1]), lora_a, seed, dropout_p, impl)
    if not inplace or not y.is_contiguous():
        y = y.clone(memory_format=torch.contiguous_format)
    rows = y.view(-1, y.shape[-1])
    if impl == "triton":
        torch.ops.fastlora.lora_expand_(rows, s, lora_b, scaling, impl)
    else:
        reference.lora_expand_(rows, s, lora_b, scaling)
    return y, s


def _backward_lora(
    dy: torch.Tensor,
    dx: torch.Tensor | None,
    saved: tuple[Any, ...],
    needs: tuple[bool, bool, bool],
    dropout_p: float,
    impl: str,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The LoRA term's gradients: ``ds = scaling * dy @ lora_b``, and from it the rest.

    Args:
        dy: Gradient of y, ``[M, N]``, in x's dtype.
        dx: The base layer's share of x's gradient ``[M, K]``, added to in place; None for none.
        saved: ``x, lora_a, lora_b, scaling, s, seed`` as the forward saved them.
        needs: Whether x, lora_a and lora_b need a gradient.
        dropout_p: As in the forward.
        impl: As in the forward, so that the dropout mask is the same.

    Returns:
        ``dx``, ``d_lora_a [R, K]`` and ``d_lora_b [N, R]``, the last two in the factors' dtypes.
    """
    x, lora_a, lora_b, scaling, s, seed = saved
    needs_x, needs_a, needs_b = needs
    d_lora_a = d_lora_b = None
    if needs_b:
        scaled = (s * scaling).to(dy.dtype)
        if dy.shape[0] >= _MANY_ROWS:
            d_lora_b = (scaled.t() @ dy).t().contiguous().to(lora_b.dtype)
        else:
            d_lora_b = (dy.t() @ scaled).to(lora_b.dtype)
    if not needs_x and not needs_a:
        return dx, d_lora_a, d_lora_b
    ds = (dy @ lora_b.to(dy.dtype)).mul_(scaling)
    if needs_a:
        rows = x.reshape(-1, x.shape[-1])
        if seed is not None:
            rows = torch.ops.fastlora.lora_dropout(rows, seed, dropout_p, impl)
        d_lora_a = (ds.t() @ rows).to(lora_a.dtype)
    if needs_x:
        factor = lora_a.to(dy.dtype)
        if seed is not None:
            update = torch.ops.fastlora.lora_dropout(ds @ factor, seed, dropout_p, impl)
            dx = update if dx is None else dx.add_(update)
        else:
            dx = ds @ factor if dx is None else dx.addmm_(ds, factor)
    return dx, d_lora_a, d_lora_b


def without_autocast(backward: Callable[..., Any]) -> Any:
    """A backward computes in the dtypes of its forward, whatever surrounds it."""

    @functools.wraps(backward)
    def run(ctx: Any, grad: torch.Tensor) -> Any:
        device_type = grad.device.type
        if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return backward(ctx, grad)
        return backward(ctx, grad)

    return run


class LoraLinear(torch.autograd.Function):
    """``y = x @ weight.T + bias + scaling * dropout(x) @ lora_a.T @ lora_b.T``.

    Saves x, s, the seed and the parameters; the dropout mask is made again from the seed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: torch.Tensor,
        seed: torch.Tensor | None,
        dropout_p: float,
        impl: str,
        plan: str,
    ) -> torch.Tensor:
        y, s = forward_linear(x, weight, bias, lora_a, lora_b, scaling, seed, dropout_p, impl, plan)
        _, needs_weight, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        ctx.dropout_p, ctx.impl = dropout_p, impl
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(
            x if needs_a or needs_weight else None,
            weight,
            lora_a,
            lora_b,
            scaling,
            s if needs_b else None,
            seed,
        )
        ctx.x_shape = x.shape
        return y

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1])
        dx = dy @ weight.to(dy.dtype) if needs_x else None
        dx, d_lora_a, d_lora_b = _backward_lora(
            dy, dx, (x, *saved), (needs_x, needs_a, needs_b), ctx.dropout_p, ctx.impl
        )
        d_weight = d_bias = None
        if needs_weight:
            d_weight = (dy.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if needs_bias:
            d_bias = dy.sum(0).to(ctx.bias_dtype)
        if dx is not None:
            dx = dx.view(ctx.x_shape)
        return dx, d_weight, d_bias, d_lora_a, d_lora_b, None, None, None, None, None


class LoraAdd(torch.autograd.Function):
    """``y + scaling * dropout(x) @ lora_a.T @ lora_b.T``, for a base layer that is called as it is.

    Never in place: what made y may need it for its own backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: torch.Tensor,
        seed: torch.Tensor | None,
        dropout_p: float,
        impl: str,
    ) -> torch.Tensor:
        result, s = forward_add(y, x, lora_a, lora_b, scaling, seed, dropout_p, impl, inplace=False)
        _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        ctx.dropout_p, ctx.impl = dropout_p, impl
        ctx.save_for_backward(
            x if needs_a else None, lora_a, lora_b, scaling, s if needs_b else None, seed
        )
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return result

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1]).to(ctx.x_dtype)
        dx, d_lora_a, d_lora_b = _backward_lora(
            dy, None, ctx.saved_tensors, (needs_x, needs_a, needs_b), ctx.dropout_p, ctx.impl
        )
        if dx is not None:
            dx = dx.view(ctx.x_shape)
        return grad, dx, d_lora_a, d_lora_b, None, None, None, None
