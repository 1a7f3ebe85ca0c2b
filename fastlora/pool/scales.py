"""What DoRA multiplies a pool's rows by: made for each resident once, and as base weights change.

``g = magnitude / ||weight + scaling * lora_b @ lora_a||`` is of an adapter and the base weights,
not of a batch. So it lies on the device beside the adapter, where tables say, and a compiled or
captured graph finds it there whatever adapter has come meanwhile. A lease makes what is missing or
old; until then rows are NaN in a graph.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from fastlora.dora import scale_of
from fastlora.layers.dora_norms import adapter_squares, base_stamp, may_keep
from fastlora.pool.resident import DeviceCopy, Scales
from fastlora.pool.tables import PoolTables
from fastlora.pool.transfers import Transfers
from fastlora.validation import AdapterStateError


class ScaleMaker:
    """Makes the scales of residents that use DoRA.

    Args:
        layers: The pool's, by ``table_row``.
        tables: Told where the scales lie.
        transfers: Orders the device's work.
    """

    def __init__(self, layers: Sequence[Any], tables: PoolTables, transfers: Transfers) -> None:
        self._layers, self._tables, self._transfers = layers, tables, transfers
        self._lock = threading.Lock()
        self._stamps: list[Any] = []

    def prepare(self, copies: Iterable[DeviceCopy], guard: AbstractContextManager[Any]) -> None:
        """Makes scales that are missing, or of other base weights, on the pool's stream.

        Args:
            copies: Held by leases.
            guard: The pool's lock, which the caller does not hold: norms take their time.

        Raises:
            AdapterStateError: There are such, and a CUDA graph is being captured.
        """
        dora = [copy for copy in copies if copy.resident.uses_dora]
        if not dora:
            return
        with self._lock:
            stamps = [base_stamp(layer) for layer in self._layers]
            if stamps == self._stamps:
                stamps = self._stamps
            self._stamps = stamps
            stale = [(copy, rows) for copy in dora if (rows := self._stale_rows(copy, stamps))]
            if not stale:
                return
            if not may_keep(self._tables.rank.device):
                raise AdapterStateError(
                    "the scales of DoRA adapters are yet to be made and a CUDA graph is being "
                    "captured; take the lease before the capture starts"
                )
            with guard:
                marks = [mark for copy, _ in stale for mark in copy.reads.values()]
            here = self._transfers.read()  # base weights may have been written here
            self._transfers.wait_for_reads(marks if here is None else [*marks, here[0]])
            with torch.inference_mode(False), torch.no_grad(), self._transfers.ordered():
                for copy, rows in stale:
                    self._make(copy, rows, stamps)

    def _stale_rows(self, copy: DeviceCopy, stamps: list[Any]) -> list[int]:
        scales, rows = copy.resident.scales, copy.resident.dora_modules
        if scales is None:
            return list(rows)
        if scales.stamps is stamps and None not in stamps:
            return []
        kept = scales.stamps
        return [row for row in rows if stamps[row] is None or kept[row] != stamps[row]]

    def _make(self, copy: DeviceCopy, rows: list[int], stamps: list[Any]) -> None:
        resident, scales = copy.resident, copy.resident.scales or Scales()
        moved = False
        for row in rows:
            factors: Any = resident.factors(row)
            squares = adapter_squares(
                self._layers[row], factors.lora_a, factors.lora_b.t(), factors.scaling
            )
            made, kept = scale_of(factors.magnitude, squares), scales.by_module.get(row)
            if kept is not None and kept.dtype == made.dtype == torch.float32:
                kept.copy_(made)
                continue
            scales.by_module[row], scales.blocks[row] = made, made.to(torch.float32)
            moved = True
        if moved:
            addresses = torch.zeros(len(stamps), dtype=torch.int64)
            for row, block in scales.blocks.items():
                addresses[row] = block.data_ptr()
            self._tables.write_scales(resident.column, addresses)
        scales.written, scales.stamps = self._transfers.written(), stamps
        resident.scales = scales
