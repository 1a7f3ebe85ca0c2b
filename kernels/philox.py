"""The dropout mask as a device function: which elements of a tile are kept.

The mask is a function of (seed, row, column, projection) alone, and not of the tile. Therefore each
kernel that needs the mask can recompute it instead of reading it. Philox4x32-10, with the seed as
key and the counter ``(row, column // 8, projection, 0)``, returns four 32-bit words. They form
eight 16-bit lanes, one for each of eight adjacent columns. `fastlora.ops.philox_reference` defines
the same mask in PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_keep_mask(
    seed, first_row, first_col, threshold, projection, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Return the mask ``[ROWS, COLS]`` (int1) of the tile at (``first_row``, ``first_col``).

    ``first_col`` and ``COLS`` are multiples of 8. An element is kept if its lane is at least
    ``threshold``, which is round(p * 65536).
    """
    rows = first_row + tl.arange(0, ROWS)
    return philox_keep_rows(seed, rows, first_col, threshold, projection, ROWS, COLS)


@triton.jit
def philox_keep_rows(
    seed, rows, first_col, threshold, projection, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Return the mask ``[ROWS, COLS]`` (int1) of rows with given numbers, ``[ROWS]``.

    ``seed`` and ``threshold`` are scalars, or ``[ROWS, 1]``. Other arguments are as in
    `philox_keep_mask`.
    """
    rows = rows.to(tl.uint32)
    groups = (first_col // 8 + tl.arange(0, COLS // 8)).to(tl.uint32)
    # counters: [ROWS, COLS // 8]
    c0 = rows[:, None] + tl.zeros_like(groups)[None, :]
    c1 = groups[None, :] + tl.zeros_like(rows)[:, None]
    c2 = tl.zeros_like(c0) + tl.cast(projection, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0))
    # A join appends an axis of two, so the lane of column j = 4 h + 2 b + a is half h of word 2 a +
    # b. Lanes follow the order in which the joins nest, which avoids a permutation across
    # registers.
    words_01 = tl.join(_halves(w0), _halves(w1))
    words_23 = tl.join(_halves(w2), _halves(w3))
    lanes = tl.reshape(tl.join(words_01, words_23), (ROWS, COLS))
    return lanes >= threshold


@triton.jit
def _halves(word):
    """Return the low and the high 16 bits of each word, int32 ``[..., 2]``."""
    return tl.join((word & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32))
