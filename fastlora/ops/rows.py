"""`Rows`, which describes the rows of a mixed batch, sorted by the slots of their adapters.

Rows are sorted by slot on the device, with one kernel or a few operations of fixed sizes. The sort
needs no synchronization with the host, and a CUDA graph can contain it. Rows without an adapter
come last. If the last rows of a batch have no adapter, `Rows.first_rows` gives the sorted rows of
the batch without them. A segment is the range of sorted positions that share a slot. A piece is a
range within one segment that does not cross a boundary between a kernel's row tiles. The products
in PyTorch read segments on the host. If all rows have the same slot, callers pass None instead of a
`Rows`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from fastlora.ops.execution_mode import auto_selects_kernels
from fastlora.ops.library import define_operator, register_fake, register_implementation

NO_SLOT = -1
INVALID_SLOT = -2

define_operator(
    "rows_sort(Tensor ids, SymInt m, int slots, Device device, int block_m)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
define_operator("rows_pieces(Tensor segment_of, int slots, SymInt block_m) -> Tensor")


class Segment(NamedTuple):
    """A range of consecutive rows that use the same adapter.

    The rows have the same slot, and are consecutive in sorted order.

    Attributes:
        slot: The slot.
        start: Sorted position of the first row.
        stop: Sorted position after that of the last row.
    """

    slot: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Rows:
    """Describes which adapter slot each row of a batch uses.

    The rows are sorted by slot, and thus grouped by adapter.

    Attributes:
        order: int32 ``[M]``, the row at each sorted position. The slots come first, in order, then
            rows with invalid ids, then rows without an adapter. Rows of one slot keep their order.
        segment_of: int32 ``[M]``, the number of each sorted position's segment, counted from 0.
        segment_slot: int32 ``[min(M, slots + 2)]``, the slot of each segment. `NO_SLOT` stands for
            rows without an adapter and for unused entries, `INVALID_SLOT` for ids out of range.
        slot_start: int32 ``[slots + 1]``, the sorted position of each slot's first row, followed by
            the number of rows with a slot. The value for a slot without rows is that of the next
            slot.
        invalid: bool ``[1]``, whether any id was out of range.
        slots: Number of slots. Ids run from -1 to ``slots - 1``.
        m: Number of rows.
        each: Number of adjacent rows of each id, or 1 if unknown.
        ids: Slot of each sample or token, ``[B]``; None if the rows were given as tensors.
    """

    order: torch.Tensor
    segment_of: torch.Tensor
    segment_slot: torch.Tensor
    slot_start: torch.Tensor
    invalid: torch.Tensor
    slots: int
    m: int
    each: int = 1
    ids: torch.Tensor | None = None
    _pieces: dict[int, torch.Tensor] | None = field(default_factory=dict, repr=False)

    def operator_arguments(self) -> list[torch.Tensor]:
        """Return the list of tensors to pass to an operator.

        The list is the operator's ``rows`` argument.
        """
        return [self.order, self.segment_of, self.segment_slot, self.slot_start]

    def piece_starts(self, block_m: int) -> torch.Tensor:
        """Return the start of each piece, a range of sorted rows in one segment and one tile.

        Kernels work on tiles of ``block_m`` sorted rows. The rows of a segment, and thus of a
        piece, have the same adapter, or none. The starts are positions in sorted order. The result
        is int32 ``[pieces + 1]``. Unused entries are M.

        The first call caches the result. In a graph nothing is cached, because compilers merge
        equal calls. If a CUDA graph is captured over rows that were sorted outside of it, the first
        call must come before the capture, for example in a warm-up run.

        Args:
            block_m: Number of rows of a tile. The result has room for
                ``ceil(M / block_m) + min(M, slots + 2)`` pieces.
        """
        operator = torch.ops.fastlora.rows_pieces
        if self._pieces is None or type(self.segment_of) is not torch.Tensor:
            return operator(self.segment_of, self.slots, block_m)
        made = self._pieces.get(block_m)
        if made is None:
            made = operator(self.segment_of, self.slots, block_m)
            made = self._pieces.setdefault(block_m, made)
        return made

    # ----------------------------------------------------- on the host, for the products in PyTorch

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The segments, each of which is a range of sorted rows that use the same adapter.

        The rows of a segment have the same slot, and are adjacent in sorted order. There is one
        segment for each slot that has rows, in slot order. If the ids are on a GPU, the host waits
        for the GPU.
        """
        if self.ids is None:
            starts = self.slot_start.tolist()
        else:
            counts = (
                torch.bincount(self._sort_key_of_each_id_on_cpu, minlength=self.slots + 2)
                * self.each
            )
            starts = [0, *counts.cumsum(0)[: self.slots].tolist()]
        pairs = enumerate(zip(starts, starts[1:], strict=False))
        return tuple(Segment(slot, *pair) for slot, pair in pairs if pair[0] < pair[1])

    @functools.cached_property
    def segment_rows(self) -> tuple[slice | torch.Tensor, ...]:
        """The row indices of each segment.

        They are in ascending order. They are a slice if the rows are adjacent, and otherwise an
        int64 tensor.
        """
        if not self.segments:
            return ()
        order = self.order.long()
        ends = [at for segment in self.segments for at in (segment.start, segment.stop - 1)]
        if self.ids is None:
            rows = order[ends].tolist()
        else:  # The host does not wait for the device.
            order_of_ids = torch.argsort(self._sort_key_of_each_id_on_cpu, stable=True).tolist()
            rows = [order_of_ids[at // self.each] * self.each + at % self.each for at in ends]
        found = list[slice | torch.Tensor]()
        pairs = zip(self.segments, rows[::2], rows[1::2], strict=True)
        for (_, start, stop), first, last in pairs:
            adjacent = last - first == stop - start - 1
            found.append(slice(first, last + 1) if adjacent else order[start:stop])
        return tuple(found)

    @functools.cached_property
    def used_slots(self) -> tuple[int, ...]:
        """The slots that have rows.

        They are in ascending order.
        """
        return tuple(segment.slot for segment in self.segments)

    @functools.cached_property
    def _sort_key_of_each_id_on_cpu(self) -> torch.Tensor:
        """The sort key of each adapter id in `ids`, as a CPU tensor.

        Rows are sorted by the keys of their ids. The keys are int64. See
        `_sort_keys_and_invalid_mask`.
        """
        if self.ids is None:
            raise ValueError("rows that were created from tensors have no ids")
        return _sort_keys_and_invalid_mask(self.ids.cpu(), self.slots)[0].long()

    @functools.cached_property
    def is_sorted(self) -> bool:
        """Whether the rows are already sorted by adapter.

        If the rows are sorted, the position of each row is its sorted position.
        """
        if self.ids is None:
            return torch.equal(self.order, torch.arange(self.m, device=self.order.device))
        keys = self._sort_key_of_each_id_on_cpu
        return bool((keys[1:] >= keys[:-1]).all())

    @functools.cached_property
    def inverse_order(self) -> torch.Tensor:
        """The inverse of `order`: the sorted position of each row.

        It is an int64 tensor ``[M]``.
        """
        inverse = torch.empty(self.m, dtype=torch.int64, device=self.order.device)
        inverse[self.order.long()] = torch.arange(self.m, device=self.order.device)
        return inverse

    @functools.cached_property
    def segment_index(self) -> torch.Tensor:
        """The segment index of each row.

        It is an int64 tensor ``[M]``. Rows without an adapter have the index ``len(segments)``.
        """
        member = self.segment_of.long().clamp(max=len(self.segments))
        return member if self.is_sorted else member.index_select(0, self.inverse_order)

    @functools.cached_property
    def slot_index(self) -> torch.Tensor:
        """The index of each row's slot.

        The indices are an int64 tensor ``[M]``. Rows without an adapter have the value `slots`.
        """
        of_segment = torch.tensor([*self.used_slots, self.slots], device=self.order.device)
        return of_segment[self.segment_index]

    def first_rows(self, m: int) -> Rows:
        """Return a `Rows` object for the first ``m`` rows.

        The tensors of the result are views of the tensors of this object. None of the later rows
        may have an adapter. For example, they may be the rows that pad a batch to the size of a
        captured graph. One sort of the largest batch thus serves graphs of all sizes. The result
        has the pieces that this object has cached. A piece that reaches beyond ``m`` has no
        adapter, and kernels skip it.
        """
        pieces = {
            block_m: starts[: piece_starts_length(m, self.slots, block_m)]
            for block_m, starts in (self._pieces or {}).items()
        }
        return replace(
            self,
            order=self.order[:m],
            segment_of=self.segment_of[:m],
            segment_slot=self.segment_slot[: min(m, self.slots + 2)],
            m=m,
            each=1,
            ids=None,
            _pieces=pieces,
        )

    def in_sorted_order(self) -> Rows:
        """Return a `Rows` object that describes the same rows in sorted order.

        The rows are sorted by adapter. The result describes a tensor whose rows have been sorted.
        """
        m, device = self.m, self.order.device
        order = torch.arange(m, dtype=torch.int32, device=device)
        return replace(self, order=order, each=1, ids=None)

    @functools.cached_property
    def has_rows_without_slot(self) -> bool:
        """Whether any row has no slot.

        Rows without an adapter have no slot, and neither do rows with an invalid id. If the rows
        are on a GPU, the host waits for the GPU.
        """
        return int(self.slot_start[-1]) < self.m

    def sorted(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the given tensor with its rows sorted by adapter slot.

        The tensor has the shape ``[M, ...]``. If the rows are already sorted, the result is the
        tensor itself.
        """
        return tensor if self.is_sorted else tensor.index_select(0, self.order)

    def restored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a sorted tensor with its rows restored to their original order."""
        return tensor if self.is_sorted else tensor.index_select(0, self.inverse_order)


def sort_rows(
    ids: torch.Tensor,
    m: int,
    slots: int,
    device: torch.device | None = None,
    *,
    cache_pieces: bool = True,
) -> Rows:
    """Sort the rows of a batch by adapter, and return them as a `Rows` object.

    Each adapter is identified by its slot, and the rows are sorted by slot.

    Args:
        ids: The slots of the rows, as an integer tensor ``[B]``, where m is a multiple of B. Each
            id covers ``m / B`` adjacent rows. -1 stands for no adapter. Other values outside
            ``[0, slots)`` are invalid. They set a flag on the device instead of raising, because a
            check would wait for the device.
        m: Number of rows.
        slots: Number of slots.
        device: Device on which rows are sorted, or None for the device of ids.
        cache_pieces: Whether the result caches the pieces computed from it. Pass False in a graph.

    Raises:
        TypeError: ids are not integers.
        ValueError: ids have the wrong shape, or slots is negative.
    """
    device, block_m = device or ids.device, 0
    if cache_pieces and auto_selects_kernels(device):
        from fastlora.kernels.configs import piece_rows

        block_m = piece_rows(m)
    made = torch.ops.fastlora.rows_sort(ids, m, slots, device, block_m)
    order, segment_of, segment_slot, slot_start, invalid, pieces = made
    each = m // max(ids.shape[0], 1)
    cached: dict[int, torch.Tensor] | None = {} if cache_pieces else None
    if cached is not None and block_m:
        cached[block_m] = pieces
    return Rows(order, segment_of, segment_slot, slot_start, invalid, slots, m, each, ids, cached)


def rows_from_tensors(rows_argument: Sequence[torch.Tensor]) -> Rows:
    """Build a `Rows` from the tensors in an operator's ``rows`` argument.

    Pieces at the end of the argument are ignored.
    """
    order, segment_of, segment_slot, slot_start = rows_argument[:4]
    none = order.new_empty(0, dtype=torch.bool)
    sizes = slot_start.shape[0] - 1, order.shape[0]
    return Rows(order, segment_of, segment_slot, slot_start, none, *sizes)


@register_implementation("rows_sort")
def _sort_rows_by_slot(
    ids: torch.Tensor, m: int, slots: int, device: torch.device, block_m: int
) -> tuple[torch.Tensor, ...]:
    """Sort the rows of a batch by slot, and return the tensors that describe the sorted rows.

    The result is a tuple of the first five fields of `Rows`, and a tensor with the start positions
    of the pieces for tiles of ``block_m`` rows (see `Rows.piece_starts`). If
    ``block_m`` is 0, the last tensor is empty.
    """
    if slots < 0:
        raise ValueError(f"the number of slots must be non-negative, got {slots}")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"ids must have an integer dtype, got {ids.dtype}")
    if ids.dim() != 1 or (m % ids.shape[0] if ids.shape[0] else m):
        raise ValueError(
            f"ids has shape {tuple(ids.shape)}; expected [B], where B divides the number of rows "
            f"({m})"
        )
    ids = ids.to(device=device, non_blocking=True)
    if auto_selects_kernels(device):
        from fastlora.ops.triton.sorting import sort_rows_into

        made = sort_rows_into(
            ids, slots, _allocate_sort_results(m, slots, device, block_m), block_m
        )
        if made is not None:
            return made
    keys, bad = _sort_keys_and_invalid_mask(ids, slots)
    per_id = m // max(ids.shape[0], 1)
    keys = keys.view(-1, 1).expand(-1, per_id).reshape(m)
    keys, order = torch.sort(keys, stable=True)
    segment_of = _run_start_mask(keys).cumsum(0, dtype=torch.int32) - 1
    segment_slot = keys.new_full((min(m, slots + 2),), NO_SLOT)
    slot = torch.where(keys < slots, keys, keys - slots + INVALID_SLOT)
    segment_slot.scatter_(0, segment_of.long(), slot)
    every_slot = torch.arange(slots + 1, dtype=torch.int32, device=device)
    slot_start = torch.searchsorted(keys, every_slot, out_int32=True)
    pieces = _piece_starts(segment_of, slots, block_m) if block_m else keys.new_empty(0)
    order = order.to(torch.int32)
    return order, segment_of, segment_slot, slot_start, bad.any().view(1), pieces


@register_fake("rows_sort")
def _(
    ids: torch.Tensor, m: int, slots: int, device: torch.device, block_m: int
) -> tuple[torch.Tensor, ...]:
    return _allocate_sort_results(m, slots, device, block_m)


def _sort_keys_and_invalid_mask(ids: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys by which rows are sorted, and a mask of invalid ids.

    The result is a tuple (keys, mask). The keys are int32. The key of an id is its slot, ``slots``
    if the id is out of range, and ``slots + 1`` for rows without an adapter. The mask is a bool
    tensor that marks the ids that are out of range.
    """
    bad = (ids < NO_SLOT) | (ids >= slots)
    # int32 sorts twice as fast as int64, and the kernels read int32.
    keys = ids.to(torch.int32).masked_fill(bad, slots)
    return keys.masked_fill(ids == NO_SLOT, slots + 1), bad


def _allocate_sort_results(
    m: int, slots: int, device: torch.device, block_m: int
) -> tuple[torch.Tensor, ...]:
    """Allocate the tensors that `_sort_rows_by_slot` returns.

    The tensors are not initialized.
    """
    present, entries = torch.sym_min(m, slots + 2), piece_starts_length(m, slots, block_m)
    sizes = (m, m, present, slots + 1, 1, entries if block_m else 0)
    dtypes = (*[torch.int32] * 4, torch.bool, torch.int32)
    pairs = zip(sizes, dtypes, strict=True)
    return tuple(torch.empty(size, dtype=dtype, device=device) for size, dtype in pairs)


@register_implementation("rows_pieces")
def _piece_starts(segment_of: torch.Tensor, slots: int, block_m: int) -> torch.Tensor:
    """Return the start of each piece, a range of sorted rows in one segment and one tile.

    See `Rows.piece_starts`.
    """
    m = segment_of.shape[0]
    position = torch.arange(m, dtype=torch.int32, device=segment_of.device)
    starts = _run_start_mask(segment_of) | (position % block_m == 0)
    entries = piece_starts_length(m, slots, block_m)
    # Position 0 starts both a tile and a segment, so the last two entries are never used by a
    # piece. Positions that start no piece are written to the last entry, all with the value M.
    place = torch.where(starts, starts.cumsum(0) - 1, entries - 1)
    result = position.new_full((entries,), m)
    return result.scatter_(0, place, position.masked_fill(~starts, m))


@register_fake("rows_pieces")
def _(segment_of: torch.Tensor, slots: int, block_m: int) -> torch.Tensor:
    return segment_of.new_empty(piece_starts_length(segment_of.shape[0], slots, block_m))


def piece_starts_length(m: int, slots: int, block_m: int) -> int:
    """Return the length of the tensor that holds the start positions of the pieces.

    `Rows.piece_starts` returns this tensor. The length is an upper bound on the number of pieces,
    plus one. The arguments may be symbolic.
    """
    entries: int = -(-m // max(block_m, 1)) + torch.sym_min(m, slots + 2) + 1
    return entries


def _run_start_mask(values: torch.Tensor) -> torch.Tensor:
    """Return a mask that marks the first value of each run of equal values.

    The mask is a bool tensor. A value starts a run if it is the first of all values, or if it
    differs from the preceding one.
    """
    differs = torch.ones(values.shape, dtype=torch.bool, device=values.device)
    torch.ne(values[1:], values[:-1], out=differs[1:])
    return differs
