"""What kernels read about the adapters on the device: addresses, ranks and scalings.

A pool's DoRA adapters have an address more for each module: that of their scales
(`fastlora.pool.scales`). Nothing is done for these until the pool has seen such an adapter.
"""

from __future__ import annotations

import torch

from fastlora.ops.factors import PENDING, Tables
from fastlora.ops.rows import INVALID_SLOT, NO_SLOT
from fastlora.pool.image import ABSENT, BLOCK_KINDS, Image

# Rows of an empty slot are as wrong as those of a slot that does not exist.
NO_COLUMN = INVALID_SLOT
_SCALE = BLOCK_KINDS.index("magnitude")


class PoolTables:
    """One row per module of the pool, one column per adapter image on the device.

    The tensors are written in place and only in columns that no forward reads, so their addresses
    stay and a captured CUDA graph sees the new contents.

    Args:
        modules: G, number of rows.
        columns: P, number of columns.
        slots: Numbers that row ids may hold.
        device: Of the tables and of the images.

    Attributes:
        a_address, b_address, bias_address: Absolute addresses of the blocks, ``[G, P]`` int64; 0
            for none.
        scale_address: The same of a DoRA adapter's scales, fp32 ``[N]``, and `PENDING` until they
            are made.
        rank: ``[G, P]`` int32; 0 where the adapter lacks the module, or the column is free.
        scaling: ``[G, P]`` float32.
        column_of: Column of each slot, ``[slots]`` int64; `NO_COLUMN` while it is empty.
        plain_column_of: The same, but that slots of adapters that use DoRA are empty.
        uses_dora: Whether an adapter with DoRA has been seen; it stays so.
    """

    def __init__(self, modules: int, columns: int, slots: int, device: torch.device) -> None:
        self.column_of = torch.full((slots,), NO_COLUMN, dtype=torch.int64, device=device)
        self.plain_column_of = self.column_of.clone()
        self.uses_dora = False
        self._dora_columns: set[int] = set()
        # Two tensors, so that a column takes two copies from the host instead of six.
        kinds = len(BLOCK_KINDS)
        self._addresses = torch.zeros(kinds, modules, columns, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(2, modules, columns, dtype=torch.int32, device=device)
        self.a_address, self.b_address, self.bias_address, self.scale_address = self._addresses
        self.rank, self.scaling = self._numbers[0], self._numbers[1].view(torch.float32)

    def found(self, max_rank: int, dtype: torch.dtype) -> Tables:
        """Return where factors lie, and scales once there is an adapter with DoRA."""
        scales = self.scale_address if self.uses_dora else None
        addresses = self.a_address, self.b_address, self.bias_address
        return Tables(*addresses, self.rank, self.scaling, max_rank, dtype, scales)

    def write(self, column: int, image: Image) -> None:
        """Fill a column for an image on the device, on the current stream."""
        offsets, first = image.layout.offsets, image.data.data_ptr()
        addresses = first + offsets * image.data.itemsize
        addresses[offsets == ABSENT] = 0
        addresses[_SCALE].clamp_(max=PENDING)
        self._dora_columns.discard(column)
        if image.layout.dora_modules:
            self.uses_dora = True
            self._dora_columns.add(column)
        scaling = torch.tensor(image.scaling, dtype=torch.float32)
        numbers = torch.stack([image.layout.ranks, scaling.view(torch.int32)])
        self._copy(self._addresses[:, :, column], addresses)
        self._copy(self._numbers[:, :, column], numbers)

    def assign(self, slot: int, column: int) -> None:
        """Make a slot mean a column, or none with `NO_COLUMN`, on the current stream."""
        self.column_of[slot] = column
        self.plain_column_of[slot] = NO_COLUMN if column in self._dora_columns else column

    def write_scales(self, column: int, addresses: torch.Tensor) -> None:
        """Note where a column's scales lie: ``[G]`` int64 on the host, 0 for none."""
        self._copy(self.scale_address[:, column], addresses)

    def columns(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the column of each id, a slot: -1 stays, and what is out of range becomes -2.

        Operations on the device only, so that a CUDA graph looks slots up anew at every replay.
        One that is captured before there is DoRA has no scales: to it such slots stay empty.
        """
        return looked_up(self.column_of if self.uses_dora else self.plain_column_of, ids)

    def clear(self, column: int) -> None:
        """Make a column free, on the current stream."""
        self._numbers[0, :, column] = 0
        if column in self._dora_columns:
            self._dora_columns.remove(column)
            self.scale_address[:, column] = 0

    def _copy(self, out: torch.Tensor, values: torch.Tensor) -> None:
        pinned = values.pin_memory() if out.is_cuda else values
        out.copy_(pinned, non_blocking=True)


def looked_up(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return ``table[ids]``; -1 stays, and what is out of range becomes -2. Waits for nothing."""
    table = table.to(ids.device, non_blocking=True)
    ids = ids.to(torch.int64)
    outside = (ids < 0) | (ids >= table.numel())
    found = table[ids.clamp(0, table.numel() - 1)] if table.numel() else torch.zeros_like(ids)
    return torch.where(outside, torch.where(ids == NO_SLOT, NO_SLOT, NO_COLUMN), found)
