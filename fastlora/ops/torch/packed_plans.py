"""Plans for the matrix products of a mixed batch with packed factors.

A plan chooses the kind of products from the rows, rank rows, dtype, and processor. It serves all
layers whose factors have the same layout. `fastlora.ops.torch.packed` describes rank rows and
units. The kinds of plans are:

- DensePlan: every row is multiplied by all rank rows, and only the columns of its own adapter are
  used. No row is moved.
- PaddedRowBlocksPlan: rows are multiplied by the rank rows of a few adapters, in one batched
  product. Rows are gathered once.
- PerSamplePlan: this kind is used if blocks would be uneven and samples are at least as long as the
  largest rank. The tokens of each sample are multiplied by the rank rows of its adapter, in one
  batched product. Factors are gathered, and no row is moved.
- PerAdapterPlan: each adapter has products of its own. This kind is used if blocks would be uneven
  or would contain many unused rank rows, or if each adapter has many adjacent rows. Adjacent rows
  are not moved. Products of one adapter cannot affect the rows of another adapter, so factors may
  be non-finite.

For at least two adapters with few rows each, in fp32 on a CPU with AVX2 or AVX-512, a `DensePlan`
or a `PaddedRowBlocksPlan` multiplies x by lora_a only. Each row's update is then a sum of its own
rank rows of lora_b (`RowUpdateTerms`), and no row is moved back.

A pack may contain adapters that have no rows in the batch, as the pack of an engine's slots does.
Products then cover only the range of units that the batch uses.

Measured on one core with AMX, for 64 rows of 64 adapters of rank 16 with K = N = 576, as time
relative to the base product: two products for each adapter take 32 (bf16) and 4.0 (fp32), and
blocks take 4.6 and 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fastlora.ops.rows import Rows
from fastlora.ops.torch.packed import (
    ROUNDED_UNITS,
    WIDEST_BLOCK,
    PackedLayerFactors,
    PackedLayout,
)
from fastlora.ops.torch.packed_choice import (
    BatchSizeCategory,
    batch_size_category,
    coalescing_units_is_faster,
    expand_by_embedding_bag_is_faster,
)

# Units are combined until a block has at least this many rows.
_FEW_ROWS = 4
# With at least this many adjacent rows per adapter, products of each adapter cost less than a pass
# that moves the rows.
_MANY_ROWS_EACH = 16
# A call for an adapter takes as long as this many rank rows that no row of the batch uses: 6 us, or
# the time to read 32 rank rows of 576 + 576 elements, or 12 rank rows of 576 + 1536 (one Zen 4
# core).
_UNUSED_RANK_ROWS_EACH = 16
# All blocks have as many places as the longest block has rows. With more places per row of the
# batch than this, and this many more per adapter, blocks cost more than they save. Time that the
# adapters add for 16 rows in 16 slots of rank 16 (SmolLM2's linears, one Zen 4 core): 16.9 ms with
# blocks of 64 places, and 18.8 ms with products for each of 11 adapters.
_MOST_PLACES = {
    BatchSizeCategory.FEW: 2.0,
    BatchSizeCategory.MANY: 1.25,
    BatchSizeCategory.SAMPLES: 1.25,
}
_PLACES_EACH = 4


@dataclass(frozen=True, eq=False)
class RowUpdateTerms:
    """Indices that describe the terms of each row's LoRA update.

    A term is a row of the packed lora_b multiplied by a weight, which is an element of s. The LoRA
    update of a row of y is the sum of one term for each rank row of its adapter. The object stores
    the indices of the lora_b rows and the positions of the weights in s.

    Attributes:
        rank_rows: The index of each term's row in the packed lora_b, int64.
        starts: The first term of each row, int64 ``[M]``.
        weight_positions: The position of each term's weight in the flattened s of one slice, int64.
        width: The number of adjacent columns of s that belong to one slice.
    """

    rank_rows: torch.Tensor
    starts: torch.Tensor
    weight_positions: torch.Tensor
    width: int
    _of_slices: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    def term_weight_positions_in_s(self, slices: int) -> torch.Tensor:
        """Return the position of each term's weight in the flattened s.

        A term's weight is the element of s that multiplies the term's row of the packed lora_b. The
        result is an int64 tensor ``[slices * terms]`` with the positions for each slice in turn.
        Before s is flattened, its shape is ``[..., slices, width]``.
        """
        found = self._of_slices.get(slices)
        if found is None:
            at, column = self.weight_positions // self.width, self.weight_positions % self.width
            first = (at * slices + torch.arange(slices, device="cpu").unsqueeze(1)) * self.width
            found = self._of_slices[slices] = (first + column).flatten()
        return found


class DensePlan(NamedTuple):
    """A plan for applying packed adapters with dense matrix products.

    A dense product multiplies every row of the batch by the factors of all adapters. Only the
    columns of a row's own adapter are used. If the factors are not packed for dense products, the
    batch uses only one unit, and every row is multiplied by the rank rows of this unit alone.

    Attributes:
        other: bool ``[M, 1, rank rows]``, the rank rows that belong to adapters other than the
            row's own; None if one adapter applies to every row, or if ``terms`` is used.
        unit: The only unit that the batch uses, or None if factors are packed for dense products.
        terms: The terms of the expand, or None if it is a matrix product.
    """

    other: torch.Tensor | None
    unit: int | None
    terms: RowUpdateTerms | None = None


class PaddedRowBlocksPlan(NamedTuple):
    """A plan for applying packed adapters with batched matrix products over padded row blocks.

    The rows of the batch are gathered into blocks, which are padded to equal size. One batched
    product multiplies all blocks, each by the rank rows of one or more adjacent units. Each block
    contains the rows of the batch whose adapters are in its units. Rows without an adapter fill
    free places.

    Attributes:
        start: The first unit of the first block.
        blocks: Number of blocks.
        longest: C, the number of places in a block.
        coalesced: Number of units in a block.
        gather: The row at each place, ``[blocks * C]``.
        place: The place of each row, ``[M]``.
        other: bool ``[blocks, C, coalesced, 1, unit]``, the rank rows of the block that belong to
            adapters other than the row's own; None if there are none, or if ``terms`` is used.
        exact: Whether each place is for a different row.
        terms: The terms of the expand, or None if it consists of matrix products.
    """

    start: int
    blocks: int
    longest: int
    coalesced: int
    gather: torch.Tensor
    place: torch.Tensor
    other: torch.Tensor | None
    exact: bool
    terms: RowUpdateTerms | None = None


class PerSamplePlan(NamedTuple):
    """A plan for multiplying each sample by the factors of its own adapter.

    There are B samples of T tokens each.

    Attributes:
        units: The unit of each sample's adapter, int64 ``[B]``; any unit for a sample without an
            adapter.
        tokens: T.
        other: bool ``[B, 1, 1, unit]``, the rank rows that belong to adapters other than the
            sample's own; None if there are none.
    """

    units: torch.Tensor
    tokens: int
    other: torch.Tensor | None


class RowsOfOneAdapter(NamedTuple):
    """The rows of a batch that use the same adapter.

    A `PerAdapterPlan` contains one group of rows for each adapter that adapts the layer and has
    rows in the batch.

    Attributes:
        first: The adapter's first rank row.
        rank: Number of rank rows.
        at: The adapter's rows in the batch if they are adjacent, otherwise the range of its rows
            among the gathered rows.
        is_gathered: Whether the rows are gathered.
    """

    first: int
    rank: int
    at: slice
    is_gathered: bool


class PerAdapterPlan(NamedTuple):
    """A plan for multiplying each adapter's rows by that adapter's factors.

    Attributes:
        adapters: The group of rows of each adapter that adapts the layer and has rows.
        gather: The rows of adapters whose rows are not adjacent, as an int64 tensor. They are
            grouped by adapter.
    """

    adapters: tuple[RowsOfOneAdapter, ...]
    gather: torch.Tensor


Plan = DensePlan | PaddedRowBlocksPlan | PerSamplePlan | PerAdapterPlan
PlanCache = dict[tuple[PackedLayout, torch.dtype, bool], Plan]


def cached_plan(
    rows: Rows, adapter: torch.Tensor, pack: PackedLayerFactors, cache: PlanCache
) -> Plan:
    """Return the plan for a batch's matrix products.

    The plan is looked up in ``cache``. If it is missing, it is created and stored there.

    Args:
        rows: The rows of the batch.
        adapter: The index of each row's adapter in the pack, int64 ``[M]``; the number of adapters
            in the pack for a row without one. If the pack contains the adapters of the batch, it is
            `Rows.segment_index`. If the pack contains the adapters of all slots, it is
            `Rows.slot_index`.
        pack: The packed factors.
        cache: The plans for ``rows`` and ``adapter``.
    """
    key = (pack.layout, pack.lora_a.dtype, pack.is_finite)
    plan = cache.get(key)
    if plan is None:
        plan = cache[key] = _make_plan(rows, adapter, pack)
    return plan


def _make_plan(rows: Rows, adapter: torch.Tensor, pack: PackedLayerFactors) -> Plan:
    m, device, layout, dtype = rows.m, rows.order.device, pack.layout, pack.lora_a.dtype
    adapter = adapter.cpu()  # Blocks are counted on the CPU.
    first = torch.tensor([*layout.firsts, 0], device="cpu")[adapter]
    rank = torch.tensor([*layout.ranks, 0], device="cpu")[adapter]
    kind = batch_size_category(m, rows.each)
    counts = torch.bincount(adapter, minlength=len(layout.ranks)).tolist()
    used = [index for index, own in enumerate(layout.ranks) if own and counts[index]]
    sums_rank_rows = expand_by_embedding_bag_is_faster(m, len(used), layout.unit, dtype, device)
    if pack.is_finite and pack.lora_a.dim() == 2:
        if sums_rank_rows:
            begin = torch.arange(m, device="cpu") * layout.rank_rows + first
            return DensePlan(
                None, None, _make_row_update_terms(begin, first, rank, layout.rank_rows)
            )
        return DensePlan(_mask_outside_row_ranges(layout.rank_rows, first, rank, device), None)
    if not pack.is_finite or not used:
        return _make_per_adapter_plan(rows, adapter, layout)
    if m >= _MANY_ROWS_EACH * len(used):
        per_adapter = _make_per_adapter_plan(rows, adapter, layout)
        if not per_adapter.gather.numel():
            return per_adapter
    coalesces = coalescing_units_is_faster(dtype, kind)
    start, stop = _used_unit_range(used, layout, coalesces)
    unused = (stop - start) * layout.unit - sum(layout.ranks[index] for index in used)
    if unused > _UNUSED_RANK_ROWS_EACH * len(used):
        return _make_per_adapter_plan(rows, adapter, layout)
    if stop - start == 1 and kind is BatchSizeCategory.FEW:
        own = _mask_outside_row_ranges(layout.unit, first - start * layout.unit, rank, device)
        return DensePlan(own, start)
    coalesced = 1
    while True:
        plan = _make_padded_row_blocks_plan(first, rank, layout, (start, stop), coalesced)
        wider = 2 * coalesced
        fits = (stop - start) % wider == 0 and wider * layout.unit <= WIDEST_BLOCK
        if plan.longest >= _FEW_ROWS or not fits or not coalesces:
            break
        coalesced = wider
    if kind is BatchSizeCategory.SAMPLES and rows.each >= layout.unit and not plan.exact:
        return _make_per_sample_plan(
            first[:: rows.each], rank[:: rows.each], layout, rows.each, device
        )
    if plan.gather.numel() > _MOST_PLACES[kind] * m + _PLACES_EACH * len(used):
        return _make_per_adapter_plan(rows, adapter, layout)
    if sums_rank_rows:
        # Units are not coalesced in fp32.
        begin = plan.place * layout.unit + first % layout.unit
        terms = _make_row_update_terms(begin, first, rank, layout.unit)
        return plan._replace(other=None, terms=terms)
    gather, place = plan.gather.to(device), plan.place.to(device)
    masks = None if plan.other is None else plan.other.to(device)
    return plan._replace(gather=gather, place=place, other=masks)


def _make_row_update_terms(
    first_weight_positions: torch.Tensor,
    first_rank_rows: torch.Tensor,
    rank_per_row: torch.Tensor,
    slice_width: int,
) -> RowUpdateTerms:
    """Build the terms that are summed to form the LoRA update of each row in a batch.

    The terms are rank rows of the packed lora_b, weighted by elements of s. Each row has one term
    for each rank row of its adapter.

    Args:
        first_weight_positions: The position in the flattened s of one slice at which each row's
            weights start.
        first_rank_rows: The rank row at which each row's adapter starts.
        rank_per_row: The number of rank rows of each row's adapter, or 0 for a row without an
            adapter.
        slice_width: The `width` of the result.
    """
    starts = torch.cumsum(rank_per_row, 0) - rank_per_row
    within = torch.arange(int(rank_per_row.sum()), device="cpu")
    within -= torch.repeat_interleave(starts, rank_per_row)
    positions, rank_rows = (
        torch.repeat_interleave(own, rank_per_row) + within
        for own in (first_weight_positions, first_rank_rows)
    )
    return RowUpdateTerms(rank_rows, starts, positions, slice_width)


def _mask_outside_row_ranges(
    width: int, first_rank_rows: torch.Tensor, rank_per_row: torch.Tensor, device: torch.device
) -> torch.Tensor | None:
    """Return a mask of the columns outside of each row's range.

    The mask is a bool tensor ``[M, 1, width]``. In each row, only the ``rank_per_row`` columns
    starting at ``first_rank_rows`` are False. Elements of s are set to zero where the mask is True.
    The result is None if no column is outside.
    """
    at, first_rank_rows, rank_per_row = (
        torch.arange(width, device="cpu"),
        first_rank_rows.view(-1, 1, 1),
        rank_per_row.view(-1, 1, 1),
    )
    outside = (at < first_rank_rows) | (at >= first_rank_rows + rank_per_row)
    return outside.to(device) if outside.any() else None


def _used_unit_range(
    used_adapters: list[int], layout: PackedLayout, coalesces: bool
) -> tuple[int, int]:
    """Return the range of rank-row units spanned by the adapters that a batch uses.

    The result is a tuple (start, stop), where stop is the unit after the last one. A unit is a
    group of adjacent rank rows. If units may be coalesced, a large range is extended to full blocks
    where there is room.
    """
    units = [layout.firsts[index] // layout.unit for index in used_adapters]
    start, stop = min(units), max(units) + 1
    if coalesces and stop - start >= ROUNDED_UNITS:
        count = stop - start
        count = min(count + -count % max(WIDEST_BLOCK // layout.unit, 1), layout.units)
        start = min(start, layout.units - count)
        stop = start + count
    return start, stop


def _make_per_adapter_plan(
    rows: Rows, adapter: torch.Tensor, layout: PackedLayout
) -> PerAdapterPlan:
    """Make a `PerAdapterPlan` for multiplying a batch's rows, one adapter at a time."""
    found, gathered, place = list[RowsOfOneAdapter](), list[torch.Tensor](), 0
    for own in rows.segment_rows:
        index = int(adapter[own.start if isinstance(own, slice) else own[0]])
        first, rank = layout.firsts[index], layout.ranks[index]
        if not rank:
            continue
        if isinstance(own, slice):
            found.append(RowsOfOneAdapter(first, rank, own, False))
        else:
            gathered.append(own)
            place += len(own)
            found.append(RowsOfOneAdapter(first, rank, slice(place - len(own), place), True))
    gather = torch.cat(gathered) if gathered else rows.order.new_empty(0, dtype=torch.int64)
    return PerAdapterPlan(tuple(found), gather)


