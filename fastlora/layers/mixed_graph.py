"""A mixed batch in a graph that is being compiled: from a layer to one operator.

Nothing that depends on the mix is read here but as a tensor, so that no mix compiles anything. What
graphs cannot do is left to the forward that runs without them, where a full graph breaks: hooked
factors, the batch-invariant mode, gradients through a pool.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastlora import functional
from fastlora.autograd import mixed_graph_ops  # noqa: F401 - registers operators
from fastlora.layers.dora_rows import rows_in_graph, scale_pool_rows_
from fastlora.layers.mixed_graph_siblings import shared_shrink
from fastlora.layers.mixed_graph_slots import slots_of
from fastlora.ops import schema as ops
from fastlora.ops.invariant import is_batch_invariant
from fastlora.ops.rows import sort_rows
from fastlora.ops.triton.pieces import rows_at
from fastlora.routing.routing import Routing


def linear(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    projection: int,
) -> torch.Tensor | None:
    """`mixed_forward` in a graph; None where it cannot be in one."""
    given, x = x, x.to(functional.autocast_dtype(x) or x.dtype)
    batch = routing.whole
    if batch is None:
        return None
    if batch.source.tables is not None:
        if not _serves(layer, x, weight, bias):
            return None
        if ops.resolve_impl(layer.impl, x) == "triton":
            return _pool_kernels(layer, x, weight, bias, batch)
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return _pool_add_(layer, y, x, batch)
    slots = slots_of(layer, x, batch)
    if slots is None:
        return None
    s = shared_shrink(layer, given, x, batch, slots)
    arguments = slots.arguments(batch, projection)
    y = torch.ops.fastlora.mixed_lora_graph_linear(x, weight, bias, *arguments, s)
    return rows_in_graph(layer, y, x, batch, slots.dora, projection)


def add(
    layer: Any, y: torch.Tensor, x: torch.Tensor, routing: Routing, projection: int
) -> torch.Tensor | None:
    """`mixed_added_forward` in a graph; None where it cannot be in one."""
    given, x = x, x.to(functional.autocast_dtype(x) or x.dtype)
    batch = routing.whole
    if batch is None:
        return None
    if batch.source.tables is not None:
        runs = x.dtype == y.dtype and _serves(layer, x, y)
        copied = y.clone(memory_format=torch.contiguous_format)
        return _pool_add_(layer, copied, x, batch) if runs else None
    slots = slots_of(layer, x, batch) if x.dtype == y.dtype else None
    if slots is None:
        return None
    s = shared_shrink(layer, given, x, batch, slots)
    arguments = slots.arguments(batch, projection)
    y = torch.ops.fastlora.mixed_lora_graph_add(y, x, *arguments, s)
    return rows_in_graph(layer, y, x, batch, slots.dora, projection)


def _serves(layer: Any, *tensors: torch.Tensor | None) -> bool:
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
    layer: Any,
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


def _pool_add_(layer: Any, y: torch.Tensor, x: torch.Tensor, batch: Routing) -> torch.Tensor:
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
