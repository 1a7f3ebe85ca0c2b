"""``out = partials.sum(0)`` for up to four outputs in one launch, in a fixed order.

partials ``[P, ...]`` are fp32 partial sums, and out is ``[...]``. Each partial sum and each out is
contiguous. This is the second stage of a reduction with a first stage that writes one partial sum
for each part of the rows, or of the columns. There are no atomics, so results are bitwise
reproducible.

If the kernel is launched as a programmatic dependent of the first stage (``pdl``, sm_90 and later),
it is launched before the first stage has ended, and its programs wait before they read anything.
They start early only if the first stage signals its dependents, as a shrink does.

Bytes moved, for e bytes per element of out: ``(4 P + e)`` per element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import numbered
from fastlora.kernels.config_tables import KernelConfig, cdiv
from fastlora.kernels.launch import cached_launches, launch

_BLOCK = 1024


@triton.jit
def _sum_block(
    out_ptr,
    partials_ptr,
    block,
    size,
    stride,
    num_partials,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write one block of an output with ``size`` elements.

    Its partial sums are ``stride`` elements apart.
    """
    first = tl.cast(block, tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    columns = size - first
    if ALIGNED:  # the compiler drops hints about arguments of a function that it inlines
        columns = tl.multiple_of(columns, 8)
    mask = offs < columns
    partials_ptr += first
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    # Four loads in flight: no load waits for an earlier one.
    for partial in tl.range(0, num_partials, num_stages=1, loop_unroll_factor=4):
        begin = tl.cast(partial, tl.int64) * stride
        if ALIGNED:
            begin = tl.multiple_of(begin, 8)
        # partial: [BLOCK]
        total += tl.load(partials_ptr + begin + offs, mask=mask, other=0.0)
    tl.store(out_ptr + first + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


# All numbers depend on the batch: do not specialize on 1 or multiples of 16.
@triton.jit(
    do_not_specialize=[
        *("size", "size_1", "size_2", "size_3"),
        *("stride", "stride_1", "stride_2", "stride_3"),
        *("num_partials", "num_partials_1", "num_partials_2", "num_partials_3"),
    ]
)
def _plane_sums_kernel(
    # tensors
    out_ptr,
    out_1_ptr,
    out_2_ptr,
    out_3_ptr,
    partials_ptr,
    partials_1_ptr,
    partials_2_ptr,
    partials_3_ptr,
    # scalars
    size,
    size_1,
    size_2,
    size_3,
    num_partials,
    num_partials_1,
    num_partials_2,
    num_partials_3,
    # strides
    stride,
    stride_1,
    stride_2,
    stride_3,
    # meta
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    outs = out_ptr, out_1_ptr, out_2_ptr, out_3_ptr
    stacks = partials_ptr, partials_1_ptr, partials_2_ptr, partials_3_ptr
    sizes = size, size_1, size_2, size_3
    strides = stride, stride_1, stride_2, stride_3
    counts = num_partials, num_partials_1, num_partials_2, num_partials_3
    block = tl.program_id(0)
    for i in tl.static_range(COUNT):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (block >= 0) & (block < blocks):
            _sum_block(
                *(outs[i], stacks[i], block, sizes[i], strides[i], counts[i], BLOCK, ALIGNED)
            )
        block -= blocks


@cached_launches
def launch_plane_sums(
    outs: Sequence[torch.Tensor],
    partials: Sequence[torch.Tensor],
    *,
    config: KernelConfig,
    pdl: bool = False,
) -> None:
    """Write the sum of each stack of partial sums.

    Args:
        outs: 1 to `MAX_GROUP_SIZE` tensors, contiguous, any floating dtype.
        partials: For each output an fp32 tensor ``[P, *out.shape]``, contiguous in all dimensions
            but the first.
        config: From `configs.choose`.
        pdl: Whether to launch as a programmatic dependent of the previous kernel, which must be the
            one that writes the partial sums.
    """
    sizes = [out.numel() for out in outs]
    widths = [*(out.shape[-1] for out in outs), *(stack.stride(0) for stack in partials)]
    programs = sum(cdiv(size, _BLOCK) for size in sizes)
    if programs == 0:
        return
    launch(
        _plane_sums_kernel,
        (programs,),
        **numbered("out{}_ptr", outs),
        **numbered("partials{}_ptr", partials),
        **numbered("size{}", sizes, 0),
        **numbered("num_partials{}", [stack.shape[0] for stack in partials], 0),
        **numbered("stride{}", [stack.stride(0) for stack in partials], 0),
        COUNT=len(outs),
        BLOCK=_BLOCK,
        PDL=pdl,
        ALIGNED=all(width % 8 == 0 for width in widths),
        **config.arguments(""),
        **({"launch_pdl": True} if pdl else {}),
    )
