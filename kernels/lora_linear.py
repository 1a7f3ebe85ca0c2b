"""``y = x @ weight.T + bias + (scaling * s) @ lora_b.T`` in one kernel, rounded once.

x ``[M, K]``, weight ``[N, K]``, bias ``[N]``, s ``[M, R]`` (or the fp32 partial sums of a split-K
shrink, ``[splits, M, R]``), lora_b ``[N, R]``, scaling ``[1]`` or ``[R]``, y ``[M, N]``. The
adapter's term is accumulated after the K loop of the base GEMM.

The same kernel computes the gradient of x, ``dx = dy @ weight + mask * (ds @ lora_a) / (1 - p)``.
It takes weight and lora_a transposed, and ds in place of s. Before the term is accumulated, it is
masked like x in the forward pass. A scaling of None stands for 1.

Up to four modules of a shared-input group are one grid over the tiles of all. Each has its own
weight, N, and rank. Their columns of s are side by side, in the order of `lora_shrink`.

If the tiles do not fill the chip, programs share K. Each writes an fp32 partial sum of
``[splits, M, N]``, and `plane_sums` adds them in order. The first of them adds bias and adapter.

Bytes moved, for e bytes per element and N and R summed over modules:
``e (M K + N K + M N) + e R (M + N)``. With partial sums of s, ``4 splits M R`` replaces ``e M R``,
and is read by every column of tiles. Partial sums of y add ``8 splits M N``. For a quantized
weight, its loader in `weights` states the bytes that replace ``e N K``.

If the kernel is launched as a programmatic dependent of the shrink (``pdl``, sm_90 and later), a
program runs its K loop while the shrink is still running, and waits only before it reads s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import dropout_of, strides
from fastlora.kernels.base_product import base_product, grouped_tile
from fastlora.kernels.config_tables import KernelConfig, cdiv
from fastlora.kernels.launch import cached_launches, launch
from fastlora.kernels.modules import (
    Module,
    module_of_tile,
    named_modules,
    of_module,
    weight_arguments,
)
from fastlora.kernels.philox import philox_keep_mask
from fastlora.kernels.rank_rows import (
    load_rank_columns,
    load_shrunk,
    multiple_of_16,
    scale_rank_columns,
    shrunk_arguments,
)


# M, threshold, and the stride between rows of s vary between calls: do not specialize the kernel on
# 1 or multiples of 16. ALIGNED_R says whether this stride and all ranks are multiples of 16.
@triton.jit(do_not_specialize=["M", "threshold", "stride_sm"])
def _lora_linear_kernel(
    # tensors
    x_ptr,
    s_ptr,
    s_out_ptr,
    seed_ptr,
    y_ptr,
    y_1_ptr,
    y_2_ptr,
    y_3_ptr,
    weight_ptr,
    weight_1_ptr,
    weight_2_ptr,
    weight_3_ptr,
    weight_parts_ptr,
    weight_parts_1_ptr,
    weight_parts_2_ptr,
    weight_parts_3_ptr,
    bias_ptr,
    bias_1_ptr,
    bias_2_ptr,
    bias_3_ptr,
    lora_b_ptr,
    lora_b_1_ptr,
    lora_b_2_ptr,
    lora_b_3_ptr,
    scaling_ptr,
    scaling_1_ptr,
    scaling_2_ptr,
    scaling_3_ptr,
    # scalars
    M,
    K,
    N,
    N_1,
    N_2,
    N_3,
    R,
    R_1,
    R_2,
    R_3,
    k_per_split,
    threshold,
    inv_keep,
    # strides
    stride_yp,
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
    NUM_PARTIALS: tl.constexpr,
    ONE_RANK_CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_MODULES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED_R: tl.constexpr,
    WEIGHT: tl.constexpr,
    WEIGHT_BLOCK: tl.constexpr,
    WEIGHT_TRANSPOSED: tl.constexpr,
    WEIGHT_POLICY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    STORE_S: tl.constexpr,
    PDL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    num_pid_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    if ALIGNED_R:
        stride_sm = multiple_of_16(stride_sm)
    first_k = tl.program_id(1) * k_per_split
    first_r = 0  # the module's first column of s
    if NUM_MODULES > 1:
        module, pid = module_of_tile(pid, num_pid_m, (N, N_1, N_2), BLOCK_N, NUM_MODULES)
        first_r = of_module(module, 0, R, R + R_1, R + R_1 + R_2, NUM_MODULES)
        y_ptr = of_module(module, y_ptr, y_1_ptr, y_2_ptr, y_3_ptr, NUM_MODULES)
        weight_ptr = of_module(
            module, weight_ptr, weight_1_ptr, weight_2_ptr, weight_3_ptr, NUM_MODULES
        )
        lora_b_ptr = of_module(
            module, lora_b_ptr, lora_b_1_ptr, lora_b_2_ptr, lora_b_3_ptr, NUM_MODULES
        )
        scaling_ptr = of_module(
            module, scaling_ptr, scaling_1_ptr, scaling_2_ptr, scaling_3_ptr, NUM_MODULES
        )
        if WEIGHT is not None:
            weight_parts_ptr = of_module(
                module,
                weight_parts_ptr,
                weight_parts_1_ptr,
                weight_parts_2_ptr,
                weight_parts_3_ptr,
                NUM_MODULES,
            )
        if HAS_BIAS:
            bias_ptr = of_module(module, bias_ptr, bias_1_ptr, bias_2_ptr, bias_3_ptr, NUM_MODULES)
        if ALIGNED:  # the compiler cannot know this of a selected tensor
            y_ptr = tl.multiple_of(y_ptr, 16)
            weight_ptr = tl.multiple_of(weight_ptr, 16)
            lora_b_ptr = tl.multiple_of(lora_b_ptr, 16)
        N = of_module(module, N, N_1, N_2, N_3, NUM_MODULES)
        R = of_module(module, R, R_1, R_2, R_3, NUM_MODULES)
        # In a shared-input group, y and lora_b are contiguous.
        stride_ym = N
        stride_yp = tl.cast(M, tl.int64) * N
        stride_bn = R
    pid_m, pid_n = grouped_tile(pid, num_pid_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    first_m = tl.cast(pid_m * BLOCK_M, tl.int64)
    first_n = tl.cast(pid_n * BLOCK_N, tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M - pid_m * BLOCK_M
    mask_n = offs_n < N - pid_n * BLOCK_N

    # The first columns of lora_b do not depend on the shrink. They are loaded here and scaled after
    # the K loop. With at least 64 rows, this hides their latency. On smaller tiles, the compiler
    # moves a layout conversion, and with it the wait, in front of the loop (SASS, sm_90, Triton 3.6
    # and 3.9).
    lora_b_ptr += first_n * stride_bn
    factor = lora_b_ptr, scaling_ptr, R, stride_bn, stride_br, stride_scaling
    b, scale = load_rank_columns(factor, 0, mask_n, BLOCK_N, BLOCK_R)
    if HAS_BIAS:
        # bias: [BLOCK_N]
        bias_ptr += first_n * stride_bias
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)

    if WEIGHT is not None:
        first_n = tl.multiple_of(first_n, BLOCK_N)
    acc = base_product(
        x_ptr + first_m * stride_xm + tl.cast(first_k, tl.int64) * stride_xk,
        weight_ptr + first_n * stride_wn + tl.cast(first_k, tl.int64) * stride_wk
        if WEIGHT is None
        else weight_ptr,
        weight_parts_ptr,
        offs_xm=offs_m * stride_xm,
        mask_m=mask_m,
        mask_n=mask_n,
        first_n=first_n,
        first_k=first_k,
        steps=min(k_per_split, K - first_k) if SPLITS > 1 else K,
        N=N,
        K=K,
        stride_xk=stride_xk,
        stride_wn=stride_wn,
        stride_wk=stride_wk,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        EVEN_K=EVEN_K,
        WEIGHT=WEIGHT,
        WEIGHT_BLOCK=WEIGHT_BLOCK,
        TRANSPOSED=WEIGHT_TRANSPOSED,
        WEIGHT_POLICY=WEIGHT_POLICY,
        INPUT_PRECISION=INPUT_PRECISION,
    )

    if PDL:
        tl.extra.cuda.gdc_wait()
    is_first = True
    if SPLITS > 1:
        is_first = first_k == 0
    if is_first:  # the adapter and the bias, in one of the splits
        if HAS_DROPOUT:
            product = acc
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        s_ptr += first_m * stride_sm + first_r * stride_sr
        shrunk = s_ptr, R, stride_sp, stride_sm, stride_sr
        s_out_offs = (first_m + offs_m)[:, None] * stride_om + first_r * stride_or
        for start in tl.range(0, BLOCK_R if ONE_RANK_CHUNK else R, BLOCK_R, num_stages=1):
            s = load_shrunk(shrunk, start, mask_m, dtype, BLOCK_M, BLOCK_R, NUM_PARTIALS)
            if STORE_S:  # noqa: SIM102 - this one is decided at compile time
                if pid_n == 0:
                    offs_r = start + tl.arange(0, BLOCK_R)
                    mask_s = mask_m[:, None] & (offs_r < R)[None, :]
                    tl.store(s_out_ptr + s_out_offs + offs_r[None, :] * stride_or, s, mask=mask_s)
            scaled = scale_rank_columns(b, scale, dtype)
            # [BLOCK_M, BLOCK_R] x [BLOCK_R, BLOCK_N]
            acc = tl.dot(s, scaled, acc, input_precision=INPUT_PRECISION)
            if not ONE_RANK_CHUNK:
                b, scale = load_rank_columns(factor, start + BLOCK_R, mask_n, BLOCK_N, BLOCK_R)

        if HAS_DROPOUT:
            keep = philox_keep_mask(
                tl.load(seed_ptr), pid_m * BLOCK_M, pid_n * BLOCK_N, threshold, 0, BLOCK_M, BLOCK_N
            )
            acc = product + tl.where(keep, acc * tl.cast(inv_keep, tl.float32), 0.0)
        if HAS_BIAS:
            acc += bias[None, :]
    # y: [BLOCK_M, BLOCK_N]
    y_ptr += (
        tl.cast(tl.program_id(1), tl.int64) * stride_yp + first_m * stride_ym + first_n * stride_yn
    )
    tl.store(
        y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn,
        acc.to(y_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )


@cached_launches
def launch_lora_linear(
    modules: Sequence[Module],
    x: torch.Tensor,
    s: torch.Tensor,
    *,
    s_out: torch.Tensor | None,
    config: KernelConfig,
    pdl: bool,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """Write ``x @ weight.T + bias + (scaling * s) @ lora_b.T`` of each module.

    Args:
        modules: 1 to `MAX_GROUP_SIZE` modules. Several modules must all have a scaling, must all
            have a bias or none, and must agree in the dtypes of all tensors except scalings.
        x: ``[M, K]``, any strides.
        s: ``[M, R]`` in x's dtype, or fp32 partial sums ``[splits, M, R]``. The columns of the
            modules are side by side.
        s_out: ``[M, R]`` in x's dtype, which receives the sum of the partial sums, or None.
        config: From `configs.choose`, for the largest rank.
        pdl: Whether to launch as a programmatic dependent of the previous kernel, which must be the
            shrink.
        seed: int64 device tensor of one element; read only if ``dropout_p > 0``.
        dropout_p: Probability of dropping an element of one module's LoRA term, for the gradient
            of x.
    """
    m, k = x.shape
    first = modules[0]
    sizes = [module.lora_b.shape for module in modules]
    if m == 0 or not any(n for n, _ in sizes):
        return
    # A hint that depends on M would compile a separate kernel for small batches.
    one_row_tile = m <= config.block_m and not config.batch_invariant
    tiles = cdiv(m, config.block_m) * sum(cdiv(n, config.block_n) for n, _ in sizes)
    splits = config.splits
    named = named_modules(modules, weight=True)
    y_strides = strides("y", "pmn", first.y)
    if splits == 1 or named["NUM_MODULES"] > 1:
        y_strides["stride_yp"] = 0  # not used, and another kernel if it were no multiple of 16
    launch(
        _lora_linear_kernel,
        (tiles, splits),
        **named,
        x_ptr=x,
        **shrunk_arguments(s, s_out, (r for _, r in sizes)),
        **dropout_of(seed, dropout_p),
        M=m,
        K=k,
        k_per_split=cdiv(cdiv(k, config.block_k), splits) * config.block_k,
        **y_strides,
        **strides("x", "mk", x),
        **weight_arguments(first.weight),
        **config.arguments("mnkr"),
        GROUP_M=config.group_m,
        ONE_RANK_CHUNK=max(r for _, r in sizes) <= config.block_r,
        EVEN_K=k % config.block_k == 0,
        SPLITS=splits,
        WEIGHT_POLICY="evict_first" if one_row_tile else "",
        PDL=pdl,
        **({"launch_pdl": True} if pdl else {}),
    )
