"""A reference implementation of the Triton kernels' dropout mask, in PyTorch.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011). Its key is the 64-bit seed, and its counter is ``(row, column // 8, projection, 0)``. The
four 32-bit words form eight 16-bit lanes, one per column. Column ``j = 4 h + 2 b + a`` of a group
of eight uses half ``h`` of word ``2 a + b``, where half 0 is the low one. An element is kept if its
lane is at least ``round(p * 65536)``.
"""

from __future__ import annotations

import torch

_MASK_32 = 0xFFFFFFFF
_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_COLUMNS_PER_COUNTER = 8


def philox_keep_mask(
    seed: int, rows: int, cols: int, p: float, projection: int = 0
) -> torch.Tensor:
    """Return the dropout keep mask that Philox generates for a seed.

    It is a bool mask ``[rows, cols]`` on the CPU that is True where dropout keeps an element.

    Args:
        seed: Any 64-bit integer, signed or unsigned.
        rows: Number of rows of the adapter. Rows are numbered from 0.
        cols: Number of columns.
        p: Probability of dropping an element, in [0, 1); rounded to a multiple of 2**-16.
        projection: Number of the projection within the shared-input group.
    """
    groups = (cols + _COLUMNS_PER_COUNTER - 1) // _COLUMNS_PER_COUNTER
    row = torch.arange(rows, device="cpu")[:, None].expand(rows, groups)
    group = torch.arange(groups, device="cpu")[None, :].expand(rows, groups)
    counter = (row & _MASK_32, group, torch.full_like(row, projection), torch.zeros_like(row))
    words = _philox_4x32(counter, (seed & _MASK_32, (seed >> 32) & _MASK_32))
    lanes = words[0].new_empty(rows, groups, _COLUMNS_PER_COUNTER)
    for j in range(_COLUMNS_PER_COUNTER):
        word = words[(j & 1) * 2 + ((j >> 1) & 1)]
        lanes[:, :, j] = (word >> (16 * (j >> 2))) & 0xFFFF
    return lanes.view(rows, -1)[:, :cols] >= round(p * 65536)


def _philox_4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Generate random numbers with Philox4x32 in PyTorch.

    The result is a tuple with the four output words of each counter. The words are 32-bit values in
    int64 tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply_32(c0, _ROUND_MULTIPLIERS[0])
        high_2, low_2 = _multiply_32(c2, _ROUND_MULTIPLIERS[1])
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0 = (k0 + _KEY_INCREMENTS[0]) & _MASK_32
        k1 = (k1 + _KEY_INCREMENTS[1]) & _MASK_32
    return c0, c1, c2, c3


def _multiply_32(value: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply 32-bit values by a factor, and return both halves of each product.

    The result is a tuple (high, low) of the two 32-bit halves of ``value * factor``. The operands
    have 32 bits. Their product would overflow int64, so it is computed from 16-bit halves.
    """
    low = (value & 0xFFFF) * factor
    middle = (value >> 16) * factor + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