def _make_per_sample_plan(
    first: torch.Tensor, rank: torch.Tensor, layout: PackedLayout, tokens: int, device: torch.device
) -> PerSamplePlan:
    masks = _mask_outside_row_ranges(layout.unit, first % layout.unit, rank, device)
    units = (first // layout.unit).to(device)
    return PerSamplePlan(units, tokens, None if masks is None else masks.unsqueeze(1))


def _make_padded_row_blocks_plan(
    first_rank_rows: torch.Tensor,
    rank_per_row: torch.Tensor,
    layout: PackedLayout,
    unit_range: tuple[int, int],
    units_per_block: int,
) -> PaddedRowBlocksPlan:
    """Make a `PaddedRowBlocksPlan` for batched matrix products over padded row blocks.

    The range of units is divided among the blocks. Each row of the batch gets a place in the block
    whose units contain its adapter's rank rows. Rows without an adapter fill free places.

    Args:
        first_rank_rows: The rank row at which each row's adapter starts.
        rank_per_row: The number of rank rows of each row's adapter, or 0 for a row without an
            adapter.
        layout: The layout of the packed factors.
        unit_range: The range of units that the blocks cover.
        units_per_block: The number of adjacent units that each block covers.
    """
    (start, stop), m = unit_range, first_rank_rows.numel()
    blocks, width = (stop - start) // units_per_block, units_per_block * layout.unit
    first_rank_rows = first_rank_rows - start * layout.unit
    own = rank_per_row > 0
    block = torch.where(own, first_rank_rows // width, 0)
    taken = torch.bincount(block[own], minlength=blocks)
    longest = max(int(taken.max()), -(-m // blocks))
    free = torch.repeat_interleave(torch.arange(blocks, device="cpu"), longest - taken)
    block[~own] = free[: int((~own).sum())]
    order = torch.argsort(block, stable=True)
    lengths = torch.bincount(block, minlength=blocks)
    starts = torch.cumsum(lengths, 0) - lengths
    place = torch.empty_like(order)
    in_order = block[order]
    row, at = torch.arange(m, device="cpu"), torch.arange(width, device="cpu")
    place[order] = in_order * longest + row - starts[in_order]
    gather = place.new_zeros(blocks * longest)
    gather[place] = row
    from_block = first_rank_rows - block * width
    # Results at places without a row are not read.
    others = torch.zeros(blocks * longest, width, dtype=torch.bool, device="cpu")
    others[place] = (at < from_block[:, None]) | (at >= (from_block + rank_per_row)[:, None])
    shape = (blocks, longest, units_per_block, 1, layout.unit)
    other = others.view(shape) if others.any() else None
    exact = blocks * longest == m
    return PaddedRowBlocksPlan(start, blocks, longest, units_per_block, gather, place, other, exact)
