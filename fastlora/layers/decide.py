"""What one forward of one layer will do: decided once, in one place, as data.

Nothing here computes; `fastlora.layers.why` says why something better does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastlora.autograd.linear import records_gradients
from fastlora.layers.call import MixedCall
from fastlora.layers.factors import factors_of, slots_of
from fastlora.layers.tables import tables_of
from fastlora.layers.why import NOT_OUR_GEMM, why_not_captured, why_not_lists, why_not_tables
from fastlora.ops.factors import Base, Slots, Tables
from fastlora.validation import AdapterStateError, ImplementationError, check_same_device

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer


def decide(
    call: MixedCall, base: Base, without: Sequence[int]
) -> tuple[bool, Tables | None, Slots | None]:
    """Returns which implementation computes a forward in a mixed batch.

    The first item says whether the forward runs without gradients, dropout, and autocast. The
    second one is the tables of addresses, if kernels read factors by address. The third one is the
    factors of all slots, if kernels take them as tensors. If both are None, PyTorch computes.

    Args:
        call: The layer's.
        base: The base layer.
        without: Slots whose rows others compute.

    Raises:
        AdapterStateError: An adapter is merged, or a capture over a pool would need PyTorch.
        ImplementationError: ``impl="triton"`` or the batch-invariant mode cannot run, and why.
        TypeError: The base weight's dtype is not x's.
        UnsupportedLayerError: A factor is hooked, or not a plain linear: rows cannot share it.
    """
    layer, x, conditions = call.layer, call.x, call.conditions
    autocast, invariant = conditions.autocast, conditions.invariant
    if layer.merged_adapters:
        check_unmerged(layer)
    if layer.is_split:
        return False, None, None
    fits = base.y is None or base.y.dtype == x.dtype
    if base.weight is None:
        conditions.refuse(layer, NOT_OUR_GEMM)
    weight = base.weight
    if weight is not None and autocast is None and weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype}, the dtype of x")
    bare = autocast is None and fits and without_gradients(call, base)
    if bare:
        tables = tables_for(call)
        if tables is not None:
            return True, tables, None
    if call.routing.captured:
        raise AdapterStateError(why_not_captured(bare, autocast))
    if invariant:
        conditions.refuse(layer, why_not_tables(bare, autocast))
    if not bare and fits:
        slots = None
        if conditions.impl == "triton":
            slots = slots_for_kernels(call, layer, without)
        if slots is not None:
            return False, None, slots
    elif not bare and base.y is not None and layer.impl == "triton":
        raise ImplementationError(
            f"impl='triton' cannot run: the base layer returned {base.y.dtype} for x in {x.dtype}"
        )
    return bare, None, None


def check_unmerged(layer: AdaptedLayer) -> None:
    """Raises `AdapterStateError` where adapters are merged into the weights of a layer."""
    if layer.merged_adapters:
        raise AdapterStateError(
            f"adapters {layer.merged_adapters} were merged into the base weights within the block, "
            "where every row shares them; unmerge them first"
        )


def without_gradients(call: MixedCall, base: Base) -> bool:
    """Whether no gradient is recorded and no dropout can act."""
    routing = call.routing
    if call.layer.training and not routing.captured:  # of a pool, whose adapters drop nothing
        return False
    if not torch.is_grad_enabled():
        return True
    # A pool's factors have no gradients; those of parameters are not asked one by one.
    return routing.source.residents is not None and not records_gradients(call.x, *base[:3])


def tables_for(call: MixedCall) -> Tables | None:
    """Returns where kernels find the factors; None where kernels do not run."""
    x, conditions = call.x, call.conditions
    if conditions.invariant:
        conditions.check_invariant(x)
    elif conditions.impl != "triton":
        return None
    tables = tables_of(call.routing, x)
    # The adapters of one routing lie on one device: a model on several runs in PyTorch.
    return tables if tables is not None and tables.rank.device == x.device else None


def slots_for_kernels(
    call: MixedCall, layer: AdaptedLayer, without: Sequence[int] = ()
) -> Slots | None:
    """Returns the adapters of all slots for kernels; None where PyTorch runs.

    Args:
        call: A layer's.
        layer: That one, or a sibling of the same ``impl``.
        without: Slots whose rows others compute.

    Raises:
        ImplementationError, UnsupportedLayerError: As `decide`.
        ValueError: A factor is on another device than x.
    """
    if call.conditions.impl != "triton":
        return None
    routing = call.routing
    slots = slots_of(routing.source, layer, range(len(routing.names)), without)
    why = why_not_lists(routing, slots)
    if why and layer.impl == "triton":
        raise ImplementationError(f"impl='triton' cannot run a mixed batch with gradients: {why}")
    if why:
        return None
    check_devices(slots, call.x)
    return slots


def slots_in_graph(
    call: MixedCall, layer: AdaptedLayer, without: Sequence[int] = ()
) -> Slots | None:
    """Returns the adapters of all slots for a graph that is being compiled; None if in no graph.

    Args:
        call: A layer's, whose routing is the batch's ``whole``.
        layer: That one, or a sibling of the same ``impl``.
        without: Slots whose rows others compute.
    """
    names = call.routing.names
    if layer.merged_adapters or call.conditions.invariant:
        return None
    found = {name: factors_of(layer, name, call) for name in names if name in layer.lora_A}
    for factors in found.values():
        if factors is None or factors.lora_a.device != call.x.device:
            return None
    return [None if slot in without else found.get(name) for slot, name in enumerate(names)]


def check_devices(slots: Slots, x: torch.Tensor) -> None:
    """Raises `ValueError` where a factor is on another device than x."""
    for factors in slots:
        if factors is not None and factors.lora_a.device != x.device:
            check_same_device(x, lora_a=factors.lora_a, lora_b=factors.lora_b)
