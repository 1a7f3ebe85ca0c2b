"""DoRA's arithmetic: the norm in factored form, and the autograd functions above a LoRA result.

With ``u = x @ weight.T + scaling * s @ lora_b.T`` the layer's output is ``g * u + bias``, where
``g = magnitude / ||weight + scaling * lora_b @ lora_a||`` per output row, and the norm is detached.
So a LoRA forward by any implementation gives u, and what remains is one scale per column of u.

With active dropout the base product meets the dropped input too, as in PEFT:
``y = x @ weight.T + bias + (g - 1) * dropout(x) @ weight.T + g * scaling * s @ lora_b.T``.

Everywhere g enters as ``g - 1``: near 1, where training starts, 16-bit arithmetic would round g
itself to steps of 2**-8. A row whose norm is 0 has g = 0.

Method: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353,
sections 4.1 and 4.3 (the detached norm); PEFT 0.21.2, ``tuners/lora/dora.py``, for dropout.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``s [M, R]``,
``u`` and ``y [M, N]``, ``magnitude [N]``, ``scaling`` without dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastlora import reference
from fastlora.autograd import without_autocast

# Elements of the weight that a norm widens at once.
_CHUNK = 1 << 18


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype)


@torch.no_grad()
def square_norms(weight: torch.Tensor) -> torch.Tensor:
    """Returns ``||weight||^2`` of each row, ``[N]`` in fp32 (fp64 for fp64).

    16-bit weights are widened a few rows at a time: no temporary is as large as the weight.
    """
    wide = _wide(weight.dtype)
    if weight.dtype == wide or torch.compiler.is_compiling():
        return torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    rows = max(_CHUNK // max(weight.shape[1], 1), 1)
    parts = [torch.linalg.vector_norm(part.to(wide), dim=1) for part in weight.split(rows)]
    return torch.cat(parts).square() if parts else weight.new_zeros(0, dtype=wide)


@torch.no_grad()
def row_norms(
    weight: torch.Tensor,
    squares: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor | float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns ``||weight + scaling * lora_b @ lora_a||`` of each row, ``[N]``.

    In factored form, ``||W||^2 + 2 c rowsum((W A^T) * B) + c^2 rowsum((B (A A^T)) * B)``: the
    largest temporary is ``[N, R]``. What the update cancels out of a row comes off with an error of
    rounding times the row's own norm, as in any sum.

    Args:
        weight: ``[N, K]``.
        squares: Of `square_norms`.
        lora_a: ``[R, K]``; rounded to ``dtype``, as the layer's products round it.
        lora_b: ``[N, R]``, rounded likewise.
        scaling: A number, or a tensor without dimensions.
        dtype: In which the layer computes.

    Returns:
        ``[N]`` in fp32 (fp64 for an fp64 weight).
    """
    wide = squares.dtype
    a = lora_a.to(dtype).to(weight.dtype)
    b = lora_b.to(dtype).to(wide)
    # [N, K] x [K, R]
    cross = torch.mm(weight, a.t()).to(wide)
    a = a.to(wide)
    # [N, R] x [R, R]
    inner = torch.addmm(cross, b, torch.mm(a, a.t()) * scaling, beta=2.0)
    total = squares + inner.mul_(b).sum(1) * scaling
    return total.clamp_min(0.0).sqrt()


def inverse_of(norms: torch.Tensor) -> torch.Tensor:
    """Returns ``1 / norms``, 0 where a norm is 0."""
    return torch.where(norms == 0.0, 0.0, 1.0 / norms)


