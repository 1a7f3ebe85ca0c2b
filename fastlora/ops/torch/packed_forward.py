"""Forward passes of mixed batches with packed factors, in a few large matrix products.

`_plan` chooses the kind of products from the rows, rank rows, dtype, and processor:

- DensePlan: every row is multiplied by all rank rows, and only the columns of its own adapter are
  used. No row is moved.
- BlockedPlan: rows are multiplied by the rank rows of a few adapters, in one batched product. Rows
  are gathered once.
- PerSamplePlan: this kind is used if blocks would be uneven and samples are at least as long as the
  largest rank. The tokens of each sample are multiplied by the rank rows of its adapter, in one
  batched product. Factors are gathered, and no row is moved.

Columns of s that belong to other adapters are overwritten with zeros rather than multiplied by
zero, and packed factors are finite. Therefore no row or adapter affects another row.

Measured on one core with AMX, for 64 rows of 64 adapters of rank 16 with K = N = 576, as time
relative to the base product: two products for each adapter take 32 (bf16) and 4.0 (fp32), and
blocks take 4.6 and 2.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlora.ops.rows import Rows
from fastlora.ops.torch import products
from fastlora.ops.torch.packed import WIDEST_BLOCK, PackedLayerFactors, PackedLayout
from fastlora.ops.torch.packed_choice import (
    BatchKind,
    batch_kind,
    coalescing_is_faster,
    dense_is_fastest,
)

# Units are combined until a block has at least this many rows.
_FEW_ROWS = 4
# All blocks have as many places as the longest block has rows. With more places per row of the
# batch than this, blocks cost more than they save.
_MOST_PLACES = {BatchKind.FEW: 2.0, BatchKind.MANY: 1.25, BatchKind.SAMPLES: 1.25}


class DensePlan(NamedTuple):
    """A plan that multiplies every row by the rank rows of all adapters.

    Attributes:
        other: bool ``[M, rank rows]``, the rank rows that belong to other adapters than the row's
            own; None if one adapter applies to every row.
    """

    other: torch.Tensor | None


class BlockedPlan(NamedTuple):
    """A plan that gathers rows into blocks and multiplies each block by a few units of rank rows.

    Attributes:
        blocks: Number of blocks.
        longest: C, the number of places in a block.
        coalesced: Number of units in a block.
        gather: The row at each place, ``[blocks * C]``.
        place: The place of each row, ``[M]``.
        other: bool ``[blocks, C, rank rows]``, the rank rows of the block that belong to other
            adapters than the row's own; None if there are none.
        exact: Whether each place is for a different row.
    """

    blocks: int
    longest: int
    coalesced: int
    gather: torch.Tensor
    place: torch.Tensor
    other: torch.Tensor | None
    exact: bool


class PerSamplePlan(NamedTuple):
    """A plan that multiplies each of B samples of T tokens by the rank rows of its own adapter.

    Attributes:
        units: The unit of each sample's adapter, int64 ``[B]``; any unit for a sample without an
            adapter.
        tokens: T.
        other: bool ``[B, 1, unit]``, the rank rows that belong to other adapters than the sample's
            own; None if there are none.
    """

    units: torch.Tensor
    tokens: int
    other: torch.Tensor | None


Plan = DensePlan | BlockedPlan | PerSamplePlan


def cached_plan(
    rows: Rows,
    layout: PackedLayout,
    dtype: torch.dtype,
    cache: dict[tuple[PackedLayout, int], Plan | None],
) -> Plan | None:
    """Return the plan for a batch's matrix products, or None, and store the result in ``cache``.

    The result is None if separate products for each adapter are faster.
    """
    key = (layout, dtype.itemsize)
    if key not in cache:
        cache[key] = _make_plan(rows, layout, dtype)
    return cache[key]


def _make_plan(rows: Rows, layout: PackedLayout, dtype: torch.dtype) -> Plan | None:
    m, device = rows.m, rows.order.device
    # The index of each row's adapter within the set, or G without one. Blocks are counted on the
    # CPU.
    member = rows.segment_index.cpu()
    first = torch.tensor([*layout.firsts, 0])[member]
    rank = torch.tensor([*layout.ranks, 0])[member]
    kind = batch_kind(m, rows.each)
    if dense_is_fastest(layout.unit, layout.units, dtype):
        at = torch.arange(layout.rank_rows)
        other = (at < first[:, None]) | (at >= (first + rank)[:, None])
        return DensePlan(other.to(device) if other.any() else None)
    long = kind is BatchKind.SAMPLES and rows.each >= layout.unit
    coalesced = 1
    while True:
        plan = _make_blocked_plan(first, rank, layout, coalesced)
        wider = 2 * coalesced
        fits = layout.units % wider == 0 and wider * layout.unit <= WIDEST_BLOCK
        if plan.longest >= _FEW_ROWS or not fits or not coalescing_is_faster(dtype, kind):
            break
        coalesced = wider
    if long and not plan.exact:
        return _make_per_sample_plan(
            first[:: rows.each], rank[:: rows.each], layout, rows.each, device
        )
    if plan.gather.numel() > _MOST_PLACES[kind] * m:
        return None
    gather, place = plan.gather.to(device), plan.place.to(device)
    masks = None if plan.other is None else plan.other.to(device)
    return plan._replace(gather=gather, place=place, other=masks)


def _make_per_sample_plan(
    first: torch.Tensor, rank: torch.Tensor, layout: PackedLayout, tokens: int, device: torch.device
) -> PerSamplePlan:
    unit = layout.unit
    at, start = torch.arange(unit), first % unit
    other = (at < start[:, None]) | (at >= (start + rank)[:, None])
    masks = other.unsqueeze(1).to(device) if other.any() else None
    return PerSamplePlan((first // unit).to(device), tokens, masks)


def _make_blocked_plan(
    first: torch.Tensor, rank: torch.Tensor, layout: PackedLayout, coalesced: int
) -> BlockedPlan:
    """Make a `BlockedPlan`.

    The plan assigns each row a place in its adapter's block. Rows without an adapter fill free
    places.
    """
    m, blocks = first.numel(), layout.units // coalesced
    width = coalesced * layout.unit
    block = first // width
    own = rank > 0
    taken = torch.bincount(block[own], minlength=blocks)
    longest = max(int(taken.max()), -(-m // blocks))
    free = torch.repeat_interleave(torch.arange(blocks), longest - taken)
    block[~own] = free[: int((~own).sum())]
    order = torch.argsort(block, stable=True)
    lengths = torch.bincount(block, minlength=blocks)
    starts = torch.cumsum(lengths, 0) - lengths
    place = torch.empty_like(order)
    in_order = block[order]
    place[order] = in_order * longest + torch.arange(m) - starts[in_order]
    gather = torch.zeros(blocks * longest, dtype=torch.int64)
    gather[place] = torch.arange(m)
    at = torch.arange(width)
    from_block = first - block * width
    others = torch.ones(blocks * longest, width, dtype=torch.bool)
    others[place] = (at < from_block[:, None]) | (at >= (from_block + rank)[:, None])
    other = others.view(blocks, longest, width) if others.any() else None
    exact = blocks * longest == m
    return BlockedPlan(blocks, longest, coalesced, gather, place, other, exact)


def arrange_and_shrink(
    x: torch.Tensor, pack: PackedLayerFactors, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a tuple (x, s): the rows as the plan arranges them, and the shrink output.

    Each row of s is zero in the columns of other adapters. ``x [M, K]`` is returned as it is, or
    with its rows gathered into blocks. s is ``[M, rank rows]``,
    ``[blocks, C, rank rows of a block]``, or ``[B, T, unit]``.
    """
    if isinstance(plan, DensePlan):
        # [M, K] x [K, rank rows]
        s = products.mm(x, pack.lora_a)
    elif isinstance(plan, PerSamplePlan):
        # [B, T, K] x [B, K, unit]
        own_a = pack.lora_a.index_select(0, plan.units)
        s = products.bmm(x.view(-1, plan.tokens, x.shape[1]), own_a.transpose(1, 2))
    else:
        x = x.index_select(0, plan.gather)
        own_a = pack.lora_a.view(plan.blocks, -1, x.shape[1])
        # [blocks, C, K] x [blocks, K, rank rows of a block]
        s = products.bmm(x.view(plan.blocks, plan.longest, -1), own_a.transpose(1, 2))
    return x, s if plan.other is None else s.masked_fill_(plan.other, 0.0)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: Rows,
    pack: PackedLayerFactors,
    plan: Plan,
) -> torch.Tensor:
    """Return the output ``[M, N]`` of a linear layer with packed adapters.

    Each row gets the update of its own adapter.
    """
    if isinstance(plan, BlockedPlan) and plan.exact:
        gathered, s = arrange_and_shrink(x, pack, plan)
        y = products.linear(gathered, weight, bias)
        places = y.view(plan.blocks, plan.longest, y.shape[1])
        products.baddbmm_(places, s, _block_b(pack, plan))
        return _add_bias(y.index_select(0, plan.place), rows, pack)
    return add_(products.linear(x, weight, bias), x, rows, pack, plan)


