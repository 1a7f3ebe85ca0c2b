"""A layer's adapters in a compiled mixed batch: one slot for every adapter that the model has."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from fastlora.layers.call import MixedCall
from fastlora.layers.dora import DoraSlots, dora_slots
from fastlora.layers.factors import factors_of
from fastlora.ops.conditions import KERNEL_DTYPES
from fastlora.ops.factors import Slots

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer


def slots_of(call: MixedCall, layer: AdaptedLayer) -> tuple[Slots, str, DoraSlots] | None:
    """Returns the slots of a call's layer, or a sibling of its ``impl``; None if in no graph.

    And ``"triton"`` or ``"eager"``, and the slots that use DoRA, which is done behind. Slots are
    None where an adapter leaves the layer alone, or its DoRA drops. The call's routing is the
    batch's ``whole``.
    """
    x, batch, impl = call.x, call.routing, call.conditions.impl
    if layer.merged_adapters or call.conditions.invariant:
        return None
    names = [name for name in batch.names if name in layer.lora_A]
    found = [factors_of(layer, name, call) for name in names]
    if (
        not names
        or None in found
        or any(f.lora_a.device != x.device for f in found if f is not None)
    ):
        return None
    own = dict(zip(names, found, strict=True))
    dora = dora_slots(layer, batch) or DoraSlots()
    slots = [
        None if slot in dora.dropped else own.get(name) for slot, name in enumerate(batch.names)
    ]
    if dtype_of(slots) not in KERNEL_DTYPES and layer.impl != "triton":
        impl = "eager"
    return slots, impl, dora


def dtype_of(slots: Slots) -> torch.dtype:
    """Returns the dtype that holds all factors exactly."""
    dtypes = [
        tensor.dtype
        for factors in slots
        if factors is not None
        for tensor in (factors.lora_a, factors.lora_b, factors.lora_bias)
        if tensor is not None
    ]
    return functools.reduce(torch.promote_types, dtypes or [torch.float32])
