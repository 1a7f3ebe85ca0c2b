"""What is known of the rows of tensors: marks on their storages.

Views share their storage, so they need no mark of their own.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastlora.routing import row_samples


class Kind(enum.Enum):
    """What the rows of a tensor are.

    Attributes:
        ROWS: Rows of the batch, in its order. A tensor without a mark is of this kind.
        EVEN: Rows that the data chose, and that are in the order of the batch this time.
        CHOSEN: Rows that the data chose, or placed.
        TABLE: Made from parameters and buffers, and no data: its rows are no rows of the batch.
        CONSTANT: Made from numbers alone, as by `torch.zeros`.
        COUNTED: Made by `torch.arange`: an index that keeps the order.
        IDENTITY: Made by `torch.eye`: its rows are a choice, if data choose them.
        CHOICE: Weights in floating point, zero or not by the data: a product may choose rows by
            them.
    """

    ROWS = enum.auto()
    EVEN = enum.auto()
    CHOSEN = enum.auto()
    TABLE = enum.auto()
    CONSTANT = enum.auto()
    COUNTED = enum.auto()
    IDENTITY = enum.auto()
    CHOICE = enum.auto()


class Facts(NamedTuple):
    """What is known of the rows of a storage.

    Attributes:
        kind: What they are.
        origin: Of a chosen tensor and of an index, the key of the index that it began with.
        inverse: Of an index that inverts another one, the key of that one.
        samples: The sample of each row, where values were read: int64, one for each of as many
            equal parts of the storage. Of an even tensor, only where rows have yet to be placed.
    """

    kind: Kind
    origin: int | None = None
    inverse: int | None = None
    samples: torch.Tensor | None = None


class Mark(NamedTuple):
    """What is known of a storage; the reference keeps its key from being given to another one."""

    storage: StorageWeakRef
    facts: Facts


ROWS, TABLE, CONSTANT = Facts(Kind.ROWS), Facts(Kind.TABLE), Facts(Kind.CONSTANT)
# Rows in the order of the batch; and no rows of the batch.
ORDERED = (Kind.ROWS, Kind.EVEN)
TABLES = (Kind.TABLE, Kind.CONSTANT, Kind.COUNTED, Kind.IDENTITY)
# Marks of storages that are gone are dropped first when there are so many marks.
_FIRST_DROP = 4096


class RowFacts:
    """What is known of the rows of each tensor of a block.

    Args:
        count: Number of adapter ids of the batch.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._marks: dict[int, Mark] = {}
        self._next_drop = _FIRST_DROP

    def of(self, tensor: torch.Tensor) -> Facts:
        """Returns what is known about the rows of a tensor."""
        mark = self._marks.get(key_of(tensor))
        if mark is not None:
            return mark.facts
        return TABLE if isinstance(tensor, nn.Parameter) else ROWS

    def origin(self, tensor: torch.Tensor) -> int:
        """Returns the key of the index that an index began with: its own where it is new."""
        origin = self.of(tensor).origin
        return key_of(tensor) if origin is None else origin

    def put(self, out: object, facts: Facts) -> None:
        """Record the facts of an operator's result."""
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, torch.Tensor):
                continue
            own = facts
            unknown = own.kind is Kind.CHOSEN and own.samples is None
            if (unknown or own.kind is Kind.CHOICE) and not tensor.is_floating_point():
                own = ROWS  # an index or a mask, not what a layer gets
            key = key_of(tensor)
            if not key:
                continue
            if own == ROWS:
                self._marks.pop(key, None)
                continue
            if len(self._marks) >= self._next_drop:
                live = {k: m for k, m in self._marks.items() if not m.storage.expired()}
                self._marks, self._next_drop = live, max(_FIRST_DROP, 2 * len(live))
            self._marks[key] = Mark(StorageWeakRef(tensor.untyped_storage()), own)

    def samples(self, tensor: torch.Tensor, lead: int) -> torch.Tensor | None:
        """Returns the samples of a tensor's ``lead`` first dimensions; None if not known."""
        facts, shape = self.of(tensor), tensor.shape[:lead]
        if len(shape) < lead:
            return None
        if facts.kind in ORDERED:
            moved = row_samples.is_moved(tensor)
            return None if moved else row_samples.in_order(shape, self.count)
        if facts.kind in TABLES:
            return row_samples.no_samples(shape)
        known = facts.samples
        return None if known is None else row_samples.of_view(tensor, known, lead)

    def carried(self, source: torch.Tensor, out: object) -> torch.Tensor | None:
        """Return the samples of a result that was computed row by row from chosen rows."""
        if not isinstance(out, torch.Tensor) or not out.dim():
            return None
        known = self.of(source).samples
        if known is None or key_of(out) == key_of(source):
            return known
        lead = max(out.dim() - 1, 1)
        if source.shape[:lead] != out.shape[:lead] or not row_samples.is_whole(out):
            return None
        found = self.samples(source, lead)
        return None if found is None else found.flatten()

    def facts_of_samples(
        self, samples: torch.Tensor | None, origin: int | None, by_data: bool
    ) -> Facts:
        """Returns the facts of rows with these samples, which an index picked."""
        if samples is not None and row_samples.is_in_order(samples, self.count):
            return Facts(Kind.EVEN) if by_data else ROWS
        return Facts(Kind.CHOSEN, origin, None, None if samples is None else samples.flatten())

    def are_tables(self, *indices: torch.Tensor | None) -> bool:
        """Whether all of these were made without data."""
        return all(index is None or self.of(index).kind in TABLES for index in indices)

    def forget(self, tensor: torch.Tensor) -> None:
        """Takes a tensor to be rows of the batch in its order."""
        self._marks.pop(key_of(tensor), None)


def key_of(tensor: torch.Tensor) -> int:
    """Returns what names a tensor's storage; 0 for a tensor without one, as a sparse tensor."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return 0


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Yields the tensors of arguments: nested in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
