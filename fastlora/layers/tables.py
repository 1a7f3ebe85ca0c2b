"""A mixed batch on Triton kernels: from a layer's routing to the operators' tensors.

Everything that depends on the mix lies on the device. Layers fed by the same tensor, whose rows in
the tables are neighbours, share one shrink.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from fastlora.coded_weight import Coded, CodedWeight
from fastlora.layers.call import MixedCall
from fastlora.layers.factors import factors_of
from fastlora.ops import schema
from fastlora.ops.backend import MOST_SIBLINGS
from fastlora.ops.factors import Base, Factors, Tables
from fastlora.ops.operators import launched
from fastlora.ops.rows import Rows
from fastlora.ops.triton.pieces import rows_at
from fastlora.routing.in_force import is_captured
from fastlora.routing.routing import Routing
from fastlora.routing.siblings import (
    has_shares,
    is_unwritten,
    keep_shares,
    siblings_of,
    take_share,
)
from fastlora.routing.watch import Watch
from fastlora.weight_marks import marks

if TYPE_CHECKING:
    from fastlora.layers.common import CommonLayer


def row_of(layer: CommonLayer, number: int, tables: Tables) -> int | None:
    """Returns the row of a layer, of this number, or None where tables were made before it was.

    Layers of a pool know their rows.
    """
    if tables.rows is not None:
        return tables.rows.get(number)
    return layer.table_row


def tables_of(routing: Routing, x: torch.Tensor) -> Tables | None:
    """Returns where a batch's factors lie, for x; None where a factor is not a bare tensor."""
    if routing.source.tables is not None:
        return routing.source.tables
    # Of so many layers: a later block finds those that the model has got since.
    sets = routing.set_of(("tables", len(routing.layers), *routing.names))
    if sets.tables is None:
        sets.tables = _model_tables(routing, sets.watch)
    if sets.tables is False:
        return None
    if is_captured(x):
        routing.group.packs.pin(sets)
    return sets.tables


def _model_tables(routing: Routing, watch: Watch | None) -> Tables | Literal[False]:
    """Returns the tables of all adapters of a routing on all layers of its model; False for none.

    lora_a is read where it lies; lora_b, which kernels read as rank rows, is copied once.
    """
    found = _factors_of(routing, watch)
    blocks = [] if found is None else [(f.lora_a, f.lora_b, f.lora_bias) for _, _, f in found]
    tensors = [tensor for own in blocks for tensor in own if tensor is not None]
    if found is None or len({tensor.device for tensor in tensors}) > 1:
        return False
    shape = (len(routing.layers), len(routing.names))
    addresses = torch.zeros(3, *shape, dtype=torch.int64)
    rank, scaling = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    kept: list[torch.Tensor] = []
    # The widest holds each adapter's factors exactly, whoever else is in the batch.
    dtypes = [tensor.dtype for tensor in tensors]
    dtype = functools.reduce(torch.promote_types, dtypes, dtypes[0] if dtypes else torch.float32)
    for row, column, factors in found:
        for kind, tensor in enumerate((factors.lora_a, factors.lora_b.t(), factors.lora_bias)):
            if tensor is not None:
                kept.append(_block(tensor, dtype))
                addresses[kind, row, column] = kept[-1].data_ptr()
        rank[row, column] = factors.lora_a.shape[0]
        scaling[row, column] = float(factors.scaling)
    device = kept[0].device if kept else routing.ids.device
    largest = int(rank.max()) if rank.numel() else 0
    rows = {layer.routed_as: row for row, layer in enumerate(routing.layers)}
    a, b, bias = addresses.to(device).unbind(0)
    numbers = rank.to(device), scaling.to(device), largest
    return Tables(a, b, bias, *numbers, dtype, rows=rows, kept=tuple(kept))


