"""Other ids in the same buffers, as a captured graph that sorts rows again has them."""

from __future__ import annotations

import torch

from fastlora.ops.rows import Rows, sort_rows


def refill_(rows: Rows, ids: torch.Tensor) -> None:
    """Writes the rows of other ids into the tensors of ``rows``, pieces included."""
    fresh = sort_rows(ids, rows.m, rows.slots, rows.order.device)
    for mine, other in zip(rows.tensors(), fresh.tensors(), strict=True):
        mine.copy_(other)
    for block_m, starts in rows._pieces.items():
        starts.copy_(fresh.pieces(block_m))