def add_(
    y: torch.Tensor, x: torch.Tensor, rows: Rows, pack: PackedLayerFactors, plan: Plan
) -> torch.Tensor:
    """Add the packed adapters' updates to ``y [M, N]`` in place, and return y.

    Each row gets the update of its own adapter.
    """
    _, s = arrange_and_shrink(x, pack, plan)
    if isinstance(plan, DensePlan):
        # [M, rank rows] x [rank rows, N]
        products.addmm_(y, s, pack.lora_b)
    elif isinstance(plan, PerSamplePlan):
        # [B, T, unit] x [B, unit, N]
        own_b = pack.lora_b.index_select(0, plan.units)
        products.baddbmm_(y.view(-1, plan.tokens, y.shape[1]), s, own_b)
    else:
        # [blocks, C, rank rows of a block] x [blocks, rank rows of a block, N]
        update = products.bmm(s, _block_b(pack, plan))
        y.add_(update.view(-1, y.shape[1]).index_select(0, plan.place))
    return y if pack.lora_bias is None else _add_bias(y, rows, pack)


def _block_b(pack: PackedLayerFactors, plan: BlockedPlan) -> torch.Tensor:
    return pack.lora_b.view(plan.blocks, -1, pack.lora_b.shape[2])


def _add_bias(y: torch.Tensor, rows: Rows, pack: PackedLayerFactors) -> torch.Tensor:
    if pack.lora_bias is None:
        return y
    return y.add_(pack.lora_bias.index_select(0, rows.segment_index))
