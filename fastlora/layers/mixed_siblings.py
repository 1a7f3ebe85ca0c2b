"""In mixed batches with gradients on kernels, layers fed by the same tensor share passes over it.

Siblings are found, and results are used, as in `fastlora.layers.shared_shrink`: the first sibling
that is called makes everybody's s in one node, whose backward forms all their d_lora_a
(`fastlora.autograd.linear.LoraShrink`). PyTorch's products share nothing in a
mixed batch, which the fusion report says.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from fastlora import functional
from fastlora.autograd.linear import LoraShrink
from fastlora.layers.decide import slots_for_kernels
from fastlora.layers.dora_rows import dora_slots
from fastlora.layers.factors import is_hooked
from fastlora.layers.shared_shrink import LAST, why_not_now
from fastlora.ops.factors import Slots
from fastlora.routing.in_force import routing_of
from fastlora.routing.routing import Routing
from fastlora.routing.siblings import Family, family_of, keep_shares, take_share
from fastlora.validation import FastLoraError

DROPOUT = "under dropout each of them masks x for itself"
HOOKED = "one of them has hooks"
FROZEN = "one of them is frozen, or no adapter of the batch acts on it"
APART_IN_PYTORCH = "without kernels each layer of a mixed batch has its own pass over x"


def shared_shrink(
    layer: Any,
    x: torch.Tensor,
    rows: torch.Tensor,
    routing: Routing,
    projection: int,
    slots: Slots,
) -> torch.Tensor | None:
    """Returns the layer's s from the pass over x that it shares, None where it has its own.

    Args:
        layer: Computed by kernels.
        x: Its input, the very tensor that it was called with.
        rows: The same in the dtype that is computed in.
        routing: The batch's.
        projection: The layer's number in its model.
        slots: Of `slots_for_kernels`.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.is_inference():
        return None
    family = family_of(layer, x)
    if family is None or len(family.members) < 2:
        return None
    s, why = None, why_not_now()
    if not why:
        # Of a block that has ended nothing is held: it knows all layers of its model.
        context = (weakref.ref(routing), functional.autocast_dtype(x))
        s = take_share(layer, x, context, _key(slots))
        if s is None:
            s, why, shares = _share(layer, family, rows, routing, projection, slots)
            if shares:
                keep_shares(x, context, shares)
    family.why_not[id(layer)] = why
    return s


def note_apart(layer: Any, x: torch.Tensor) -> None:
    """Says for the fusion report that a layer with gradients computes by itself, in PyTorch.

    Args:
        layer: Any.
        x: Its input, the very tensor that it was called with: it shows who its siblings are.
    """
    # What a graph does is noted by `mixed_graph`.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    family = family_of(layer, x)
    if family is not None:
        family.why_not[id(layer)] = APART_IN_PYTORCH


def _key(slots: Slots) -> tuple[Any, ...]:
    """What a share depends on: factors, unchanged since, and no dropout."""
    return tuple(
        None if f is None else (id(f.lora_a), f.lora_a._version, f.dropout_p) for f in slots.own
    )


def _share(
    layer: Any,
    family: Family,
    rows: torch.Tensor,
    routing: Routing,
    projection: int,
    slots: Slots,
) -> tuple[torch.Tensor | None, str, list[tuple[Any, Any, torch.Tensor]]]:
    """Computes for a layer and those siblings that have yet to be called.

    Returns:
        The layer's s, or None and why there is none; the siblings' shares.
    """
    why = _why_not(layer, slots, rows)
    if why:
        return None, why, []
    members = [reference() for reference in family.members]
    found, dtype = [(layer, slots)], slots.present[0].lora_a.dtype
    for member in members[members.index(layer) + 1 :]:
        if member is None:
            continue
        others, reason = _slots_of(member, rows, routing, dtype)
        if others is not None:
            found.append((member, others))
        else:
            why = f"of its siblings, {reason}"
    if len(found) < 2:
        return None, why or LAST, []
    made = _shrink(rows, routing, [own for _, own in found], "triton")
    shares = [(member, _key(own), s) for (member, own), s in zip(found, made, strict=True)]
    return made[0], "", shares[1:]


def _slots_of(
    layer: Any, rows: torch.Tensor, routing: Routing, dtype: torch.dtype
) -> tuple[Slots | None, str]:
    """Returns the adapters that a sibling will compute with, or None and why not."""
    routed = routing_of(layer)
    if routed is None or routed[0] is not routing:
        return None, "one of them is of another model"
    dora = dora_slots(layer, routing)
    try:
        slots = slots_for_kernels(layer, rows, routing, () if dora is None else dora.dropped)
    except (FastLoraError, ValueError):  # which its own call will raise
        return None, "one of them cannot run"
    if slots is None:
        return None, "one of them runs without kernels"
    why = _why_not(layer, slots, rows)
    if not why and slots.present[0].lora_a.dtype != dtype:
        why = "they have factors of different dtypes"
    return (None, why) if why else (slots, "")


def _why_not(layer: Any, slots: Slots, rows: torch.Tensor) -> str:
    """Returns why a layer has its own pass over x, or an empty string."""
    present = slots.present
    if is_hooked(layer):
        return HOOKED
    if any(factors.dropout_p for factors in present):
        return DROPOUT
    if not any(factors.lora_a.requires_grad for factors in present):
        return FROZEN
    if any(factors.lora_a.shape[1] != rows.shape[-1] for factors in present):
        return "one of them takes another number of features"
    return ""


def _shrink(
    x: torch.Tensor, routing: Routing, layers: Sequence[Slots], impl: str
) -> tuple[torch.Tensor, ...]:
    """Returns the s of layers that are fed by the same x and drop nothing.

    In the backward x is read once for all their d_lora_a.

    Args:
        x: ``[..., K]``.
        routing: The batch's.
        layers: The adapters on each layer, all slots.
        impl: Name of the backend.
    """
    rows = routing.rows(x.numel() // x.shape[-1], x.device)
    lora_a = [lora_a for slots in layers for lora_a in slots.tensors()[::3]]
    none = (None,) * len(layers), (0.0,) * len(layers)
    found: tuple[torch.Tensor, ...] = LoraShrink.apply(x.detach(), *none, impl, rows, *lora_a)
    return found
