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
  the same arguments (`fastlora.layers.shared_in_graph`). A compiled graph must not see results that
  one call leaves for another. It relies on a group that an earlier forward pass has identified, and
  results that are stored later do not change the graph.

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

import fastlora.layers.shared_in_graph  # noqa: F401  # registers an operator
from fastlora.autograd.shared_input import Shared, run_siblings, shrink
from fastlora.layers.call import LayerCall, MixedCall
from fastlora.layers.factors import dtype_of
from fastlora.layers.group_members import (
    GroupLaunch,
    launch_of,
    lora_a_of,
    sharing,
    tensors_of,
)
from fastlora.layers.places import Place, linear_at, outputs_at
from fastlora.layers.shared_input import SharedInputGroup, group_of
from fastlora.ops.backend import BACKENDS, MOST_SIBLINGS, draw_seed
from fastlora.ops.factors import Base, Factors, Slots
from fastlora.routing.kept import stream_of
from fastlora.weight_marks import marks

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


# A layer's operands: the active adapter, the adapters of all slots, or the place of a mixed batch.
_Own = Factors | Slots | Place


def group_forward(call: LayerCall | MixedCall, base: Base, own: _Own) -> Shared | None:
    """Return a `Shared` with a layer's y, or with the s from which the layer computes its y.

    The function is called only if kernels run.

    Args:
        call: The call of the layer.
        base: The base layer.
        own: The `Factors` of the active adapter, the `Slots` of a mixed batch, or the `Place` where
            kernels find the factors of a mixed batch. With a `Place`, y is ``[M, N]``.

    Returns:
        The shared result, or None if the layer runs alone.
    """
    layer, x, records = call.layer, call.given, torch.is_grad_enabled()
    if call.conditions.compiling:
        return None if isinstance(own, Place) or not records else _in_graph(call, _listed(own))
    place = own if isinstance(own, Place) else None
    group = group_of(layer, x) if place is None else place.group
    if group is None or (not records and isinstance(own, list)):
        return None
    if group.idle and id(layer) in group.idle:
        group.idle.discard(id(layer))
        group.launches.clear()
    trains, several = records and place is None, len(group.members) > 1
    why, made, waits = _why_not_now(call) if trains else "", None, False
    # PyTorch does not count writes to an inference tensor.
    if not group.unwritten and x.is_inference():
        return None
    if group.made and several:
        at = get_ident(), id(x)
        waiting = group.made.get(at)
        if waiting is not None and not why:
            taken = group.take(x, id(layer), _context(call, own), waiting)
            if taken is not None:
                key, made = taken
                if key == _key(call, base, own, made):
                    if trains:
                        group.why_alone[id(layer)] = ""
                    return made
                # The layer uses other tensors than the first layer assumed.
                group.launches.clear()
                made = None
            waiting = group.made.get(at)
        waits = waiting is not None and waiting.by != id(layer)
    if place is not None:
        if isinstance(call, MixedCall):
            made = None if waits else _outputs_at(call, base, place)
            if made is None and several:
                made = _output_and_s(call, base, place)
        return made
    if not why and isinstance(own, Factors) and _is_plain(call, base, own, group):
        # The first layer left this one out. The next forward pass checks whether it still has to.
        if waits:
            group.launches.clear()
        else:
            made = _outputs(call, base, own, group)
    if trains:
        if made is None and several and not why and not x.is_inference():
            slots: Any = [own] if isinstance(own, Factors) else own
            made, why = _shrunk(call, slots, group)
        group.why_alone[id(layer)] = why
    return made


def _why_not_now(call: LayerCall | MixedCall) -> str:
    """Return the reason why no layer may share results in this call, or an empty string."""
    if call.conditions.invariant:
        return _INVARIANT
    # A forward pass within a backward pass recomputes a checkpoint. The checkpoint's first run
    # could not share.
    recomputed = torch._C._current_graph_task_id() != -1
    if recomputed or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return _CHECKPOINT
    return ""


def _listed(own: Factors | Slots) -> Slots:
    return own if isinstance(own, list) else [own]


# ---------------------------------------------------- dependencies of a result, apart from x


def _context(call: LayerCall | MixedCall, own: _Own) -> tuple[object, ...]:
    """Return a tuple of what all shared results depend on, such as the open block and autocast.

    Items are compared by identity.
    """
    records, conditions = torch.is_grad_enabled(), call.conditions
    if isinstance(own, Place):
        # With gradients enabled, every call starts a new weights version. It is left out here,
        # because a pool's adapters are not trained.
        return own.rows, own.of, own.invariant, None if records else marks.trained
    autocast, invariant = conditions.autocast, conditions.invariant
    # The reference to the block is weak, because a block that has ended must not keep the model's
    # layers alive.
    block = weakref.ref(call.routing) if isinstance(call, MixedCall) else None
    if records:
        return block, autocast, invariant, marks.of_step(), call.given.requires_grad
    return block, autocast, invariant, marks.trained


