"""In training, layers fed by the same tensor share their passes over it.

The first of them computes every sibling's s in one node of the graph, whose backward forms all
their d_lora_a (`fastlora.autograd.shrink`). Found by watching, used by the tensor's identity: see
`fastlora.routing.siblings`. Where that would not be safe or saves nothing, each layer has its own
pass, and the fusion report says why.

A compiled graph must not see what one call leaves for another. There every sibling on kernels calls
one operator with all their factors and takes its own share (`fastlora.layers.graph_ops`). Who is a
sibling was seen in a forward before; what one leaves afterwards changes no graph.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from fastlora.autograd.adapter import autocast_dtype
from fastlora.autograd.shrink import Shrunk, shrink
from fastlora.layers import (
    graph_ops,  # noqa: F401 - registers operators
    graph_slots,
)
from fastlora.layers.decide import slots_for_kernels
from fastlora.layers.dora_rows import dora_slots
from fastlora.layers.factors import factors_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.layers.why import is_hooked
from fastlora.ops.backend import constant_when_compiled, resolve_impl
from fastlora.ops.factors import Slots
from fastlora.ops.invariant import is_batch_invariant
from fastlora.routing.routing import Routing
from fastlora.routing.siblings import (
    Family,
    FedLayer,
    family_of,
    keep_shares,
    known_family,
    take_share,
)
from fastlora.validation import FastLoraError

# From here on sharing pays on a CPU. Forward and backward of SmolLM2's q/k/v (rank 16, one Xeon
# core), shared over apart, at 512, 2,048 and 8,192 rows: fp32 1.015, 0.98 and 0.95, bf16 1.004,
# 1.006 and 0.997; of gate/up: fp32 1.008, 1.001 and 0.996, bf16 1.002, 0.991 and 0.995.
MIN_ROWS = 1024
_FEW_ROWS = f"below {MIN_ROWS} rows PyTorch is as fast apart"
_UNKNOWN = "no training forward seen yet"
_UNSEEN = "no forward was seen before torch.compile"
_CHECKPOINT = (
    "saved-tensor hooks are in force (activation checkpointing, offloading): a recomputed forward "
    "must save what the first one saved"
)
_INVARIANT = "the batch-invariant mode is on"
_MIXED_IN_PYTORCH = "without kernels each layer of a mixed batch has its own pass over x"
_GRAPH_IN_PYTORCH = "without kernels each layer of a compiled graph has its own pass over x"
_DROPOUT = "under dropout each of them masks x for itself"
_LAST = "no sibling that is called after it can share"


def shared_shrink(
    layer: AdapterLayer, x: torch.Tensor, own: Slots, routing: Routing | None = None
) -> Shrunk | None:
    """Returns the layer's s from the pass over x that it shares, None where it has its own.

    Args:
        layer: Being called.
        x: Its input, the very tensor that it was called with.
        own: Its adapters by slot; without a routing the one that acts.
        routing: The batch's, where it is mixed.
    """
    if torch.compiler.is_compiling():
        return _in_graph(layer, x, own, routing) if torch.is_grad_enabled() else None
    family = known_family(layer)
    if family is None:
        family = family_of(layer, x)
    if family is None or len(family.members) < 2:
        return None
    if not torch.is_grad_enabled() or x.is_inference():
        return None
    impl, found = resolve_impl(layer.impl, x), None
    few = impl != "triton" and x.numel() < MIN_ROWS * x.shape[-1]
    why = _FEW_ROWS if few else _why_not_now()
    if not why:
        # Of a block that has ended nothing is held: it knows all layers of its model.
        block = None if routing is None else weakref.ref(routing)
        context = impl, autocast_dtype(x), block
        found = take_share(x, id(layer), context, _key(own))
        if found is None:
            found, why = _share(layer, x, own, family, impl, routing, context)
    family.why_not[id(layer)] = why
    return found


def note_apart(layer: AdapterLayer, x: torch.Tensor) -> None:
    """Says for the report that PyTorch computes a layer of a mixed batch, by itself.

    Args:
        layer: Being called.
        x: Its input, the very tensor that it was called with: it shows who its siblings are.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    family = family_of(layer, x)
    if family is not None:
        family.why_not[id(layer)] = _MIXED_IN_PYTORCH


def _why_not_now() -> str:
    """Returns why no layer may share at this moment, or an empty string."""
    # A forward that runs within a backward is a checkpoint's, whose first run could not share.
    recomputed = torch._C._current_graph_task_id() != -1
    if recomputed or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return _CHECKPOINT
    return _INVARIANT if is_batch_invariant() else ""


def _key(slots: Slots) -> tuple[Any, ...]:
    """Returns what a share depends on: factors, unchanged since, and dropout."""
    return tuple(
        None if f is None else (id(f.lora_a), f.lora_a._version, f.dropout_p) for f in slots.own
    )


