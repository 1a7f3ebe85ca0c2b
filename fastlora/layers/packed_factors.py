"""The forward pass of one layer with packed factors in a mixed batch.

Packed factors are used if gradients are disabled and no kernels run, from the second time that a
set of adapters occurs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastlora.layers.adapter_factors import factors_in_slots
from fastlora.layers.call import MixedCall
from fastlora.ops.factors import Base, Factors
from fastlora.ops.rows import Rows
from fastlora.ops.torch import packed_forward, packed_plans
from fastlora.ops.torch.packed import PackedLayerFactors, pack_layer_factors_if_finite
from fastlora.ops.torch.packed_choice import batch_size_category
from fastlora.routing.active import is_capturing_cuda_graph
from fastlora.validation import UnsupportedLayerError
from fastlora.weights_version import weights_versions

if TYPE_CHECKING:
    from fastlora.layers.linear_with_adapters import BaseLinearWithAdapters


# The cached entry of a layer: its packed factors, the plan, and the rows that the plan is for.
_PackedFactorsPlanAndRows = tuple[PackedLayerFactors, packed_plans.Plan, Rows]


def packed_cache_key(call: MixedCall, base: Base) -> tuple[object, ...] | None:
    """Return the cache key for a layer's packed factors.

    The key consists of x's dtype, device, and number of rows, the layer's implementation, and the
    weights version of its factors. Returns None if the packed factors cannot be cached.
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
        # A lookup pins the tensors that a captured graph reads.
        or is_capturing_cuda_graph(x)
    ):
        return None
    weights_version = (
        weights_versions.trained if call.routing.source.loaded_adapters is None else None
    )
    return dtype, x.device, layer.impl, weights_version, x.numel() // x.shape[-1]


def output_from_packed_factors(
    call: MixedCall, base: Base, pack: PackedLayerFactors, plan: packed_plans.Plan, rows: Rows
) -> torch.Tensor:
    """Compute a layer's output with packed factors.

    The shape of the output is ``[..., N]``. A decode step spends most of its time in this function,
    so Python overhead matters.
    """
    x, adapter = call.x, rows.segment_index
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if base.weight is not None:
        y = packed_forward.linear(flat, base.weight, base.bias, adapter, pack, plan)
    else:
        y = packed_forward.add_(base.writable_y(), flat, adapter, pack, plan)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def get_packed_factors(call: MixedCall, base: Base, rows: Rows) -> _PackedFactorsPlanAndRows | None:
    """Return the packed factors of the adapters in a mixed batch.

    The factors are those of the call's layer. The factors are packed when they are requested for
    the second time. The result is a tuple (packed factors, plan, rows), or None if the layer has no
    packed factors for the batch. The result is cached for the block if `packed_cache_key` returns a
    key.
    """
    layer, routing, x = call.layer, call.routing, call.x
    if not rows.segments:
        return None
    number, kind = layer.routing_index, batch_size_category(rows.m, rows.each)
    sets = routing.cached_adapter_set(routing.adapter_identities(rows))
    pack, due = sets.get_or_should_pack(number, x.dtype, kind)
    if due:
        # Record the factors before packing them: another thread may replace one meanwhile.
        if sets.snapshot is not None:
            names = [routing.names[slot] for slot in rows.used_slots]
            sets.snapshot.record_adapters(layer, layer.scaling, names)
        slots = _factors_to_pack(layer, call, rows)
        pack = None if slots is None else pack_layer_factors_if_finite(slots, x.dtype, kind)
        sets.put(number, x.dtype, kind, pack)
    if pack is None:
        return None
    plans = routing.cache.plans.setdefault(rows, {})
    plan = packed_plans.cached_plan(rows, rows.segment_index, pack, plans)
    found, key = (pack, plan, rows), packed_cache_key(call, base)
    if key is not None:
        dtype, device, impl, _, m = key
        # The weights version is that of the packing: another thread may have ended it since.
        routing.cache.layers["packs", number] = (
            (dtype, device, impl, sets.weights_version, m),
            found,
        )
    if is_capturing_cuda_graph(x):
        routing.group.packs.keep_cuda_graph_references(found)
    return found


def _factors_to_pack(
    layer: BaseLinearWithAdapters, call: MixedCall, rows: Rows
) -> list[Factors | None] | None:
    """Return the adapter factors that a layer must pack for a mixed batch.

    The result is a list with one entry for each slot that the batch uses. The entry is None for an
    adapter that does not adapt the layer. Returns None instead of a list if the factors cannot be
    packed. Active dropout, hooks, and factors on a device other than that of x prevent packing.
    """
    try:
        slots = factors_in_slots(call.routing.source, layer, rows.used_slots)
    except UnsupportedLayerError:  # The layer's own call raises this error.
        return None
    for factors in slots:
        if factors is not None and (factors.dropout_p or factors.lora_a.device != call.x.device):
            return None
    return slots
