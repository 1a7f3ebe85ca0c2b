"""The base GEMM's K loop, shared by every linear: a tile of ``x @ weight.T`` in fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_tile(pid, num_pid_m, num_pid_n, GROUP_M: tl.constexpr):
    """Returns (pid_m, pid_n), GROUP_M row tiles at a time: neighbours share weight tiles in L2."""
    group_size = GROUP_M * num_pid_n
    first_m = (pid // group_size) * GROUP_M
    group_m = min(num_pid_m - first_m, GROUP_M)
    pid_in_group = pid % group_size
    return first_m + pid_in_group % group_m, pid_in_group // group_m


@triton.jit
def base_product(
    x_ptr,
    weight_ptr,
    offs_xm,
    mask_m,
    mask_n,
    K,
    stride_xk,
    stride_wn,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    WEIGHT_POLICY: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    acc=None,
):
    """Returns ``x @ weight.T`` of one tile, ``[BLOCK_M, BLOCK_N]`` in fp32, on top of ``acc``.

    ``offs_xm [BLOCK_M]`` are the tile's rows of x as offsets from ``x_ptr``, so rows may be
    gathered; ``weight_ptr`` points at the tile's first row of weight.
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_x = offs_xm[:, None] + offs_k[None, :] * stride_xk
    offs_w = offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
    if acc is None:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_x = mask_m[:, None]
        mask_w = mask_n[None, :]
        if not EVEN_K:
            mask_k = offs_k < K - k
            mask_x = mask_x & mask_k[None, :]
            mask_w = mask_w & mask_k[:, None]
        # x: [BLOCK_M, BLOCK_K], w: [BLOCK_K, BLOCK_N]
        x = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0)
        w = tl.load(weight_ptr + offs_w, mask=mask_w, other=0.0, eviction_policy=WEIGHT_POLICY)
        # [BLOCK_M, BLOCK_K] x [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        x_ptr += tl.cast(stride_xk, tl.int64) * BLOCK_K
        weight_ptr += tl.cast(stride_wk, tl.int64) * BLOCK_K
    return acc


@triton.jit
def coded_product(
    x_ptr,
    codes_ptr,
    parts_ptr,
    offs_xm,
    mask_m,
    first_n,
    first_k,
    steps,
    N,
    K,
    stride_xk,
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
    """`base_product` with a weight of codes, of which ``WEIGHT`` loads a tile.

    ``WEIGHT`` is a loader of `fastlora.kernels.weights`. The tile's first output is ``first_n``
    (int64, known as a multiple of BLOCK_N) of N; it sums ``steps`` elements from ``first_k`` on, of
    K. The codes are those of ``[N, K]``, or with TRANSPOSED of ``[K, N]``. ``x_ptr`` points at
    column ``first_k``.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offs_k = tl.arange(0, BLOCK_K)
    offs_x = offs_xm[:, None] + offs_k[None, :] * stride_xk
    if acc is None:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, steps, BLOCK_K):
        mask_x = mask_m[:, None]
        if not EVEN_K:
            mask_x = mask_x & (offs_k < steps - k)[None, :]
        # x: [BLOCK_M, BLOCK_K]
        x = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0)
        place = tl.multiple_of(tl.cast(first_k + k, tl.int32), BLOCK_K)
        if TRANSPOSED:
            # w: [BLOCK_K, BLOCK_N]
            w = WEIGHT(
                codes_ptr,
                parts_ptr,
                tl.cast(place, tl.int64),
                first_n,
                K,
                N,
                BLOCK_K,
                BLOCK_N,
                WEIGHT_BLOCK,
                EVEN_K,
                False,
                dtype,
                WEIGHT_POLICY,
            )
        else:
            w = WEIGHT(
                codes_ptr,
                parts_ptr,
                first_n,
                place,
                N,
                K,
                BLOCK_N,
                BLOCK_K,
                WEIGHT_BLOCK,
                False,
                EVEN_K,
                dtype,
                WEIGHT_POLICY,
            )
            w = tl.trans(w)
        # [BLOCK_M, BLOCK_K] x [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        x_ptr += tl.cast(stride_xk, tl.int64) * BLOCK_K
    return acc
