"""Packed factors: those of all adapters of a batch side by side, layer by layer.

A set of adapters that comes again, as in every step of a decode, keeps the factors of each layer as
two tensors, so that one product serves many adapters. Rank rows stand in units as long as the
largest rank; adapters of smaller ranks share a unit. Layers fed by the same tensor keep their
lora_a together, and their shrink is one product.

Nothing here computes a forward; `fastlora.ops.torch.packed_forward` does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastlora.ops.factors import Factors, Slots
from fastlora.ops.torch.packed_choice import RowsKind, is_coalesced, is_dense

# Widest block of rank rows that one product takes; units are coalesced up to it.
WIDEST_BLOCK = 64
# From so many units on, their number may be rounded up.
_ROUNDED_UNITS = 8


class Place(NamedTuple):
    """Where an adapter's rank rows stand: ``rank`` rows from ``first`` on; rank 0 has none."""

    first: int
    rank: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Places of a set of adapters, the same for all layers on which they have these ranks.

    Attributes:
        unit: Rank rows in a unit.
        units: Their number.
        places: One for each adapter of the set, in its order.
    """

    unit: int
    units: int
    places: tuple[Place, ...]

    @property
    def rank_rows(self) -> int:
        """All rank rows, those that stay zeros included."""
        return self.unit * self.units


@functools.lru_cache(maxsize=256)
def make_layout(ranks: tuple[int, ...], coalesced: bool = False) -> Layout:
    """Puts adapters into units, largest first, each into the first unit with room for it.

    Their number is rounded up where they are many and will be coalesced.
    """
    unit = max(ranks)
    used: list[int] = []
    places = [Place(0, 0)] * len(ranks)
    for index in sorted(range(len(ranks)), key=lambda i: -ranks[i]):
        rank = ranks[index]
        if not rank:
            continue
        roomy = (i for i, taken in enumerate(used) if taken + rank <= unit)
        # An adapter of the largest rank fills a unit: no search for it.
        at = len(used) if rank == unit else next(roomy, len(used))
        if at == len(used):
            used.append(0)
        places[index] = Place(at * unit + used[at], rank)
        used[at] += rank
    units = len(used)
    if not coalesced:
        return Layout(unit, units, tuple(places))
    rounded = units
    if units >= _ROUNDED_UNITS:
        rounded += -units % max(WIDEST_BLOCK // unit, 1)
    return make_layout(ranks, False) if rounded == units else Layout(unit, rounded, tuple(places))


class LayerPack(NamedTuple):
    """A set's factors on one layer.

    Attributes:
        layout: Of the rank rows.
        lora_a: Of L layers fed by the same tensor: ``[K, L * rank rows]`` for dense products; else
            ``[units, L, unit, K]``.
        member: This layer's place among the L.
        members: Numbers of the L layers.
        lora_b: Times the scaling, ``[rank rows, N]`` for dense products, else ``[units, unit, N]``.
        lora_bias: ``[G + 1, N]``, times the scaling, zeros last; or None.
    """

    layout: Layout
    lora_a: torch.Tensor
    member: int
    members: tuple[int, ...]
    lora_b: torch.Tensor
    lora_bias: torch.Tensor | None


def pack_layers(
    numbers: Sequence[int],
    layers: Sequence[Slots],
    dtype: torch.dtype,
    kind: RowsKind,
) -> list[LayerPack | None]:
    """Packs layers that are fed by the same tensor.

    Args:
        numbers: The layers' numbers.
        layers: The adapters of the set on each layer.
        dtype: Of x, which factors are rounded to.
        kind: Of batch that they are for.

    Returns:
        A pack for each layer; None where no adapter has factors, or some are not finite: a product
        that serves several adapters would carry a NaN from one to the others.
    """
    by_layout: dict[Layout | None, list[int]] = {}
    for index, slots in enumerate(layers):
        by_layout.setdefault(_layout(slots.own, dtype, kind), []).append(index)
    packs: list[LayerPack | None] = [None] * len(layers)
    for layout, indices in by_layout.items():
        if layout is not None:
            members = tuple(numbers[index] for index in indices)
            own = [layers[index].own for index in indices]
            found = _pack_siblings(layout, members, own, dtype)
            for index, pack in zip(indices, found, strict=True):
                packs[index] = pack
    return packs


def _pack_siblings(
    layout: Layout,
    members: tuple[int, ...],
    layers: Sequence[Sequence[Factors | None]],
    dtype: torch.dtype,
) -> list[LayerPack] | list[None]:
    """`pack_layers` for layers of one layout."""
    present = next(f for f in layers[0] if f is not None)
    k, device = present.lora_a.shape[1], present.lora_a.device
    dense, many = is_dense(layout.unit, layout.units, dtype), len(layers)
    if dense:
        lora_a = torch.zeros(k, many, layout.units, layout.unit, dtype=dtype, device=device)
        parts = lora_a.permute(1, 2, 3, 0).unbind(0)
    else:
        lora_a = torch.zeros(layout.units, many, layout.unit, k, dtype=dtype, device=device)
        parts = lora_a.unbind(1)
    packed = [
        _pack_layer(layout, factors, part, dtype)
        for factors, part in zip(layers, parts, strict=True)
    ]
    if not all(torch.isfinite(t).all() for t in (lora_a, *(lora_b for lora_b, _ in packed))):
        return [None] * len(layers)
    if dense:
        lora_a = lora_a.view(k, -1)
    return [
        LayerPack(
            layout, lora_a, index, members, lora_b.flatten(0, 1) if dense else lora_b, lora_bias
        )
        for index, (lora_b, lora_bias) in enumerate(packed)
    ]


def _layout(factors: Sequence[Factors | None], dtype: torch.dtype, kind: RowsKind) -> Layout | None:
    ranks = tuple(0 if f is None else f.lora_a.shape[0] for f in factors)
    return make_layout(ranks, is_coalesced(dtype, kind)) if any(ranks) else None


def is_for(pack: LayerPack, dtype: torch.dtype, kind: RowsKind) -> bool:
    """Whether packing for another kind of batch in the pack's dtype would give the same."""
    ranks = tuple(place.rank for place in pack.layout.places)
    return make_layout(ranks, is_coalesced(dtype, kind)) is pack.layout


def _pack_layer(
    layout: Layout, factors: Sequence[Factors | None], lora_a: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Writes ``lora_a [units, unit, K]`` and returns lora_b and lora_bias."""
    n = next(f.lora_b.shape[0] for f in factors if f is not None)
    lora_b = torch.zeros(layout.units, layout.unit, n, dtype=dtype, device=lora_a.device)
    biases = [f is not None and f.lora_bias is not None for f in factors]
    lora_bias = None
    if any(biases):
        lora_bias = torch.zeros(len(factors) + 1, n, dtype=dtype, device=lora_a.device)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for at, (place, own) in enumerate(zip(layout.places, factors, strict=True)):
        if own is None:
            continue
        unit, first = divmod(place.first, layout.unit)
        rows = slice(first, first + place.rank)
        lora_a[unit, rows] = own.lora_a
        lora_b[unit, rows] = own.lora_b.t().to(exact) * own.scaling
        if lora_bias is not None and own.lora_bias is not None:
            lora_bias[at] = own.lora_bias.to(exact) * own.scaling
    return lora_b, lora_bias
