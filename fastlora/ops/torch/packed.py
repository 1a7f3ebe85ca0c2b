"""Packed factors: tensors with the factors of all adapters on one layer.

If adapters are used repeatedly, as in every decode step, the factors of each layer are stored
together, so that one product serves many adapters. A rank row is a row of lora_a or a column of
lora_b. Rank rows are arranged in units. The number of rank rows in a unit is the largest rank.

`pack_layer_factors_if_finite` packs a set of adapters once, and adapters of smaller ranks share a
unit. `fastlora.ops.torch.packed_slots` packs adapters that change one by one. A layer may consist
of several slices, such as q, k, and v: layers with the same input and with outputs side by side.
`fastlora.ops.torch.packed_forward` computes the forward pass.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastlora.ops.factors import Factors, Slots
from fastlora.ops.torch.packed_choice import (
    BatchSizeCategory,
    coalescing_units_is_faster,
    column_major_lora_a_is_faster,
    dense_products_are_fastest,
)

# Widest block of rank rows in one product. Units are combined into blocks up to this width.
WIDEST_BLOCK = 64
# With at least this many units, their number may be rounded up.
ROUNDED_UNITS = 8


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """The layout of adapters' factors in packed tensors.

    The factors of several adapters are packed together. The layout states which rank rows of the
    packed factors belong to each adapter. A rank row is a row of lora_a or a column of lora_b.
    Adjacent rank rows form units of equal size. Layers on which the adapters have the same ranks
    share a layout.

    Attributes:
        unit: Number of rank rows in a unit.
        units: Number of units.
        firsts: The first rank row of each adapter.
        ranks: Number of rank rows of each adapter, or 0 for an adapter that does not adapt the
            layer.
    """

    unit: int
    units: int
    firsts: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def rank_rows(self) -> int:
        """The total number of rank rows in the packed factors.

        A rank row is a row of lora_a and a column of lora_b. Unused rank rows, which contain zeros,
        are counted too.
        """
        return self.unit * self.units


@functools.lru_cache(maxsize=256)
def first_fit_layout(ranks: tuple[int, ...], round_units_to_blocks: bool = False) -> PackedLayout:
    """Return the first-fit layout for adapters with the given ranks.

    Each adapter is placed in the first unit with enough unused rank rows. The adapters of the
    largest ranks are placed first.

    If ``round_units_to_blocks`` is set, units will be combined into blocks, and a large number of
    units is rounded up to full blocks.
    """
    unit = max(ranks)
    used: list[int] = []
    firsts = [0] * len(ranks)
    for index in sorted(range(len(ranks)), key=lambda i: -ranks[i]):
        rank = ranks[index]
        if not rank:
            continue
        roomy = (i for i, taken in enumerate(used) if taken + rank <= unit)
        # An adapter of the largest rank fills a unit, so no search is needed.
        at = len(used) if rank == unit else next(roomy, len(used))
        if at == len(used):
            used.append(0)
        firsts[index] = at * unit + used[at]
        used[at] += rank
    units = len(used)
    if not round_units_to_blocks:
        return PackedLayout(unit, units, tuple(firsts), ranks)
    rounded = units
    if units >= ROUNDED_UNITS:
        rounded += -units % max(WIDEST_BLOCK // unit, 1)
    if rounded == units:
        return first_fit_layout(ranks, False)
    return PackedLayout(unit, rounded, tuple(firsts), ranks)


class PackedLayerFactors(NamedTuple):
    """The factors of a layer's adapters, packed together.

    The adapters are those of a batch, or those of all slots.

    Attributes:
        layout: Position of the rank rows. It applies to each slice.
        lora_a: ``[K, slices * rank rows]`` for dense products, otherwise
            ``[units, K, slices * unit]``, which may be a transposed view.
        lora_b: For each slice the scaled lora_b, ``[rank rows, N]``, or None if no adapter adapts
            the slice.
        lora_bias: ``[G + 1, N]``, scaled, with zeros in the last row; or None.
        widths: The number of outputs N of each slice.
        is_finite: Whether all factors are finite.
    """

    layout: PackedLayout
    lora_a: torch.Tensor
    lora_b: tuple[torch.Tensor | None, ...]
    lora_bias: torch.Tensor | None
    widths: tuple[int, ...]
    is_finite: bool = True


def pack_layer_factors_if_finite(
    slots: Slots, dtype: torch.dtype, kind: BatchSizeCategory
) -> PackedLayerFactors | None:
    """Pack the factors of a layer's adapters together if all of the factors are finite.

    The result is None if any factor is not finite, or if no adapter has factors. Non-finite factors
    are not packed because one product serves several adapters and would carry a NaN from one
    adapter to the others.

    The packed factors have the dtype ``dtype``. ``kind`` is the size category of the batch, and
    affects only the layout of the packed factors.
    """
    layout = _layout(slots, dtype, kind)
    if layout is None:
        return None
    some = next(factors for factors in slots if factors is not None)
    (n, _), (_, k), device = some.lora_b.shape, some.lora_a.shape, some.lora_a.device
    is_dense = dense_products_are_fastest(layout.unit, layout.units, dtype, every_unit_is_used=True)
    lora_a, rank_rows_a = zeros_and_view_for_packed_lora_a(layout, 1, k, dtype, device, is_dense)
    lora_b = torch.zeros(layout.rank_rows, n, dtype=dtype, device=device)
    lora_bias = None
    if any(f is not None and f.lora_bias is not None for f in slots):
        lora_bias = torch.zeros(len(slots) + 1, n, dtype=dtype, device=device)
    for at, own in enumerate(slots):
        if own is None:
            continue
        first, rank = layout.firsts[at], layout.ranks[at]
        unit, in_unit = divmod(first, layout.unit)
        rank_rows_a[unit, 0, in_unit : in_unit + rank] = own.lora_a
        lora_b[first : first + rank] = unrounded_scaled_lora_b_rank_rows(own, dtype)
        if lora_bias is not None and own.lora_bias is not None:
            lora_bias[at] = own.lora_bias.to(_dtype_for_applying_scaling(dtype)) * own.scaling
    if not (torch.isfinite(lora_a).all() and torch.isfinite(lora_b).all()):
        return None
    return PackedLayerFactors(layout, lora_a, (lora_b,), lora_bias, (n,))


def _dtype_for_applying_scaling(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the scaling is applied to factors.

    The scaled factors are then rounded to ``dtype``.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def unrounded_scaled_lora_b_rank_rows(factors: Factors, packed_dtype: torch.dtype) -> torch.Tensor:
    """Return the scaled rank rows of lora_b, not yet rounded to ``packed_dtype``.

    The result is the transpose of lora_b multiplied by the scaling, and has the shape ``[R, N]``.
    Its dtype is fp64 if ``packed_dtype`` is fp64, and fp32 otherwise.
    """
    rows = factors.lora_b.t().to(_dtype_for_applying_scaling(packed_dtype))
    scaling = factors.scaling
    if isinstance(scaling, torch.Tensor) and scaling.dim():
        scaling = scaling.unsqueeze(1)
    return rows * scaling


def zeros_and_view_for_packed_lora_a(
    layout: PackedLayout,
    slices: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device | None,
    for_dense_products: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate zeros for the packed lora_a, and return them with a view for writing the factors.

    The tensor has the layout that the matrix products use. The shape and the memory layout of the
    tensor depend on whether the packed factors are for dense products. The view always has the
    shape ``[units, slices, unit, K]``.
    """
    unit, units = layout.unit, layout.units
    if for_dense_products:
        zeros = torch.zeros(k, slices, units, unit, dtype=dtype, device=device)
        return zeros.flatten(1), zeros.permute(2, 1, 3, 0)
    if column_major_lora_a_is_faster(slices * unit, dtype):
        zeros = torch.zeros(units, k, slices, unit, dtype=dtype, device=device)
        return zeros.flatten(2), zeros.permute(0, 2, 3, 1)
    zeros = torch.zeros(units, slices, unit, k, dtype=dtype, device=device)
    return zeros.flatten(1, 2).transpose(1, 2), zeros


def _layout(slots: Slots, dtype: torch.dtype, kind: BatchSizeCategory) -> PackedLayout | None:
    ranks = tuple(0 if f is None else f.lora_a.shape[0] for f in slots)
    return first_fit_layout(ranks, coalescing_units_is_faster(dtype, kind)) if any(ranks) else None


def has_layout_for(pack: PackedLayerFactors, dtype: torch.dtype, kind: BatchSizeCategory) -> bool:
    """Return whether packed factors have the layout for the given dtype and kind of batch.

    ``kind`` is the size category of the batch. Factors that were packed for another category can
    have the same layout.
    """
    return (
        first_fit_layout(pack.layout.ranks, coalescing_units_is_faster(dtype, kind)) is pack.layout
    )
