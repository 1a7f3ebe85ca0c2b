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
