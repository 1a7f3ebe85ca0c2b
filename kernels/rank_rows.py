"""Shared functions of linear and expand for the factors of a tile's adapter.

A rank row is one row of ``lora_a [R, K]`` with its column of ``lora_b [N, R]`` and its scaling.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import strides


def are_multiples_of_16(*values: int) -> bool:
    """Return whether all values are multiples of 16: see `multiple_of_16`."""
    return all(value % 16 == 0 for value in values)


def shrunk_arguments(
    s: torch.Tensor, s_out: torch.Tensor | None, ranks: Iterable[int]
) -> dict[str, Any]:
    """Return the arguments of a kernel that reads s by `load_shrunk`, and may store it in s_out.

    The columns of s belong to modules of the given ranks.
    """
    return {
        "s_ptr": s,
        "s_out_ptr": s_out,
        **strides("s", "pmr", s),
        **strides("o", "mr", s_out),
        "NUM_PARTIALS": s.shape[0] if s.dim() == 3 else 1,
        "STORE_S": s_out is not None,
        "ALIGNED_R": are_multiples_of_16(*ranks, s.stride(-2)),
    }


@triton.jit
def multiple_of_16(value):
    """Return ``value``, which is a multiple of 16, in a form that lets the compiler infer this.

    An argument that is not specialized has no hint, and `tl.multiple_of` has no effect on
    arguments.
    """
    return value // 16 * 16


@triton.jit
def load_rank_columns(factor, start, mask_n, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return the columns ``start`` to ``start + BLOCK_R`` of lora_b, and their scaling.

    Both are returned as they are in memory. Arithmetic would wait for the loads here. In
    `scale_rank_columns`, it waits after whatever comes between. Columns beyond the rank are zeros.
    A factor consists of pointers to the tile's first output row of lora_b and to its scaling (None
    for 1), the rank, and strides.
    """
    lora_b_ptr, scaling_ptr, rank, stride_bn, stride_br, stride_scaling = factor
    offs_n = tl.arange(0, BLOCK_N)
    offs_r = start + tl.arange(0, BLOCK_R)
    mask_r = offs_r < rank
    # b: [BLOCK_R, BLOCK_N]
    b = tl.load(
        lora_b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None] * stride_br,
        mask=mask_r[:, None] & mask_n[None, :],
        other=0.0,
    )
    # scale: [BLOCK_R]
    if scaling_ptr is None:
        scale = tl.full((BLOCK_R,), 1.0, dtype=tl.float32)
    else:
        scale = tl.load(scaling_ptr + offs_r * stride_scaling, mask=mask_r, other=0.0)
    return b, scale


@triton.jit
def scale_rank_columns(b, scale, dtype: tl.constexpr):
    """Return ``scale * b`` in ``dtype``, ``[BLOCK_R, BLOCK_N]``.

    The scaling is applied to lora_b and not to s, for three reasons: it does not have to wait for
    the shrink, fp32 factors are rounded once, and an fp16 s does not overflow.
    """
    return (b.to(tl.float32) * scale[:, None]).to(dtype)


@triton.jit
def load_shrunk(
    shrunk,
    start,
    mask_m,
    dtype: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
):
    """Return columns ``start`` to ``start + BLOCK_R`` of s in ``dtype``, ``[BLOCK_M, BLOCK_R]``.

    ``shrunk`` has a pointer to the tile's first row, the rank, and strides. The partial sums of a
    split-K shrink are added in fp32, in order, and rounded once.
    """
    s_ptr, rank, stride_sp, stride_sm, stride_sr = shrunk
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = start + tl.arange(0, BLOCK_R)
    s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :] * stride_sr
    mask = mask_m[:, None] & (offs_r < rank)[None, :]
    s = sum_planes(s_ptrs, mask, stride_sp, NUM_PARTIALS, BLOCK_M=BLOCK_M, BLOCK_R=BLOCK_R)
    return s.to(dtype)


@triton.jit
def sum_planes(
    s_ptrs,
    mask,
    stride_sp,
    num_partials,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    IN_FLIGHT: tl.constexpr = 4,
):
    """Return the sum of a tile's partial sums in order, fp32 ``[BLOCK_M, BLOCK_R]``."""
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    # The loop keeps the loads in their own layout. The number of loads in flight bounds the
    # registers.
    for partial in tl.range(0, num_partials, num_stages=1, loop_unroll_factor=IN_FLIGHT):
        # s: [BLOCK_M, BLOCK_R]
        s += tl.load(s_ptrs + tl.cast(partial, tl.int64) * stride_sp, mask=mask, other=0.0)
    return s
