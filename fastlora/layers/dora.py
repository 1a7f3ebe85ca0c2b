"""The forward pass of DoRA adapters on one layer, outside and inside mixed batches.

An adapter uses DoRA on a layer if its name is a key of the layer's ``lora_magnitude_vector``.

In a mixed batch, kernels, packed factors, or PyTorch first compute ``u + bias`` for every row, with
``u = x @ weight.T + scaling * s @ lora_b.T``. DoRA then scales the columns of its own rows. Other
rows are not changed. For an adapter with active dropout, u does not include a LoRA term, and its
rows are multiplied by the base weight a second time
(`fastlora.autograd.dora.DoraLinearWithDropout`).

If autograd records a graph, rows are gathered adapter by adapter. Without a graph, and in a
compiled graph, the scale g of each row is looked up by the row's adapter id. Over a pool, an
operator reads g by address. A compiled graph computes the norms of all the model's DoRA adapters in
every forward pass, even of adapters without rows, because the rows of each adapter differ from
batch to batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.autograd.adapter import run_adapter
from fastlora.autograd.dora import ApplyDoraScaleAndAddBias, DoraLinearWithDropout
from fastlora.autograd.lora_linear import records_gradients
from fastlora.layers.adapter_factors import (
    DoraScaleTerms,
    dora_scales_of_adapters,
    scaling_as_scalar_tensor,
)
from fastlora.layers.call import MixedCall, UniformCall
from fastlora.layers.dora_norms import (
    adapted_squared_norms,
    dora_magnitude_of,
    local_adapted_squared_norms,
)
from fastlora.layers.fallback_reasons import raise_if_triton_required
from fastlora.ops import backend as ops
from fastlora.ops.factors import Base, number_tensor_without_sync
from fastlora.ops.rows import Rows
from fastlora.ops.seeds import derive_seeds_of_layer
from fastlora.ops.torch.dora import dora_scale, multiply_rounded_once, scale_and_add_bias
from fastlora.ops.triton.rows_argument import rows_argument_for_address_tables
from fastlora.routing.routing import Routing

if TYPE_CHECKING:
    from fastlora.layers.linear_with_adapters import BaseLinearWithAdapters


def run_dora(call: UniformCall, base: Base, name: str) -> torch.Tensor:
    """Run a base layer with one DoRA adapter.

    The adapter applies to all rows. Returns the output ``[..., N]``. DoRA scales each column of the
    LoRA layer's output before the bias is added.
    """
    layer, x, conditions = call.layer, call.x, call.conditions
    factors = layer._local_factors(name, call)
    if factors is None:
        conditions.raise_if_batch_invariant(layer, f"adapter {name!r} has a factor with hooks")
        return _apply_by_calling_modules(call, base.base_layer_output(call.original_x), name)
    weight = base.weight
    if weight is not None and conditions.autocast is None and weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype} (the dtype of x)")
    lora_a, lora_b, scaling, _, dropout_p, _ = factors
    if dropout_p:
        conditions.raise_if_batch_invariant(layer, f"dropout_p={dropout_p} is active; call eval()")
    ((magnitude, squares),) = dora_scales_of_adapters(call, [name])
    if dropout_p:
        return DoraLinearWithDropout.apply(
            *(base.y, x, _weight_of(call) if weight is None else weight, base.bias),
            *(None, (), (dropout_p,), conditions.backend),
            *(lora_a, lora_b, magnitude, squares, scaling),
            layer._local_dropout_seed(ops.draw_dropout_seed(x, conditions.impl)),
        )
    bias = layer._local_base_bias()
    u = run_adapter(x, base._replace(bias=None), factors, conditions)
    if weight is None and bias is not None:
        u = u - bias.to(u.dtype)
    return _scale_and_add_bias(u, bias, magnitude, squares)


def _weight_of(call: UniformCall) -> torch.Tensor:
    return call.layer._weight_saved_for_backward(
        call.conditions.compiling or call.conditions.tracing
    )


def _scale_and_add_bias(
    u: torch.Tensor,
    bias: torch.Tensor | None,
    magnitude: torch.Tensor,
    squares: torch.Tensor | None,
) -> torch.Tensor:
    """Scale u for DoRA, and add the bias.

    u is ``[..., N]``. The scale is DoRA's g, which is computed from the magnitude and the squared
    norms. The result overwrites u if no autograd graph is recorded.
    """
    if records_gradients(u, bias, magnitude):
        return ApplyDoraScaleAndAddBias.apply(u, bias, magnitude, squares)
    rows, scale = u.reshape(-1, u.shape[-1]), dora_scale(magnitude, squares)
    rows = scale_and_add_bias(rows, bias, scale, True)
    return torch.ops.aten._unsafe_view(rows, u.shape)  # Not a view, so that it is writable.


def _apply_by_calling_modules(call: UniformCall, y: torch.Tensor, name: str) -> torch.Tensor:
    """Apply a DoRA adapter to y by calling the adapter's modules.

    PEFT does the same.
    """
    layer, x, conditions = call.layer, call.original_x, call.conditions
    raise_if_triton_required(layer, [name])
    down, up = layer.lora_A[name], layer.lora_B[name]
    dropout, scaling = layer.lora_dropout[name], scaling_as_scalar_tensor(layer, name, call)
    bias, magnitude = layer._local_base_bias(), dora_magnitude_of(layer, name)
    inner = x.to(down.weight.dtype) if conditions.autocast is None else x
    inner = dropout(inner)
    factors = down.weight, up.weight, scaling
    if conditions.tracing:  # ONNX lacks the operation that replaces zeros elsewhere.
        sums = local_adapted_squared_norms(layer, *factors, True)
        squares = sums.masked_fill(sums <= 0, torch.inf)
    else:
        squares = adapted_squared_norms(layer, *factors, conditions.compiling)
    change = magnitude * squares.rsqrt() - 1.0
    update = up(down(inner)) * scaling
    if not isinstance(dropout, nn.Identity) and layer.training:
        weight = _weight_of(call)
        scaled = F.linear(inner.to(weight.dtype), weight)
    else:
        scaled = y if bias is None else y - bias
    return (y + update + change * (scaled + update)).to(y.dtype)


# ----------------------------------------------------------------------------- mixed batches


class SlotsUsingDora(NamedTuple):
    """The slots in a batch that refer to adapters with DoRA on a given layer.

    Attributes:
        scaled: Slots whose rows are scaled after their LoRA term is added.
        dropped: Slots whose adapters have active dropout.
    """

    scaled: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()


def find_dora_slots(layer: BaseLinearWithAdapters, routing: Routing) -> SlotsUsingDora | None:
    """Return the slots whose adapters use DoRA on a layer.

    Returns None if there are none. The slots of a captured CUDA graph are not known. In this case,
    the result has no slots if any adapter may use DoRA, and is None otherwise.
    """
    source = routing.source
    if routing.captured:
        tables = source.tables
        return None if tables is None or tables.scale_address is None else SlotsUsingDora()
    if source.loaded_adapters is not None:
        scaled = tuple(
            slot
            for slot, loaded in enumerate(source.loaded_adapters)
            if loaded is not None
            and loaded.uses_dora
            and (factors := source.factors(layer, slot)) is not None
            and factors.magnitude is not None
        )
        return SlotsUsingDora(scaled) if scaled else None
    magnitudes = layer._modules.get("lora_magnitude_vector")
    if magnitudes is None or not magnitudes._modules:
        return None
    slots = [slot for slot, name in enumerate(routing.names) if name in magnitudes._modules]
    if not slots:
        return None
    dropouts = layer._modules["lora_dropout"]._modules
    dropped = tuple(slot for slot in slots if _is_active_dropout(dropouts[routing.names[slot]]))
    return SlotsUsingDora(tuple(slot for slot in slots if slot not in dropped), dropped)


def _is_active_dropout(dropout: nn.Module) -> bool:
    return type(dropout) is nn.Dropout and dropout.training and dropout.p > 0.0


def apply_dora_to_rows(call: MixedCall, y: torch.Tensor, slots: SlotsUsingDora) -> torch.Tensor:
    """Apply DoRA to rows of y, using the DoRA scale of each row's adapter.

    Returns the result. Rows that do not belong to any of the given slots are not changed. y is
    ``[..., N]`` and includes the bias. On entry, the rows of ``slots.dropped`` contain the base
    layer's output.
    """
    layer, routing, compiling = call.layer, call.routing, call.conditions.compiling
    (scaled, dropped), bias, rows = slots, layer._local_base_bias(), None
    if not compiling and _must_gather_adapter_rows(layer, y, bias, routing, slots):
        rows = call.sorted_rows(check_ids_now=True)
        scaled = tuple(slot for slot in scaled if slot in rows.used_slots)
        dropped = tuple(slot for slot in dropped if slot in rows.used_slots)
    scales = routing.source.dora_scales(call, (*scaled, *dropped))
    if dropped:
        y = _apply_dora_adapters_with_dropout(call, y, dropped, scales[len(scaled) :])
    if not scaled:
        return y
    scales = scales[: len(scaled)]
    if rows is not None:
        if routing.source.loaded_adapters is not None:
            # Copy the scales, because a later block may overwrite them in place.
            scales = [(g.clone(), None) for g, _ in scales]
        return _scale_rows_with_autograd(y, bias, rows, dict(zip(scaled, scales, strict=True)))
    return _scale_rows_by_id(call, y, bias, dict(zip(scaled, scales, strict=True)))


def _must_gather_adapter_rows(
    layer: BaseLinearWithAdapters,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    slots: SlotsUsingDora,
) -> bool:
    """Return whether the rows of each DoRA adapter must be gathered and processed separately.

    The rows are gathered if autograd records the DoRA computation or if an adapter has active
    dropout.
    """
    if slots.dropped:
        return True
    magnitudes = []
    if routing.source.loaded_adapters is None:
        magnitudes = [dora_magnitude_of(layer, routing.names[slot]) for slot in slots.scaled]
    return records_gradients(y, bias, *magnitudes)


def _apply_dora_adapters_with_dropout(
    call: MixedCall,
    y: torch.Tensor,
    slots_with_dropout: tuple[int, ...],
    scales: Sequence[DoraScaleTerms],
) -> torch.Tensor:
    """Apply the DoRA adapters whose dropout is active to their rows of y.

    y is ``[..., N]``. Each adapter is applied to its own rows of the mixed batch.
    """
    layer, routing, x = call.layer, call.routing, call.x
    if call.conditions.compiling:
        seeds = derive_seeds_of_layer(routing.seeds, layer.routing_index)
    else:
        seeds = call.dropout_seeds(torch.device("cpu"))
    adapters: list[torch.Tensor] = []
    acting: dict[int, float] = {}
    for slot, scale in zip(slots_with_dropout, scales, strict=True):
        factors = routing.source.factors(layer, slot, call)
        if factors is not None:
            seed = layer._local_dropout_seed(seeds[slot : slot + 1])
            adapters += (factors.lora_a, factors.lora_b, *scale, factors.scaling, seed)
            acting[slot] = factors.dropout_p
    weight = layer._weight_saved_for_backward(call.conditions.compiling)
    return DoraLinearWithDropout.apply(
        *(y, x, weight, None, routing.ids, tuple(acting), tuple(acting.values())),
        *(call.conditions.backend, *adapters),
    )


# ---------------------------------------------------------------------------- by adapter id


def _scale_rows_by_id(
    call: MixedCall,
    y: torch.Tensor,
    included_bias: torch.Tensor | None,
    scales: dict[int, DoraScaleTerms],
) -> torch.Tensor:
    """Scale each row of y by its adapter's DoRA scale, which is looked up by adapter id.

    Returns the result. y is ``[..., N]`` and is not changed. ``scales`` maps a slot to the scale of
    its rows. Other rows are not scaled, and neither is ``included_bias [N]``, which y includes. The
    function is for calls that record no autograd graph, and for traced calls. Everything runs on
    y's device, without waiting for the ids.
    """
    routing, compiling = call.routing, call.conditions.compiling
    magnitudes, squares = zip(*scales.values(), strict=True)
    g = dora_scale(torch.stack(magnitudes), None if squares[0] is None else torch.stack(squares))
    # [slots + 1, N]: the last row has ones, for rows that are not scaled.
    table, last = torch.cat([g, torch.ones_like(g[:1])]), len(scales)
    row_of = {slot: row for row, slot in enumerate(scales)}
    rows = tuple(row_of.get(slot, last) for slot in range(len(routing.names))) + (last,)
    device = y.device
    known = (
        torch.tensor(rows, device=device)
        if compiling
        else number_tensor_without_sync(rows, torch.int64, device)
    )
    flat = y.reshape(-1, y.shape[-1])
    each = flat.shape[0] // max(routing.ids.shape[0], 1)
    places = known[routing.ids.to(device).clamp(min=-1)]  # An id of -2 was out of range.
    places = places.unsqueeze(1).expand(-1, each).reshape(-1)
    u = flat if included_bias is None else flat - included_bias.to(flat.dtype)
    scaled = multiply_rounded_once(u, table.index_select(0, places))
    if included_bias is not None:
        scaled += included_bias.to(flat.dtype)
    return torch.where((places == last).unsqueeze(1), flat, scaled).view(y.shape)


# ------------------------------------------------------------------------------- by segment


def _scale_rows_with_autograd(
    y: torch.Tensor,
    included_bias: torch.Tensor | None,
    rows: Rows,
    scales: dict[int, DoraScaleTerms],
) -> torch.Tensor:
    """Scale rows of y by their adapters' DoRA scales, with support for autograd.

    y is ``[..., N]``. ``scales`` maps a slot to the scale of its rows. Other rows are not scaled,
    and neither is ``included_bias [N]``, which y includes. Autograd records the operation.
    """
    segments = [segment for segment in rows.segments if segment.slot in scales]
    lengths = tuple(segment.stop - segment.start for segment in segments)
    flat = y.reshape(-1, y.shape[-1])
    whole = rows.is_sorted and sum(lengths) == flat.shape[0]
    if not whole:
        places = torch.cat([torch.arange(s.start, s.stop, device="cpu") for s in segments])
        places = places.to(y.device)
        index = places if rows.is_sorted else rows.order.index_select(0, places).long()
    own = flat if whole else flat.index_select(0, index)
    u = own if included_bias is None else own - included_bias.to(own.dtype)
    parts = zip(u.split(lengths), segments, strict=True)
    scaled = torch.cat(
        [ApplyDoraScaleAndAddBias.apply(p, included_bias, *scales[s.slot]) for p, s in parts]
    )
    return (scaled if whole else flat.index_copy(0, index, scaled)).view(y.shape)


# -------------------------------------------------------------------------------- over a pool


def scale_rows_from_pool_tables_(call: MixedCall, y: torch.Tensor) -> torch.Tensor:
    """Scale rows of y in place by the DoRA scales in a pool's tables.

    Returns y, which is ``[..., N]``. Only rows that use a DoRA adapter are scaled. The same
    operator runs in a compiled graph, in a captured graph, and without a graph, because a new
    batch, a load, or a hot swap changes only the contents of tensors. The function does nothing
    until the pool has had a DoRA adapter. The first DoRA adapter causes compiled graphs to
    recompile.
    """
    layer, tables = call.layer, call.routing.source.tables
    if tables is None or tables.scale_address is None:
        return y
    flat, bias = y.view(-1, y.shape[-1]), layer._local_base_bias()
    rows, impl = call.sorted_rows(), call.conditions.backend
    own = rows_argument_for_address_tables(rows) if impl == "triton" else rows.operator_arguments()
    torch.ops.fastlora.lora_scale_(flat, bias, own, tables.scale_address, layer.table_row, impl)
    return y
