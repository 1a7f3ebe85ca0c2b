"""A mixed batch in a graph that is being compiled: from a layer to one operator.

Nothing that depends on the mix is read here but as a tensor, so that no mix compiles anything. What
graphs cannot do is left to the forward that runs without them, where a full graph breaks: DoRA in a
pool, hooked factors, the batch-invariant mode, gradients through a pool.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastlora import functional, mixed_graph_ops, mixed_ops, ops
from fastlora.batch_invariant import is_batch_invariant
from fastlora.graph_routing import GraphRouting, PoolGraphRouting
from fastlora.layers import mixed_graph_dora
from fastlora.layers.branch import factors_of, scaling_of
from fastlora.layers.mixed_graph_dora import DoraSlots
from fastlora.routing import Routing

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_APART = "in a mixed batch each layer of a compiled model has its own pass over x"


class _Arguments(NamedTuple):
    """What the operators take of a layer."""

    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    lora_bias: list[torch.Tensor | None]
    scaling: torch.Tensor
    ids: torch.Tensor
    seeds: torch.Tensor
    dropout_p: list[float]
    projection: int
    impl: str


def linear(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    projection: int,
) -> torch.Tensor | None:
    """`mixed_forward` in a graph; None where it cannot be in one."""
    x = x.to(functional.autocast_dtype(x) or x.dtype)
    if isinstance(routing.graph, PoolGraphRouting):
        if not _serves(layer, x, weight, bias):
            return None
        if ops.resolve_impl(layer.impl, x) == "triton":
            return _pool_kernels(layer, x, weight, bias, routing.graph)
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return _pool_add_(layer, y, x, routing.graph)
    batch, found = routing.graph, _arguments(layer, x, routing, projection)
    if batch is None or found is None:
        return None
    arguments, dora = found
    y = torch.ops.fastlora.mixed_lora_graph_linear(x, weight, bias, *arguments)
    return _with_dora(layer, y, x, batch, projection, dora)


def add(
    layer: Any, y: torch.Tensor, x: torch.Tensor, routing: Routing, projection: int
) -> torch.Tensor | None:
    """`mixed_added_forward` in a graph; None where it cannot be in one."""
    x = x.to(functional.autocast_dtype(x) or x.dtype)
    if isinstance(routing.graph, PoolGraphRouting):
        runs = x.dtype == y.dtype and _serves(layer, x, y)
        copied = y.clone(memory_format=torch.contiguous_format)
        return _pool_add_(layer, copied, x, routing.graph) if runs else None
    batch = routing.graph
    found = None if x.dtype != y.dtype else _arguments(layer, x, routing, projection)
    if batch is None or found is None:
        return None
    arguments, dora = found
    y = torch.ops.fastlora.mixed_lora_graph_add(y, x, *arguments)
    return _with_dora(layer, y, x, batch, projection, dora)


def _with_dora(
    layer: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    batch: GraphRouting,
    projection: int,
    slots: DoraSlots,
) -> torch.Tensor:
    y = mixed_graph_dora.add_dropped(layer, y, x, batch, projection, slots.dropped)
    return mixed_graph_dora.scale_rows(layer, y, batch, slots.scaled)


def _arguments(
    layer: Any, x: torch.Tensor, routing: Routing, projection: int
) -> tuple[_Arguments, DoraSlots] | None:
    """Returns what the operators take, slots left out whose dropout `DoraSlots` is to do."""
    batch = routing.graph
    if torch.is_grad_enabled() and isinstance(batch, GraphRouting):
        layer.note_compiled(_APART)
    if not isinstance(batch, GraphRouting) or layer.merged_adapters or is_batch_invariant():
        return None
    names = [name for name in batch.names if name in layer.lora_A]
    found = [factors_of(layer, name) for name in names]
    if not names or None in found or any(f[0].device != x.device for f in found if f is not None):
        return None
    tensors = [t for f in found if f is not None for t in f[:3] if t is not None]
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
    impl = getattr(layer, "impl", "auto")
    impl = ops.resolve_impl(impl, x) if dtype in _KERNEL_DTYPES or impl == "triton" else "eager"
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    none_a = x.new_empty(0, layer.in_features, dtype=dtype)
    none_b = x.new_empty(layer.out_features, 0, dtype=dtype)
    zero = torch.zeros((), dtype=exact, device=x.device)
    lora_a, lora_b, lora_bias, scalings, dropout_p = [], [], [], [], []
    own = dict(zip(names, found, strict=True))
    dora = mixed_graph_dora.dora_slots(layer, batch)
    for slot, name in enumerate(batch.names):
        factors = None if slot in dora.dropped else own.get(name)
        if factors is None:
            factors = (none_a, none_b, None, 0.0)
            scaling = zero
        else:
            scaling = torch.as_tensor(scaling_of(layer, name), dtype=exact, device=x.device)
        lora_a.append(factors[0].to(dtype))
        lora_b.append(factors[1].to(dtype))
        lora_bias.append(None if factors[2] is None else factors[2].to(dtype))
        scalings.append(scaling.reshape(()))
        dropout_p.append(factors[3])
    arguments = _Arguments(
        lora_a,
        lora_b,
        lora_bias,
        torch.stack(scalings),
        batch.ids,
        batch.seeds,
        dropout_p,
        projection if any(dropout_p) else 0,
        impl,
    )
    return arguments, dora


def _serves(layer: Any, *tensors: torch.Tensor | None) -> bool:
    """Whether a pool's adapters can run in a graph: without gradients, in what its tables hold."""
    wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    x = tensors[0]
    if wants or x is None or x.dtype == torch.float64 or is_batch_invariant():
        return False
    # Tables have addresses: PyTorch reads those of a CPU.
    return x.device.type == "cpu" or ops.resolve_impl(layer.impl, x) == "triton"


def _pool_kernels(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    batch: PoolGraphRouting,
) -> torch.Tensor:
    flat, tables = x.reshape(-1, x.shape[-1]), batch.tables
    groups = mixed_graph_ops.groups_in_graph(batch.columns, flat, tables.rank.shape[1])
    y = torch.ops.fastlora.mixed_lora_linear(
        flat,
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        groups.order,
        groups.segment_of,
        groups.segment_slot,
        mixed_ops.pieces_of(groups),
        None,
        tables.a_address,
        tables.b_address,
        tables.bias_address,
        tables.rank,
        tables.scaling,
        layer.table_row,
        batch.max_rank,
        batch.dtype,
        "auto",
    )
    return y.view(*x.shape[:-1], weight.shape[0])


def _pool_add_(
    layer: Any, y: torch.Tensor, x: torch.Tensor, batch: PoolGraphRouting
) -> torch.Tensor:
    """Adds to ``y [..., N]``, which is contiguous, in place."""
    flat, rows, tables = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), batch.tables
    numbers = tables.rank, tables.scaling, layer.table_row
    addresses = tables.a_address, tables.b_address, tables.bias_address
    if ops.resolve_impl(layer.impl, x) == "triton":
        groups = mixed_graph_ops.groups_in_graph(batch.columns, rows, tables.rank.shape[1])
        torch.ops.fastlora.mixed_lora_add_(
            flat,
            rows,
            groups.order,
            groups.segment_of,
            groups.segment_slot,
            mixed_ops.pieces_of(groups),
            *addresses,
            *numbers,
            batch.max_rank,
            batch.dtype,
        )
    else:
        torch.ops.fastlora.mixed_lora_pool_add_(
            flat, rows, batch.columns, *addresses, *numbers, batch.dtype
        )
    return y
