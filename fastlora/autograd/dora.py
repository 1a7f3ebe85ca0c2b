"""DoRA's scale behind a LoRA result, and a linear with its scale, as autograd functions.

With ``u = x @ weight.T + scaling * s @ lora_b.T`` the layer's output is ``g * u + bias``, where
``g = magnitude / ||weight + scaling * lora_b @ lora_a||`` per output row, and the norm is detached.
So a LoRA forward by any implementation gives u, and what remains is one scale per column of u.

With active dropout the base product meets the dropped input too, as in PEFT:
``y = x @ weight.T + bias + (g - 1) * dropout(x) @ weight.T + g * scaling * s @ lora_b.T``
(`fastlora.autograd.dora_dropped`).

`DoraLinear` is a base product and its scale in one, in PyTorch on a CPU: no second ``[M, N]``
result. u is scaled in place, and the magnitude's gradient is ``sum(dy * y) / magnitude``, y being
what the next layer saves as a rule anyway. On a CPU fresh pages cost as much as the arithmetic.

Method: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353,
sections 4.1 and 4.3 (the detached norm); PEFT 0.21.2, ``tuners/lora/dora.py``, for dropout.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``s [M, R]``,
``u`` and ``y [M, N]``, ``magnitude [N]``, ``scaling`` without dimensions.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.autograd.linear import plain_backward
from fastlora.ops.backend import Wanted
from fastlora.ops.factors import Operands
from fastlora.ops.torch import products, reference, single
from fastlora.ops.torch.scale import (
    scale_columns,
    scale_columns_backward,
    scale_of,
    scaled_with_sums,
)


class DoraScale(torch.autograd.Function):
    """``y = g * u + bias``, for one magnitude or for segments of rows with one each.

    Saves u, which only the magnitude's gradient needs, where that is wanted; and N numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,
        bias: torch.Tensor | None,
        lengths: tuple[int, ...] | None,
        traced: bool,
        *pairs: torch.Tensor,
    ) -> torch.Tensor:
        """``pairs`` holds magnitude and the norm's squares of each segment in turn.

        ``u [..., N]``; ``lengths`` are the rows of each segment, None for one segment of all rows;
        ``traced`` says that a graph is being compiled, where there is one segment.
        """
        rows = u.reshape(-1, u.shape[-1])
        if lengths is None:
            y = scale_columns(rows, bias, scale_of(*pairs), traced=traced)
        else:
            parts = zip(rows.split(lengths), pairs[::2], pairs[1::2], strict=True)
            y = torch.cat([scale_columns(part, bias, scale_of(m, sq)) for part, m, sq in parts])
        ctx.lengths, ctx.bias_dtype = lengths, None if bias is None else bias.dtype
        ctx.traced = traced
        ctx.save_for_backward(u if any(ctx.needs_input_grad[4:]) else None, *pairs)
        return torch.ops.aten._unsafe_view(y, u.shape)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, *pairs = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        lengths = (dy.shape[0],) if ctx.lengths is None else ctx.lengths
        grads = dy.split(lengths)
        parts = grads if u is None else u.reshape(dy.shape).split(lengths)
        scaled: list[torch.Tensor] = []
        d_pairs: list[torch.Tensor | None] = []
        for i, (dy_own, part) in enumerate(zip(grads, parts, strict=True)):
            magnitude, squares = pairs[2 * i : 2 * i + 2]
            u_own = part if ctx.needs_input_grad[4 + 2 * i] else None
            du, d_own = scale_columns_backward(dy_own, u_own, magnitude, squares, ctx.traced)
            scaled.append(du)
            d_pairs += [None if d_own is None else d_own.to(magnitude.dtype), None]
        d_bias = dy.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        du = scaled[0] if len(scaled) == 1 else torch.cat(scaled)
        dx = du.view(grad.shape) if ctx.needs_input_grad[0] else None
        return dx, d_bias, None, None, *d_pairs


# ------------------------------------------------------------------ a base product and its scale


