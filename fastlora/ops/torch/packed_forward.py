"""Forward passes of mixed batches with packed factors, in a few large matrix products.

`fastlora.ops.torch.packed_plans` chooses the kind of products.

Columns of s that belong to other adapters are not used, or overwritten with zeros rather than
multiplied by zero. Factors are finite where products serve several adapters. Therefore no row or
adapter affects another row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.ops.torch import products, reference
from fastlora.ops.torch.packed import PackedLayerFactors
from fastlora.ops.torch.packed_plans import (
    DensePlan,
    PaddedRowBlocksPlan,
    PerAdapterPlan,
    PerSamplePlan,
    Plan,
    RowsOfOneAdapter,
    RowUpdateTerms,
)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapter_per_row: torch.Tensor,
    pack: PackedLayerFactors,
    plan: Plan,
) -> torch.Tensor:
    """Return the output of a linear layer with packed adapters.

    The output has the shape ``[M, N]``. Each row gets the update of its own adapter. The arguments
    x, ``adapter_per_row``, ``pack``, and ``plan`` are those of `add_`.
    """
    lora_b = pack.lora_b[0] if len(pack.lora_b) == 1 else None
    if (
        lora_b is not None
        and isinstance(plan, PaddedRowBlocksPlan)
        and plan.exact
        and plan.terms is None
    ):
        x, s = _arrange_rows_and_shrink(x, pack, plan)
        (s,) = _zero_other_columns(s, pack, plan)
        y = products.linear(x, weight, bias)
        places = y.view(plan.blocks, plan.longest, y.shape[1])
        products.baddbmm_(places, s, _view_lora_b_per_row_block(lora_b, pack, plan))
        return _add_bias(y.index_select(0, plan.place), adapter_per_row, pack)
    return add_(products.linear(x, weight, bias), x, adapter_per_row, pack, plan)


def add_(
    y: torch.Tensor,
    x: torch.Tensor,
    adapter_per_row: torch.Tensor,
    pack: PackedLayerFactors,
    plan: Plan,
) -> torch.Tensor:
    """Add the update of each row's adapter to y in place, using packed factors.

    The function returns y.

    Args:
        y: ``[M, N]``, the outputs of the slices side by side, with columns that are adjacent in
            memory. It may consist of columns of a larger tensor.
        x: ``[M, K]``.
        adapter_per_row: The index of each row's adapter in the pack, as for
            `packed_plans.cached_plan`.
        pack: The packed factors.
        plan: The result of `packed_plans.cached_plan`.
    """
    if isinstance(plan, PerAdapterPlan):
        _add_per_adapter(y, x, pack, plan)
        return y if pack.lora_bias is None else _add_bias(y, adapter_per_row, pack)
    _, s = _arrange_rows_and_shrink(x, pack, plan)
    parts = (y,) if len(pack.widths) == 1 else y.split_with_sizes(pack.widths, 1)
    terms = None if isinstance(plan, PerSamplePlan) else plan.terms
    if terms is None:
        every_s = _zero_other_columns(s, pack, plan)
        for part, own_s, lora_b in zip(parts, every_s, pack.lora_b, strict=True):
            if lora_b is not None:
                _add_products(part, own_s, lora_b, pack, plan)
    else:
        _add_weighted_rank_rows_of_own_adapter(parts, s, pack, terms)
    return y if pack.lora_bias is None else _add_bias(y, adapter_per_row, pack)


def _arrange_rows_and_shrink(
    x: torch.Tensor, pack: PackedLayerFactors, plan: DensePlan | PaddedRowBlocksPlan | PerSamplePlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arrange the rows of x as the plan requires, and compute the shrink output.

    The shrink output is the product of the arranged rows and the packed lora_a. The result is the
    tuple (x, s). ``x [M, K]`` is returned as it is, or with its rows gathered into blocks. s is the
    shrink output of all slices, ``[M, slices * rank rows]`` (with the rank rows of all units or of
    one unit), ``[blocks, C, coalesced * slices * unit]``, or ``[B, T, slices * unit]``. The output
    s also contains products with rank rows of other adapters.
    """
    if isinstance(plan, DensePlan):
        # [M, K] x [K, slices * rank rows]
        return x, products.mm(x, pack.lora_a if plan.unit is None else pack.lora_a[plan.unit])
    if isinstance(plan, PerSamplePlan):
        # [B, T, K] x [B, K, slices * unit]
        own_a = _lora_a_of_units(pack, plan.units)
        return x, products.bmm(x.view(-1, plan.tokens, x.shape[1]), own_a)
    x, units = x.index_select(0, plan.gather), plan.blocks * plan.coalesced
    is_whole = units == pack.layout.units
    own_a = pack.lora_a if is_whole else pack.lora_a[plan.start : plan.start + units]
    if plan.coalesced > 1:
        rank_rows = own_a.transpose(1, 2).view(plan.blocks, -1, x.shape[1])
        own_a = rank_rows.transpose(1, 2)
    # [blocks, C, K] x [blocks, K, coalesced * slices * unit]
    return x, products.bmm(x.view(plan.blocks, plan.longest, -1), own_a)


