"""A mixed batch on Triton kernels: from a layer's routing to the operators' tensors.

Everything that depends on the mix lies on the device. Layers fed by the same tensor, whose rows in
the tables are neighbours, share one shrink.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastlora.layers.compute import plain_weight
from fastlora.layers.watch import Watch
from fastlora.ops import mixed_ops
from fastlora.ops.invariant import refuse_in_mode
from fastlora.routing.routing import KernelRouting, Routing
from fastlora.routing.siblings import share, shared


class ModelTables(NamedTuple):
    """The tables of adapters that are parameters: a row for each layer, a column for each adapter.

    Attributes:
        a_address, b_address, bias_address, rank, scaling: As a pool's, ``[G, S]``.
        max_rank: The largest rank.
        dtype: Of the factors.
        kept: What lies behind the addresses.
        rows: Row of each layer, by its number. Layers that the model gets later have none.
    """

    a_address: torch.Tensor
    b_address: torch.Tensor
    bias_address: torch.Tensor
    rank: torch.Tensor
    scaling: torch.Tensor
    max_rank: int
    dtype: torch.dtype
    kept: list[torch.Tensor]
    rows: dict[int, int]


def row_of(layer: Any, number: int, tables: Any) -> int | None:
    """Returns a layer's row in the tables, or None where they were made before the layer was.

    Args:
        layer: A pool's know their rows.
        number: The layer's number in its model.
        tables: A pool's, or `ModelTables`.
    """
    if isinstance(tables, ModelTables):
        return tables.rows.get(number)
    row: int = layer.table_row
    return row


def kernel_routing(routing: Routing) -> KernelRouting | None:
    """Returns a routing as kernels read it; None where a factor is not a bare tensor."""
    if routing.residents is not None:
        return routing.kernels[0]
    # Of so many layers: a later block finds those that the model has got since.
    sets = routing.set_of(("tables", len(routing.layers), *routing.names), Watch)
    if sets.tables is None:
        sets.tables = _model_tables(routing, sets.watch)
    if sets.tables == "none":
        return None
    if not routing.kernels or routing.kernels[-1].tables is not sets.tables:
        tables: ModelTables = sets.tables
        routing.kernels.append(KernelRouting(routing.ids, tables, tables.max_rank, tables.dtype))
    return routing.kernels[-1]


def _model_tables(routing: Routing, watch: Any) -> ModelTables | str:
    """Returns the tables of all adapters of a routing on all layers of its model, or ``"none"``.

    lora_a is read where it lies; lora_b, which kernels read as rank rows, is copied once.
    """
    found = _factors_of(routing, watch)
    if found is None or len({tensor.device for _, _, blocks, _ in found for tensor in blocks}) > 1:
        return "none"
    shape = (len(routing.layers), len(routing.names))
    addresses = torch.zeros(3, *shape, dtype=torch.int64)
    rank, scaling = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    kept: list[torch.Tensor] = []
    # The widest holds each adapter's factors exactly, whoever else is in the batch.
    dtypes = [tensor.dtype for _, _, blocks, _ in found for tensor in blocks]
    dtype = functools.reduce(torch.promote_types, dtypes, dtypes[0] if dtypes else torch.float32)
    for row, column, blocks, scale in found:
        for kind, tensor in enumerate(blocks):
            kept.append(_block(tensor, dtype))
            addresses[kind, row, column] = kept[-1].data_ptr()
        rank[row, column], scaling[row, column] = blocks[0].shape[0], scale
    device = kept[0].device if kept else routing.ids.device
    largest = int(rank.max()) if rank.numel() else 0
    rows = {layer.routed_as: row for row, layer in enumerate(routing.layers)}
    a_address, b_address, bias_address = addresses.to(device).unbind(0)
    numbers = rank.to(device), scaling.to(device)
    return ModelTables(a_address, b_address, bias_address, *numbers, largest, dtype, kept, rows)


def _factors_of(
    routing: Routing, watch: Any
) -> list[tuple[int, int, list[torch.Tensor], float]] | None:
    """Returns row, column, blocks and scaling of every adapter on every layer.

    None where a factor is not a bare tensor.
    """
    found = []
    for row, layer in enumerate(routing.layers):
        if not hasattr(layer, "lora_A"):
            continue
        watch.add(layer, routing.names)
        for column, name in enumerate(routing.names):
            if name not in layer.lora_A:
                continue
            lora_a, up = plain_weight(layer.lora_A[name]), layer.lora_B[name]
            lora_b = plain_weight(up)
            if lora_a is None or lora_b is None:
                return None
            blocks = [lora_a, lora_b.t()] + ([] if up.bias is None else [up.bias])
            found.append((row, column, blocks, float(layer.scaling[name])))
    return found


def _block(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor as kernels read it: contiguous, in ``dtype``, at a multiple of 16 bytes."""
    block = tensor.detach().to(dtype).contiguous()
    return block.clone() if block.data_ptr() % 16 else block


