"""The autograd functions above the operators: what is saved, and every gradient.

Saved for backward are x itself, s (unless it is cheap to make again), the seed and the parameters;
never a cast or dropped copy of x, nor a mask. Whatever needs no gradient is neither saved nor
computed.

One function does a layer; on a CPU, where rows are few, PyTorch's own nodes do (`native_linear`),
which save s always. Where layers fed by the same tensor share their passes over it, the
graph has two kinds of node: `LoraShrink` makes every sibling's s, and its backward yields their
d_lora_a and nothing else; each sibling's `LoraLinear` takes its s, and its backward returns dx with
the LoRA term inside, ds (the gradient of s) and d_lora_b.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``s [M, R]``,
``y [M, N]``, ``scaling`` a number or ``[R]``; x and y may have any leading dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastlora.ops.gradients import Needs, Saved, grad_a, keep_mask, layer_gradients
from fastlora.ops.torch import products, reference

# From so many times its rank a layer is wide enough that a CPU makes s again for under 1 % of the
# layer's products. For all layers of SmolLM2 that costs 1.2 % of a step in fp32 and saves 0.75 %
# of its peak memory (2 x 128 tokens, rank 16, one Xeon core), for the wide ones a quarter of both.
_WIDE = 64
# Below so many rows Python in a backward costs more than a second buffer for dx: of SmolLM2's step
# PyTorch's nodes take 0.97 at 256 rows and 1.00 at 896 (fp32, one AVX2 core).
_FEW_ROWS = 1024
# And so many in a wide layer, whose s PyTorch's nodes save: at 256 rows 3 % of a step.
_FEW_WIDE_ROWS = 512


def is_wide(lora_b: torch.Tensor) -> bool:
    """Whether s is cheap to make again beside the products of the layer."""
    n, r = lora_b.shape
    return n >= _WIDE * r


def keeps_s(x: torch.Tensor, lora_b: torch.Tensor, impl: str) -> bool:
    """Whether s is saved; else the backward makes it again from the x that it reads anyway."""
    return impl == "triton" or x.device.type != "cpu" or not is_wide(lora_b)


def _shrink(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    impl: str,
) -> torch.Tensor:
    if impl == "triton":
        return torch.ops.fastlora.lora_shrink(x, [], [lora_a], 1, seed, [dropout_p], impl)
    if seed is None:
        return reference.lora_shrink(x, lora_a)
    dropped = reference.select_(keep_mask(x, seed, dropout_p, after=None), x)
    return reference.lora_shrink(dropped, lora_a).mul_(1.0 / (1.0 - dropout_p))


def _shrink_together(x: torch.Tensor, lora_a: list[torch.Tensor], impl: str) -> torch.Tensor:
    """Returns the s of siblings without dropout side by side, ``[M, R]``."""
    if impl == "triton":
        none = [0.0] * len(lora_a)
        return torch.ops.fastlora.lora_shrink(x, [], lora_a, len(lora_a), None, none, impl)
    return reference.lora_shrink(x, torch.cat([a.to(x.dtype) for a in lora_a]))


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
    s: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(y [..., N], s [M, R])`` without recording a graph; x is ``[..., K]``.

    ``s`` is made here unless a sibling made it. The eager path calls PyTorch directly: under
    `torch.compile` its ops are then visible.
    """
    dtype, shape = x.dtype, x.shape
    rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if impl == "triton":
        factors = [lora_a, lora_b, None]
        drop = seed, [dropout_p]
        y, *own = torch.ops.fastlora.lora_linear(
            rows, weight, bias, [], s, factors, scaling, *drop, impl, plan
        )
        made = own[0] if s is None else s
    else:
        made = _shrink(rows, lora_a, seed, dropout_p, impl) if s is None else s
        y = reference.lora_linear(rows, weight, bias, made, lora_b, scaling)
    if len(shape) != 2:  # not a view to autograd, which would refuse to let anyone write into it
        y = torch.ops.aten._unsafe_view.default(y, (*shape[:-1], weight.shape[0]))
    return y, made


