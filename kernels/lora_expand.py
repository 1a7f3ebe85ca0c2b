"""``y = (scaling * s) @ lora_b.T``, added to y or to a bias: s ``[M, R]``, lora_b ``[N, R]``.

y ``[M, N]`` is either read once, added to in fp32, and rounded once, or only written, with a bias
``[N]``. In the second case, a library product then accumulates into y, and hides the time of
reading it. scaling is ``[1]`` or ``[R]``, or None for 1. s can be the fp32 partial sums of a
split-K shrink, ``[splits, M, R]``. For the gradient of x, ``dx = mask * (ds @ lora_a) / (1 - p)``,
the added term is masked like x in the forward pass.

Up to four modules of a shared-input group are one grid over the tiles of all. Their columns of s
are side by side, in the order of `lora_shrink`. `launch_summed_lora_expand` instead adds the terms
of up to four modules, each with an s of its own, and writes one y. It computes the part of dx that
comes from the adapters of a shared-input group: ``dx = sum of ds_i @ lora_a_i``, added in fp32 in
the order of the modules, and rounded once.

Bytes moved, for e bytes per element and N and R summed over modules: ``e (M N + M R + N R)``, and
an additional ``e M N`` if y is read. With partial sums, ``4 splits M R`` replaces ``e M R``, and is
read by every column of tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import dropout_of, numbered, strides
from fastlora.kernels.config_tables import KernelConfig, cdiv
from fastlora.kernels.launch import cached_launches, launch
from fastlora.kernels.modules import (
    Module,
    module_of_tile,
    named_modules,
    of_module,
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
def _lora_expand_kernel(
    # tensors
    s_ptr,
    s_1_ptr,
    s_2_ptr,
    s_3_ptr,
    s_out_ptr,
    seed_ptr,
    y_ptr,
    y_1_ptr,
    y_2_ptr,
    y_3_ptr,
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
    N,
    N_1,
    N_2,
    N_3,
    R,
    R_1,
    R_2,
    R_3,
    threshold,
    inv_keep,
    # strides
    stride_ym,
    stride_yn,
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
    BLOCK_R: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    ONE_RANK_CHUNK: tl.constexpr,
    NUM_MODULES: tl.constexpr,
    NUM_TERMS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED_R: tl.constexpr,
    READS_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    STORE_S: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    pid = tl.program_id(0)
    if ALIGNED_R:
        stride_sm = multiple_of_16(stride_sm)
    first_r = 0  # the module's first column of s
    if NUM_MODULES > 1:
        num_pid_m = tl.cdiv(M, BLOCK_M)
        module, pid = module_of_tile(pid, num_pid_m, (N, N_1, N_2), BLOCK_N, NUM_MODULES)
        first_r = of_module(module, 0, R, R + R_1, R + R_1 + R_2, NUM_MODULES)
        y_ptr = of_module(module, y_ptr, y_1_ptr, y_2_ptr, y_3_ptr, NUM_MODULES)
        lora_b_ptr = of_module(
            module, lora_b_ptr, lora_b_1_ptr, lora_b_2_ptr, lora_b_3_ptr, NUM_MODULES
        )
        scaling_ptr = of_module(
            module, scaling_ptr, scaling_1_ptr, scaling_2_ptr, scaling_3_ptr, NUM_MODULES
        )
        if HAS_BIAS:
            bias_ptr = of_module(module, bias_ptr, bias_1_ptr, bias_2_ptr, bias_3_ptr, NUM_MODULES)
        if ALIGNED:  # the compiler cannot know this of a selected tensor
            y_ptr = tl.multiple_of(y_ptr, 16)
            lora_b_ptr = tl.multiple_of(lora_b_ptr, 16)
        N = of_module(module, N, N_1, N_2, N_3, NUM_MODULES)
        R = of_module(module, R, R_1, R_2, R_3, NUM_MODULES)
        # In a shared-input group, y and lora_b are contiguous.
        stride_ym = N
        stride_bn = R
    num_pid_n = tl.cdiv(N, BLOCK_N)
    pid_m = pid // num_pid_n
    pid_n = pid % num_pid_n
    first_m = tl.cast(pid_m * BLOCK_M, tl.int64)
    first_n = tl.cast(pid_n * BLOCK_N, tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M - pid_m * BLOCK_M
    mask_n = offs_n < N - pid_n * BLOCK_N

    # y: [BLOCK_M, BLOCK_N], most of the bytes, and therefore loaded first
    y_ptr += first_m * stride_ym + first_n * stride_yn
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    mask_y = mask_m[:, None] & mask_n[None, :]
    if READS_Y:
        y = tl.load(y_ptrs, mask=mask_y, other=0.0)
    if HAS_BIAS:
        # bias: [BLOCK_N]
        bias_ptr += first_n * stride_bias
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)

    all_s, all_lora_b = (s_ptr, s_1_ptr, s_2_ptr, s_3_ptr), lora_b_ptr
    if NUM_TERMS > 1:
        all_lora_b = lora_b_ptr, lora_b_1_ptr, lora_b_2_ptr, lora_b_3_ptr
    ranks = R, R_1, R_2, R_3
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for term in tl.static_range(NUM_TERMS):
        if NUM_TERMS > 1:
            lora_b_ptr = all_lora_b[term]
            R = ranks[term]
            stride_sm = R  # each s of a sum is contiguous
        own_s = all_s[term] + first_m * stride_sm + first_r * stride_sr
        own_b = lora_b_ptr + first_n * stride_bn
        factor = own_b, scaling_ptr, R, stride_bn, stride_br, stride_scaling
        shrunk = own_s, R, stride_sp, stride_sm, stride_sr
        for start in tl.range(0, BLOCK_R if ONE_RANK_CHUNK else R, BLOCK_R, num_stages=1):
            b, scale = load_rank_columns(factor, start, mask_n, BLOCK_N, BLOCK_R)
            s = load_shrunk(shrunk, start, mask_m, dtype, BLOCK_M, BLOCK_R, NUM_PARTIALS)
            if STORE_S:  # noqa: SIM102 - this one is decided at compile time
                if pid_n == 0:
                    offs_r = start + tl.arange(0, BLOCK_R)
                    s_out_ptrs = s_out_ptr + (first_m + offs_m)[:, None] * stride_om
                    s_out_ptrs += (first_r + offs_r)[None, :] * stride_or
                    tl.store(s_out_ptrs, s, mask=mask_m[:, None] & (offs_r < R)[None, :])
            scaled = scale_rank_columns(b, scale, dtype)
            # [BLOCK_M, BLOCK_R] x [BLOCK_R, BLOCK_N]
            acc = tl.dot(s, scaled, acc, input_precision=INPUT_PRECISION)
    if HAS_DROPOUT:
        keep = philox_keep_mask(
            tl.load(seed_ptr), pid_m * BLOCK_M, pid_n * BLOCK_N, threshold, 0, BLOCK_M, BLOCK_N
        )
        acc = tl.where(keep, acc * tl.cast(inv_keep, tl.float32), 0.0)
    if READS_Y:
        acc += y.to(tl.float32)
    if HAS_BIAS:
        acc += bias[None, :]
    tl.store(y_ptrs, acc.to(dtype), mask=mask_y)


@cached_launches
def launch_lora_expand(
    modules: Sequence[Module],
    s: torch.Tensor,
    *,
    reads_y: bool,
    s_out: torch.Tensor | None = None,
    config: KernelConfig,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """Write ``(scaling * s) @ lora_b.T + bias`` of each module, or add it to y in place.

    Args:
        modules: 1 to `MAX_GROUP_SIZE` modules. Their weights are not read. Several modules must all
            have a scaling, must all have a bias or none, and must agree in the dtypes of all
            tensors except scalings. The dtype of y is the dtype of the dots.
        s: ``[M, R]``, any dtype and strides, or fp32 partial sums ``[splits, M, R]``. The columns
            of the modules are side by side.
        reads_y: Whether to add to y.
        s_out: ``[M, R]`` in y's dtype, which receives the sum of the partial sums, or None.
        config: From `configs.choose`, for the largest rank.
        seed: int64 device tensor of one element; read only if ``dropout_p > 0``.
        dropout_p: Probability of dropping an element of the added term, for the gradient of x.
    """
    m, sizes = s.shape[-2], [module.lora_b.shape for module in modules]
    tiles = cdiv(m, config.block_m) * sum(cdiv(n, config.block_n) for n, _ in sizes)
    if not tiles:
        return
    launch(
        _lora_expand_kernel,
        (tiles,),
        **named_modules(modules, weight=False),
        **{**shrunk_arguments(s, s_out, (r for _, r in sizes)), **numbered("s{}_ptr", [s])},
        **dropout_of(seed, dropout_p),
        M=m,
        **strides("y", "mn", modules[0].y),
        **config.arguments("mnr"),
        ONE_RANK_CHUNK=max(r for _, r in sizes) <= config.block_r,
        NUM_TERMS=1,
        READS_Y=reads_y,
    )


@cached_launches
def launch_summed_lora_expand(
    y: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    s: Sequence[torch.Tensor],
    *,
    config: KernelConfig,
) -> None:
    """Write ``sum of s_i @ lora_b_i.T`` over modules that share an output.

    Args:
        y: ``[M, N]``, any strides. Its dtype is the dtype of the dots.
        lora_b: For each of 1 to `MAX_GROUP_SIZE` modules ``[N, R]``, in any floating dtype. The
            strides of all are the same; for dx, they are transposed lora_a ``[R, N]``.
        s: For each module ``[M, R]``, any floating dtype, contiguous.
        config: From `configs.choose`, for the largest rank.
    """
    (m, n), ranks = y.shape, [own.shape[1] for own in lora_b]
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    if not tiles:
        return
    terms = [Module(y, own, None) for own in lora_b]
    launch(
        _lora_expand_kernel,
        (tiles,),
        **{**named_modules(terms, weight=False), "NUM_MODULES": 1, "ALIGNED": False},
        **{**shrunk_arguments(s[0], None, ranks), **numbered("s{}_ptr", s)},
        **dropout_of(None, 0.0),
        M=m,
        **strides("y", "mn", y),
        **config.arguments("mnr"),
        ONE_RANK_CHUNK=max(ranks) <= config.block_r,
        NUM_TERMS=len(terms),
        READS_Y=False,
    )
