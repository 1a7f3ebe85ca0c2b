"""Operators over tables of addresses in PyTorch, which reads the memory of this process.

Rows stand at sorted positions, as in `fastlora.ops.rows`; where they begin is read on the
host.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence

import torch

from fastlora.ops.torch import reference


def add_at_(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Adds every row's own adapter to ``y [M, N]`` for ``x [M, K]``; tables are ``[S]``."""
    a_address, b_address, rank, scaling, *bias_address = tables
    k, n = x.shape[1], y.shape[1]
    for slot, own in _slots(rows):
        r = int(rank[slot])
        if not r:
            continue
        lora_a = block_at(int(a_address[slot]), (r, k), dtype)
        lora_b = block_at(int(b_address[slot]), (r, n), dtype).t()
        part = y[own]
        reference.lora_expand_(part, reference.lora_shrink(x[own], lora_a), lora_b, scaling[slot])
        bias = int(bias_address[0][slot]) if bias_address else 0
        if bias:
            part += (block_at(bias, (n,), dtype) * scaling[slot]).to(y.dtype)
        y[own] = part


def scale_(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    rows: Sequence[torch.Tensor],
    scale_address: torch.Tensor,
    pending: int,
) -> None:
    """Scales rows of ``y [M, N]`` in place; those of ``pending`` addresses become NaN."""
    if not y.numel():
        return
    shift = None if bias is None else bias.to(y.dtype)
    for slot, own in _slots(rows):
        address = int(scale_address[slot])
        if address == pending:
            y[own] = float("nan")
        elif address:
            scale, part = block_at(address, (y.shape[1],), torch.float32), y[own]
            part = part if shift is None else part - shift
            # No wider copy of the rows, and one rounding.
            scaled = torch.mul(part, scale, out=torch.empty_like(part))
            y[own] = scaled if shift is None else scaled.add_(shift)


def block_at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Returns a block in this process's memory, as it lies there."""
    raw = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(shape)


def _slots(rows: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields each slot that has rows, and which these are."""
    order, starts = rows[0], rows[3].tolist()
    for slot, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        if stop > start:
            yield slot, order[start:stop].long()