def records_natively(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
) -> bool:
    """Whether `native_linear` is to compute a layer, for the PyTorch path without dropout.

    Not in compiled graphs, which would be one for few rows and another for many, nor where x would
    be saved as a copy in rows.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    dtype = x.dtype
    return (
        (dtype is torch.float32 or dtype is torch.float64)
        and x.is_cpu
        and (x.dim() == 2 or x.is_contiguous())
        and x.numel() < (_FEW_WIDE_ROWS if is_wide(lora_b) else _FEW_ROWS) * x.shape[-1]
        and weight.dtype is lora_a.dtype is lora_b.dtype is dtype
        and weight.is_cpu
        and lora_a.is_cpu
        and lora_b.is_cpu
        and (bias is None or bias.dtype is dtype)
        and not scaling.dim()
        and not torch.is_autocast_enabled("cpu")
    )


def native_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
) -> torch.Tensor:
    """`LoraLinear`, or `forward_linear` without gradients, in PyTorch's own nodes.

    The same bits. No Python runs in the backward, and little here: between two products of a large
    model its code has left the cache, and each call takes microseconds. Saves x, ``scaling * s``
    and the parameters, s in wide layers too. dx is the sum of two products, where `LoraLinear` adds
    one to the other in place.
    """
    shape = x.shape
    rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    y = F.linear(rows, weight, bias)
    y.addmm_(F.linear(rows, lora_a) * scaling, lora_b.t())
    if len(shape) == 2:
        return y
    return torch.ops.aten._unsafe_view.default(y, (*shape[:-1], weight.shape[0]))


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
    s: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(y + LoRA(x), s)`` without recording a graph; in place only if y is contiguous."""
    if s is None:
        s = _shrink(x.reshape(-1, x.shape[-1]), lora_a, seed, dropout_p, impl)
    if not inplace or not y.is_contiguous():
        y = y.clone(memory_format=torch.contiguous_format)
    rows = y.view(-1, y.shape[-1])
    if impl == "triton":
        torch.ops.fastlora.lora_expand_(rows, s, [], [lora_b], [None], scaling, impl)
    else:
        reference.lora_expand_(rows, s, lora_b, scaling)
    return y, s


def plain_backward(backward: Callable[..., Any]) -> Any:
    """A backward that has no derivative, and the dtypes of its forward whatever surrounds it."""
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor | None) -> Any:
        # Where no second derivative is recorded, nothing has to see to it that it raises.
        compute = once if torch.is_grad_enabled() else backward
        # The only kind of device that the context's tensors can be on is that of a gradient.
        device_type = next((g.device.type for g in grads if g is not None), "cpu")
        if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return compute(ctx, *grads)
        return compute(ctx, *grads)

    return run


