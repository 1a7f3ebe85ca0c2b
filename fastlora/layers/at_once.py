"""Without gradients the first of siblings computes them all: one launch makes q, k and v.

For one adapter on kernels. What the others find at their own calls is whole, or, where the product
is the library's, bias and adapter for it to accumulate on. Who is a sibling was seen before, and
what was left is taken by the tensor's identity: see `fastlora.routing.siblings`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastlora.layers.call import LayerCall
from fastlora.layers.factors import factors_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.ops.backend import BACKENDS
from fastlora.ops.factors import Base, Factors
from fastlora.routing.siblings import Family, family_of, keep_shares, take_share

# Siblings of one launch.
_MOST = 4


class _Left(NamedTuple):
    """What the first of siblings left for another: y ``[M, N]``, whole or yet without product."""

    y: torch.Tensor
    is_whole: bool


def output_at_once(call: LayerCall, base: Base, own: Factors) -> torch.Tensor | None:
    """Returns a layer's output where siblings are computed at once, None where it is alone.

    Args:
        call: Without gradients, on kernels.
        base: The layer's, a weight.
        own: Its adapter, the only one that acts.
    """
    layer, x = call.layer, call.given
    family = family_of(layer, x)
    if family is None or len(family.members) < 2 or not family.unwritten:
        return None
    key = _key(base, own)
    if key is None or call.conditions.autocast is not None:
        return None
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    # Numbers differ in identity: the stream is part of each key.
    left = take_share(x, id(layer), (family,), (stream, *key))
    if left is None:
        left = _compute(call, base, own, family, stream)
    if left is None:
        return None
    y, weight = left.y, base.weight
    if not left.is_whole and weight is not None:
        y.addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    if x.dim() == 2:
        return y
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))


def _compute(
    call: LayerCall, base: Base, own: Factors, family: Family, stream: int
) -> _Left | None:
    """Computes a layer and those siblings that have yet to be called; returns its own."""
    layer, x = call.layer, call.given
    found: list[tuple[Any, Base, Factors]] = []
    for reference in family.members:
        member: Any = reference()
        if member is layer:
            found.append((layer, base, own))
        elif found and member is not None and len(found) < _MOST:
            like = _operands_of(member, call, base, own)
            if like is not None:
                found.append((member, *like))
    if len(found) < 2 or not _fits(x, base, own):
        return None
    made = BACKENDS[call.conditions.backend].siblings(
        x.reshape(-1, x.shape[-1]),
        [base for _, base, _ in found],
        [factors for _, _, factors in found],
    )
    if made is None:
        return None
    ys, are_whole = made
    shares = {
        id(member): ((stream, *(_key(base, factors) or ())), _Left(y, are_whole))
        for (member, base, factors), y in zip(found[1:], ys[1:], strict=True)
    }
    keep_shares(x, (family,), shares)
    return _Left(ys[0], are_whole)


def _operands_of(
    member: AdapterLayer, call: LayerCall, base: Base, own: Factors
) -> tuple[Base, Factors] | None:
    """Returns a sibling's base layer and adapter if one launch takes them beside the layer's."""
    if member.impl != call.layer.impl:
        return None
    names = member._acting()
    other = member._plain_base()
    if len(names) != 1 or other is None or (other.bias is None) != (base.bias is None):
        return None
    factors = factors_of(member, names[0], call)
    if factors is None or not _fits(call.given, other, factors):
        return None
    pairs = (factors.lora_a, own.lora_a), (factors.lora_b, own.lora_b), (other.bias, base.bias)
    alike = all(a is None or b is None or a.dtype is b.dtype for a, b in pairs)
    return (other, factors) if alike else None


def _fits(x: torch.Tensor, base: Base, own: Factors) -> bool:
    """Whether one launch takes a layer among others: plain, contiguous, without dropout."""
    weight, bias, (lora_a, lora_b, scaling, lora_bias, dropout_p, magnitude) = *base[:2], own
    tensors = [weight, lora_a, lora_b] if bias is None else [weight, bias, lora_a, lora_b]
    if weight is None or lora_bias is not None or dropout_p or magnitude is not None:
        return False
    for tensor in tensors:
        if tensor is None or tensor.device != x.device or not tensor.is_contiguous():
            return False
    return (
        weight.dtype is x.dtype
        and (bias is None or bias.dtype is x.dtype)
        and lora_a.shape[1] == x.shape[-1] == weight.shape[1]
        and lora_a.shape[0] > 0
        and scaling.numel() == 1
    )


def _key(base: Base, own: Factors) -> tuple[int, ...] | None:
    """Returns what a layer's output depends on beside x, unchanged since; None for unknown."""
    key = [id(own.scaling)]
    for tensor in (base.weight, base.bias, own.lora_a, own.lora_b):
        if tensor is not None:
            if tensor.is_inference():  # whose writes are not counted
                return None
            key += id(tensor), tensor._version
    return tuple(key)
