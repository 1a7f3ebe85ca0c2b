"""Sums over rows, which the kernels for factor gradients share."""

from __future__ import annotations

import triton
import triton.language as tl

# In registers, a sum over rows is split into this many sums, which are added at the end.
_PARTS = tl.constexpr(8)
# As a product, a sum over rows has this many equal columns, the smallest number for a product.
_ONES = tl.constexpr(16)


@triton.jit
def zero_row_sums(BLOCK_N: tl.constexpr, BY_PRODUCT: tl.constexpr):
    """Return the initial value for `add_row_sums` with tiles ``[BLOCK_M, BLOCK_N]``."""
    if BY_PRODUCT:
        sums = tl.zeros((BLOCK_N, _ONES), dtype=tl.float32)
    else:
        sums = tl.zeros((_PARTS, BLOCK_N), dtype=tl.float32)
    return sums


@triton.jit
def add_row_sums(
    sums, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BY_PRODUCT: tl.constexpr
):
    """Return column sums plus the rows of ``tile [BLOCK_M, BLOCK_N]``, in fp32.

    A product with ones, which is used for 16 bits on sm_90, reads the tile from shared memory, as
    other products do. If a tile is also read into registers there, Triton 3.6 to 3.9 allocates one
    buffer too few: it copies a later tile over a tile that a product in flight still reads.

    In registers, a product of the same tile must therefore finish in its own step. Each of eight
    sums takes every eighth row, so that the error grows with an eighth of the rows. A single sum
    that adds row after row, as the interpreter does, has up to three times the error of PyTorch's
    sum.
    """
    if BY_PRODUCT:
        # [BLOCK_N, BLOCK_M] x [BLOCK_M, 16]
        sums = tl.dot(tl.trans(tile), tl.full((BLOCK_M, _ONES), 1.0, tile.dtype), sums)
    else:
        # [BLOCK_M / 8, 8, BLOCK_N]
        parts = tl.reshape(tile.to(tl.float32), (BLOCK_M // _PARTS, _PARTS, BLOCK_N))
        sums += tl.sum(parts, axis=0)
    return sums


@triton.jit
def total_row_sums(sums, BY_PRODUCT: tl.constexpr):
    """Return the sums ``[BLOCK_N]`` from the result of `add_row_sums`."""
    # The columns of a product are equal.
    return tl.max(sums, axis=1) if BY_PRODUCT else tl.sum(sums, axis=0)


@triton.jit
def zero_sum(C: tl.constexpr, BLOCK_R: tl.constexpr, RANK_ROWS_FIRST: tl.constexpr):
    """Return the initial value for `add_rows` with tiles ``[BLOCK_M, C]``."""
    if RANK_ROWS_FIRST:
        acc = tl.zeros((BLOCK_R, C), dtype=tl.float32)
    else:
        acc = tl.zeros((C, BLOCK_R), dtype=tl.float32)
    return acc


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
    """Return ``acc + tile.T @ s``, ``[C, BLOCK_R]``, or its transpose with RANK_ROWS_FIRST.

    ``tile [BLOCK_M, C]`` is already loaded. s is at ``s_ptr`` plus the offsets of its rows and
    columns. If tensor cores take 16 rows, rank rows come first. Otherwise the tile would have to be
    transposed, and would not be copied asynchronously.
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
    """Store the sum of `add_rows` in out's dtype, at the offsets of its columns and rank rows."""
    acc = acc.to(out_ptr.dtype.element_ty)
    if RANK_ROWS_FIRST:
        mask = mask_c[None, :] & mask_r[:, None]
        tl.store(out_ptr + offs_c[None, :] + offs_r[:, None], acc, mask=mask)
    else:
        mask = mask_c[:, None] & mask_r[None, :]
        tl.store(out_ptr + offs_c[:, None] + offs_r[None, :], acc, mask=mask)
