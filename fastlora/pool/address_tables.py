"""Tables from which kernels read the addresses, ranks, and scalings of adapters on the device.

For DoRA adapters, the tables also contain the address of each module's scales
(`fastlora.pool.scales`). Kernels ignore scales until a DoRA adapter has been added to the pool.
"""

from __future__ import annotations

import torch

from fastlora.ops.factors import PENDING, AddressTables
from fastlora.ops.rows import INVALID_SLOT, NO_SLOT
from fastlora.pool.packed_adapter import BLOCK_KINDS, MISSING, PackedAdapter

# A row whose slot is empty is treated like a row whose slot is out of range.
NO_COLUMN = INVALID_SLOT
_SCALE = BLOCK_KINDS.index("magnitude")


class PoolTables:
    """The address tables of a pool, which kernels read to find the adapters' factors.

    The tables have one row per module and one column per adapter on the device. ``column_of`` maps
    each slot to the column of its adapter. All tensors are written in place. Their addresses
    therefore do not change, and a captured CUDA graph sees the new contents. The tables are written
    only in columns that no forward pass reads.

    Args:
        modules: Number of rows, G.
        columns: Number of columns, P.
        slots: Number of slots. Row ids range from 0 to ``slots - 1``.
        device: Device of the tables and of the images.

    Attributes:
        a_address, b_address, bias_address: Memory addresses of lora_a, lora_b, and lora_bias,
            ``[G, P]`` int64; 0 if the adapter does not have this tensor for the module.
        scale_address: Memory addresses of DoRA scales (fp32, ``[N]``), ``[G, P]`` int64; `PENDING`
            until the scales are computed, and 0 for a module without DoRA.
        rank: Ranks, ``[G, P]`` int32; 0 if the adapter does not adapt the module or the column is
            free.
        scaling: LoRA scalings, ``[G, P]`` fp32.
        column_of: Column of each slot, ``[slots]`` int64; `NO_COLUMN` if the slot is empty.
        plain_column_of: Like ``column_of``, but with `NO_COLUMN` for the slots of DoRA adapters.
        uses_dora: Whether a DoRA adapter has ever been added to the pool.
    """

    def __init__(self, modules: int, columns: int, slots: int, device: torch.device) -> None:
        self.column_of = torch.full((slots,), NO_COLUMN, dtype=torch.int64, device=device)
        self.plain_column_of = self.column_of.clone()
        self.uses_dora = False
        self._dora_columns: set[int] = set()
        # Two tensors, so that filling a column takes two copies from the host instead of six.
        kinds = len(BLOCK_KINDS)
        self._addresses = torch.zeros(kinds, modules, columns, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(2, modules, columns, dtype=torch.int32, device=device)
        self.a_address, self.b_address, self.bias_address, self.scale_address = self._addresses
        self.rank, self.scaling = self._numbers[0], self._numbers[1].view(torch.float32)

    def as_kernel_tables(self, max_rank: int, dtype: torch.dtype) -> AddressTables:
        """Return the tables as an `AddressTables` object, which can be passed to kernels.

        The addresses of scales are included once a DoRA adapter has been added to the pool.

        Args:
            max_rank: Largest rank that the kernels must support.
            dtype: Dtype of the images.
        """
        scales = self.scale_address if self.uses_dora else None
        addresses = self.a_address, self.b_address, self.bias_address
        return AddressTables(*addresses, self.rank, self.scaling, max_rank, dtype, scales)

    def write_column(self, column: int, image: PackedAdapter) -> None:
        """Write a packed adapter into one column of the tables.

        The column then contains the adapter's addresses, ranks, and scalings. The writes run on the
        current stream.

        Args:
            column: Index of the column.
            image: The packed adapter, on the device.
        """
        offsets, first = image.layout.tensor_offsets, image.data.data_ptr()
        addresses = first + offsets * image.data.itemsize
        addresses[offsets == MISSING] = 0
        addresses[_SCALE].clamp_(max=PENDING)
        self._dora_columns.discard(column)
        if image.layout.dora_modules:
            self.uses_dora = True
            self._dora_columns.add(column)
        scaling = torch.tensor(image.scaling, dtype=torch.float32, device="cpu")
        numbers = torch.stack([image.layout.module_ranks, scaling.view(torch.int32)])
        self._copy(self._addresses[:, :, column], addresses)
        self._copy(self._numbers[:, :, column], numbers)

    def assign(self, slot: int, column: int) -> None:
        """Assign a slot to a column of the tables.

        The slot then refers to the adapter in this column. If ``column`` is `NO_COLUMN`, the slot
        is marked as empty. The assignment runs on the current stream.
        """
        self.column_of[slot] = column
        self.plain_column_of[slot] = NO_COLUMN if column in self._dora_columns else column

    def write_dora_scale_addresses(self, column: int, scale_addresses: torch.Tensor) -> None:
        """Write the addresses of an adapter's DoRA scales into its column of the tables.

        Args:
            column: Column of the adapter.
            scale_addresses: Address of each module's scales, or 0 for a module without
                scales, an int64 CPU tensor of shape ``[G]``.
        """
        self._copy(self.scale_address[:, column], scale_addresses)

    def columns_of_slots(self, slot_ids: torch.Tensor) -> torch.Tensor:
        """Return the table columns of the given slots.

        The column of a slot is that of the adapter in the slot. The result is an int64 tensor of
        the shape of ``slot_ids``. The column is -1 (base model) for the id -1, and -2 for an id
        that is out of range or belongs to an empty slot. The lookup runs on the device, so a CUDA
        graph repeats the lookup at every replay. A graph that was captured before a DoRA adapter
        was added to the pool does not use scales, so the graph treats the slots of DoRA adapters as
        empty.
        """
        return lookup_or_negative_if_out_of_range(
            self.column_of if self.uses_dora else self.plain_column_of, slot_ids
        )

    def clear_adapter_column(self, column: int) -> None:
        """Remove the adapter in the given column of the tables.

        The column can then be reused. The writes run on the current stream.
        """
        self._numbers[0, :, column] = 0
        if column in self._dora_columns:
            self._dora_columns.remove(column)
            self.scale_address[:, column] = 0

    def _copy(self, out: torch.Tensor, values: torch.Tensor) -> None:
        pinned = values.pin_memory() if out.is_cuda else values
        out.copy_(pinned, non_blocking=True)


def lookup_or_negative_if_out_of_range(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return ``table[ids]``, with a negative number for each id that is out of range.

    This number is -1 for the id -1, and -2 for any other id. The function does not synchronize with
    the device.
    """
    table = table.to(ids.device, non_blocking=True)
    ids = ids.to(torch.int64)
    outside = (ids < 0) | (ids >= table.numel())
    found = table[ids.clamp(0, table.numel() - 1)] if table.numel() else torch.zeros_like(ids)
    return torch.where(outside, torch.where(ids == NO_SLOT, NO_SLOT, NO_COLUMN), found)
