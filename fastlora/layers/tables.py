"""Where the factors of a mixed batch lie, as Triton kernels find them: by address."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

import torch

from fastlora.layers.factors import factors_of
from fastlora.ops.factors import Factors, Tables
from fastlora.routing.in_force import is_captured
from fastlora.routing.routing import Routing
from fastlora.routing.watch import Watch

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer


def row_of(layer: AdaptedLayer, number: int, tables: Tables) -> int | None:
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
            watch.add(layer, layer.scaling, routing.names)
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
