"""``y += scaling * (s @ lora_b.T + lora_bias)`` in place, with each row's own adapter.

The rows of y ``[M, N]`` are in any order. s consists of the partial sums of the shrink for mixed
batches at sorted positions, ``[splits, M, R]``. Tables ``[S]`` have the addresses of lora_b as rank
rows ``[rank, N]``, and of lora_bias ``[N]``. A program computes BLOCK_N columns of one piece, with
rows of one adapter. It reads y once, adds in fp32, and rounds once. Rows are not changed if their
adapter does not adapt the module. For the gradient of x, ``dx += mask * (ds @ lora_a) / (1 - p)``,
lora_a takes the place of lora_b, and the added term is masked like x in the forward pass.

Up to four modules of a shared-input group are one grid over the columns of all. Their rows in the
tables are adjacent, and s is ``[splits, G, M, R]``.

Bytes moved, for e bytes per element of y and f per element of factors: ``2 e M' N`` for the M' rows
that change; ``f N`` per rank row of every adapter in the batch, read once per piece; and
``4 splits`` per element of s, read by every column of tiles.

If the kernel is launched as a programmatic dependent of the shrink (``pdl``, sm_90 and later), a
program looks up its adapter while the shrink is still running, and waits before it reads anything
else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import numbered, padded, strides
from fastlora.kernels.config_tables import KernelConfig, cdiv, compiled_modules
from fastlora.kernels.launch import cached_launches, launch
from fastlora.kernels.mixed_rows import (
    INVALID_SLOT,
    S_COLUMNS,
    TABLES,
    DropoutTables,
    RankRows,
    factor_pointer,
    load_piece,
    round_up,
    row_arguments,
)
from fastlora.kernels.modules import are_aligned, module_of_tile, of_module
from fastlora.kernels.philox import philox_keep_mask


@triton.jit
def _add_block(
    acc,
    start,
    tensors,
    place,
    stride_sp,
    NUM_PARTIALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Return ``acc + s @ lora_b.T`` for BLOCK_R rank rows from ``start`` on.

    ``s_ptrs [BLOCK_M, 1]`` point at the rows of the first partial sum.
    """
    s_ptrs, lora_b_ptr = tensors
    rank, first_n, N, mask_m, mask_n = place
    offs_n = tl.arange(0, BLOCK_N)
    offs_r = start + tl.arange(0, BLOCK_R)
    if BY_COLUMN:
        b_ptrs = lora_b_ptr + offs_r[:, None] + ((first_n + offs_n) * rank)[None, :]
    else:
        b_ptrs = lora_b_ptr + (tl.cast(offs_r, tl.int64) * N)[:, None]
        b_ptrs += (first_n + offs_n)[None, :]
    # b: [BLOCK_R, BLOCK_N]
    b = tl.load(b_ptrs, mask=(offs_r < rank)[:, None] & mask_n[None, :], other=0.0)
    s_ptrs += offs_r[None, :]
    mask_s = mask_m[:, None] & (offs_r < round_up(rank, S_COLUMNS))[None, :]
    # s: [BLOCK_M, BLOCK_R]
    s = tl.load(s_ptrs, mask=mask_s, other=0.0)
    for _ in tl.static_range(1, NUM_PARTIALS):
        s_ptrs += tl.cast(stride_sp, tl.int64)
        partial = tl.load(s_ptrs, mask=mask_s, other=0.0)
        # With an addition, Triton would convert the layout of each partial sum for the dot
        # separately.
        s = tl.sum(tl.join(s, partial), axis=2)
    # [BLOCK_M, BLOCK_R] x [BLOCK_R, BLOCK_N]
    return tl.dot(s.to(DTYPE), b.to(DTYPE), acc, input_precision=INPUT_PRECISION)


