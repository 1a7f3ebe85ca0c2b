"""``y = (y - bias) * g + bias`` in place, with DoRA scales g of each row's own adapter.

The rows of y ``[M, N]`` are in any order. bias is ``[N]`` or None, and a table ``[S]`` has the
addresses of g, fp32 ``[N]``. Rows of an adapter without scales are not changed.

Bytes moved, for e bytes per element of y: ``2 e M' N`` for the M' rows with scales; ``4 N`` per
adapter with scales, and ``e N`` of the bias, read once per piece.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import strides
from fastlora.kernels.config_tables import KernelConfig, cdiv
from fastlora.kernels.launch import cached_launches, launch
from fastlora.kernels.mixed_rows import TABLES, factor_pointer, load_piece, row_arguments

# Stands in for the address of scales that have not been computed yet
# (`fastlora.ops.factors.PENDING`).
PENDING: tl.constexpr = tl.constexpr(16)


# M varies between calls: do not specialize the kernel on 1 or multiples of 16.
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=TABLES)
def _mixed_dora_scale_kernel(
    # tensors
    y_ptr,
    bias_ptr,
    order_ptr,
    segment_of_ptr,
    segment_slot_ptr,
    piece_start_ptr,
    scale_address_ptr,
    # scalars
    M,
    N,
    # strides
    stride_ym,
    stride_yn,
    # meta
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    pid_n = tl.program_id(1)
    first_m, stop_m, slot = load_piece(
        tl.program_id(0), piece_start_ptr, segment_of_ptr, segment_slot_ptr, M
    )
    address = tl.load(scale_address_ptr + slot, mask=slot >= 0, other=0)

    if address != 0:
        first_n = tl.cast(pid_n * BLOCK_N, tl.int64)
        offs_m = tl.arange(0, BLOCK_M)
        offs_n = tl.arange(0, BLOCK_N)
        mask_m = offs_m < stop_m - first_m
        mask_n = offs_n < N - pid_n * BLOCK_N
        row = tl.load(order_ptr + first_m + offs_m, mask=mask_m, other=0).to(tl.int64)
        # y: [BLOCK_M, BLOCK_N]
        y_ptr += first_n * stride_yn
        y_ptrs = y_ptr + (row * stride_ym)[:, None] + offs_n[None, :] * stride_yn
        mask_y = mask_m[:, None] & mask_n[None, :]
        y = tl.load(y_ptrs, mask=mask_y, other=0.0).to(tl.float32)
        # g: [BLOCK_N]
        g_ptr = factor_pointer(address, tl.float32) + first_n
        columns = tl.where(address == PENDING, 0, N - pid_n * BLOCK_N)
        g = tl.load(g_ptr + offs_n, mask=offs_n < columns, other=float("nan"))
        if HAS_BIAS:
            # bias: [BLOCK_N]
            bias = tl.load(bias_ptr + first_n + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            y = (y - bias[None, :]) * g[None, :] + bias[None, :]
        else:
            y *= g[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_y)


@cached_launches
def launch_mixed_dora_scale(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    rows: Sequence[torch.Tensor],
    scale_address: torch.Tensor,
    *,
    config: KernelConfig,
) -> None:
    """Scale the rows of adapters with scales. Scales that have not been computed yet give NaN.

    Args:
        y: ``[M, N]``, any strides without overlap; fp16, bf16, or fp32.
        bias: ``[N]``, contiguous, any float dtype, or None.
        rows: Sorted rows with ``Rows.pieces(config.block_m)``, as in `row_arguments`.
        scale_address: int64 ``[S]``, the address of each slot's g, fp32 ``[N]``; 0 for none.
        config: From `configs.choose`.
    """
    m, n = y.shape
    if m == 0 or n == 0:
        return
    launch(
        _mixed_dora_scale_kernel,
        (rows[-1].shape[0] - 1, cdiv(n, config.block_n)),
        y_ptr=y,
        bias_ptr=bias,
        **row_arguments(rows),
        scale_address_ptr=scale_address,
        M=m,
        N=n,
        **strides("y", "mn", y),
        **config.arguments("mn"),
        HAS_BIAS=bias is not None,
    )
