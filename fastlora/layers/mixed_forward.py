"""The forward pass of one layer in a mixed batch, where each row has its own adapter or none.

`fastlora.layers.mixed_dispatch` chooses the implementation: kernels that find factors by address
(`fastlora.layers.table_launch`), PyTorch with packed factors (`fastlora.layers.packed_factors`), or
`fastlora.autograd.lora_linear` with the adapters as lists. In a graph that is being compiled,
everything that depends on the batch's adapters is read from tensors only. Another mix of adapters
therefore does not cause recompilation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

import fastlora.autograd.lora_mixed  # noqa: F401  # registers an operator
from fastlora.autograd import lora_linear
from fastlora.layers import dora as dora_layer
from fastlora.layers import packed_factors
from fastlora.layers.adapter_factors import (
    factors_in_slots,
    promoted_factor_dtype,
    scalings_as_tensor,
)
from fastlora.layers.call import MixedCall
from fastlora.layers.fallback_reasons import ADAPTED_AFTER_BLOCK
from fastlora.layers.group_forward import group_forward
from fastlora.layers.mixed_dispatch import (
    check_factor_devices,
    choose_mixed_implementation,
    slot_factors_for_compiled_graph,
)
from fastlora.layers.table_launch import (
    get_table_launch_arguments,
    linear_from_tables,
    output_from_tables,
)
from fastlora.layers.unused_adapters import attach_unused_parameters
from fastlora.ops.execution_mode import KERNEL_DTYPES
from fastlora.ops.factors import (
    AddressTables,
    Base,
    LayerAdapterOperands,
    Slots,
    replace_missing_with_empty,
)
from fastlora.ops.rows import Rows
from fastlora.validation import check_dropout_dtype

# Stands for the `Factors` of an adapter that does not adapt the layer.
_NO_FACTORS: Any = None, None, 0.0, None, 0.0, None


def forward_mixed(call: MixedCall, base: Base) -> torch.Tensor:
    """Return a layer's output for a mixed batch.

    The shape of the output is ``[..., N]``. For rows of adapters that the layer lacks, the output
    is that of the base layer.
    """
    layer, routing = call.layer, call.routing
    if call.conditions.compiling:
        made = _forward_in_compiled_graph(call, base)
        if made is not None:
            return made
    magnitudes, dora = layer._modules.get("lora_magnitude_vector"), None
    if (
        magnitudes is not None and magnitudes._modules
    ) or routing.source.loaded_adapters is not None:
        dora = dora_layer.find_dora_slots(layer, routing)
    known = routing.cache.layers.get(("packs", layer.routing_index))
    if known is not None and known[0] == packed_factors.packed_cache_key(call, base):
        y, by_address = packed_factors.output_from_packed_factors(call, base, *known[1]), False
    else:
        y, by_address = _forward_before_dora(call, base, () if dora is None else dora.dropped)
    if dora is None:
        return y
    if by_address and routing.source.loaded_adapters is not None:
        return dora_layer.scale_rows_from_pool_tables_(call, y)
    return dora_layer.apply_dora_to_rows(call, y, dora)


def _forward_before_dora(
    call: MixedCall, base: Base, excluded_slots: tuple[int, ...]
) -> tuple[torch.Tensor, bool]:
    """Compute a layer's output for a mixed batch, before DoRA is applied.

    The adapters in ``excluded_slots`` are not applied, so their rows get the base layer's output.
    Returns a tuple (y, by_address). y is the output ``[..., N]``. by_address says whether kernels
    found the factors by address, which determines how DoRA is then applied to y.
    """
    layer, x, routing = call.layer, call.x, call.routing
    is_bare, found, slots = choose_mixed_implementation(call, base, excluded_slots)
    if found is not None:
        return _forward_by_address(call, base, found), True
    if slots is not None:
        shared = group_forward(call, base, slots)
        y = _forward_with_factor_lists(
            call, base, slots, call.sorted_rows(), s=None if shared is None else shared.s
        )
    else:
        rows = routing.sorted_rows(x.numel() // x.shape[-1], x.device, check_ids_now=True)
        if is_bare:
            packed = packed_factors.get_packed_factors(call, base, rows)
            if packed is not None:
                return packed_factors.output_from_packed_factors(call, base, *packed), False
        own = factors_in_slots(routing.source, layer, rows.used_slots, excluded_slots)
        check_factor_devices(own, x)
        y = _forward_with_factor_lists(call, base, own, rows, rows.used_slots)
    if routing.unused_gradients and torch.is_grad_enabled():
        y = attach_unused_parameters(call, y, may_sync=slots is None)
    return y, False


def _forward_by_address(call: MixedCall, base: Base, tables: AddressTables) -> torch.Tensor:
    """Compute a layer's output from the factors whose addresses are in ``tables``.

    The shape of the output is ``[..., N]``. If the tables have no row for the layer, the result is
    the base layer's output.
    """
    x, conditions = call.x, call.conditions
    table_launch = get_table_launch_arguments(
        call, tables, call.sorted_rows(), conditions.invariant, conditions.backend
    )
    if table_launch is None:
        conditions.raise_if_batch_invariant(call.layer, ADAPTED_AFTER_BLOCK)
        return base.base_layer_output(x)
    shared = None if base.weight is None else group_forward(call, base, table_launch)
    if shared is None:
        y = output_from_tables(call, base, table_launch, conditions.backend)
    elif shared.y is None:
        y = linear_from_tables(call, base, table_launch, shared.s)[0]
    else:
        y = shared.y
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _forward_with_factor_lists(
    call: MixedCall,
    base: Base,
    slots: Slots,
    rows: Rows,
    which: tuple[int, ...] | None = None,
    s: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute a layer's output from lists of the adapters' LoRA factors.

    `fastlora.autograd.lora_linear.run_adapters` receives the factors as lists of tensors and
    computes the output ``[..., N]``. If PyTorch operators run, ``slots`` lists the factors of the
    slots in ``which``. If kernels run, ``slots`` lists the factors of all slots, and ``s`` is given
    if another layer of the shared-input group has computed it.
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
        return _output_without_adapters(x, base, impl)
    if missing:
        lora_a, lora_b = (
            replace_missing_with_empty(lora_a, 0),
            replace_missing_with_empty(lora_b, 1),
        )
    seeds = None
    if any(dropout_p):
        check_dropout_dtype(x.dtype)
        device = x.device if impl == "triton" else torch.device("cpu")
        seeds = call.dropout_seeds(device)
        seeds = call.layer._local_dropout_seed(seeds if which is None else seeds[list(which)])
    scaling, drop = scalings_as_tensor(scalings, x), (tuple(dropout_p), seeds)
    own = LayerAdapterOperands(lora_a, lora_b, lora_bias, scaling, *drop, which)
    return lora_linear.run_adapters(x, base, own, impl, rows=rows, s=s)


def _output_without_adapters(x: torch.Tensor, base: Base, impl: str) -> torch.Tensor:
    """Return a layer's output without adapters.

    It is the base layer's output ``[..., N]``. The batch has no adapters on the layer.
    """
    weight, bias, y, _ = base
    if weight is None:
        return base.base_layer_output(x)
    if impl != "eager":
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    # An adapter of rank 0 lets the backend compute the base product and its gradients.
    (n, k), zero = weight.shape, scalings_as_tensor((0.0,), x).reshape(())
    operands = LayerAdapterOperands([x.new_empty(0, k)], [x.new_empty(n, 0)], [None], zero, (0.0,))
    return lora_linear.run_adapters(x, base, operands, impl)


# ------------------------------------------------------------------------- in a compiled graph


def _forward_in_compiled_graph(call: MixedCall, base: Base) -> torch.Tensor | None:
    """Compute a layer's output while `torch.compile` traces the layer.

    Returns None if the graph does not support the call. Graphs do not support factors with hooks,
    the batch-invariant mode, or gradients through a pool. In these cases the forward pass runs
    outside the graph, which fails with ``fullgraph=True``.
    """
    layer, batch, x = call.layer, call.routing.whole, call.x
    if batch is None or (base.y is not None and base.y.dtype != x.dtype):
        return None
    call = replace(call, routing=batch)
    if batch.source.tables is not None:
        return _forward_pool_in_compiled_graph(call, base, batch.source.tables)
    dora = dora_layer.find_dora_slots(layer, batch) or dora_layer.SlotsUsingDora()
    slots = slot_factors_for_compiled_graph(call, layer, dora.dropped)
    if slots is None:
        return None
    # At most DoRA adapters with dropout remain.
    if slots.count(None) == len(slots):
        return dora_layer.apply_dora_to_rows(call, base.base_layer_output(x), dora)
    return dora_layer.apply_dora_to_rows(
        call, _forward_lists_in_compiled_graph(call, base, slots), dora
    )


def _forward_lists_in_compiled_graph(call: MixedCall, base: Base, slots: Slots) -> torch.Tensor:
    """In a compiled graph, compute a layer's output from lists of the adapters' LoRA factors.

    The function is called while the graph is being compiled. ``slots`` lists the factors of each
    slot. At least one slot must have factors for the layer. The shape of the output is
    ``[..., N]``.
    """
    layer, batch, x, impl = call.layer, call.routing, call.x, call.conditions.impl
    if promoted_factor_dtype(slots) not in KERNEL_DTYPES and layer.impl != "triton":
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
        *(
            x,
            *base[:3],
            tensors,
            scalings_as_tensor(scalings, x),
            batch.ids,
            batch.seeds,
            dropout_p,
        ),
        *(layer.routing_index if any(dropout_p) else 0, impl, None if shared is None else shared.s),
    )
    return made


def _forward_pool_in_compiled_graph(
    call: MixedCall, base: Base, tables: AddressTables
) -> torch.Tensor | None:
    """Compute a layer's output in a compiled graph, using the adapters of a pool.

    Returns None if unsupported. The pool's tables provide the factors. Gradients, fp64, the
    batch-invariant mode, and PyTorch operators on any device but a CPU are not supported.
    """
    x, impl, (weight, bias, y, _) = call.x, call.conditions.impl, base
    if lora_linear.records_gradients(x, weight, bias, y) or x.dtype == torch.float64:
        return None
    if call.conditions.invariant or (impl != "triton" and x.device.type != "cpu"):
        return None  # Tables hold addresses, which PyTorch can read on a CPU only.
    if weight is not None:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if impl != "triton":
            y, weight = F.linear(x, weight, bias), None
    elif y is not None:
        y = y.clone(memory_format=torch.contiguous_format)
    made = _forward_by_address(call, Base(weight, bias, y, True), tables)
    return dora_layer.scale_rows_from_pool_tables_(call, made)