# M and slots vary between calls: do not specialize the kernel on 1 or multiples of 16.
@triton.jit(do_not_specialize=["M", "stride_table"], do_not_specialize_on_alignment=TABLES)
def _mixed_lora_expand_kernel(
    # tensors
    y_ptr,
    y_1_ptr,
    y_2_ptr,
    y_3_ptr,
    s_ptr,
    order_ptr,
    segment_of_ptr,
    segment_slot_ptr,
    piece_start_ptr,
    lora_b_address_ptr,
    lora_bias_address_ptr,
    rank_ptr,
    scaling_ptr,
    slot_start_ptr,
    seed_ptr,
    threshold_ptr,
    inv_keep_ptr,
    # scalars
    M,
    N,
    N_1,
    N_2,
    N_3,
    # strides
    stride_ym,
    stride_yn,
    stride_sp,
    stride_sg,
    stride_sm,
    stride_table,
    # meta
    NUM_MODULES: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    HAS_LORA_BIAS: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PDL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    pid_n = tl.program_id(1)
    if NUM_MODULES > 1:
        module, pid_n = module_of_tile(pid_n, 1, (N, N_1, N_2), BLOCK_N, NUM_MODULES)
        y_ptr = of_module(module, y_ptr, y_1_ptr, y_2_ptr, y_3_ptr, NUM_MODULES)
        if ALIGNED:  # the compiler cannot know this of a selected tensor
            y_ptr = tl.multiple_of(y_ptr, 16)
        N = of_module(module, N, N_1, N_2, N_3, NUM_MODULES)
        stride_ym = N  # in a shared-input group, y is contiguous
        s_ptr += tl.cast(module, tl.int64) * stride_sg
        lora_b_address_ptr += module * stride_table
        rank_ptr += module * stride_table
        if HAS_LORA_BIAS:
            lora_bias_address_ptr += module * stride_table
        if scaling_ptr is not None:
            scaling_ptr += module * stride_table
    first_m, stop_m, slot = load_piece(
        tl.program_id(0), piece_start_ptr, segment_of_ptr, segment_slot_ptr, M
    )
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < stop_m - first_m
    row = tl.load(order_ptr + first_m + offs_m, mask=mask_m, other=0).to(tl.int64)
    held = slot >= 0
    # All are loaded together, although an adapter that does not adapt the module only needs the
    # rank.
    rank = tl.load(rank_ptr + slot, mask=held, other=0)
    lora_b_address = tl.load(lora_b_address_ptr + slot, mask=held, other=0)
    lora_bias_address = tl.cast(0, tl.int64)
    if HAS_LORA_BIAS:
        lora_bias_address = tl.load(lora_bias_address_ptr + slot, mask=held, other=0)
    scale = 1.0
    if scaling_ptr is not None:
        scale = tl.load(scaling_ptr + slot, mask=held, other=0.0)
    # The added term is NaN for rows of an invalid id.
    scale = tl.where(slot == INVALID_SLOT, float("nan"), scale)
    # Also if there is nothing to add: the next launch waits for this launch alone.
    if PDL:
        tl.extra.cuda.gdc_wait()

    has_part = ((rank > 0) & (lora_b_address != 0)) | (lora_bias_address != 0)
    if has_part | (slot == INVALID_SLOT):
        first_n = tl.cast(pid_n * BLOCK_N, tl.int64)
        offs_n = tl.arange(0, BLOCK_N)
        mask_n = offs_n < N - pid_n * BLOCK_N
        # y: [BLOCK_M, BLOCK_N], most of the bytes, and therefore loaded first
        y_ptr += first_n * stride_yn
        y_ptrs = y_ptr + (row * stride_ym)[:, None] + offs_n[None, :] * stride_yn
        mask_y = mask_m[:, None] & mask_n[None, :]
        y = tl.load(y_ptrs, mask=mask_y, other=0.0)

        s_ptrs = s_ptr + tl.cast(first_m, tl.int64) * stride_sm + offs_m[:, None] * stride_sm
        lora_b_ptr = factor_pointer(lora_b_address, FACTOR_DTYPE)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        tensors, place = (s_ptrs, lora_b_ptr), (rank, first_n, N, mask_m, mask_n)
        # A loop with one iteration takes up to twice as many registers.
        if ONE_BLOCK:
            acc = _add_block(
                *(acc, 0, tensors, place, stride_sp, NUM_PARTIALS, BLOCK_N, BLOCK_R),
                *(BY_COLUMN, dtype, INPUT_PRECISION),
            )
        else:
            for start in tl.range(0, rank, BLOCK_R, num_stages=1):
                acc = _add_block(
                    *(acc, start, tensors, place, stride_sp, NUM_PARTIALS, BLOCK_N, BLOCK_R),
                    *(BY_COLUMN, dtype, INPUT_PRECISION),
                )
        if HAS_LORA_BIAS:
            lora_bias_ptr = factor_pointer(lora_bias_address, FACTOR_DTYPE) + first_n
            columns = tl.where(lora_bias_address != 0, N - pid_n * BLOCK_N, 0)
            # lora_bias: [BLOCK_N]
            lora_bias = tl.load(lora_bias_ptr + offs_n, mask=offs_n < columns, other=0.0)
            acc += lora_bias.to(tl.float32)[None, :]
        acc *= scale
        if HAS_DROPOUT:
            # The row's number among the adapter's rows, which no other row of the batch affects.
            first_row = first_m - tl.load(slot_start_ptr + slot, mask=held, other=0)
            seed = tl.load(seed_ptr + slot, mask=held, other=0)
            threshold = tl.load(threshold_ptr + slot, mask=held, other=0)
            inv_keep = tl.load(inv_keep_ptr + slot, mask=held, other=1.0)
            keep = philox_keep_mask(
                seed, first_row, pid_n * BLOCK_N, threshold, 0, BLOCK_M, BLOCK_N
            )
            acc = tl.where(keep, acc * inv_keep, 0.0)
        tl.store(y_ptrs, (y.to(tl.float32) + acc).to(dtype), mask=mask_y)


@cached_launches
def launch_mixed_lora_expand(
    ys: Sequence[torch.Tensor],
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    up: RankRows,
    *,
    config: KernelConfig,
    pdl: bool = False,
    dropout: DropoutTables | None = None,
) -> None:
    """Add each row's own adapter to the y of each module in place; rows of invalid ids become NaN.

    With several modules, tables are ``[G, S]``.

    Args:
        ys: For each of 1 to `MAX_GROUP_SIZE` modules ``[M, N]``, any strides without overlap;
            several must be contiguous. Their dtype is the dtype of the dots.
        s: Partial sums ``[splits, M, R]`` of `launch_mixed_lora_shrink`, any dtype; for several
            modules ``[splits, G, M, R]``.
        rows: Sorted rows with ``Rows.pieces(config.block_m)``, as in `row_arguments`.
        up: The rank rows to add.
        config: Config of the launch.
        pdl: Whether to launch as a programmatic dependent of the previous kernel, which must be the
            shrink.
        dropout: Dropout of the added term, for the gradient of x; None for no dropout.
    """
    m, sizes, count = ys[0].shape[0], [y.shape[1] for y in ys], len(ys)
    columns = sum(cdiv(n, config.block_n) for n in sizes)
    # The kernel for three modules takes every contiguous y, and has no dropout. In a piece of 16
    # rows, the selection of a module would take 8% of the instructions.
    alone = dropout is not None or up.by_column or not ys[0].is_contiguous() or config.block_m <= 16
    compiled = compiled_modules(count, alone)
    if m == 0 or columns == 0:
        return
    launch(
        _mixed_lora_expand_kernel,
        (rows[-1].shape[0] - 1, columns),
        **numbered("y{}_ptr", padded(ys, compiled)),
        s_ptr=s,
        **row_arguments(rows),
        **up.arguments(),
        M=m,
        **numbered("N{}", sizes, 0),
        **strides("y", "mn", ys[0]),
        stride_sp=s.stride(0),
        stride_sg=s.stride(1) if count > 1 else 0,
        stride_sm=s.stride(-2),
        stride_table=up.rank.stride(0) if count > 1 else 0,
        NUM_MODULES=compiled,
        ALIGNED=compiled > 1 and are_aligned(ys),
        NUM_PARTIALS=s.shape[0],
        **config.arguments("mnr"),
        ONE_BLOCK=s.shape[-1] <= config.block_r,
        **DropoutTables.arguments(dropout, rows),
        PDL=pdl,
        **({"launch_pdl": True} if pdl else {}),
    )
