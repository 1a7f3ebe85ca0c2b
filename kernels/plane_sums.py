"""``out = planes.sum(0)`` of up to four outputs in one launch, in a fixed order.

planes ``[P, ...]`` fp32, out ``[...]``, each contiguous: the second stage of a reduction whose
first stage wrote a plane for each part of the rows, or of the columns. No atomics, so a run repeats
bit for bit.

Bytes moved, e an element of out: ``(4 P + e)`` an element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.launch import kept, launch
from fastlora.kernels.tables import KernelConfig, cdiv

# Outputs of one launch.
MAX_SUMS = 4
_BLOCK = 1024


# A sum over rows is kept as so many sums, added up at its end.
ROW_SUMS = tl.constexpr(8)


@triton.jit
def add_row_sums(sums, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns ``sums [ROW_SUMS, BLOCK_N]`` in fp32 plus the rows of ``tile [BLOCK_M, BLOCK_N]``.

    Each takes every eighth row, so that the error grows with an eighth of the rows: one sum, row
    after row as the interpreter adds them, has up to three times that of PyTorch's.
    """
    # [BLOCK_M / 8, 8, BLOCK_N]
    parts = tl.reshape(tile.to(tl.float32), (BLOCK_M // ROW_SUMS, ROW_SUMS, BLOCK_N))
    return sums + tl.sum(parts, axis=0)


@triton.jit
def _sum_block(out_ptr, planes_ptr, block, size, planes, BLOCK: tl.constexpr):
    """Writes one block of an output of ``size`` elements."""
    first = tl.cast(block, tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < size - first
    planes_ptr += first
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    # Four loads in flight: a plane waits for none before it.
    for plane in tl.range(0, planes, num_stages=1, loop_unroll_factor=4):
        # plane: [BLOCK]
        total += tl.load(planes_ptr + tl.cast(plane, tl.int64) * size + offs, mask=mask, other=0.0)
    tl.store(out_ptr + first + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


# The numbers of planes follow the batch: no compile of its own for 1 or a multiple of 16.
@triton.jit(do_not_specialize=["planes_0", "planes_1", "planes_2", "planes_3"])
def _plane_sums_kernel(
    # tensors
    out_0_ptr,
    out_1_ptr,
    out_2_ptr,
    out_3_ptr,
    planes_0_ptr,
    planes_1_ptr,
    planes_2_ptr,
    planes_3_ptr,
    # scalars
    size_0,
    size_1,
    size_2,
    size_3,
    planes_0,
    planes_1,
    planes_2,
    planes_3,
    # meta
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    blocks = tl.cdiv(size_0, BLOCK)
    if block < blocks:
        _sum_block(out_0_ptr, planes_0_ptr, block, size_0, planes_0, BLOCK)
    block -= blocks
    if COUNT > 1:
        blocks = tl.cdiv(size_1, BLOCK)
        if (block >= 0) & (block < blocks):
            _sum_block(out_1_ptr, planes_1_ptr, block, size_1, planes_1, BLOCK)
        block -= blocks
    if COUNT > 2:
        blocks = tl.cdiv(size_2, BLOCK)
        if (block >= 0) & (block < blocks):
            _sum_block(out_2_ptr, planes_2_ptr, block, size_2, planes_2, BLOCK)
        block -= blocks
    if COUNT > 3:  # noqa: SIM102 - this one is decided at compile time
        if block >= 0:
            _sum_block(out_3_ptr, planes_3_ptr, block, size_3, planes_3, BLOCK)


@kept
def launch_plane_sums(
    outs: Sequence[torch.Tensor], planes: Sequence[torch.Tensor], *, config: KernelConfig
) -> None:
    """Writes the sum of each stack of planes.

    Args:
        outs: 1 to `MAX_SUMS` tensors, contiguous, any floating dtype.
        planes: For each an fp32 tensor ``[P, *out.shape]``, contiguous.
        config: `plane_sums_config()`.
    """
    count = len(outs)
    sizes = [out.numel() for out in outs]
    programs = sum(cdiv(size, _BLOCK) for size in sizes)
    if programs == 0:
        return
    unused = MAX_SUMS - count
    named: dict[str, object] = {}
    for i, (out, stack, size) in enumerate(
        zip(
            [*outs, *[None] * unused],
            [*planes, *[None] * unused],
            [*sizes, *[0] * unused],
            strict=True,
        )
    ):
        named[f"out_{i}_ptr"], named[f"planes_{i}_ptr"] = out, stack
        named[f"size_{i}"], named[f"planes_{i}"] = size, 0 if stack is None else stack.shape[0]
    launch(
        _plane_sums_kernel, (programs,), **named, COUNT=count, BLOCK=_BLOCK, **config.launch_options
    )
