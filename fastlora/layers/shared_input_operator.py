"""The operator that computes s for all layers of a shared-input group in a compiled graph.

A compiled graph must not see results that one call leaves for another. Every layer of a
shared-input group therefore calls the operator with the factors of all layers, and receives its own
s. The first call that is traced creates one autograd node for all layers. The other calls pass the
very same tensors and find its results, so that one node computes the gradients of all layers.
Without this, a compiler could still merge the calls, but each of them would keep its own backward
node with a single gradient. Outside tracing, each call computes its own s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fastlora.autograd.shared_input import PrecomputedResult, grouped_shrink
from fastlora.layers.shared_input import SharedResultCache
from fastlora.ops.library import define_operator, register_composite_implicit_autograd
from fastlora.ops.rows import sort_rows

# The results of the first call in a trace, for the calls after it.
_TRACED = SharedResultCache()

define_operator(
    "lora_shared(Tensor x, Tensor[] lora_a, int[] places, int own, float[] dropout_p, Tensor? ids,"
    " int slots, ScalarType dtype, ScalarType? factor_dtype) -> (Tensor, Tensor[])"
)


@register_composite_implicit_autograd("lora_shared")
def _own_s_and_optional_seed(
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
    """Return the s and the dropout seed of one layer in a group of layers that share the input x.

    s is ``dropout(x) @ lora_a.T``. ``own`` is the layer's number. In a trace, the first call also
    computes s for the group's other layers. The seed is in a list, which is empty without dropout.
    ``places`` lists the position of each lora_a among those of all layers and slots. Without ids,
    one adapter applies to all rows. If ``factor_dtype`` is given, factors are converted to it.
    """
    by_place = dict(zip(places, lora_a, strict=True))

    def make(layers: Sequence[int]) -> list[PrecomputedResult]:
        flat = x.to(dtype)
        m = flat.numel() // flat.shape[-1]
        rows = None if ids is None else sort_rows(ids, m, slots, flat.device)
        each = [[by_place.get(layer * slots + i) for i in range(slots)] for layer in layers]
        if factor_dtype is not None:
            each = [[None if a is None else a.to(factor_dtype) for a in own] for own in each]
        return grouped_shrink(flat, each, [dropout_p[layer] for layer in layers], "triton", rows)

    found: Any = None
    if not isinstance(x, (FakeTensor, FunctionalTensor)):
        # It is not known whether the other layers will call, so nothing is stored for them.
        (found,) = make([own])
    else:
        context = (*lora_a, ids)
        versions = [tensor._version for tensor in context if tensor is not None]
        others = places, dropout_p, slots, dtype, factor_dtype, torch.is_grad_enabled()
        key = (versions, *others)
        known, found = _TRACED.pop_result(x, own, context) or (None, None)
        if known != key:
            _TRACED.discard_untaken()  # Drop results for layers that are not in their graph.
            made = make(range(len(dropout_p)))
            _TRACED.put_results(
                x, context, own, {i: (key, s) for i, s in enumerate(made) if i != own}
            )
            found = made[own]
    return found.s, [] if found.seed is None else [found.seed]
