"""``s = dropout(x) @ lora_a.T``: x ``[M, K]``, lora_a ``[R, K]``, s ``[M, R]``.

One adapter: up to four modules of a shared-input group have their rank rows side by side. R is the
sum of their ranks, and one read of x computes the columns of all modules. K is split if the rows
alone do not fill the chip. Each split then writes an fp32 partial sum of ``[splits, M, R]``. The
next reader of s adds them in a fixed order: `lora_linear`, `lora_expand`, or `plane_sums`.

Bytes moved, for e bytes per element: ``e (M K + R K + M R)``, with x read once per ``BLOCK_R`` rank
rows. With partial sums, ``8 splits M R`` replaces ``e M R``.

Mixed batch: each row has its own adapter. The rows of x are in any order, and tables ``[G, S]``
have the address of each adapter's lora_a ``[rank, K]`` in each module. s consists of fp32 partial
sums ``[splits, G, M, R]`` at sorted positions, one per split of K. `mixed_lora_linear` and
`mixed_lora_expand` add them in order. A row of s is written up to its adapter's rank, rounded up to
a multiple of 4. Rows without an adapter are not written. Each module has its own dropout, so active
dropout needs a launch per module.

Bytes moved, for e bytes per element of x and f per element of factors: ``e M' K`` for the M' rows
with an adapter, once for each BLOCK_R columns; ``f K`` per rank row of every adapter in the batch,
read once per piece; and ``4 splits`` per element of s.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import dropout_of, numbered, padded, strides
from fastlora.kernels.config_tables import MAX_GROUP_SIZE, KernelConfig, cdiv, compiled_modules
from fastlora.kernels.launch import cached_launches, launch
from fastlora.kernels.mixed_rows import (
    S_COLUMNS,
    TABLES,
    DropoutTables,
    RankRows,
    factor_pointer,
    load_piece,
    round_up,
    row_arguments,
    sibling_columns,
    triton_dtype,
)
from fastlora.kernels.philox import philox_keep_mask
from fastlora.kernels.rank_rows import are_multiples_of_16, multiple_of_16


# M, threshold, and the modules vary between calls: do not specialize the kernel on 1 or multiples
# of 16. ALIGNED_R says whether all ranks, and the stride between rows of s, are multiples of 16.
@triton.jit(do_not_specialize=["M", "threshold", "R", "first_1", "first_2", "first_3", "stride_om"])
def _lora_shrink_kernel(
    # tensors
    out_ptr,
    x_ptr,
    lora_a_ptr,
    lora_a_1_ptr,
    lora_a_2_ptr,
    lora_a_3_ptr,
    seed_ptr,
    # scalars
    M,
    K,
    R,
    first_1,
    first_2,
    first_3,
    k_per_split,
    threshold,
    inv_keep,
    # strides
    stride_op,
    stride_om,
    stride_or,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    # meta
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    NUM_MODULES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED_R: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    LAUNCH_DEPENDENTS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    if LAUNCH_DEPENDENTS:
        tl.extra.cuda.gdc_launch_dependents()
    if ALIGNED_R:
        R, stride_om = multiple_of_16(R), multiple_of_16(stride_om)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    num_pid_r = tl.cdiv(R, BLOCK_R)
    first_m = (pid // num_pid_r) * BLOCK_M
    first_r = (pid % num_pid_r) * BLOCK_R
    first_k = split * k_per_split

    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M - first_m
    mask_r = offs_r < R - first_r
    x_ptr += tl.cast(first_m, tl.int64) * stride_xm + tl.cast(first_k, tl.int64) * stride_xk
    offs_x = offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    lora_a_ptr += tl.cast(first_r, tl.int64) * stride_ar
    # rank_rows: [BLOCK_R]
    rank_rows = lora_a_ptr + offs_r * stride_ar
    others, firsts = (lora_a_1_ptr, lora_a_2_ptr, lora_a_3_ptr), (first_1, first_2, first_3)
    r = first_r + offs_r
    for i in tl.static_range(NUM_MODULES - 1):  # rank rows of a further module
        rank_rows = tl.where(
            r >= firsts[i], others[i] + tl.cast(r - firsts[i], tl.int64) * stride_ar, rank_rows
        )
    if ALIGNED:  # the compiler cannot know this of a selected tensor
        rank_rows = tl.multiple_of(rank_rows, 16)
    rank_rows += tl.cast(first_k, tl.int64) * stride_ak
    offs_a = offs_k[:, None] * stride_ak
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(first_k, min(first_k + k_per_split, K), BLOCK_K):
        mask_x = mask_m[:, None]
        mask_a = mask_r[None, :]
        if not EVEN_K:
            mask_k = offs_k < K - k
            mask_x = mask_x & mask_k[None, :]
            mask_a = mask_a & mask_k[:, None]
        # x: [BLOCK_M, BLOCK_K], a: [BLOCK_K, BLOCK_R]
        x = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0)
        a = tl.load(rank_rows[None, :] + offs_a, mask=mask_a, other=0.0)
        if HAS_DROPOUT:
            keep = philox_keep_mask(seed, first_m, k, threshold, 0, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        # [BLOCK_M, BLOCK_K] x [BLOCK_K, BLOCK_R]
        product = tl.dot(x, a.to(x.dtype), input_precision=INPUT_PRECISION)
        if HAS_DROPOUT:
            # Not after the loop: a dot that is used within its step is also waited for there.
            # Otherwise, Triton before 3.9 lets the mask of the next step write to registers that
            # wgmma still reads (triton#9433).
            product *= tl.cast(inv_keep, tl.float32)
        acc += product
        x_ptr += tl.cast(stride_xk, tl.int64) * BLOCK_K
        rank_rows += tl.cast(stride_ak, tl.int64) * BLOCK_K

    out_ptr += tl.cast(split, tl.int64) * stride_op + tl.cast(first_m, tl.int64) * stride_om
    out_ptr += tl.cast(first_r, tl.int64) * stride_or
    # s: [BLOCK_M, BLOCK_R]
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_r[None, :] * stride_or,
        acc.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_r[None, :],
    )


@cached_launches
def launch_lora_shrink(
    out: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    *,
    seed: torch.Tensor | None,
    dropout_p: float,
    config: KernelConfig,
) -> None:
    """Write ``dropout(x) @ lora_a.T`` of each module, side by side.

    Args:
        out: ``[M, R]`` in x's dtype if ``config.splits == 1``, otherwise fp32 ``[splits, M, R]``.
        x: ``[M, K]``, any strides.
        lora_a: For each of 1 to `MAX_GROUP_SIZE` modules ``[rank, K]``, in x's dtype or in a dtype
            that is cast to it at the load; any strides, the same for all. R is the sum of the
            ranks.
        seed: int64 device tensor of one element; read only if ``dropout_p > 0``.
        dropout_p: Probability of dropping an element of x, rounded to a multiple of 2**-16.
        config: From `configs.choose`.
    """
    (m, k), count, ranks = x.shape, len(lora_a), [a.shape[0] for a in lora_a]
    *firsts, r = itertools.accumulate(ranks)
    others = [*firsts, *[r] * (MAX_GROUP_SIZE - count)]  # no rank row belongs to a missing module
    if m == 0:
        return
    compiled = compiled_modules(count, alone=dropout_p > 0.0)
    blocks_k = cdiv(k, config.block_k)
    grid = (cdiv(m, config.block_m) * cdiv(r, config.block_r), config.splits)
    launch(
        _lora_shrink_kernel,
        grid,
        out_ptr=out,
        x_ptr=x,
        **numbered("lora_a{}_ptr", padded(lora_a, compiled)),
        **{f"first_{i}": first for i, first in enumerate(others, 1)},
        **dropout_of(seed, dropout_p),
        M=m,
        K=k,
        R=r,
        k_per_split=cdiv(blocks_k, config.splits) * config.block_k,
        **strides("o", "pmr", out),
        **strides("x", "mk", x),
        **strides("a", "rk", lora_a[0]),
        **config.arguments("mkr"),
        EVEN_K=k % config.block_k == 0,
        NUM_MODULES=compiled,
        ALIGNED=compiled > 1 and all(_is_aligned(a) for a in lora_a),
        ALIGNED_R=are_multiples_of_16(*ranks, out.stride(-2)),
        LAUNCH_DEPENDENTS=config.launch_dependents,
    )


def _is_aligned(lora_a: torch.Tensor) -> bool:
    """Return whether every rank row begins at a multiple of 16 bytes."""
    return lora_a.data_ptr() % 16 == 0 and lora_a.stride(0) * lora_a.itemsize % 16 == 0


@triton.jit
def _shrink_columns(
    start,
    tensors,
    rows,
    sizes,
    drop,
    strides,
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Write BLOCK_R columns of s. They hold the rank rows of all modules side by side.

    The rank of each module is rounded up to a multiple of 4.
    """
    s_ptr, x_ptr, lora_a_address_ptr, rank_ptr = tensors
    slot, offs_xm, mask_m = rows
    first_k, last_k, K, R, modules = sizes
    first_row, seed, threshold, inv_keep = drop
    stride_sg, stride_sm, stride_xk, stride_table = strides
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    column = start + tl.arange(0, BLOCK_R)
    member, r, mask_a, mask_s = sibling_columns(
        column, slot, rank_ptr, stride_table, modules, G, BLOCK_R
    )
    address = tl.load(lora_a_address_ptr + member * stride_table + slot, mask=mask_s, other=0)
    a_ptrs = factor_pointer(address, FACTOR_DTYPE) + tl.cast(r, tl.int64) * K + first_k
    a_ptrs = a_ptrs[None, :] + offs_k[:, None]
    offs_x = offs_xm[:, None] + offs_k[None, :] * stride_xk
    x_ptr += tl.cast(first_k, tl.int64) * stride_xk

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(first_k, last_k, BLOCK_K):
        mask_xk = mask_m[:, None]
        mask_ak = mask_a[None, :]
        if not EVEN_K:
            mask_k = offs_k < K - k
            mask_xk = mask_xk & mask_k[None, :]
            mask_ak = mask_ak & mask_k[:, None]
        # x: [BLOCK_M, BLOCK_K], a: [BLOCK_K, BLOCK_R]
        x = tl.load(x_ptr + offs_x, mask=mask_xk, other=0.0)
        a = tl.load(a_ptrs, mask=mask_ak, other=0.0)
        if HAS_DROPOUT:
            keep = philox_keep_mask(seed, first_row, k, threshold, 0, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        # [BLOCK_M, BLOCK_K] x [BLOCK_K, BLOCK_R]
        acc = tl.dot(x, a.to(x.dtype), acc, input_precision=INPUT_PRECISION)
        x_ptr += tl.cast(stride_xk, tl.int64) * BLOCK_K
        a_ptrs += BLOCK_K

    if HAS_DROPOUT:
        acc *= inv_keep
    # s: [BLOCK_M, BLOCK_R]
    r = tl.max_contiguous(tl.multiple_of(r, S_COLUMNS), S_COLUMNS)
    # A captured graph may run with a rank table that later holds larger ranks than s was allocated
    # for.
    mask_s = mask_s & (r < R)
    offs_s = tl.cast(member, tl.int64) * stride_sg + r
    s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_s[None, :]
    tl.store(s_ptrs, acc.to(s_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_s[None, :])


# M and the number of modules vary between calls: do not specialize the kernel on 1 or multiples of
# 16.
@triton.jit(
    do_not_specialize=["M", "modules", "stride_table"], do_not_specialize_on_alignment=TABLES
)
def _mixed_lora_shrink_kernel(
    # tensors
    s_ptr,
    x_ptr,
    order_ptr,
    segment_of_ptr,
    segment_slot_ptr,
    piece_start_ptr,
    lora_a_address_ptr,
    rank_ptr,
    slot_start_ptr,
    seed_ptr,
    threshold_ptr,
    inv_keep_ptr,
    # scalars
    M,
    K,
    R,
    modules,
    k_per_split,
    # strides
    stride_sp,
    stride_sg,
    stride_sm,
    stride_xm,
    stride_xk,
    stride_table,
    # meta
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NARROW_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    LAUNCH_DEPENDENTS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    if LAUNCH_DEPENDENTS:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(1)
    first_m, stop_m, slot = load_piece(
        tl.program_id(0), piece_start_ptr, segment_of_ptr, segment_slot_ptr, M
    )
    columns = 0
    for g in tl.static_range(G):
        held = (slot >= 0) & (g < modules)
        rank = tl.load(rank_ptr + g * stride_table + slot, mask=held, other=0)
        columns += round_up(rank, S_COLUMNS)

    if columns > 0:
        offs_m = tl.arange(0, BLOCK_M)
        mask_m = offs_m < stop_m - first_m
        offs_xm = tl.load(order_ptr + first_m + offs_m, mask=mask_m, other=0).to(tl.int64)
        offs_xm *= stride_xm
        first_k = split * k_per_split
        last_k = min(first_k + k_per_split, K)
        first_row, seed, threshold, inv_keep = 0, 0, 0, 1.0
        if HAS_DROPOUT:
            # The row's number among the adapter's rows, which no other row of the batch affects.
            first_row = first_m - tl.load(slot_start_ptr + slot)
            seed = tl.load(seed_ptr + slot)
            threshold = tl.load(threshold_ptr + slot)
            inv_keep = tl.load(inv_keep_ptr + slot)
        s_ptr += tl.cast(split, tl.int64) * stride_sp + tl.cast(first_m, tl.int64) * stride_sm
        tensors = s_ptr, x_ptr, lora_a_address_ptr, rank_ptr
        rows = slot, offs_xm, mask_m
        sizes = first_k, last_k, K, R, modules
        drop = first_row, seed, threshold, inv_keep
        strides = stride_sg, stride_sm, stride_xk, stride_table
        if columns <= NARROW_R:
            _shrink_columns(
                *(0, tensors, rows, sizes, drop, strides),
                *(G, BLOCK_M, NARROW_R, BLOCK_K, EVEN_K),
                *(FACTOR_DTYPE, HAS_DROPOUT, INPUT_PRECISION),
            )
        else:
            for start in tl.range(0, columns, BLOCK_R, num_stages=1):
                _shrink_columns(
                    *(start, tensors, rows, sizes, drop, strides),
                    *(G, BLOCK_M, BLOCK_R, BLOCK_K, EVEN_K),
                    *(FACTOR_DTYPE, HAS_DROPOUT, INPUT_PRECISION),
                )


@cached_launches
def launch_mixed_lora_shrink(
    s: torch.Tensor,
    x: torch.Tensor,
    rows: Sequence[torch.Tensor],
    down: RankRows,
    *,
    config: KernelConfig,
    dropout: DropoutTables | None = None,
) -> None:
    """Write each row's ``dropout(x) @ lora_a.T`` for G modules, with a partial sum per split of K.

    Args:
        s: ``[splits, G, M, R]`` in fp32, or in x's dtype if there is one split; contiguous in the
            last dimension. R is a multiple of 4 and at least the largest rank. Rank rows beyond R
            are not written.
        x: ``[M, K]``, any strides.
        rows: Sorted rows with ``Rows.pieces(config.block_m)``, as in `row_arguments`.
        down: The lora_a of the G modules, in tables ``[G, S]``.
        config: From `configs.choose`.
        dropout: Dropout of the only module (``G = 1``), or None for no dropout.
    """
    m, k = x.shape
    if m == 0:
        return
    splits, modules = s.shape[0], down.rank.shape[0]
    # In 16 bits, only one module of rank 9 to 16 has a BLOCK_R of 16, and thus a kernel of its own.
    # Modules of rank 8 or less share the kernel of a group.
    alone = dropout is not None or (config.block_r <= 16 and down.largest > 8)
    launch(
        _mixed_lora_shrink_kernel,
        (rows[-1].shape[0] - 1, splits),
        s_ptr=s,
        x_ptr=x,
        **row_arguments(rows),
        lora_a_address_ptr=down.address,
        rank_ptr=down.rank,
        M=m,
        K=k,
        R=s.shape[3],
        modules=modules,
        k_per_split=cdiv(cdiv(k, config.block_k), splits) * config.block_k,
        **strides("s", "pgm_", s),
        **strides("x", "mk", x),
        stride_table=down.rank.stride(0),
        G=compiled_modules(modules, alone),
        **config.arguments("mkr"),
        NARROW_R=config.narrow_r,
        EVEN_K=k % config.block_k == 0,
        FACTOR_DTYPE=triton_dtype(down.dtype),
        **DropoutTables.arguments(dropout, rows),
        LAUNCH_DEPENDENTS=config.launch_dependents,
    )
