"""The operator that gives a layer its s from a shared-input group in a compiled graph, by kernels.

A graph must not see what one call leaves for another. So every layer calls the operator with the
factors of all and gets its own share. The first call that is traced makes one node, and the others,
which bring the very same tensors, find what it made; so one node has the gradients of all. Calls
that a compiler merges afterwards would each keep a backward, with one gradient to do. Where nothing
is traced each call makes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fastlora.autograd.shared_input import Shared, shrink
from fastlora.layers.shared_input import Results
from fastlora.ops.library import composes, define
from fastlora.ops.rows import sort_rows

# What the first call in a trace made for those behind it.
_TRACED = Results()

define(
    "lora_shared(Tensor x, Tensor[] lora_a, int[] places, int own, float[] dropout_p, Tensor? ids,"
    " int slots, ScalarType dtype, ScalarType? factor_dtype) -> (Tensor, Tensor[])"
)


@composes("lora_shared")
def _lora_shared(
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    places: list[int],
    own: int,
    dropout_p: list[float],
    ids: torch.Tensor | None,
    slots: int,
    dtype: torch.dtype,
    factor_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns s of layer number ``own``, and its seed if it has dropout.

    ``places`` has the place of each lora_a among those of all layers and slots; without ids one
    adapter has all rows. Factors are taken in ``factor_dtype``, or as they are.
    """
    by_place = dict(zip(places, lora_a, strict=True))

    def make(layers: Sequence[int]) -> list[Shared]:
        flat = x.to(dtype)
        m = flat.numel() // flat.shape[-1]
        rows = None if ids is None else sort_rows(ids, m, slots, flat.device)
        each = [[by_place.get(layer * slots + i) for i in range(slots)] for layer in layers]
        if factor_dtype is not None:
            each = [[None if a is None else a.to(factor_dtype) for a in own] for own in each]
        return shrink(flat, each, [dropout_p[layer] for layer in layers], "triton", rows)

    found: Any = None
    if not isinstance(x, (FakeTensor, FunctionalTensor)):
        # Nothing says whether the others will call, so nothing is kept for them.
        (found,) = make([own])
    else:
        context = (*lora_a, ids)
        versions = [tensor._version for tensor in context if tensor is not None]
        others = places, dropout_p, slots, dtype, factor_dtype, torch.is_grad_enabled()
        key = (versions, *others)
        known, found = _TRACED.take(x, own, context) or (None, None)
        if known != key:
            _TRACED.discard()  # of layers that are not in their graph
            made = make(range(len(dropout_p)))
            _TRACED.put(x, context, own, {i: (key, s) for i, s in enumerate(made) if i != own})
            found = made[own]
    return found.s, [] if found.seed is None else [found.seed]