def _key(
    call: LayerCall | MixedCall, base: Base, own: _Own, made: Shared
) -> tuple[object, ...] | None:
    """Return a cache key for the operands from which a layer would compute a result like ``made``.

    Returns None if the layer cannot use such a result, or if writes to its tensors are not counted.
    """
    # The stream is determined as in `stream_of`, without a Python call.
    x = call.given
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    if isinstance(own, Place):
        if made.y is None:
            return stream, own.first, len(own.members)
        return _key_of(stream, None, _present(base))
    if made.y is None:
        return _key_of_s(stream, _listed(own))
    if isinstance(own, list) or own.lora_bias is not None or own.magnitude is not None:
        return None
    return _key_of(stream, own.dropout_p, tensors_of(base, own))


def _key_of(
    stream: int, dropout_p: Hashable, tensors: Sequence[torch.Tensor]
) -> tuple[object, ...] | None:
    """Return a cache key that changes if a tensor does, or None if writes are not counted."""
    trains = map(_trains, tensors) if torch.is_grad_enabled() else ()
    ids, memory = map(id, tensors), map(_memory_of, tensors)
    try:
        return (stream, dropout_p, *ids, *map(_version_of, tensors), *memory, *trains)
    except RuntimeError:  # One of them is an inference tensor.
        return None


def _key_of_s(stream: int, own: Slots) -> tuple[object, ...] | None:
    """Return the cache key of s, which covers every lora_a and the dropout probabilities."""
    dropout_p = tuple(None if factors is None else factors.dropout_p for factors in own)
    return _key_of(stream, dropout_p, [a for a in lora_a_of(own) if a is not None])


def _present(base: Base) -> list[torch.Tensor]:
    return [tensor for tensor in base[:2] if tensor is not None]


# --------------------------------------------------------------------------- one adapter, every y


def _is_plain(
    call: LayerCall | MixedCall, base: Base, own: Factors, group: SharedInputGroup
) -> bool:
    """Return whether one call may compute a layer's y together with the y of other layers."""
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


def _outputs(
    call: LayerCall | MixedCall, base: Base, own: Factors, group: SharedInputGroup
) -> Shared | None:
    """Compute y for a layer and for those called after it, in one call.

    Returns the layer's own result, or None if one call cannot compute it.
    """
    layer, x, conditions = call.layer, call.given, call.conditions
    records, several = torch.is_grad_enabled(), len(group.members) > 1
    if group.made:
        group.discard()  # Drop results of layers that were not called.
    launch: GroupLaunch | None = group.launches.get(id(layer))
    backend = BACKENDS[conditions.backend]
    if (
        launch is None
        or not launch.serves(x, base, own)
        or (records and not launch.fits_one_node(x))
    ):
        group.launches.clear()  # The launches of other layers are as old.
        launch = group.launches[id(layer)] = launch_of(call, base, own, group)
    operands, dropout_p = launch.operands, launch.dropout_p
    if not operands or not backend.computes_siblings(x):
        return None
    if records and several and not launch.others:
        return None  # The layer may still share s.
    if {*map(_device_of, launch.tensors)} != {x.get_device()}:  # A tensor was moved in place.
        return None
    keys: list[tuple[object, ...] | None] = []
    if launch.others:
        stream = stream_of(x.device)
        keys = [_key_of(stream, *other) for other in launch.others]
        if None in keys:
            return None
    if own.dropout_p:
        seeds = [draw_seed(x, conditions.backend) for _ in dropout_p]
        operands = *operands[: -len(seeds)], *seeds
    y, *ys = run_siblings(x, operands, dropout_p, conditions.backend)
    if ys:
        made = zip(keys, map(Shared, ys), strict=True)
        results = dict(zip(launch.owners[1:], made, strict=True))
        group.put(x, _context(call, own), id(layer), results, layer.routed_by)
    return Shared(y)


# ------------------------------------------------------------------------------ by lists, every s


