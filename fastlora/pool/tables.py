"""What kernels read about the adapters on the device: addresses, ranks and scalings."""

from __future__ import annotations

import torch

from fastlora.pool.image import ABSENT, BLOCK_KINDS, Image


class PoolTables:
    """One row per module of the pool, one column per adapter image on the device.

    The tensors are written in place and only in columns that no forward reads, so their addresses
    stay and a captured CUDA graph sees the new contents.

    Args:
        modules: G, number of rows.
        columns: P, number of columns.
        device: Of the tables and of the images.

    Attributes:
        a_address, b_address, bias_address: Absolute addresses of the blocks, ``[G, P]`` int64; 0
            for none.
        rank: ``[G, P]`` int32; 0 where the adapter lacks the module, or the column is free.
        scaling: ``[G, P]`` float32.
    """

    def __init__(self, modules: int, columns: int, device: torch.device) -> None:
        # Two tensors, so that a column takes two copies from the host instead of five.
        self._addresses = torch.zeros(3, modules, columns, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(2, modules, columns, dtype=torch.int32, device=device)
        self.a_address, self.b_address, self.bias_address = self._addresses
        self.rank, self.scaling = self._numbers[0], self._numbers[1].view(torch.float32)

    def write(self, column: int, image: Image) -> None:
        """Fills a column for an image on the device, on the current stream."""
        offsets = image.layout.offsets[: BLOCK_KINDS.index("lora_bias") + 1]
        first = image.data.data_ptr()
        addresses = first + offsets * image.data.itemsize
        addresses[offsets == ABSENT] = 0
        scaling = torch.tensor(image.scaling, dtype=torch.float32)
        numbers = torch.stack([image.layout.ranks, scaling.view(torch.int32)])
        self._copy(self._addresses[:, :, column], addresses)
        self._copy(self._numbers[:, :, column], numbers)

    def clear(self, column: int) -> None:
        """Makes a column free, on the current stream."""
        self._numbers[0, :, column] = 0

    def _copy(self, out: torch.Tensor, values: torch.Tensor) -> None:
        pinned = values.pin_memory() if out.is_cuda else values
        out.copy_(pinned, non_blocking=True)
