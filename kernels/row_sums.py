"""Sums over rows in registers, which the kernels of factors' gradients share."""

from __future__ import annotations

import triton
import triton.language as tl

# A sum over rows is kept as so many sums, added up at its end.
ROW_SUMS = tl.constexpr(8)


@triton.jit
def add_row_sums(sums, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns ``sums [ROW_SUMS, BLOCK_N]`` in fp32 plus the rows of ``tile [BLOCK_M, BLOCK_N]``.

    Each takes every eighth row, so that the error grows with an eighth of the rows: one sum, row
    after row as the interpreter adds them, has up to three times that of PyTorch's.
    """
    # [BLOCK_M / 8, 8, BLOCK_N]
    parts = tl.reshape(tile.to(tl.float32), (BLOCK_M // ROW_SUMS, ROW_SUMS, BLOCK_N))
    return sums + tl.sum(parts, axis=0)


@triton.jit
def add_rows(
    acc,
    tile,
    s_ptr,
    offs_m,
    offs_r,
    mask_m,
    mask_r,
    RANK_ROWS_FIRST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Returns ``acc + tile.T @ s``, ``[C, BLOCK_R]``, or its transpose with RANK_ROWS_FIRST.

    ``tile [BLOCK_M, C]`` is loaded; s lies at ``s_ptr`` plus the offsets of its rows and columns.
    Where tensor cores take 16 rows the rank rows come first: only then is the tile, which would
    otherwise be transposed, copied asynchronously.
    """
    if RANK_ROWS_FIRST:
        # s: [BLOCK_R, BLOCK_M]
        mask = mask_m[None, :] & mask_r[:, None]
        s = tl.load(s_ptr + offs_m[None, :] + offs_r[:, None], mask=mask, other=0.0)
        # [BLOCK_R, BLOCK_M] x [BLOCK_M, C]
        acc = tl.dot(s, tile, acc, input_precision=INPUT_PRECISION)
    else:
        # s: [BLOCK_M, BLOCK_R]
        mask = mask_m[:, None] & mask_r[None, :]
        s = tl.load(s_ptr + offs_m[:, None] + offs_r[None, :], mask=mask, other=0.0)
        # [C, BLOCK_M] x [BLOCK_M, BLOCK_R]
        acc = tl.dot(tl.trans(tile), s, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def store_sum(out_ptr, acc, offs_c, offs_r, mask_c, mask_r, RANK_ROWS_FIRST: tl.constexpr):
    """Writes the sum of `add_rows` in out's dtype, at offsets of its columns and rank rows."""
    acc = acc.to(out_ptr.dtype.element_ty)
    if RANK_ROWS_FIRST:
        mask = mask_c[None, :] & mask_r[:, None]
        tl.store(out_ptr + offs_c[None, :] + offs_r[:, None], acc, mask=mask)
    else:
        mask = mask_c[:, None] & mask_r[None, :]
        tl.store(out_ptr + offs_c[:, None] + offs_r[None, :], acc, mask=mask)
