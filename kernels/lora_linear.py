"""``y = x @ weight.T + bias + (scaling * s) @ lora_b.T`` in one kernel, rounded once.

x ``[M, K]``, weight ``[N, K]``, bias ``[N]``, s ``[M, R]`` (or the fp32 planes of a split shrink,
``[splits, M, R]``), lora_b ``[N, R]``, scaling ``[1]`` or ``[R]``, y ``[M, N]``. The adapter's term
is one more accumulation behind the K loop of the base GEMM.

The gradient of x is the same kernel: ``dx = dy @ weight + mask * (ds @ lora_a) / (1 - p)`` takes
weight and lora_a transposed, ds as s, and on its way into the accumulator the term meets the mask
that x met in the forward. A scaling of None is 1.

Bytes moved, e an element: ``e (M K + N K + M N) + e R (M + N)``; with planes ``4 splits M R`` in
place of ``e M R``, read by every column of tiles.

Launched as a programmatic dependent of the shrink (``pdl``, sm_90 and up), a program runs its K
loop while the shrink still works and waits only before it reads s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.base_product import base_product, grouped_tile
from fastlora.kernels.configs import KernelConfig, cdiv
from fastlora.kernels.launch import kept, launch
from fastlora.kernels.philox import philox_keep_mask
from fastlora.kernels.rank_rows import load_rank_columns, load_shrunk, scale_rank_columns


# M and threshold vary from call to call: no compile of its own for 1 or a multiple of 16.
@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_linear_kernel(
    # tensors
    y_ptr,
    x_ptr,
    weight_ptr,
    s_ptr,
    lora_b_ptr,
    scaling_ptr,
    bias_ptr,
    s_out_ptr,
    seed_ptr,
    # scalars
    M,
    N,
    K,
    R,
    threshold,
    inv_keep,
    # strides
    stride_ym,
    stride_yn,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_sp,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    stride_scaling,
    stride_bias,
    stride_om,
    stride_or,
    # meta
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PLANES: tl.constexpr,
    ONE_RANK_CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    WEIGHT_POLICY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    STORE_S: tl.constexpr,
    PDL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    first_m = tl.cast(pid_m * BLOCK_M, tl.int64)
    first_n = tl.cast(pid_n * BLOCK_N, tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M - pid_m * BLOCK_M
    mask_n = offs_n < N - pid_n * BLOCK_N

    # The factor's first columns do not depend on the shrink: loaded here, scaled behind the K loop.
    # From 64 rows on that hides their latency; on smaller tiles the compiler moves a layout
    # conversion, and with it the wait, in front of the loop (SASS, sm_90, Triton 3.6 and 3.9).
    lora_b_ptr += first_n * stride_bn
    b, scale = load_rank_columns(
        lora_b_ptr,
        scaling_ptr,
        first_row=0,
        start=0,
        rank=R,
        mask_n=mask_n,
        stride_bn=stride_bn,
        stride_br=stride_br,
        stride_scaling=stride_scaling,
        BLOCK_N=BLOCK_N,
        BLOCK_R=BLOCK_R,
    )
    if HAS_BIAS:
        # bias: [BLOCK_N]
        bias_ptr += first_n * stride_bias
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)

    acc = base_product(
        x_ptr + first_m * stride_xm,
        weight_ptr + first_n * stride_wn,
        offs_xm=offs_m * stride_xm,
        mask_m=mask_m,
        mask_n=mask_n,
        K=K,
        stride_xk=stride_xk,
        stride_wn=stride_wn,
        stride_wk=stride_wk,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        EVEN_K=EVEN_K,
        WEIGHT_POLICY=WEIGHT_POLICY,
        INPUT_PRECISION=INPUT_PRECISION,
    )

    if PDL:
        tl.extra.cuda.gdc_wait()
    if HAS_DROPOUT:
        product = acc
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    s_ptr += first_m * stride_sm
    s_out_offs = first_m * stride_om + offs_m[:, None] * stride_om
    for start in tl.range(0, BLOCK_R if ONE_RANK_CHUNK else R, BLOCK_R, num_stages=1):
        s = load_shrunk(
            s_ptr,
            start=start,
            rank=R,
            mask_m=mask_m,
            stride_sp=stride_sp,
            stride_sm=stride_sm,
            stride_sr=stride_sr,
            dtype=dtype,
            BLOCK_M=BLOCK_M,
            BLOCK_R=BLOCK_R,
            PLANES=PLANES,
        )
        if STORE_S:  # noqa: SIM102 - this one is decided at compile time
            if pid_n == 0:
                offs_r = start + tl.arange(0, BLOCK_R)
                mask_s = mask_m[:, None] & (offs_r < R)[None, :]
                tl.store(s_out_ptr + s_out_offs + offs_r[None, :] * stride_or, s, mask=mask_s)
        scaled = scale_rank_columns(b, scale, dtype)
        # [BLOCK_M, BLOCK_R] x [BLOCK_R, BLOCK_N]
        acc = tl.dot(s, scaled, acc, input_precision=INPUT_PRECISION)
        if not ONE_RANK_CHUNK:
            b, scale = load_rank_columns(
                lora_b_ptr,
                scaling_ptr,
                first_row=0,
                start=start + BLOCK_R,
                rank=R,
                mask_n=mask_n,
                stride_bn=stride_bn,
                stride_br=stride_br,
                stride_scaling=stride_scaling,
                BLOCK_N=BLOCK_N,
                BLOCK_R=BLOCK_R,
            )

    if HAS_DROPOUT:
        keep = philox_keep_mask(
            tl.load(seed_ptr), pid_m * BLOCK_M, pid_n * BLOCK_N, threshold, 0, BLOCK_M, BLOCK_N
        )
        acc = product + tl.where(keep, acc * tl.cast(inv_keep, tl.float32), 0.0)
    if HAS_BIAS:
        acc += bias[None, :]
    # y: [BLOCK_M, BLOCK_N]
    y_ptr += first_m * stride_ym + first_n * stride_yn
    tl.store(
        y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn,
        acc.to(y_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )


@kept
def launch_lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor | None,
    *,
    bias: torch.Tensor | None,
    s_out: torch.Tensor | None,
    config: KernelConfig,
    pdl: bool,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """Writes ``x @ weight.T + bias + (scaling * s) @ lora_b.T``.

    Args:
        y: ``[M, N]`` in x's dtype.
        x: ``[M, K]``, any strides.
        weight: ``[N, K]`` in x's dtype, any strides.
        s: ``[M, R]`` in x's dtype, or fp32 planes ``[splits, M, R]`` to sum.
        lora_b: ``[N, R]``, any strides, x's dtype or one that is cast to it at the load.
        scaling: fp32 ``[1]``, or ``[R]`` with one value per rank row; None for 1.
        bias: ``[N]``, any floating-point dtype, or None.
        s_out: ``[M, R]`` in x's dtype, which receives the sum of the planes, or None.
        config: From `linear_config`.
        pdl: Launch as a programmatic dependent of the kernel before, which must be the shrink.
        seed: int64 device tensor of one element; read only when ``dropout_p > 0``.
        dropout_p: Probability of dropping an element of the LoRA term, for the gradient of x.
    """
    m, k = x.shape
    n, r = lora_b.shape
    if m == 0 or n == 0:
        return
    # A hint that goes by M would make a kernel of its own for small batches.
    one_row_tile = m <= config.block_m and not config.batch_invariant
    grid = (cdiv(m, config.block_m) * cdiv(n, config.block_n),)
    launch(
        _lora_linear_kernel,
        grid,
        y_ptr=y,
        x_ptr=x,
        weight_ptr=weight,
        s_ptr=s,
        lora_b_ptr=lora_b,
        scaling_ptr=scaling,
        bias_ptr=bias,
        s_out_ptr=s_out,
        seed_ptr=seed if dropout_p > 0.0 else None,
        M=m,
        N=n,
        K=k,
        R=r,
        threshold=round(dropout_p * 65536),
        inv_keep=1.0 / (1.0 - dropout_p),
        stride_ym=y.stride(0),
        stride_yn=y.stride(1),
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_sp=s.stride(0) if s.dim() == 3 else 0,
        stride_sm=s.stride(-2),
        stride_sr=s.stride(-1),
        stride_bn=lora_b.stride(0),
        stride_br=lora_b.stride(1),
        stride_scaling=0 if scaling is None or scaling.numel() == 1 else scaling.stride(0),
        stride_bias=0 if bias is None else bias.stride(0),
        stride_om=0 if s_out is None else s_out.stride(0),
        stride_or=0 if s_out is None else s_out.stride(1),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        GROUP_M=config.group_m,
        PLANES=s.shape[0] if s.dim() == 3 else 1,
        ONE_RANK_CHUNK=r <= config.block_r,
        EVEN_K=k % config.block_k == 0,
        WEIGHT_POLICY="evict_first" if one_row_tile else "",
        HAS_BIAS=bias is not None,
        HAS_DROPOUT=dropout_p > 0.0,
        STORE_S=s_out is not None,
        PDL=pdl,
        INPUT_PRECISION=config.input_precision,
        **config.launch_options,
        **({"launch_pdl": True} if pdl else {}),
    )
