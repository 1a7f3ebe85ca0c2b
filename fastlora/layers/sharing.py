"""In training, layers fed by the same tensor share their passes over it on kernels.

That is for layers which are not computed at once (`fastlora.layers.at_once`): in a mixed batch,
over a base layer that is called, with lora_bias, under autocast. The first of them
computes every sibling's s in one node of the graph, whose backward forms all their d_lora_a
(`fastlora.autograd.shrink`). Found by watching, used by the tensor's identity: see
`fastlora.routing.siblings`. Where that would not be safe or saves nothing, each layer has its own
pass, and the fusion report says why.

A compiled graph must not see what one call leaves for another. There every sibling calls one
operator with all their factors and takes its own share (`fastlora.layers.graph_ops`). Who is a
sibling was seen in a forward before; what one leaves afterwards changes no graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastlora.autograd.shrink import Shrunk, shrink
from fastlora.layers import (
    graph_ops,  # noqa: F401 - registers operators
    graph_slots,
)
from fastlora.layers.call import LayerCall, MixedCall
from fastlora.layers.decide import slots_for_kernels
from fastlora.layers.dora import dora_slots
from fastlora.layers.factors import factors_of, has_tensor_hooks, is_hooked
from fastlora.ops.conditions import constant_when_compiled
from fastlora.ops.factors import Slots
from fastlora.routing.kept import stream_of
from fastlora.routing.siblings import (
    Family,
    has_share,
    keep_shares,
    known_family,
    take_share,
)
from fastlora.validation import FastLoraError

if TYPE_CHECKING:
    from fastlora.layers.common import CommonLayer

_IN_PYTORCH = "without kernels each of them has its own pass over x"
_UNKNOWN = "no training forward seen yet"
_UNSEEN = "no forward was seen before torch.compile"
_CHECKPOINT = (
    "saved-tensor hooks are in force (activation checkpointing, offloading): a recomputed forward "
    "must save what the first one saved"
)
_INVARIANT = "the batch-invariant mode is on"
_DROPOUT = "under dropout each of them masks x for itself"
_LAST = "no sibling that is called after it can share"


def shared_shrink(call: LayerCall | MixedCall, own: Slots, family: Family | None) -> Shrunk | None:
    """Returns the layer's s from the pass over x that it shares, None where it has its own.

    On kernels. Outside of a mixed batch ``own`` is the adapter that acts; a graph that is being
    compiled needs no family.
    """
    layer, x, records = call.layer, call.given, torch.is_grad_enabled()
    if call.conditions.compiling:
        return _in_graph(call, own) if records else None
    if not records or family is None or len(family.members) < 2 or x.is_inference():
        return None
    found, why = None, why_not_now(call)
    if not why:
        # Of a block that has ended nothing is held: it knows all layers of its model.
        block = weakref.ref(call.routing) if isinstance(call, MixedCall) else None
        context = call.conditions.autocast, block
        if has_share(id(layer)):  # or others wait for what a sibling made at once
            found = take_share(x, id(layer), context, (stream_of(x.device), *_key(own)))
        if found is None:
            found, why = _share(call, own, family, context)
    family.why_not[id(layer)] = why
    return found


def why_not_now(call: LayerCall | MixedCall) -> str:
    """Returns why no layer may share at this moment, or an empty string."""
    if call.conditions.invariant:
        return _INVARIANT
    # A forward that runs within a backward is a checkpoint's, whose first run could not share.
    recomputed = torch._C._current_graph_task_id() != -1
    if recomputed or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return _CHECKPOINT
    return ""


def _key(slots: Slots) -> tuple[Any, ...]:
    """Returns what a share depends on: every lora_a, unchanged since, and dropout."""
    key: list[Any] = []
    for factors in slots.own:
        if factors is None:
            key.append(None)
        else:
            lora_a = factors.lora_a
            key += id(lora_a), lora_a._version, lora_a.untyped_storage(), factors.dropout_p
    return tuple(key)


def _share(
    call: LayerCall | MixedCall, own: Slots, family: Family, context: tuple[object, ...]
) -> tuple[Shrunk | None, str]:
    """Computes s for a layer and those siblings that have yet to be called.

    Returns:
        The layer's share, or None and why there is none.
    """
    members: list[Any] = [reference() for reference in family.members]
    computed = family.computed() if isinstance(call, LayerCall) else ()
    behind = members[members.index(call.layer) + 1 :]
    others = [member for member in behind if id(member) not in computed]
    found, why = _sharing([call.layer, *others], call, own)
    if len(found) < 2:
        return None, why or _LAST
    rows = call.rows() if isinstance(call, MixedCall) else None
    lora_a = [_lora_a(slots) for _, slots in found]
    dropout_p = [max(slots.dropout_p) for _, slots in found]
    made = shrink(call.x, lora_a, dropout_p, call.conditions.backend, rows)
    stream = stream_of(call.given.device)
    shares = {
        id(member): ((stream, *_key(slots)), share)
        for (member, slots), share in zip(found[1:], made[1:], strict=True)
    }
    keep_shares(call.given, context, shares)
    return made[0], ""


def _in_graph(call: LayerCall | MixedCall, own: Slots) -> Shrunk | None:
    """`shared_shrink` in a graph that is being compiled, for any number of rows."""
    layer, conditions = call.layer, call.conditions
    if not layer.knows_siblings():
        layer.note_compiled(_UNSEEN)
        return None
    members: list[Any] = [reference() for reference in layer._family.members]
    why = ""
    found: list[tuple[Any, Slots]] = []
    if len(members) < 2:
        why = "none"
    elif conditions.invariant:
        why = _INVARIANT
    else:
        found, why = _sharing(members, call, own)
    if len(found) < 2:
        layer.note_compiled(why or _LAST)
        return None
    layer.note_compiled("")
    factors: list[torch.Tensor] = []
    places: list[int] = []
    for number, (_, slots) in enumerate(found):
        for slot, lora_a in enumerate(_lora_a(slots)):
            if lora_a is not None:
                factors.append(lora_a)
                places.append(number * len(own.own) + slot)
    (mine,) = [number for number, (member, _) in enumerate(found) if member is layer]
    dropout_p = [max(slots.dropout_p) for _, slots in found]
    ids, slots_of_all, dtype = None, 1, None
    if isinstance(call, MixedCall):
        batch = call.routing
        ids, slots_of_all, dtype = batch.ids, len(batch.names), graph_slots.dtype_of(own)
    s, seeds = torch.ops.fastlora.lora_shared(
        *(call.given, factors, places, mine, dropout_p, ids, slots_of_all, call.x.dtype, dtype)
    )
    return Shrunk(s, seeds[0] if dropout_p[mine] > 0.0 else None)


def _sharing(
    members: Sequence[CommonLayer | None], call: LayerCall | MixedCall, own: Slots
) -> tuple[list[tuple[Any, Slots]], str]:
    """Returns those of a layer's siblings that share with it, and their adapters.

    None at all where the layer itself cannot; and why the last of the others does not.
    """
    found: list[tuple[Any, Slots]] = []
    last = ""
    for member in members:
        if member is None:
            continue
        slots, why = (own, "") if member is call.layer else _slots_of(member, call)
        if slots is not None:
            why = _why_not(member, slots, own, call)
        if slots is not None and not why:
            found.append((member, slots))
        elif member is call.layer:
            return [], why
        else:
            last = f"of its siblings, {why}"
    return found, last


def _slots_of(member: CommonLayer, call: LayerCall | MixedCall) -> tuple[Slots | None, str]:
    """Returns the adapters that a sibling will compute with, or None and why it does not share."""
    if member.impl != call.layer.impl:
        return None, "they have different implementations"
    if isinstance(call, LayerCall):
        names = member._acting()
        if len(names) != 1:
            return None, f"{len(names)} adapters act on one of them"
        magnitudes = member._modules.get("lora_magnitude_vector")
        if magnitudes is not None and names[0] in magnitudes._modules:
            return None, "one of them is DoRA"
        factors = factors_of(member, names[0], call)
        if factors is None:
            return None, "one of them has a factor or dropout that is hooked, or not plain"
        return Slots((factors,)), ""
    if member.routed_by is not call.layer.routed_by:
        return None, "one of them is of another model"
    if call.conditions.compiling:
        made = graph_slots.slots_of(call, member)
        return (None, "one of them is not in the graph") if made is None else (made.own, "")
    dora = dora_slots(member, call.routing)
    try:
        slots = slots_for_kernels(call, member, () if dora is None else dora.dropped)
    except (FastLoraError, ValueError):  # which its own call will raise
        return None, "one of them cannot run"
    return slots, "one of them runs without kernels"


def _why_not(layer: CommonLayer, slots: Slots, own: Slots, call: LayerCall | MixedCall) -> str:
    """Returns why a layer with these adapters has its own pass over x, or an empty string."""
    x, mixed = call.given, isinstance(call, MixedCall)
    device, k, dropped, trains, elsewhere = x.device, x.shape[-1], False, False, False
    for factors in slots.own:
        if factors is not None:
            lora_a = factors.lora_a
            dropped = dropped or factors.dropout_p > 0.0
            trains = trains or lora_a.requires_grad
            if lora_a.device != device or lora_a.dim() != 2 or lora_a.shape[1] != k:
                elsewhere = True
    if is_hooked(layer):
        return "one of them has hooks"
    # The node that they share calls a hook, with None, for an s that nobody used.
    down = [tensor for tensor in _lora_a(slots) if tensor is not None]
    if not call.conditions.compiling and has_tensor_hooks(down):
        return "a factor of one of them has hooks"
    if dropped and mixed:
        return _DROPOUT
    if not trains:
        return "one of them is frozen, or no adapter of the batch acts on it"
    if elsewhere:
        return "one of them has its factors elsewhere, or takes another number of features"
    if mixed and graph_slots.dtype_of(slots) != graph_slots.dtype_of(own):
        return "they have factors of different dtypes"
    return ""


def _lora_a(slots: Slots) -> list[torch.Tensor | None]:
    return [None if factors is None else factors.lora_a for factors in slots.own]


# ------------------------------------------------------------------------------ in the report


@constant_when_compiled
def knows_siblings(self: Any) -> bool:
    """Whether a forward has shown a layer's siblings; no reason to compile again once one has."""
    return known_family(self) is not None


@constant_when_compiled
def note_compiled(self: Any, why: str) -> None:
    """Keeps why a layer shares nothing in the graph that is being compiled, empty if it does."""
    self.__dict__["_compiled_alone"] = why


def sibling_note(layer: CommonLayer, kernels: bool) -> str:
    """Returns what the fusion report says of a layer's siblings in training.

    ``kernels`` says that they compute it.
    """
    if not kernels:
        return _IN_PYTORCH
    family, compiled = known_family(layer), layer.__dict__.get("_compiled_alone")
    if family is not None and len(family.members) < 2:
        return "none"
    eager = _UNKNOWN
    if family is not None and id(layer) in family.why_not:
        eager = _verdict(family, family.why_not[id(layer)])
    if compiled is None:
        return eager
    graph = f"not shared: {compiled}" if family is None else _verdict(family, compiled)
    return eager if graph == eager else f"{eager}; compiled: {graph}"


def _verdict(family: Family, why: str) -> str:
    count = len(family.members)
    return f"{count}, not shared: {why}" if why else f"{count} share x"
