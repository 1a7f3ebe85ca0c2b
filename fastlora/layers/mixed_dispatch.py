"""The choice of implementation for one forward pass of one layer in a mixed batch.

Nothing is computed here. `fastlora.layers.fallback_reasons` explains why a better implementation
does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastlora.autograd.lora_linear import records_gradients
from fastlora.layers.adapter_factors import factors_in_slots, factors_without_calling_modules
from fastlora.layers.address_tables import get_or_build_address_tables
from fastlora.layers.call import MixedCall
from fastlora.layers.fallback_reasons import (
    BASE_GEMM_VARIES,
    batch_invariance_unsupported_reason,
    fallback_reason_for_factor_dtypes,
    graph_capture_error_message,
)
from fastlora.ops.factors import AddressTables, Base, Slots
from fastlora.validation import AdapterStateError, ImplementationError, check_same_device

if TYPE_CHECKING:
    from fastlora.layers.linear_with_adapters import BaseLinearWithAdapters


def choose_mixed_implementation(
    call: MixedCall, base: Base, excluded_slots: Sequence[int]
) -> tuple[bool, AddressTables | None, Slots | None]:
    """Choose how to run a layer's forward pass on a mixed batch.

    Returns a tuple (is_bare, tables, slots). is_bare says whether the forward pass can use address
    tables or packed factors, which require a forward pass without gradients, dropout, or autocast.
    tables contains the address tables if kernels read factors by address. slots is a list with the
    factors of each slot if kernels take the factors as tensors. If tables and slots are both None,
    PyTorch operators run.

    Args:
        call: The call of the layer.
        base: The base layer.
        excluded_slots: Slots to leave out, because DoRA with dropout computes their rows
            separately.

    Raises:
        AdapterStateError: An adapter is merged, or a CUDA graph capture over a pool would need
            PyTorch.
        ImplementationError: ``impl="triton"`` or the batch-invariant mode cannot run. The message
            gives the reason.
        TypeError: The base weight's dtype differs from the dtype of x.
        UnsupportedLayerError: A factor has hooks or is not a plain linear, so a mixed batch cannot
            use it.
    """
    layer, x, conditions = call.layer, call.x, call.conditions
    autocast, invariant = conditions.autocast, conditions.invariant
    if layer.merged_adapters:
        check_not_merged(layer)
    if layer.is_split:
        return False, None, None
    fits = base.y is None or base.y.dtype == x.dtype
    if base.weight is None:
        conditions.raise_if_batch_invariant(layer, BASE_GEMM_VARIES)
    weight = base.weight
    if weight is not None and autocast is None and weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype} (the dtype of x)")
    bare = autocast is None and fits and has_no_gradients_or_dropout(call, base)
    if bare:
        tables = address_tables_for_kernels(call)
        if tables is not None:
            return True, tables, None
    if call.routing.captured:
        raise AdapterStateError(graph_capture_error_message(bare, autocast))
    if invariant:
        conditions.check_supports_batch_invariance(x)
        conditions.raise_if_batch_invariant(
            layer, batch_invariance_unsupported_reason(bare, autocast)
        )
    if not bare and fits:
        slots = None
        if conditions.impl == "triton":
            slots = slot_factors_for_kernels(call, layer, excluded_slots)
        if slots is not None:
            return False, None, slots
    elif not bare and base.y is not None and layer.impl == "triton":
        raise ImplementationError(
            f"impl='triton' cannot be used: the base layer returned {base.y.dtype} for an input of "
            f"{x.dtype}"
        )
    return bare, None, None


def check_not_merged(layer: BaseLinearWithAdapters) -> None:
    """Raise `AdapterStateError` if adapters are merged into the layer's base weight."""
    if layer.merged_adapters:
        raise AdapterStateError(
            f"adapters cannot be selected per row, because adapters {layer.merged_adapters} were "
            "merged into the base weights inside the fastlora.adapters() block; unmerge them first"
        )


def has_no_gradients_or_dropout(call: MixedCall, base: Base) -> bool:
    """Return whether a call records no autograd graph and applies no dropout."""
    routing = call.routing
    # A captured routing is over a pool, and a pool's adapters have no dropout.
    if call.layer.training and not routing.captured:
        return False
    if not torch.is_grad_enabled():
        return True
    # A pool's factors have no gradients. Parameters are not checked one by one.
    return routing.source.loaded_adapters is not None and not records_gradients(call.x, *base[:3])


def address_tables_for_kernels(call: MixedCall) -> AddressTables | None:
    """Return the address tables that the kernels read.

    Returns None if kernels are not used.
    """
    x, conditions = call.x, call.conditions
    if conditions.invariant:
        conditions.check_supports_batch_invariance(x)
    elif conditions.impl != "triton":
        return None
    tables = get_or_build_address_tables(call.routing, x)
    # The adapters of one routing are on one device. A model on several devices runs in PyTorch.
    return tables if tables is not None and tables.rank.device == x.device else None


def slot_factors_for_kernels(
    call: MixedCall, layer: BaseLinearWithAdapters, excluded: Sequence[int] = ()
) -> Slots | None:
    """Return a list of the factors to pass to the kernels, with one entry per slot.

    Returns None if the call runs in PyTorch, or if the kernels do not support the factors' dtypes.

    Args:
        call: The call of a layer.
        layer: That layer, or a layer of the same shared-input group with the same ``impl``.
        excluded: Slots to leave out, because DoRA with dropout computes their rows separately.

    Raises:
        ImplementationError, UnsupportedLayerError: As for `choose_mixed_implementation`.
        ValueError: A factor is not on the same device as x.
    """
    if call.conditions.impl != "triton":
        return None
    routing = call.routing
    slots = factors_in_slots(routing.source, layer, range(len(routing.names)), excluded)
    reason = fallback_reason_for_factor_dtypes(routing, slots)
    if reason and layer.impl == "triton":
        raise ImplementationError(f"impl='triton' cannot be used for this mixed batch: {reason}")
    if reason:
        return None
    check_factor_devices(slots, call.x)
    return slots


def slot_factors_for_compiled_graph(
    call: MixedCall, layer: BaseLinearWithAdapters, excluded: Sequence[int] = ()
) -> Slots | None:
    """Return a list of the factors to use in a compiled graph, with one entry per slot.

    The function is called while the graph is being compiled. Returns None if the factors cannot be
    part of a graph.

    Args:
        call: The call of a layer. Its routing is the batch's ``whole``.
        layer: That layer, or a layer of the same shared-input group with the same ``impl``.
        excluded: Slots to leave out, because DoRA with dropout computes their rows separately.
    """
    names = call.routing.names
    if layer.merged_adapters or call.conditions.invariant:
        return None
    found = {
        name: factors_without_calling_modules(layer, name, call)
        for name in names
        if name in layer.lora_A
    }
    for factors in found.values():
        if factors is None or factors.lora_a.device != call.x.device:
            return None
    return [None if slot in excluded else found.get(name) for slot, name in enumerate(names)]


def check_factor_devices(slots: Slots, x: torch.Tensor) -> None:
    """Raise `ValueError` if a factor is not on the same device as x."""
    for factors in slots:
        if factors is not None and factors.lora_a.device != x.device:
            check_same_device(x, lora_a=factors.lora_a, lora_b=factors.lora_b)
