"""A mixed batch in a graph that is being compiled: from a layer to one operator.

Nothing that depends on the mix is read here but as a tensor, so that no mix compiles anything. What
graphs cannot do is left to the forward that runs without them, where a full graph breaks: hooked
factors, the batch-invariant mode, gradients through a pool.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastlora.autograd import in_graph  # noqa: F401 - registers operators
from fastlora.functional import autocast_dtype
from fastlora.layers.bases import Base
from fastlora.layers.dora_rows import rows_in_graph, scale_pool_rows_
from fastlora.layers.graph_slots import slots_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.layers.sharing import shared_shrink
from fastlora.ops import schema as ops
from fastlora.ops.invariant import is_batch_invariant
from fastlora.ops.rows import sort_rows
from fastlora.ops.triton.pieces import rows_at
from fastlora.routing.routing import Routing


def run_in_graph(
    layer: AdapterLayer, x: torch.Tensor, base: Base, routing: Routing, number: int
) -> torch.Tensor | None:
    """Returns ``[..., N]`` of a mixed batch in a graph; None where it cannot be in one."""
    given, x = x, x.to(autocast_dtype(x) or x.dtype)
    batch, (weight, bias, y, _) = routing.whole, base
    if batch is None or (y is not None and y.dtype != x.dtype):
        return None
    if batch.source.tables is not None:
        return _of_pool(layer, x, base, batch)
    slots = slots_of(layer, x, batch)
    if slots is None:
        return None
    shrunk = shared_shrink(layer, given, slots.own, batch)
    s = None if shrunk is None else shrunk.s
    made = torch.ops.fastlora.lora_mixed(x, weight, bias, y, *slots.arguments(batch, number), s)
    return rows_in_graph(layer, made, x, batch, slots.dora, number)


def _of_pool(
    layer: AdapterLayer, x: torch.Tensor, base: Base, batch: Routing
) -> torch.Tensor | None:
    """`run_in_graph` over a pool."""
    weight, bias, y, _ = base
    if not _serves(layer, x, weight, bias, y):
        return None
    if y is not None:
        return _pool_add_(layer, y.clone(memory_format=torch.contiguous_format), x, batch)
    if weight is None:
        return None
    if ops.resolve_impl(layer.impl, x) == "triton":
        return _pool_kernels(layer, x, weight, bias, batch)
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return _pool_add_(layer, y, x, batch)


def _serves(layer: AdapterLayer, *tensors: torch.Tensor | None) -> bool:
    """Whether a pool's adapters can run in a graph: without gradients, in what its tables hold."""
    wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    x = tensors[0]
    if wants or x is None or x.dtype == torch.float64 or is_batch_invariant():
        return False
    # Tables have addresses: PyTorch reads those of a CPU.
    return x.device.type == "cpu" or ops.resolve_impl(layer.impl, x) == "triton"


def _tables(batch: Routing) -> Any:
    return batch.source.tables


def _pool_kernels(
    layer: AdapterLayer,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    batch: Routing,
) -> torch.Tensor:
    flat, tables = x.reshape(-1, x.shape[-1]), _tables(batch)
    rows = sort_rows(batch.ids, flat.shape[0], tables.rank.shape[1], flat.device)
    y = torch.ops.fastlora.lora_linear_at(
        *(flat, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)),
        *(rows_at(rows), None, tables.tensors(), layer.table_row),
        *(tables.max_rank, tables.dtype, "auto"),
    )
    y = y.view(*x.shape[:-1], weight.shape[0])
    return scale_pool_rows_(layer, y, batch)


def _pool_add_(
    layer: AdapterLayer, y: torch.Tensor, x: torch.Tensor, batch: Routing
) -> torch.Tensor:
    """Adds to ``y [..., N]``, which is contiguous, in place, and scales DoRA's rows."""
    flat, flat_x, tables = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), _tables(batch)
    rows = sort_rows(batch.ids, flat.shape[0], tables.rank.shape[1], flat.device)
    impl, own, max_rank = ops.resolve_impl(layer.impl, x), rows.tensors(), 0
    if impl == "triton":
        # PyTorch reads neither: another largest rank, which a guard would see, compiles nothing.
        own, max_rank = rows_at(rows), tables.max_rank
    torch.ops.fastlora.lora_add_at_(
        flat, flat_x, own, tables.tensors(), layer.table_row, max_rank, tables.dtype, impl
    )
    return scale_pool_rows_(layer, y, batch)
