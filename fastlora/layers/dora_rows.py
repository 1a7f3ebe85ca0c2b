"""DoRA in a mixed batch: the rows of adapters that use it, after everybody's LoRA term.

A mixed batch's products, by kernels, packed factors or PyTorch, give ``u + bias`` for every row,
with ``u = x @ weight.T + scaling * s @ lora_b.T``. DoRA then scales the columns of its own rows;
other rows keep their bits. An adapter whose dropout acts has no LoRA term before: its rows meet
the base weight a second time (`fastlora.autograd.dora_dropped`).

Where a graph of autograd is recorded, rows are taken out adapter by adapter. Without one, and in a
compiled graph, a row finds its adapter's g by its id; over a pool an operator finds it in memory.
A compiled graph makes the norms of all the model's DoRA adapters in every forward, of those without
rows too, for which ones have rows is the mix.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastlora.autograd.dora import DoraScale
from fastlora.autograd.dora_dropped import DoraDropped, OwnRows
from fastlora.autograd.linear import records_gradients
from fastlora.layers.bases import dense_weight
from fastlora.layers.factors import Scale, scaling_beside
from fastlora.layers.norms import magnitude_of, may_keep, stamp_of
from fastlora.ops import backend as ops
from fastlora.ops.rows import Rows, Segment
from fastlora.ops.seeds import seeds_of_layer
from fastlora.ops.torch.dora_dropped import Dropped
from fastlora.ops.torch.scale import scale_of, times
from fastlora.ops.triton.pieces import rows_at
from fastlora.routing.routing import Routing


class DoraSlots(NamedTuple):
    """The slots whose adapter uses DoRA on one layer.

    Attributes:
        scaled: Those whose rows are scaled after their LoRA term.
        dropped: Those whose dropout acts.
    """

    scaled: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()


def dora_slots(layer: Any, routing: Routing) -> DoraSlots | None:
    """Returns which slots of a batch use DoRA on a layer; None where there are none.

    Of a captured CUDA graph's slots only whether there may be any is known, and none are named.
    """
    source = routing.source
    if routing.captured:
        tables = source.tables
        return None if tables is None or tables.scale_address is None else DoraSlots()
    if source.residents is not None:
        scaled = tuple(
            slot
            for slot, resident in enumerate(source.residents)
            if resident is not None
            and resident.uses_dora
            and (factors := source.factors(layer, slot)) is not None
            and factors.magnitude is not None
        )
        return DoraSlots(scaled) if scaled else None
    magnitudes = layer._modules.get("lora_magnitude_vector")
    if magnitudes is None or not magnitudes._modules:
        return None
    slots = [slot for slot, name in enumerate(routing.names) if name in magnitudes._modules]
    if not slots:
        return None
    dropouts = layer._modules["lora_dropout"]._modules
    dropped = tuple(slot for slot in slots if _acts(dropouts[routing.names[slot]]))
    return DoraSlots(tuple(slot for slot in slots if slot not in dropped), dropped)


def _acts(dropout: torch.nn.Module) -> bool:
    return type(dropout) is torch.nn.Dropout and dropout.training and dropout.p > 0.0


def bias_of(layer: Any) -> torch.Tensor | None:
    """Returns the bias of a layer's base layer."""
    bias: torch.Tensor | None = getattr(layer.get_base_layer(), "bias", None)
    return bias


# ------------------------------------------------------------------------------- from layers


