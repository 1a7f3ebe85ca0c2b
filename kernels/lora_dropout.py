"""``out = mask * x / (1 - p)`` for x and out ``[M, K]``, with the mask that `lora_shrink` applies.

Bytes moved, for e bytes per element: ``2 e M K``. The mask is computed, not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import strides
from fastlora.kernels.config_tables import KernelConfig, cdiv
from fastlora.kernels.launch import cached_launches, launch
from fastlora.kernels.philox import philox_keep_mask


# M and threshold vary between calls: do not specialize the kernel on 1 or multiples of 16.
@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_dropout_kernel(
    # tensors
    out_ptr,
    x_ptr,
    seed_ptr,
    # scalars
    M,
    K,
    threshold,
    inv_keep,
    # strides
    stride_om,
    stride_ok,
    stride_xm,
    stride_xk,
    # meta
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    num_pid_k = tl.cdiv(K, BLOCK_K)
    first_m = (pid // num_pid_k) * BLOCK_M
    first_k = (pid % num_pid_k) * BLOCK_K
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask = (offs_m < M - first_m)[:, None] & (offs_k < K - first_k)[None, :]
    x_ptr += tl.cast(first_m, tl.int64) * stride_xm + tl.cast(first_k, tl.int64) * stride_xk
    out_ptr += tl.cast(first_m, tl.int64) * stride_om + tl.cast(first_k, tl.int64) * stride_ok
    # x: [BLOCK_M, BLOCK_K]
    x = tl.load(
        x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=mask, other=0.0
    )
    keep = philox_keep_mask(tl.load(seed_ptr), first_m, first_k, threshold, 0, BLOCK_M, BLOCK_K)
    out = tl.where(keep, x.to(tl.float32) * tl.cast(inv_keep, tl.float32), 0.0)
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_k[None, :] * stride_ok,
        out.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


@cached_launches
def launch_lora_dropout(
    out: torch.Tensor,
    x: torch.Tensor,
    *,
    seed: torch.Tensor,
    dropout_p: float,
    config: KernelConfig,
) -> None:
    """Write x to ``out``, with dropped elements zero and others divided by ``1 - dropout_p``.

    Args:
        out: ``[M, K]``, any strides without overlap.
        x: ``[M, K]``, any strides.
        seed: int64 device tensor of one element.
        dropout_p: Probability of dropping an element, rounded to a multiple of 2**-16.
        config: From `configs.choose`.
    """
    m, k = x.shape
    if m == 0 or k == 0:
        return
    grid = (cdiv(m, config.block_m) * cdiv(k, config.block_k),)
    launch(
        _lora_dropout_kernel,
        grid,
        out_ptr=out,
        x_ptr=x,
        seed_ptr=seed,
        M=m,
        K=k,
        threshold=round(dropout_p * 65536),
        inv_keep=1.0 / (1.0 - dropout_p),
        **strides("o", "mk", out),
        **strides("x", "mk", x),
        **config.arguments("mk"),
    )
