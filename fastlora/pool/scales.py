"""DoRA scales of a pool's adapters. They are recomputed only when base weights change.

The scales ``g = magnitude / ||weight + scaling * lora_b @ lora_a||`` depend on an adapter and the
base weights, but not on the batch. They are therefore stored on the device together with the
adapter, and the pool's tables contain their addresses. Compiled and captured graphs look up the
addresses, even of adapters that were loaded after the compilation or capture. A lease computes
scales that are missing or outdated. Until then, a graph's outputs for rows of the adapter are NaN.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from fastlora.layers.norms import adapter_squares, base_stamp, may_keep
from fastlora.ops.torch.dora import scale_of
from fastlora.pool.resident import Resident, Scales
from fastlora.pool.tables import PoolTables
from fastlora.pool.transfers import Transfers
from fastlora.validation import AdapterStateError

_Stale = tuple[Resident, list[int]]  # and the modules that need new scales


class ScaleMaker:
    """Computes the DoRA scales of adapters on the device.

    Args:
        layers: The pool's layers. The index of a layer is its ``table_row``.
        tables: The pool's tables, which store the addresses of the scales.
        transfers: Orders writes to the device with forward passes.
    """

    def __init__(self, layers: Sequence[Any], tables: PoolTables, transfers: Transfers) -> None:
        self._layers, self._tables, self._transfers = layers, tables, transfers
        self._lock = threading.Lock()
        self._stamps: list[Any] = []

    def prepare(self, residents: Iterable[Resident], guard: AbstractContextManager[Any]) -> None:
        """Compute the scales of leased DoRA adapters that are missing or outdated.

        Scales are outdated if the base weights have changed since they were computed.

        Args:
            residents: The leased adapters.
            guard: The pool's lock. The caller must not hold it, because computing norms takes time.

        Raises:
            AdapterStateError: Scales are missing or outdated, and a CUDA graph is being captured.
        """
        dora = [resident for resident in residents if resident.uses_dora]
        if not dora or not self._stale(dora)[0]:
            return  # without waiting for other threads that compute scales
        with self._lock:
            stale, stamps = self._stale(dora)
            if not stale:
                return
            if not may_keep(self._tables.rank.device):
                raise AdapterStateError(
                    "the scales of DoRA adapters have not been computed yet, and a CUDA graph is "
                    "being captured; acquire the lease before the capture starts"
                )
            with guard:
                marks = [mark for resident, _ in stale for mark in resident.reads.values()]
            here = self._transfers.read()  # this stream may have written base weights
            self._transfers.wait_for_reads(marks if here is None else [*marks, here[0]])
            with torch.inference_mode(False), torch.no_grad(), self._transfers.ordered():
                for resident, rows in stale:
                    self._make(resident, rows, stamps)

    def _stale(self, dora: list[Resident]) -> tuple[list[_Stale], list[Any]]:
        """Return the adapters with missing or outdated scales, and the state of the base weights.

        Args:
            dora: Adapters on the device that use DoRA.

        Returns:
            A tuple (stale, stamps). ``stale`` contains a tuple (adapter, indices of the modules
            that need new scales) for each of these adapters. ``stamps`` contains a record of the
            current state of each module's base weight.
        """
        stamps, known = [base_stamp(layer) for layer in self._layers], self._stamps
        if stamps == known:
            stamps = known
        self._stamps = stamps
        stale = [(one, rows) for one in dora if (rows := self._stale_rows(one, stamps))]
        return stale, stamps

    def _stale_rows(self, resident: Resident, stamps: list[Any]) -> list[int]:
        scales, rows = resident.scales, resident.dora_modules
        if scales is None:
            return list(rows)
        if scales.stamps is stamps and None not in stamps:
            return []
        kept = scales.stamps
        return [row for row in rows if stamps[row] is None or kept[row] != stamps[row]]

    def _make(self, resident: Resident, rows: list[int], stamps: list[Any]) -> None:
        scales = resident.scales or Scales()
        by_module, blocks = dict(scales.by_module), dict(scales.blocks)
        for row in rows:
            factors: Any = resident.factors(row)
            squares = adapter_squares(
                self._layers[row], factors.lora_a, factors.lora_b, factors.scaling
            )
            made, kept = scale_of(factors.magnitude, squares), scales.by_module.get(row)
            if kept is not None and kept.dtype == made.dtype == torch.float32:
                kept.copy_(made)
                continue
            by_module[row], blocks[row] = made, made.to(torch.float32)
        if any(blocks[row] is not scales.blocks.get(row) for row in rows):
            addresses = torch.zeros(len(stamps), dtype=torch.int64, device="cpu")
            for row, block in blocks.items():
                addresses[row] = block.data_ptr()
            self._tables.write_scales(resident.column, addresses)
        # The stamps are assigned last, because a thread that finds them current does not take the
        # lock.
        scales.by_module, scales.blocks = by_module, blocks
        scales.written = self._transfers.written()
        scales.stamps = stamps
        resident.scales = scales