class LoraLinear(torch.autograd.Function):
    """``y = x @ weight.T + bias + scaling * dropout(x) @ lora_a.T @ lora_b.T``.

    Saves x, s, the seed and the parameters; the dropout mask is made again from the seed. With an
    ``s`` that `LoraShrink` made, ``lora_a`` comes detached and x is not saved.
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
        s: torch.Tensor | None,
    ) -> torch.Tensor:
        y, s = forward_linear(
            x, weight, bias, lora_a, lora_b, scaling, seed, dropout_p, impl, plan, s
        )
        _, needs_weight, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        ctx.dropout_p, ctx.impl = dropout_p, impl
        ctx.plan = "auto" if plan == "invariant" else plan  # a backward has no such plan
        ctx.bias_dtype = None if bias is None else bias.dtype
        saves_s = needs_b and keeps_s(x, lora_b, impl)
        ctx.save_for_backward(
            x if needs_a or needs_weight or (needs_b and not saves_s) else None,
            weight,
            lora_a,
            lora_b,
            scaling,
            s if saves_s else None,
            seed,
        )
        ctx.x_shape = x.shape
        return y

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b, *_, needs_s = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1])
        found = layer_gradients(
            dy,
            weight,
            Saved(x, *saved),
            Needs(needs_x, needs_a, needs_b, needs_s, needs_bias),
            ctx.dropout_p,
            ctx.impl,
            ctx.plan,
        )
        dx, d_bias = found.dx, found.d_bias
        d_weight = None
        if needs_weight:
            d_weight = products.mm(dy.t(), x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if d_bias is not None:
            d_bias = d_bias.to(ctx.bias_dtype)
        if dx is not None:
            dx = dx.view(ctx.x_shape)
        factors = found.d_lora_a, found.d_lora_b
        return (
            dx,
            d_weight,
            d_bias,
            *factors,
            None,
            None,
            None,
            None,
            None,
            found.ds if needs_s else None,
        )


class LoraAdd(torch.autograd.Function):
    """``y + scaling * dropout(x) @ lora_a.T @ lora_b.T``, for a base layer that is called as it is.

    Never in place: what made y may need it for its own backward. ``s`` as in `LoraLinear`.
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
        s: torch.Tensor | None,
    ) -> torch.Tensor:
        result, s = forward_add(y, x, lora_a, lora_b, scaling, seed, dropout_p, impl, False, s)
        _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        ctx.dropout_p, ctx.impl = dropout_p, impl
        saves_s = needs_b and keeps_s(x, lora_b, impl)
        ctx.save_for_backward(
            x if needs_a or (needs_b and not saves_s) else None,
            lora_a,
            lora_b,
            scaling,
            s if saves_s else None,
            seed,
        )
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return result

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, needs_x, needs_a, needs_b, *_, needs_s = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1]).to(ctx.x_dtype)
        found = layer_gradients(
            dy,
            None,
            Saved(*ctx.saved_tensors),
            Needs(needs_x, needs_a, needs_b, needs_s),
            ctx.dropout_p,
            ctx.impl,
            "auto",
        )
        dx = None if found.dx is None else found.dx.view(ctx.x_shape)
        d_factors, ds = (found.d_lora_a, found.d_lora_b), found.ds if needs_s else None
        return grad, dx, *d_factors, None, None, None, None, ds


class LoraShrink(torch.autograd.Function):
    """``s_i = dropout_i(x) @ lora_a_i.T`` of layers that are fed by the same x, ``[M, R_i]`` each.

    Saves x, the seeds and the factors. The backward reads x once for all ``d_lora_a_i``; x's
    gradient is not its part, so x comes detached.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        seeds: tuple[torch.Tensor | None, ...],
        dropouts: tuple[float, ...],
        impl: str,
        *lora_a: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dropouts, ctx.impl = dropouts, impl
        ctx.save_for_backward(x, *lora_a, *seeds)
        rows = x.reshape(-1, x.shape[-1])
        shrunk: list[torch.Tensor | None] = [None] * len(lora_a)
        bare = [index for index, seed in enumerate(seeds) if seed is None]
        if len(bare) > 1:
            some = [lora_a[index] for index in bare]
            parts = _shrink_together(rows, some, impl).split([a.shape[0] for a in some], dim=1)
            for index, part in zip(bare, parts, strict=True):
                shrunk[index] = part
        return tuple(
            _shrink(rows, lora_a[index], seeds[index], dropouts[index], impl) if s is None else s
            for index, s in enumerate(shrunk)
        )

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        count = len(ctx.dropouts)
        x, *saved = ctx.saved_tensors
        lora_a, seeds = saved[:count], saved[count:]
        rows = x.reshape(-1, x.shape[-1])
        needs = ctx.needs_input_grad[4:]
        wanted = [i for i in range(count) if needs[i] and grads[i] is not None]
        found: list[torch.Tensor | None] = [None] * count
        if wanted:
            ds: Any = [grads[i] for i in wanted]
            pairs = [lora_a[i] for i in wanted], [seeds[i] for i in wanted]
            gradients = grad_a(rows, ds, *pairs, [ctx.dropouts[i] for i in wanted], ctx.impl)
            for index, gradient in zip(wanted, gradients, strict=True):
                found[index] = gradient
        return None, None, None, None, *found
