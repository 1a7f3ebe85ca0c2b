"""Forward passes of mixed batches with packed factors, in a few large matrix products.

`fastlora.ops.torch.packed_plans` chooses the kind of products.

Columns of s that belong to other adapters are overwritten with zeros rather than multiplied by
zero, and factors are finite where products serve several adapters. Therefore no row or adapter
affects another row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.ops.torch import products, reference
from fastlora.ops.torch.packed import PackedLayerFactors
from fastlora.ops.torch.packed_plans import (
    BlockedPlan,
    DensePlan,
    PerSamplePlan,
    Plan,
    SeparateAdapter,
    SeparatePlan,
)


def arrange_and_shrink(
    x: torch.Tensor, pack: PackedLayerFactors, plan: DensePlan | BlockedPlan | PerSamplePlan
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Return a tuple (x with its rows arranged by the plan, list of the slices' shrink outputs s).

    Each row of s is zero in the columns of other adapters. ``x [M, K]`` is returned as it is, or
    with its rows gathered into blocks. The s of a slice is ``[M, rank rows]``,
    ``[blocks, C, rank rows of a block]``, or ``[B, T, unit]``.
    """
    slices, unit = len(pack.lora_b), pack.layout.unit
    if isinstance(plan, DensePlan):
        own_a = pack.lora_a if plan.unit is None else pack.lora_a[plan.unit]
        # [M, K] x [K, slices * rank rows]
        s = products.mm(x, own_a)
        s = s.view(s.shape[0], slices, s.shape[1] // slices)
    elif isinstance(plan, PerSamplePlan):
        # [B, T, K] x [B, K, slices * unit]
        s = products.bmm(x.view(-1, plan.tokens, x.shape[1]), _lora_a_of_units(pack, plan.units))
        s = s.view(-1, plan.tokens, slices, unit)
    else:
        x = x.index_select(0, plan.gather)
        own_a = pack.lora_a[plan.start : plan.start + plan.blocks * plan.coalesced]
        if plan.coalesced > 1:
            rank_rows = own_a.transpose(1, 2).view(plan.blocks, -1, x.shape[1])
            own_a = rank_rows.transpose(1, 2)
        # [blocks, C, K] x [blocks, K, coalesced * slices * unit]
        s = products.bmm(x.view(plan.blocks, plan.longest, -1), own_a)
        s = s.view(plan.blocks, plan.longest, plan.coalesced, slices, unit)
    if plan.other is not None:
        s.masked_fill_(plan.other, 0.0)
    every_s = s.unbind(-2)
    return x, [own.flatten(2) for own in every_s] if isinstance(plan, BlockedPlan) else every_s


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapter: torch.Tensor,
    pack: PackedLayerFactors,
    plan: Plan,
) -> torch.Tensor:
    """Return the output ``[M, N]`` of a linear layer with packed adapters.

    Each row gets the update of its own adapter. The arguments are those of `add_`.
    """
    is_one_slice = len(pack.lora_b) == 1
    if is_one_slice and pack.lora_b[0] is not None and isinstance(plan, BlockedPlan) and plan.exact:
        gathered, (s,) = arrange_and_shrink(x, pack, plan)
        y = products.linear(gathered, weight, bias)
        places = y.view(plan.blocks, plan.longest, y.shape[1])
        products.baddbmm_(places, s, _block_b(pack.lora_b[0], plan))
        return _add_bias(y.index_select(0, plan.place), adapter, pack)
    return add_(products.linear(x, weight, bias), x, adapter, pack, plan)


