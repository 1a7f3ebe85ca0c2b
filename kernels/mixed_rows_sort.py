"""The rows of a mixed batch sorted by slot (`fastlora.ops.rows.Rows`), in one launch.

Each of the ids ``[B]`` has ``M / B`` adjacent rows. There is one program. It sorts the ids in
registers, by slot and then by place, stores them where its threads can read them again, and walks
through the sorted positions. A batch has few ids, so a launch costs more than its work: W log^2 W
comparisons for W registers (64 for up to 64 ids, otherwise 2,048), and one pass over M positions.

A sort key is the slot, S for an id that is out of range, and S + 1 for rows without an adapter.

Bytes moved: ``8 B`` for ids, ``8 B`` to store and load sorted ids, and 4 per element written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.config_tables import KernelConfig
from fastlora.kernels.launch import cached_launches, empty, launch
from fastlora.kernels.mixed_rows import INVALID_SLOT, row_arguments

NO_SLOT = tl.constexpr(-1)
# With more ids, the sorted ids would not fit the registers of one program.
MAX_IDS = 2048
# A kernel for the ids of samples, and one for the ids of tokens.
_WIDTHS = (64, MAX_IDS)
# A slot and a place, packed into one int32.
_MAX_KEYS = 2**31
# Number of positions in one step.
_STEP = 1024


# All sizes vary between calls: do not specialize the kernel on 1 or multiples of 16.
@triton.jit(
    do_not_specialize=["B", "M", "each", "slots", "segments", "pieces", "block_m"],
    do_not_specialize_on_alignment=["ids_ptr"],
)
def _mixed_rows_sort_kernel(
    # tensors
    ids_ptr,
    key_ptr,
    place_ptr,
    order_ptr,
    segment_of_ptr,
    segment_slot_ptr,
    slot_start_ptr,
    piece_start_ptr,
    invalid_ptr,
    # scalars
    B,
    M,
    each,
    slots,
    segments,
    pieces,
    block_m,
    # strides
    stride_ids,
    # meta
    IDS: tl.constexpr,
    BISECTIONS: tl.constexpr,
    STEP: tl.constexpr,
):
    offs_b = tl.arange(0, IDS)
    ids = tl.load(ids_ptr + offs_b * stride_ids, mask=offs_b < B, other=0).to(tl.int64)
    valid = (ids >= NO_SLOT) & (ids < slots)
    key = tl.where(ids == NO_SLOT, slots + 1, tl.where(valid, ids, slots)).to(tl.int32)
    # The place is below the key in one integer. Integers beyond B are the largest.
    packed = tl.sort(tl.where(offs_b < B, key * IDS + offs_b, 2147483647))
    key = packed // IDS
    tl.store(key_ptr + offs_b, key, mask=offs_b < B)
    tl.store(place_ptr + offs_b, packed % IDS, mask=offs_b < B)
    invalid = tl.max((key == slots).to(tl.int32), axis=0)
    tl.store(invalid_ptr, invalid)
    tl.debug_barrier()  # other threads read the stored ids

    offs = tl.arange(0, STEP)
    segment = tl.cast(0, tl.int32)  # number of segments that begin before this step
    piece = tl.cast(0, tl.int32)
    for first in range(0, M, STEP):
        position = first + offs
        inside = position < M
        own = position // each
        here = tl.load(key_ptr + own, mask=inside, other=0)
        before = tl.load(key_ptr + (position - 1) // each, mask=inside & (position > 0), other=-1)
        place = tl.load(place_ptr + own, mask=inside, other=0)
        tl.store(order_ptr + position, place * each + position % each, mask=inside)
        begins = inside & (here != before)
        segment_of = segment + tl.cumsum(begins.to(tl.int32), axis=0) - 1
        tl.store(segment_of_ptr + position, segment_of, mask=inside)
        slot = tl.where(here < slots, here, here - slots + INVALID_SLOT)
        tl.store(segment_slot_ptr + segment_of, slot, mask=begins)
        segment += tl.sum(begins.to(tl.int32), axis=0)
        if block_m > 0:
            begins |= inside & (position % block_m == 0)
            number = piece + tl.cumsum(begins.to(tl.int32), axis=0) - 1
            tl.store(piece_start_ptr + number, position, mask=begins)
            piece += tl.sum(begins.to(tl.int32), axis=0)

    # Entries that no segment or piece uses.
    for first in range(0, segments, STEP):
        unused = (first + offs >= segment) & (first + offs < segments)
        tl.store(segment_slot_ptr + first + offs, NO_SLOT, mask=unused)
    for first in range(0, pieces, STEP):
        unused = (first + offs >= piece) & (first + offs < pieces)
        tl.store(piece_start_ptr + first + offs, M, mask=unused)
    # The first id of each slot, by bisection.
    for first in range(0, slots + 1, STEP):
        low = tl.zeros((STEP,), dtype=tl.int32)
        high = low + B
        for _ in tl.static_range(BISECTIONS):
            middle = (low + high) // 2
            open_ = low < high
            less = tl.load(key_ptr + middle, mask=open_, other=0) < first + offs
            low = tl.where(open_ & less, middle + 1, low)
            high = tl.where(open_ & (less == 0), middle, high)
        tl.store(slot_start_ptr + first + offs, low * each, mask=first + offs <= slots)


def can_sort(ids: int, slots: int) -> bool:
    """Return whether one program can sort this many ids of this many slots."""
    return 0 < ids <= MAX_IDS and (slots + 3) * MAX_IDS < _MAX_KEYS


@cached_launches
def launch_mixed_rows_sort(
    ids: torch.Tensor,
    rows: Sequence[torch.Tensor],
    invalid: torch.Tensor,
    *,
    block_m: int,
    config: KernelConfig,
) -> None:
    """Write the sorted rows.

    Args:
        ids: Integers ``[B]`` that `can_sort` accepts, any stride. B divides M.
        rows: The tensors of `row_arguments`, contiguous, in the sizes that `fastlora.ops.rows.Rows`
            lists. Pieces are empty if ``block_m`` is 0.
        invalid: bool ``[1]``, which receives whether any id is invalid.
        block_m: Rows of a tile.
        config: From `configs.choose`.
    """
    order, _, segment_slot, slot_start, pieces = rows
    b, m = ids.shape[0], order.shape[0]
    width = min(width for width in _WIDTHS if b <= width)
    sorted_ids = empty(order, 2, width)  # both rows begin at a multiple of 16 bytes
    launch(
        _mixed_rows_sort_kernel,
        (1,),
        ids_ptr=ids,
        key_ptr=sorted_ids[0],
        place_ptr=sorted_ids[1],
        **row_arguments(rows),
        slot_start_ptr=slot_start,
        invalid_ptr=invalid,
        B=b,
        M=m,
        each=m // b,
        slots=slot_start.shape[0] - 1,
        segments=segment_slot.shape[0],
        pieces=pieces.shape[0],
        block_m=block_m,
        stride_ids=ids.stride(0),
        IDS=width,
        BISECTIONS=width.bit_length(),
        STEP=_STEP,
        **config.arguments(""),
    )
