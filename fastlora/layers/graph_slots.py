"""A layer's adapters in a compiled mixed batch: one slot for every adapter that the model has."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastlora.layers.call import MixedCall
from fastlora.layers.dora_rows import DoraSlots, dora_slots
from fastlora.layers.factors import factors_of
from fastlora.ops.factors import Operands, Slots, operands_of
from fastlora.routing.routing import Routing

if TYPE_CHECKING:
    from fastlora.layers.common import CommonLayer

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class InGraph(NamedTuple):
    """A layer in a compiled mixed batch.

    Attributes:
        operands: The adapters of all slots, in one dtype.
        own: The same as parameters; None for an adapter that leaves the layer alone, or if its
            DoRA drops.
        impl: ``"triton"`` or ``"eager"``.
        dora: What is done behind.
    """

    operands: Operands
    own: Slots
    impl: str
    dora: DoraSlots

    def arguments(self, batch: Routing, number: int) -> tuple[Any, ...]:
        """Returns what stands behind the base layer's tensors in the schema of ``lora_mixed``."""
        lora_a, lora_b, lora_bias, scaling, dropout_p, *_ = self.operands
        number = number if any(dropout_p) else 0
        lists = lora_a, lora_b, lora_bias, scaling
        return *lists, batch.ids, batch.seeds, list(dropout_p), number, self.impl


def slots_of(call: MixedCall, layer: CommonLayer) -> InGraph | None:
    """Returns a layer's slots; None where it cannot be in a graph.

    Args:
        call: A layer's, with the routing's ``whole``.
        layer: That one, or a sibling of the same ``impl``.
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
    dtypes = [t.dtype for t in slots.tensors() if t is not None]
    dtype = functools.reduce(torch.promote_types, dtypes or [x.dtype])
    if dtype not in _KERNEL_DTYPES and layer.impl != "triton":
        impl = "eager"
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    scalings = [0.0 if factors is None else factors.scaling for factors in acting]
    numbers = [torch.as_tensor(s, dtype=exact, device=x.device).reshape(()) for s in scalings]
    if slots.present:
        tensors = [None if t is None else t.to(dtype) for t in slots.tensors()]
    else:  # all of rank 0
        none = x.new_empty(0, layer.in_features, dtype=dtype)
        tensors = [none, x.new_empty(layer.out_features, 0, dtype=dtype), None] * len(acting)
    operands = operands_of(tensors, torch.stack(numbers), tuple(slots.dropout_p), None, None)
    return InGraph(operands, slots, impl, dora)
