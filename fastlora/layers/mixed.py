"""The forward pass of one layer in a mixed batch, where each row has its own adapter or none.

`fastlora.layers.decide` chooses the implementation: kernels that find factors by address
(`fastlora.layers.places`), PyTorch with packed factors (`fastlora.layers.packs`), or
`fastlora.autograd.linear` with the adapters as lists. In a graph that is being compiled, everything
that depends on the batch's adapters is read from tensors only. Another mix of adapters therefore
does not cause recompilation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

import fastlora.autograd.mixed  # noqa: F401  # registers an operator
from fastlora.autograd import linear
from fastlora.layers import dora as dora_layer
from fastlora.layers import packs
from fastlora.layers.absent import with_absent
from fastlora.layers.call import MixedCall
from fastlora.layers.decide import check_devices, decide, slots_in_graph
from fastlora.layers.factors import dtype_of, scalings_beside, slots_of
from fastlora.layers.group_forward import group_forward
from fastlora.layers.places import linear_at, output_at, place_of
from fastlora.layers.why import TOO_LATE
from fastlora.ops.conditions import KERNEL_DTYPES
from fastlora.ops.factors import Base, Operands, Slots, Tables, present
from fastlora.ops.rows import Rows
from fastlora.validation import check_dropout_dtype

# Stands for the `Factors` of an adapter that does not adapt the layer.
_NO_FACTORS: Any = None, None, 0.0, None, 0.0, None


def run(call: MixedCall, base: Base) -> torch.Tensor:
    """Return a layer's output ``[..., N]`` for a mixed batch.

    For rows of adapters that the layer lacks, the output is that of the base layer.
    """
    layer, routing = call.layer, call.routing
    if call.conditions.compiling:
        made = _in_graph(call, base)
        if made is not None:
            return made
    magnitudes, dora = layer._modules.get("lora_magnitude_vector"), None
    if (magnitudes is not None and magnitudes._modules) or routing.source.residents is not None:
        dora = dora_layer.dora_slots(layer, routing)
    known = routing.kept.layers.get(("packs", layer.routed_as))
    if known is not None and known[0] == packs.key_of(call, base):
        y, by_address = packs.run_kept(call, base, *known[1]), False
    else:
        y, by_address = _by_rows(call, base, () if dora is None else dora.dropped)
    if dora is None:
        return y
    if by_address and routing.source.residents is not None:
        return dora_layer.scale_pool_rows_(call, y)
    return dora_layer.dora_rows(call, y, dora)


def _by_rows(call: MixedCall, base: Base, without: tuple[int, ...]) -> tuple[torch.Tensor, bool]:
    """Return a tuple (output of `run` before DoRA, whether kernels found factors by address).

    Rows of the slots in ``without`` get the base layer's output.
    """
    layer, x, routing = call.layer, call.x, call.routing
    is_bare, found, slots = decide(call, base, without)
    if found is not None:
        return _by_address(call, base, found), True
    if slots is not None:
        shared = group_forward(call, base, slots)
        y = _run_listed(call, base, slots, call.rows(), s=None if shared is None else shared.s)
    else:
        rows = routing.rows(x.numel() // x.shape[-1], x.device, host=True)
        if is_bare:
            kept = packs.find(call, base, rows)
            if kept is not None:
                return packs.run_kept(call, base, *kept), False
        own = slots_of(routing.source, layer, rows.present, without)
        check_devices(own, x)
        y = _run_listed(call, base, own, rows, rows.present)
    if routing.absent_gradients and torch.is_grad_enabled():
        y = with_absent(call, y, waits=slots is None)
    return y, False


def _by_address(call: MixedCall, base: Base, tables: Tables) -> torch.Tensor:
    """Return the output ``[..., N]``, computed with factors found by address in ``tables``.

    If the tables have no row for the layer, the result is the base layer's output.
    """
    x, conditions = call.x, call.conditions
    place = place_of(call, tables, call.rows(), conditions.invariant, conditions.backend)
    if place is None:
        conditions.refuse(call.layer, TOO_LATE)
        return base.output(x)
    shared = None if base.weight is None else group_forward(call, base, place)
    if shared is None:
        y = output_at(call, base, place, conditions.backend)
    elif shared.y is None:
        y = linear_at(call, base, place, shared.s)[0]
    else:
        y = shared.y
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _run_listed(
    call: MixedCall,
    base: Base,
    slots: Slots,
    rows: Rows,
    which: tuple[int, ...] | None = None,
    s: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output ``[..., N]``, computed with the factors in lists.

    `fastlora.autograd.linear.run` computes the output. If PyTorch operators run, ``slots`` lists
    the factors of the slots in ``which``. If kernels run, it lists the factors of all slots, and
    ``s`` is given if another layer of the shared-input group has computed it.
    """
    x, impl = call.x, "triton" if which is None else "eager"
    lora_a: list[Any] = []
    lora_b: list[Any] = []
    lora_bias: list[torch.Tensor | None] = []
    scalings: list[Any] = []
    dropout_p: list[float] = []
    # One loop collects everything, because this code runs in every step.
    for factors in slots:
        down, up, scaling, bias, p, _ = _NO_FACTORS if factors is None else factors
        lora_a.append(down)
        lora_b.append(up)
        lora_bias.append(bias)
        scalings.append(scaling)
        dropout_p.append(p)
    missing = slots.count(None)
    if missing == len(slots):
        return _base_rows(x, base, impl)
    if missing:
        lora_a, lora_b = present(lora_a, 0), present(lora_b, 1)
    seeds = None
    if any(dropout_p):
        check_dropout_dtype(x.dtype)
        device = x.device if impl == "triton" else torch.device("cpu")
        seeds = call.routing.seeds_of(call.layer.routed_as, device)
        seeds = call.layer._own_seed(seeds if which is None else seeds[list(which)])
    scaling, drop = scalings_beside(scalings, x), (tuple(dropout_p), seeds)
    own = Operands(lora_a, lora_b, lora_bias, scaling, *drop, which)
    return linear.run(x, base, own, impl, rows=rows, s=s)


