"""DoRA in a mixed batch: the rows of adapters that use it, scaled after everybody's LoRA term.

A mixed batch's products, by kernels, packed factors or PyTorch, give ``u + bias`` for every row,
with ``u = x @ weight.T + scaling * s @ lora_b.T``. What DoRA adds is one scale per column for each
of its own rows; other rows are not touched. An adapter whose dropout acts meets the base weight a
second time (`fastlora.autograd.dora`): its rows are taken out and computed alone.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

from fastlora.autograd.dora import DoraScale, scale_of, times
from fastlora.autograd.dora_dropped import DoraDropped
from fastlora.layers.dense import dense_weight
from fastlora.layers.dora import records_gradients
from fastlora.layers.dora_norms import (
    magnitude_of,
    may_keep,
    source_of,
    stamp_of,
)
from fastlora.layers.own_share import OwnShare
from fastlora.ops import schema as ops
from fastlora.ops.factors import Factors
from fastlora.ops.rows import Rows, Segment
from fastlora.routing.routing import Routing


class DoraSlots(NamedTuple):
    """The slots of a routing whose adapter uses DoRA on one layer.

    Attributes:
        scaled: Those whose rows are scaled after their LoRA term.
        dropped: Those whose dropout acts.
    """

    scaled: tuple[int, ...]
    dropped: tuple[int, ...]


def dora_slots(layer: Any, routing: Routing) -> DoraSlots | None:
    """Returns which slots use DoRA on a layer; None, at once, where there are none.

    Of a CUDA graph's slots only whether there may be any is known, and none are named.
    """
    if routing.captured:
        return DoraSlots((), ()) if _tables_have_scales(routing) else None
    if routing.source.residents is not None:
        scaled = tuple(
            slot
            for slot, resident in enumerate(routing.source.residents)
            if resident is not None
            and resident.uses_dora
            and _pool_magnitude(layer, resident) is not None
        )
        return DoraSlots(scaled, ()) if scaled else None
    magnitudes = layer._modules.get("lora_magnitude_vector")
    if magnitudes is None or not magnitudes._modules:
        return None
    slots = [slot for slot, name in enumerate(routing.names) if name in magnitudes._modules]
    if not slots:
        return None
    dropouts = layer._modules["lora_dropout"]._modules
    dropped = tuple(slot for slot in slots if acts(dropouts[routing.names[slot]]))
    return DoraSlots(tuple(slot for slot in slots if slot not in dropped), dropped)


def _tables_have_scales(routing: Routing) -> bool:
    tables = routing.source.tables
    return tables is not None and tables.scale_address is not None


def acts(dropout: torch.nn.Module) -> bool:
    """Whether a dropout drops."""
    return type(dropout) is torch.nn.Dropout and dropout.training and dropout.p > 0.0


def _pool_magnitude(layer: Any, resident: Any) -> torch.Tensor | None:
    factors = resident.factors(layer.table_row)
    return None if factors is None else factors.magnitude


# --------------------------------------------------------------------- with and without gradients


def scale_rows(layer: Any, y: torch.Tensor, routing: Routing, slots: DoraSlots) -> torch.Tensor:
    """Returns a new y ``[..., N]`` with DoRA rows scaled, for forwards that record no graph.

    On the device that the ids are on, and without waiting for them: a row finds its adapter's
    g in a table ``[slots + 1, N]``.

    Args:
        layer: Holds the adapters, or its pool does.
        y: Of all rows, bias included.
        routing: The batch's.
        slots: Of `dora_slots`.
    """
    bias = getattr(layer.get_base_layer(), "bias", None)
    flat = y.reshape(-1, y.shape[-1])
    table, known = _table(layer, routing, slots.scaled, flat)
    per_id = flat.shape[0] // routing.ids.numel()
    places = routing.ids.to(flat.device).clamp(-1)  # -2 is an id that was out of range
    places = known[places].repeat_interleave(per_id)
    u = flat if bias is None else flat - bias.to(flat.dtype)
    scaled = times(u, table.index_select(0, places))
    if bias is not None:
        scaled += bias.to(flat.dtype)
    plain = (places == table.shape[0] - 1).unsqueeze(1)
    return torch.where(plain, flat, scaled).view(y.shape)


def _table(
    layer: Any, routing: Routing, slots: tuple[int, ...], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns g of some slots, ones last, and each slot's row in it, with those of no slot last.

    Kept with the routing, so that the steps of a decode make it once.
    """
    sources = [_source(layer, routing, slot) for slot in slots]
    key = (layer.routed_as, slots)
    # A share's tensors are made for one forward: their stamps tell nothing.
    keeps = may_keep(like.device) and type(layer) is not OwnShare
    stamps = [stamp_of(tensor) for source in sources for tensor in source] if keeps else []
    keeps = keeps and None not in stamps
    kept = routing.kept.dora.get(key) if keeps else None
    if kept is not None and kept[0] == stamps:
        return kept[1]
    pool = routing.residents is not None
    scales = [source[0] if pool else scale_of(*source) for source in sources]
    table = torch.stack([*scales, torch.ones_like(scales[0])])
    rows = torch.full((len(routing.names) + 1,), len(slots))
    rows[list(slots)] = torch.arange(len(slots))
    made = table, rows.to(like.device)
    if keeps:
        # With its sources alive no other tensors take their addresses.
        routing.kept.dora[key] = stamps, made, sources
    return made