def dora_rows(
    layer: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    slots: DoraSlots,
    projection: int,
) -> torch.Tensor:
    """Returns ``y [..., N]`` with DoRA in its rows.

    Args:
        layer: Holds the adapters, or its pool does.
        y: Bias included; rows of dropped slots are the base layer's.
        x: ``[..., K]``, in the dtype that the layer computes in.
        routing: The batch's.
        slots: Of `dora_slots`.
        projection: The layer's number in its model.
    """
    bias, source = bias_of(layer), routing.source
    if not wants_segments(layer, y, routing, slots):
        table = _kept_table(layer, routing, slots.scaled, y.device)
        return scale_by_id(y, bias, routing.ids, *table)
    rows = routing.rows(x.numel() // x.shape[-1], x.device, host=True)
    present = [segment.slot for segment in rows.segments]
    scales = {slot: source.scale(layer, slot) for slot in slots.scaled if slot in present}
    if routing.residents is not None:  # a later block may write other scales where these lie
        scales = {slot: Scale(g.clone(), None) for slot, (g, _) in scales.items()}
    dropped: dict[int, Dropped] = {}
    for slot in slots.dropped:
        factors = source.factors(layer, slot, x) if slot in present else None
        if factors is not None:
            lora_a, lora_b, scaling, _, dropout_p, _ = factors
            impl = ops.resolve_impl(getattr(layer, "impl", "auto"), x)
            device = x.device if impl == "triton" else torch.device("cpu")
            seed = routing.seeds_of(projection, device)[slot : slot + 1]
            scale = source.scale(layer, slot)
            dropped[slot] = Dropped(lora_a, lora_b, *scale, scaling, seed, dropout_p, impl)
    weight = dense_weight(layer.get_base_layer()) if dropped else None
    return segments_scaled(y, x, weight, bias, rows, scales, dropped)


def wants_segments(layer: Any, y: torch.Tensor, routing: Routing, slots: DoraSlots) -> bool:
    """Whether a graph is recorded through the scale of some row, or dropout acts."""
    if slots.dropped:
        return True
    magnitudes = []
    if routing.residents is None:
        magnitudes = [magnitude_of(layer, routing.names[slot]) for slot in slots.scaled]
    return records_gradients(y, bias_of(layer), *magnitudes)


def rows_in_graph(
    layer: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    batch: Routing,
    slots: DoraSlots,
    projection: int,
) -> torch.Tensor:
    """`dora_rows` in a graph that is being compiled, as autograd traces it.

    Args:
        layer: Holds the adapters.
        y: ``[..., N]``, bias included; rows of dropped slots are the base layer's.
        x: ``[..., K]``, in the dtype that the layer computes in.
        batch: Its ids are per sample or per token, among all the model's adapters.
        slots: Of `dora_slots`.
        projection: The layer's number in its model.
    """
    if slots.dropped:
        names = [batch.names[slot] for slot in slots.dropped]
        seeds = seeds_of_layer(batch.seeds, projection)
        adapters = []
        for slot, name in zip(slots.dropped, names, strict=True):
            factors = layer.lora_A[name].weight, layer.lora_B[name].weight
            scaling = scaling_beside(layer, name, x)
            adapters += [
                *factors,
                *batch.source.scale(layer, slot),
                scaling,
                seeds[slot : slot + 1],
            ]
        y = DoraDropped.apply(
            *(y, x, dense_weight(layer.get_base_layer()), None, OwnRows(slots=slots.dropped)),
            *(batch.ids, tuple(layer.lora_dropout[name].p for name in names)),
            *(ops.resolve_impl(getattr(layer, "impl", "auto"), x), None, *adapters),
        )
    if not slots.scaled:
        return y
    scales = [batch.source.scale(layer, slot) for slot in slots.scaled]
    table = scale_table(scales, slots.scaled, len(batch.names), y.device)
    return scale_by_id(y, bias_of(layer), batch.ids, *table)


# -------------------------------------------------------------------------- without segments


def scale_table(
    scales: Sequence[Scale], slots: Sequence[int], count: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns g of some slots, and ones in the last row: ``[slots + 1, N]``; and each slot's row.

    Those of ``count`` slots come first, then that of no slot.
    """
    found = [scale_of(*scale) for scale in scales]
    table = torch.stack([*found, torch.ones_like(found[0])])
    known = [slots.index(slot) if slot in slots else len(slots) for slot in range(count)]
    return table, torch.tensor([*known, len(slots)], device=device)


def _kept_table(
    layer: Any, routing: Routing, slots: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale_table`, kept with the routing: the steps of a decode make it once."""
    scales = [routing.source.scale(layer, slot) for slot in slots]
    key = (layer.routed_as, slots)
    tensors = [tensor for scale in scales for tensor in scale if tensor is not None]
    stamps = [stamp_of(tensor) for tensor in tensors] if may_keep(device) else [None]
    keeps = None not in stamps
    kept = routing.kept.dora.get(key) if keeps else None
    if kept is not None and kept[0] == stamps:
        return kept[1]
    made = scale_table(scales, slots, len(routing.names), device)
    if keeps:
        # With its sources alive no other tensors take their addresses.
        routing.kept.dora[key] = stamps, made, tensors
    return made


def scale_by_id(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    table: torch.Tensor,
    known: torch.Tensor,
) -> torch.Tensor:
    """Returns a new y ``[..., N]`` with rows scaled: without a graph of autograd, or traced.

    On y's device, and without waiting for the ids.

    Args:
        y: Of all rows, bias included.
        bias: ``[N]`` or None.
        ids: Slot of each sample or token, ``[B]``; negative ones are none.
        table, known: Of `scale_table`.
    """
    flat = y.reshape(-1, y.shape[-1])
    each = flat.shape[0] // ids.shape[0]
    places = known[ids.to(flat.device).clamp(min=-1)]  # -2 is an id that was out of range
    places = places.unsqueeze(1).expand(-1, each).reshape(-1)
    u = flat if bias is None else flat - bias.to(flat.dtype)
    scaled = times(u, table.index_select(0, places))
    if bias is not None:
        scaled += bias.to(flat.dtype)
    plain = (places == table.shape[0] - 1).unsqueeze(1)
    return torch.where(plain, flat, scaled).view(y.shape)


# ------------------------------------------------------------------------------ in segments


def segments_scaled(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: Rows,
    scales: dict[int, Scale],
    dropped: dict[int, Dropped],
) -> torch.Tensor:
    """Returns ``y [..., N]`` with the rows of some slots scaled, and others' dropped DoRA in it.

    Args:
        y: Bias included; rows of dropped slots are the base layer's.
        x: ``[..., K]``; read for dropped slots.
        weight: ``[N, K]``, for dropped slots.
        bias: ``[N]`` or None.
        rows: The batch's routing, spread over x's rows.
        scales: By slot.
        dropped: By slot.
    """
    segments = [s for kind in (scales, dropped) for s in rows.segments if s.slot in kind]
    if not segments:
        return y
    flat = y.reshape(-1, y.shape[-1])
    index = _rows_of(segments, rows, flat.device)
    # The batch as it lies: all rows, and each segment behind the one before it.
    whole = index.numel() == flat.shape[0] and rows.in_order
    whole = whole and all(a.stop == b.start for a, b in itertools.pairwise(segments))
    own = flat if whole else flat.index_select(0, index)
    lengths = [segment.stop - segment.start for segment in segments]
    scaled = tuple(lengths[: len(segments) - sum(s.slot in dropped for s in segments)])
    parts = []
    if scaled:
        part = own[: sum(scaled)] if dropped else own
        u = part if bias is None else part - bias.to(part.dtype)
        pairs = [t for segment in segments[: len(scaled)] for t in scales[segment.slot]]
        parts.append(DoraScale.apply(u, bias, scaled, *pairs))
    if len(scaled) < len(segments):
        rows_x = x.reshape(-1, x.shape[-1])
        rows_x = rows_x if whole else rows_x.index_select(0, index)
        own_dropped = [dropped[segment.slot] for segment in segments[len(scaled) :]]
        parts.append(
            DoraDropped.apply(
                *(own[sum(scaled) :], rows_x[sum(scaled) :], weight, None),
                *(OwnRows(tuple(lengths[len(scaled) :])), None),
                *(tuple(adapter.dropout_p for adapter in own_dropped), own_dropped[0].impl, None),
                *(tensor for adapter in own_dropped for tensor in adapter[:6]),
            )
        )
    result = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (result if whole else flat.index_copy(0, index, result)).view(y.shape)


def _rows_of(segments: list[Segment], rows: Rows, device: torch.device) -> torch.Tensor:
    """Returns the rows of some segments, in their order, by their places in the batch."""
    places = torch.cat([torch.arange(s.start, s.stop) for s in segments]).to(device)
    return places if rows.in_order else rows.order.index_select(0, places).long()


# -------------------------------------------------------------------------------- over a pool


def scale_pool_rows_(layer: Any, y: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Scales DoRA's rows of ``y [..., N]`` in place: an operator finds g where tables say it lies.

    So it is the same in a compiled graph, in a captured one and without: what changes with the
    batch, a load or a hot swap are the contents of tensors. Nothing is done where the pool has not
    seen such an adapter: its first one compiles a graph anew.
    """
    tables: Any = routing.source.tables
    if tables.scale_address is None:
        return y
    flat, bias = y.view(-1, y.shape[-1]), bias_of(layer)
    m, impl = flat.shape[0], ops.resolve_impl(layer.impl, y)
    rows = routing.rows(m, y.device)
    own = rows_at(rows) if impl == "triton" else rows.tensors()
    torch.ops.fastlora.lora_scale_(flat, bias, own, tables.scale_address, layer.table_row, impl)
    return y
