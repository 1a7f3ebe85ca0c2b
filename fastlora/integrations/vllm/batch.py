"""`BatchRows`, the slot of each row of vLLM's current batch.

vLLM describes a batch by the adapter ID of each token and of each sampled row. The slots are
computed from these IDs on the host and copied to the device once per batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fastlora.ops.rows import NO_SLOT, Rows, sort_rows
from fastlora.ops.torch.packed_plans import PlanCache
from fastlora.ops.triton.rows_argument import rows_for_address_tables

# The row tiles of the kernels that work on pieces.
_PIECE_ROWS = (16, 64, 128)


class SortedRowsAndPlans(NamedTuple):
    """The rows of one batch, sorted by slot, and the plans of the batch's matrix products.

    Attributes:
        rows: The rows.
        plans: The plans of the matrix products.
    """

    rows: Rows
    plans: PlanCache


class BatchRows:
    """The slot of each row of the current batch.

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
        self._sorted: dict[int, SortedRowsAndPlans] = {}
        self._whole: Rows | None = self._sort_whole_buffer() if for_captured_graphs else None

    def start(self, slots: np.ndarray) -> None:
        """Start a new batch with the given slots, which the caller has copied to the device."""
        self.used_slots = np.unique(slots[slots >= 0]).tolist()
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
        """Sort all rows of the buffer. Rows past the end of the batch have no adapter."""
        with torch.inference_mode(False):
            return sort_rows(self.slots, self.slots.shape[0], self.count)

    def first(self, m: int) -> SortedRowsAndPlans:
        """Return the first m rows in sorted order. The result is cached for the batch."""
        found = self._sorted.get(m)
        if found is None:
            # The ids are copied: the buffer is overwritten by the next batch.
            rows = sort_rows(self.slots[:m].clone(), m, self.count)
            found = self._sorted[m] = SortedRowsAndPlans(rows, {})
        return found

    def operator_arguments(self, m: int) -> list[torch.Tensor]:
        """Return an operator's ``rows`` argument for the first m rows.

        In traced code, the sort is part of the graph unless the rows were sorted in advance.
        Compilers merge the sorts of all layers.
        """
        if self._whole is None:
            rows = sort_rows(self.slots[:m], m, self.count, cache_pieces=False)
        else:
            rows = self._whole.first_rows(m)
        if self.slots.device.type == "cpu":
            return rows.operator_arguments()
        return rows_for_address_tables(rows)


def _operator_tensors(rows: Rows) -> list[torch.Tensor]:
    """Return the tensors that operators read, including the piece starts for each tile size."""
    return [*rows.operator_arguments(), *(rows.piece_starts(size) for size in _PIECE_ROWS)]


def slots_of_adapters(
    adapter_ids: Sequence[int], adapter_of_slot: Sequence[int | None]
) -> np.ndarray:
    """Return the slot of each row, int64 ``[rows]``, or -1 for rows without an adapter.

    Args:
        adapter_ids: Adapter ID of each row. Zero stands for no adapter.
        adapter_of_slot: Adapter ID in each slot, or None for an empty slot.

    Raises:
        ValueError: A row's adapter is not in any slot.
    """
    ids = np.fromiter(adapter_ids, dtype=np.int64, count=len(adapter_ids))
    found = np.full(ids.shape, NO_SLOT, dtype=np.int64)
    for slot, adapter in enumerate(adapter_of_slot):
        if adapter is not None:
            found[ids == adapter] = slot
    missing = (ids > 0) & (found == NO_SLOT)
    if missing.any():
        raise ValueError(f"adapter {ids[missing][0]} is not in any slot: {list(adapter_of_slot)}")
    return found
