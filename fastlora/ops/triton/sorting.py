"""The kernel launch that sorts the rows of a mixed batch by slot."""

from __future__ import annotations

import contextlib

import torch

from fastlora.kernels import mixed_rows_sort
from fastlora.ops.triton.launch_configs import config_of


def sort_rows_into(
    ids: torch.Tensor, slots: int, outputs: tuple[torch.Tensor, ...], block_m: int
) -> tuple[torch.Tensor, ...] | None:
    """Sort rows by slot, and write the results to the tensors in ``outputs``.

    The function returns ``outputs``. If there are no ids, or too many ids or slots for one program,
    it writes nothing and returns None.

    Args:
        ids: ``[B]`` on the device.
        slots: Number of slots.
        outputs: Uninitialized tensors, as the operator ``rows_sort`` returns.
        block_m: Number of rows of a tile, which pieces do not cross; 0 for no pieces.
    """
    if not mixed_rows_sort.can_sort(ids.shape[0], slots):
        return None
    *rows, invalid, pieces = outputs
    config = config_of("mixed_rows_sort", ids)
    # The device of ids need not be the current device.
    with torch.cuda.device(ids.device) if ids.is_cuda else contextlib.nullcontext():
        mixed_rows_sort.launch_mixed_rows_sort(
            *(ids, [*rows, pieces], invalid), block_m=block_m, config=config
        )
    return outputs