def _factors_of(routing: Routing, watch: Watch | None) -> list[tuple[int, int, Factors]] | None:
    """Returns row, column and factors of every adapter on every layer.

    None where a factor is not a bare tensor.
    """
    found = []
    for row, layer in enumerate(routing.layers):
        if not getattr(layer, "is_linear", False):
            continue
        if watch is not None:
            watch.add(layer, routing.names)
        for column, name in enumerate(routing.names):
            if name not in layer.lora_A:
                continue
            factors = factors_of(layer, name, drops=False)
            if factors is None:
                return None
            found.append((row, column, factors))
    return found


def _block(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor as kernels read it: contiguous, in ``dtype``, at a multiple of 16 bytes."""
    block = tensor.detach().to(dtype).contiguous()
    return block.clone() if block.data_ptr() % 16 else block


def run(
    call: MixedCall, base: Base, tables: Tables, plan: str, impl: str = "triton"
) -> torch.Tensor:
    """Returns ``[..., N]`` of a base layer with every row's own adapter.

    Of the base layer alone where the tables do not know the layer. ``impl`` is other than kernels
    only for what the base layer made.
    """
    x, invariant = call.x, plan == "invariant"
    rows, found = call.rows(), None
    if not call.conditions.compiling:
        found = call.routing.kept.places.get(call.layer.routed_as)
    if found is None or not found.holds(tables, rows, invariant):
        found = _place_of(call, tables, rows, invariant, impl)
        if found is None:
            call.conditions.refuse(call.layer, "it was adapted after the block began")
            return base.output(x)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if base.weight is None:
        y = base.rows_to_write()
        # PyTorch reads no largest rank; there another one, which guards see, compiles nothing.
        max_rank = tables.max_rank if impl == "triton" else 0
        torch.ops.fastlora.lora_add_at_(
            y, flat, found.own, found.tables, found.row, max_rank, tables.dtype, impl
        )
    else:
        s, siblings, number = None, found.siblings, call.layer.routed_as
        # With gradients on, every call makes a mark; a pool's adapters are not trained.
        mark = None if torch.is_grad_enabled() else marks.trained
        context = (rows, tables, invariant, mark)
        # Writes into an inference tensor are not counted.
        if siblings is not None and x.is_inference() and not is_unwritten(call.layer):
            siblings = None
        if siblings is not None:
            s = take_share(x, number, context, siblings)
            if s is None and not invariant:
                y_at_once = _at_once(call, base, flat, found, context)
                if y_at_once is not None:
                    y = y_at_once
                    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])
        compiling = call.conditions.compiling
        read: torch.Tensor | Coded = base.weight
        if compiling:
            operators: schema.Operators = torch.ops.fastlora
        else:
            is_coded = isinstance(read, CodedWeight)
            operators = schema.operators_for(flat, within_node=is_coded)
            if is_coded and operators is not torch.ops.fastlora:
                read = launched(base.weight, flat, tables.max_rank, plan)
        y, *made = operators.lora_linear_at(
            *(flat, read, base.bias, found.own, s, found.tables, found.row),
            *(tables.max_rank, tables.dtype, plan, siblings),
        )
        if made:
            keep_shares(x, context, dict.fromkeys(found.others, (siblings, made[0])))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _at_once(
    call: MixedCall, base: Base, x: torch.Tensor, place: Place, context: tuple[object, ...]
) -> torch.Tensor | None:
    """Returns y ``[M, N]`` where a layer is computed with its siblings; None where it is not.

    Whoever is called first computes its neighbours in the tables too. ``x [M, K]`` is the input,
    ``context`` what all shares depend on.
    """
    key = _key(base)
    if key is None or not place.group:
        return None
    y: torch.Tensor | None = take_share(call.given, call.layer.routed_as, context, key)
    if y is not None or has_shares() or not schema.is_direct(x):
        return y
    bases: list[Base] = []
    for member in place.group:
        own = base if member is call.layer else member._plain_base()
        if (
            own is None
            or member.impl != call.layer.impl
            or (own.bias is None) != (base.bias is None)
        ):
            return None
        bases.append(own)
    keys = [_key(own) for own in bases]
    if None in keys or not all(_fits(x, own) for own in bases):
        return None
    from fastlora.kernels.modules import are_of_a_kind
    from fastlora.ops.triton import forward

    tables, (first, _) = place.of, place.siblings or (place.row, 0)
    weights = [own.weight for own in bases if own.weight is not None]
    read = [launched(weight, x, tables.max_rank, "auto") for weight in weights]
    if not are_of_a_kind(read):
        return None
    ys = forward.siblings_at(
        *(x, read, [own.bias for own in bases]),
        *(place.own, place.tables, first, tables.max_rank, tables.dtype),
    )
    numbers = [member.routed_as for member in place.group]
    made = dict(zip(numbers, zip(keys, ys, strict=True), strict=True))
    _, y = made.pop(call.layer.routed_as)
    keep_shares(call.given, context, made)
    return y


def _fits(x: torch.Tensor, base: Base) -> bool:
    """Whether one launch takes a base layer among others."""
    return all(
        t is None or (t.dtype is x.dtype and t.device == x.device and t.is_contiguous())
        for t in (base.weight, base.bias)
    )


def _key(base: Base) -> tuple[object, ...] | None:
    """Returns what tells a base layer, unchanged since; None where nobody counts."""
    weight, bias = base.weight, base.bias
    if weight is None or weight.is_inference() or (bias is not None and bias.is_inference()):
        return None
    own = id(weight), weight._version, weight.untyped_storage()
    return own if bias is None else (*own, id(bias), bias._version, bias.untyped_storage())


class Place(NamedTuple):
    """What a layer's launches take in every forward of a block with the same rows.

    Attributes:
        of: The tables.
        rows: The rows.
        invariant: Whether they are for the batch-invariant mode.
        own: The rows as operators take them.
        tables: The tables as operators take them.
        row: The layer's in the tables.
        siblings: The rows of siblings that are its neighbours, and its own: first, and behind the
            last; None where it has none. One launch serves their shrink.
        others: Numbers of these siblings.
        group: The layer and these siblings, in the tables' order; none if they are more than one
            launch takes.
    """

    of: Tables
    rows: Rows
    invariant: bool
    own: list[torch.Tensor]
    tables: list[torch.Tensor]
    row: int
    siblings: tuple[int, int] | None
    others: list[int]
    group: list[CommonLayer]

    def holds(self, tables: Tables, rows: Rows, invariant: bool) -> bool:
        """Whether it is for these."""
        return self.of is tables and self.rows is rows and self.invariant == invariant


def _place_of(
    call: MixedCall, tables: Tables, rows: Rows, invariant: bool, impl: str
) -> Place | None:
    """Returns a layer's `Place`; None where the tables do not know it.

    Kept for the block once siblings are known. A compiled graph must not see what one call leaves
    for another, so each layer is on its own there.
    """
    layer, compiling = call.layer, call.conditions.compiling
    row = row_of(layer, layer.routed_as, tables)
    if row is None:
        return None
    members: dict[int, CommonLayer] = {}
    first, stop = row, row + 1
    for member in () if compiling else siblings_of(layer, call.x):
        place = row_of(member, member.routed_as, tables)
        if place is not None:
            members[place] = member
    while first - 1 in members:
        first -= 1
    while stop in members:
        stop += 1
    siblings = (first, stop) if stop - first > 1 else None
    others = [members[other].routed_as for other in range(first, stop) if other != row]
    is_known = bool(members)
    members[row] = layer
    group = (
        [members[each] for each in range(first, stop)] if 1 < stop - first <= MOST_SIBLINGS else []
    )
    own = rows_at(rows, invariant) if impl == "triton" else rows.tensors()
    found = Place(tables, rows, invariant, own, tables.tensors(), row, siblings, others, group)
    if is_known:
        call.routing.kept.places[layer.routed_as] = found
    return found