def _base_rows(x: torch.Tensor, base: Base, impl: str) -> torch.Tensor:
    """Return the output ``[..., N]`` if no slot has an adapter on the layer."""
    weight, bias, y, _ = base
    if weight is None:
        return base.output(x)
    if impl != "eager":
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    # An adapter of rank 0 lets the backend compute the base product and its gradients.
    (n, k), zero = weight.shape, scalings_beside((0.0,), x).reshape(())
    operands = Operands([x.new_empty(0, k)], [x.new_empty(n, 0)], [None], zero, (0.0,))
    return linear.run(x, base, operands, impl)


# ------------------------------------------------------------------------- in a compiled graph


def _in_graph(call: MixedCall, base: Base) -> torch.Tensor | None:
    """Return the output of `run` in a graph that is being compiled, or None if unsupported.

    Graphs do not support factors with hooks, the batch-invariant mode, or gradients through a pool.
    In these cases the forward pass runs outside the graph, which fails with ``fullgraph=True``.
    """
    layer, batch, x = call.layer, call.routing.whole, call.x
    if batch is None or (base.y is not None and base.y.dtype != x.dtype):
        return None
    call = replace(call, routing=batch)
    if batch.source.tables is not None:
        return _of_pool_in_graph(call, base, batch.source.tables)
    dora = dora_layer.dora_slots(layer, batch) or dora_layer.DoraSlots()
    slots = slots_in_graph(call, layer, dora.dropped)
    if slots is None:
        return None
    # At most DoRA adapters with dropout remain.
    if slots.count(None) == len(slots):
        return dora_layer.dora_rows(call, base.output(x), dora)
    return dora_layer.dora_rows(call, _listed_in_graph(call, base, slots), dora)


def _listed_in_graph(call: MixedCall, base: Base, slots: Slots) -> torch.Tensor:
    """Return the output ``[..., N]`` in a graph, if at least one slot has an adapter here."""
    layer, batch, x, impl = call.layer, call.routing, call.x, call.conditions.impl
    if dtype_of(slots) not in KERNEL_DTYPES and layer.impl != "triton":
        impl = "eager"
    tensors: list[torch.Tensor | None] = []
    scalings: list[Any] = []
    dropout_p: list[float] = []
    for factors in slots:
        down, up, scaling, bias, p, _ = _NO_FACTORS if factors is None else factors
        tensors += (down, up, bias)
        scalings.append(scaling)
        dropout_p.append(p)
    shared = group_forward(call, base, slots) if impl == "triton" else None
    made: torch.Tensor = torch.ops.fastlora.lora_mixed(
        *(x, *base[:3], tensors, scalings_beside(scalings, x), batch.ids, batch.seeds, dropout_p),
        *(layer.routed_as if any(dropout_p) else 0, impl, None if shared is None else shared.s),
    )
    return made


def _of_pool_in_graph(call: MixedCall, base: Base, tables: Tables) -> torch.Tensor | None:
    """Return the output of `_in_graph` over a pool, or None if unsupported.

    The pool's tables provide the factors. Gradients, fp64, the batch-invariant mode, and PyTorch
    operators on another device than a CPU are not supported.
    """
    x, impl, (weight, bias, y, _) = call.x, call.conditions.impl, base
    if linear.records_gradients(x, weight, bias, y) or x.dtype == torch.float64:
        return None
    if call.conditions.invariant or (impl != "triton" and x.device.type != "cpu"):
        return None  # Tables hold addresses, which PyTorch can read on a CPU only.
    if weight is not None:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if impl != "triton":
            y, weight = F.linear(x, weight, bias), None
    elif y is not None:
        y = y.clone(memory_format=torch.contiguous_format)
    made = _by_address(call, Base(weight, bias, y, True), tables)
    return dora_layer.scale_pool_rows_(call, made)
