"""Without gradients the first of siblings computes them all: one launch makes q, k and v.

For one adapter on kernels. What the others find at their own calls is whole, or, where the product
is the library's, bias and adapter for it to accumulate on. Who is a sibling was seen before, and
what was left is taken by the tensor's identity: see `fastlora.routing.siblings`. Each compares what
it would compute from with what was computed from, tensor by tensor; so the first may trust what it
found of its siblings at an earlier call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastlora.layers.call import LayerCall
from fastlora.layers.factors import factors_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.ops.backend import BACKENDS, MOST_SIBLINGS, Siblings
from fastlora.ops.factors import Base, Factors, Slots
from fastlora.routing.siblings import (
    Family,
    drop_shares,
    family_of,
    keep_shares,
    take_share,
    withdraw_share,
)
from fastlora.weight_marks import marks

_Key = tuple[int, ...]


class _Left(NamedTuple):
    """What the first of siblings left for another: y ``[M, N]``, whole or yet without product."""

    y: torch.Tensor
    is_whole: bool


class _Launch(NamedTuple):
    """What the first of siblings computes: itself, and those that are called after it.

    Attributes:
        dtype, device: Of x.
        base, own: The first's.
        owners: The ``id`` of each layer.
        siblings: Their operands; None where the first is alone.
    """

    dtype: torch.dtype
    device: torch.device
    base: Base
    own: Factors
    owners: list[int]
    siblings: Siblings | None

    def serves(self, x: torch.Tensor, base: Base, own: Factors) -> bool:
        """Whether it was found for the very same layer and such an input."""
        before, known = self.own, self.base
        return (
            own.lora_a is before.lora_a
            and own.lora_b is before.lora_b
            and own.scaling is before.scaling
            and base.weight is known.weight
            and base.bias is known.bias
            and x.dtype is self.dtype
            and x.device == self.device
        )


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
    weight, bias = base.weight, base.bias
    if own.dropout_p or own.lora_bias is not None or own.magnitude is not None or weight is None:
        return None
    if call.conditions.autocast is not None:
        return None
    if family.idle and id(layer) in family.idle:
        family.idle.discard(id(layer))
        family.at_once.clear()
    # Part of each key, as numbers differ in identity.
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    key = _key(stream, weight, bias, own.lora_a, own.lora_b, own.scaling)
    context = family, marks.trained
    left = None if key is None else take_share(x, id(layer), context, key)
    if left is None:
        if withdraw_share(id(layer)):
            family.at_once.clear()  # it computes other than the first took it to
        left = _compute(call, base, own, family, stream)
        if left is None:
            return None
    y, is_whole = left
    if not is_whole:
        y.addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    if x.dim() == 2:
        return y
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))


def _compute(
    call: LayerCall, base: Base, own: Factors, family: Family, stream: int
) -> _Left | None:
    """Computes a layer and those siblings that have yet to be called; returns its own."""
    layer, x = call.layer, call.given
    drop_shares()  # of a sibling that was not called, or computes other than before
    launch: _Launch | None = family.at_once.get(id(layer))
    if launch is None or not launch.serves(x, base, own):
        family.at_once.clear()  # another one's is as old
        launch = family.at_once[id(layer)] = _launch_of(call, base, own, family)
    siblings, device = launch.siblings, x.get_device()
    if siblings is None:
        return None
    for kind in siblings:
        for tensor in kind:
            if tensor is not None and tensor.get_device() != device:  # moved as it is
                return None
    keys = [_key(stream, *tensors) for tensors in zip(*siblings, strict=True)]
    if None in keys:
        return None
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    made = BACKENDS[call.conditions.backend].siblings(flat, siblings)
    if made is None:
        return None
    ys, is_whole = made
    shares = {
        owner: (key, _Left(y, is_whole))
        for owner, key, y in zip(launch.owners[1:], keys[1:], ys[1:], strict=True)
    }
    keep_shares(x, (family, marks.trained), shares)
    return _Left(ys[0], is_whole)


def siblings_of(
    call: LayerCall, base: Base, found: Sequence[tuple[AdapterLayer, Slots]]
) -> Siblings | None:
    """Returns the operands of layers that share a pass over x, the first with ``base``.

    None where one launch does not take them all.
    """
    (_, (own,)), *others = [(member, slots.own) for member, slots in found]
    if (
        own is None
        or base.weight is None
        or len(found) > MOST_SIBLINGS
        or not _fits(call.x, base, own)
    ):
        return None
    pairs: list[tuple[Base, Factors]] = [(base, own)]
    for member, (factors,) in others:
        other = member._plain_base()
        if factors is None or other is None or not _are_alike(call.x, other, factors, base, own):
            return None
        pairs.append((other, factors))
    return _operands(pairs)


def _launch_of(call: LayerCall, base: Base, own: Factors, family: Family) -> _Launch:
    """Finds the siblings that one launch takes beside a layer."""
    layer, x = call.layer, call.given
    found: list[tuple[int, Base, Factors]] = []
    for reference in family.members:
        member: Any = reference()
        if member is layer and _fits(x, base, own):
            found.append((id(layer), base, own))
        elif (
            found
            and member is not None
            and id(member) not in family.idle
            and len(found) < MOST_SIBLINGS
        ):
            like = _operands_of(member, call, base, own)
            if like is not None:
                found.append((id(member), *like))
    siblings = _operands([(base, own) for _, base, own in found]) if len(found) > 1 else None
    return _Launch(x.dtype, x.device, base, own, [owner for owner, _, _ in found], siblings)


def _operands_of(
    member: AdapterLayer, call: LayerCall, base: Base, own: Factors
) -> tuple[Base, Factors] | None:
    """Returns a sibling's base layer and adapter if one launch takes them beside the layer's."""
    if member.impl != call.layer.impl:
        return None
    names, other = member._acting(), member._plain_base()
    if len(names) != 1 or other is None:
        return None
    factors = factors_of(member, names[0], call)
    if factors is None or not _are_alike(call.given, other, factors, base, own):
        return None
    return other, factors


def _operands(pairs: Sequence[tuple[Base, Factors]]) -> Siblings:
    return Siblings(
        [base.weight for base, _ in pairs if base.weight is not None],
        [base.bias for base, _ in pairs],
        [own.lora_a for _, own in pairs],
        [own.lora_b for _, own in pairs],
        [own.scaling for _, own in pairs],
    )


def _are_alike(x: torch.Tensor, base: Base, own: Factors, first: Base, other: Factors) -> bool:
    """Whether one launch takes a layer beside the first."""
    return (
        _fits(x, base, own)
        and (base.bias is None) == (first.bias is None)
        and own.lora_a.dtype is other.lora_a.dtype
        and own.lora_b.dtype is other.lora_b.dtype
    )


def _fits(x: torch.Tensor, base: Base, own: Factors) -> bool:
    """Whether one launch takes a layer among others: plain, contiguous, without dropout."""
    weight, bias, lora_a, lora_b = base.weight, base.bias, own.lora_a, own.lora_b
    if own.lora_bias is not None or own.dropout_p or own.magnitude is not None or weight is None:
        return False
    tensors = [weight, lora_a, lora_b] if bias is None else [weight, bias, lora_a, lora_b]
    return (
        all(tensor.device == x.device and tensor.is_contiguous() for tensor in tensors)
        and weight.dtype is x.dtype
        and (bias is None or bias.dtype is x.dtype)
        and lora_a.shape[1] == x.shape[-1] == weight.shape[1]
        and lora_a.shape[0] > 0
        and own.scaling.numel() == 1
    )


def _key(
    stream: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
) -> _Key | None:
    """Returns what an output depends on beside x, unchanged since; None where nobody counts."""
    try:
        key: _Key = (stream, id(weight), weight._version, id(lora_a), lora_a._version)
        key += (id(lora_b), lora_b._version, id(scaling), scaling._version)
        return key if bias is None else (*key, id(bias), bias._version)
    except RuntimeError:  # an inference tensor's writes are not counted
        return None
