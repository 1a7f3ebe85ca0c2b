"""The one forward of every LoRA layer: ours, patched ones of PEFT's, and shares of split ones.

Outside of a mixed batch the active adapters act on all rows (`fastlora.layers.active`, and with
DoRA `fastlora.layers.dora`). In a mixed batch each row has its own adapter, and
`fastlora.layers.decide` says who computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.autograd.linear import Call, run
from fastlora.layers import dora_rows, graph, packs, tables
from fastlora.layers.absent import with_absent
from fastlora.layers.active import run_active
from fastlora.layers.call import MixedCall
from fastlora.layers.decide import How, KeptDecision, check_devices, decide
from fastlora.layers.dora import run_active_dora
from fastlora.layers.factors import slots_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.layers.sharing import note_apart, shared_shrink
from fastlora.layers.why import uses_dora
from fastlora.ops.factors import Base, Slots, numbers_on
from fastlora.ops.rows import Rows
from fastlora.routing.routing import Routing
from fastlora.validation import check_dropout_dtype


def forward(
    layer: AdapterLayer,
    x: torch.Tensor,
    base: Base,
    routed: tuple[Routing, int] | None,
    names: list[str],
) -> torch.Tensor:
    """Returns ``[..., N]`` of a base layer and the adapters that act.

    Args:
        layer: Holds the adapters, or its pool does.
        x: ``[..., K]``.
        base: The base layer.
        routed: The routing in force and the layer's number, in a mixed batch.
        names: Else the adapters that act, at least one.
    """
    if routed is not None:
        return _mixed(layer, x, base, *routed)
    if uses_dora(layer, names):
        return run_active_dora(layer, x, base, names)
    return run_active(layer, x, base, names)


def _mixed(
    layer: AdapterLayer, x: torch.Tensor, base: Base, routing: Routing, number: int
) -> torch.Tensor:
    """`forward` where each row has its own adapter; rows of adapters it lacks are base rows."""
    if torch.compiler.is_compiling():
        made = graph.run_in_graph(MixedCall.of(layer, number, routing, x, base))
        if made is not None:
            return made
    dora = dora_rows.dora_slots(layer, routing)
    kept: KeptDecision | None = routing.kept.decisions.get(number)
    if kept is not None and kept.holds(layer, x, base):
        y, how = packs.run_kept(x, base, kept, number), How.PYTORCH
        if dora is None:
            return y
        call = MixedCall.of(layer, number, routing, x, base)
    else:
        call = MixedCall.of(layer, number, routing, x, base)
        y, how = _by_rows(call, () if dora is None else dora.dropped)
    if dora is None:
        return y
    if how is How.TABLES and routing.source.residents is not None:
        return dora_rows.scale_pool_rows_(call, y)
    return dora_rows.dora_rows(call, y, dora)


def _by_rows(call: MixedCall, without: tuple[int, ...]) -> tuple[torch.Tensor, How]:
    """Returns `_mixed` before DoRA's scales, and who made it.

    Slots of ``without`` get the base layer only.
    """
    layer, base, routing = call.layer, call.base, call.routing
    how, is_bare, plan, found, slots = decide(call, without)
    if found is not None:
        return tables.run(call, found, plan), how
    if slots is not None:
        shrunk = shared_shrink(layer, call.given, slots, routing)
        s = None if shrunk is None else shrunk.s
        return with_absent(call, run_rows(call, slots, "triton", s=s), waits=False), how
    rows = call.rows(host=True)
    if is_bare:
        kept = packs.find(call, rows)
        if kept is not None:
            return packs.run_kept(call.x, base, kept, call.number), how
    else:
        note_apart(layer, call.given)
    slots = slots_of(routing.source, layer, rows.present, without)
    check_devices(slots, call.x)
    y = run_rows(call, slots, "eager", rows.present, rows=rows)
    return with_absent(call, y, waits=True), how


def run_rows(
    call: MixedCall,
    slots: Slots,
    impl: str,
    which: tuple[int, ...] | None = None,
    s: torch.Tensor | None = None,
    rows: Rows | None = None,
) -> torch.Tensor:
    """Returns ``[..., N]`` with every row's own adapter, by `fastlora.autograd.linear.run`.

    Args:
        call: The layer's.
        slots: The adapters.
        impl: Name of the backend.
        which: Their slots; None for all.
        s: The layer's, where a sibling made it.
        rows: Of the batch; None to look them up.
    """
    x, base = call.x, call.base
    tensors: list[torch.Tensor | None] = []
    scalings: list[Any] = []
    dropout_p: list[float] = []
    for factors in slots.own:  # in one loop: every call here is one in every step
        if factors is None:
            tensors += (None, None, None)
            scalings.append(0.0)
            dropout_p.append(0.0)
        else:
            tensors += (factors.lora_a, factors.lora_b, factors.lora_bias)
            scalings.append(factors.scaling)
            dropout_p.append(factors.dropout_p)
    if slots.own.count(None) == len(slots.own):
        return _base_rows(x, base, impl)
    seeds = None
    if any(dropout_p):
        check_dropout_dtype(x.dtype)
        device = x.device if impl == "triton" else torch.device("cpu")
        seeds = call.routing.seeds_of(call.number, device)
        seeds = call.layer._own_seed(seeds if which is None else seeds[list(which)])
    how = Call(impl, "auto", tuple(dropout_p), call.rows() if rows is None else rows, which)
    return run(x, base, how, scalings_beside(scalings, x), seeds, tensors, s)


def _base_rows(x: torch.Tensor, base: Base, impl: str) -> torch.Tensor:
    """`run_rows` where no slot has an adapter on the layer."""
    weight, bias, y, _ = base
    if weight is None:
        return base.output(x)
    if impl != "eager":
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    # An adapter of rank 0: the base product and its gradients are the backend's all the same.
    (n, k), zero = weight.shape, scalings_beside((0.0,), x).reshape(())
    return run(x, base, Call(impl), zero, None, (x.new_empty(0, k), x.new_empty(n, 0), None))


def scalings_beside(values: Sequence[float | torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Returns scalings as a tensor beside x, fp32 (fp64 for fp64) ``[S]``.

    A tensor of PEFT's compiled hot swap is read on its device.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    numbers: list[float] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            same = [torch.as_tensor(v, dtype=dtype, device=x.device).reshape(()) for v in values]
            return torch.stack(same)
        numbers.append(value)
    return numbers_on(tuple(numbers), dtype, x.device)
