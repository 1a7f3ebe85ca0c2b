"""``y += (scaling * s) @ lora_b.T`` in place: s ``[M, R]``, lora_b ``[N, R]``, y ``[M, N]``.

scaling is ``[1]`` or ``[R]``, None for 1. y is read once, added to in fp32 and rounded once. For
the gradient of x, ``dx += mask * (ds @ lora_a) / (1 - p)``, the term meets the mask that x met.

Bytes moved, e an element: ``e (2 M N + M R + N R)``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.configs import KernelConfig, cdiv
from fastlora.kernels.launch import kept, launch
from fastlora.kernels.philox import philox_keep_mask
from fastlora.kernels.rank_rows import load_rank_columns, load_shrunk, scale_rank_columns


# M and threshold vary from call to call: no compile of its own for 1 or a multiple of 16.
@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_expand_kernel(
    # tensors
    y_ptr,
    s_ptr,
    lora_b_ptr,
    scaling_ptr,
    seed_ptr,
    # scalars
    M,
    N,
    R,
    threshold,
    inv_keep,
    # strides
    stride_ym,
    stride_yn,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    stride_scaling,
    # meta
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_RANK_CHUNK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = s_ptr.dtype.element_ty
    pid = tl.program_id(0)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    pid_m = pid // num_pid_n
    pid_n = pid % num_pid_n
    first_m = tl.cast(pid_m * BLOCK_M, tl.int64)
    first_n = tl.cast(pid_n * BLOCK_N, tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M - pid_m * BLOCK_M
    mask_n = offs_n < N - pid_n * BLOCK_N

    # y: [BLOCK_M, BLOCK_N], most of the bytes: asked for first
    y_ptr += first_m * stride_ym + first_n * stride_yn
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    mask_y = mask_m[:, None] & mask_n[None, :]
    y = tl.load(y_ptrs, mask=mask_y, other=0.0)

    lora_b_ptr += first_n * stride_bn
    s_ptr += first_m * stride_sm
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in tl.range(0, BLOCK_R if ONE_RANK_CHUNK else R, BLOCK_R, num_stages=1):
        b, scale = load_rank_columns(
            lora_b_ptr,
            scaling_ptr,
            first_row=0,
            start=start,
            rank=R,
            mask_n=mask_n,
            stride_bn=stride_bn,
            stride_br=stride_br,
            stride_scaling=stride_scaling,
            BLOCK_N=BLOCK_N,
            BLOCK_R=BLOCK_R,
        )
        s = load_shrunk(
            s_ptr,
            start=start,
            rank=R,
            mask_m=mask_m,
            stride_sp=0,
            stride_sm=stride_sm,
            stride_sr=stride_sr,
            dtype=dtype,
            BLOCK_M=BLOCK_M,
            BLOCK_R=BLOCK_R,
            PLANES=1,
        )
        scaled = scale_rank_columns(b, scale, dtype)
        # [BLOCK_M, BLOCK_R] x [BLOCK_R, BLOCK_N]
        acc = tl.dot(s, scaled, acc, input_precision=INPUT_PRECISION)
    if HAS_DROPOUT:
        keep = philox_keep_mask(
            tl.load(seed_ptr), pid_m * BLOCK_M, pid_n * BLOCK_N, threshold, 0, BLOCK_M, BLOCK_N
        )
        acc = tl.where(keep, acc * tl.cast(inv_keep, tl.float32), 0.0)
    tl.store(y_ptrs, (y.to(tl.float32) + acc).to(y_ptr.dtype.element_ty), mask=mask_y)


@kept
def launch_lora_expand(
    y: torch.Tensor,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor | None,
    *,
    config: KernelConfig,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """Adds ``(scaling * s) @ lora_b.T`` to ``y`` in place.

    Args:
        y: ``[M, N]``, any strides without overlap.
        s: ``[M, R]``, any strides; its dtype is the dtype of the dots.
        lora_b: ``[N, R]``, any strides, s's dtype or one that is cast to it at the load.
        scaling: fp32 ``[1]``, or ``[R]`` with one value per rank row; None for 1.
        config: From `expand_config`.
        seed: int64 device tensor of one element; read only when ``dropout_p > 0``.
        dropout_p: Probability of dropping an element of what is added, for the gradient of x.
    """
    m, n = y.shape
    r = lora_b.shape[1]
    if m == 0 or n == 0:
        return
    grid = (cdiv(m, config.block_m) * cdiv(n, config.block_n),)
    launch(
        _lora_expand_kernel,
        grid,
        y_ptr=y,
        s_ptr=s,
        lora_b_ptr=lora_b,
        scaling_ptr=scaling,
        seed_ptr=seed if dropout_p > 0.0 else None,
        M=m,
        N=n,
        R=r,
        threshold=round(dropout_p * 65536),
        inv_keep=1.0 / (1.0 - dropout_p),
        stride_ym=y.stride(0),
        stride_yn=y.stride(1),
        stride_sm=s.stride(0),
        stride_sr=s.stride(1),
        stride_bn=lora_b.stride(0),
        stride_br=lora_b.stride(1),
        stride_scaling=0 if scaling is None or scaling.numel() == 1 else scaling.stride(0),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        ONE_RANK_CHUNK=r <= config.block_r,
        HAS_DROPOUT=dropout_p > 0.0,
        INPUT_PRECISION=config.input_precision,
        **config.launch_options,
    )