def runs_as_one(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, lora_a: torch.Tensor
) -> bool:
    """Whether `DoraLinear` takes these.

    For graphs that are compiled nobody asks. Not in inference mode, which has no versions, as
    compilers have none; not with a bias, which in ``y - bias`` would cost digits; and with x saved
    for lora_a, from which u can be made again.
    """
    if weight is None or torch.is_inference_mode_enabled():
        return False
    eager = x.device.type == "cpu" and x.numel() > 0
    return eager and bias is None and not weight.requires_grad and lora_a.requires_grad


def _counter(y: torch.Tensor) -> torch.Tensor:
    """Returns a tensor without memory whose ``_version`` is y's: it counts writes into y."""
    counter = y.detach()
    counter.data = y.new_empty(0)
    return counter


def _divides(scale: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether ``scale * u`` in ``dtype`` has u's digits: no number near or below 0, nor NaN."""
    return scale.amin().item() >= torch.finfo(dtype).smallest_normal ** 0.5


def _unscaled(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns u ``[..., N]`` and s, all in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    u, s = products.linear(rows, weight.to(x.dtype)), reference.lora_shrink(rows, lora_a)
    reference.lora_expand_(u, s, lora_b, scaling)
    return u.view(*x.shape[:-1], weight.shape[0]), s


class DoraLinear(torch.autograd.Function):
    """``y = g * (x @ weight.T + scaling * x @ lora_a.T @ lora_b.T)``.

    Saves x, s, the parameters, the factors in x's dtype, N numbers twice, and where the magnitude
    wants a gradient one ``[M, N]``: y itself, or u where g has numbers that y cannot be divided by.
    A y that somebody has written into meanwhile is not used: u is then made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        magnitude: torch.Tensor,
        squares: torch.Tensor,
        scaling: torch.Tensor,
    ) -> torch.Tensor:
        """``squares`` are the norm's; see `fastlora.ops.torch.norms.nonzero`."""
        ctx.dtypes = lora_a.dtype, lora_b.dtype
        lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)  # once for forward and backward
        u, s = _unscaled(x, weight, lora_a, lora_b, scaling)
        _, _, _, needs_b, needs_m, *_ = ctx.needs_input_grad
        scale = scale_of(magnitude, squares)
        from_y = needs_m and _divides(scale, u.dtype)
        rows = scale_columns(u.view(-1, u.shape[-1]), None, scale, from_y or not needs_m)
        y = torch.ops.aten._unsafe_view(rows, u.shape)
        kept = y.data if from_y else u if needs_m else None  # .data counts writes on its own
        ctx.counter = _counter(y) if from_y else None
        ctx.version, ctx.x_shape = y._version, x.shape
        saved_s = s if needs_b else None
        ctx.save_for_backward(
            x, weight, lora_a, lora_b, magnitude, squares, scale, scaling, saved_s, kept
        )
        return y

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, lora_a, lora_b, magnitude, squares, scale, scaling, s, kept = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1])
        from_y = ctx.counter is not None
        if from_y and ctx.counter._version != ctx.version:
            kept, from_y = _unscaled(x, weight, lora_a, lora_b, scaling)[0], False
        rows = None if kept is None else kept.reshape(dy.shape)
        d_magnitude: torch.Tensor | None
        if from_y and rows is not None:
            du, sums = scaled_with_sums(dy, rows, scale)
            d_magnitude = sums / magnitude.to(squares.dtype)
        else:
            du, d_magnitude = scale_columns_backward(dy, rows, magnitude, squares)
        flat = x.reshape(-1, x.shape[-1])
        operands = Operands([lora_a], [lora_b], [None], scaling, (0.0,))
        wanted = Wanted(needs_x, False, False, (needs_a, needs_b, False))
        found = single.gradients(du, weight, flat, operands, s, wanted)
        dx = None if found.dx is None else found.dx.view(ctx.x_shape)
        if d_magnitude is not None:
            d_magnitude = d_magnitude.to(magnitude.dtype)
        d_factors = [
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip(found.factors[:2], ctx.dtypes, strict=True)
        ]
        return dx, None, *d_factors, d_magnitude, None, None
