"""`TableLaunchArguments`: arguments for kernels that read factors through address tables.

The arguments include the layer's row in the address tables, and the layer's neighbors. The
neighbors are layers of the same shared-input group with adjacent rows. A layer and its neighbors
share launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastlora.layers.address_tables import table_row_of
from fastlora.layers.call import MixedCall
from fastlora.layers.shared_input import SharedInputGroup, observe_call
from fastlora.ops import schema
from fastlora.ops.factors import AddressTables, Base
from fastlora.ops.operator_backend import launch_mixed_group_without_operator, weight_for_kernels
from fastlora.ops.rows import Rows
from fastlora.ops.triton.rows_argument import rows_argument_for_address_tables
from fastlora.quantized_tensor import QuantizedData, QuantizedTensor

if TYPE_CHECKING:
    from fastlora.layers.linear_with_adapters import BaseLinearWithAdapters


class TableLaunchArguments(NamedTuple):
    """Launch arguments for kernels that read a layer's factors through address tables.

    All forward passes with the same rows reuse the arguments.

    Attributes:
        of: The tables.
        rows: The rows.
        invariant: Whether the launches are for the batch-invariant mode.
        own: The rows in the form in which operators receive them.
        tables: The tables in the form in which operators receive them.
        row: The layer's row in the tables.
        group: The layer's shared-input group if the layer has neighbors in the tables, or None.
        first: The lowest table row of the layer and its neighbors.
        members: The layer and its neighbors, in the order of the tables.
    """

    of: AddressTables
    rows: Rows
    invariant: bool
    own: list[torch.Tensor]
    tables: list[torch.Tensor]
    row: int
    group: SharedInputGroup | None
    first: int
    members: list[BaseLinearWithAdapters]


def get_table_launch_arguments(
    call: MixedCall,
    tables: AddressTables,
    rows: Rows,
    invariant: bool = False,
    impl: str = "triton",
) -> TableLaunchArguments | None:
    """Return the arguments for launching the kernels that read address tables.

    The arguments are for the call's layer. Returns None if the layer is not in the tables. The
    result is cached for the block once the layer's shared-input group is known. In a graph that is
    being compiled, each layer runs alone, because a compiled graph must not see results that one
    call leaves for another.
    """
    layer, key = call.layer, None
    if not call.conditions.compiling:
        key = (id(tables), rows, invariant)
        known = call.routing.cache.layers.get(("table_launches", layer.routing_index))
        if known is not None and known[0] == key:
            launch: TableLaunchArguments = known[1]
            return launch
    row = table_row_of(layer, layer.routing_index, tables)
    if row is None:
        return None
    group = None if call.conditions.compiling else observe_call(layer, call.x)
    neighbors: dict[int, BaseLinearWithAdapters] = {row: layer}
    for reference in () if group is None else group.members:
        member: Any = reference()
        if (
            member is not None
            and member is not layer
            and member.routing_group is layer.routing_group
        ):
            beside = table_row_of(member, member.routing_index, tables)
            if beside is not None:
                neighbors[beside] = member
    first, stop = row, row + 1
    while first - 1 in neighbors:
        first -= 1
    while stop in neighbors:
        stop += 1
    members = [neighbors[each] for each in range(first, stop)]
    own = (
        rows_argument_for_address_tables(rows, invariant)
        if impl == "triton"
        else rows.operator_arguments()
    )
    shared = group if len(members) > 1 else None
    found = TableLaunchArguments(
        tables, rows, invariant, own, tables.operator_arguments(), row, shared, first, members
    )
    if group is not None:
        call.routing.cache.layers["table_launches", layer.routing_index] = key, found
    return found


def output_from_tables(
    call: MixedCall, base: Base, launch: TableLaunchArguments, impl: str = "triton"
) -> torch.Tensor:
    """Compute a layer's output, using tables of the factors' addresses.

    The output ``[M, N]`` for the mixed batch is the base output plus the update of each row's
    adapter. ``impl`` may differ from ``"triton"`` only if the base layer's output is given.
    """
    if base.weight is not None:
        return linear_from_tables(call, base, launch)[0]
    y, of = base.writable_y(), launch.of
    # PyTorch does not need the largest rank. A constant avoids recompilation by a guard on it.
    max_rank = of.max_rank if impl == "triton" else 0
    torch.ops.fastlora.lora_add_at_(
        *(y, _to_2d(call.x), launch.own, launch.tables, launch.row, max_rank, of.dtype, impl)
    )
    return y


def linear_from_tables(
    call: MixedCall,
    base: Base,
    launch: TableLaunchArguments,
    s: torch.Tensor | None = None,
    compute_s_for_neighbors: bool = False,
) -> list[torch.Tensor]:
    """Compute a linear layer's output for a mixed batch, using address tables.

    The tables contain the addresses of the adapters' factors. The output y ``[M, N]`` is computed
    from the base weight and includes the update of each row's adapter. The result is a list that
    contains y. ``s`` is given if a neighbor has computed it. If ``compute_s_for_neighbors`` is set,
    the call also computes s for all neighbors, and the list contains s after y.
    """
    of, plan = launch.of, "invariant" if launch.invariant else "auto"
    x = call.x if call.x.dim() == 2 else call.x.reshape(-1, call.x.shape[-1])
    if base.weight is None:
        raise ValueError(
            "a base layer that is called as a module has no weight for a kernel launch"
        )
    read: torch.Tensor | QuantizedData = base.weight
    if call.conditions.compiling:
        operators: schema.OperatorNamespace = torch.ops.fastlora
    else:
        is_coded = isinstance(read, QuantizedTensor)
        operators = schema.registered_or_direct_operators(x, in_autograd_function=is_coded)
        if is_coded and operators is not torch.ops.fastlora:
            read = weight_for_kernels(base.weight, x, of.max_rank, plan)
    neighbors = None
    if compute_s_for_neighbors or s is not None:
        neighbors = launch.first, launch.first + len(launch.members)
    made: list[torch.Tensor] = operators.lora_linear_at(
        *(x, read, base.bias, launch.own, s, launch.tables, launch.row),
        *(of.max_rank, of.dtype, plan, neighbors),
    )
    return made


def run_launch_with_neighbors(
    x: torch.Tensor, bases: Sequence[Base], launch: TableLaunchArguments
) -> list[torch.Tensor] | None:
    """Compute the outputs of a layer and its neighbors in shared kernel launches.

    The neighbors share the layer's input and are next to the layer in the address tables. Each
    output is y ``[M, N]``. Returns None if the outputs cannot be computed together.
    """
    flat, biases = _to_2d(x), [base.bias for base in bases]
    weights = [base.weight for base in bases if base.weight is not None]
    if len(weights) < len(bases) or len({bias is None for bias in biases}) > 1:
        return None
    tensors = [*weights, *(bias for bias in biases if bias is not None)]
    if not all(t.dtype is x.dtype and t.device == x.device and t.is_contiguous() for t in tensors):
        return None
    return launch_mixed_group_without_operator(
        *(flat, weights, biases, launch.own, launch.tables),
        *(launch.first, launch.of.max_rank, launch.of.dtype),
    )


def _to_2d(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