def _zero_other_columns(
    s: torch.Tensor, pack: PackedLayerFactors, plan: DensePlan | PaddedRowBlocksPlan | PerSamplePlan
) -> Sequence[torch.Tensor]:
    """In each row of s, zero the columns that do not belong to the row's adapter.

    s is overwritten. The result contains s for each slice, with the shape ``[M, rank rows]`` (of
    all units or one), ``[blocks, C, rank rows of a block]``, or ``[B, T, unit]``.
    """
    is_dense = isinstance(plan, DensePlan) and plan.unit is None
    width = pack.layout.rank_rows if is_dense else pack.layout.unit
    if isinstance(plan, PaddedRowBlocksPlan):
        shape = (plan.blocks, plan.longest, plan.coalesced, len(pack.lora_b), width)
        s = s.view(shape)
    else:
        s = s.view(*s.shape[:-1], len(pack.lora_b), width)
    if plan.other is not None:
        s.masked_fill_(plan.other, 0.0)
    every_s = s.unbind(-2)
    return [own.flatten(2) for own in every_s] if isinstance(plan, PaddedRowBlocksPlan) else every_s


def _add_weighted_rank_rows_of_own_adapter(
    y_slices: Sequence[torch.Tensor],
    s: torch.Tensor,
    pack: PackedLayerFactors,
    terms: RowUpdateTerms,
) -> None:
    """Add each row's LoRA update to y in place, as a weighted sum of rows of the packed lora_b.

    The sum for a row of y is over the rank rows of the row's adapter in the packed lora_b. The
    weights are the row's elements of s in the columns that belong to this adapter.

    Args:
        y_slices: For each slice, y ``[M, N]``.
        s: The result of `_arrange_rows_and_shrink`.
        pack: The packed factors.
        terms: The terms of each row.
    """
    slices = len(y_slices)
    at = terms.weight_positions if slices == 1 else terms.term_weight_positions_in_s(slices)
    # [slices * terms]
    weights = s.take(at)
    by_slice = weights.chunk(slices) if slices > 1 else (weights,)
    for part, own, lora_b in zip(y_slices, by_slice, pack.lora_b, strict=True):
        if lora_b is not None:
            # F.embedding_bag spends as much time on checking its arguments as on such a sum.
            update, *_ = torch.embedding_bag(
                lora_b, terms.rank_rows, terms.starts, per_sample_weights=own
            )
            part.add_(update)


def _add_products(
    y: torch.Tensor,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    pack: PackedLayerFactors,
    plan: DensePlan | PaddedRowBlocksPlan | PerSamplePlan,
) -> None:
    """Add the matrix products of s and lora_b to y in place.

    The arguments are those of one slice. y has the shape ``[M, N]``.
    """
    unit = pack.layout.unit
    if isinstance(plan, DensePlan):
        own_b = lora_b if plan.unit is None else lora_b[plan.unit * unit : (plan.unit + 1) * unit]
        # [M, rank rows] x [rank rows, N]
        products.addmm_(y, s, own_b)
    elif isinstance(plan, PerSamplePlan):
        own_b = lora_b.view(-1, unit, y.shape[1]).index_select(0, plan.units)
        # [B, T, unit] x [B, unit, N]
        products.baddbmm_(y.view(-1, plan.tokens, y.shape[1]), s, own_b)
    else:
        # [blocks, C, rank rows of a block] x [blocks, rank rows of a block, N]
        update = products.bmm(s, _view_lora_b_per_row_block(lora_b, pack, plan))
        y.add_(update.view(-1, y.shape[1]).index_select(0, plan.place))