def change_of(magnitude: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns ``g - 1``, ``[N]`` in ``dtype``."""
    return (magnitude.detach() * inverse - 1.0).to(dtype)


def rescale_(u: torch.Tensor, bias: torch.Tensor | None, change: torch.Tensor) -> torch.Tensor:
    """Makes ``u [..., N]`` into ``g * u + bias`` in place, where no graph is recorded."""
    u.addcmul_(u, change)
    return u if bias is None else u.add_(bias)


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
        *pairs: torch.Tensor,
    ) -> torch.Tensor:
        """``pairs`` holds magnitude and `inverse_of` the norms of each segment in turn.

        ``lengths`` are the segments' rows; None for one segment of all rows, and u of any shape.
        """
        changes = [
            change_of(magnitude, inverse, u.dtype)
            for magnitude, inverse in zip(pairs[::2], pairs[1::2], strict=True)
        ]
        if lengths is None:
            y = torch.addcmul(u, u, changes[0])
        else:
            y = torch.empty_like(u)
            parts = zip(u.split(lengths), y.split(lengths), changes, strict=True)
            for part, out, change in parts:
                torch.addcmul(part, part, change, out=out)
        if bias is not None:
            y.add_(bias)
        ctx.lengths, ctx.bias_dtype = lengths, None if bias is None else bias.dtype
        ctx.dtypes = [magnitude.dtype for magnitude in pairs[::2]]
        needs_u = any(ctx.needs_input_grad[3:])
        ctx.save_for_backward(u if needs_u else None, *changes, *pairs[1::2])
        return y

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, *saved = ctx.saved_tensors
        count = len(saved) // 2
        changes, inverses = saved[:count], saved[count:]
        needs_u, needs_bias = ctx.needs_input_grad[:2]
        d_pairs: list[torch.Tensor | None] = [None] * (2 * count)
        n = dy.shape[-1]
        flat = dy.reshape(-1, n)
        d_bias = flat.sum(0).to(ctx.bias_dtype) if needs_bias else None
        lengths = (flat.shape[0],) if ctx.lengths is None else ctx.lengths
        grads = flat.split(lengths)
        if u is not None:
            for i, (grad, part) in enumerate(
                zip(grads, u.reshape(-1, n).split(lengths), strict=True)
            ):
                if ctx.needs_input_grad[3 + 2 * i]:
                    d_pairs[2 * i] = (_column_sums(grad * part) * inverses[i]).to(ctx.dtypes[i])
        du = None
        if needs_u:
            if count == 1:
                du = torch.addcmul(dy, dy, changes[0])
            else:
                du = torch.cat(
                    [torch.addcmul(g, g, change) for g, change in zip(grads, changes, strict=True)]
                ).view(dy.shape)
        return du, d_bias, None, *d_pairs


def _column_sums(product: torch.Tensor) -> torch.Tensor:
    # fp16 sums of scaled losses can leave its range; bf16's cannot, and sum faster.
    return product.sum(0, dtype=torch.float32 if product.dtype == torch.float16 else None)


class DoraDropped(torch.autograd.Function):
    """One adapter with active dropout; see the module's docstring.

    Saves x, s, the seed, the parameters, and ``z = dropout(x) @ weight.T`` where the magnitude
    wants a gradient. The mask is made again from the seed.
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
        inverse: torch.Tensor,
        scaling: torch.Tensor,
        seed: torch.Tensor,
        dropout_p: float,
        impl: str,
    ) -> torch.Tensor:
        """Takes ``base``, the base layer's output, or computes it from weight and bias if None."""
        rows = x.reshape(-1, x.shape[-1])
        weight_x = weight.to(x.dtype)
        change = change_of(magnitude, inverse, x.dtype)
        scaled_b = _scaled_rows(lora_b, magnitude, inverse, x.dtype)
        dropped = torch.ops.fastlora.lora_dropout(rows, seed, dropout_p, impl)
        if base is None:
            y = F.linear(rows, weight_x, None if bias is None else bias.to(x.dtype))
        else:
            y = base.reshape(-1, base.shape[-1]).clone(memory_format=torch.contiguous_format)
        z = F.linear(dropped, weight_x)
        if impl == "triton":
            s = torch.ops.fastlora.lora_shrink(dropped, lora_a, None, 0.0, impl)
            torch.ops.fastlora.lora_expand_(y, s, scaled_b, scaling, impl)
        else:
            s = reference.lora_shrink(dropped, lora_a)
            reference.lora_expand_(y, s, scaled_b, scaling)
        y.addcmul_(z.to(y.dtype), change.to(y.dtype))
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
            inverse,
            scaling,
            s if needs[5] or needs[6] else None,
            z if needs[6] else None,
            seed,
        )
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, lora_a, lora_b, magnitude, inverse, scaling, s, z, seed = ctx.saved_tensors
        needs_base, needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_m = (
            ctx.needs_input_grad[:7]
        )
        dy = grad.reshape(-1, grad.shape[-1]).to(ctx.x_dtype)
        d_weight = d_bias = d_lora_a = d_lora_b = d_magnitude = dx = None
        if needs_b or needs_m:
            # [N, M] x [M, R]: dy^T (scaling * s) serves both.
            inner = (dy.t() @ (s * scaling).to(dy.dtype)).to(inverse.dtype)
            if needs_b:
                scale = (magnitude * inverse).to(inverse.dtype)
                d_lora_b = (inner * scale[:, None]).to(lora_b.dtype)
            if needs_m:
                through_s = (inner * lora_b.to(dy.dtype)).sum(1)
                d_magnitude = (_column_sums(dy * z) + through_s) * inverse
                d_magnitude = d_magnitude.to(magnitude.dtype)
        if needs_bias:
            d_bias = dy.sum(0).to(ctx.bias_dtype)
        if needs_x or needs_a or needs_weight:
            change = change_of(magnitude, inverse, dy.dtype)
            scaled_b = _scaled_rows(lora_b, magnitude, inverse, dy.dtype)
            ds = (dy @ scaled_b).mul_(scaling)
            through_z = dy * change
        if needs_a or needs_weight:
            rows = x.reshape(-1, x.shape[-1])
            dropped = torch.ops.fastlora.lora_dropout(rows, seed, ctx.dropout_p, ctx.impl)
            if needs_a:
                d_lora_a = (ds.t() @ dropped).to(lora_a.dtype)
            if needs_weight:
                d_weight = through_z.t() @ dropped
                d_weight = (d_weight.addmm_(dy.t(), rows) if ctx.own_base else d_weight).to(
                    weight.dtype
                )
        if needs_x:
            weight_x = weight.to(dy.dtype)
            # [M, N] x [N, K], and the adapter's [M, R] x [R, K] into it
            update = (through_z @ weight_x).addmm_(ds, lora_a.to(dy.dtype))
            update = torch.ops.fastlora.lora_dropout(update, seed, ctx.dropout_p, ctx.impl)
            dx = update.addmm_(dy, weight_x) if ctx.own_base else update
            dx = dx.view(ctx.x_shape)
        d_base = grad if needs_base else None
        return (
            *(d_base, dx, d_weight, d_bias, d_lora_a, d_lora_b, d_magnitude),
            *(None, None, None, None, None),
        )


def _scaled_rows(
    lora_b: torch.Tensor, magnitude: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Returns ``g * lora_b`` in ``dtype``, rounded once."""
    scale = magnitude.detach() * inverse
    return (lora_b.detach().to(dtype).to(inverse.dtype) * scale[:, None]).to(dtype)