def linear(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    kernels: KernelRouting,
    number: int,
    plan: str = "auto",
) -> torch.Tensor:
    """Returns ``[..., N]`` of a plain linear base layer with every row's own adapter.

    Args:
        layer: Runs its base layer where the tables do not know it.
        x: ``[..., K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        routing: The batch's.
        kernels: The same for kernels.
        number: The layer's number in its model.
        plan: As in `fastlora.functional.lora_linear`.
    """
    flat, tables = x.reshape(-1, x.shape[-1]), kernels.tables
    row = row_of(layer, number, tables)
    if row is None:
        refuse_in_mode(layer, "it was adapted after the block began")
        return F.linear(x, weight, bias)
    groups = kernels.groups(flat.shape[0], x.device)
    rows, s = _shared_shrink(layer, row, x, flat, routing, kernels, number, plan)
    y = torch.ops.fastlora.mixed_lora_linear(
        flat,
        weight,
        bias,
        groups.order,
        groups.segment_of,
        groups.segment_slot,
        mixed_ops.pieces_of(groups, plan == "invariant"),
        s,
        tables.a_address[rows],
        tables.b_address[rows],
        tables.bias_address[rows],
        tables.rank[rows],
        tables.scaling[rows],
        row - rows.start,
        kernels.max_rank,
        kernels.dtype,
        plan,
    )
    return y.view(*x.shape[:-1], weight.shape[0])


def add_(
    layer: Any, y: torch.Tensor, x: torch.Tensor, kernels: KernelRouting, number: int
) -> torch.Tensor:
    """Adds every row's own adapter to ``y [M, N]`` in place, for ``x [..., K]``."""
    flat, tables = x.reshape(-1, x.shape[-1]), kernels.tables
    row = row_of(layer, number, tables)
    if row is None:
        return y
    groups, rows = kernels.groups(flat.shape[0], x.device), slice(row, row + 1)
    torch.ops.fastlora.mixed_lora_add_(
        y,
        flat,
        groups.order,
        groups.segment_of,
        groups.segment_slot,
        mixed_ops.pieces_of(groups),
        tables.a_address[rows],
        tables.b_address[rows],
        tables.bias_address[rows],
        tables.rank[rows],
        tables.scaling[rows],
        0,
        kernels.max_rank,
        kernels.dtype,
    )
    return y


def _shared_shrink(
    layer: Any,
    row: int,
    x: torch.Tensor,
    flat: torch.Tensor,
    routing: Routing,
    kernels: KernelRouting,
    number: int,
    plan: str,
) -> tuple[slice, torch.Tensor | None]:
    """Returns the siblings' rows in the tables and their s, or the layer's own row and None.

    One launch serves the siblings whose rows are neighbours. A compiled graph must not see what
    one call leaves for another, so each layer makes its own there.
    """
    alone = slice(row, row + 1)
    # Nor can a layer trust an inference tensor, whose writes are not counted.
    if torch.compiler.is_compiling() or x.is_inference():
        return alone, None
    siblings = routing.group.siblings
    members = {}
    for member in siblings.of(layer, number, x) or ():
        other = siblings.layers[member]()
        place = None if other is None else row_of(other, member, kernels.tables)
        if place is not None:
            members[place] = member
    first, stop = alone.start, alone.stop
    while first - 1 in members:
        first -= 1
    while stop in members:
        stop += 1
    rows = slice(first, stop)
    if stop - first < 2:
        return alone, None
    groups, invariant = kernels.groups(flat.shape[0], x.device), plan == "invariant"
    key = (groups, kernels, invariant)
    s = shared(x, number, key)
    if s is None:
        s = torch.ops.fastlora.mixed_lora_shrink(
            flat,
            groups.order,
            groups.segment_of,
            groups.segment_slot,
            mixed_ops.pieces_of(groups, invariant),
            kernels.tables.a_address[rows],
            kernels.tables.rank[rows],
            kernels.max_rank,
            kernels.dtype,
            invariant,
        )
        numbers = tuple(members[row] for row in range(first, stop))
        share(x, number, numbers, key, s)
    return rows, s
