"""Row groups: the rows of one batch sorted by slot, as kernels for mixed batches read them.

A segment is the run of sorted positions that share a slot; a piece is a run inside one segment that
never crosses a multiple of a kernel's row tile. Everything is built on the ids' device by a handful
of operations of fixed sizes: no host sync, so a CUDA graph may hold the build, or read buffers that
`RowGroups.update_` refills.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

NO_SLOT = -1
INVALID_SLOT = -2


@dataclass(frozen=True)
class RowGroups:
    """Which rows of a batch belong to which slot, on the device.

    Attributes:
        order: int32 ``[M]``, the row at each sorted position; rows of a slot keep their order.
            Invalid ids come first, then rows without an adapter, then slot after slot.
        segment_of: int32 ``[M]``, the segment of each sorted position, from 0 up.
        segment_slot: int32 ``[min(M, slots + 2)]``, the slot of each segment: `NO_SLOT` for rows
            without an adapter and for unused entries, `INVALID_SLOT` for ids out of range.
        invalid: bool ``[1]``, set once an id was out of range; it stays set until it is zeroed.
        m: Rows of the batch.
        slots: Ids run from -1 to ``slots - 1``.
        slot_start: int32 ``[slots + 1]``, the sorted position of each slot's first row, and M; a
            slot without rows starts where the next one does.
    """

    order: torch.Tensor
    segment_of: torch.Tensor
    segment_slot: torch.Tensor
    invalid: torch.Tensor
    m: int
    slots: int
    slot_start: torch.Tensor
    _pieces: dict[int, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def pieces(self, block_m: int) -> torch.Tensor:
        """Returns where each piece starts, int32 ``[pieces + 1]``; unused entries are M.

        Kept after the first call. When a CUDA graph is captured over buffers made outside of it,
        that call must come before the capture, as a warm-up run does.

        Args:
            block_m: Rows of a tile; there are ``ceil(M / block_m) + min(M, slots + 2)`` pieces.
        """
        made = self._pieces.get(block_m)
        if made is None:
            made = self._pieces.setdefault(
                block_m, piece_starts(self.segment_of, self.slots, block_m)
            )
        return made

    def update_(self, ids: torch.Tensor) -> None:
        """Writes the groups of other ids into the same buffers, pieces included.

        Args:
            ids: As for `build_row_groups`; each covers ``m / len(ids)`` rows.

        Raises:
            TypeError: ids are not integers.
            ValueError: ids have another shape than ``[B]`` with B a divisor of m.
        """
        order, segment_of, segment_slot, bad, slot_start = _group(
            ids, self.m, self.slots, self.order.device
        )
        self.order.copy_(order)
        self.slot_start.copy_(slot_start)
        self.segment_of.copy_(segment_of)
        self.segment_slot.copy_(segment_slot)
        self.invalid.logical_or_(bad)
        for block_m, starts in self._pieces.items():
            starts.copy_(piece_starts(segment_of, self.slots, block_m))


def build_row_groups(
    ids: torch.Tensor, m: int, slots: int, device: torch.device | None = None
) -> RowGroups:
    """Sorts the rows of a batch by slot.

    Args:
        ids: Integer tensor ``[B]``, m a multiple of B: each id covers ``m / B`` rows in sequence.
            -1 is a row without an adapter; other values outside ``[0, slots)`` are invalid, which
            sets a flag on the device instead of raising, since finding out would wait for it.
        m: Rows of the batch.
        slots: Slots there are.
        device: Where the groups are built; None for the device of ids.

    Raises:
        TypeError: ids are not integers.
        ValueError: ids have another shape, or slots is negative.
    """
    if slots < 0:
        raise ValueError(f"slots is {slots}, expected 0 or more")
    order, segment_of, segment_slot, bad, slot_start = _group(ids, m, slots, device or ids.device)
    return RowGroups(order, segment_of, segment_slot, bad, m, slots, slot_start)


def _group(
    ids: torch.Tensor, m: int, slots: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns order, segment_of, segment_slot, the flag and slot_start."""
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"ids has dtype {ids.dtype}, expected integers")
    if ids.dim() != 1 or (m % ids.shape[0] if ids.shape[0] else m):
        raise ValueError(f"ids has shape {tuple(ids.shape)}, expected [B] with B dividing {m} rows")
    ids = ids.to(device=device, non_blocking=True)
    bad = (ids < NO_SLOT) | (ids >= slots)
    # int32 sorts twice as fast, and is what the kernels read.
    slot = ids.masked_fill(bad, INVALID_SLOT).to(torch.int32)
    per_id = m // max(ids.shape[0], 1)
    slot = slot.view(-1, 1).expand(-1, per_id).reshape(m)
    slot, order = torch.sort(slot, stable=True)
    segment_of = _starts(slot).cumsum(0, dtype=torch.int32) - 1
    segment_slot = slot.new_full((min(m, slots + 2),), NO_SLOT)
    segment_slot.scatter_(0, segment_of.long(), slot)
    every_slot = torch.arange(slots + 1, dtype=torch.int32, device=device)
    slot_start = torch.searchsorted(slot, every_slot, out_int32=True)
    return order.to(torch.int32), segment_of, segment_slot, bad.any().view(1), slot_start


def _starts(values: torch.Tensor) -> torch.Tensor:
    """Returns bool ``[M]``: whether a value differs from the one before it (the first one does)."""
    differs = torch.ones(values.shape, dtype=torch.bool, device=values.device)
    torch.ne(values[1:], values[:-1], out=differs[1:])
    return differs


def piece_entries(m: int, slots: int, block_m: int) -> int:
    """Returns the length of what `RowGroups.pieces` returns; also of symbolic sizes."""
    entries: int = -(-m // block_m) + torch.sym_min(m, slots + 2) + 1
    return entries


def piece_starts(segment_of: torch.Tensor, slots: int, block_m: int) -> torch.Tensor:
    """`RowGroups.pieces` of rows in so many slots, made anew."""
    m = segment_of.shape[0]
    position = torch.arange(m, dtype=torch.int32, device=segment_of.device)
    starts = _starts(segment_of) | (position % block_m == 0)
    entries = piece_entries(m, slots, block_m)
    # Position 0 starts a tile and a segment, so the last two entries are never a piece: they take
    # the positions that start none, all with the value M.
    place = torch.where(starts, starts.cumsum(0) - 1, entries - 1)
    result = position.new_full((entries,), m)
    return result.scatter_(0, place, position.masked_fill(~starts, m))
