"""A mixed batch's layers from packed factors: which factors, and what the last block found.

From the second time on that a set of adapters comes, without gradients and without kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlora.layers.factors import Watch, slots_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.ops.factors import Slots
from fastlora.ops.invariant import is_batch_invariant
from fastlora.ops.rows import Rows
from fastlora.ops.torch import packed, packed_forward
from fastlora.ops.torch.packed import LayerPack
from fastlora.ops.torch.packed_choice import kind_of
from fastlora.routing.kept import SetPack
from fastlora.routing.routing import Routing, is_captured
from fastlora.routing.siblings import share, shared
from fastlora.validation import UnsupportedLayerError
from fastlora.weight_marks import Mark, marks


class Ready(NamedTuple):
    """A layer's packed factors and how to multiply, found once for a routing.

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

    def serves(self, x: torch.Tensor, impl: str) -> bool:
        """Whether it was found for such an input."""
        return x.dtype is self.dtype and x.device == self.device and impl == self.impl


def run_again(
    layer: AdapterLayer,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    number: int,
) -> torch.Tensor | None:
    """Runs what an earlier forward of this routing found for the layer; None if it no longer holds.

    Most of a decode step is spent here, where the host's own time counts.
    """
    ready: Ready | None = routing.kept.ready.get(number)
    if (
        ready is None
        or layer.training
        or torch.is_grad_enabled()
        or not ready.serves(x, layer.impl)
        or weight.dtype is not ready.dtype
        or (ready.mark is not marks.trained and ready.mark is not None)
        or layer.merged_adapters
        or x.numel() != ready.rows.m * x.shape[-1]
        or is_batch_invariant()
        or torch.is_autocast_enabled(ready.device.type)
        or is_captured(x)  # what a graph reads is pinned by `find_packed`
    ):
        return None
    pack = ready.pack
    shrunk = _shrunk(x, number, ready.rows, pack, ready.plan)
    y = packed_forward.linear(flat(x), weight, bias, ready.rows, pack, ready.plan, shrunk)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def find_packed(
    layer: AdapterLayer, x: torch.Tensor, routing: Routing, rows: Rows, number: int
) -> tuple[LayerPack, packed_forward.Plan, packed_forward.Shrunk] | None:
    """Returns the layer's packed factors, how to multiply, and its s; None where not packed."""
    group = routing.group
    members = group.siblings.of(layer, number, x)
    if not rows.segments:
        return None
    sets = routing.set_of(routing.identities(rows), Watch)
    impl = layer.impl
    found_for = sets.found_for(rows)
    ready = found_for.ready
    if is_captured(x):
        group.packs.pin(sets, found_for)
    known: Ready | None = ready.get(number)
    if known is not None and known.serves(x, impl):
        routing.kept.ready.update(ready)  # for all layers: the next ones need not come here
        return known.pack, known.plan, _shrunk(x, number, rows, known.pack, known.plan)
    kind = kind_of(rows.m, rows.each)
    pack, due = sets.get(number, x.dtype, kind)
    if due and members is not None:
        pack = _pack(sets, members, x, routing, rows)[members.index(number)]
    if pack is None:
        return None
    plan = packed_forward.plan_for(rows, pack.layout, x.dtype, found_for.plans)
    if plan is None:
        return None
    found = Ready(pack, plan, rows, x.dtype, x.device, impl, sets.mark)
    routing.kept.ready[number] = ready[number] = found
    return pack, plan, _shrunk(x, number, rows, pack, plan)


def _shrunk(
    x: torch.Tensor, number: int, rows: Rows, pack: LayerPack, plan: packed_forward.Plan
) -> packed_forward.Shrunk:
    """Returns s of a layer and its siblings, which the first of them computes."""
    if len(pack.members) == 1:
        return packed_forward.shrink(flat(x), pack, plan)
    key = (rows, pack.lora_a)
    found = shared(x, number, key)
    if found is None:
        found = packed_forward.shrink(flat(x), pack, plan)
        share(x, number, pack.members, key, found)
    return found


def _pack(
    sets: SetPack,
    members: tuple[int, ...],
    x: torch.Tensor,
    routing: Routing,
    rows: Rows,
) -> list[LayerPack | None]:
    """Packs the batch's adapters for a layer and its siblings."""
    kind = kind_of(rows.m, rows.each)
    layers = [routing.group.siblings.layers[number]() for number in members]
    names = [routing.names[segment.slot] for segment in rows.segments]
    found = [_slots(member, x, routing, rows) for member in layers]
    bare = [slots for slots in found if slots is not None]
    packs: list[LayerPack | None] = [None] * len(members)
    if len(bare) == len(found):
        packs = packed.pack_layers(members, bare, x.dtype, kind)
    if sets.watch is not None:
        for member in filter(None, layers):
            sets.watch.add(member, names)
    sets.put(members, x.dtype, kind, packs)
    return packs


def _slots(
    layer: AdapterLayer | None, x: torch.Tensor, routing: Routing, rows: Rows
) -> Slots | None:
    """Returns the adapters with rows; None where a dropout acts or factors are elsewhere."""
    if layer is None:
        return None
    try:
        slots = slots_of(routing.source, layer, [segment.slot for segment in rows.segments])
    except UnsupportedLayerError:  # which the layer's own call raises
        return None
    if any(f.dropout_p or f.lora_a.device != x.device for f in slots.present):
        return None
    return slots


def flat(x: torch.Tensor) -> torch.Tensor:
    """Returns ``x [..., K]`` as ``[M, K]``."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
