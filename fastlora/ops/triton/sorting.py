"""The kernel launch that sorts the rows of a mixed batch by slot."""

from __future__ import annotations

import contextlib

import torch

from fastlora.kernels import mixed_rows_sort
from fastlora.ops.triton.launch_configs import config_of


def sort_rows_into(
    slot_ids: torch.Tensor, slots: int, outputs: tuple[torch.Tensor, ...], max_piece_rows: int
) -> tuple[torch.Tensor, ...] | None:
    """Sort the rows of a batch by slot, and write the results to the tensors in ``outputs``.

    One kernel launch sorts the rows. The function returns ``outputs``. If there are no slot ids, or
    too many slot ids or slots for one program, the function writes nothing and returns None.

    Args:
        slot_ids: Slot of each sample or token, ``[B]``, on the device.
        slots: Number of slots.
        outputs: Uninitialized tensors, as the operator ``rows_sort`` returns.
        max_piece_rows: Largest number of rows of a piece, or 0 for no pieces. A piece is a range of
            sorted rows within one slot and within one tile of this many rows.
    """
    if not mixed_rows_sort.can_sort(slot_ids.shape[0], slots):
        return None
    *rows, invalid, pieces = outputs
    config = config_of("mixed_rows_sort", slot_ids)
    # The device of slot_ids need not be the current device.
    with torch.cuda.device(slot_ids.device) if slot_ids.is_cuda else contextlib.nullcontext():
        mixed_rows_sort.launch_mixed_rows_sort(
            *(slot_ids, [*rows, pieces], invalid), block_m=max_piece_rows, config=config
        )
    return outputs
