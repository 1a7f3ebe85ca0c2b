"""Information about the origin and order of tensors' rows, recorded per storage.

Views share their storage, so they need no record of their own.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastlora.routing import row_samples


class RowOriginKind(enum.Enum):
    """The possible origins of a tensor's rows.

    For example, the rows may be the rows of the batch in order, rows that were selected or
    reordered depending on the data, or rows made from parameters or constants. Rows without a
    recorded origin count as rows of the batch in order.

    Attributes:
        ROWS: Rows of the batch, in its order. A tensor without a record is of this kind.
        EVEN: Rows that the data selected, and that happen to be in the order of the batch.
        CHOSEN: Rows that the data selected or placed.
        TABLE: Made from parameters and buffers, without data. The rows are not rows of the batch.
        CONSTANT: Made from numbers alone, as by `torch.zeros`.
        COUNTED: Made by `torch.arange`: an index that preserves the order.
        IDENTITY: Made by `torch.eye`. Rows that the data selected from it are a CHOICE.
        CHOICE: Floating-point weights that are zero or nonzero depending on the data. A product
            with them may choose rows.
    """

    ROWS = enum.auto()
    EVEN = enum.auto()
    CHOSEN = enum.auto()
    TABLE = enum.auto()
    CONSTANT = enum.auto()
    COUNTED = enum.auto()
    IDENTITY = enum.auto()
    CHOICE = enum.auto()


class RowOriginFacts(NamedTuple):
    """Known facts about where a tensor's rows come from.

    The facts show whether the rows can be assigned to adapters by their position. The facts include
    the sample of the batch that each row belongs to, if the sample is known.

    Attributes:
        kind: The kind of the rows.
        origin: For a chosen tensor or an index, the key of the index that it was derived from.
        inverse: For an index that is the inverse of another index, the key of the other index.
        samples: The samples of the rows, int64, if values were read. Each item is the sample of one
            part of the storage, which is divided into as many equal parts. A tensor of the kind
            EVEN has samples only while rows have yet to be placed.
        fixed: For rows of the kinds CHOSEN and EVEN, whether every batch has the same samples in
            them: constants chose and placed them, or they are back where data took them from.
    """

    kind: RowOriginKind
    origin: int | None = None
    inverse: int | None = None
    samples: torch.Tensor | None = None
    fixed: bool = False


class StorageFacts(NamedTuple):
    """Known facts about the rows in a tensor's storage.

    A weak reference to the storage prevents its key from being reused.
    """

    storage: StorageWeakRef
    facts: RowOriginFacts


ROWS, TABLE, CONSTANT = (
    RowOriginFacts(RowOriginKind.ROWS),
    RowOriginFacts(RowOriginKind.TABLE),
    RowOriginFacts(RowOriginKind.CONSTANT),
)
# Kinds with rows in the order of the batch, and kinds without rows of the batch.
ORDERED = (RowOriginKind.ROWS, RowOriginKind.EVEN)
TABLES = (
    RowOriginKind.TABLE,
    RowOriginKind.CONSTANT,
    RowOriginKind.COUNTED,
    RowOriginKind.IDENTITY,
)
# With this number of entries, the entries of freed storages are dropped for the first time.
_FIRST_DROP = 4096


class RowFactsTable:
    """A table that maps tensors to the known facts about their rows.

    For example, the facts may state which sample of the batch each row comes from. The table covers
    the tensors of one block.

    Args:
        count: Number of adapter ids of the batch.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._by_storage: dict[int, StorageFacts] = {}
        self._next_drop = _FIRST_DROP

    def facts_of(self, tensor: torch.Tensor) -> RowOriginFacts:
        """Return the known facts about where a tensor's rows come from.

        The tensor is looked up by its storage.
        """
        entry = self._by_storage.get(storage_key(tensor))
        if entry is not None:
            return entry.facts
        return TABLE if isinstance(tensor, nn.Parameter) else ROWS

    def key_of_original_index(self, index: torch.Tensor) -> int:
        """Return the key of the original index from which an index tensor was derived.

        The key is an int that identifies the original index. If the tensor was not derived from
        another index, the key identifies the tensor itself.
        """
        origin = self.facts_of(index).origin
        return storage_key(index) if origin is None else origin

    def put(self, tensors: object, facts: RowOriginFacts) -> None:
        """Record the `RowOriginFacts` of a tensor, or of each tensor in a tuple or list.

        ``tensors`` is, for example, the output of an operator. Objects that are not tensors are
        ignored.
        """
        for tensor in tensors if isinstance(tensors, (tuple, list)) else (tensors,):
            if not isinstance(tensor, torch.Tensor):
                continue
            own = facts
            unknown = own.kind is RowOriginKind.CHOSEN and own.samples is None
            if (unknown or own.kind is RowOriginKind.CHOICE) and not tensor.is_floating_point():
                own = ROWS  # An index or a mask is never a layer's input.
            key = storage_key(tensor)
            if not key:
                continue
            if own == ROWS:
                self._by_storage.pop(key, None)
                continue
            if len(self._by_storage) >= self._next_drop:
                live = {k: m for k, m in self._by_storage.items() if not m.storage.expired()}
                self._by_storage, self._next_drop = live, max(_FIRST_DROP, 2 * len(live))
            self._by_storage[key] = StorageFacts(StorageWeakRef(tensor.untyped_storage()), own)

    def samples_of_rows(self, tensor: torch.Tensor, num_row_dims: int) -> torch.Tensor | None:
        """For each row of a tensor, return the index of the sample that the row belongs to.

        Each entry of the tensor's first ``num_row_dims`` dimensions is a row. Returns None if the
        samples are unknown.
        """
        facts, shape = self.facts_of(tensor), tensor.shape[:num_row_dims]
        if len(shape) < num_row_dims:
            return None
        if facts.kind in ORDERED:
            moved = row_samples.has_stride_larger_than_first(tensor)
            return None if moved else row_samples.samples_in_batch_order(shape, self.count)
        if facts.kind in TABLES:
            return row_samples.no_samples(shape)
        known = facts.samples
        return (
            None
            if known is None
            else row_samples.batch_sample_of_each_row(tensor, known, num_row_dims)
        )

    def samples_of_result(self, source: torch.Tensor, out: object) -> torch.Tensor | None:
        """For each row of a result, return the index of the sample that the row belongs to.

        The result ``out`` was computed row by row from ``source``. Returns None if the samples are
        unknown.
        """
        if not isinstance(out, torch.Tensor) or not out.dim():
            return None
        known = self.facts_of(source).samples
        if known is None or storage_key(out) == storage_key(source):
            return known
        lead = max(out.dim() - 1, 1)
        if source.shape[:lead] != out.shape[:lead]:
            return None
        if not row_samples.is_contiguous_and_covers_storage(out):
            return None
        found = self.samples_of_rows(source, lead)
        return None if found is None else found.flatten()

    def facts_from_samples(
        self, sample_index_per_row: torch.Tensor | None, index_key: int | None, *, fixed: bool
    ) -> RowOriginFacts:
        """Return the `RowOriginFacts` of rows that belong to the given samples.

        The rows were selected by an index, or they result from joining tensors with such rows.

        Args:
            sample_index_per_row: The sample of each row, or None if the samples are unknown.
            index_key: The key of the index, or None if it is unknown.
            fixed: See `RowOriginFacts`.
        """
        if sample_index_per_row is not None and row_samples.are_samples_in_batch_order(
            sample_index_per_row, self.count
        ):
            return ROWS if fixed else RowOriginFacts(RowOriginKind.EVEN)
        found = None if sample_index_per_row is None else sample_index_per_row.flatten()
        return RowOriginFacts(RowOriginKind.CHOSEN, index_key, None, found, fixed)

    def rows_have_fixed_sample_indices(self, *tensors: torch.Tensor) -> bool:
        """Return whether each row of the given tensors has the same sample index in every batch.

        The sample index of a row is the position in the batch of the sample that the row belongs
        to. The result is False if any of the tensors has a row whose sample index may differ
        between batches.
        """
        found = map(self.facts_of, tensors)
        return all(
            facts.fixed or facts.kind not in (RowOriginKind.EVEN, RowOriginKind.CHOSEN)
            for facts in found
        )

    def are_independent_of_input_data(self, *indices: torch.Tensor | None) -> bool:
        """Return whether all of the index tensors are independent of the input data.

        An index tensor is independent if it was computed without any input data, for example by
        `torch.arange`. An index of None is independent too.
        """
        return all(index is None or self.facts_of(index).kind in TABLES for index in indices)

    def discard(self, tensor: torch.Tensor) -> None:
        """Discard the known facts about where a tensor's rows come from.

        Without these facts, the rows are treated as the rows of the batch, in the same order.
        """
        self._by_storage.pop(storage_key(tensor), None)


def storage_key(tensor: torch.Tensor) -> int:
    """Return an integer that identifies a tensor's storage.

    The result is 0 if there is no storage, as for a sparse tensor.
    """
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return 0


def tensors_in(tree: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in a nested structure of tuples, lists, and dicts.

    ``tree`` may also be a single tensor. Objects of other types are ignored.
    """
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from tensors_in(each)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))
