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

from fastlora.layers.dora_norms import (
    adapted_squared_norms,
    base_weight_stamp,
    is_device_capturing,
)
from fastlora.ops.torch.dora import dora_scale
from fastlora.pool.address_tables import PoolTables
from fastlora.pool.records import AdapterDoraScales, LoadedAdapter
from fastlora.pool.transfers import BaseTransfersToDevice
from fastlora.validation import AdapterStateError

_StaleScales = tuple[LoadedAdapter, list[int]]  # and the modules that need new scales


class DoraScaleUpdater:
    """Keeps the DoRA scales of a pool's adapters up to date.

    Only stale scales are computed. Scales are stale if they are missing, as those of a newly loaded
    adapter are, or if base weights have changed since the scales were computed. All scales are
    computed and stored on the device.

    Args:
        layers: The pool's layers. The index of a layer is its ``table_row``.
        tables: The pool's tables, which store the addresses of the scales.
        transfers: Orders writes to the device with forward passes.
    """

    def __init__(
        self, layers: Sequence[Any], tables: PoolTables, transfers: BaseTransfersToDevice
    ) -> None:
        self._layers, self._tables, self._transfers = layers, tables, transfers
        self._lock = threading.Lock()
        self._stamps: list[Any] = []

    def update_stale_dora_scales(
        self,
        loaded_adapters: Iterable[LoadedAdapter],
        pool_lock: AbstractContextManager[Any],
    ) -> None:
        """Recompute the stale DoRA scales of loaded adapters.

        The scales of a module are stale if the module's base weight may have changed since the
        scales were computed. Missing scales are computed too.

        Args:
            loaded_adapters: The leased adapters.
            pool_lock: The pool's lock, which protects the adapters' read events. This method
                holds the lock only while it reads the events. The caller must not hold the lock,
                because computing norms is slow.

        Raises:
            AdapterStateError: Scales are missing or outdated, and a CUDA graph is being captured.
        """
        dora = [loaded for loaded in loaded_adapters if loaded.uses_dora]
        if not dora or not self._find_stale_scales_and_base_weight_stamps(dora)[0]:
            return  # without waiting for other threads that compute scales
        with self._lock:
            stale, stamps = self._find_stale_scales_and_base_weight_stamps(dora)
            if not stale:
                return
            if is_device_capturing(self._tables.rank.device):
                raise AdapterStateError(
                    "the scales of DoRA adapters have not been computed yet, and a CUDA graph is "
                    "being captured; acquire the lease before the capture starts"
                )
            with pool_lock:
                events = [event for loaded, _ in stale for event in loaded.reads.values()]
            # This stream may have written base weights.
            here = self._transfers.record_read_event_and_stream_id()
            self._transfers.order_writes_after_reads(events if here is None else [*events, here[0]])
            with torch.inference_mode(False), torch.no_grad(), self._transfers.use_write_stream():
                for loaded, rows in stale:
                    self._compute_scales(loaded, rows, stamps)

    def _find_stale_scales_and_base_weight_stamps(
        self, dora_adapters: list[LoadedAdapter]
    ) -> tuple[list[_StaleScales], list[Any]]:
        """Find the DoRA scales that are stale, and return them with stamps of the base weights.

        Scales depend on the base weights. Scales are stale if they are missing, or if a base weight
        may have changed since the scales were computed. The version stamps show such changes.

        Args:
            dora_adapters: Adapters on the device that use DoRA.

        Returns:
            A tuple (stale, stamps). ``stale`` contains a tuple (adapter, indices of the modules
            that need new scales) for each adapter with stale scales. ``stamps`` contains a version
            stamp for each module. The stamp identifies the current state of the module's base
            weight.
        """
        # DoRA is on linear layers only.
        stamps: list[Any] = [base_weight_stamp(x) if x.is_linear else () for x in self._layers]
        known = self._stamps
        if stamps == known:
            stamps = known
        self._stamps = stamps
        stale = [(one, rows) for one in dora_adapters if (rows := self._stale_modules(one, stamps))]
        return stale, stamps

    def _stale_modules(self, loaded: LoadedAdapter, stamps: list[Any]) -> list[int]:
        scales, rows = loaded.scales, loaded.dora_modules
        if scales is None:
            return list(rows)
        if scales.stamps is stamps and None not in stamps:
            return []
        known = scales.stamps
        return [row for row in rows if stamps[row] is None or known[row] != stamps[row]]

    def _compute_scales(self, loaded: LoadedAdapter, rows: list[int], stamps: list[Any]) -> None:
        scales = loaded.scales or AdapterDoraScales()
        by_module, blocks = dict(scales.by_module), dict(scales.blocks)
        for row in rows:
            factors: Any = loaded.factors(row)
            squares = adapted_squared_norms(
                self._layers[row], factors.lora_a, factors.lora_b, factors.scaling
            )
            made, cached = dora_scale(factors.magnitude, squares), scales.by_module.get(row)
            if cached is not None and cached.dtype == made.dtype == torch.float32:
                cached.copy_(made)
                continue
            by_module[row], blocks[row] = made, made.to(torch.float32)
        if any(blocks[row] is not scales.blocks.get(row) for row in rows):
            addresses = torch.zeros(len(stamps), dtype=torch.int64, device="cpu")
            for row, block in blocks.items():
                addresses[row] = block.data_ptr()
            self._tables.write_dora_scale_addresses(loaded.column, addresses)
        # The stamps are assigned last, because a thread that finds them current does not take the
        # lock.
        scales.by_module, scales.blocks = by_module, blocks
        scales.written = self._transfers.record_event_after_writes()
        scales.stamps = stamps
        loaded.scales = scales
