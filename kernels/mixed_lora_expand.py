"""``y += scaling * (s @ lora_b.T + lora_bias)`` in place, each row's own adapter.

y ``[M, N]`` in any order of rows; s are the planes of `mixed_lora_shrink` over sorted positions,
``[splits, M, R]``; lora_b as rank rows ``[rank, N]`` and lora_bias ``[N]`` behind tables ``[S]``.
y is read once, added to in fp32 and rounded once; rows whose adapter has no part in the module are
not touched. For the gradient of x, ``dx += mask * (ds @ lora_a) / (1 - p)``, lora_a stands in for
lora_b and what is added meets the mask that x met.

Bytes moved, e and f an element of y and of the factors: ``2 e M' N``, M' the rows with such a part;
``f N`` a rank row of every adapter present, read once a tile of rows that holds it; and
``4 splits`` an element of s, read by every column of tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.configs import KernelConfig, cdiv
from fastlora.kernels.launch import kept, launch
from fastlora.kernels.mixed_rows import (
    INVALID_SLOT,
    TABLES,
    DropoutTables,
    add_rank_rows,
    drop_rows,
    triton_dtype,
)


# M and planes vary from call to call: no compile of their own for 1 or a multiple of 16.
@triton.jit(do_not_specialize=["M", "planes"], do_not_specialize_on_alignment=TABLES)
def _mixed_lora_expand_kernel(
    # tensors
    y_ptr,
    s_ptr,
    order_ptr,
    segment_of_ptr,
    segment_slot_ptr,
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
    planes,
    # strides
    stride_ym,
    stride_yn,
    stride_sp,
    stride_sm,
    # meta
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_LORA_BIAS: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    pid = tl.program_id(0)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    first_m = (pid // num_pid_n) * BLOCK_M
    pid_n = pid % num_pid_n
    first_n = tl.cast(pid_n * BLOCK_N, tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M - first_m
    mask_n = offs_n < N - pid_n * BLOCK_N

    row = tl.load(order_ptr + first_m + offs_m, mask=mask_m, other=0).to(tl.int64)
    segment = tl.load(segment_of_ptr + first_m + offs_m, mask=mask_m, other=0)
    slot = tl.load(segment_slot_ptr + segment, mask=mask_m, other=-1)
    touched = tl.load(rank_ptr + slot, mask=slot >= 0, other=0) > 0
    if HAS_LORA_BIAS:
        touched |= tl.load(lora_bias_address_ptr + slot, mask=slot >= 0, other=0) != 0
    touched |= slot == INVALID_SLOT
    # y: [BLOCK_M, BLOCK_N], most of the bytes: asked for first
    y_ptrs = y_ptr + first_n * stride_yn + (row * stride_ym)[:, None] + offs_n[None, :] * stride_yn
    mask_y = touched[:, None] & mask_n[None, :]
    y = tl.load(y_ptrs, mask=mask_y, other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = add_rank_rows(
        acc,
        s_ptr,
        segment_of_ptr,
        segment_slot_ptr,
        lora_b_address_ptr,
        lora_bias_address_ptr,
        rank_ptr,
        scaling_ptr,
        first_m,
        first_n,
        M,
        N,
        planes,
        stride_sp,
        stride_sm,
        dtype=dtype,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_R=BLOCK_R,
        HAS_LORA_BIAS=HAS_LORA_BIAS,
        FACTOR_DTYPE=FACTOR_DTYPE,
        INPUT_PRECISION=INPUT_PRECISION,
        BY_COLUMN=BY_COLUMN,
    )
    if HAS_DROPOUT:
        acc = drop_rows(
            acc,
            segment_of_ptr,
            segment_slot_ptr,
            slot_start_ptr,
            seed_ptr,
            threshold_ptr,
            inv_keep_ptr,
            first_m,
            pid_n * BLOCK_N,
            M,
            BLOCK_M,
            BLOCK_N,
        )
    tl.store(y_ptrs, (y.to(tl.float32) + acc).to(dtype), mask=mask_y)


@kept
def launch_mixed_lora_expand(
    y: torch.Tensor,
    s: torch.Tensor,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    lora_b_address: torch.Tensor,
    lora_bias_address: torch.Tensor | None,
    rank: torch.Tensor,
    scaling: torch.Tensor | None,
    *,
    factor_dtype: torch.dtype,
    config: KernelConfig,
    by_column: bool = False,
    dropout: DropoutTables | None = None,
) -> None:
    """Adds each row's own adapter to ``y`` in place; rows of invalid ids become NaN.

    Args:
        y: ``[M, N]``, any strides without overlap; its dtype is the dtype of the dots.
        s: Planes ``[splits, M, R]`` of `launch_mixed_lora_shrink`, of this module, any dtype.
        order: int32 ``[M]``, like the next two from `fastlora.ops.rows.Rows`.
        segment_of: int32 ``[M]``.
        segment_slot: int32 ``[segments]``.
        lora_b_address: int64 ``[S]``: where each slot's lora_b lies, as rank rows ``[rank, N]``,
            or ``[N, rank]`` with ``by_column``.
        lora_bias_address: int64 ``[S]``, 0 for an adapter without one; None if none has.
        rank: int32 ``[S]``, 0 where the adapter leaves the module alone.
        scaling: fp32 ``[S]``; None for 1.
        factor_dtype: Of lora_b and lora_bias; they are cast to y's dtype at the load.
        config: From `mixed_expand_config`.
        by_column: How lora_b lies.
        dropout: Of what is added, for the gradient of x; None for none.
    """
    m, n = y.shape
    if m == 0 or n == 0:
        return
    launch(
        _mixed_lora_expand_kernel,
        (cdiv(m, config.block_m) * cdiv(n, config.block_n),),
        y_ptr=y,
        s_ptr=s,
        order_ptr=order,
        segment_of_ptr=segment_of,
        segment_slot_ptr=segment_slot,
        lora_b_address_ptr=lora_b_address,
        lora_bias_address_ptr=lora_bias_address,
        rank_ptr=rank,
        scaling_ptr=scaling,
        M=m,
        N=n,
        planes=s.shape[0],
        stride_ym=y.stride(0),
        stride_yn=y.stride(1),
        stride_sp=s.stride(0),
        stride_sm=s.stride(1),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        HAS_LORA_BIAS=lora_bias_address is not None,
        FACTOR_DTYPE=triton_dtype(factor_dtype),
        BY_COLUMN=by_column,
        **DropoutTables.arguments(dropout),
        INPUT_PRECISION=config.input_precision,
        **config.launch_options,
    )