def _source(layer: Any, routing: Routing, slot: int) -> tuple[torch.Tensor, ...]:
    """Returns what an adapter's g on a layer comes of: its magnitude, and its squared norms there.

    A pool keeps g itself (`fastlora.pool.scales`).
    """
    if routing.residents is None:
        return source_of(layer, routing.names[slot])
    return (routing.residents[slot].scales.by_module[layer.table_row],)


# ------------------------------------------------------------------------------- with gradients


def scale_segments(
    layer: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    rows: Rows,
    slots: DoraSlots,
    branches: dict[int, Factors],
    projection: int,
) -> torch.Tensor:
    """`scale_rows` where gradients may be recorded or dropout acts.

    Args:
        layer: Holds the adapters, or its pool does.
        y: ``[..., N]``, bias included; rows of dropped slots are the base layer's.
        x: ``[..., K]``, in the dtype that the layer computes in.
        routing: The batch's.
        rows: The same spread over x's rows.
        slots: Of `dora_slots`.
        branches: Of the dropped slots.
        projection: The layer's number in its model.
    """
    scaled = [s for s in rows.segments if s.slot in slots.scaled]
    dropped = [s for s in rows.segments if s.slot in slots.dropped]
    if not scaled and not dropped:
        return y
    flat = y.reshape(-1, y.shape[-1])
    own_segments = [*scaled, *dropped]
    index = _rows_of(own_segments, rows, flat.device)
    # The batch as it lies: all rows, and each segment behind the one before it.
    whole = index.numel() == flat.shape[0] and rows.in_order
    whole = whole and all(a.stop == b.start for a, b in itertools.pairwise(own_segments))
    own = flat if whole else flat.index_select(0, index)
    count = sum(segment.stop - segment.start for segment in scaled)
    parts = []
    if scaled:
        part = own[:count] if dropped else own
        parts.append(_scaled(layer, part, routing, scaled))
    if dropped:
        rows_x = x.reshape(-1, x.shape[-1])
        rows_x = rows_x if whole else rows_x.index_select(0, index)
        parts += _dropped(
            layer, own[count:], rows_x[count:], routing, dropped, branches, projection
        )
    result = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (result if whole else flat.index_copy(0, index, result)).view(y.shape)


def _rows_of(segments: list[Segment], rows: Rows, device: torch.device) -> torch.Tensor:
    """Returns the rows of some segments, in their order, by their places in the batch."""
    places = torch.cat([torch.arange(s.start, s.stop) for s in segments]).to(device)
    return places if rows.in_order else rows.order.index_select(0, places).long()


def _scaled(
    layer: Any, own: torch.Tensor, routing: Routing, segments: list[Segment]
) -> torch.Tensor:
    bias = getattr(layer.get_base_layer(), "bias", None)
    u = own if bias is None else own - bias.to(own.dtype)
    lengths = tuple(segment.stop - segment.start for segment in segments)
    pairs = [t for s in segments for t in _source(layer, routing, s.slot)]
    if routing.residents is not None:  # a later block may write other scales where these lie
        pairs = [t for scale in pairs for t in (scale.clone(), torch.ones_like(scale))]
    return DoraScale.apply(u, bias, lengths, *pairs)


def _dropped(
    layer: Any,
    own: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    segments: list[Segment],
    branches: dict[int, Factors],
    projection: int,
) -> list[torch.Tensor]:
    weight = dense_weight(layer.get_base_layer())
    impl = ops.resolve_impl(getattr(layer, "impl", "auto"), x)
    lengths = [segment.stop - segment.start for segment in segments]
    parts = []
    for segment, base, rows in zip(segments, own.split(lengths), x.split(lengths), strict=True):
        branch = branches[segment.slot]
        device = x.device if impl == "triton" else torch.device("cpu")
        seed = routing.seeds_of(projection, device)[segment.slot : segment.slot + 1]
        if type(layer) is OwnShare:
            seed = layer.own_seed(seed)
        magnitude, squares = _source(layer, routing, segment.slot)
        parts.append(
            DoraDropped.apply(
                *(base, rows, weight, None, branch.lora_a, branch.lora_b, magnitude, squares),
                *(branch.scaling, seed, branch.dropout_p, impl),
            )
        )
    return parts


def wants_segments(layer: Any, y: torch.Tensor, routing: Routing, slots: DoraSlots) -> bool:
    """Whether a graph is recorded through the scale of some row, or dropout acts."""
    if slots.dropped:
        return True
    bias = getattr(layer.get_base_layer(), "bias", None)
    magnitudes = (
        [magnitude_of(layer, routing.names[slot]) for slot in slots.scaled]
        if routing.residents is None
        else []
    )
    return records_gradients(y, bias, *magnitudes)
