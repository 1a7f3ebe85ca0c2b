"""One DoRA adapter with active dropout, as PEFT computes it: the base product twice.

``y = x @ weight.T + bias + (g - 1) * dropout(x) @ weight.T + g * scaling * s @ lora_b.T`` with the
names, shapes and sources of `fastlora.dora`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastlora import products, reference
from fastlora.autograd import without_autocast
from fastlora.dora import (
    adapted_squares,
    norm_joins,
    outside_autocast,
    scale_of,
    scaled_with_sums,
    times,
)
from fastlora.gradients import keep_mask


def joins(
    x: torch.Tensor, weight: torch.Tensor, lora_a: torch.Tensor, seed: torch.Tensor, impl: str
) -> bool:
    """Whether the norm is best computed in `DoraDropped`, from ``||weight||^2``.

    Then lora_a's rows go through the base product behind those of ``dropout(x)``.
    """
    eager = impl != "triton" and not torch.compiler.is_compiling() and type(seed) is torch.Tensor
    on_cpu = x.device.type == "cpu"  # what the norm costs elsewhere is not measured
    return eager and on_cpu and lora_a.shape[0] > 0 and norm_joins(x, weight, lora_a.shape[0])


class DoraDropped(torch.autograd.Function):
    """See the module's docstring.

    Takes the norm's squares, or with ``norm_scaling``, where `joins` says so, those of the weight.

    Saves x, s, the seed, the parameters, and ``z = dropout(x) @ weight.T``, in PyTorch without the
    mask's ``1 / (1 - p)``, where the magnitude wants a gradient. The mask is made again from the
    seed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        magnitude: torch.Tensor,
        squares: torch.Tensor,
        scaling: torch.Tensor,
        seed: torch.Tensor,
        dropout_p: float,
        impl: str,
        norm_scaling: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """Takes ``base``, the base layer's output, or computes it from weight and bias if None."""
        rows = x.reshape(-1, x.shape[-1])
        weight_x, m = weight.to(x.dtype), rows.shape[0]
        up = 1.0 / (1.0 - dropout_p)
        ctx.z_up = 1.0 if impl == "triton" else up  # it goes into what is smaller or scaled anyway
        if norm_scaling is not None:
            both = reference.lora_selected(rows, seed, dropout_p, lora_a.shape[0])
            both[m:] = lora_a
            dropped, product = both[:m], products.linear(both, weight_x)
            z, cross = product[:m], product[m:].t()
            squares = outside_autocast(
                adapted_squares, weight, squares, lora_a, lora_b, norm_scaling, cross
            )
        else:
            if impl == "triton":
                dropped = torch.ops.fastlora.lora_dropout(rows, seed, dropout_p, impl)
            else:
                dropped = reference.select_(keep_mask(rows, seed, dropout_p, after=None), rows)
            z = products.linear(dropped, weight_x)
        change = scale_of(magnitude, squares).sub_(1.0)
        scaled_b = _scaled_rows(lora_b, magnitude, squares, x.dtype)
        if base is None:
            y = products.linear(rows, weight_x, None if bias is None else bias.to(x.dtype))
        else:
            y = base.reshape(-1, base.shape[-1]).clone(memory_format=torch.contiguous_format)
        if impl == "triton":
            s = torch.ops.fastlora.lora_shrink(dropped, lora_a, None, 0.0, impl)
            torch.ops.fastlora.lora_expand_(y, s, scaled_b, scaling, impl)
        else:
            s = reference.lora_shrink(dropped, lora_a).mul_(up)
            reference.lora_expand_(y, s, scaled_b, scaling)
        y.addcmul_(z.to(y.dtype), change.mul_(ctx.z_up).to(y.dtype))
        needs = ctx.needs_input_grad
        ctx.dropout_p, ctx.impl, ctx.x_shape, ctx.x_dtype = dropout_p, impl, x.shape, x.dtype
        ctx.own_base = base is None
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(
            x if needs[2] or needs[4] else None,
            weight,
            lora_a,
            lora_b,
            magnitude,
            squares,
            scaling,
            s if needs[5] or needs[6] else None,
            z if needs[6] else None,
            seed,
        )
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, lora_a, lora_b, magnitude, squares, scaling, s, z, seed = ctx.saved_tensors
        needs_base, needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_m = (
            ctx.needs_input_grad[:7]
        )
        dy = grad.reshape(-1, grad.shape[-1]).to(ctx.x_dtype)
        d_weight = d_bias = d_lora_a = d_lora_b = d_magnitude = dx = None
        up = 1.0 / (1.0 - ctx.dropout_p)
        through_z, sums = _through_z(dy, z if needs_m else None, magnitude, squares, up)
        if needs_b or needs_m:
            # [R, M] x [M, N]: (scaling * s)^T dy serves both.
            inner = products.mm((s * scaling).to(dy.dtype).t(), dy).to(squares.dtype)
            if needs_b:
                d_lora_b = (inner * scale_of(magnitude, squares)).t().to(lora_b.dtype).contiguous()
            if sums is not None:
                through_s = inner.mul_(lora_b.to(dy.dtype).t()).sum(0)
                d_magnitude = through_s.add_(sums, alpha=ctx.z_up).mul_(squares.rsqrt())
                d_magnitude = d_magnitude.to(magnitude.dtype)
        if needs_bias:
            d_bias = dy.sum(0).to(ctx.bias_dtype)
        if needs_x or needs_a or needs_weight:
            # 1 / (1 - p) of the dropped rows and of dx stands in ds and in through_z.
            scaled_b = _scaled_rows(lora_b, magnitude, squares, dy.dtype)
            ds = products.mm(dy, scaled_b).mul_(scaling).mul_(up)
            like = dy.new_empty(dy.shape[0], weight.shape[1])
            rows = like if x is None else x.reshape(-1, x.shape[-1])
            keep = _mask(rows, seed, ctx.dropout_p, ctx.impl, dy)
            weight_x = weight.to(dy.dtype)
        if needs_x:
            # [M, N] x [N, K], and the adapter's [M, R] x [R, K] into it
            dx = products.mm(through_z, weight_x)
            dx = products.addmm_(dx, ds, lora_a.to(dy.dtype))
            dx = dx.mul_(keep) if keep.is_floating_point() else reference.drop_(dx, keep)
            dx = products.addmm_(dx, dy, weight_x) if ctx.own_base else dx
            dx = dx.view(ctx.x_shape)
        if needs_a or needs_weight:
            kept = rows * keep if keep.is_floating_point() else reference.select_(keep, rows)
            if needs_a:
                d_lora_a = products.mm(ds.t(), kept).to(lora_a.dtype)
            if needs_weight:
                d_weight = products.mm(through_z.t(), kept)
                d_weight = products.addmm_(d_weight, dy.t(), rows) if ctx.own_base else d_weight
                d_weight = d_weight.to(weight.dtype)
        d_base = grad if needs_base else None
        return (
            *(d_base, dx, d_weight, d_bias, d_lora_a, d_lora_b, d_magnitude),
            *(None, None, None, None, None, None),
        )


def _mask(
    rows: torch.Tensor, seed: torch.Tensor, dropout_p: float, impl: str, after: torch.Tensor
) -> torch.Tensor:
    """Returns what dropout keeps of ``rows``: ones and zeros, integers unless kernels drew them."""
    if impl == "triton":
        ones = torch.ones_like(rows, memory_format=torch.contiguous_format)
        return torch.ops.fastlora.lora_dropout(ones, seed, dropout_p, impl).sign_()
    return keep_mask(rows, seed, dropout_p, after=after)


def _through_z(
    dy: torch.Tensor,
    z: torch.Tensor | None,
    magnitude: torch.Tensor,
    squares: torch.Tensor,
    up: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns ``up * (g - 1) * dy``, and the sums over rows of ``dy * z`` where z is there."""
    change = scale_of(magnitude, squares).sub_(1.0).mul_(up)
    return (times(dy, change), None) if z is None else scaled_with_sums(dy, z, change)


def _scaled_rows(
    lora_b: torch.Tensor, magnitude: torch.Tensor, squares: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Returns ``g * lora_b`` in ``dtype``, rounded once."""
    scale = scale_of(magnitude, squares)
    return (lora_b.detach().to(dtype).to(scale.dtype) * scale[:, None]).to(dtype)
