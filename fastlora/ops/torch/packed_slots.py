"""Packed factors of a layer's slots, whose adapters are loaded and evicted one by one.

In `fastlora.ops.torch.packed`, adapters of smaller ranks share a unit of rank rows. Here, each slot
has a unit of its own, so a change rewrites the rank rows of one slot only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastlora.ops.factors import Factors
from fastlora.ops.torch.packed import (
    PackedLayerFactors,
    PackedLayout,
    unrounded_scaled_lora_b_rank_rows,
    zeros_and_view_for_packed_lora_a,
)
from fastlora.ops.torch.packed_choice import dense_products_are_fastest


@functools.lru_cache(maxsize=256)
def one_unit_per_slot(rank_rows_per_unit: int, ranks: tuple[int, ...]) -> PackedLayout:
    """Return a packed layout in which each slot has a unit of its own.

    A unit is a group of adjacent rank rows, which are rows of lora_a or columns of lora_b.

    Args:
        rank_rows_per_unit: Number of rank rows in a unit.
        ranks: The rank of the adapter in each slot, or 0 for an empty slot.
    """
    return PackedLayout(
        rank_rows_per_unit,
        len(ranks),
        tuple(rank_rows_per_unit * slot for slot in range(len(ranks))),
        ranks,
    )


class _PackedSlotFactors(NamedTuple):
    """The packed LoRA factors of a layer's adapter slots.

    The tensors have space for all slots, including those without an adapter.

    Attributes:
        lora_a: As in `PackedLayerFactors`.
        rank_rows_a: A view of lora_a, ``[slots, slices, unit, K]``.
        lora_b: For each slice ``[slots * unit, N]``.
        unit: Number of rank rows of a slot.
    """

    lora_a: torch.Tensor
    rank_rows_a: torch.Tensor
    lora_b: tuple[torch.Tensor, ...]
    unit: int

    def write_and_check_finite(self, slot: int, slices: Sequence[Factors | None]) -> bool:
        """Write the factors of an adapter into a slot, and return whether they are finite.

        The new factors replace the slot's previous factors. The result is True if all values of
        the new factors are finite.
        """
        own_a, dtype, is_finite = self.rank_rows_a[slot], self.lora_a.dtype, True
        for a, lora_b, factors in zip(own_a, self.lora_b, slices, strict=True):
            b, rank = lora_b[slot * self.unit : (slot + 1) * self.unit], 0
            if factors is not None:
                rank = factors.lora_a.shape[0]
                a[:rank] = factors.lora_a
                b[:rank] = unrounded_scaled_lora_b_rank_rows(factors, dtype)
                is_finite &= bool(torch.isfinite(a[:rank]).all() and torch.isfinite(b[:rank]).all())
            a[rank:] = 0.0
            b[rank:] = 0.0
        return is_finite


class PackedSlots:
    """A layer's adapter slots, with packed copies of the adapters' factors.

    The factors of all slots are copied only if the largest rank changes. Any other change copies
    the factors of one slot.

    Args:
        num_slots: Number of slots.
        in_features: K.
        out_features: The number of outputs N of each slice. The slices of a layer have the same
            input, and their outputs are side by side.
        dtype: Dtype of x and of the packed factors.
        device: Device of the packed factors.

    Attributes:
        factors: The packed factors, or None if no slot has an adapter. The index of an adapter is
            its slot.
        num_full_packings: Number of times that the factors of all slots were allocated and
            copied.
    """

    def __init__(
        self,
        num_slots: int,
        in_features: int,
        out_features: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        self.factors: PackedLayerFactors | None = None
        self.num_full_packings = 0
        self._in_features, self._widths = in_features, tuple(out_features)
        self._dtype, self._device = dtype, device
        self._ranks = [(0,) * len(self._widths)] * num_slots
        self._is_finite = [True] * num_slots
        self._storage: _PackedSlotFactors | None = None

    def set_slot(self, slot: int, slices: Sequence[Factors | None]) -> None:
        """Put an adapter's factors for each slice into a slot.

        The adapter replaces the slot's previous adapter. The factors are copied and scaled.

        Args:
            slot: The slot.
            slices: For each slice, the `Factors` of the adapter: lora_a ``[R, K]``, lora_b
                ``[N, R]``, and the scaling. None for a slice that the adapter does not adapt. If
                all are None, the slot becomes empty.

        Raises:
            ValueError: The number or the shapes of the factors do not fit the layer, or an adapter
                has a lora_bias, dropout, or DoRA.
        """
        self._check(slices)
        ranks = tuple(0 if f is None else f.lora_a.shape[0] for f in slices)
        unit = max(map(max, [*self._ranks[:slot], ranks, *self._ranks[slot + 1 :]]))
        if not unit:
            self._ranks[slot], self._is_finite[slot] = ranks, True
            self.factors = self._storage = None
            return
        storage = self._storage
        if storage is None or storage.unit != unit:
            # A tensor that is created in inference mode cannot be written outside of it.
            with torch.inference_mode(False):
                storage = self._allocate_and_copy(unit)
        try:
            is_finite = storage.write_and_check_finite(slot, slices)
        except BaseException:
            # The storage in use must not contain an adapter that was only partly copied.
            if storage is self._storage and any(f is not None for f in slices):
                self.clear_slot(slot)
            raise
        self._ranks[slot], self._is_finite[slot], self._storage = ranks, is_finite, storage
        self.factors = self._as_packed_factors(storage)

    def clear_slot(self, slot: int) -> None:
        """Clear a slot by removing the factors of its adapter.

        If another slot has an adapter, the rank rows of the cleared slot become zero in the packed
        factors. Otherwise, ``factors`` becomes None.
        """
        self.set_slot(slot, [None] * len(self._widths))

    def _check(self, slices: Sequence[Factors | None]) -> None:
        """Check that an adapter's factors for each slice can be put into a packed slot.

        The dtype and the device are not checked, because a copy into a slot converts the factors.

        Raises:
            ValueError: The number or the shapes of the factors do not fit, or an adapter has a
                lora_bias, dropout, or DoRA.
        """
        if len(slices) != len(self._widths):
            raise ValueError(f"got factors for {len(slices)} slices, expected {len(self._widths)}")
        for factors, n in zip(slices, self._widths, strict=True):
            if factors is None:
                continue
            a, b = tuple(factors.lora_a.shape), tuple(factors.lora_b.shape)
            if len(a) != 2 or a[1] != self._in_features or b != (n, a[0]):
                raise ValueError(
                    f"lora_a has shape {a} and lora_b has shape {b}, expected "
                    f"(R, {self._in_features}) and ({n}, R)"
                )
            if factors.lora_bias is not None or factors.dropout_p or factors.magnitude is not None:
                raise ValueError(
                    "an adapter in packed slots has lora_bias, dropout, or a magnitude; expected "
                    "only lora_a, lora_b, and scaling"
                )

    def _allocate_and_copy(self, rank_rows_per_slot: int) -> _PackedSlotFactors:
        """Allocate tensors for the factors of all slots, and copy the current factors into them.

        Returns the new tensors, which have ``rank_rows_per_slot`` rank rows for each slot. This
        number may be larger or smaller than that of the previous tensors.
        """
        slots, dtype, device = len(self._ranks), self._dtype, self._device
        layout = one_unit_per_slot(rank_rows_per_slot, (0,) * slots)
        is_dense = dense_products_are_fastest(
            rank_rows_per_slot, slots, dtype, every_unit_is_used=False
        )
        lora_a, rank_rows_a = zeros_and_view_for_packed_lora_a(
            layout, len(self._widths), self._in_features, dtype, device, is_dense
        )
        shapes = [(slots * rank_rows_per_slot, n) for n in self._widths]
        lora_b = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
        made, old = (
            _PackedSlotFactors(lora_a, rank_rows_a, lora_b, rank_rows_per_slot),
            self._storage,
        )
        self.num_full_packings += 1
        if old is not None:
            rows = slice(0, min(rank_rows_per_slot, old.unit))
            rank_rows_a[:, :, rows] = old.rank_rows_a[:, :, rows]
            for new_b, old_b in zip(lora_b, old.lora_b, strict=True):
                by_slot = new_b.view(slots, rank_rows_per_slot, -1)
                by_slot[:, rows] = old_b.view(slots, old.unit, -1)[:, rows]
        return made

    def _as_packed_factors(self, storage: _PackedSlotFactors) -> PackedLayerFactors:
        """Return the tensors of the slots as a `PackedLayerFactors`.

        The result contains the factors of the current adapters. The tensors are not copied.
        """
        layout = one_unit_per_slot(storage.unit, tuple(map(max, self._ranks)))
        used = (any(ranks) for ranks in zip(*self._ranks, strict=True))
        pairs = zip(storage.lora_b, used, strict=True)
        lora_b = tuple(b if is_used else None for b, is_used in pairs)
        return PackedLayerFactors(
            layout, storage.lora_a, lora_b, None, self._widths, all(self._is_finite)
        )
