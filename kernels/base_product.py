"""The K loop of the base GEMM, shared by all linear kernels: a tile of ``x @ weight.T`` in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from fastlora.kernels.weights import Tile


@triton.jit
def grouped_tile(pid, num_pid_m, num_pid_n, GROUP_M: tl.constexpr):
    """Return (pid_m, pid_n) in groups of GROUP_M row tiles: neighbors share weights in L2."""
    group_size = GROUP_M * num_pid_n
    first_m = (pid // group_size) * GROUP_M
    group_m = min(num_pid_m - first_m, GROUP_M)
    pid_in_group = pid % group_size
    return first_m + pid_in_group % group_m, pid_in_group // group_m


@triton.jit
def base_product(
    x_ptr,
    weight_ptr,
    parts_ptr,
    offs_xm,
    mask_m,
    mask_n,
    first_n,
    first_k,
    steps,
    N,
    K,
    stride_xk,
    stride_wn,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    WEIGHT: tl.constexpr,
    WEIGHT_BLOCK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WEIGHT_POLICY: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    acc=None,
):
    """Return a tile of ``x @ weight.T``, ``[BLOCK_M, BLOCK_N]`` in fp32, added to ``acc``.

    The product runs over ``steps`` of the K elements, starting at ``first_k``. ``offs_xm
    [BLOCK_M]`` are the offsets of the tile's rows from ``x_ptr``, which points at column
    ``first_k``. The rows may therefore be gathered.

    Without WEIGHT, ``weight_ptr`` points at the first element of the tile in a dense matrix.
    Otherwise WEIGHT is a loader of `fastlora.kernels.weights`, and ``weight_ptr`` points at the
    quantized data of ``[N, K]``, or with TRANSPOSED of ``[K, N]``. ``first_n`` is then the tile's
    first output (int64, a multiple of BLOCK_N that the compiler knows as one).
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_x = offs_xm[:, None] + offs_k[None, :] * stride_xk
    offs_w = offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
    if acc is None:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, steps, BLOCK_K):
        mask_x = mask_m[:, None]
        mask_w = mask_n[None, :]
        if not EVEN_K:
            mask_k = offs_k < steps - k
            mask_x = mask_x & mask_k[None, :]
            mask_w = mask_w & mask_k[:, None]
        # x: [BLOCK_M, BLOCK_K], w: [BLOCK_K, BLOCK_N]
        x = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0)
        if WEIGHT is None:
            w = tl.load(weight_ptr + offs_w, mask=mask_w, other=0.0, eviction_policy=WEIGHT_POLICY)
        else:
            place = tl.multiple_of(tl.cast(first_k + k, tl.int32), BLOCK_K)
            if TRANSPOSED:
                row = tl.cast(place, tl.int64)
                w = WEIGHT(
                    weight_ptr,
                    parts_ptr,
                    Tile(row, first_n, K, N, BLOCK_K, BLOCK_N, WEIGHT_BLOCK, EVEN_K, False),
                    dtype,
                    WEIGHT_POLICY,
                )
            else:
                w = WEIGHT(
                    weight_ptr,
                    parts_ptr,
                    Tile(first_n, place, N, K, BLOCK_N, BLOCK_K, WEIGHT_BLOCK, False, EVEN_K),
                    dtype,
                    WEIGHT_POLICY,
                )
                w = tl.trans(w)
        # [BLOCK_M, BLOCK_K] x [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        x_ptr += tl.cast(stride_xk, tl.int64) * BLOCK_K
        if WEIGHT is None:
            weight_ptr += tl.cast(stride_wk, tl.int64) * BLOCK_K
    return acc
