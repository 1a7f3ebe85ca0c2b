"""``y = x @ weight.T + bias + scaling * (s @ lora_b.T + lora_bias)``, with each row's own adapter.

The rows of x ``[M, K]`` and y ``[M, N]`` are in any order; weight is ``[N, K]`` and bias ``[N]``. s
consists of the partial sums of the shrink for mixed batches at sorted positions,
``[splits, M, R]``. Tables ``[S]`` have the addresses of lora_b as rank rows ``[rank, N]``, and of
lora_bias ``[N]``. There is one kernel, which rounds once. A tile of sorted positions runs the K
loop of the base GEMM, which is the same for every mix, and then adds the rank rows of its adapters.

The same kernel computes the gradient of x, ``dx = dy @ weight + mask * (ds @ lora_a) / (1 - p)``.
It takes weight transposed, lora_a for lora_b, and ds for s. With a mask, the rank rows are computed
first, so that they can be masked before anything else is in the only accumulator.

Up to four modules of a shared-input group are one grid over the tiles of all. Their rows in the
tables are adjacent, and s is ``[splits, G, M, R]``.

Bytes moved, for e bytes per element of x and f per element of factors: ``e (M K + N K + M N)`` as
without adapters; ``f N`` per rank row of every adapter in the batch, read once per row tile with
the adapter; and ``4 splits`` per element of s, read by every column of tiles. For a quantized
weight, its loader in `weights` states the bytes.

If the kernel is launched as a programmatic dependent of the shrink (``pdl``, sm_90 and later), a
program runs its K loop while the shrink is still running, and waits only before it reads s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import numbered, padded, strides
from fastlora.kernels.base_product import base_product, grouped_tile
from fastlora.kernels.config_tables import KernelConfig, cdiv, compiled_modules
from fastlora.kernels.launch import cached_launches, launch
from fastlora.kernels.mixed_rows import (
    TABLES,
    DropoutTables,
    RankRows,
    add_rank_rows,
    drop_rows,
    row_arguments,
)
from fastlora.kernels.modules import (
    Weight,
    are_aligned,
    module_of_tile,
    named_weights,
    of_module,
    pointers_of,
    weight_arguments,
)


# M, num_partials, and slots vary between calls: do not specialize on 1 or multiples of 16.
@triton.jit(
    do_not_specialize=["M", "num_partials", "stride_table"], do_not_specialize_on_alignment=TABLES
)
def _mixed_lora_linear_kernel(
    # tensors
    y_ptr,
    y_1_ptr,
    y_2_ptr,
    y_3_ptr,
    x_ptr,
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
    N_1,
    N_2,
    N_3,
    K,
    num_partials,
    # strides
    stride_ym,
    stride_yn,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_sp,
    stride_sg,
    stride_sm,
    stride_table,
    # meta
    NUM_MODULES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    WEIGHT: tl.constexpr,
    WEIGHT_BLOCK: tl.constexpr,
    WEIGHT_TRANSPOSED: tl.constexpr,
    WEIGHT_POLICY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA_BIAS: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PDL: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    num_pid_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    if NUM_MODULES > 1:
        module, pid = module_of_tile(pid, num_pid_m, (N, N_1, N_2), BLOCK_N, NUM_MODULES)
        y_ptr = of_module(module, y_ptr, y_1_ptr, y_2_ptr, y_3_ptr, NUM_MODULES)
        weight_ptr = of_module(
            module, weight_ptr, weight_1_ptr, weight_2_ptr, weight_3_ptr, NUM_MODULES
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
        N = of_module(module, N, N_1, N_2, N_3, NUM_MODULES)
        stride_ym = N  # in a shared-input group, y is contiguous
        s_ptr += tl.cast(module, tl.int64) * stride_sg
        lora_b_address_ptr += module * stride_table
        rank_ptr += module * stride_table
        scaling_ptr += module * stride_table
        if HAS_LORA_BIAS:
            lora_bias_address_ptr += module * stride_table
    pid_m, pid_n = grouped_tile(pid, num_pid_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    first_m = pid_m * BLOCK_M
    first_n = tl.cast(pid_n * BLOCK_N, tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M - first_m
    mask_n = offs_n < N - pid_n * BLOCK_N

    row = tl.load(order_ptr + first_m + offs_m, mask=mask_m, other=0).to(tl.int64)
    if HAS_BIAS:
        # bias: [BLOCK_N]
        bias_ptr += first_n * stride_bias
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)

    if WEIGHT is not None:
        first_n = tl.multiple_of(first_n, BLOCK_N)
    segments, place = (segment_of_ptr, segment_slot_ptr), (first_m, first_n, M, N)
    tables = lora_b_address_ptr, lora_bias_address_ptr, rank_ptr, scaling_ptr
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for part in tl.static_range(2):
        # Decided at compile time: the base product is first, because its loop does not wait for s,
        # unless a mask must be applied to the rank rows alone.
        if (part == 0) != HAS_DROPOUT:
            acc = base_product(
                x_ptr,
                weight_ptr + first_n * stride_wn if WEIGHT is None else weight_ptr,
                weight_parts_ptr,
                offs_xm=row * stride_xm,
                mask_m=mask_m,
                mask_n=mask_n,
                first_n=first_n,
                first_k=0,
                steps=K,
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
                acc=acc,
            )
        else:
            if PDL:
                tl.extra.cuda.gdc_wait()
            acc = add_rank_rows(
                acc,
                s_ptr,
                segments,
                tables,
                place,
                num_partials,
                stride_sp,
                stride_sm,
                dtype=dtype,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_R=BLOCK_R,
                HAS_LORA_BIAS=HAS_LORA_BIAS,
                FACTOR_DTYPE=FACTOR_DTYPE,
                INPUT_PRECISION=INPUT_PRECISION,
                BATCH_INVARIANT=BATCH_INVARIANT,
                BY_COLUMN=BY_COLUMN,
            )
            if HAS_DROPOUT:
                drop = slot_start_ptr, seed_ptr, threshold_ptr, inv_keep_ptr
                acc = drop_rows(acc, segments, drop, first_m, pid_n * BLOCK_N, M, BLOCK_M, BLOCK_N)
    if HAS_BIAS:
        acc += bias[None, :]
    # y: [BLOCK_M, BLOCK_N]
    y_ptr += first_n * stride_yn
    tl.store(
        y_ptr + (row * stride_ym)[:, None] + offs_n[None, :] * stride_yn,
        acc.to(y_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )


@cached_launches
def launch_mixed_lora_linear(
    ys: Sequence[torch.Tensor],
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor | None],
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    up: RankRows,
    *,
    config: KernelConfig,
    pdl: bool,
    dropout: DropoutTables | None = None,
) -> None:
    """Write ``x @ weight.T + bias`` plus each row's own adapter; NaN in rows of invalid ids.

    With several modules, tables are ``[G, S]``, all have a bias or none, and y, weight, and bias
    are contiguous.

    Args:
        ys: For each of 1 to `MAX_GROUP_SIZE` modules ``[M, N]`` in x's dtype, any strides without
            overlap.
        x: ``[M, K]``, any strides.
        weights: For each module ``[N, K]`` in x's dtype, any strides; or quantized weights that are
            all of one kind.
        biases: For each module ``[N]``, of one floating-point dtype, or None.
        s: Partial sums ``[splits, M, R]`` of `launch_mixed_lora_shrink`, any dtype; for several
            modules ``[splits, G, M, R]``.
        rows: Sorted rows, as in `row_arguments`. Pieces are not read.
        up: The rank rows to add.
        config: From `configs.choose`.
        pdl: Whether to launch as a programmatic dependent of the previous kernel, which must be the
            shrink.
        dropout: Dropout of the adapters' term, for the gradient of x; None for no dropout.
    """
    weight, bias, (m, k) = weights[0], biases[0], x.shape
    sizes, count = [own.shape[0] for own in weights], len(ys)
    tiles = cdiv(m, config.block_m) * sum(cdiv(n, config.block_n) for n in sizes)
    if tiles == 0:
        return
    # The kernel for three modules takes every contiguous y. It has a scaling, and no dropout.
    alone = dropout is not None or up.scaling is None or up.by_column or not ys[0].is_contiguous()
    compiled = compiled_modules(count, alone)
    # A hint that depends on M would compile a separate kernel for small batches.
    one_row_tile = m <= config.block_m and not config.batch_invariant
    launch(
        _mixed_lora_linear_kernel,
        (tiles,),
        **numbered("y{}_ptr", padded(ys, compiled)),
        x_ptr=x,
        **named_weights(weights, compiled),
        **numbered("bias{}_ptr", padded(biases, compiled)),
        s_ptr=s,
        **row_arguments(rows, pieces=False),
        **up.arguments(),
        M=m,
        **numbered("N{}", sizes, 0),
        K=k,
        num_partials=s.shape[0],
        **strides("y", "mn", ys[0]),
        **strides("x", "mk", x),
        stride_bias=0 if bias is None else bias.stride(0),
        stride_sp=s.stride(0),
        stride_sg=s.stride(1) if count > 1 else 0,
        stride_sm=s.stride(-2),
        stride_table=up.rank.stride(0) if count > 1 else 0,
        NUM_MODULES=compiled,
        ALIGNED=compiled > 1 and are_aligned([*ys, *pointers_of(weights)]),
        **config.arguments("mnkr"),
        GROUP_M=config.group_m,
        EVEN_K=k % config.block_k == 0,
        **weight_arguments(weight),
        WEIGHT_POLICY="evict_first" if one_row_tile else "",
        HAS_BIAS=bias is not None,
        **DropoutTables.arguments(dropout, rows),
        PDL=pdl,
        BATCH_INVARIANT=config.batch_invariant,
        **({"launch_pdl": True} if pdl else {}),
    )
