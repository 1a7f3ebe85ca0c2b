"""Mixed batches in PyTorch, with separate products for the rows of each adapter.

For each adapter, two small products are computed on its own rows, and the result is added to the
base product in place. The base product is computed in the original order of the rows and is never
sorted. No adapter affects the rows of another adapter, even if it contains NaN.

s and ds consist of one part ``[rows, rank]`` for each adapter. If a layer computes them, the parts
are flattened and concatenated. In operators and in shared-input groups, s and ds are ``[M, R]`` at
sorted positions, with zeros in the columns beyond an adapter's rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastlora.ops.factors import Base, LayerAdapterOperands
from fastlora.ops.layout import rank_to_multiple_of_16
from fastlora.ops.rows import Rows
from fastlora.ops.torch import products, reference
from fastlora.validation import check_dropout_dtype

# For at least this many adapters of one rank, stacking their factors costs less than two products
# for each adapter: a decode of 64 sequences with 64 adapters in bf16 is 2.3 times faster (SmolLM2,
# one Zen 4 core). In fp32 on a CPU, stacking costs more: 64 rows of 16 adapters take 737 us instead
# of 607 us, and 1,024 rows take 7.6 ms instead of 1.7 ms.
_BATCHED_SHARES = 4


def shrink_operands(
    lora_a: Sequence[torch.Tensor],
    seeds: torch.Tensor | None = None,
    dropout_p: Sequence[float] | None = None,
) -> LayerAdapterOperands:
    """Return the operands of a shrink operation: lora_a and dropout.

    The result is a `LayerAdapterOperands` that contains only these operands.
    """
    none, unread = [0.0] * len(lora_a), lora_a[0].new_empty(0)
    return LayerAdapterOperands(list(lora_a), [], [], unread, tuple(dropout_p or none), seeds)


def expand_operands(
    lora_b: Sequence[torch.Tensor],
    lora_bias: Sequence[torch.Tensor | None],
    scaling: torch.Tensor,
) -> LayerAdapterOperands:
    """Return the operands of an expand operation: lora_b, lora_bias, and scaling.

    The result is a `LayerAdapterOperands` that contains only these operands.
    """
    return LayerAdapterOperands([], list(lora_b), list(lora_bias), scaling, (0.0,) * len(lora_b))


class _PositionsOfOneAdapter(NamedTuple):
    """The positions of one adapter's rows in a batch.

    The tuple also identifies the adapter's segment, and contains the range of the adapter's part of
    s and ds.

    Attributes:
        place: Index of the adapter in the operands.
        segment: Index of the adapter's segment, and thus of its rows in `Rows.segment_rows`.
        at: Sorted positions of the adapter's rows.
        rank: Rank of the adapter.
        own: Range of the adapter's part in a one-dimensional s.
    """

    place: int
    segment: int
    at: slice
    rank: int
    own: slice

    def part(self, s_or_ds: torch.Tensor) -> torch.Tensor:
        """Return the part of s or ds that belongs to this adapter's segment.

        The result is a view of shape ``[rows, rank]``, with the rows of the segment and the columns
        of the adapter.
        """
        return (
            s_or_ds[self.at, : self.rank]
            if s_or_ds.dim() == 2
            else s_or_ds[self.own].view(-1, self.rank)
        )


def _adapter_positions(operands: LayerAdapterOperands, rows: Rows) -> list[_PositionsOfOneAdapter]:
    """Return a list of the positions of each adapter's rows.

    It contains one `_PositionsOfOneAdapter` per adapter in the batch, in slot order. Adapters
    without rows and adapters of rank 0 are omitted.
    """
    downs, ups = operands.lora_a, operands.lora_b
    places = range(len(downs or ups))
    place_of = dict(zip(places if operands.slots is None else operands.slots, places, strict=True))
    found, end = list[_PositionsOfOneAdapter](), 0
    for segment, (slot, start, stop) in enumerate(rows.segments):
        place = place_of.get(slot)
        if place is None:
            continue
        rank = downs[place].shape[0] if downs else ups[place].shape[1]
        if rank:
            first, end = end, end + (stop - start) * rank
            own = slice(first, end)
            found.append(_PositionsOfOneAdapter(place, segment, slice(start, stop), rank, own))
    return found


def _apply_dropout(rows: torch.Tensor, operands: LayerAdapterOperands, place: int) -> torch.Tensor:
    """Apply dropout to an adapter's rows.

    Every call uses the same mask.
    """
    if operands.seeds is None or not operands.dropout_p[place]:
        return rows
    check_dropout_dtype(rows.dtype)
    seed = operands.seeds[place : place + 1].cpu()
    return reference.lora_dropout(rows, seed, operands.dropout_p[place])


def forward(
    x: torch.Tensor,
    base: Base,
    operands: LayerAdapterOperands,
    rows: Rows,
    s: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the forward pass for rows that may use different adapters.

    Returns a tuple (output of the layer, s). The output is ``[M, N]``. s is the shrink output,
    which is computed here unless it is given.
    """
    y = base.y
    if base.weight is not None:
        y = products.linear(x, base.weight, base.bias)
    elif y is None:
        raise ValueError("neither a base weight nor a base output is given")
    elif not base.inplace:
        y = y.clone(memory_format=torch.contiguous_format)
    return y, _add_adapter_updates_and_return_s(y, x, operands, rows, s)


