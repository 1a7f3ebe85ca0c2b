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

from fastlora.kernels.arguments import numbered
from fastlora.kernels.launch import kept, launch
from fastlora.kernels.tables import KernelConfig, cdiv

_BLOCK = 1024


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
    """Writes the sum of each stack of planes.

    Args:
        outs: 1 to `MAX_SIBLINGS` tensors, contiguous, any floating dtype.
        planes: For each an fp32 tensor ``[P, *out.shape]``, contiguous.
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