def _shrunk(
    call: LayerCall | MixedCall, own: Slots, group: SharedInputGroup
) -> tuple[Shared | None, str]:
    """Compute s for a layer and for those called after it, in one pass over x.

    Returns a tuple of the layer's own result and an empty string, or of None and the reason why s
    is not shared.
    """
    members: list[Any] = [reference() for reference in group.members]
    behind = members[members.index(call.layer) + 1 :]
    computed: set[int] = set()  # Layers with a y from another layer's call.
    if isinstance(call, LayerCall):
        computed.update(*(launch.owners[1:] for launch in group.launches.values()))
    others = [member for member in behind if id(member) not in computed]
    found, why = sharing([call.layer, *others], call, own)
    if len(found) < 2:
        return None, why or _LAST
    rows = call.rows() if isinstance(call, MixedCall) else None
    lora_a = [lora_a_of(slots) for _, slots in found]
    dropout_p = [_dropout_of(slots) for _, slots in found]
    first, *made = shrink(call.x, lora_a, dropout_p, call.conditions.backend, rows)
    stream = stream_of(call.given.device)
    keys = [_key_of_s(stream, slots) for _, slots in found[1:]]
    owners = [id(member) for member, _ in found[1:]]
    results = dict(zip(owners, zip(keys, made, strict=True), strict=True))
    layer, x = call.layer, call.given
    group.put(x, _context(call, own), id(layer), results, layer.routed_by)
    return first, ""


def _dropout_of(slots: Slots) -> float:
    """Return a layer's active dropout probability, or 0.

    `sharing` ensures that at most one adapter of the layer has active dropout.
    """
    return max(0.0 if factors is None else factors.dropout_p for factors in slots)


def _in_graph(call: LayerCall | MixedCall, own: Slots) -> Shared | None:
    """Return the layer's s in a graph that is being compiled, or None if s is not shared."""
    layer, conditions = call.layer, call.conditions
    if not layer.knows_siblings():
        layer.note_compiled(_UNSEEN)
        return None
    members: list[Any] = [reference() for reference in layer._shared_input.members]
    why = ""
    found: list[tuple[Any, Slots]] = []
    if len(members) < 2:
        why = "none"
    elif conditions.invariant:
        why = _INVARIANT
    else:
        found, why = sharing(members, call, own)
    if len(found) < 2:
        layer.note_compiled(why or _LAST)
        return None
    layer.note_compiled("")
    factors: list[torch.Tensor] = []
    places: list[int] = []
    for number, (_, slots) in enumerate(found):
        for slot, lora_a in enumerate(lora_a_of(slots)):
            if lora_a is not None:
                factors.append(lora_a)
                places.append(number * len(own) + slot)
    (mine,) = [number for number, (member, _) in enumerate(found) if member is layer]
    dropout_p = [_dropout_of(slots) for _, slots in found]
    ids, slots_of_all, dtype = None, 1, None
    if isinstance(call, MixedCall):
        batch = call.routing
        ids, slots_of_all, dtype = batch.ids, len(batch.names), dtype_of(own)
    s, seeds = torch.ops.fastlora.lora_shared(
        *(call.given, factors, places, mine, dropout_p, ids, slots_of_all, call.x.dtype, dtype)
    )
    return Shared(None, s, seeds[0] if dropout_p[mine] > 0.0 else None)


# ------------------------------------------------------------------------------------- by address


def _outputs_at(call: MixedCall, base: Base, own: Place) -> Shared | None:
    """Compute y for a layer and its neighbors in the address tables, in one launch.

    Returns the layer's own result, or None if one launch cannot compute all of them.
    """
    if own.group is None or own.invariant or len(own.members) > MOST_SIBLINGS:
        return None
    bases: list[Base] = []
    for member in own.members:
        like = base if member is call.layer else member._plain_base()
        if like is None or member.impl != call.layer.impl:
            return None
        bases.append(like)
    stream = stream_of(call.given.device)
    keys = [_key_of(stream, None, _present(like)) for like in bases]
    if None in keys:
        return None
    if own.group.made:
        own.group.discard()  # Drop results of layers that were not called.
    ys = outputs_at(call.x, bases, own)
    if ys is None:
        return None
    made = zip(keys, map(Shared, ys), strict=True)
    results = dict(zip(map(id, own.members), made, strict=True))
    _, mine = results.pop(id(call.layer))
    layer, context = call.layer, _context(call, own)
    own.group.put(call.given, context, id(layer), results, layer.routed_by)
    return mine


def _output_and_s(call: MixedCall, base: Base, own: Place) -> Shared | None:
    """Compute a layer's y, and s for its neighbors in the address tables, in one call.

    Returns the layer's own result, or None if it has no neighbors.
    """
    if own.group is None:
        return None
    y, *planes = linear_at(call, base, own, shares=True)
    if planes:
        made = Shared(None, planes[0])
        key = _key(call, base, own, made)
        others = [id(member) for member in own.members if member is not call.layer]
        results = dict.fromkeys(others, (key, made))
        layer, context = call.layer, _context(call, own)
        own.group.put(call.given, context, id(layer), results, layer.routed_by)
    return Shared(y)
