"""The operator by which layers fed by the same tensor share their passes over it in a graph.

Every sibling of a compiled model calls it with the factors of all and gets its own share. It
decomposes into `LoraShrink` where autograd is traced, and there siblings get one node: the first
call makes it, and the others, which bring the very same tensors, find what it made. So one node has
the gradients of all. Calls that a compiler merges afterwards would each keep a backward, with one
gradient to do. Where nothing is traced each call makes its own.

Shapes: ``x [..., K]``, ``lora_a [R_i, K]`` of sibling i, ``s [M, R_i]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.autograd import linear as autograd
from fastlora.ops import schema as ops
from fastlora.ops.library import composes, define
from fastlora.routing.siblings import is_traced, keep_made, take_made

define(
    "lora_shrink_siblings(Tensor x, Tensor[] lora_a, float[] dropout_p, int own, ScalarType dtype,"
    " str impl) -> (Tensor, Tensor[])"
)


@composes("lora_shrink_siblings")
def _lora_shrink_siblings(
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    dropout_p: list[float],
    own: int,
    dtype: torch.dtype,
    impl: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns s of sibling number ``own``, and its seed if it has dropout."""
    if not is_traced(x):
        # Nothing says whether the others will call, so nothing is kept for them.
        lora_a, dropout_p, own = lora_a[own : own + 1], dropout_p[own : own + 1], 0
        made = shrink_siblings(x, lora_a, dropout_p, dtype, impl)
    else:
        key = (tuple(dropout_p), dtype, impl, torch.is_grad_enabled())
        known = take_made(x, lora_a, key)
        made = shrink_siblings(x, lora_a, dropout_p, dtype, impl) if known is None else known
        if known is None:
            keep_made(x, lora_a, key, made, len(lora_a))
    s, seed = made[0][own], made[1][own]
    return s, [] if seed is None else [seed]


def shrink_siblings(
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    dropout_p: Sequence[float],
    dtype: torch.dtype,
    impl: str,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
    """Returns s of each sibling, and its seed or None, by one `LoraShrink` in ``dtype``.

    Seeds are drawn in order, as the layers would one after the other. ``impl`` is ``"triton"`` or
    ``"eager"``.
    """
    x = x.detach().to(dtype)
    seeds = tuple(ops.draw_seed(x, impl) if p > 0.0 else None for p in dropout_p)
    return autograd.LoraShrink.apply(x, seeds, tuple(dropout_p), impl, None, *lora_a), seeds