def _add_adapter_updates_and_return_s(
    y: torch.Tensor,
    x: torch.Tensor,
    operands: LayerAdapterOperands,
    rows: Rows,
    known_s: torch.Tensor | None,
) -> torch.Tensor:
    """Add each adapter's update to its rows of y in place, and return s.

    The rows of x and y are in their original order, so the rows of an adapter need not be adjacent.
    The rows of s are sorted by adapter. ``known_s`` is s if it has already been computed, or None.
    """
    made, drops = known_s is None, operands.seeds is not None
    shares = _adapter_positions(operands, rows)
    s = x.new_empty(shares[-1].own.stop if shares else 0) if known_s is None else known_s
    batches = x.dtype.itemsize == 2 or not x.is_cpu
    by_rank: dict[int, list[_PositionsOfOneAdapter]] = {}
    for share in shares:
        # A dropout mask belongs to the rows of one adapter, so adapters with dropout run one by
        # one.
        alone = not made or (drops and operands.dropout_p[share.place])
        by_rank.setdefault(-share.place - 1 if alone else share.rank, []).append(share)
    for group in by_rank.values():
        if batches and len(group) >= _BATCHED_SHARES:
            _add_same_rank_updates(y, x, operands, group, rows, s)
            continue
        for share in group:
            place, mine = share.place, rows.segment_rows[share.segment]
            scaling, own = operands.scaling[place], share.part(s)
            if made:
                x_rows = x[mine] if isinstance(mine, slice) else x.index_select(0, mine)
                x_rows = _apply_dropout(x_rows, operands, place) if drops else x_rows
                own.copy_(reference.lora_shrink(x_rows, operands.lora_a[place]))
            if isinstance(mine, slice):
                update = reference.lora_expand_(y[mine], own, operands.lora_b[place], scaling)
            else:
                update = reference.lora_expand(own, operands.lora_b[place], scaling, y.dtype)
            lora_bias = operands.lora_bias[place]
            if lora_bias is not None:
                update += (lora_bias * scaling).to(y.dtype)
            if not isinstance(mine, slice):
                reference.add_rows_(y, mine, update)
    return s


def _add_same_rank_updates(
    y: torch.Tensor,
    x: torch.Tensor,
    operands: LayerAdapterOperands,
    group: list[_PositionsOfOneAdapter],
    rows: Rows,
    s_out: torch.Tensor,
) -> None:
    """Add to y, in place, the updates of adapters that have the same rank.

    The shrink outputs of these adapters are stored in ``s_out``. Two batched products with stacked
    factors compute the updates. If an adapter has fewer rows than another adapter in the group, its
    first row fills the free places, and the results there are discarded. The factors of an adapter
    are never multiplied by the rows of another adapter.
    """
    places = [share.place for share in group]
    lora_a = torch.stack([operands.lora_a[place] for place in places]).to(x.dtype)
    lora_b = torch.stack([operands.lora_b[place] for place in places]).to(x.dtype)
    scaling = torch.stack([operands.scaling[place] for place in places]).view(-1, 1, 1)
    spans = tuple((share.at.start, share.at.stop) for share in group)
    gather, own, targets = _padded_gather_and_scatter_positions(spans, x.device)
    if not rows.is_sorted:
        gather, targets = rows.order[gather], rows.order[targets].long()
    spread = x.index_select(0, gather).view(len(group), -1, x.shape[1])
    # [G, C, K] x [G, K, R], then [G, C, R] x [G, R, N]
    made = products.bmm(spread, lora_a.transpose(1, 2))
    update = products.bmm((made * scaling).to(x.dtype), lora_b.transpose(1, 2))
    for index, place in enumerate(places):
        lora_bias = operands.lora_bias[place]
        if lora_bias is not None:
            update[index] += (lora_bias * operands.scaling[place]).to(x.dtype)
    update = update.flatten(0, 1).index_select(0, own).to(y.dtype)
    reference.add_rows_(y, targets, update)
    for share, its in zip(group, made, strict=True):
        part = share.part(s_out)
        part.copy_(its[: len(part)])


