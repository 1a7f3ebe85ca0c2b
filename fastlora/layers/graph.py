"""A mixed batch in a graph that is being compiled: from a layer to one operator.

Nothing that depends on the mix is read here but as a tensor, so that no mix compiles anything. What
graphs cannot do is left to the forward that runs without them, where a full graph breaks: hooked
factors, the batch-invariant mode, gradients through a pool.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlora.autograd import in_graph  # noqa: F401 - registers operators
from fastlora.autograd.linear import records_gradients
from fastlora.functional import autocast_dtype
from fastlora.layers import tables
from fastlora.layers.dora_rows import dora_rows, scale_pool_rows_
from fastlora.layers.graph_slots import slots_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.layers.sharing import shared_shrink
from fastlora.ops.backend import resolve_impl
from fastlora.ops.factors import Base, Tables
from fastlora.ops.invariant import is_batch_invariant
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
        return _of_pool(layer, x, base, batch, batch.source.tables)
    slots = slots_of(layer, x, batch)
    if slots is None:
        return None
    shrunk = shared_shrink(layer, given, slots.own, batch)
    s = None if shrunk is None else shrunk.s
    made = torch.ops.fastlora.lora_mixed(x, weight, bias, y, *slots.arguments(batch, number), s)
    return dora_rows(layer, made, x, batch, slots.dora, number)


def _of_pool(
    layer: AdapterLayer, x: torch.Tensor, base: Base, batch: Routing, found: Tables
) -> torch.Tensor | None:
    """`run_in_graph` over a pool: without gradients, in what its tables hold."""
    if records_gradients(x, *base[:3]) or x.dtype == torch.float64 or is_batch_invariant():
        return None
    impl, (weight, bias, y, _) = resolve_impl(layer.impl, x), base
    if impl != "triton" and x.device.type != "cpu":
        return None  # tables have addresses, and PyTorch reads those of a CPU
    if weight is not None:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if impl != "triton":
            y, weight = F.linear(x, weight, bias), None
    elif y is not None:
        y = y.clone(memory_format=torch.contiguous_format)
    y = tables.run(layer, x, Base(weight, bias, y, True), batch, found, 0, "auto", impl)
    return scale_pool_rows_(layer, y, batch)
