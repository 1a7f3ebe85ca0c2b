"""A mixed batch's layers from packed factors: which factors, and how to multiply.

From the second time on that a set of adapters comes, without gradients and without kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastlora.layers.call import MixedCall
from fastlora.layers.factors import slots_of
from fastlora.ops.factors import Base, Slots
from fastlora.ops.rows import Rows
from fastlora.ops.torch import packed, packed_forward
from fastlora.ops.torch.packed import LayerPack
from fastlora.ops.torch.packed_choice import kind_of
from fastlora.routing.in_force import is_captured
from fastlora.routing.kept import SetPack
from fastlora.routing.siblings import keep_shares, siblings_of, take_share
from fastlora.validation import UnsupportedLayerError
from fastlora.weight_marks import Mark, marks

if TYPE_CHECKING:
    from fastlora.layers.common import CommonLayer


class KeptDecision(NamedTuple):
    """That a layer runs by packed factors: found once, and used again while it holds.

    Attributes:
        pack: The factors.
        plan: How to multiply.
        rows: The rows that the plan is for.
        dtype, device: Of x.
        impl: The layer's.
        mark: The set's.
    """

    pack: LayerPack
    plan: packed_forward.Plan
    rows: Rows
    dtype: torch.dtype
    device: torch.device
    impl: str
    mark: Mark | None

    def holds(self, call: MixedCall, base: Base) -> bool:
        """Whether `fastlora.layers.decide` and `find` would come to it again."""
        layer, x, conditions = call.layer, call.x, call.conditions
        like = base.y if base.weight is None else base.weight
        return not (
            layer.training
            or torch.is_grad_enabled()
            or x.dtype is not self.dtype
            or x.device != self.device
            or layer.impl != self.impl
            or like is None
            or like.dtype is not self.dtype
            or (self.mark is not marks.trained and self.mark is not None)
            or layer.merged_adapters
            or x.numel() != self.rows.m * x.shape[-1]
            or conditions.invariant
            or conditions.autocast is not None
            # What a captured graph reads is pinned where it is found.
            or is_captured(x)
        )


def run_kept(call: MixedCall, base: Base, kept: KeptDecision) -> torch.Tensor:
    """Returns ``[..., N]`` by packed factors.

    Most of a decode step is spent here, where the host's own time counts.
    """
    (pack, plan, rows, *_), x = kept, call.x
    shrunk = _shrunk(x, call.layer.routed_as, rows, pack, plan)
    if base.weight is not None:
        y = packed_forward.linear(flat(x), base.weight, base.bias, rows, pack, plan, shrunk)
    else:
        y = packed_forward.add_(base.rows_to_write(), rows, pack, plan, shrunk)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def find(call: MixedCall, rows: Rows) -> KeptDecision | None:
    """Returns the layer's packed factors and how to multiply; None where they are not packed.

    Kept for the block.
    """
    layer, routing, x = call.layer, call.routing, call.x
    number = layer.routed_as
    members = siblings_of(layer, x)
    if not rows.segments:
        return None
    sets = routing.set_of(routing.identities(rows))
    kind = kind_of(rows.m, rows.each)
    pack, due = sets.get(number, x.dtype, kind)
    if due and members:
        pack = _pack(sets, members, call, rows)[members.index(layer)]
    if pack is None:
        return None
    plans = routing.kept.plans.setdefault(rows, {})
    plan = packed_forward.plan_for(rows, pack.layout, x.dtype, plans)
    if plan is None:
        return None
    found = KeptDecision(pack, plan, rows, x.dtype, x.device, layer.impl, sets.mark)
    routing.kept.decisions[number] = found
    if is_captured(x):
        routing.group.packs.pin(found)
    return found


def _shrunk(
    x: torch.Tensor, number: int, rows: Rows, pack: LayerPack, plan: packed_forward.Plan
) -> packed_forward.Shrunk:
    """Returns s of a layer and its siblings, which the first of them computes."""
    if len(pack.members) == 1:
        return packed_forward.shrink(flat(x), pack, plan)
    context = (rows, pack.lora_a)
    found: packed_forward.Shrunk | None = take_share(x, number, context)
    if found is None:
        found = packed_forward.shrink(flat(x), pack, plan)
        others = [member for member in pack.members if member != number]
        keep_shares(x, context, dict.fromkeys(others, (None, found)))
    return found


def _pack(
    sets: SetPack,
    members: Sequence[CommonLayer],
    call: MixedCall,
    rows: Rows,
) -> list[LayerPack | None]:
    """Packs the batch's adapters for a layer and its siblings."""
    kind, numbers = kind_of(rows.m, rows.each), [member.routed_as for member in members]
    names = [call.routing.names[slot] for slot in rows.present]
    found = [_slots(member, call, rows) for member in members]
    bare = [slots for slots in found if slots is not None]
    packs: list[LayerPack | None] = [None] * len(members)
    if len(bare) == len(found):
        packs = packed.pack_layers(numbers, bare, call.x.dtype, kind)
    if sets.watch is not None:
        for member in members:
            sets.watch.add(member, names)
    sets.put(numbers, call.x.dtype, kind, packs)
    return packs


def _slots(layer: CommonLayer, call: MixedCall, rows: Rows) -> Slots | None:
    """Returns the adapters with rows; None where a dropout acts or factors are elsewhere."""
    try:
        slots = slots_of(call.routing.source, layer, rows.present)
    except UnsupportedLayerError:  # which the layer's own call raises
        return None
    if any(f.dropout_p or f.lora_a.device != call.x.device for f in slots.present):
        return None
    return slots


def flat(x: torch.Tensor) -> torch.Tensor:
    """Returns ``x [..., K]`` as ``[M, K]``."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
