"""In compiled mixed batches on kernels, layers fed by the same tensor share passes over it.

As in `fastlora.layers.shared_shrink`, which compiled graphs of one adapter use: every sibling calls
one operator with all their factors and gets its own share, and one node has the gradients of all.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.autograd import mixed_graph_ops  # noqa: F401 - registers operators
from fastlora.layers.factors import is_hooked
from fastlora.layers.mixed_graph_slots import InGraph, slots_of
from fastlora.layers.mixed_siblings import APART_IN_PYTORCH, DROPOUT, FROZEN, HOOKED
from fastlora.layers.shared_shrink import LAST, UNSEEN
from fastlora.routing.routing import Routing


def shared_shrink(
    layer: Any, given: torch.Tensor, x: torch.Tensor, batch: Routing, slots: InGraph
) -> torch.Tensor | None:
    """Returns the layer's s ``[M, R]`` from the pass that it shares, None where it has its own.

    Args:
        layer: Being traced.
        given: Its input, the very tensor that it was called with.
        x: The same in the dtype that is computed in.
        batch: The routing.
        slots: The layer's.
    """
    if not torch.is_grad_enabled():
        return None
    if not layer.knows_siblings():
        layer.note_compiled(UNSEEN)
        return None
    members = [reference() for reference in layer._family.members]
    if len(members) < 2:
        layer.note_compiled("none")
        return None
    why = _why_not(layer, slots)
    found: list[tuple[Any, InGraph]] = []
    if not why:
        for member in members:
            own, reason = (slots, "") if member is layer else _slots(member, layer, x, batch, slots)
            if own is None:
                why = f"of its siblings, {reason}"
            else:
                found.append((member, own))
    if len(found) < 2:
        layer.note_compiled(why or LAST)
        return None
    layer.note_compiled("")
    factors: list[torch.Tensor] = []
    places: list[int] = []
    for number, (_, own) in enumerate(found):
        for slot, lora_a in enumerate(own.own.tensors()[::3]):
            if lora_a is not None:
                factors.append(lora_a)
                places.append(number * len(batch.names) + slot)
    (mine,) = [number for number, (member, _) in enumerate(found) if member is layer]
    rows = batch.ids, len(batch.names), x.dtype, slots.operands.lora_a[0].dtype
    s: torch.Tensor = torch.ops.fastlora.mixed_lora_graph_shrink(
        given, factors, places, len(found), mine, *rows, slots.impl
    )
    return s


def _slots(
    member: Any, layer: Any, x: torch.Tensor, batch: Routing, slots: InGraph
) -> tuple[InGraph | None, str]:
    """Returns the slots that a sibling will compute with, or None and why not."""
    if member is None or getattr(member, "routed_by", None) is not layer.routed_by:
        return None, "one of them is of another model"
    own = slots_of(member, x, batch)
    if own is None:
        return None, "one of them is not in the graph"
    why = _why_not(member, own)
    if not why and own.operands.lora_a[0].dtype != slots.operands.lora_a[0].dtype:
        why = "they have factors of different dtypes"
    if not why and own.operands.lora_a[0].shape[1] != x.shape[-1]:
        why = "one of them takes another number of features"
    return (None, why) if why else (own, "")


def _why_not(layer: Any, slots: InGraph) -> str:
    """Returns why a layer has its own pass over x, or an empty string."""
    if slots.impl != "triton":
        return APART_IN_PYTORCH
    if is_hooked(layer):
        return HOOKED
    if any(slots.operands.dropout_p):
        return DROPOUT
    factors = [factors.lora_a for factors in slots.own.present]
    return "" if any(a.requires_grad for a in factors) else FROZEN
