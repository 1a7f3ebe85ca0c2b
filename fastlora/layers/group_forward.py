"""Sharing of computations within a shared-input group: one layer also computes for others.

Every forward pass on kernels calls `group_forward`. If an earlier layer of the group has computed a
result for this layer, the layer takes it. Otherwise the layer computes for itself and for the
layers that are called after it. They take their results in their own calls. There are three cases:

* Every y is computed in one call, which is one autograd node if gradients are recorded. This
  requires one adapter per layer, or a mixed batch without gradients that finds factors by address.
* Otherwise, every s is computed from one pass over x. This happens in training (over a base layer
  that is called, with lora_bias, under autocast, in a mixed batch), or by address together with the
  layer's own y.
* In a graph that is being compiled, every s is computed by one operator that all layers call with
  the same arguments (`fastlora.layers.shared_input_operator`). A compiled graph must not see
  results that one call leaves for another. It relies on a group that an earlier forward pass has
  identified, and results that are stored later do not change the graph.

Before a layer takes a result, it compares the tensors that it would use with the tensors that the
result was computed from. The first layer may therefore rely on what an earlier call has found out
about the others. If sharing would not be safe or would save nothing, a layer runs alone, and the
fusion report gives the reason.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from operator import attrgetter
from threading import get_ident
from typing import Any

import torch

import fastlora.layers.shared_input_operator  # noqa: F401  # registers an operator
from fastlora.autograd.shared_input import PrecomputedResult, grouped_shrink, run_grouped_linears
from fastlora.layers.adapter_factors import promoted_factor_dtype
from fastlora.layers.call import MixedCall, UniformCall
from fastlora.layers.group_members import (
    PreparedGroupLaunch,
    lora_a_by_slot,
    operand_tensors,
    prepare_launch_with_later_layers,
    select_sharing_layers,
)
from fastlora.layers.shared_input import SharedInputGroup, observe_call
from fastlora.layers.table_launch import (
    TableLaunchArguments,
    linear_from_tables,
    run_launch_with_neighbors,
)
from fastlora.ops.backend import BACKENDS, MAX_LAYERS_PER_LAUNCH, draw_dropout_seed
from fastlora.ops.factors import Base, Factors, Slots
from fastlora.routing.caches import cuda_stream_handle
from fastlora.weights_version import weights_versions

_UNSEEN = "no forward pass ran before torch.compile"
_INVARIANT = "batch-invariant mode is on"
_CHECKPOINT = (
    "saved-tensor hooks are active (activation checkpointing, offloading): a recomputed forward "
    "must save the same tensors as the first one"
)
_LAST = "no layer that runs later can share x"
# With map(), attrgetter reads an attribute of many tensors without a Python call for each.
_version_of, _trains = attrgetter("_version"), attrgetter("requires_grad")
_device_of = torch.Tensor.get_device
# A key holds the storage until the result is taken, so that no other tensor can reuse the memory.
_memory_of = torch.Tensor.untyped_storage


# A layer's operands: the active adapter, the adapters of all slots, or the tables of a mixed batch.
_LayerFactors = Factors | Slots | TableLaunchArguments
# The reason why a layer does not share a computation, or an empty string if the layer shares it.
_ReasonNotShared = str


def group_forward(
    call: UniformCall | MixedCall, base: Base, own: _LayerFactors
) -> PrecomputedResult | None:
    """Compute a layer's result together with those of other layers in its group, in one call.

    The group is the layer's shared-input group. If an earlier call has already computed the layer's
    result, the function returns that result and computes nothing. The result contains y, or the s
    from which the layer computes y. The function is called only if kernels run.

    Args:
        call: The call of the layer.
        base: The base layer.
        own: The `Factors` of the active adapter, the `Slots` of a mixed batch, or the
            `TableLaunchArguments` with which kernels find the factors of a mixed batch. With a
            `TableLaunchArguments`, y is ``[M, N]``.

    Returns:
        The layer's own result, or None if the layer runs alone.
    """
    layer, x, records = call.layer, call.original_x, torch.is_grad_enabled()
    if call.conditions.compiling:
        return (
            None
            if isinstance(own, TableLaunchArguments) or not records
            else _compute_s_in_compiled_graph(call, _as_slots(own))
        )
    table_launch = own if isinstance(own, TableLaunchArguments) else None
    group = observe_call(layer, x) if table_launch is None else table_launch.group
    if group is None or (not records and isinstance(own, list)):
        return None
    if group.idle and id(layer) in group.idle:
        group.idle.discard(id(layer))
        group.launches.clear()
    trains, several = records and table_launch is None, len(group.members) > 1
    reason, made, waits = _reason_call_cannot_share(call) if trains else "", None, False
    # PyTorch does not count writes to an inference tensor.
    if not group.unwritten and x.is_inference():
        return None
    if group.entries and several:
        at = get_ident(), id(x)
        waiting = group.entries.get(at)
        if waiting is not None and not reason:
            taken = group.pop_result(x, id(layer), _context_of_group_results(call, own), waiting)
            if taken is not None:
                key, made = taken
                if key == _layer_operands_cache_key(call, base, own, made):
                    if trains:
                        group.fallback_reasons[id(layer)] = ""
                    return made
                # The layer uses other tensors than the first layer assumed.
                group.launches.clear()
                made = None
            waiting = group.entries.get(at)
        waits = waiting is not None and waiting.computed_by != id(layer)
    if table_launch is not None:
        if isinstance(call, MixedCall):
            made = None if waits else _compute_outputs_with_neighbors(call, base, table_launch)
            if made is None and several:
                made = _compute_output_and_store_neighbor_s(call, base, table_launch)
        return made
    if not reason and isinstance(own, Factors) and _can_group_outputs(call, base, own, group):
        # The first layer left this one out. The next forward pass checks whether it still has to.
        if waits:
            group.launches.clear()
        else:
            made = _compute_outputs_with_later_layers(call, base, own, group)
    if trains:
        if made is None and several and not reason and not x.is_inference():
            slots: Any = [own] if isinstance(own, Factors) else own
            made, reason = _compute_s_with_later_layers(call, slots, group)
        group.fallback_reasons[id(layer)] = reason
    return made


def _reason_call_cannot_share(call: UniformCall | MixedCall) -> str:
    """Return the reason that a layer's call cannot share computations with other layers' calls.

    The other layers are those in the layer's shared-input group, which have the same input. Returns
    an empty string if the call can share computations.
    """
    if call.conditions.invariant:
        return _INVARIANT
    # A forward pass within a backward pass recomputes a checkpoint. The checkpoint's first run
    # could not share.
    recomputed = torch._C._current_graph_task_id() != -1
    if recomputed or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return _CHECKPOINT
    return ""


def _as_slots(own: Factors | Slots) -> Slots:
    return own if isinstance(own, list) else [own]


# ---------------------------------------------------- dependencies of a result, apart from x


def _context_of_group_results(
    call: UniformCall | MixedCall, own: _LayerFactors
) -> tuple[object, ...]:
    """Return a tuple that identifies the context in which a group's stored results are valid.

    The tuple contains the objects on which all these results depend, for example the open block,
    the autocast state, and the version of the weights. A call can use a stored result only if the
    call has the same context. The objects are compared by identity.
    """
    records, conditions = torch.is_grad_enabled(), call.conditions
    if isinstance(own, TableLaunchArguments):
        # With gradients enabled, every call starts a new weights version. It is left out here,
        # because a pool's adapters are not trained.
        return own.rows, own.of, own.invariant, None if records else weights_versions.trained
    autocast, invariant = conditions.autocast, conditions.invariant
    # The reference to the block is weak, because a block that has ended must not keep the model's
    # layers alive.
    block = weakref.ref(call.routing) if isinstance(call, MixedCall) else None
    if records:
        version = weights_versions.version_for_group_outputs()
        return block, autocast, invariant, version, call.original_x.requires_grad
    return block, autocast, invariant, weights_versions.trained


def _layer_operands_cache_key(
    call: UniformCall | MixedCall, base: Base, own: _LayerFactors, made: PrecomputedResult
) -> tuple[object, ...] | None:
    """Return a cache key for a layer's operands.

    The operands are those that the layer would use to compute ``made``. Returns None if there is no
    key. There is no key if the layer cannot use such a result, or if writes to its tensors are not
    counted.
    """
    # The stream is determined as in `cuda_stream_handle`, without a Python call.
    x = call.original_x
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    if isinstance(own, TableLaunchArguments):
        if made.y is None:
            return stream, own.first, len(own.members)
        return _tensor_cache_key(stream, None, _base_tensors(base))
    if made.y is None:
        return _s_cache_key(stream, _as_slots(own))
    if isinstance(own, list) or own.lora_bias is not None or own.magnitude is not None:
        return None
    return _tensor_cache_key(stream, own.dropout_p, operand_tensors(base, own))


def _tensor_cache_key(
    stream: int, dropout_p: Hashable, tensors: Sequence[torch.Tensor]
) -> tuple[object, ...] | None:
    """Return a cache key for a computation on the given tensors.

    The key contains the stream, the dropout probability, and the identity and state of each tensor.
    The key is None if the computation cannot be cached. This is the case if any of the tensors is
    an inference tensor, because PyTorch does not count writes to inference tensors.
    """
    trains = map(_trains, tensors) if torch.is_grad_enabled() else ()
    ids, memory = map(id, tensors), map(_memory_of, tensors)
    try:
        return (stream, dropout_p, *ids, *map(_version_of, tensors), *memory, *trains)
    except RuntimeError:  # One of them is an inference tensor.
        return None


def _s_cache_key(stream: int, own: Slots) -> tuple[object, ...] | None:
    """Return a cache key for ``s = x @ lora_a.T``.

    Returns None if any lora_a is an inference tensor. The key contains the stream, the dropout
    probabilities, and the state of every lora_a.
    """
    dropout_p = tuple(None if factors is None else factors.dropout_p for factors in own)
    return _tensor_cache_key(stream, dropout_p, [a for a in lora_a_by_slot(own) if a is not None])


def _base_tensors(base: Base) -> list[torch.Tensor]:
    return [tensor for tensor in base[:2] if tensor is not None]


# --------------------------------------------------------------------------- one adapter, every y


def _can_group_outputs(
    call: UniformCall | MixedCall, base: Base, own: Factors, group: SharedInputGroup
) -> bool:
    """Return whether a single call can compute the outputs of the layers in a shared-input group.

    The function checks the call, the group, and the operands of the called layer. The operands of
    the other layers are checked when the launch is prepared.
    """
    conditions = call.conditions
    return (
        base.weight is not None
        and own.lora_bias is None
        and own.magnitude is None
        and group.unwritten
        and conditions.autocast is None
        and not conditions.invariant
        # The first run of a checkpoint may record nothing, and its recomputation draws each layer's
        # seed in that layer's own call.
        and (not own.dropout_p or torch.is_grad_enabled())
    )


def _compute_outputs_with_later_layers(
    call: UniformCall | MixedCall, base: Base, own: Factors, group: SharedInputGroup
) -> PrecomputedResult | None:
    """In one call, compute the outputs of a layer and of later layers in its group.

    The later layers are those that are called after the layer. Returns the layer's own result, or
    None if one call cannot compute it.
    """
    layer, x, conditions = call.layer, call.original_x, call.conditions
    records, several = torch.is_grad_enabled(), len(group.members) > 1
    if group.entries:
        group.discard_untaken()  # Drop results of layers that were not called.
    launch: PreparedGroupLaunch | None = group.launches.get(id(layer))
    backend = BACKENDS[conditions.backend]
    if (
        launch is None
        or not launch.can_be_reused_for(x, base, own)
        or (records and not launch.fits_one_autograd_node(x))
    ):
        group.launches.clear()  # The launches of other layers are as old.
        launch = group.launches[id(layer)] = prepare_launch_with_later_layers(
            call, base, own, group
        )
    operands, dropout_p = launch.operands, launch.dropout_p
    if not operands or not backend.supports_grouped_forward(x):
        return None
    if records and several and not launch.others:
        return None  # The layer may still share s.
    if {*map(_device_of, launch.tensors)} != {x.get_device()}:  # A tensor was moved in place.
        return None
    keys: list[tuple[object, ...] | None] = []
    if launch.others:
        stream = cuda_stream_handle(x.device)
        keys = [_tensor_cache_key(stream, *other) for other in launch.others]
        if None in keys:
            return None
    if own.dropout_p:
        seeds = [draw_dropout_seed(x, conditions.backend) for _ in dropout_p]
        operands = *operands[: -len(seeds)], *seeds
    y, *ys = run_grouped_linears(x, operands, dropout_p, conditions.backend)
    if ys:
        made = zip(keys, map(PrecomputedResult, ys), strict=True)
        results = dict(zip(launch.owners[1:], made, strict=True))
        group.put_results(
            x, _context_of_group_results(call, own), id(layer), results, layer.routing_group
        )
    return PrecomputedResult(y)


# ------------------------------------------------------------------------------ by lists, every s


def _compute_s_with_later_layers(
    call: UniformCall | MixedCall, own: Slots, group: SharedInputGroup
) -> tuple[PrecomputedResult | None, _ReasonNotShared]:
    """In one pass over x, compute s for a layer and for later layers in its group.

    The later layers are those that are called after the layer. Returns a tuple (result, reason). If
    s is shared, the tuple contains the layer's own result and an empty string. Otherwise, the tuple
    contains None and the reason why s is not shared.
    """
    members: list[Any] = [reference() for reference in group.members]
    behind = members[members.index(call.layer) + 1 :]
    computed: set[int] = set()  # Layers with a y from another layer's call.
    if isinstance(call, UniformCall):
        computed.update(*(launch.owners[1:] for launch in group.launches.values()))
    others = [member for member in behind if id(member) not in computed]
    found, reason = select_sharing_layers([call.layer, *others], call, own)
    if len(found) < 2:
        return None, reason or _LAST
    rows = call.sorted_rows() if isinstance(call, MixedCall) else None
    lora_a = [lora_a_by_slot(slots) for _, slots in found]
    dropout_p = [_active_dropout_p(slots) for _, slots in found]
    first, *made = grouped_shrink(call.x, lora_a, dropout_p, call.conditions.backend, rows)
    stream = cuda_stream_handle(call.original_x.device)
    keys = [_s_cache_key(stream, slots) for _, slots in found[1:]]
    owners = [id(member) for member, _ in found[1:]]
    results = dict(zip(owners, zip(keys, made, strict=True), strict=True))
    layer, x = call.layer, call.original_x
    group.put_results(
        x, _context_of_group_results(call, own), id(layer), results, layer.routing_group
    )
    return first, ""


def _active_dropout_p(layer_slots: Slots) -> float:
    """Return the active dropout probability of a layer's slots.

    It is 0 if dropout is not active. `select_sharing_layers` ensures that at most one adapter of
    the layer has active dropout.
    """
    return max(0.0 if factors is None else factors.dropout_p for factors in layer_slots)


def _compute_s_in_compiled_graph(
    call: UniformCall | MixedCall, own: Slots
) -> PrecomputedResult | None:
    """Compute the shrink result s in a compiled graph, together with layers that share the input.

    s is ``x @ lora_a.T``, and the layers of the shared-input group share its computation. The
    function is called while the graph is being compiled. Returns the result of the call's own
    layer, or None if the layer cannot share the computation of s.
    """
    layer, conditions = call.layer, call.conditions
    if not layer.has_shared_input_group():
        layer.record_compiled_fallback(_UNSEEN)
        return None
    members: list[Any] = [reference() for reference in layer._shared_input_group.members]
    reason = ""
    found: list[tuple[Any, Slots]] = []
    if len(members) < 2:
        reason = "none"
    elif conditions.invariant:
        reason = _INVARIANT
    else:
        found, reason = select_sharing_layers(members, call, own)
    if len(found) < 2:
        layer.record_compiled_fallback(reason or _LAST)
        return None
    layer.record_compiled_fallback("")
    factors: list[torch.Tensor] = []
    places: list[int] = []
    for number, (_, slots) in enumerate(found):
        for slot, lora_a in enumerate(lora_a_by_slot(slots)):
            if lora_a is not None:
                factors.append(lora_a)
                places.append(number * len(own) + slot)
    (mine,) = [number for number, (member, _) in enumerate(found) if member is layer]
    dropout_p = [_active_dropout_p(slots) for _, slots in found]
    ids, slots_of_all, dtype = None, 1, None
    if isinstance(call, MixedCall):
        batch = call.routing
        ids, slots_of_all, dtype = batch.ids, len(batch.names), promoted_factor_dtype(own)
    s, seeds = torch.ops.fastlora.lora_shared(
        *(call.original_x, factors, places, mine, dropout_p, ids, slots_of_all, call.x.dtype, dtype)
    )
    return PrecomputedResult(None, s, seeds[0] if dropout_p[mine] > 0.0 else None)


# ------------------------------------------------------------------------------------- by address


def _compute_outputs_with_neighbors(
    call: MixedCall, base: Base, own: TableLaunchArguments
) -> PrecomputedResult | None:
    """Compute the outputs of a layer and neighboring layers in shared kernel launches.

    The neighbors are the layers of the same shared-input group that are next to the layer in the
    address tables. The results of the neighbors are stored in the group. Returns the layer's own
    result, or None if the layers cannot share the launches.
    """
    if own.group is None or own.invariant or len(own.members) > MAX_LAYERS_PER_LAUNCH:
        return None
    bases: list[Base] = []
    for member in own.members:
        like = base if member is call.layer else member._fusable_base()
        if like is None or member.impl != call.layer.impl:
            return None
        bases.append(like)
    stream = cuda_stream_handle(call.original_x.device)
    keys = [_tensor_cache_key(stream, None, _base_tensors(like)) for like in bases]
    if None in keys:
        return None
    if own.group.entries:
        own.group.discard_untaken()  # Drop results of layers that were not called.
    ys = run_launch_with_neighbors(call.x, bases, own)
    if ys is None:
        return None
    made = zip(keys, map(PrecomputedResult, ys), strict=True)
    results = dict(zip(map(id, own.members), made, strict=True))
    _, mine = results.pop(id(call.layer))
    layer, context = call.layer, _context_of_group_results(call, own)
    own.group.put_results(call.original_x, context, id(layer), results, layer.routing_group)
    return mine


def _compute_output_and_store_neighbor_s(
    call: MixedCall, base: Base, own: TableLaunchArguments
) -> PrecomputedResult | None:
    """Compute a layer's output, and store the shrink results s of neighboring layers.

    One call computes the output and every s, which is ``x @ lora_a.T``. The neighbors are the
    layers of the same shared-input group that are next to the layer in the address tables. The
    shrink results of the neighbors are stored in the group. Returns the layer's own result, which
    contains the output. Returns None if the layer has no neighbors.
    """
    if own.group is None:
        return None
    y, *planes = linear_from_tables(call, base, own, compute_s_for_neighbors=True)
    if planes:
        made = PrecomputedResult(None, planes[0])
        key = _layer_operands_cache_key(call, base, own, made)
        others = [id(member) for member in own.members if member is not call.layer]
        results = dict.fromkeys(others, (key, made))
        layer, context = call.layer, _context_of_group_results(call, own)
        own.group.put_results(call.original_x, context, id(layer), results, layer.routing_group)
    return PrecomputedResult(y)
