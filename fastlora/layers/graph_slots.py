"""A layer's adapters in a compiled mixed batch: one slot for every adapter that the model has."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastlora.layers.call import MixedCall
from fastlora.layers.dora import DoraSlots, dora_slots
from fastlora.layers.factors import factors_of
from fastlora.ops.conditions import KERNEL_DTYPES
from fastlora.ops.factors import Slots

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer


class InGraph(NamedTuple):
    """A layer in a compiled mixed batch.

    Attributes:
        own: The adapters of all slots; None for one that leaves the layer alone, or if its DoRA
            drops.
        scaling: Theirs, fp32 (fp64 for fp64) ``[S]``.
        impl: ``"triton"`` or ``"eager"``.
        dora: What is done behind.
    """

    own: Slots
    scaling: torch.Tensor
    impl: str
    dora: DoraSlots


def slots_of(call: MixedCall, layer: AdaptedLayer) -> InGraph | None:
    """Returns the slots of a call's layer, or a sibling of its ``impl``; None if in no graph.

    The call's routing is the batch's ``whole``.
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
    acting = [
        None if slot in dora.dropped else own.get(name) for slot, name in enumerate(batch.names)
    ]
    slots = Slots(tuple(acting))
    if dtype_of(slots) not in KERNEL_DTYPES and layer.impl != "triton":
        impl = "eager"
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    scalings = [0.0 if factors is None else factors.scaling for factors in acting]
    numbers = [torch.as_tensor(s, dtype=exact, device=x.device).reshape(()) for s in scalings]
    return InGraph(slots, torch.stack(numbers), impl, dora)


def dtype_of(slots: Slots) -> torch.dtype:
    """Returns the dtype that holds all factors exactly."""
    dtypes = [tensor.dtype for tensor in slots.tensors() if tensor is not None]
    return functools.reduce(torch.promote_types, dtypes or [torch.float32])
