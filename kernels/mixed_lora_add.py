"""``y += scaling * ((x @ lora_a.T) @ lora_b.T + lora_bias)`` in one launch, for few rows.

x ``[M, K]`` and y ``[M, N]`` in any order of rows, each row with its own adapter: lora_a
``[rank, K]``, lora_b as rank rows ``[rank, N]`` and lora_bias ``[N]`` behind tables ``[S]``. Every
tile of N makes s anew, which stays in registers: at decode that costs less than a second launch.
Rows without an adapter are not touched.

Bytes moved, e and f an element of x and of the factors: ``2 e M' N``, M' the rows with an adapter;
``f N`` a rank row of every adapter present, read once a piece; and, issued once a tile of N,
``e M' K`` for each BLOCK_R rank rows and ``f K`` a rank row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.configs import KernelConfig, cdiv
from fastlora.kernels.launch import kept, launch
from fastlora.kernels.mixed_rows import TABLES, factor_pointer, triton_dtype


# M varies from call to call: no compile of its own for 1 or a multiple of 16.
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=TABLES)
def _mixed_lora_add_kernel(
    # tensors
    y_ptr,
    x_ptr,
    order_ptr,
    segment_of_ptr,
    segment_slot_ptr,
    piece_start_ptr,
    lora_a_address_ptr,
    lora_b_address_ptr,
    lora_bias_address_ptr,
    rank_ptr,
    scaling_ptr,
    # scalars
    M,
    N,
    K,
    # strides
    stride_ym,
    stride_yn,
    stride_xm,
    stride_xk,
    # meta
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_LORA_BIAS: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    piece = tl.program_id(0)
    pid_n = tl.program_id(1)
    first_m = tl.load(piece_start_ptr + piece)
    stop_m = tl.load(piece_start_ptr + piece + 1)
    used = first_m < M
    segment = tl.load(segment_of_ptr + first_m, mask=used, other=0)
    slot = tl.load(segment_slot_ptr + segment, mask=used, other=-1)
    held = slot >= 0
    rank = tl.load(rank_ptr + slot, mask=held, other=0)
    lora_bias_address = tl.cast(0, tl.int64)
    if HAS_LORA_BIAS:
        lora_bias_address = tl.load(lora_bias_address_ptr + slot, mask=held, other=0)

    if (rank > 0) | (lora_bias_address != 0) | (slot < -1):
        scale = tl.load(scaling_ptr + slot, mask=held, other=0.0)
        lora_a = factor_pointer(
            tl.load(lora_a_address_ptr + slot, mask=held, other=0), FACTOR_DTYPE
        )
        lora_b = factor_pointer(
            tl.load(lora_b_address_ptr + slot, mask=held, other=0), FACTOR_DTYPE
        )
        first_n = tl.cast(pid_n * BLOCK_N, tl.int64)
        offs_m = tl.arange(0, BLOCK_M)
        offs_n = tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        mask_m = offs_m < stop_m - first_m
        mask_n = offs_n < N - pid_n * BLOCK_N
        row = tl.load(order_ptr + first_m + offs_m, mask=mask_m, other=0).to(tl.int64)
        # y: [BLOCK_M, BLOCK_N]
        y_ptr += first_n * stride_yn
        y_ptrs = y_ptr + (row * stride_ym)[:, None] + offs_n[None, :] * stride_yn
        mask_y = mask_m[:, None] & mask_n[None, :]
        y = tl.load(y_ptrs, mask=mask_y, other=0.0)
        offs_x = (row * stride_xm)[:, None] + offs_k[None, :] * stride_xk

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in tl.range(0, rank, BLOCK_R, num_stages=1):
            offs_r = start + tl.arange(0, BLOCK_R)
            mask_r = offs_r < rank
            # b: [BLOCK_R, BLOCK_N]
            b = tl.load(
                lora_b + (tl.cast(offs_r, tl.int64) * N)[:, None] + (first_n + offs_n)[None, :],
                mask=mask_r[:, None] & mask_n[None, :],
                other=0.0,
            )
            a_ptrs = lora_a + (tl.cast(offs_r, tl.int64) * K)[None, :] + offs_k[:, None]
            x_ptrs = x_ptr + offs_x
            s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for k in range(0, K, BLOCK_K):
                mask_x = mask_m[:, None]
                mask_a = mask_r[None, :]
                if not EVEN_K:
                    mask_k = offs_k < K - k
                    mask_x = mask_x & mask_k[None, :]
                    mask_a = mask_a & mask_k[:, None]
                # x: [BLOCK_M, BLOCK_K], a: [BLOCK_K, BLOCK_R]
                x = tl.load(x_ptrs, mask=mask_x, other=0.0)
                a = tl.load(a_ptrs, mask=mask_a, other=0.0)
                # [BLOCK_M, BLOCK_K] x [BLOCK_K, BLOCK_R]
                s = tl.dot(x, a.to(dtype), s, input_precision=INPUT_PRECISION)
                x_ptrs += tl.cast(stride_xk, tl.int64) * BLOCK_K
                a_ptrs += BLOCK_K
            scaled = (b.to(tl.float32) * scale).to(dtype)
            # [BLOCK_M, BLOCK_R] x [BLOCK_R, BLOCK_N]
            acc = tl.dot(s.to(dtype), scaled, acc, input_precision=INPUT_PRECISION)
        if HAS_LORA_BIAS:
            lora_bias_ptr = factor_pointer(lora_bias_address, FACTOR_DTYPE) + first_n
            columns = tl.where(lora_bias_address != 0, N - pid_n * BLOCK_N, 0)
            # lora_bias: [BLOCK_N]
            lora_bias = tl.load(lora_bias_ptr + offs_n, mask=offs_n < columns, other=0.0)
            acc += (lora_bias.to(tl.float32) * scale)[None, :]
        acc = tl.where(slot < -1, float("nan"), y.to(tl.float32) + acc)
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_y)


@kept
def launch_mixed_lora_add(
    y: torch.Tensor,
    x: torch.Tensor,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    pieces: torch.Tensor,
    lora_a_address: torch.Tensor,
    lora_b_address: torch.Tensor,
    lora_bias_address: torch.Tensor | None,
    rank: torch.Tensor,
    scaling: torch.Tensor,
    *,
    factor_dtype: torch.dtype,
    config: KernelConfig,
) -> None:
    """Adds each row's own adapter to ``y`` in place; rows of invalid ids become NaN.

    Args:
        y: ``[M, N]``, any strides without overlap.
        x: ``[M, K]``, any strides.
        order: int32 ``[M]``, like the next two from `fastlora.ops.rows.Rows`.
        segment_of: int32 ``[M]``.
        segment_slot: int32 ``[segments]``.
        pieces: int32, ``Rows.pieces(config.block_m)``.
        lora_a_address: int64 ``[S]``: where each slot's lora_a ``[rank, K]`` lies.
        lora_b_address: int64 ``[S]``: where each slot's lora_b lies, as rank rows ``[rank, N]``.
        lora_bias_address: int64 ``[S]``, 0 for an adapter without one; None if none has.
        rank: int32 ``[S]``, 0 where the adapter leaves the module alone.
        scaling: fp32 ``[S]``.
        factor_dtype: Of the factors; they are cast to x's dtype at the load.
        config: From `mixed_add_config`.
    """
    (m, n), k = y.shape, x.shape[1]
    if m == 0 or n == 0:
        return
    launch(
        _mixed_lora_add_kernel,
        (pieces.shape[0] - 1, cdiv(n, config.block_n)),
        y_ptr=y,
        x_ptr=x,
        order_ptr=order,
        segment_of_ptr=segment_of,
        segment_slot_ptr=segment_slot,
        piece_start_ptr=pieces,
        lora_a_address_ptr=lora_a_address,
        lora_b_address_ptr=lora_b_address,
        lora_bias_address_ptr=lora_bias_address,
        rank_ptr=rank,
        scaling_ptr=scaling,
        M=m,
        N=n,
        K=k,
        stride_ym=y.stride(0),
        stride_yn=y.stride(1),
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        EVEN_K=k % config.block_k == 0,
        HAS_LORA_BIAS=lora_bias_address is not None,
        FACTOR_DTYPE=triton_dtype(factor_dtype),
        INPUT_PRECISION=config.input_precision,
        **config.launch_options,
    )