def add_(
    y: torch.Tensor,
    x: torch.Tensor,
    adapter: torch.Tensor,
    pack: PackedLayerFactors,
    plan: Plan,
) -> torch.Tensor:
    """Add the packed adapters' updates to y in place, and return y.

    Each row gets the update of its own adapter.

    Args:
        y: ``[M, N]``, the outputs of the slices side by side, with columns that are adjacent in
            memory. It may consist of columns of a larger tensor.
        x: ``[M, K]``.
        adapter: The index of each row's adapter in the pack, as for `packed_plans.cached_plan`.
        pack: The packed factors.
        plan: The result of `packed_plans.cached_plan`.
    """
    if isinstance(plan, SeparatePlan):
        _add_separately(y, x, pack, plan)
        return y if pack.lora_bias is None else _add_bias(y, adapter, pack)
    _, every_s = arrange_and_shrink(x, pack, plan)
    parts = (y,) if len(pack.widths) == 1 else y.split_with_sizes(pack.widths, 1)
    for part, s, lora_b in zip(parts, every_s, pack.lora_b, strict=True):
        if lora_b is None:
            continue
        if isinstance(plan, DensePlan):
            # [M, rank rows] x [rank rows, N]
            products.addmm_(part, s, lora_b if plan.unit is None else lora_b[plan.unit])
        elif isinstance(plan, PerSamplePlan):
            # [B, T, unit] x [B, unit, N]
            own_b = lora_b.index_select(0, plan.units)
            products.baddbmm_(part.view(-1, plan.tokens, part.shape[1]), s, own_b)
        else:
            # [blocks, C, rank rows of a block] x [blocks, rank rows of a block, N]
            update = products.bmm(s, _block_b(lora_b, plan))
            part.add_(update.view(-1, part.shape[1]).index_select(0, plan.place))
    return y if pack.lora_bias is None else _add_bias(y, adapter, pack)


def _add_separately(
    y: torch.Tensor, x: torch.Tensor, pack: PackedLayerFactors, plan: SeparatePlan
) -> None:
    """Add the updates of a `SeparatePlan` to y in place."""
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
    y: torch.Tensor, x: torch.Tensor, pack: PackedLayerFactors, own: SeparateAdapter
) -> None:
    """Add the update of one adapter to its rows of y in place."""
    (unit, first), slices = divmod(own.first, pack.layout.unit), len(pack.lora_b)
    dense, every_s = pack.lora_a.dim() == 2, None
    if not dense and own.rank == pack.layout.unit:
        # [M, K] x [K, slices * rank]
        every_s = products.mm(x, pack.lora_a[unit]).split(own.rank, 1)
    parts = (y,) if slices == 1 else y.split(pack.widths, 1)
    for index, (part, lora_b) in enumerate(zip(parts, pack.lora_b, strict=True)):
        if lora_b is None:
            continue
        if every_s is not None:
            s, own_b = every_s[index], lora_b[unit]
        elif dense:
            begin = index * pack.layout.rank_rows + own.first
            s = products.mm(x, pack.lora_a[:, begin : begin + own.rank])
            own_b = lora_b[own.first : own.first + own.rank]
        else:
            begin = index * pack.layout.unit + first
            s = products.mm(x, pack.lora_a[unit, :, begin : begin + own.rank])
            own_b = lora_b[unit, first : first + own.rank]
        # [M, rank] x [rank, N]
        products.addmm_(part, s, own_b)


def _lora_a_of_units(pack: PackedLayerFactors, units: torch.Tensor) -> torch.Tensor:
    """Return the rank rows of lora_a of some units, ``[B, K, slices * unit]``."""
    if pack.lora_a.is_contiguous():
        return pack.lora_a.index_select(0, units)
    return pack.lora_a.transpose(1, 2).index_select(0, units).transpose(1, 2)


def _block_b(lora_b: torch.Tensor, plan: BlockedPlan) -> torch.Tensor:
    """Return the rank rows of lora_b of each block, ``[blocks, rank rows of a block, N]``."""
    own = lora_b[plan.start : plan.start + plan.blocks * plan.coalesced]
    return own if plan.coalesced == 1 else own.view(plan.blocks, -1, lora_b.shape[2])


def _add_bias(y: torch.Tensor, adapter: torch.Tensor, pack: PackedLayerFactors) -> torch.Tensor:
    if pack.lora_bias is None:
        return y
    return y.add_(pack.lora_bias.index_select(0, adapter))
