"""``out = planes.sum(0)`` for up to four outputs in one launch, in a fixed order.

planes ``[P, ...]`` are fp32 partial sums, and out is ``[...]``; all are contiguous. This is the
second stage of a reduction with a first stage that writes one partial sum for each part of the
rows, or of the columns. There are no atomics, so results are bitwise reproducible.

Bytes moved, for e bytes per element of out: ``(4 P + e)`` per element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import numbered
from fastlora.kernels.launch import kept, launch
from fastlora.kernels.tables import KernelConfig, cdiv

_BLOCK = 1024


@triton.jit
def _sum_block(out_ptr, planes_ptr, block, size, planes, BLOCK: tl.constexpr):
    """Write one block of an output with ``size`` elements."""
    first = tl.cast(block, tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < size - first
    planes_ptr += first
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    # Four loads in flight: no load waits for an earlier one.
    for plane in tl.range(0, planes, num_stages=1, loop_unroll_factor=4):
        # plane: [BLOCK]
        total += tl.load(planes_ptr + tl.cast(plane, tl.int64) * size + offs, mask=mask, other=0.0)
    tl.store(out_ptr + first + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


# The numbers of partial sums depend on the batch: do not specialize on 1 or multiples of 16.
@triton.jit(do_not_specialize=["planes", "planes_1", "planes_2", "planes_3"])
def _plane_sums_kernel(
    # tensors
    out_ptr,
    out_1_ptr,
    out_2_ptr,
    out_3_ptr,
    planes_ptr,
    planes_1_ptr,
    planes_2_ptr,
    planes_3_ptr,
    # scalars
    size,
    size_1,
    size_2,
    size_3,
    planes,
    planes_1,
    planes_2,
    planes_3,
    # meta
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    outs = out_ptr, out_1_ptr, out_2_ptr, out_3_ptr
    stacks = planes_ptr, planes_1_ptr, planes_2_ptr, planes_3_ptr
    sizes = size, size_1, size_2, size_3
    counts = planes, planes_1, planes_2, planes_3
    block = tl.program_id(0)
    for i in tl.static_range(COUNT):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (block >= 0) & (block < blocks):
            _sum_block(outs[i], stacks[i], block, sizes[i], counts[i], BLOCK)
        block -= blocks


@kept
def launch_plane_sums(
    outs: Sequence[torch.Tensor], planes: Sequence[torch.Tensor], *, config: KernelConfig
) -> None:
    """Write the sum of each stack of partial sums.

    Args:
        outs: 1 to `MAX_SIBLINGS` tensors, contiguous, any floating dtype.
        planes: For each output an fp32 tensor ``[P, *out.shape]``, contiguous.
        config: From `configs.choose`.
    """
    sizes = [out.numel() for out in outs]
    programs = sum(cdiv(size, _BLOCK) for size in sizes)
    if programs == 0:
        return
    launch(
        _plane_sums_kernel,
        (programs,),
        **numbered("out{}_ptr", outs),
        **numbered("planes{}_ptr", planes),
        **numbered("size{}", sizes, 0),
        **numbered("planes{}", [stack.shape[0] for stack in planes], 0),
        COUNT=len(outs),
        BLOCK=_BLOCK,
        **config.arguments(""),
    )
