"""Address tables, from which Triton kernels read the addresses of a mixed batch's factors."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

import torch

from fastlora.layers.adapter_factors import factors_without_calling_modules
from fastlora.ops.factors import AddressTables, Factors
from fastlora.routing.active import is_capturing_cuda_graph
from fastlora.routing.adapter_changes import AdapterChangeDetector
from fastlora.routing.routing import Routing

if TYPE_CHECKING:
    from fastlora.layers.linear_with_adapters import BaseLinearWithAdapters


def table_row_of(
    layer: BaseLinearWithAdapters, layer_index: int, tables: AddressTables
) -> int | None:
    """Return a layer's row in the address tables.

    Returns None if the tables were built without the layer. ``layer_index`` is the layer's number
    in its model. In a pool's tables, the row is the layer's ``table_row``.
    """
    if tables.rows is not None:
        return tables.rows.get(layer_index)
    return layer.table_row


def get_or_build_address_tables(routing: Routing, x: torch.Tensor) -> AddressTables | None:
    """Return the address tables for a batch, building them if necessary.

    A pool provides its own tables. For a model's own adapters, the tables are built unless they are
    already cached. Returns None if tables cannot be built, because the modules of an adapter must
    be called, or because factors are on several devices.
    """
    if routing.source.tables is not None:
        return routing.source.tables
    # The key has the number of layers: a later block also finds layers that were added since.
    sets = routing.cached_adapter_set(("tables", len(routing.layers), *routing.names))
    if sets.tables is None:
        sets.tables = _build_model_tables(routing, sets.snapshot)
    if sets.tables is False:
        return None
    if is_capturing_cuda_graph(x):
        routing.group.packs.keep_cuda_graph_references(sets)
    return sets.tables


def _build_model_tables(
    routing: Routing, detector: AdapterChangeDetector | None
) -> AddressTables | Literal[False]:
    """Build the address tables of a model.

    The tables contain the addresses of a batch's adapters on all layers. The result is False if the
    tables cannot be built, because the modules of an adapter must be called or because factors are
    on several devices. Kernels read lora_a in place if its dtype and layout allow it. lora_b is
    copied once, because kernels read it transposed, as rank rows.
    """
    found = _collect_factors(routing, detector)
    blocks = [] if found is None else [(f.lora_a, f.lora_b, f.lora_bias) for _, _, f in found]
    tensors = [tensor for own in blocks for tensor in own if tensor is not None]
    if found is None or len({tensor.device for tensor in tensors}) > 1:
        return False
    shape = (len(routing.layers), len(routing.names))
    addresses = torch.zeros(3, *shape, dtype=torch.int64, device="cpu")
    rank = torch.zeros(shape, dtype=torch.int32, device="cpu")
    scaling = torch.zeros(shape, dtype=torch.float32, device="cpu")
    held: list[torch.Tensor] = []
    # The widest dtype represents every adapter's factors exactly, whatever else is in the batch.
    dtypes = [tensor.dtype for tensor in tensors]
    if dtypes:
        dtype, largest = functools.reduce(torch.promote_types, dtypes), 0
    else:
        dtype, largest = _dtype_and_rank_of_empty_tables(routing)
    for row, column, factors in found:
        for kind, tensor in enumerate((factors.lora_a, factors.lora_b.t(), factors.lora_bias)):
            if tensor is not None:
                held.append(_align_for_kernels(tensor, dtype))
                addresses[kind, row, column] = held[-1].data_ptr()
        rank[row, column] = factors.lora_a.shape[0]
        largest = max(largest, factors.lora_a.shape[0])
        scaling[row, column] = float(factors.scaling)
    device = held[0].device if held else routing.ids.device
    rows = {layer.routing_index: row for row, layer in enumerate(routing.layers)}
    a, b, bias = addresses.to(device).unbind(0)
    numbers = rank.to(device), scaling.to(device), largest
    return AddressTables(a, b, bias, *numbers, dtype, rows=rows, keepalive=tuple(held))


def _dtype_and_rank_of_empty_tables(routing: Routing) -> tuple[torch.dtype, int]:
    """Return the dtype and LoRA rank to use for address tables that contain no factors.

    The tables are empty if no adapter of the batch has factors on any linear layer. The dtype and
    the rank are then those of one of the model's adapters. If the adapter's rank differs between
    layers, the largest rank is used. The batch therefore launches the same kernels as a batch with
    this adapter, and `warm_up` compiles these kernels. The kernels read no factors from empty
    tables.
    """
    layers = [layer for layer in routing.layers if getattr(layer, "is_linear", False)]
    name = next((name for layer in layers for name in layer.lora_A), None)
    weights = [layer.lora_A[name].weight for layer in layers if name in layer.lora_A]
    dtype = weights[0].dtype if weights else torch.float32
    return dtype, max((len(weight) for weight in weights), default=0)


def _collect_factors(
    routing: Routing, detector: AdapterChangeDetector | None
) -> list[tuple[int, int, Factors]] | None:
    """Collect the factors of a batch's adapters for the address tables.

    The result is a list of tuples (row, column, factors), one for each adapter on each linear layer
    that the adapter adapts. The row is the layer's row in the tables, and the column is the
    adapter's slot. The result is None if the modules of an adapter must be called, for example
    because they have hooks. Kernels do not call modules, so the tables cannot be built in this
    case.
    """
    found = []
    for row, layer in enumerate(routing.layers):
        if not getattr(layer, "is_linear", False):
            continue
        if detector is not None:
            detector.record_adapters(layer, layer.scaling, routing.names)
        for column, name in enumerate(routing.names):
            if name not in layer.lora_A:
                continue
            factors = factors_without_calling_modules(layer, name, with_dropout=False)
            if factors is None:
                return None
            found.append((row, column, factors))
    return found


def _align_for_kernels(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor aligned for the kernels, copying it only if necessary.

    The result has the given dtype, is contiguous, and is aligned to 16 bytes.
    """
    block = tensor.detach().to(dtype).contiguous()
    return block.clone() if block.data_ptr() % 16 else block
