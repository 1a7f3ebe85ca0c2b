"""Adapters in slots at fixed addresses, for engines that load and evict adapters between batches.

`BatchRows` has the slot of each row of the current batch. `SlotLoraUpdater` adds the updates of the
slots' adapters. On a CPU, the updates are computed from packed factors. In traced code and on a
GPU, an operator reads tables of addresses, so that one graph serves every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastlora.ops.execution_mode import is_being_compiled
from fastlora.ops.factors import Factors
from fastlora.ops.rows import Rows, sort_rows
from fastlora.ops.torch import packed_forward
from fastlora.ops.torch.packed import PackedLayerFactors
from fastlora.ops.torch.packed_plans import Plan, PlanCache, cached_plan
from fastlora.ops.torch.packed_slots import PackedSlots
from fastlora.ops.triton.rows_argument import rows_argument_for_address_tables

if TYPE_CHECKING:
    import numpy as np

# The row tiles of the kernels that work on pieces.
_PIECE_ROWS = (16, 64, 128)


class SortedRowsAndPlanCache(NamedTuple):
    """The sorted rows of a batch, and a cache of the plans for their matrix products.

    Layers whose packed factors have the same layout and dtype can share a plan.

    Attributes:
        rows: The rows, sorted by the slots of their adapters.
        plans: The plans that have been made for the matrix products.
    """

    rows: Rows
    plans: PlanCache


class BatchRows:
    """Describes which slot each row of the current batch uses.

    The object also sorts the rows by slot, and stores the sorted rows.

    Args:
        slots: int64 ``[max rows]``, the slot of each row, or -1 for a row without an adapter. Its
            address never changes.
        count: Number of slots.
        for_captured_graphs: Whether each batch is sorted as a whole into tensors at fixed
            addresses, which graphs of every size read.

    Attributes:
        slots: As above.
        used_slots: The slots that have rows in the current batch, as a list on the host.
    """

    def __init__(self, slots: torch.Tensor, count: int, for_captured_graphs: bool) -> None:
        self.slots = slots
        self.count = count
        self.used_slots: list[int] = []
        self._sorted: dict[int, SortedRowsAndPlanCache] = {}
        self._whole: Rows | None = self._sort_whole_buffer() if for_captured_graphs else None

    def reset_for_batch(self, batch_slots: np.ndarray) -> None:
        """Reset this object for a new batch, given the slot of each row.

        The sorted rows of the previous batch are discarded. For captured graphs, all rows are
        sorted again into the existing tensors, which the graphs read.

        Args:
            batch_slots: The slot of each row, on the host. The caller has already copied this
                array to the device.
        """
        self.used_slots = sorted(set(batch_slots[batch_slots >= 0].tolist()))
        self._sorted.clear()
        if self._whole is not None:
            pairs = zip(
                _operator_tensors(self._whole),
                _operator_tensors(self._sort_whole_buffer()),
                strict=True,
            )
            for kept, new in pairs:
                kept.copy_(new)

    def _sort_whole_buffer(self) -> Rows:
        """Sort all rows of the buffer.

        Rows past the end of the batch have no adapter.
        """
        with torch.inference_mode(False):
            return sort_rows(self.slots, self.slots.shape[0], self.count)

    def sort_first_rows(self, m: int) -> SortedRowsAndPlanCache:
        """Sort the first m rows of the batch by slot.

        The result is cached for the batch. It also holds the cache for the plans of the rows'
        matrix products.

        Raises:
            ValueError: m is larger than the number of rows in the buffer.
        """
        found = self._sorted.get(m)
        if found is None:
            if m > self.slots.shape[0]:
                raise ValueError(f"x has {m} rows, expected at most {self.slots.shape[0]}")
            # The ids are copied: the buffer is overwritten by the next batch.
            rows = sort_rows(self.slots[:m].clone(), m, self.count)
            found = self._sorted[m] = SortedRowsAndPlanCache(rows, {})
        return found

    def operator_arguments(self, m: int) -> list[torch.Tensor]:
        """Return the list of tensors to pass to an operator for the first m rows.

        The tensors describe the rows and their slots. The returned list is the operator's ``rows``
        argument.

        In traced code, the sort is part of the graph unless the rows were sorted in advance.
        Compilers merge the sorts of all layers.
        """
        if self._whole is None:
            rows = sort_rows(self.slots[:m], m, self.count, cache_pieces=False)
        else:
            rows = self._whole.first_rows(m)
        if self.slots.device.type == "cpu":
            return rows.operator_arguments()
        return rows_argument_for_address_tables(rows)


def _operator_tensors(rows: Rows) -> list[torch.Tensor]:
    """Return the tensors of ``rows`` that the operators read.

    The start positions of the pieces are included for each tile size in `_PIECE_ROWS`.
    """
    return [*rows.operator_arguments(), *(rows.piece_starts(size) for size in _PIECE_ROWS)]


class _PackedFactorsAndPlan(NamedTuple):
    """The packed factors of a layer's adapter slots, and the plan for applying them to a batch.

    The plan describes the matrix products.

    Attributes:
        batch: The rows of the batch.
        version: The version of the factors' storage when the batch was prepared.
        dtype: Dtype of the packed factors.
        factors: The packed factors, or None if no slot has an adapter.
        plan: The plan. It is None if ``factors`` is None.
    """

    batch: SortedRowsAndPlanCache
    version: int
    dtype: torch.dtype
    factors: PackedLayerFactors | None
    plan: Plan | None


class SlotLoraUpdater:
    """Computes the LoRA updates of a layer whose adapters are in slots.

    Each object holds the factors of one layer. The methods add each row's update to y. The update
    of a row is ``scaling * (x @ lora_a.T) @ lora_b``, with the factors in the row's slot. There are
    up to four slices with the same input x. Their outputs are adjacent columns of y.

    Args:
        lora_a: For each slice, ``[slots, R, K]``.
        lora_b: For each slice, ``[slots, R, N]``.
        storage: The tensor that the factors are views of, except for identity matrices. Its
            version shows whether other code has modified the factors.

    Attributes:
        width: The number of columns of y.
        tables: The ``tables`` argument of operators: addresses, ranks, and scalings, as described
            in `fastlora.ops.factors.AddressTables`. The tables lie at fixed addresses.
    """

    def __init__(
        self,
        lora_a: Sequence[torch.Tensor],
        lora_b: Sequence[torch.Tensor],
        storage: torch.Tensor,
    ) -> None:
        self.lora_a, self.lora_b, self._storage = list(lora_a), list(lora_b), storage
        self.widths = [each.shape[2] for each in lora_b]
        self.width = sum(self.widths)
        slots, device = lora_b[0].shape[0], lora_b[0].device
        self.max_rank, self.dtype = lora_b[0].shape[1], lora_b[0].dtype
        self._factors: list[list[Factors | None]] = [[None] * len(lora_b) for _ in range(slots)]
        with torch.inference_mode(False):
            addresses = [
                torch.tensor([[own.data_ptr() for own in each] for each in factors], device=device)
                for factors in (lora_a, lora_b)
            ]
            rank = torch.zeros(len(lora_b), slots, dtype=torch.int32, device=device)
            scaling = torch.ones(len(lora_b), slots, dtype=torch.float32, device=device)
        self.tables = [*addresses, rank, scaling]
        self._packs: dict[torch.dtype, PackedSlots] = {}
        self._version = storage._version
        self._prepared: _PackedFactorsAndPlan | None = None

    def set_slot(
        self, slot: int, slice_ranks: Sequence[int], slice_scalings: Sequence[float]
    ) -> None:
        """Set the rank and the scaling of each slice for the adapter in a slot.

        The tables and the packed factors are updated. The adapter's factors must have been written
        to the slot before. A slice that the adapter does not adapt has rank 0. If all slices have
        rank 0, the slot is empty.
        """
        own: list[Factors | None] = [None] * len(slice_ranks)
        for index, (rank, scaling) in enumerate(zip(slice_ranks, slice_scalings, strict=True)):
            if rank:
                lora_a, lora_b = self.lora_a[index][slot], self.lora_b[index][slot]
                own[index] = Factors(lora_a[:rank], lora_b[:rank].t(), scaling)
        self._factors[slot] = own
        for table, values in zip(self.tables[2:], (slice_ranks, slice_scalings), strict=True):
            table[:, slot] = torch.tensor(values, dtype=table.dtype, device="cpu")
        self._prepared = None
        for pack in self._packs.values():
            pack.set_slot(slot, own)
        self._version = self._storage._version

    def is_empty(self, slot: int) -> bool:
        """Return whether a slot contains no adapter.

        A slot whose adapter does not adapt this layer is also empty. The rank of an empty slot is 0
        in all slices.
        """
        return all(factors is None for factors in self._factors[slot])

    def add_(self, y: torch.Tensor, x: torch.Tensor, batch: BatchRows) -> None:
        """Add each row's update to y in place.

        In traced code and on a GPU, an operator reads `tables`, so that one graph serves every
        batch. Otherwise, packed factors are used.

        Args:
            y: ``[M, width]``. It may consist of columns of a larger tensor.
            x: ``[M, K]``, in any dtype. The products are computed in the dtype of y.
            batch: The slots of the rows.
        """
        if is_being_compiled() or not x.is_cpu:
            self.add_from_tables_(y, x, batch)
        elif batch.used_slots:
            self.add_from_pack_(y, x, batch)

    @property
    def num_full_packings(self) -> int:
        """Number of full packings of the factors.

        A full packing allocates new storage, and copies the factors of all slots into the storage.
        The number is the total over the current packs.
        """
        return sum(pack.num_full_packings for pack in self._packs.values())

    def add_from_pack_(self, y: torch.Tensor, x: torch.Tensor, batch: BatchRows) -> None:
        """Add each row's update to y in place, using packed factors.

        The arguments are those of `add_`.
        """
        rows, found = batch.sort_first_rows(x.shape[0]), self._prepared
        if (
            found is None
            or found.batch is not rows
            or found.version != self._storage._version
            or found.dtype != y.dtype
        ):
            found = self._prepared = self._prepare(rows, y.dtype)
        if found.factors is not None and found.plan is not None:
            x = x if x.dtype == y.dtype else x.to(y.dtype)
            packed_forward.add_(y, x, rows.rows.slot_index, found.factors, found.plan)

    def _prepare(self, batch: SortedRowsAndPlanCache, dtype: torch.dtype) -> _PackedFactorsAndPlan:
        factors, plan = self._packed_slots(dtype).factors, None
        if factors is not None:
            plan = cached_plan(batch.rows, batch.rows.slot_index, factors, batch.plans)
        return _PackedFactorsAndPlan(batch, self._storage._version, dtype, factors, plan)

    def add_from_tables_(self, y: torch.Tensor, x: torch.Tensor, batch: BatchRows) -> None:
        """Call an operator that reads `tables` and adds each row's update to y in place.

        The arguments are those of `add_`.
        """
        x, rows = x.to(y.dtype), batch.operator_arguments(x.shape[0])
        impl = "eager" if x.device.type == "cpu" else "triton"
        for index, part in enumerate(y.split(self.widths, 1)):
            torch.ops.fastlora.lora_add_at_(
                part, x, rows, self.tables, index, self.max_rank, self.dtype, impl
            )

    def _packed_slots(self, dtype: torch.dtype) -> PackedSlots:
        """Return the packed factors of the slots, converted to the given dtype.

        If there is no valid pack in this dtype, all slots are packed into a new one.
        """
        self.drop_packs_if_outdated()
        pack = self._packs.get(dtype)
        if pack is None:
            with torch.inference_mode(False):
                pack = PackedSlots(len(self._factors), self.lora_a[0].shape[2], self.widths, dtype)
                self._packs[dtype] = pack
                self._pack_all(pack)
        return pack

    def drop_packs_if_outdated(self) -> None:
        """Drop the packed factors if the original factors have changed since they were packed.

        Only changes by other code count, because `set_slot` updates the packed factors. If there
        was such a change, the packed factors of all dtypes are dropped.
        """
        if self._version != self._storage._version:
            self._packs.clear()
            self._prepared = None
            self._version = self._storage._version

    def _pack_all(self, pack: PackedSlots) -> None:
        # The first slot has the largest rank, so the pack is allocated only once.
        ranks = self.tables[2].max(0).values
        for slot in ranks.argsort(descending=True).tolist():
            pack.set_slot(slot, self._factors[slot])