@functools.lru_cache(maxsize=8)
def _padded_gather_and_scatter_positions(
    spans: tuple[tuple[int, int], ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the positions for gathering rows into a padded batch and scattering the results back.

    Each of the G spans is a range of sorted positions of rows. The batch has the shape ``[G, C]``,
    where C is the length of the longest span. A shorter span is padded with copies of its first
    row. The result is a tuple of three tensors: the sorted position of the row at each place of the
    batch, ``[G * C]``; the places that are not padding; and the sorted positions of the rows at
    these places.
    """
    longest = max(stop - start for start, stop in spans)
    rows: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    for index, (start, stop) in enumerate(spans):
        own = list(range(start, stop))
        rows += own + [start] * (longest - len(own))
        places += range(index * longest, index * longest + len(own))
        targets += own
    with torch.inference_mode(False):
        tensors = [torch.tensor(values, device=device) for values in (rows, places, targets)]
    return tensors[0], tensors[1], tensors[2]


def shrink(x: torch.Tensor, layers: Sequence[LayerAdapterOperands], rows: Rows) -> torch.Tensor:
    """Compute the shrink output s, using the lora_a of each row's adapter.

    After dropout, each row of x is multiplied by the ``lora_a.T`` of its own adapter. The layers
    share the input x. For G layers, s is one tensor ``[G, M, R]``. The rows of x may be in any
    order. The rows of s are sorted.
    """
    columns = rank_to_multiple_of_16(
        max(a.shape[0] for operands in layers for a in operands.lora_a)
    )
    s, x = x.new_zeros(len(layers), x.shape[0], columns), rows.sorted(x)
    for own, operands in zip(s, layers, strict=True):
        for share in _adapter_positions(operands, rows):
            mine = _apply_dropout(x[share.at], operands, share.place)
            share.part(own).copy_(reference.lora_shrink(mine, operands.lora_a[share.place]))
    return s


def grad_b(
    dy: torch.Tensor,
    s: torch.Tensor,
    operands: LayerAdapterOperands,
    rows: Rows,
    wants: Sequence[bool],
    wants_ds: bool = True,
) -> tuple[torch.Tensor, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Return the gradients of lora_b, together with those of s and lora_bias.

    The result is a tuple (ds, list of lora_b gradients, list of lora_bias gradients). ds is the
    gradient of s. The list items are None for an adapter without rows.

    ``dy`` is at sorted positions. ``wants`` tells whether the gradients of
    ``lora_a, lora_b, lora_bias`` of each adapter in turn are wanted.
    """
    ds, count = torch.zeros_like(s), len(operands.lora_b)
    d_lora_b: list[torch.Tensor | None] = [None] * count
    d_lora_bias: list[torch.Tensor | None] = [None] * count
    for share in _adapter_positions(operands, rows):
        place = share.place
        lora_b, lora_bias = operands.lora_b[place], operands.lora_bias[place]
        own, scaling = dy[share.at], operands.scaling[place]
        if wants_ds:
            share.part(ds).copy_(reference.lora_ds(own, lora_b, scaling))
        if wants[3 * place + 1]:
            d_lora_b[place] = reference.lora_b_grad(own, share.part(s), lora_b, scaling)
        if wants[3 * place + 2] and lora_bias is not None:
            d_lora_bias[place] = (reference.column_sums(own) * scaling).to(lora_bias.dtype)
    return ds, d_lora_b, d_lora_bias


def grad_x(
    dy: torch.Tensor,
    weight: torch.Tensor | None,
    ds: torch.Tensor,
    operands: LayerAdapterOperands,
    rows: Rows,
) -> torch.Tensor:
    """Return the gradient of x.

    If ``weight`` is None, only the adapters' contribution is returned. ``dy`` is at sorted
    positions. The rows of dx are in their original order.
    """
    if weight is None:
        dx = dy.new_zeros(dy.shape[0], operands.lora_a[0].shape[1])
    else:
        dx = products.mm(dy, reference.cast(weight, dy.dtype))
    for share in _adapter_positions(operands, rows):
        place, at, own = share.place, share.at, share.part(ds)
        factor = operands.lora_a[place].to(ds.dtype)
        if operands.seeds is None or not operands.dropout_p[place]:
            products.addmm_(dx[at], own, factor)
        else:
            dx[at] += _apply_dropout(products.mm(own, factor), operands, place)
    return rows.restored(dx)


def grad_a(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    layers: Sequence[LayerAdapterOperands],
    rows: Rows,
    wants: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Compute the gradients of the adapters' lora_a factors.

    The result is a list with one item for each adapter of each layer. ``wants`` tells which
    gradients are wanted. The item is None for an adapter without rows, and for a gradient that is
    not wanted. The rows of x may be in any order, because the function sorts them by adapter.
    """
    found: list[torch.Tensor | None] = []
    x = rows.sorted(x)
    for inner, operands in zip(ds, layers, strict=True):
        first = len(found)
        found += [None] * len(operands.lora_a)
        for share in _adapter_positions(operands, rows):
            place = share.place
            if wants[first + place]:
                rows_of_it = _apply_dropout(x[share.at], operands, place)
                own = products.mm(share.part(inner).t(), rows_of_it)
                found[first + place] = own.to(operands.lora_a[place].dtype)
    return found
