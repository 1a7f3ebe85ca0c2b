"""A mixed batch in a graph that is being compiled: from a layer to one operator.

Nothing that depends on the mix is read here but as a tensor, so that no mix compiles anything. What
graphs cannot do is left to the forward that runs without them, where a full graph breaks: hooked
factors, the batch-invariant mode, gradients through a pool.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlora.autograd.linear import records_gradients
from fastlora.layers import (
    graph_ops,  # noqa: F401 - registers operators
    tables,
)
from fastlora.layers.call import MixedCall
from fastlora.layers.dora_rows import dora_rows, scale_pool_rows_
from fastlora.layers.graph_slots import slots_of
from fastlora.layers.sharing import shared_shrink
from fastlora.ops.backend import resolve_impl
from fastlora.ops.factors import Base, Tables
from fastlora.ops.invariant import is_batch_invariant


def run_in_graph(call: MixedCall) -> torch.Tensor | None:
    """Returns ``[..., N]`` of a mixed batch in a graph; None where it cannot be in one."""
    layer, batch, x, base = call.layer, call.routing.whole, call.x, call.base
    if batch is None or (base.y is not None and base.y.dtype != x.dtype):
        return None
    call = call._replace(routing=batch)
    if batch.source.tables is not None:
        return _of_pool(call, batch.source.tables)
    slots = slots_of(layer, x, batch)
    if slots is None:
        return None
    shrunk = shared_shrink(layer, call.given, slots.own, batch)
    s = None if shrunk is None else shrunk.s
    made = torch.ops.fastlora.lora_mixed(x, *base[:3], *slots.arguments(batch, call.number), s)
    return dora_rows(call, made, slots.dora)


def _of_pool(call: MixedCall, found: Tables) -> torch.Tensor | None:
    """`run_in_graph` over a pool: without gradients, in what its tables hold."""
    x, (weight, bias, y, _) = call.x, call.base
    if records_gradients(x, weight, bias, y) or x.dtype == torch.float64 or is_batch_invariant():
        return None
    impl = resolve_impl(call.layer.impl, x)
    if impl != "triton" and x.device.type != "cpu":
        return None  # tables have addresses, and PyTorch reads those of a CPU
    if weight is not None:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if impl != "triton":
            y, weight = F.linear(x, weight, bias), None
    elif y is not None:
        y = y.clone(memory_format=torch.contiguous_format)
    call = call._replace(base=Base(weight, bias, y, True))
    return scale_pool_rows_(call, tables.run(call, found, "auto", impl))
