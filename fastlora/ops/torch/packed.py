"""Packed factors: for each layer, two tensors with the factors of all adapters of a batch.

If a set of adapters is used repeatedly, as in every decode step, the factors of each layer are
stored as two tensors, so that one product serves many adapters. A rank row is a row of lora_a or a
column of lora_b. Rank rows are arranged in units of as many as the largest rank. Adapters of
smaller ranks share a unit.

`fastlora.ops.torch.packed_forward` computes the forward pass.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastlora.ops.factors import Slots
from fastlora.ops.torch.packed_choice import BatchKind, coalescing_is_faster, dense_is_fastest

# Widest block of rank rows in one product. Units are combined into blocks up to this width.
WIDEST_BLOCK = 64
# With at least this many units, their number may be rounded up.
_ROUNDED_UNITS = 8


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """The positions of each adapter's rank rows in packed factors.

    Layers on which the adapters have the same ranks share a layout.

    Attributes:
        unit: Number of rank rows in a unit.
        units: Number of units.
        firsts: The first rank row of each adapter of the set, in the set's order.
        ranks: Number of rank rows of each adapter, or 0 for an adapter that does not adapt the
            layer.
    """

    unit: int
    units: int
    firsts: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def rank_rows(self) -> int:
        """The total number of rank rows.

        Unused rows, which contain zeros, are included.
        """
        return self.unit * self.units


@functools.lru_cache(maxsize=256)
def first_fit_layout(ranks: tuple[int, ...], coalesced: bool = False) -> PackedLayout:
    """Return a layout that assigns each adapter to the first unit with enough free rank rows.

    The largest adapters are assigned first.

    If ``coalesced`` is set, units will be combined into blocks, and a large number of units is
    rounded up to full blocks.
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
    if not coalesced:
        return PackedLayout(unit, units, tuple(firsts), ranks)
    rounded = units
    if units >= _ROUNDED_UNITS:
        rounded += -units % max(WIDEST_BLOCK // unit, 1)
    if rounded == units:
        return first_fit_layout(ranks, False)
    return PackedLayout(unit, rounded, tuple(firsts), ranks)


class PackedLayerFactors(NamedTuple):
    """The packed factors of a set of adapters on one layer.

    Attributes:
        layout: Position of the rank rows.
        lora_a: ``[K, rank rows]`` for dense products, otherwise ``[units, unit, K]``.
        lora_b: Scaled; ``[rank rows, N]`` for dense products, otherwise ``[units, unit, N]``.
        lora_bias: ``[G + 1, N]``, scaled, with zeros in the last row; or None.
    """

    layout: PackedLayout
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    lora_bias: torch.Tensor | None


def pack_layer_factors(
    slots: Slots, dtype: torch.dtype, kind: BatchKind
) -> PackedLayerFactors | None:
    """Pack the factors of a layer's adapters for a kind of batch.

    The packed factors have the dtype ``dtype``. The result is None if no adapter has factors, or if
    any factor is not finite, because one product serves several adapters and would carry a NaN from
    one adapter to the others.
    """
    layout = _layout(slots, dtype, kind)
    if layout is None:
        return None
    some = next(factors for factors in slots if factors is not None)
    (n, _), (_, k), device = some.lora_b.shape, some.lora_a.shape, some.lora_a.device
    dense = dense_is_fastest(layout.unit, layout.units, dtype)
    shape = (k, layout.units, layout.unit) if dense else (layout.units, layout.unit, k)
    lora_a = torch.zeros(shape, dtype=dtype, device=device)
    by_unit = lora_a.permute(1, 2, 0) if dense else lora_a
    lora_b = torch.zeros(layout.units, layout.unit, n, dtype=dtype, device=device)
    lora_bias = None
    if any(f is not None and f.lora_bias is not None for f in slots):
        lora_bias = torch.zeros(len(slots) + 1, n, dtype=dtype, device=device)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for at, own in enumerate(slots):
        if own is None:
            continue
        unit, first = divmod(layout.firsts[at], layout.unit)
        rows = slice(first, first + layout.ranks[at])
        by_unit[unit, rows] = own.lora_a
        lora_b[unit, rows] = own.lora_b.t().to(exact) * own.scaling
        if lora_bias is not None and own.lora_bias is not None:
            lora_bias[at] = own.lora_bias.to(exact) * own.scaling
    if not (torch.isfinite(lora_a).all() and torch.isfinite(lora_b).all()):
        return None
    if dense:
        lora_a, lora_b = lora_a.flatten(1), lora_b.flatten(0, 1)
    return PackedLayerFactors(layout, lora_a, lora_b, lora_bias)


def _layout(slots: Slots, dtype: torch.dtype, kind: BatchKind) -> PackedLayout | None:
    ranks = tuple(0 if f is None else f.lora_a.shape[0] for f in slots)
    return first_fit_layout(ranks, coalescing_is_faster(dtype, kind)) if any(ranks) else None


def pack_fits(pack: PackedLayerFactors, dtype: torch.dtype, kind: BatchKind) -> bool:
    """Return whether packed factors have the layout for a dtype and a kind of batch.

    Factors that were packed for another kind of batch can have the same layout.
    """
    return first_fit_layout(pack.layout.ranks, coalescing_is_faster(dtype, kind)) is pack.layout
