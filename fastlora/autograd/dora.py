"""DoRA's scale behind a LoRA result, as an autograd function.

With ``u = x @ weight.T + scaling * s @ lora_b.T`` the layer's output is ``g * u + bias``, where
``g = magnitude / ||weight + scaling * lora_b @ lora_a||`` per output row, and the norm is detached.
So a LoRA forward by any implementation gives u, and what remains is one scale per column of u.

With active dropout the base product meets the dropped input too, as in PEFT:
``y = x @ weight.T + bias + (g - 1) * dropout(x) @ weight.T + g * scaling * s @ lora_b.T``
(`fastlora.autograd.dora_dropped`).

Method: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353,
sections 4.1 and 4.3 (the detached norm); PEFT 0.21.2, ``tuners/lora/dora.py``, for dropout.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``s [M, R]``,
``u`` and ``y [M, N]``, ``magnitude [N]``.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.autograd.linear import plain_backward
from fastlora.ops.torch.scale import scale_columns, scale_columns_backward, scale_of


class DoraScale(torch.autograd.Function):
    """``y = g * u + bias``.

    Saves u, which only the magnitude's gradient needs, where that is wanted; and N numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,
        bias: torch.Tensor | None,
        traced: bool,
        magnitude: torch.Tensor,
        squares: torch.Tensor | None,
    ) -> torch.Tensor:
        """Takes ``u [..., N]``; ``traced`` says that a graph is being compiled."""
        rows = u.reshape(-1, u.shape[-1])
        y = scale_columns(rows, bias, scale_of(magnitude, squares), traced=traced)
        ctx.traced, ctx.bias_dtype = traced, None if bias is None else bias.dtype
        ctx.save_for_backward(u if ctx.needs_input_grad[3] else None, magnitude, squares)
        return torch.ops.aten._unsafe_view(y, u.shape)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, magnitude, squares = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        rows = None if u is None else u.reshape(dy.shape)
        du, d_own = scale_columns_backward(dy, rows, magnitude, squares, ctx.traced)
        d_magnitude = None if d_own is None else d_own.to(magnitude.dtype)
        d_bias = dy.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        d_u = du.view(grad.shape) if ctx.needs_input_grad[0] else None
        return d_u, d_bias, None, d_magnitude, None