def _share(
    layer: AdapterLayer,
    x: torch.Tensor,
    own: Slots,
    family: Family,
    impl: str,
    routing: Routing | None,
    context: tuple[object, ...],
) -> tuple[Shrunk | None, str]:
    """Computes for a layer and those siblings that have yet to be called.

    Returns:
        The layer's share, or None and why there is none.
    """
    members: list[Any] = [reference() for reference in family.members]
    found, why = _sharing(members[members.index(layer) :], layer, x, own, impl, routing)
    if len(found) < 2:
        return None, why or _LAST
    rows = None if routing is None else routing.rows(x.numel() // x.shape[-1], x.device)
    lora_a = [_lora_a(slots) for _, slots in found]
    dropout_p = [max(slots.dropout_p) for _, slots in found]
    made = shrink(x.to(autocast_dtype(x) or x.dtype), lora_a, dropout_p, impl, rows)
    shares = {
        id(member): (_key(slots), share)
        for (member, slots), share in zip(found[1:], made[1:], strict=True)
    }
    keep_shares(x, context, shares)
    return made[0], ""


def _in_graph(
    layer: AdapterLayer, x: torch.Tensor, own: Slots, routing: Routing | None
) -> Shrunk | None:
    """`shared_shrink` in a graph that is being compiled, for any number of rows."""
    if not layer.knows_siblings():
        layer.note_compiled(_UNSEEN)
        return None
    members: list[Any] = [reference() for reference in layer._family.members]
    impl, why = resolve_impl(layer.impl, x), ""
    found: list[tuple[Any, Slots]] = []
    if len(members) < 2:
        why = "none"
    elif is_batch_invariant():
        why = _INVARIANT
    elif impl != "triton":
        why = _GRAPH_IN_PYTORCH
    else:
        found, why = _sharing(members, layer, x, own, impl, routing)
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
    batch = (None, 1) if routing is None else (routing.ids, len(routing.names))
    dtypes = autocast_dtype(x) or x.dtype, None if routing is None else _dtype(own)
    s, seeds = torch.ops.fastlora.lora_shared(
        x, factors, places, mine, dropout_p, *batch, *dtypes, impl
    )
    return Shrunk(s, seeds[0] if dropout_p[mine] > 0.0 else None)


def _sharing(
    members: Sequence[AdapterLayer | None],
    layer: AdapterLayer,
    x: torch.Tensor,
    own: Slots,
    impl: str,
    routing: Routing | None,
) -> tuple[list[tuple[Any, Slots]], str]:
    """Returns those of a layer's siblings that share with it, and their adapters.

    None at all where the layer itself cannot; and why the last of the others does not.
    """
    found: list[tuple[Any, Slots]] = []
    last = ""
    for member in members:
        if member is None:
            continue
        slots, why = (own, "") if member is layer else _slots_of(member, layer, x, routing)
        if slots is not None:
            why = _why_not(member, slots, own, x, impl, routing)
        if slots is not None and not why:
            found.append((member, slots))
        elif member is layer:
            return [], why
        else:
            last = f"of its siblings, {why}"
    return found, last


def _slots_of(
    member: AdapterLayer, layer: AdapterLayer, x: torch.Tensor, routing: Routing | None
) -> tuple[Slots | None, str]:
    """Returns the adapters that a sibling will compute with, or None and why it does not share."""
    if member.impl != layer.impl:
        return None, "they have different implementations"
    if routing is None:
        names = member._acting()
        if len(names) != 1:
            return None, f"{len(names)} adapters act on one of them"
        if names[0] in getattr(member, "lora_magnitude_vector", ()):
            return None, "one of them is DoRA"
        factors = factors_of(member, names[0])
        if factors is None:
            return None, "one of them has a factor or dropout that is hooked, or not plain"
        return Slots((factors,)), ""
    if member.routed_by is not layer.routed_by:
        return None, "one of them is of another model"
    x = x.to(autocast_dtype(x) or x.dtype)
    if torch.compiler.is_compiling():
        made = graph_slots.slots_of(member, x, routing)
        return (None, "one of them is not in the graph") if made is None else (made.own, "")
    dora = dora_slots(member, routing)
    try:
        slots = slots_for_kernels(member, x, routing, () if dora is None else dora.dropped)
    except (FastLoraError, ValueError):  # which its own call will raise
        return None, "one of them cannot run"
    return slots, "one of them runs without kernels"


def _why_not(
    layer: AdapterLayer,
    slots: Slots,
    own: Slots,
    x: torch.Tensor,
    impl: str,
    routing: Routing | None,
) -> str:
    """Returns why a layer with these adapters has its own pass over x, or an empty string."""
    present = [factors.lora_a for factors in slots.present]
    if is_hooked(layer):  # type: ignore[arg-type]  # a module
        return "one of them has hooks"
    if any(slots.dropout_p) and (impl != "triton" or routing is not None):
        return _DROPOUT
    if not any(lora_a.requires_grad for lora_a in present):
        return "one of them is frozen, or no adapter of the batch acts on it"
    if any(a.device != x.device or a.dim() != 2 or a.shape[1] != x.shape[-1] for a in present):
        return "one of them has its factors elsewhere, or takes another number of features"
    if routing is not None and _dtype(slots) != _dtype(own):
        return "they have factors of different dtypes"
    return ""


def _lora_a(slots: Slots) -> list[torch.Tensor | None]:
    return slots.tensors()[::3]


def _dtype(slots: Slots) -> torch.dtype:
    """Returns the dtype that holds all factors exactly."""
    dtypes = [tensor.dtype for tensor in slots.tensors() if tensor is not None]
    return functools.reduce(torch.promote_types, dtypes or [torch.float32])


# ------------------------------------------------------------------------------ in the report


@constant_when_compiled
def knows_siblings(self: Any) -> bool:
    """Whether a forward has shown a layer's siblings; no reason to compile again once one has."""
    return known_family(self) is not None


@constant_when_compiled
def note_compiled(self: Any, why: str) -> None:
    """Keeps why a layer shares nothing in the graph that is being compiled, empty if it does."""
    self.__dict__["_compiled_alone"] = why


def sibling_note(layer: FedLayer) -> str:
    """Returns what the fusion report says of a layer's siblings in training."""
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