def _add_per_adapter(
    y: torch.Tensor, x: torch.Tensor, pack: PackedLayerFactors, plan: PerAdapterPlan
) -> None:
    """Add the update of each adapter to its rows of y in place, one adapter at a time."""
    update = gathered = None
    if plan.gather.numel():
        gathered, update = x.index_select(0, plan.gather), y.new_zeros(len(plan.gather), y.shape[1])
    for own in plan.adapters:
        if own.is_gathered and gathered is not None and update is not None:
            _add_adapter(update[own.at], gathered[own.at], pack, own)
        else:
            _add_adapter(y[own.at], x[own.at], pack, own)
    if update is not None:
        reference.add_rows_(y, plan.gather, update)


def _add_adapter(
    y: torch.Tensor, x: torch.Tensor, pack: PackedLayerFactors, own: RowsOfOneAdapter
) -> None:
    """Add the update of one adapter to its rows of y in place."""
    (unit, first), slices = divmod(own.first, pack.layout.unit), len(pack.lora_b)
    dense, every_s = pack.lora_a.dim() == 2, None
    if not dense and own.rank == pack.layout.unit:
        # [M, K] x [K, slices * rank]
        every_s = products.mm(x, pack.lora_a[unit]).split(own.rank, 1)
    parts = (y,) if slices == 1 else y.split_with_sizes(pack.widths, 1)
    for index, (part, lora_b) in enumerate(zip(parts, pack.lora_b, strict=True)):
        if lora_b is None:
            continue
        if every_s is not None:
            s = every_s[index]
        elif dense:
            begin = index * pack.layout.rank_rows + own.first
            s = products.mm(x, pack.lora_a[:, begin : begin + own.rank])
        else:
            begin = index * pack.layout.unit + first
            s = products.mm(x, pack.lora_a[unit, :, begin : begin + own.rank])
        # [M, rank] x [rank, N]
        products.addmm_(part, s, lora_b[own.first : own.first + own.rank])


def _lora_a_of_units(pack: PackedLayerFactors, unit_indices: torch.Tensor) -> torch.Tensor:
    """Gather the packed lora_a of the given units.

    A unit is a group of adjacent rank rows, which can belong to several adapters. For B indices in
    ``unit_indices``, the result has the shape ``[B, K, slices * unit]``.
    """
    if pack.lora_a.is_contiguous():
        return pack.lora_a.index_select(0, unit_indices)
    return pack.lora_a.transpose(1, 2).index_select(0, unit_indices).transpose(1, 2)


def _view_lora_b_per_row_block(
    lora_b: torch.Tensor, pack: PackedLayerFactors, plan: PaddedRowBlocksPlan
) -> torch.Tensor:
    """Return a view of the packed lora_b that contains one matrix for each block of rows.

    The blocks are those of the plan. The matrix of a block consists of the rank rows by which the
    block is multiplied, which are those of the block's units. The view has the shape
    ``[blocks, rank rows per block, N]``.
    """
    unit, rank_rows = pack.layout.unit, plan.coalesced * pack.layout.unit
    own = lora_b[plan.start * unit : plan.start * unit + plan.blocks * rank_rows]
    return own.view(plan.blocks, rank_rows, lora_b.shape[1])


def _add_bias(
    y: torch.Tensor, adapter_per_row: torch.Tensor, pack: PackedLayerFactors
) -> torch.Tensor:
    if pack.lora_bias is None:
        return y
    return y.add_(pack.lora_bias.index_select(0, adapter_per_row))
