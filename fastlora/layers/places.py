"""`Place`, the arguments with which kernels find a layer's factors by address in a mixed batch.

They include the layer's row in the address tables, and its neighbors: the layers of its
shared-input group with adjacent rows. One launch serves a layer and its neighbors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastlora.coded_weight import Coded, CodedWeight
from fastlora.layers.call import MixedCall
from fastlora.layers.shared_input import SharedInputGroup, group_of
from fastlora.layers.tables import row_of
from fastlora.ops import schema
from fastlora.ops.factors import Base, Tables
from fastlora.ops.operators import launched, siblings_at
from fastlora.ops.rows import Rows
from fastlora.ops.triton.pieces import rows_at

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer


class Place(NamedTuple):
    """The arguments of a layer's kernel launches, for all forward passes with the same rows.

    Attributes:
        of: The tables.
        rows: The rows.
        invariant: Whether the launches are for the batch-invariant mode.
        own: The rows in the form in which operators receive them.
        tables: The tables in the form in which operators receive them.
        row: The layer's row in the tables.
        group: The layer's shared-input group if the layer has neighbors in the tables, or None.
        first: The lowest row among the layer and its neighbors.
        members: The layer and its neighbors, in the order of the tables.
    """

    of: Tables
    rows: Rows
    invariant: bool
    own: list[torch.Tensor]
    tables: list[torch.Tensor]
    row: int
    group: SharedInputGroup | None
    first: int
    members: list[AdaptedLayer]


def place_of(
    call: MixedCall, tables: Tables, rows: Rows, invariant: bool = False, impl: str = "triton"
) -> Place | None:
    """Return a layer's `Place`, or None if the tables have no row for the layer.

    The result is cached for the block once the layer's shared-input group is known. In a graph that
    is being compiled each layer runs alone, because a compiled graph must not see results that one
    call leaves for another.
    """
    layer, key = call.layer, None
    if not call.conditions.compiling:
        key = (id(tables), rows, invariant)
        known = call.routing.kept.layers.get(("places", layer.routed_as))
        if known is not None and known[0] == key:
            place: Place = known[1]
            return place
    row = row_of(layer, layer.routed_as, tables)
    if row is None:
        return None
    group = None if call.conditions.compiling else group_of(layer, call.x)
    neighbours: dict[int, AdaptedLayer] = {row: layer}
    for reference in () if group is None else group.members:
        member: Any = reference()
        if member is not None and member is not layer and member.routed_by is layer.routed_by:
            beside = row_of(member, member.routed_as, tables)
            if beside is not None:
                neighbours[beside] = member
    first, stop = row, row + 1
    while first - 1 in neighbours:
        first -= 1
    while stop in neighbours:
        stop += 1
    members = [neighbours[each] for each in range(first, stop)]
    own = rows_at(rows, invariant) if impl == "triton" else rows.tensors()
    shared = group if len(members) > 1 else None
    found = Place(tables, rows, invariant, own, tables.tensors(), row, shared, first, members)
    if group is not None:
        call.routing.kept.layers["places", layer.routed_as] = key, found
    return found


def output_at(call: MixedCall, base: Base, place: Place, impl: str = "triton") -> torch.Tensor:
    """Return y ``[M, N]`` of one layer, with each row's own adapter added to its base output.

    ``impl`` may differ from ``"triton"`` only if the base layer's output is given.
    """
    if base.weight is not None:
        return linear_at(call, base, place)[0]
    y, of = base.rows_to_write(), place.of
    # PyTorch does not need the largest rank. A constant avoids recompilation by a guard on it.
    max_rank = of.max_rank if impl == "triton" else 0
    torch.ops.fastlora.lora_add_at_(
        *(y, _flat(call.x), place.own, place.tables, place.row, max_rank, of.dtype, impl)
    )
    return y


def linear_at(
    call: MixedCall,
    base: Base,
    place: Place,
    s: torch.Tensor | None = None,
    shares: bool = False,
) -> list[torch.Tensor]:
    """Return a list with y ``[M, N]``, computed from the base weight and each row's adapter.

    ``s`` is given if a neighbor has computed it. If ``shares`` is set, the call also computes s for
    all neighbors, and the list contains it after y.
    """
    of, plan = place.of, "invariant" if place.invariant else "auto"
    x = call.x if call.x.dim() == 2 else call.x.reshape(-1, call.x.shape[-1])
    if base.weight is None:
        raise ValueError(
            "a base layer that is called as a module has no weight for a kernel launch"
        )
    read: torch.Tensor | Coded = base.weight
    if call.conditions.compiling:
        operators: schema.Operators = torch.ops.fastlora
    else:
        is_coded = isinstance(read, CodedWeight)
        operators = schema.operators_for(x, within_node=is_coded)
        if is_coded and operators is not torch.ops.fastlora:
            read = launched(base.weight, x, of.max_rank, plan)
    neighbours = None
    if shares or s is not None:
        neighbours = place.first, place.first + len(place.members)
    made: list[torch.Tensor] = operators.lora_linear_at(
        *(x, read, base.bias, place.own, s, place.tables, place.row),
        *(of.max_rank, of.dtype, plan, neighbours),
    )
    return made


def outputs_at(x: torch.Tensor, bases: Sequence[Base], place: Place) -> list[torch.Tensor] | None:
    """Return a list of y ``[M, N]`` for a layer and its neighbors, computed by one launch.

    Returns None if one launch cannot compute all of them.
    """
    flat, biases = _flat(x), [base.bias for base in bases]
    weights = [base.weight for base in bases if base.weight is not None]
    if len(weights) < len(bases) or len({bias is None for bias in biases}) > 1:
        return None
    tensors = [*weights, *(bias for bias in biases if bias is not None)]
    if not all(t.dtype is x.dtype and t.device == x.device and t.is_contiguous() for t in tensors):
        return None
    return siblings_at(
        *(flat, weights, biases, place.own, place.tables),
        *(place.first, place.of.max_rank, place.of.dtype),
    )


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
