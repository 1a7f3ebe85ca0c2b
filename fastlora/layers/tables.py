"""A mixed batch on Triton kernels: from a layer's routing to the operators' tensors.

Everything that depends on the mix lies on the device. Layers fed by the same tensor, whose rows in
the tables are neighbours, share one shrink.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch

from fastlora.layers.call import MixedCall
from fastlora.layers.factors import Watch, factors_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.ops import schema  # noqa: F401 - registers operators
from fastlora.ops.factors import Factors, Tables
from fastlora.ops.invariant import refuse_in_mode
from fastlora.ops.triton.pieces import rows_at
from fastlora.routing.in_force import is_captured
from fastlora.routing.kept import Watcher
from fastlora.routing.routing import Routing
from fastlora.routing.siblings import keep_shares, siblings_of, take_share


def row_of(layer: AdapterLayer, number: int, tables: Tables) -> int | None:
    """Returns a layer's row in the tables, or None where they were made before the layer was.

    Args:
        layer: A pool's know their rows.
        number: The layer's number in its model.
        tables: The model's, or a pool's.
    """
    if tables.rows is not None:
        return tables.rows.get(number)
    return layer.table_row


def tables_of(routing: Routing, x: torch.Tensor) -> Tables | None:
    """Returns where a batch's factors lie, for x; None where a factor is not a bare tensor."""
    if routing.source.tables is not None:
        return routing.source.tables
    # Of so many layers: a later block finds those that the model has got since.
    sets = routing.set_of(("tables", len(routing.layers), *routing.names), Watch)
    if sets.tables is None:
        sets.tables = _model_tables(routing, sets.watch)
    if sets.tables is False:
        return None
    if is_captured(x):
        routing.group.packs.pin(sets)
    return sets.tables


def _model_tables(routing: Routing, watch: Watcher | None) -> Tables | Literal[False]:
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


def _factors_of(routing: Routing, watch: Watcher | None) -> list[tuple[int, int, Factors]] | None:
    """Returns row, column and factors of every adapter on every layer.

    None where a factor is not a bare tensor.
    """
    found = []
    for row, layer in enumerate(routing.layers):
        if not hasattr(layer, "lora_A"):
            continue
        if isinstance(watch, Watch):
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


def run(call: MixedCall, tables: Tables, plan: str, impl: str = "triton") -> torch.Tensor:
    """Returns ``[..., N]`` of a base layer with every row's own adapter.

    Args:
        call: Of a layer that runs its base layer alone where the tables do not know it.
        tables: Of `tables_of`.
        plan: As in `fastlora.functional.lora_linear`.
        impl: Name of the backend; other than kernels only for what the base layer made.
    """
    x, base = call.x, call.base
    row = row_of(call.layer, call.number, tables)
    if row is None:
        refuse_in_mode(call.layer, "it was adapted after the block began")
        return base.output(x)
    flat, rows, invariant = x.reshape(-1, x.shape[-1]), call.rows(), plan == "invariant"
    if base.weight is None:
        y, max_rank, own = base.rows_to_write(), 0, rows.tensors()
        if impl == "triton":
            # PyTorch reads neither; there another largest rank, which guards see, compiles nothing.
            max_rank, own = tables.max_rank, rows_at(rows)
        torch.ops.fastlora.lora_add_at_(
            y, flat, own, tables.tensors(), row, max_rank, tables.dtype, impl
        )
        return y.view(*x.shape[:-1], y.shape[1])
    numbers, siblings = _siblings(call, row, tables)
    context = (rows, tables, invariant)
    s = None if siblings is None else take_share(x, call.number, context, siblings)
    y, *made = torch.ops.fastlora.lora_linear_at(
        *(flat, base.weight, base.bias, rows_at(rows, invariant), s),
        *(tables.tensors(), row, tables.max_rank, tables.dtype, plan, siblings),
    )
    if made:
        keep_shares(x, context, dict.fromkeys(numbers, (siblings, made[0])))
    return y.view(*x.shape[:-1], base.weight.shape[0])


def _siblings(
    call: MixedCall, row: int, tables: Tables
) -> tuple[list[int], tuple[int, int] | None]:
    """Returns the numbers of siblings whose rows in the tables are neighbours, and these rows.

    One launch serves their shrink. A compiled graph must not see what one call leaves for another,
    so each layer makes its own there.
    """
    # Nor can a layer trust an inference tensor, whose writes are not counted.
    if torch.compiler.is_compiling() or call.x.is_inference():
        return [], None
    members = {}
    for member in siblings_of(call.layer, call.x):
        place = row_of(member, member.routed_as, tables)
        if place is not None:
            members[place] = member.routed_as
    first, stop = row, row + 1
    while first - 1 in members:
        first -= 1
    while stop in members:
        stop += 1
    if stop - first < 2:
        return [], None
    return [members[other] for other in range(first, stop) if other != row], (first, stop)
