"""The forward pass and the gradients of one adapter that applies to all rows, in PyTorch.

Shapes: ``x [M, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``s`` and ``ds [M, R]``, ``y`` and
``dy [M, N]``; ``scaling`` is a number, or a tensor without dimensions or of shape ``[R]``.
"""

from __future__ import annotations

import torch

from fastlora.ops.backend import BackwardArguments, Gradients
from fastlora.ops.execution_mode import is_traced
from fastlora.ops.torch import products, reference


def keep_mask(
    x: torch.Tensor,
    seed: torch.Tensor,
    dropout_p: float,
    dependency: torch.Tensor | None,
) -> torch.Tensor:
    """Return the dropout mask of x.

    If a compiler is tracing, a registered operator computes the mask. In a backward pass,
    ``dependency`` is a tensor of this pass, which prevents a compiler from computing the mask in
    the forward pass. In a forward pass, ``dependency`` is None.
    """
    if is_traced(seed):
        return torch.ops.fastlora.lora_keep(x, seed, dropout_p, dependency)
    return reference.draw_keep_mask(x, seed, dropout_p)


def shrink(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """Return the shrink output s of x.

    If there is a seed, dropout is applied to x first.
    """
    if seed is None:
        return reference.lora_shrink(x, lora_a)
    dropped = reference.write_masked_x_into_mask_memory_(keep_mask(x, seed, dropout_p, None), x)
    return reference.lora_shrink(dropped, lora_a).mul_(1.0 / (1.0 - dropout_p))


def gradients(given: BackwardArguments) -> Gradients:
    """Return the gradients for a layer with one adapter.

    The result is a tuple; see `Backend.gradients`.
    """
    dy, weight, x, operands, _, s, _, wants_x, wants_bias, _, wants = given
    (lora_a,), (lora_b,), _, scaling, (dropout_p,), seed, _ = operands
    wants_a, wants_b, _ = wants
    d_lora_a = d_lora_b = dx = keep = None
    factor, dropped = reference.cast(lora_a, dy.dtype), 1.0 / (1.0 - dropout_p)
    ds = reference.lora_ds(dy, lora_b, scaling)
    inner = ds
    if seed is not None and (wants_x or wants_a):
        like = dy.new_empty(dy.shape[0], factor.shape[1]) if x is None else x
        keep = keep_mask(like, seed, dropout_p, ds)
        inner = ds * dropped
    if wants_x and keep is not None:
        # The base term is added to the dropped update, which saves one buffer of x's size.
        dx = reference.zero_dropped_(products.mm(inner, factor), keep)
        if weight is not None:
            products.addmm_(dx, dy, reference.cast(weight, dy.dtype))
    elif wants_x:
        if weight is None:
            dx = products.mm(ds, factor)
        else:
            base = products.mm(dy, reference.cast(weight, dy.dtype))
            dx = products.addmm_(base, ds, factor)
    if wants_a and x is not None:
        kept = x if keep is None else reference.write_masked_x_into_mask_memory_(keep, x)
        d_lora_a = reference.cast(products.mm(inner.t(), kept), lora_a.dtype)
    if wants_b and s is not None:
        d_lora_b = reference.lora_b_grad(dy, s, lora_b, scaling)
    d_bias = reference.column_sums(dy) if wants_bias else None
    return dx, d_bias, ds, [d_lora_a, d_lora_b, None]
