"""A mixed batch's layers from packed factors: which factors, and how to multiply.

From the second time on that a set of adapters comes, without gradients and without kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastlora.layers.call import MixedCall
from fastlora.layers.factors import slots_of
from fastlora.ops.factors import Base, Slots
from fastlora.ops.rows import Rows
from fastlora.ops.torch import packed_forward
from fastlora.ops.torch.packed import LayerPack, pack_layer
from fastlora.ops.torch.packed_choice import kind_of
from fastlora.routing.in_force import is_captured
from fastlora.validation import UnsupportedLayerError
from fastlora.weight_marks import marks

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer


# What is kept of a layer: its factors, how to multiply, and the rows that this is for.
_Packed = tuple[LayerPack, packed_forward.Plan, Rows]


def key_of(call: MixedCall, base: Base) -> tuple[object, ...] | None:
    """Returns what a forward by packed factors is kept for; None where that has to be decided.

    It is the dtype, device and rows of x, the layer's implementation, and the mark of its factors.
    """
    layer, x, conditions = call.layer, call.x, call.conditions
    like, dtype = base.y if base.weight is None else base.weight, x.dtype
    if (
        layer.training
        or torch.is_grad_enabled()
        or like is None
        or like.dtype is not dtype
        or layer.merged_adapters
        or conditions.invariant
        or conditions.autocast is not None
        # What a captured graph reads is pinned where it is found.
        or is_captured(x)
    ):
        return None
    mark = marks.trained if call.routing.source.residents is None else None
    return dtype, x.device, layer.impl, mark, x.numel() // x.shape[-1]


def run_kept(
    call: MixedCall, base: Base, pack: LayerPack, plan: packed_forward.Plan, rows: Rows
) -> torch.Tensor:
    """Returns ``[..., N]`` by packed factors.

    Most of a decode step is spent here, where the host's own time counts.
    """
    x = call.x
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if base.weight is not None:
        y = packed_forward.linear(flat, base.weight, base.bias, rows, pack, plan)
    else:
        y = packed_forward.add_(base.rows_to_write(), flat, rows, pack, plan)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def find(call: MixedCall, base: Base, rows: Rows) -> _Packed | None:
    """Returns the layer's packed factors and how to multiply; None where they are not packed.

    Kept for the block.
    """
    layer, routing, x = call.layer, call.routing, call.x
    if not rows.segments:
        return None
    number, kind = layer.routed_as, kind_of(rows.m, rows.each)
    sets = routing.set_of(routing.identities(rows))
    pack, due = sets.get(number, x.dtype, kind)
    if due:
        if sets.watch is not None:  # first: another thread may replace a factor meanwhile
            names = [routing.names[slot] for slot in rows.present]
            sets.watch.add(layer, layer.scaling, names)
        slots = _slots(layer, call, rows)
        pack = None if slots is None else pack_layer(slots, x.dtype, kind)
        sets.put(number, x.dtype, kind, pack)
    if pack is None:
        return None
    plans = routing.kept.plans.setdefault(rows, {})
    plan = packed_forward.plan_for(rows, pack.layout, x.dtype, plans)
    if plan is None:
        return None
    found, key = (pack, plan, rows), key_of(call, base)
    if key is not None:
        dtype, device, impl, _, m = key
        # The mark with which they were packed: another thread may have ended it since.
        routing.kept.layers["packs", number] = (dtype, device, impl, sets.mark, m), found
    if is_captured(x):
        routing.group.packs.pin(found)
    return found


def _slots(layer: AdaptedLayer, call: MixedCall, rows: Rows) -> Slots | None:
    """Returns the adapters with rows; None where a dropout acts or factors are elsewhere."""
    try:
        slots = slots_of(call.routing.source, layer, rows.present)
    except UnsupportedLayerError:  # which the layer's own call raises
        return None
    for factors in slots:
        if factors is not None and (factors.dropout_p or factors.lora_a.device != call.x.device):
            return None
    return slots
