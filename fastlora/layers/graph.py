"""A mixed batch in a graph that is being compiled: from a layer to one operator.

Nothing that depends on the mix is read here but as a tensor, so that no mix compiles anything. What
graphs cannot do is left to the forward that runs without them, where a full graph breaks: hooked
factors, the batch-invariant mode, gradients through a pool.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastlora.autograd.linear import records_gradients
from fastlora.layers import graph_ops  # noqa: F401 - registers operators
from fastlora.layers.call import MixedCall
from fastlora.layers.dora import dora_rows, scale_pool_rows_
from fastlora.layers.factors import scalings_beside
from fastlora.layers.graph_slots import slots_of
from fastlora.layers.group_forward import group_forward
from fastlora.layers.places import output_at, place_of
from fastlora.layers.why import TOO_LATE
from fastlora.ops.factors import Base, Tables


def run_in_graph(call: MixedCall, base: Base) -> torch.Tensor | None:
    """Returns ``[..., N]`` of a mixed batch in a graph; None where it cannot be in one."""
    layer, batch, x = call.layer, call.routing.whole, call.x
    if batch is None or (base.y is not None and base.y.dtype != x.dtype):
        return None
    call = call._replace(routing=batch)
    if batch.source.tables is not None:
        return _of_pool(call, base, batch.source.tables)
    found = slots_of(call, layer)
    if found is None:
        return None
    slots, impl, dora = found
    tensors: list[torch.Tensor | None] = []
    scalings: list[Any] = []
    dropout_p: list[float] = []
    for factors in slots:
        tensors += (None,) * 3 if factors is None else (*factors[:2], factors.lora_bias)
        scalings.append(0.0 if factors is None else factors.scaling)
        dropout_p.append(0.0 if factors is None else factors.dropout_p)
    if slots.count(None) == len(slots):  # theirs is DoRA's, which drops
        return dora_rows(call, base.output(x), dora)
    shared = group_forward(call, base, slots) if impl == "triton" else None
    s, scaling = None if shared is None else shared.s, scalings_beside(scalings, x)
    made = torch.ops.fastlora.lora_mixed(
        *(x, *base[:3], tensors, scaling, batch.ids, batch.seeds, dropout_p),
        *(layer.routed_as if any(dropout_p) else 0, impl, s),
    )
    return dora_rows(call, made, dora)


def _of_pool(call: MixedCall, base: Base, found: Tables) -> torch.Tensor | None:
    """`run_in_graph` over a pool: without gradients, in what its tables hold."""
    x, impl, (weight, bias, y, _) = call.x, call.conditions.impl, base
    if records_gradients(x, weight, bias, y) or x.dtype == torch.float64:
        return None
    if call.conditions.invariant:
        return None
    if impl != "triton" and x.device.type != "cpu":
        return None  # tables have addresses, and PyTorch reads those of a CPU
    if weight is not None:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if impl != "triton":
            y, weight = F.linear(x, weight, bias), None
    elif y is not None:
        y = y.clone(memory_format=torch.contiguous_format)
    base, place = Base(weight, bias, y, True), place_of(call, found, call.rows(), impl=impl)
    if place is None:
        call.conditions.refuse(call.layer, TOO_LATE)
        return scale_pool_rows_(call, base.output(x))
    made = output_at(call, base, place, impl)
    made = made if x.dim() == 2 else made.view(*x.shape[:-1], made.shape[1])
    return scale_pool_rows_(call, made)
