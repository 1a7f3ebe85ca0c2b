"""The operator by which layers fed by the same tensor share their passes over it in a graph.

Every sibling of a compiled model calls it alike and takes its own share. It decomposes into
`LoraShrink` where autograd is traced, and there siblings get one node: the first call makes it, and
the others, which bring the very same tensors, find what it made. So one node has the gradients of
all. Calls that a compiler merges afterwards would each keep a backward, with one gradient to do.

Shapes: ``x [..., K]``, ``lora_a [R_i, K]`` of sibling i, ``s [M, R_i]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora import autograd, ops
from fastlora.ops import _LIBRARY
from fastlora.siblings import keep_made, take_made

_LIBRARY.define(
    "lora_shrink_siblings(Tensor x, Tensor[] lora_a, float[] dropout_p, ScalarType dtype, str impl)"
    " -> (Tensor[], Tensor[])"
)


# Composite, so that it runs above autograd: in a graph's tracing, and as it is where a graph is
# not compiled further.
@torch.library.impl(_LIBRARY, "lora_shrink_siblings", "CompositeImplicitAutograd")
def _lora_shrink_siblings(
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    dropout_p: list[float],
    dtype: torch.dtype,
    impl: str,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns s of each sibling, and the seed of each that has dropout."""
    key = (tuple(dropout_p), dtype, impl, torch.is_grad_enabled())
    made = take_made(x, lora_a, key)
    if made is None:
        made = shrink_siblings(x, lora_a, dropout_p, dtype, impl)
        keep_made(x, lora_a, key, made, len(lora_a))
    shrunk, seeds = made
    return list(shrunk), [seed for seed in seeds if seed is not None]


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
    return autograd.LoraShrink.apply(x, seeds, tuple(dropout_p), impl, *lora_a), seeds
